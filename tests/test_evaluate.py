"""evaluate.py: the scores by hand, the windows one by one, the script from end to end."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import datasets
import evaluate
from common import UserError
from conftest import load, torchrun, write_image, write_mask
from test_datasets import cityscapes, pairs, pixels

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A "network" that sees its window: the colours, mixed with their right neighbours' and with the mean."""

    def forward(self, x):
        return x + 0.5 * F.pad(x, (0, 1))[..., 1:] + 0.1 * x.mean(dim=(2, 3), keepdim=True)


def test_a_confusion_matrix_counts_pixel_by_pixel():
    truth = torch.from_numpy(np.random.RandomState(0).choice([0, 1, 2, 3, 255], (9, 7)).astype(np.uint8))
    prediction = torch.from_numpy(np.random.RandomState(1).choice(4, (9, 7)).astype(np.uint8))
    wanted = [[((truth == t) & (prediction == p)).sum().item() for p in range(4)] for t in range(4)]
    found = evaluate.confusion_matrix(prediction, truth, 4)
    assert found.tolist() == wanted and found.dtype == torch.int64


def test_scores_by_hand():
    found = evaluate.scores(torch.tensor([[1, 1], [0, 1]]), ["a", "b"])
    assert found["iou"] == {"a": 0.5, "b": 0.5} and found["miou"] == 0.5
    assert found["accuracy"] == {"a": 0.5, "b": 1} and found["mean_accuracy"] == 0.75
    two_thirds = [*found["dice"].values(), found["mean_dice"], found["pixel_accuracy"]]
    assert two_thirds == pytest.approx([2 / 3] * 4)


def test_a_class_that_does_not_occur_does_not_count_and_one_only_predicted_does():
    truth, prediction = torch.tensor([0, 1, 0, 255]), torch.tensor([0, 0, 3, 4])
    found = evaluate.scores(evaluate.confusion_matrix(prediction, truth, 5), list("abcde"))
    assert found["iou"] == {"a": pytest.approx(1 / 3), "b": 0, "c": None, "d": 0, "e": None}
    assert found["miou"] == pytest.approx(1 / 9) and found["accuracy"]["c"] is found["dice"]["e"] is None
    ignored = evaluate.scores(evaluate.confusion_matrix(prediction, torch.full((4,), 255), 2), ["a", "b"])
    assert ignored["miou"] is ignored["pixel_accuracy"] is None and ignored["iou"] == {"a": None, "b": None}
    assert "mIoU" in evaluate.as_text(ignored) and "11.11" in evaluate.as_text(found)


def read(i):
    """A picture of a size of its own and its mask."""
    rng, size = np.random.RandomState(i), (5 + 2 * i, 12 - i)
    return {"image": torch.from_numpy(rng.randint(0, 256, (3, *size), dtype=np.uint8)),
            "mask": torch.from_numpy(rng.choice([0, 1, 2, 255], size).astype(np.uint8))}


class Five(datasets.Source):
    name = staticmethod("picture {}".format)
    read = staticmethod(read)


FIVE = Five(range(5), "")


def test_miou_is_of_the_pixels_of_all_images_not_a_mean_over_images():
    found, union, hits = evaluate.evaluate(Mixed(), FIVE, list("abc"), CPU), np.zeros(3), np.zeros(3)
    for sample in map(FIVE.read, range(5)):
        said = Mixed()((sample["image"][None] - 127.5) / 127.5)[0].argmax(0).numpy()
        truth = sample["mask"].numpy()
        for k in range(3):
            hits[k] += ((said == k) & (truth == k)).sum()
            union[k] += (((said == k) | (truth == k)) & (truth != 255)).sum()
    assert found["miou"] == pytest.approx((hits / union).mean()) and found["images"] == 5


