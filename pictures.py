"""Pictures to look at: coloured masks, a table, predictions on disk."""
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import IGNORE


def colour_mask(mask, colours):
    """Class indices (H, W) in `colours` (N, 3) as uint8 (H, W, 3). 255, ignored, is hatched."""
    mask = np.asarray(mask)
    colour_of = np.full((256, 3), 255, np.uint8)
    colour_of[:len(colours)] = colours
    page = colour_of[mask]
    y, x = np.indices(mask.shape)
    page[(mask == IGNORE) & ((x + y) % 8 >= 6)] = 150
    return page


def picture_table(rows, titles, names=(), colours=(), width=160):
    """A PIL image: titles, rows of uint8 (H, W, 3) and a legend, `width` a column or as wide as its texts."""
    font = ImageFont.load_default(13)
    entries = [*enumerate(names), (IGNORE, "ignored")] if names else []
    width = math.ceil(max(width, *map(font.getlength, titles),
                          *(23 + font.getlength(name) for _, name in entries)))
    heights = [max(1, round(width * row[0].shape[0] / row[0].shape[1])) for row in rows]
    legend = 24 + sum(heights) + 6 * len(rows)  # its y
    size = 6 + (width + 6) * len(titles), legend + 20 * math.ceil(len(entries) / len(titles))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        x, y = 6 + (width + 6) * column, 24
        draw.text((x, 5), title, "black", font)
        for row, height in zip(rows, heights):
            page.paste(Image.fromarray(row[column]).resize((width, height), Image.Resampling.BOX), (x, y))
            y += height + 6
    for i, (k, name) in enumerate(entries):
        row, column = divmod(i, len(titles))
        x, y = 6 + (width + 6) * column, legend + 20 * row
        draw.rectangle([x, y + 1, x + 13, y + 14], outline="black")
        page.paste(Image.fromarray(colour_mask(np.full((12, 12), k), colours)), (x + 1, y + 2))
        draw.text((x + 19, y), name, "black", font)
    return page


def writer(folder, source, classes):
    """A function for evaluate's `write` that fills folder/index and folder/overlay."""
    names = [source.name(i) for i in range(len(source))]
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) == len(stems):  # not so for a.jpg and a.png
        names = stems
    value_of = {k: value for value, k in reversed(classes.values.items())}  # the first value of each class
    in_colours = isinstance(value_of[0], tuple)
    index_of = np.array([k if in_colours else value_of[k] for k in range(len(classes.names))], np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[index_of] = classes.colours

    def write(index, image, prediction):
        mask = Image.fromarray(index_of[prediction.numpy()])
        mask.putpalette(palette.tobytes())
        overlay = image.permute(1, 2, 0).numpy() // 2 + colour_mask(prediction, classes.colours) // 2
        for kind, picture in (("index", mask), ("overlay", Image.fromarray(overlay))):
            path = f"{folder}/{kind}/{os.path.normpath('/' + names[index])}.png"  # without a leading ../
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path)
    return write
