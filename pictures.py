"""The pictures that the scripts draw: tables of pictures, coloured masks, curves."""
from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, LINE = (30, 30, 30), (255, 255, 255), (215, 215, 215)
SERIES = ((120, 120, 120), (44, 110, 203), (222, 143, 5), (190, 50, 60), (60, 150, 80), (130, 80, 170))


def from_pixels(x):
    """A tensor (3, H, W), clipped to [-1, 1], as uint8 (H, W, 3)."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def palette(count):
    """`count` colours (count, 3) uint8: black for class 0, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return np.array([(0, 0, 0), *hues][:count]).round(6).astype(np.uint8)  # 46.9999... is 47


def colour_mask(mask, colours):
    """Class indices (H, W) in these colours (N, 3), as uint8 (H, W, 3); ignored pixels are white."""
    table = np.full((256, 3), 255, np.uint8)
    table[:len(colours)] = colours
    return table[np.asarray(mask)]


def overlay(image, mask, colours):
    """The colours of `mask` half over `image` (H, W, 3), uint8."""
    return ((image.astype(np.uint16) + colour_mask(mask, colours)) // 2).astype(np.uint8)


def sheet(rows, titles, height=128):
    """A PIL image: a table of pictures, rows of uint8 (H, W, 3), scaled to `height`; column titles."""
    font = ImageFont.load_default(13)
    cells = [[_scaled(Image.fromarray(picture), height) for picture in row] for row in rows]
    widths = [max(*(row[i].width for row in cells), round(font.getlength(title))) + 6
              for i, title in enumerate(titles)]
    lefts, top = np.cumsum([6, *widths]).tolist(), 24
    page = Image.new("RGB", (lefts[-1], top + (height + 6) * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    for left, title in zip(lefts, titles):
        draw.text((left, 5), title, INK, font)
    for i, row in enumerate(cells):
        for left, cell in zip(lefts, row):
            page.paste(cell, (left, top + i * (height + 6)))
    return page


def _scaled(picture, height):
    smooth = picture.height >= height  # enlarged pixels stay visible
    return picture.resize((max(1, round(picture.width * height / picture.height)), height),
                          Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)


def curves(series, x_label, y_label, size=(720, 480)):
    """A PIL image of lines with error bars. series: {name: [(x, mean, deviation), ...]}; x on a log scale."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 70, 20, size[0] - 20, size[1] - 60
    xs, means, deviations = np.array([point for line in series.values() for point in line], float).T
    xs = np.unique(xs)
    low = 5 * np.floor((means - deviations).min() / 5)
    high = 5 * np.ceil((means + deviations).max() / 5)
    span = np.log(xs[-1] / xs[0]) or 1.0

    def place(x, y, shift=0):
        across = left + 40 + (right - left - 80) * np.log(x / xs[0]) / span
        return across + shift, bottom - (bottom - top) * (y - low) / (high - low)

    for y in np.arange(low, high + 1, 5 if high - low <= 50 else 10):
        level = place(xs[0], y)[1]
        draw.line([(left, level), (right, level)], LINE)
        draw.text((left - 8, level), f"{y:g}", INK, small, anchor="rm")
    for x in xs:
        draw.text((place(x, low)[0], bottom + 8), f"{x:g}", INK, small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    draw.text(((left + right) / 2, size[1] - 12), x_label, INK, font, anchor="mb")
    draw.text((left + 8, top), y_label, INK, font)
    for i, (name, line) in enumerate(series.items()):
        colour, shift = SERIES[i % len(SERIES)], 5 * (i - (len(series) - 1) / 2)  # bars side by side
        draw.line([place(x, mean, shift) for x, mean, _ in line], colour, 2)
        for x, mean, deviation in line:
            draw.line([place(x, mean - deviation, shift), place(x, mean + deviation, shift)], colour)
            across, middle = place(x, mean, shift)
            draw.ellipse([across - 4, middle - 4, across + 4, middle + 4], colour)
        y = bottom - 20 * (len(series) - i)
        draw.line([(right - 190, y + 8), (right - 165, y + 8)], colour, 3)
        draw.text((right - 158, y), name, INK, font)
    return page
