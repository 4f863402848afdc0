"""Coloured masks; a table of pictures with titles and a legend."""
import math
from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)


def palette(count):
    """`count` colours (R, G, B): black for class 0, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return [(0, 0, 0), *(tuple(map(round, hue)) for hue in hues)][:count]


def from_pixels(x):
    """A tensor (3, H, W) in [-1, 1], clipped, as uint8 (H, W, 3)."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def colour_mask(mask, colours):
    """Class indices (H, W) in `colours` (N, 3) as uint8 (H, W, 3). Ignored pixels, 255, are hatched."""
    mask = np.asarray(mask)
    colour_of = np.full((256, 3), 255, np.uint8)
    colour_of[:len(colours)] = colours
    page = colour_of[mask]
    y, x = np.indices(mask.shape)
    page[(mask == 255) & ((x + y) % 8 >= 6)] = 150
    return page


def picture_table(rows, titles, width=160, names=(), colours=()):
    """A PIL image: titles, rows of uint8 (H, W, 3) and a legend. A row's pictures have one size.

    They are drawn `width` wide, or wider where a text needs it.
    """
    font = ImageFont.load_default(13)
    entries = [*enumerate(names), (255, "ignored")] if len(names) else []
    texts = [*map(font.getlength, titles), *(23 + font.getlength(name) for _, name in entries)]
    width = math.ceil(max(width, *texts))
    places = [6 + (width + 6) * i for i in range(len(titles))]
    heights = [max(1, round(width * row[0].shape[0] / row[0].shape[1])) for row in rows]
    legend = 24 + sum(heights) + 6 * len(rows)
    height = legend + 20 * math.ceil(len(entries) / len(titles))
    page = Image.new("RGB", (places[-1] + width + 6, height), PAPER)
    draw = ImageDraw.Draw(page)
    for x, title in zip(places, titles):
        draw.text((x, 5), title, INK, font)
    y = 24
    for row, height in zip(rows, heights):
        for x, cell in zip(places, row):
            page.paste(Image.fromarray(cell).resize((width, height), Image.Resampling.BOX), (x, y))
        y += height + 6
    for i, (k, name) in enumerate(entries):
        x, y = places[i % len(titles)], legend + 20 * (i // len(titles))
        page.paste(Image.fromarray(colour_mask(np.full((12, 12), k), colours)), (x, y + 2))
        draw.rectangle([x, y + 2, x + 11, y + 13], outline=INK)
        draw.text((x + 17, y), name, INK, font)
    return page
