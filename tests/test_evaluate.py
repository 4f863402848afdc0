"""evaluate.py: the scores by hand, the windows one by one, the script from end to end."""
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import datasets
import evaluate
from common import UserError
from conftest import TINY, Forked, load, write_image, write_mask
from test_datasets import pairs, pixels


class Mixed(nn.Module):
    """A "network" that sees its window: the colours, mixed with their right neighbours' and with the mean."""

    def forward(self, x):
        return x + 0.5 * F.pad(x, (0, 1))[..., 1:] + 0.1 * x.mean(dim=(2, 3), keepdim=True)


def test_scores_by_hand_where_a_class_does_not_occur_and_one_is_only_predicted():
    truth, prediction = torch.tensor([0, 1, 0, 255]), torch.tensor([0, 0, 3, 4])
    found = evaluate.scores(evaluate.confusion_matrix(prediction, truth, 5), list("abcde"))
    assert found["iou"] == {"a": pytest.approx(1 / 3), "b": 0, "c": None, "d": 0, "e": None}
    assert found["dice"] == {"a": 0.5, "b": 0, "c": None, "d": 0, "e": None}
    assert found["accuracy"] == {"a": 0.5, "b": 0, "c": None, "d": None, "e": None}
    means = [found[name] for name in ("miou", "mean_dice", "mean_accuracy", "pixel_accuracy")]
    assert means == pytest.approx([1 / 9, 1 / 6, 1 / 4, 1 / 3])
    ignored = evaluate.scores(evaluate.confusion_matrix(prediction, torch.full((4,), 255), 2), ["a", "b"])
    assert ignored["miou"] is ignored["pixel_accuracy"] is None and ignored["iou"] == {"a": None, "b": None}
    assert "mIoU" in evaluate.as_text(ignored) and "11.11" in evaluate.as_text(found)


def test_logits_that_are_not_finite_are_an_error_with_the_image(few, monkeypatch):
    factors = iter([1, float("nan"), 1])
    monkeypatch.setattr(evaluate, "predict", lambda model, x: x * next(factors))
    with pytest.raises(UserError, match="val-00001"):
        source = datasets.Toy([("val", i) for i in range(3)], "")
        evaluate.evaluate(Mixed(), source, list("abcdefg"), torch.device("cpu"))


def starts(side, window, stride):
    """Where windows start: every `stride` pixels while they fit, the last one at the edge."""
    return [at for at in range(0, side, stride) if at + window < side] + [max(0, side - window)]


@pytest.mark.parametrize("height, width", [(11, 14), (7, 22), (1, 9), (22, 7), (8, 16)])
@pytest.mark.parametrize("window, stride", [(8, 5), (8, None), (40, None), (0, None)])
@pytest.mark.parametrize("scales, flip", [((1.0,), False), ((0.5, 1.0, 1.75), True)])
def test_windows_flips_and_scales_are_what_a_slow_loop_computes(height, width, window, stride, scales, flip):
    x, views, side = torch.randn(2, 3, height, width), [], window or 99
    for scale in scales:
        size = [max(1, round(scale * length)) for length in (height, width)]
        scaled = F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in (False, True)[:1 + flip]:
            picture, logits = scaled.flip(3) if mirrored else scaled, torch.zeros_like(scaled)
            seen = {(top, left): Mixed()(picture[..., top:top + side, left:left + side])
                    for top in starts(size[0], side, stride or side)
                    for left in starts(size[1], side, stride or side)}
            for y, column in np.ndindex(*size):  # pixel by pixel: the mean of the windows that hold it
                logits[..., y, column] = torch.stack([
                    part[..., y - top, column - left] for (top, left), part in seen.items()
                    if 0 <= y - top < side and 0 <= column - left < side]).mean(0)
            logits = logits.flip(3) if mirrored else logits
            views.append(F.interpolate(logits, (height, width), mode="bilinear"))
    found = evaluate.predict(Mixed(), x, scales, flip, window, stride)
    torch.testing.assert_close(found, torch.stack(views).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data, encoder, crop, scales, flip, window", [
    ("cityscapes", "hybrid", 1024, [1], True, 1024), ("folder", "hybrid", 256, [1], True, 256),
    *[(data, "hybrid", 512, [0.5, 0.75, 1, 1.25, 1.5, 1.75], True, 512)
      for data in ("pascal_context", "pascal_context_60", "ade20k")],
    ("ade20k", "resnet50", 512, [1], True, 512), ("shapes", "hybrid-small", 64, [1], False, 0)])
