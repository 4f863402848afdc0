"""The pictures that the scripts draw: sheets of captioned images, coloured masks, curves. Pillow and NumPy only."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORED = (255, 255, 255)
INK, PAPER, LINE = (30, 30, 30), (255, 255, 255), (215, 215, 215)


def from_pixels(x):
    """A tensor (3, H, W) in [-1, 1], clipped, as uint8 (H, W, 3): for looking at."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def palette(count):
    """`count` colours (count, 3) uint8: black for class 0, then hues a golden section apart."""
    colours = [(0, 0, 0)]
    for i in range(1, count):
        h = (i * 0.618034 % 1) * 6
        ramp = [min(max(abs((h + shift) % 6 - 3) - 1, 0), 1) for shift in (0, 4, 2)]
        value = (235, 175)[i // 7 % 2]
        colours.append(tuple(int(value * (0.2 + 0.8 * r)) for r in ramp))
    return np.array(colours[:count], np.uint8)


def colour_mask(mask, colours):
    """Class indices (H, W) in these colours (N, 3), as uint8 (H, W, 3); ignored pixels are white."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[:len(colours)] = colours
    return table[np.asarray(mask)]


def overlay(image, mask, colours):
    """The colours of `mask` half over `image`, uint8 (H, W, 3)."""
    return ((image.astype(np.uint16) + colour_mask(mask, colours)) // 2).astype(np.uint8)


def sheet(rows, titles=None, captions=None, height=128):
    """A table of pictures. rows: lists of uint8 (H, W, 3) of any size, scaled to `height`; titles: one per column;
    captions: a list like rows, of texts under each picture. The last row may be shorter. Returns a PIL image."""
    titles = titles or [""] * len(rows[0])
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    cells = [[Image.fromarray(np.ascontiguousarray(picture)) for picture in row] for row in rows]
    cells = [[cell.resize((max(1, round(cell.width * height / cell.height)), height),
                          Image.Resampling.NEAREST if cell.height < height else Image.Resampling.BILINEAR) for cell in row]
             for row in cells]
    widths = [max([row[i].width for row in cells if i < len(row)] + [round(font.getlength(titles[i]))]) + 6
              for i in range(len(titles))]
    top, row_height = 24 if any(titles) else 6, height + (20 if captions else 6)
    page = Image.new("RGB", (sum(widths) + 6, top + row_height * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        draw.text((6 + sum(widths[:i]), 5), title, INK, font)
    for j, row in enumerate(cells):
        for i, cell in enumerate(row):
            at = (6 + sum(widths[:i]), top + j * row_height)
            page.paste(cell, at)
            if captions:
                draw.text((at[0], at[1] + height + 2), captions[j][i], INK, small)
    return page


def curves(series, x_label, y_label, size=(720, 480)):
    """Lines with error bars. series: {name: [(x, mean, deviation), ...]}, x > 0 on a logarithmic axis. Returns a PIL image."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    colours = ((120, 120, 120), (44, 110, 203), (222, 143, 5), (190, 50, 60), (60, 150, 80), (130, 80, 170))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 70, 20, size[0] - 20, size[1] - 60
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _, _ in points})
    low = 5 * np.floor(min(mean - deviation for _, mean, deviation in points) / 5)
    high = 5 * np.ceil(max(mean + deviation for _, mean, deviation in points) / 5)
    span = np.log(xs[-1] / xs[0]) or 1.0

    def place(x, y):
        return (left + 40 + (right - left - 80) * np.log(x / xs[0]) / span, bottom - (bottom - top) * (y - low) / (high - low))

    for y in np.arange(low, high + 1, 5 if high - low <= 50 else 10):
        draw.line([(left, place(xs[0], y)[1]), (right, place(xs[0], y)[1])], LINE)
        draw.text((left - 8, place(xs[0], y)[1]), f"{y:g}", INK, small, anchor="rm")
    for x in xs:
        draw.text((place(x, low)[0], bottom + 8), f"{x:g}", INK, small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    draw.text(((left + right) / 2, size[1] - 12), x_label, INK, font, anchor="mb")
    draw.text((left + 8, top), y_label, INK, font)
    for i, (name, line) in enumerate(series.items()):
        colour, shift = colours[i % len(colours)], 5 * (i - (len(series) - 1) / 2)      # so that error bars stand side by side
        where = [(place(x, mean)[0] + shift, place(x, mean)[1]) for x, mean, _ in line]
        draw.line(where, colour, 2)
        for (x, mean, deviation), (at, middle) in zip(line, where):
            draw.line([(at, place(x, mean - deviation)[1]), (at, place(x, mean + deviation)[1])], colour)
            draw.ellipse([at - 4, middle - 4, at + 4, middle + 4], colour)
        y = bottom - 20 * (len(series) - i)
        draw.line([(right - 190, y + 8), (right - 165, y + 8)], colour, 3)
        draw.text((right - 158, y), name, INK, font)
    return page
