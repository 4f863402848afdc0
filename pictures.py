"""Coloured masks; a table of pictures with titles and a legend."""
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
    """Class indices (H, W) in these colours (N, 3), as uint8 (H, W, 3); 255, ignored, is hatched."""
    mask = np.asarray(mask)
    colour_of = np.full((256, 3), 255, np.uint8)
    colour_of[:len(colours)] = colours
    page = colour_of[mask]
    y, x = np.nonzero(mask == 255)
    hatched = (x + y) % 8 >= 6
    page[y[hatched], x[hatched]] = 150
    return page


def picture_table(rows, titles, width=160, names=(), colours=()):
    """A PIL image: rows of uint8 (H, W, 3), drawn `width` wide below their titles, and a legend."""
    font, step = ImageFont.load_default(13), width + 6
    cells = [[Image.fromarray(cell) for cell in row] for row in rows]
    cells = [[cell.resize((width, max(1, round(cell.height * width / cell.width))),
                          Image.Resampling.BILINEAR if cell.width >= width else Image.Resampling.NEAREST)
              for cell in row] for row in cells]  # enlarged pixels stay visible
    tops = np.cumsum([24, *(max(cell.height for cell in row) + 6 for row in cells)]).tolist()
    entries = [*enumerate(names), (255, "ignored")] if len(names) else []
    places, x, y = [], 6, tops[-1]
    for _, name in entries:
        needed = 29 + round(font.getlength(name))
        if x > 6 and x + needed > step * len(titles):
            x, y = 6, y + 20
        places.append((x, y))
        x += needed
    page = Image.new("RGB", (6 + step * len(titles), y + 20 * bool(entries)), PAPER)
    draw = ImageDraw.Draw(page)
    for i, title in enumerate(titles):
        draw.text((6 + step * i, 5), title, INK, font)
    for top, row in zip(tops, cells):
        for i, cell in enumerate(row):
            page.paste(cell, (6 + step * i, top))
    for (k, name), (x, y) in zip(entries, places):
        page.paste(Image.fromarray(colour_mask(np.full((12, 12), k), colours)), (x, y + 2))
        draw.rectangle([x, y + 2, x + 11, y + 13], outline=INK)
        draw.text((x + 17, y), name, INK, font)
    return page