def test_the_data_set_chooses_the_evaluation(data, encoder, crop, scales, flip, window):
    how = evaluate.protocol(data, encoder, crop)
    assert (list(how["scales"]), how["flip"], how["window"]) == (scales, flip, window)


OWN = ["--data", "folder", "--encoder", "hybrid-small", "--workers", 0, "--labels", 3]


def scores_in(out):
    return json.loads((out / "metrics.json").read_text())


def one_line(ended, word):
    """Whether a call ended with one line of stderr that names `word`."""
    status, err = ended
    return status == 2 and err.count("\n") == 1 and word in err


@pytest.fixture
def tuned(done, folder, tmp_path):
    """A run of finetune.py on own data, three images to validate on; it and its scores."""
    write_image(folder / "images" / "val" / "g.png", 30, 35, seed=9)
    write_mask(folder / "masks" / "val" / "g.png", np.random.RandomState(9).choice(3, (30, 35)))
    done("finetune", *TINY["finetune"], *OWN, "--root", folder, "--steps", 1, "--out", tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def again(script, tuned, tmp_path):
    """again(flag, ...) -> the scores of evaluate.py, None without masks, or (status, its error)."""
    def call(*flags):
        for path in tuned.glob("evaluate_*/metrics.json"):
            path.unlink()
        status, _, err = script("evaluate", "--checkpoint", tuned / "last.pt", "--workers", 0, *flags)
        found = [scores_in(path.parent) for path in tuned.glob("evaluate_*/metrics.json")]
        return (status, err) if status else found[0] if found else None
    return call


def test_other_images_are_scored(again, tuned, folder, tmp_path):
    wanted, flat = scores_in(tuned)["iou"], ["--images", "images/test/*", "--masks", "masks/test/*"]
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "test")
    assert one_line(again(), str(folder))
    folder = folder.rename(tmp_path / "elsewhere")
    assert again("--root", folder, "--images", "images/train/*", "--masks", "masks/train/*",
                 "--data", "folder")["images"] == 4
    other = ["--data", "folder", "--root", folder, *flat]
    assert again(*other)["iou"] == wanted
    assert again(*other, "--scales", 0.5, "--no-flip", "--window", 16)["iou"] != wanted


def test_other_classes_are_refused_and_the_same_may_have_other_values(again, tuned, folder, monkeypatch):
    assert one_line(again("--data", "shapes"), "shapes")
    (folder / "classes.txt").write_text("sky\nsea\nrocks\n")
    assert one_line(again("--data", "folder", "--root", folder), "rocks")
    (folder / "classes.txt").write_text("10 sky\n11 sea\n12 sand\n255 ignore\n")
    for path in (folder / "masks" / "val").iterdir():
        mask = np.array(Image.open(path)).astype(int)
        write_mask(path, np.where(mask == 255, 255, mask + 10))
    assert again("--data", "folder", "--root", folder).items() <= scores_in(tuned).items()
    monkeypatch.chdir(folder)
    assert one_line(again("--data", "folder"), "--root")


@pytest.mark.parametrize("stage", [1, 2, None])
def test_what_is_no_checkpoint_of_this_kind_is_refused(stage, script, done, encoder, few, tmp_path):
    if stage == 2:
        done("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", encoder, "--out", tmp_path)
    status, _, err = script("evaluate", "--checkpoint", encoder if stage == 1 else tmp_path / "last.pt")
    assert one_line((status, err), "last.pt")


