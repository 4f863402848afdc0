"""evaluate.py: the scores by hand, the windows one by one, the script from end to end."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import datasets
import evaluate
from common import UserError
from conftest import TINY, Forked, load, one_line, pairs, pixels, write_image, write_mask, write_pairs


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
        source = datasets.Shapes([("val", i) for i in range(3)], "", ())
        evaluate.evaluate(Mixed(), source, list("abcdefg"), torch.device("cpu"))


@pytest.mark.parametrize("height, width", [(11, 14), (7, 22), (1, 9), (22, 7), (8, 16)])
@pytest.mark.parametrize("window, stride", [(8, 5), (8, None), (40, None), (0, None)])
@pytest.mark.parametrize("scales, flip", [((1.0,), False), ((0.5, 1.0, 1.75), True)])
def test_windows_flips_and_scales_are_what_a_slow_loop_computes(height, width, window, stride, scales, flip):
    def starts(side, window, stride):
        """Where windows start: every `stride` pixels while they fit, the last one at the edge."""
        return [at for at in range(0, side, stride) if at + window < side] + [max(0, side - window)]

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


@pytest.mark.parametrize("classes, room, room_at_175", [
    (19, "cuda", "cuda"), (60, "cuda", "cpu"), (150, "cpu", "cpu")])
def test_logits_of_large_pictures_are_summed_beside_the_gpu(classes, room, room_at_175, fake_cuda):
    def network(x):
        return x[:, :1].expand(-1, classes, -1, -1)

    x = torch.zeros(1, 3, 1536, 2048)  # at scale 1.75 150 classes take 5.8 GB
    logits = evaluate.predict(network, x, (0.5, 1, 1.75), True, 1024)
    assert (logits.shape, logits.device.type) == ((1, classes, 1536, 2048), room)
    larger = evaluate.in_windows(network, torch.zeros(1, 3, 2688, 3584), 1024, None)
    assert larger.device.type == room_at_175


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


@pytest.fixture
def tuned(done, folder, tmp_path):
    """A run of finetune.py on own data, three images to validate on; it and its scores."""
    done("finetune", *TINY["finetune"], *OWN, "--root", folder, "--steps", 1, "--out", tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def again(script, tuned, tmp_path):
    """again(flag, ...) -> the scores of evaluate.py, None without masks, or how it ended with an error."""
    def call(*flags):
        for path in tuned.glob("evaluate_*/metrics.json"):
            path.unlink()
        ended = script("evaluate", "--checkpoint", tuned / "last.pt", "--workers", 0, *flags)
        found = [scores_in(path.parent) for path in tuned.glob("evaluate_*/metrics.json")]
        return ended if ended[0] else found[0] if found else None
    return call


def test_other_images_are_scored_if_their_classes_are_the_same(again, tuned, folder, tmp_path, monkeypatch):
    wanted, own = scores_in(tuned), ["--data", "folder", "--root"]
    assert one_line(again("--data", "shapes"), "shapes")
    (folder / "classes.txt").write_text("sky\nsea\nrocks\n")
    assert one_line(again(*own, folder), "rocks")
    (folder / "classes.txt").write_text("10 sky\n11 sea\n12 sand\n255 ignore\n")
    for path in (folder / "masks" / "val").iterdir():
        mask = pixels(path).astype(int)
        write_mask(path, np.where(mask == 255, 255, mask + 10))
    assert again()["iou"] == again(*own, folder)["iou"] == wanted["iou"]
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "test")
    assert one_line(again(), str(folder))
    folder = folder.rename(tmp_path / "elsewhere")
    other = [*own, folder, "--images", "images/test/*", "--masks", "masks/test/*"]
    assert again(*other)["iou"] == wanted["iou"]
    assert again(*other, "--scales", 0.5, "--no-flip", "--window", 16)["iou"] != wanted["iou"]
    (folder / "classes.txt").unlink()  # the values of the training
    assert again(*own, folder, "--images", "images/train/*", "--masks", "masks/train/*")["images"] == 4
    monkeypatch.chdir(folder)
    assert one_line(again("--data", "folder"), "--root")


def test_scores_and_predictions_say_what_they_are_of_and_are_not_mixed_with_others(
        script, done, tuned, folder, tmp_path):
    out, save, val, order = (tmp_path / name for name in ("o", "p", "val.txt", "order.txt"))
    command = ["evaluate", "--checkpoint", tuned / "last.pt", "--workers", 0, "--out", out]
    done(*command, "--save-predictions", save)
    before, found = (out / "metrics.json").read_bytes(), scores_in(out)
    how = {"scales": [1.0], "flip": True, "window": 32, "stride": None}
    assert found.items() >= dict(checkpoint=str(tuned / "last.pt"), step=1, images=3, precision="fp32",
                                 protocol=how).items()
    assert all(part in found["data"] for part in (str(folder), "images/val/e.jpg", "images/val/g.jpg"))
    val.write_text("e\nf\ng\n")
    order.write_text("f\ne\ng\n")
    other, own = shutil.copytree(folder, tmp_path / "other"), ["--data", "folder", "--root"]
    for more in (["--no-flip"], ["--scales", 1, 0.5], ["--window", 24], [*own, other], ["--val-list", order],
                 [*own, folder, "--images", "images/train/*", "--masks", "masks/train/*"]):
        assert one_line(script(*command, *more), out) and (out / "metrics.json").read_bytes() == before, more
    (out / "metrics.json").write_text(json.dumps({**found, "miou": -1}))
    done(*command, "--val-list", val, "--window", 32)  # the same in other words
    torch.save({**load(tuned), "step": 2}, tuned / "last.pt")
    assert one_line(script(*command), out) and scores_in(out) == found
    written = {file: file.stat().st_mtime_ns for file in save.rglob("*.png")}
    for place in (save, folder / "images" / "p", folder / "masks" / "val"):
        assert one_line(script(*command, "--save-predictions", place), place)
    assert written == {file: file.stat().st_mtime_ns for file in save.rglob("*.png")} and len(written) == 6
    assert len([*folder.rglob("*.*g")]) == 2 * (4 + 3)


@pytest.mark.parametrize("stage", [1, 2, None])
def test_what_is_no_checkpoint_of_this_kind_is_refused(stage, script, done, encoder, few, tmp_path):
    if stage == 2:
        done("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", encoder, "--out", tmp_path)
    checkpoint = encoder if stage == 1 else tmp_path / "last.pt"
    assert one_line(script("evaluate", "--checkpoint", checkpoint), "last.pt")


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
    write_pairs(root, *[f"{'train' if i > 1 else 'val'}/s/{kind}/{i}.png" for i in range(7)
                        for kind in ("img", "gt")], values=(0, 1, 255))
    (tmp_path / "val.txt").write_text("val/s/img/0.png\nval/s/1\n")
    flags = ["--images", f"{part}*/img/*.png", "--masks", f"{part}*/gt/*.png",
             *[tmp_path / flag if flag == "val.txt" else flag for flag in own]]
    done("finetune", *TINY["finetune"][:-2], *OWN[:-2], "--root", root, *flags, "--out", out)
    assert load(out)["made_of"]["training_images"].startswith("5 images")
    assert Image.open(out / "predictions.png").width > 300
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


@pytest.mark.parametrize("classes, values", [
    ("0 background\n255 cell\n", [0, 255]), ("7 ignore\n3 cell\n9 back\n5 cell\n", [3, 9]),
    ("0 0 0 road\n255 0 10 car\n9 9 9 road\n", [(0, 0, 0), (255, 0, 10)])])
def test_predictions_have_the_values_of_the_training_masks_and_can_serve_as_masks(
        classes, values, done, tmp_path, monkeypatch):
    def bright(model, x, **how):
        """Instead of the network's, logits by brightness: dark pixels are class 0, bright ones class 1."""
        return F.one_hot((x.mean(1) >= 0).long(), 2).permute(0, 3, 1, 2).float()

    root, out = tmp_path / "data", tmp_path / "o"
    paths = [f"{kind}/train/sub/{i}.png" for i in range(2) for kind in ("images", "masks")]
    write_pairs(root, *paths, values=values)
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
