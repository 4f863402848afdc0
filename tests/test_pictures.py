"""pictures.py: what is drawn, pixel by pixel."""
import numpy as np
import torch

import pictures

COLOURS = np.array([[200, 0, 0], [0, 0, 200]], np.uint8)


def test_pixels_become_grey_levels_and_what_is_beyond_is_clipped():
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0], [-9.0, 1.0, 1.0, -1.0], [1.0, 0.2, -1.0, -1.0]])
    wanted = [[[0, 0, 255], [128, 255, 153], [255, 255, 0], [255, 0, 0]]]
    for dtype in (torch.float32, torch.float64):
        assert pictures.from_pixels(x.to(dtype).reshape(3, 1, 4).requires_grad_()).tolist() == wanted


def test_a_mask_has_its_colours_and_ignored_pixels_are_hatched():
    mask = np.full((16, 24), 255, np.uint8)
    mask[2, 3], mask[2, 4], mask[15, 23] = 0, 1, 1
    page = pictures.colour_mask(mask, COLOURS)
    assert page.shape == (16, 24, 3) and page.dtype == np.uint8
    assert page[[2, 2, 15], [3, 4, 23]].tolist() == [[200, 0, 0], [0, 0, 200], [0, 0, 200]]
    ignored = page[mask == 255]
    light, dark = ((ignored == grey).all(-1) for grey in (255, 150))
    assert (light | dark).all() and 0.2 < dark.mean() < 0.3


def test_a_table_shows_every_picture_whole_and_equally_wide_below_its_title():
    rng = np.random.RandomState(0)
    heights = (20, 10, 40)  # square, wide and tall
    rows = [[rng.randint(0, 256, (height, 20, 3), dtype=np.uint8) for _ in range(2)] for height in heights]
    page = np.asarray(pictures.picture_table(rows, ["a", "b"], width=20))
    assert page.shape == (24 + sum(heights) + 3 * 6, 6 + 2 * 26, 3)
    for row, top, height in zip(rows, (24, 50, 66), heights):
        assert np.array_equal(page[top:top + height, 6:26], row[0])
        assert np.array_equal(page[top:top + height, 32:52], row[1])
    assert (page[5:20, 6:26] < 128).any() and (page[5:20, 32:52] < 128).any()  # the titles
    enlarged = np.asarray(pictures.picture_table([[rows[0][0]]], [""], width=40))
    assert np.array_equal(enlarged[24:64, 6:46], rows[0][0].repeat(2, 0).repeat(2, 1))


def test_a_legend_shows_every_class_in_its_colour_and_what_is_ignored():
    cell = np.zeros((20, 150, 3), np.uint8)
    plain = pictures.picture_table([[cell]], ["a"], 150)
    colours = np.array([[20 * k, 255 - 20 * k, 7] for k in range(9)], np.uint8)
    for names, table in ((["one", "two"], COLOURS), ([f"class {k}" for k in range(9)], colours)):
        page = np.asarray(pictures.picture_table([[cell]], ["a"], 150, names, table))
        assert page.shape[1] == plain.width and np.array_equal(page[:plain.height], np.asarray(plain))
        legend = page[plain.height:]
        assert all((legend == colour).all(-1).sum() == 10 * 10 for colour in table)  # whole, in its frame
        assert (legend == 150).all(-1).sum() > 10  # hatched


def test_long_texts_are_drawn_whole():
    names, colours = [f"{'a long name ' * 4}{k}" for k in range(19)], pictures.palette(19)
    for titles in (["image"], ["image", "truth", "a title " * 9]):
        row = [np.zeros((20, 40, 3), np.uint8)] * len(titles)
        page = np.asarray(pictures.picture_table([row], titles, 40, names, colours))
        assert (page[:, -6:] == pictures.PAPER).all()  # nothing reaches the page's edge
        column = (page.shape[1] - 6) // len(titles)
        legend = page[-20 * -(-20 // len(titles)):]
        for right in range(column, page.shape[1], column):  # nor the next column
            assert (legend[:, right:right + 6] == pictures.PAPER).all()