@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_image_counts_once_on_any_number_of_processes(world, monkeypatch):
    alone, matrices, sizes = evaluate.evaluate(Mixed(), FIVE, list("abc"), CPU), [], {}
    monkeypatch.setattr(common, "total", lambda matrix: matrices.append(matrix.clone()) or matrix)
    for rank in range(world):
        evaluate.evaluate(Mixed(), FIVE, list("abc"), CPU, rank, world,
                          write=lambda i, image, prediction: sizes.update({i: prediction.shape}))
    assert evaluate.scores(sum(matrices), list("abc")).items() <= alone.items()
    assert sum(matrices).sum() == sum((read(i)["mask"] != 255).sum() for i in range(5))
    assert sizes == {i: (5 + 2 * i, 12 - i) for i in range(5)}


def test_logits_that_are_not_finite_are_an_error_with_the_image(monkeypatch):
    monkeypatch.setattr(evaluate, "predict", lambda model, x: x * float("nan" if x.shape[3] == 12 - 3 else 1))
    with pytest.raises(UserError, match="picture 3"):
        evaluate.evaluate(Mixed(), FIVE, list("abc"), CPU)


def starts(side, window, stride):
    """Where windows start: every `stride` pixels while they fit, the last one at the edge."""
    return [at for at in range(0, side, stride) if at + window < side] + [max(0, side - window)]


@pytest.mark.parametrize("height, width", [(11, 14), (7, 30), (1, 9), (30, 7), (8, 16)])
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
def tuned(script, tiny, folder, tmp_path):
    """A run of finetune.py on own data, three images to validate on; it and its scores."""
    write_image(folder / "images" / "val" / "g.png", 30, 35, seed=9)
    write_mask(folder / "masks" / "val" / "g.png", np.random.RandomState(9).choice(3, (30, 35)))
    flags = tiny("finetune", *OWN, "--root", folder, "--out", tmp_path / "tuned")
    assert script("finetune", *flags)[0] == 0
    return tmp_path / "tuned"


@pytest.fixture
def again(script, tuned, tmp_path):
    """again(flag, ...) -> the scores of evaluate.py, if it has any, or (status, its error)."""
    def call(*flags, checkpoint=tuned / "last.pt", out=tmp_path / "o"):
        command = ["--checkpoint", checkpoint, "--workers", 0, "--out", out, *flags]
        status, _, err = script("evaluate", *command)
        return (status, err) if status else scores_in(out) if out.exists() else None
    return call


def test_the_script_scores_as_the_fine_tuning_did_on_any_number_of_processes(again, tuned, tmp_path):
    wanted = scores_in(tuned)
    assert wanted.pop("step") == 4 and wanted["images"] == 3 and wanted["miou"] is not None
    assert again() == wanted != again("--scales", 0.5, "--no-flip", "--window", 16)
    two = torchrun(2, "evaluate", "--checkpoint", tuned / "last.pt", "--workers", 0, "--device", "cpu")
    assert two.returncode == 0 and scores_in(tuned / "evaluate_val") == wanted, two.stderr


def test_other_images_and_parts_are_scored(again, tuned, folder, tmp_path):
    wanted = scores_in(tuned)["iou"]
    assert again("--split", "train")["images"] == 4 and one_line(again("--split", "test"), "test")
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "test")
    assert again("--split", "test")["iou"] == wanted
    folder.rename(tmp_path / "elsewhere")
    flat = ["--data", "folder", "--images", "images/test/*", "--masks", "masks/test/*"]
    for more in (["--split", "test"], flat):
        assert again("--root", tmp_path / "elsewhere", *more)["iou"] == wanted


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


@pytest.mark.parametrize("content", ["stage 1", "stage 2", b"text", b"", None])
def test_what_is_no_checkpoint_of_this_kind_is_refused(content, script, encoder, few, tiny, tmp_path):
    if content == "stage 2":
        assert script("pretrain_decoder", *tiny("pretrain_decoder"), "--steps", 1, "--out", tmp_path)[0] == 0
    elif content is not None:
        (tmp_path / "last.pt").write_bytes(Path(encoder).read_bytes() if content == "stage 1" else content)
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert one_line((status, err), "last.pt")


