"""pictures.py: what is drawn, pixel by pixel."""
import numpy as np
import torch

import data
import datasets
import noise
import pictures
from conftest import flags


def test_pixels_become_grey_levels_and_noise_is_clipped():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 2, 2).expand(3, -1, -1)
    assert pictures.from_pixels(x).tolist() == [[[0] * 3, [128] * 3], [[255] * 3, [255] * 3]]
    one, four = torch.zeros(1, 2, 2), torch.stack([torch.full((2, 2), v) for v in (-1.0, 0.0, 1.0, 0.5)])
    assert pictures.from_pixels(one).tolist() == [[[128] * 3] * 2] * 2
    assert pictures.from_pixels(four)[0, 0].tolist() == [0, 128, 255]


def test_a_mask_has_its_colours_and_ignored_pixels_are_hatched():
    colours = np.array([[1, 2, 3], [40, 50, 60]], np.uint8)
    mask = np.array([[0, 1, 255]], np.uint8)
    assert pictures.colour_mask(mask, colours).tolist() == [[[1, 2, 3], [40, 50, 60], [255, 255, 255]]]
    assert {tuple(colour) for colour in pictures.colour_mask(np.full((8, 8), 255), colours).reshape(-1, 3).tolist()} == {
        (255, 255, 255), (150, 150, 150)}
    image = np.full((1, 3, 3), 100, np.uint8)
    assert pictures.overlay(image, mask, colours)[0].tolist() == [[50, 51, 51], [70, 75, 80], [177, 177, 177]]


def test_the_colours_of_a_palette_differ():
    colours = pictures.palette(40).astype(int)
    assert colours[0].tolist() == [0, 0, 0] and len(np.unique(colours, axis=0)) == 40
    distance = np.abs(colours[:8, None] - colours[None, :8]).sum(-1) + 999 * np.eye(8, dtype=int)
    assert distance.min() > 60


def test_a_sheet_shows_every_picture_whole_and_equally_wide():
    rng = np.random.RandomState(0)
    heights = (20, 10, 40)  # square, wide and tall: no gap beside a wide one
    rows = [[rng.randint(0, 256, (height, 20, 3), dtype=np.uint8) for _ in range(2)] for height in heights]
    page = np.asarray(pictures.sheet(rows, ["a", "b"], width=20))
    assert page.shape == (24 + sum(heights) + 18, 6 + 2 * 26, 3)
    top = 24
    for row, height in zip(rows, heights):
        assert np.array_equal(page[top:top + height, 6:26], row[0])
        assert np.array_equal(page[top:top + height, 32:52], row[1])
        top += height + 6
    assert (page[5:20, 6:26] < 128).any() and (page[5:20, 32:52] < 128).any()  # the titles
    enlarged = np.asarray(pictures.sheet([[rows[0][0]]], [""], width=40))
    assert np.array_equal(enlarged[24:64, 6:46], rows[0][0].repeat(2, 0).repeat(2, 1))


def test_a_legend_names_the_classes_in_their_colours_and_what_is_ignored():
    cell, colours = np.zeros((20, 150, 3), np.uint8), np.array([[200, 0, 0], [0, 0, 200]], np.uint8)
    page = np.asarray(pictures.sheet([[cell]], ["a"], 150, ["one", "two"], colours))
    plain = pictures.sheet([[cell]], ["a"], 150)
    assert page.shape[1] == plain.width and page.shape[0] > plain.height
    legend = page[plain.height:]
    for colour in colours:
        assert (legend == colour).all(-1).sum() == 100  # 10 x 10 inside the frame
    assert (legend == 150).all(-1).sum() > 10  # hatched
    many = np.asarray(pictures.sheet([[cell]], ["a"], 150, [f"class {i}" for i in range(9)], pictures.palette(9)))
    assert all((many[plain.height:] == colour).all(-1).sum() >= 100 for colour in pictures.palette(9))


def test_a_training_curve_goes_from_the_first_to_the_last_value():
    page = np.asarray(pictures.training_curve({"loss": [(0, 4.0), (50, 3.0), (100, 2.0)], "miou": [(100, 0.5)]}))
    line = (page == pictures.SERIES[1]).all(-1)
    assert page.shape == (600, 720, 3)
    assert line[28:33, 68:73].any() and line[258:263, 698:703].any()  # 4 at the left above, 2 at the right below
    middle = np.flatnonzero(line[:300, (70 + 700) // 2])
    assert abs(middle.mean() - (30 + 260) / 2) <= 2
    assert line[300:, 690:].any() and not line[300:, :690].any()


def test_curves_pass_through_their_points_with_bars_as_long_as_the_deviation():
    page = np.asarray(pictures.curves({"one": [(8, 40.0, 5.0), (32, 60.0, 0.0)]}, "x", "y", size=(500, 300)))
    ours = (page == pictures.SERIES[0]).all(-1)
    left, right, top, bottom = 70 + 40, 480 - 40, 20, 240  # the frame; y from 35 to 60
    assert ours[240 - round(220 * 5 / 25), left] and ours[top, right]
    column = np.flatnonzero(ours[:, left])
    assert abs(column.max() - bottom) <= 2 and abs(column.min() - (240 - round(220 * 10 / 25))) <= 2
    assert page.shape[1] > 500 and ours[20:40, 490:].any()  # the legend, beside all lines
    middle = (left + right) // 2
    assert np.flatnonzero(ours[:200, middle]).mean() == (240 - 220 * 15 / 25) or abs(
        np.flatnonzero(ours[:200, middle]).mean() - (240 - 220 * 15 / 25)) <= 2


def test_the_panel_shows_the_image_its_noise_and_the_prediction(script, few_shapes, tmp_path, monkeypatch):
    """A network that knows the noise: the third column is the noise itself, the fourth the image again."""
    import model
    import pretrain_decoder
    samples = data.Samples(datasets.pretraining_images("shapes", None), data.pretraining_transform(32, 0.5))
    sample = samples[0, 0]
    x = data.to_pixels(sample["image"][None])
    eps = noise.sample_noise(x.shape, [sample["noise_seed"]])
    args = pretrain_decoder.parse_arguments([*flags("pretrain_decoder"), "--gamma", "0.5"])
    unet = model.build_unet("hybrid-small", 1 / 32)
    monkeypatch.setattr(unet, "forward", lambda x_noisy, gamma: eps)
    page = np.asarray(pretrain_decoder.draw_panel(args, unet, samples, torch.device("cpu"), rows=1))
    wanted = [x, 0.5 ** 0.5 * x + 0.5 ** 0.5 * eps, eps / 3, x]
    for k, picture in enumerate(wanted):
        cell = page[24:184, 6 + 166 * k:166 + 166 * k]
        assert np.array_equal(cell, pictures.from_pixels(picture[0]).repeat(5, 0).repeat(5, 1)), k
