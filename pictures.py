"""The pictures that the scripts draw: tables of pictures, coloured masks, curves."""
from colorsys import hsv_to_rgb

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, LINE = (30, 30, 30), (255, 255, 255), (215, 215, 215)
SERIES = ((120, 120, 120), (44, 110, 203), (222, 143, 5), (190, 50, 60), (60, 150, 80), (130, 80, 170),
          (40, 170, 180), (140, 100, 60))


def from_pixels(x):
    """A tensor (bands, H, W) in [-1, 1], clipped, as uint8 (H, W, 3): see `three_bands`."""
    values = (three_bands(x.detach().float().cpu()).clamp(-1, 1) + 1) * 127.5
    return values.round().byte().permute(1, 2, 0).numpy()


def as_picture(image):
    """(bands, H, W) in [0, 255] as uint8 (H, W, 3): see `three_bands`."""
    image = image if image.dtype == torch.uint8 else image.round().byte()
    return three_bands(image).permute(1, 2, 0).numpy()


def three_bands(x):
    """The bands to display: the first three, or the first one three times if there are fewer."""
    return x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)


def palette(count):
    """`count` colours (count, 3) uint8: black for class 0, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return np.array([(0, 0, 0), *hues][:count]).round(6).astype(np.uint8)  # 46.9999... is 47


def colour_mask(mask, colours):
    """Class indices (H, W) in these colours (N, 3), as uint8 (H, W, 3); what is ignored is hatched."""
    mask = np.asarray(mask)
    table = np.full((256, 3), 255, np.uint8)
    table[:len(colours)] = colours
    page = table[mask]
    y, x = np.nonzero(mask == 255)
    hatched = (x + y) % 8 >= 6
    page[y[hatched], x[hatched]] = 150
    return page


def overlay(image, mask, colours):
    """The colours of `mask` half over `image`, uint8 (H, W, 3)."""
    coloured = colour_mask(mask, colours)
    return (image & coloured) + ((image ^ coloured) >> 1)  # their mean in 8 bits: pictures may be large


def sheet(rows, titles, width=128, names=(), colours=()):
    """A PIL image with a table of pictures: rows of uint8 (H, W, 3), drawn `width` wide, and a legend."""
    font = ImageFont.load_default(13)
    columns = max(width, *(round(font.getlength(title)) for title in titles)) + 6
    rows = [[_scaled(Image.fromarray(picture), width) for picture in row] for row in rows]
    tops = np.cumsum([24, *(max(cell.height for cell in row) + 6 for row in rows)]).tolist()
    entries = [*enumerate(names), (255, "ignored")] if len(names) else []
    places = _legend_places([name for _, name in entries], font, 6 + columns * len(titles))
    page = Image.new("RGB", (6 + columns * len(titles), tops[-1] + 20 * len({y for _, y in places})), PAPER)
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        draw.text((6 + columns * i, 5), title, INK, font)
    for top, row in zip(tops, rows):
        for i, cell in enumerate(row):
            page.paste(cell, (6 + columns * i, top))
    for (k, name), (x, y) in zip(entries, places):
        y += tops[-1]
        swatch = colour_mask(np.full((12, 12), k), colours)
        page.paste(Image.fromarray(swatch), (x, y + 2))
        draw.rectangle([x, y + 2, x + 11, y + 13], outline=INK)
        draw.text((x + 17, y), name, INK, font)
    return page


def _legend_places(names, font, width):
    """Where each entry of a legend begins, (x, y), in lines of at most `width`."""
    places, x, y = [], 6, 0
    for name in names:
        needed = 17 + round(font.getlength(name)) + 12
        if x > 6 and x + needed > width:
            x, y = 6, y + 20
        places.append((x, y))
        x += needed
    return places


def _scaled(picture, width):
    smooth = picture.width >= width  # enlarged pixels stay visible
    return picture.resize((width, max(1, round(picture.height * width / picture.width))),
                          Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)


def training_curve(panels, size=(720, 300)):
    """A PIL image of lines over steps, one panel below the other: {"loss": [(step, value), ...], ...}."""
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (size[0], size[1] * len(panels)), PAPER)
    draw = ImageDraw.Draw(page)
    last = max(step for points in panels.values() for step, _ in points)
    for i, (name, points) in enumerate(panels.items()):
        left, right, top, bottom = 70, size[0] - 20, size[1] * i + 30, size[1] * (i + 1) - 40
        values = np.array(points, float)[:, 1]
        low, high = values.min(), values.max() if values.max() > values.min() else values.min() + 1
        across = [left + (right - left) * step / last for step, _ in points]
        down = bottom - (bottom - top) * (values - low) / (high - low)
        for level in np.linspace(0, 1, 5):
            y = bottom - (bottom - top) * level
            draw.line([(left, y), (right, y)], LINE)
            draw.text((left - 8, y), f"{low + (high - low) * level:.3g}", INK, font, anchor="rm")
            x = left + (right - left) * level
            draw.text((x, bottom + 8), f"{last * level:g}", INK, font, anchor="mt")
        draw.text((left, top - 18), name, INK, font)
        draw.line(list(zip(across, down)), SERIES[1], 2)
        draw.ellipse([across[-1] - 3, down[-1] - 3, across[-1] + 3, down[-1] + 3], SERIES[1])
    return page


def curves(series, x_label, y_label, size=(720, 480)):
    """A PIL image of lines with error bars. series: {name: [(x, mean, deviation), ...]}; x on a log scale."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left, top, right, bottom = 70, 20, size[0] - 20, size[1] - 60
    legend = 50 + max(round(font.getlength(name)) for name in series)  # at the right, where no line can be
    page = Image.new("RGB", (size[0] + legend, size[1]), PAPER)
    draw = ImageDraw.Draw(page)
    xs, means, deviations = np.array([point for line in series.values() for point in line], float).T
    xs = np.unique(xs)
    low = 5 * np.floor((means - deviations).min() / 5)
    high = max(low + 5, 5 * np.ceil((means + deviations).max() / 5))
    span = np.log(xs[-1] / xs[0]) or 1.0

    def place(x, y, shift=0):
        across = left + 40 + (right - left - 80) * np.log(x / xs[0]) / span
        return across + shift, bottom - (bottom - top) * (y - low) / (high - low)

    for y in np.arange(low, high + 1, 5 * np.ceil((high - low) / 50)):
        level = place(xs[0], y)[1]
        draw.line([(left, level), (right, level)], LINE)
        draw.text((left - 8, level), f"{y:g}", INK, small, anchor="rm")
    for x in xs:
        draw.text((place(x, low)[0], bottom + 8), f"{x:.3g}" if x < 100 else f"{x:g}", INK, small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    draw.text(((left + right) / 2, bottom + 48), x_label, INK, font, anchor="mb")
    draw.text((left + 8, top), y_label, INK, font)
    for i, (name, line) in enumerate(series.items()):
        colour, shift = SERIES[i % len(SERIES)], 5 * (i - (len(series) - 1) / 2)  # bars side by side
        draw.line([place(x, mean, shift) for x, mean, _ in line], colour, 2)
        for x, mean, deviation in line:
            draw.line([place(x, mean - deviation, shift), place(x, mean + deviation, shift)], colour)
            across, middle = place(x, mean, shift)
            draw.ellipse([across - 4, middle - 4, across + 4, middle + 4], colour)
        y = top + 20 * i
        draw.line([(right + 8, y + 8), (right + 33, y + 8)], colour, 3)
        draw.text((right + 40, y), name, INK, font)
    return page
