"""pictures.py: colours, tables and legends, pixel by pixel; predictions on disk are in test_evaluate.py."""
import numpy as np

from pictures import colour_mask, picture_table


def test_a_mask_has_its_colours_and_ignored_pixels_are_hatched():
    mask = np.full((16, 24), 255, np.uint8)
    mask[2, 3], mask[2, 4], mask[15, 23] = 0, 1, 1
    page = colour_mask(mask, [[200, 0, 0], [0, 0, 200]])
    assert page.shape == (16, 24, 3) and page.dtype == np.uint8
    assert page[[2, 2, 15], [3, 4, 23]].tolist() == [[200, 0, 0], [0, 0, 200], [0, 0, 200]]
    ignored = page[mask == 255]
    light, dark = ((ignored == grey).all(-1) for grey in (255, 150))
    assert (light | dark).all() and 0.2 < dark.mean() < 0.3


def test_a_table_shows_every_picture_whole_and_equally_wide_below_its_title():
    rng = np.random.RandomState(0)
    heights = (20, 10, 40)  # square, wide and tall
    rows = [[rng.randint(0, 256, (height, 20, 3), dtype=np.uint8) for _ in range(2)] for height in heights]
    page = np.asarray(picture_table(rows, ["a", "b"], width=20))
    assert page.shape == (24 + sum(heights) + 3 * 6, 6 + 2 * 26, 3)
    for row, top, height in zip(rows, (24, 50, 66), heights):
        assert np.array_equal(page[top:top + height, 6:26], row[0])
        assert np.array_equal(page[top:top + height, 32:52], row[1])
    assert (page[5:20, 6:26] < 128).any() and (page[5:20, 32:52] < 128).any()  # the titles
    enlarged = np.asarray(picture_table([[rows[0][0]]], [""], width=40))
    assert np.array_equal(enlarged[24:64, 6:46], rows[0][0].repeat(2, 0).repeat(2, 1))


def test_a_legend_shows_every_class_in_its_colour_what_is_ignored_and_long_texts_whole():
    names = [f"{'a long name ' * 4}{k}" for k in range(19)]
    colours = np.array([[12 * k, 255 - 12 * k, 7] for k in range(19)], np.uint8)
    for titles in (["image"], ["image", "truth", "a title " * 9]):
        row = [np.zeros((20, 40, 3), np.uint8)] * len(titles)
        page = np.asarray(picture_table([row], titles, names, colours, 40))
        assert (page[:, -6:] == 255).all()  # nothing reaches the page's edge
        column = (page.shape[1] - 6) // len(titles)
        legend = page[-20 * -(-20 // len(titles)):]
        assert all((legend == colour).all(-1).sum() == 12 * 12 for colour in colours)  # whole, in its frame
        assert (legend == 150).all(-1).sum() > 10  # hatched
        for right in range(column, page.shape[1], column):  # nor the next column
            assert (legend[:, right:right + 6] == 255).all()