def test_a_folder_without_masks_is_predicted_and_never_its_own_predictions(again, tmp_path):
    write_image(tmp_path / "photos" / "sub" / "one.jpg", 30, 77)
    for name in ("a.jpg", "a.png"):
        write_image(tmp_path / "photos" / name, 21, 34)
    photos, save = ["--data", "folder", "--root", tmp_path / "photos"], ["--save-predictions", tmp_path / "p"]
    for mistake, named in (([], "photos"), (["--save-predictions", tmp_path / "photos" / "p"], "photos/p"),
                           ([*save, "--out", tmp_path / "o"], "--out"), ([*save, "--masks", "m/*"], "m/")):
        assert one_line(again(*photos, *mistake), named)
    assert again(*photos, *save) is None
    for kind in ("index", "overlay"):
        sizes = [Image.open(path).size for path in sorted((tmp_path / "p" / kind).rglob("*.png"))]
        assert sizes == [(34, 21), (34, 21), (77, 30)]


@pytest.mark.parametrize("part, own, processes", [
    ("{part}/", [], 1), ("", ["--val-fraction", 0.3], 2), ("", ["--val-list", "val.txt"], 3)])
def test_what_a_run_was_validated_on_is_scored_by_any_number_of_processes_as_in_a_recount(
        part, own, processes, done, tmp_path):
    root, out = tmp_path / "d", tmp_path / "o"
    for i in range(7):
        place = root / ("val" if i < 2 else "train") / "s"
        write_image(place / "img" / f"{i}.png", 33 + i, 40, seed=i)
        write_mask(place / "gt" / f"{i}.png", np.random.RandomState(i).choice([0, 1, 255], (33 + i, 40)))
    (root / "classes.txt").write_text("sky\nsea\n")
    (tmp_path / "val.txt").write_text("val/s/img/0.png\nval/s/1\n")
    flags = ["--images", f"{part}*/img/*.png", "--masks", f"{part}*/gt/*.png", "--device", "cpu",
             *[tmp_path / flag if flag == "val.txt" else flag for flag in own]]
    done("finetune", *TINY["finetune"][:-4], *OWN[:-2], "--root", root, *flags, "--out", out)
    assert load(out)["data"].startswith("5 images") and Image.open(out / "predictions.png").width > 300
    run = Forked(tmp_path, "evaluate", "--checkpoint", out / "last.pt", "--workers", 0, "--device", "cpu",
                 "--save-predictions", tmp_path / "p", "--out", tmp_path / "scores", processes=processes)
    assert run.wait() == [0] * processes, run.output.read_text()
    said, truth = [], []
    for path in (tmp_path / "p" / "index").rglob("*.png"):
        said += pixels(path).flatten().tolist()
        truth += pixels(str(path).replace("/p/index/", "/d/").replace("/img/", "/gt/")).flatten().tolist()
    found = np.array([said, truth])[:, np.array(truth) != 255]
    miou = np.mean([(found == k).all(0).sum() / (found == k).any(0).sum() for k in (0, 1)])
    for metrics in (scores_in(out), scores_in(tmp_path / "scores")):
        assert metrics["images"] == 2 and metrics["miou"] == pytest.approx(miou)


def test_flags_without_an_effect_are_refused(again, script, few, tmp_path):
    assert one_line(again("--stride", 4, "--window", 0), "--stride")
    (tmp_path / "list.txt").write_text("f\n")
    assert again("--val-list", tmp_path / "list.txt")["images"] == 1
    for flags in (["--root", "x"], ["--images", "*.png"], ["--masks", "*.png"], ["--val-fraction", 0.5]):
        status, _, err = script("finetune", *flags, "--out", tmp_path / "shapes")
        assert one_line((status, err), flags[0])


def bright(model, x, **how):
    """Instead of the network's, logits by brightness: dark pixels are class 0, bright ones class 1."""
    return F.one_hot((x.mean(1) >= 0).long(), 2).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("classes, values", [
    ("0 background\n255 cell\n", [0, 255]), ("7 ignore\n3 cell\n9 back\n5 cell\n", [3, 9]),
    ("0 0 0 road\n255 0 10 car\n9 9 9 road\n", [(0, 0, 0), (255, 0, 10)])])