def test_a_folder_without_masks_is_predicted_and_never_its_own_predictions(script, tuned, tmp_path):
    write_image(tmp_path / "photos" / "sub" / "one.jpg", 30, 77)
    for name in ("a.jpg", "a.png"):
        write_image(tmp_path / "photos" / name, 21, 34)
    photos = ["--checkpoint", tuned / "last.pt", "--workers", 0, "--data", "folder", "--root", tmp_path / "photos"]
    for mistake, named in (([], "photos"), (["--save-predictions", tmp_path / "photos" / "p"], "photos/p"),
                           (["--save-predictions", tmp_path / "p", "--out", tmp_path / "o"], "--out"),
                           (["--save-predictions", tmp_path / "p", "--masks", "masks/*"], "masks")):
        status, _, err = script("evaluate", *photos, *mistake)
        assert one_line((status, err), named)
    assert script("evaluate", *photos, "--save-predictions", tmp_path / "p")[0] == 0
    for kind in ("index", "overlay"):
        sizes = [Image.open(path).size for path in sorted((tmp_path / "p" / kind).rglob("*.png"))]
        assert sizes == [(34, 21), (34, 21), (77, 30)]


LAYOUTS = {  # as they are published: flags, images and masks of train, those of validation
    "CamVid": (["--images", "{part}/*.png", "--masks", "{part}annot/*.png"],
               "train/0001TP_%d.png trainannot/0001TP_%d.png", "val/0016E5_%d.png valannot/0016E5_%d.png"),
    "labelme": (["--images", "JPEGImages/*.jpg", "--masks", "SegmentationClassPNG/*.png", "--val-fraction", 0.4],
                "JPEGImages/%d.jpg SegmentationClassPNG/%d.png", ""),
    "LoveDA": (["--images", "{part}/*/images_png/*.png", "--masks", "{part}/*/masks_png/*.png"],
               "train/Rural/images_png/%d.png train/Rural/masks_png/%d.png",
               "val/Urban/images_png/%d.png val/Urban/masks_png/%d.png"),
    "BUSI": (["--images", "*.png", "--masks", "*_mask.png", "--val-list", "val.txt"],
             "benign/benign (%d).png benign/benign (%d)_mask.png",
             "normal/normal (%d).png normal/normal (%d)_mask.png")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_need_two_patterns_or_a_list_and_the_score_is_a_recount(
        name, script, tmp_path, monkeypatch):
    flags, train, val = LAYOUTS[name]
    monkeypatch.chdir(tmp_path)
    for layout in filter(None, (train, val)):
        image, mask = layout.replace(".png ", ".png|").replace(".jpg ", ".jpg|").split("|")
        for i in range(5 if layout == train else 2):
            write_image(tmp_path / "d" / (image % i), 33 + i, 40, seed=i)
            write_mask(tmp_path / "d" / (mask % i), np.random.RandomState(i).choice([0, 1, 255], (33 + i, 40)))
    (tmp_path / "d" / "classes.txt").write_text("sky\nsea\n")
    (tmp_path / "val.txt").write_text("normal (0).png\nnormal/normal (1)\n")
    more = ["--encoder", "hybrid-small", "--workers", 0, "--steps", 1, "--crop-size", 32, "--width", 0.03125]
    status, _, err = script("finetune", "--data", "folder", "--root", "d", *flags, *more, "--out", "o")
    assert status == 0, err
    assert load("o")["data"].startswith("3 images" if name == "labelme" else "5 images")
    assert script("evaluate", "--checkpoint", "o/last.pt", "--workers", 0, "--save-predictions", "p")[0] == 0
    pairs = np.concatenate([np.stack([pixels(path), pixels(mask_of(name, path))]).reshape(2, -1)
                            for path in (tmp_path / "p" / "index").rglob("*.png")], axis=1)
    pairs = pairs[:, pairs[1] != 255]
    ious = [(pairs == k).all(0).sum() / (pairs == k).any(0).sum() for k in (0, 1)]
    assert scores_in(tmp_path / "o")["images"] == 2
    assert scores_in(tmp_path / "o")["miou"] == pytest.approx(np.mean(ious))
    assert scores_in(tmp_path / "o" / "evaluate_val")["miou"] == pytest.approx(np.mean(ious))


def mask_of(name, prediction):
    """The mask of d/ whose image was predicted."""
    path = str(prediction).replace("/p/index/", "/d/")
    for image, mask in (("val/", "valannot/"), ("JPEGImages", "SegmentationClassPNG"),
                        ("images_png", "masks_png")):
        path = path.replace(image, mask) if mask != "valannot/" or name == "CamVid" else path
    return path.replace(".png", "_mask.png") if name == "BUSI" else path


def test_flags_without_an_effect_are_refused(again, script, few, tmp_path):
    assert one_line(again("--stride", 4, "--window", 0), "--stride")
    (tmp_path / "list.txt").write_text("f\n")
    assert again("--val-list", tmp_path / "list.txt")["images"] == 1
    assert one_line(again("--val-list", tmp_path / "list.txt", "--split", "train"), "--split")
    for flags in (["--root", "x"], ["--images", "*.png"], ["--masks", "*.png"], ["--val-fraction", 0.5]):
        status, _, err = script("finetune", *flags, "--out", tmp_path / "shapes")
        assert one_line((status, err), flags[0])


def bright(count):
    """Instead of the network's, logits by brightness: dark pixels are class 0, bright ones the last."""
    def predict(model, x, **how):
        level = ((x.mean(1) + 1) / 2 * count).long().clamp(max=count - 1)
        return F.one_hot(level, count).permute(0, 3, 1, 2).float()
    return predict


@pytest.mark.parametrize("data, classes, values", [
    ("folder", "0 background\n255 cell\n", [0, 255]),
    ("folder", "7 ignore\n3 cell\n9 back\n5 cell\n", [3, 9]),
    ("folder", "0 0 0 road\n255 0 10 car\n9 9 9 road\n", [(0, 0, 0), (255, 0, 10)]),
    ("cityscapes", None, [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])])
def test_predictions_have_the_values_of_the_training_masks_and_can_serve_as_masks(
        data, classes, values, script, tiny, tmp_path, monkeypatch):
    root, pattern = tmp_path / "data", "images/{part}/*.png"
    if data == "cityscapes":
        cityscapes(root)
        (root / "leftImg8bit" / "val").rename(root / "val")
        pattern = "leftImg8bit/{part}/*_leftImg8bit.png"
    for name in (f"sub/{i}.png" for i in range(2 if classes else 0)):
        write_image(root / "images" / "train" / name, 40, 56, seed=ord(name[4]))
        write_mask(root / "masks" / "train" / name, np.array(values)[np.arange(40 * 56).reshape(40, 56) % 2])
        (root / "classes.txt").write_text(classes)
    monkeypatch.setattr(evaluate, "predict", bright(len(values)))
    flags = [*tiny("finetune", *OWN), "--root", root, "--data", data, "--labels", 2, "--steps", 1]
    assert script("finetune", *flags, "--out", tmp_path / "tuned")[0] == 0
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "tuned" / "last.pt", "--split", "train",
                            "--workers", 0, "--save-predictions", tmp_path / "p")
    assert status == 0, err
    masks = f"{tmp_path}/p/index/{pattern}"
    source = pairs(data, root, masks=masks)
    assert len(source) == (2 if classes else 4)
    for i in range(len(source)):
        level = pixels(root / source.name(i)).astype(float).mean(2) / 255 * len(values)
        wanted = level.astype(int).clip(max=len(values) - 1)
        said = pixels(tmp_path / "p" / "index" / source.name(i), "RGB" * isinstance(values[0], tuple))
        assert (said == np.array(values)[wanted]).mean() > 0.99
        assert (source.read(i)["mask"].numpy() == wanted).mean() > 0.99  # but for rounding
    status, _, err = script("finetune", *flags, "--masks", masks, "--out", tmp_path / "again")
    assert status == 0, err