def test_predictions_have_the_values_of_the_training_masks_and_can_serve_as_masks(
        classes, values, done, tmp_path, monkeypatch):
    root, out = tmp_path / "data", tmp_path / "o"
    for name in ("sub/0.png", "sub/1.png"):
        write_image(root / "images" / "train" / name, 40, 56, seed=ord(name[4]))
        write_mask(root / "masks" / "train" / name, np.array(values)[np.arange(40 * 56).reshape(40, 56) % 2])
    (root / "classes.txt").write_text(classes)
    monkeypatch.setattr(evaluate, "predict", bright)
    flags = [*TINY["finetune"], *OWN, "--root", root, "--labels", 2, "--steps", 1]
    done("finetune", *flags, "--out", out)
    done("evaluate", "--checkpoint", out / "last.pt", "--data", "folder", "--root", root, "--workers", 0,
         "--images", "images/train/*", "--masks", "masks/train/*", "--save-predictions", tmp_path / "p")
    masks = f"{tmp_path}/p/index/images/{{part}}/*.png"
    source = pairs("folder", root, masks=masks)
    for i in range(2):
        wanted = pixels(root / source.name(i)).astype(float).mean(2) / 255 >= 0.5
        said = pixels(tmp_path / "p" / "index" / source.name(i), "RGB" * isinstance(values[0], tuple))
        assert (said == np.array(values)[wanted.astype(int)]).mean() > 0.99
        assert (source.read(i)["mask"].numpy() == wanted).mean() > 0.99  # but for rounding
    done("finetune", *flags, "--masks", masks, "--out", tmp_path / "again")


def test_a_mask_has_its_colours_and_ignored_pixels_are_hatched():
    mask = np.full((16, 24), 255, np.uint8)
    mask[2, 3], mask[2, 4], mask[15, 23] = 0, 1, 1
    page = evaluate.colour_mask(mask, [[200, 0, 0], [0, 0, 200]])
    assert page.shape == (16, 24, 3) and page.dtype == np.uint8
    assert page[[2, 2, 15], [3, 4, 23]].tolist() == [[200, 0, 0], [0, 0, 200], [0, 0, 200]]
    ignored = page[mask == 255]
    light, dark = ((ignored == grey).all(-1) for grey in (255, 150))
    assert (light | dark).all() and 0.2 < dark.mean() < 0.3


def test_a_table_shows_every_picture_whole_and_equally_wide_below_its_title():
    rng = np.random.RandomState(0)
    heights = (20, 10, 40)  # square, wide and tall
    rows = [[rng.randint(0, 256, (height, 20, 3), dtype=np.uint8) for _ in range(2)] for height in heights]
    page = np.asarray(evaluate.picture_table(rows, ["a", "b"], width=20))
    assert page.shape == (24 + sum(heights) + 3 * 6, 6 + 2 * 26, 3)
    for row, top, height in zip(rows, (24, 50, 66), heights):
        assert np.array_equal(page[top:top + height, 6:26], row[0])
        assert np.array_equal(page[top:top + height, 32:52], row[1])
    assert (page[5:20, 6:26] < 128).any() and (page[5:20, 32:52] < 128).any()  # the titles
    enlarged = np.asarray(evaluate.picture_table([[rows[0][0]]], [""], width=40))
    assert np.array_equal(enlarged[24:64, 6:46], rows[0][0].repeat(2, 0).repeat(2, 1))


def test_a_legend_shows_every_class_in_its_colour_what_is_ignored_and_long_texts_whole():
    names = [f"{'a long name ' * 4}{k}" for k in range(19)]
    colours = np.array([[12 * k, 255 - 12 * k, 7] for k in range(19)], np.uint8)
    for titles in (["image"], ["image", "truth", "a title " * 9]):
        row = [np.zeros((20, 40, 3), np.uint8)] * len(titles)
        page = np.asarray(evaluate.picture_table([row], titles, names, colours, 40))
        assert (page[:, -6:] == 255).all()  # nothing reaches the page's edge
        column = (page.shape[1] - 6) // len(titles)
        legend = page[-20 * -(-20 // len(titles)):]
        assert all((legend == colour).all(-1).sum() == 12 * 12 for colour in colours)  # whole, in its frame
        assert (legend == 150).all(-1).sum() > 10  # hatched
        for right in range(column, page.shape[1], column):  # nor the next column
            assert (legend[:, right:right + 6] == 255).all()
