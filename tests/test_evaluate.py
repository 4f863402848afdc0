"""evaluate.py: the scores by hand, the windows one by one, the script from end to end."""

import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, Forked, write_image, write_mask, write_stack
from PIL import Image

import data
import datasets
import evaluate
import launch

ALONE = launch.Processes(0, 1, torch.device("cpu"))


class Colours(nn.Module):
    """A "network" whose answer can be computed by hand: class scores are the colours, mixed with their right neighbours'."""

    def forward(self, x):
        return x + 0.5 * F.pad(x, (0, 1))[..., 1:] + 0.1 * x.mean(dim=(2, 3), keepdim=True)


# ------------------------------------------------------------------------------------------------ scores


def test_miou_of_a_2x2_image_by_hand():
    truth, prediction = torch.tensor([[0, 0], [1, 255]]), torch.tensor([[0, 1], [1, 0]])
    confusion = evaluate.confusion_matrix(prediction, truth, 2)
    assert confusion.tolist() == [[1, 1], [0, 1]] and confusion.dtype == torch.int64
    scores = evaluate.scores(confusion, ["a", "b"])
    assert (scores["iou"] == {"a": 0.5, "b": 0.5} and scores["miou"] == 0.5
            and scores["pixel_accuracy"] == pytest.approx(2 / 3))
    assert scores["dice"] == {"a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3)}
    assert scores["precision"] == {"a": 1.0, "b": 0.5} and scores["recall"] == {"a": 0.5, "b": 1.0}
    assert (scores["mean_precision"], scores["mean_recall"]) == (0.75, 0.75)
    assert scores["mean_dice"] == pytest.approx(2 / 3)


def test_a_class_that_does_not_occur_does_not_count():
    confusion = evaluate.confusion_matrix(torch.tensor([0, 0, 3]), torch.tensor([0, 1, 0]), 5)
    scores = evaluate.scores(confusion, list("abcde"))
    assert scores["iou"] == {"a": pytest.approx(1 / 3), "b": 0.0, "c": None, "d": 0.0, "e": None}
    assert scores["miou"] == pytest.approx(1 / 9)  # over a, b (in the truth) and d (in the prediction)
    assert scores["precision"] == {"a": 0.5, "b": 0.0, "c": None, "d": 0.0, "e": None}
    assert scores["recall"] == {"a": 0.5, "b": 0.0, "c": None, "d": 0.0, "e": None}


def test_masks_that_are_all_ignored_give_no_score_and_no_error():
    scores = evaluate.scores(
        evaluate.confusion_matrix(torch.zeros(2, 2, dtype=torch.uint8),
                                  torch.full((2, 2), 255, dtype=torch.uint8), 3), list("abc"))
    assert len(scores) == 9
    assert all(value in (None, {"a": None, "b": None, "c": None}) for value in scores.values())
    assert "-" in evaluate.table({**scores, "images": 1})


def test_miou_is_of_all_pixels_not_a_mean_over_images():
    images = [(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0])),
              (torch.tensor([1]), torch.tensor([1]))]
    confusion = sum(evaluate.confusion_matrix(prediction, truth, 2) for prediction, truth in images)
    assert evaluate.scores(confusion, ["a", "b"])["miou"] == pytest.approx(
        (3 / 4 + 1 / 2) / 2)  # per image: (0.375 + 1) / 2


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("size, window, stride, starts", [(2048, 1024, 1024, [0, 1024]),
                                                          (10, 4, 4, [0, 4, 6]), (10, 4, 3, [0, 3, 6]),
                                                          (4, 4, 2, [0]), (3, 4, 4, [0]), (5, 4, 4, [0, 1])])
def test_windows_cover_everything_and_end_at_the_edge(size, window, stride, starts):
    assert evaluate.window_starts(size, window, stride) == starts


def test_cityscapes_two_halves_are_a_window_of_the_height():
    x = torch.randn(1, 3, 8, 16)
    halves = torch.cat([Colours()(x[..., :8]), Colours()(x[..., 8:])], dim=3)
    assert torch.equal(evaluate.predict(Colours(), x, window=8), halves)


@pytest.mark.parametrize("size", [(11, 14), (7, 30), (1, 9), (30, 7)])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("scales", [(0.5, 1.0, 1.75), (1.0, )])
def test_windows_flips_and_scales_are_what_a_slow_loop_computes(size, average, scales):
    x, model, window, stride = torch.randn(1, 3, *size), Colours(), 8, 5
    answers = []
    for scale in scales:
        scaled = (F.interpolate(x, [max(1, round(scale * s))
                                    for s in size], mode="bilinear", antialias=True) if scale != 1 else x)
        for flip in (False, True):
            picture = torch.flip(scaled, [3]) if flip else scaled
            height, width = picture.shape[-2:]
            logits = torch.zeros_like(picture)
            for y in range(height):  # pixel by pixel: the mean over the windows that hold it
                for column in range(width):
                    seen = []
                    for top in evaluate.window_starts(height, window, stride):
                        for left in evaluate.window_starts(width, window, stride):
                            if top <= y < top + window and left <= column < left + window:
                                seen.append(
                                    model(picture[..., top:top + window, left:left + window])[0, :, y - top,
                                                                                              column - left])
                    logits[0, :, y, column] = torch.stack(seen).mean(0)
            logits = torch.flip(logits, [3]) if flip else logits
            logits = F.interpolate(logits, size, mode="bilinear") if scale != 1 else logits
            answers.append(logits.softmax(1) if average == "probabilities" else logits)
    ours = evaluate.predict(model, x, scales=scales, flip=True, window=window, stride=stride, average=average)
    torch.testing.assert_close(ours, torch.stack(answers).mean(0), rtol=1e-4, atol=1e-5)


def test_a_large_image_is_scored_in_rows_of_windows_and_never_as_a_whole():
    x = torch.randint(0, 256, (1, 3, 40, 30), dtype=torch.uint8)
    blocks = list(evaluate.predict_rows(Colours(), x, flip=True, window=16))
    assert [tuple(block.shape) for block in blocks] == [(1, 3, 16, 30), (1, 3, 8, 30), (1, 3, 16, 30)]
    assert torch.equal(torch.cat(blocks, 2), evaluate.predict(Colours(), x, flip=True, window=16))


def test_one_window_at_a_time_is_in_the_network():
    seen = []

    class Recorder(Colours):

        def forward(self, x):
            seen.append(tuple(x.shape))
            return super().forward(x)

    evaluate.predict(Recorder(), torch.randn(1, 3, 40, 70), scales=(0.5, 1.75), flip=True, window=16,
                     stride=16)
    assert all(shape[0] == 1 and max(shape[2:]) <= 16 for shape in seen) and len(seen) == 2 * (2 * 3 + 5 * 8)


@pytest.mark.parametrize("height, width", [(1, 37), (300, 1), (1, 1)])
def test_pictures_of_one_pixel_a_side_go_through_a_real_network(height, width):
    import model

    unet = model.build_unet("hybrid-small", 1 / 32, 4).eval()
    for how in (dict(), dict(window=32), dict(window=32, scales=(0.5, 1.0, 1.75), flip=True)):
        with torch.no_grad():
            assert evaluate.predict(unet, torch.rand(1, 3, height, width),
                                    **how).shape == (1, 4, height, width)


def test_averaged_probabilities_are_written_beside_the_predictions(script, checkpoint, folder, tmp_path):
    for average, scales in (("logits", [0.5, 1]), ("probabilities", [1])):  # the latter in rows of windows
        status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--out", tmp_path / average,
                                "--scales", *scales, "--window", 16, "--average", average, "--save-predictions",
                                tmp_path / average / "p", "--save-probabilities", "--workers", 0)
        assert status == 0, err
        for name, size in (("e", (41, 57)), ("f", (42, 56))):
            saved = np.load(tmp_path / average / "p" / "probabilities" / "images" / "val" / f"{name}.npy")
            assert saved.dtype == np.float16 and saved.shape == (3, *size)
            assert np.abs(saved.astype(float).sum(0) - 1).max() < 2e-3
            said = np.asarray(Image.open(tmp_path / average / "p" / "index" / "images" / "val" / f"{name}.png"))
            assert (np.take_along_axis(saved, said[None].astype(int), 0)[0] >= saved.max(0) - 1e-3).all()
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--save-probabilities")
    assert status == 2 and "--save-probabilities goes with --save-predictions" in err


def test_a_folder_may_have_a_test_part(script, checkpoint, folder, tmp_path):
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "test")
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--split", "test", "--workers", 0)
    assert status == 0 and "2 images" in out, err
    assert list(checkpoint.parent.glob("evaluate_*_test/metrics.json"))  # beside the scores of val
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0, "--out",
                            tmp_path / "o2")
    assert status == 2 and "no folder images/val" in err


def test_each_page_of_a_stack_has_a_prediction_of_its_own(script, checkpoint, tmp_path):
    write_stack(tmp_path / "photos" / "a.tif", np.random.RandomState(0).randint(0, 256, (3, 40, 40, 3), dtype=np.uint8))
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", tmp_path / "photos", "--workers", 0,
                              "--save-predictions", tmp_path / "p")
    assert status == 0 and "3 images predicted" in out, err
    assert sorted(path.name for path in (tmp_path / "p" / "index").iterdir()) == ["a#0.png", "a#1.png", "a#2.png"]


def photos(root, *names):
    for i, name in enumerate(names):
        write_image(root / name, 40, 40, seed=i)
    return root


def test_predictions_of_pictures_that_differ_in_their_extension_have_names_of_their_own(script, checkpoint, tmp_path):
    root = photos(tmp_path / "photos", "a.jpg", "a.png", "b.png", "x.jpg", "x.JPG")
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", root, "--workers", 0, "--save-predictions",
                              tmp_path / "p")
    assert status == 0 and "5 images predicted" in out, err
    assert sorted(path.name for path in (tmp_path / "p" / "index").iterdir()) == [
        "a.jpg.png", "a.png.png", "b.png", "x.JPG.png", "x.jpg.png"]


def test_a_list_of_images_alone_is_predicted(script, checkpoint, tmp_path):
    root = photos(tmp_path / "photos", "a.png", "b c.png", "d.png")
    (tmp_path / "list.txt").write_text("d.png\nb c.png\n\n")
    command = ["evaluate", "--checkpoint", checkpoint, "--root", root, "--list", tmp_path / "list.txt", "--workers", 0]
    status, out, err = script(*command, "--save-predictions", tmp_path / "p")
    assert status == 0 and "2 images predicted" in out, err
    assert sorted(path.name for path in (tmp_path / "p" / "index").iterdir()) == ["b c.png", "d.png"]
    status, _, err = script(*command)
    assert status == 2 and "list.txt: names no masks, so nothing to compare with" in err and err.count("\n") == 1
    (tmp_path / "list.txt").write_text("d.png\nnot_there.png\n")
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    status, _, err = script(*command, "--save-predictions", tmp_path / "q")
    assert status == 2 and "list.txt, line 2: no such file: " in err and "photos/not_there.png" in err


def test_predictions_are_no_pictures_and_those_of_other_flags_are_not_overwritten(script, checkpoint, folder, tmp_path):
    root = photos(tmp_path / "photos", "a.jpg", "b.png")
    command = ["evaluate", "--checkpoint", checkpoint, "--root", root, "--workers", 0, "--save-predictions", root / "pred"]
    assert "2 images predicted" in script(*command)[1]
    status, out, err = script(*command)  # the predictions lie in the folder of pictures
    assert status == 0 and "2 images predicted" in out and f"{root / 'pred'}: holds args.json, so" in out, err
    status, _, err = script(*command, "--no-flip")
    assert status == 2 and "pred holds a run with other flags" in err
    labelled = ["evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0]
    assert script(*labelled, "--out", tmp_path / "one", "--save-predictions", tmp_path / "p")[0] == 0
    killed = tmp_path / "one" / "args.json"  # before it wrote a score: its data may be elsewhere since, not its flags differ
    (tmp_path / "one" / "metrics.json").unlink()
    killed.write_text(json.dumps({**json.loads(killed.read_text()), "root": "elsewhere"}))
    assert script(*labelled, "--out", tmp_path / "one")[0] == 0
    killed.write_text(json.dumps({"root": "elsewhere", "batch_size": 4}))  # of a stage
    (tmp_path / "one" / "metrics.json").unlink()
    assert script(*labelled, "--out", tmp_path / "one")[0] == 2
    status, _, err = script(*labelled, "--no-flip", "--out", tmp_path / "two", "--save-predictions", tmp_path / "p")
    assert status == 2 and f"{tmp_path / 'p'} holds a run with other flags" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_skipped_and_named_and_the_rest_predicted(workers, script, checkpoint, folder, tmp_path):
    root = photos(tmp_path / "photos", "a.jpg", "b.png", "c.png")
    (root / "b.png").write_text("broken")
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", root, "--workers", workers,
                              "--save-predictions", tmp_path / "p")
    assert status == 0 and "2 images predicted" in out and out.count("b.png: not a readable image") == 1, err
    assert "1 of 3 images cannot be read" in out
    assert sorted(path.name for path in (tmp_path / "p" / "index").iterdir()) == ["a.png", "c.png"]
    (folder / "images" / "val" / "e.jpg").write_text("broken")
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", workers, "--out",
                              tmp_path / "o")
    assert status == 2 and "1 of 2 images cannot be read, see above; the scores, in incomplete.json, are of the others" in err
    assert json.loads((tmp_path / "o" / "incomplete.json").read_text())["images"] == 1
    assert not (tmp_path / "o" / "metrics.json").exists()
    write_image(folder / "images" / "val" / "e.jpg", 41, 57)
    assert script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", workers, "--out", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / "metrics.json").exists() and not (tmp_path / "o" / "incomplete.json").exists()


@pytest.mark.parametrize("spoil", [
    lambda content: content.update(model=[1]), lambda content: content.update(model={"a": "text"}),
    lambda content: content.update(args="text"), lambda content: content.update(model_args=[]),
    lambda content: content["model_args"].update(width=-3), lambda content: content["model_args"].update(encoder=7),
    lambda content: content.update(class_names=5), lambda content: content.update(class_names=["sky", "sky", "sea"]),
    lambda content: content.update(class_names=["sky", 5, "sea"]), lambda content: content.update(class_colours=[[-1, 0, 0]] * 3),
    lambda content: content.update(class_colours=[[0, 0, 0]]), lambda content: content["args"].update(crop_size="x"),
    lambda content: content["args"].update(crop_size=-5),
    lambda content: content["args"].update(data="there"), lambda content: content["args"].update(pixel_range=[5]),
    lambda content: content["args"].update(pixel_range="wide"),
    lambda content: content["model_args"].update(unknown=1), lambda content: content["model_args"].update(bands="x"),
    lambda content: content["model"].update({"decoder.head.bias": torch.full((3, ), float("nan"))})])
def test_a_checkpoint_of_absurd_content_is_refused_in_one_line(spoil, script, checkpoint, folder, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    spoil(content)
    torch.save(content, tmp_path / "odd.pt")
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "odd.pt", "--root", folder, "--workers", 0)
    assert status == 2 and "odd.pt: " in err and err.count("\n") == 1


def test_every_image_of_a_folder_counts_once_at_its_own_size(folder):
    source, names = datasets.segmentation_pairs("folder", str(folder), "val")
    metrics = evaluate.evaluate(Colours(), source, names, ALONE)
    hits = total = 0
    for i in range(2):
        sample = source.read(i)
        prediction = Colours()(data.to_pixels(sample["image"].as_subclass(torch.Tensor)[None])).argmax(1)[0]
        counted = sample["mask"] != 255
        hits += (prediction == sample["mask"])[counted].sum().item()
        total += counted.sum().item()
    assert metrics["pixel_accuracy"] == pytest.approx(hits / total) and metrics["images"] == 2


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network fine-tuned for three classes, for a step."""
    import model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    args = dict(encoder="hybrid-small", width=1 / 32, out_channels=3, condition_on_gamma=False)
    torch.save(
        dict(model=model.build_unet(**args).state_dict(), model_args=args, class_names=["sky", "sea", "sand"],
             args=dict(data="folder", root=None, val_list=None, crop_size=32)), path)
    return path


def test_predictions_are_index_pngs_of_the_images_size_and_match_the_metrics(script, checkpoint, folder,
                                                                             tmp_path):
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--out",
                              tmp_path / "scores", "--save-predictions", tmp_path / "predictions",
                              "--workers", 0)
    assert status == 0, err
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert set(metrics) == {"miou", "iou", "mean_dice", "dice", "mean_precision", "precision", "mean_recall", "recall",
                            "pixel_accuracy", "images"} and list(metrics["iou"]) == ["sky", "sea", "sand"]
    inter, union = np.zeros(3), np.zeros(3)
    for name, extension in (("e", "jpg"), ("f", "png")):
        with Image.open(tmp_path / "predictions" / "index" / "images" / "val" / f"{name}.png") as image:
            assert image.mode == "P"
            said = np.asarray(image)
        truth = np.asarray(Image.open(folder / "masks" / "val" / f"{name}.png"))
        assert said.shape == truth.shape
        assert (Image.open(tmp_path / "predictions" / "overlay" / "images" / "val" /
                           f"{name}.png").size == truth.shape[::-1])
        for k in range(3):
            inter[k] += ((said == k) & (truth == k)).sum()
            union[k] += (((said == k) | (truth == k)) & (truth != 255)).sum()
    assert metrics["miou"] == pytest.approx((inter / union).mean()) and f"{100 * metrics['miou']:6.2f}" in out


def test_images_without_masks_can_be_predicted(script, checkpoint, tmp_path):
    write_image(tmp_path / "photos" / "sub" / "one.jpg", 30, 77)
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", tmp_path / "photos",
                              "--workers", 0, "--out", tmp_path / "o")
    assert status == 2 and "pass --save-predictions DIR" in err
    status, out, err = script("evaluate", "--checkpoint", checkpoint, "--root", tmp_path / "photos",
                              "--workers", 0, "--out", tmp_path / "o", "--save-predictions", tmp_path / "p")
    assert status == 0 and "no masks to compare with" in out
    assert Image.open(tmp_path / "p" / "index" / "sub" / "one.png").size == (77, 30)


def test_images_without_masks_do_not_get_in_the_way_of_scores(script, checkpoint, folder, tmp_path):
    own = tmp_path / "last.pt"  # README's two lines, one after the other, without --out
    own.write_bytes(checkpoint.read_bytes())
    write_image(tmp_path / "photos" / "one.jpg", 30, 77)
    flags = ["--checkpoint", own, "--workers", 0]
    assert script("evaluate", *flags, "--root", folder)[0] == 0
    status, _, err = script("evaluate", *flags, "--data", "folder", "--root", tmp_path / "photos",
                            "--save-predictions", tmp_path / "p")
    assert status == 0, err
    status, _, err = script("evaluate", *flags, "--root", folder, "--save-predictions", tmp_path / "q")
    assert status == 0 and (tmp_path / "q" / "overlay" / "images" / "val" / "e.png").exists(), err


def test_the_number_of_processes_does_not_change_an_integer(checkpoint, folder, tmp_path):
    for i in range(3):  # 5 images: not divisible by 2
        write_image(folder / "images" / "val" / f"g{i}.png", 20, 33 + i, seed=9 + i)
        write_mask(folder / "masks" / "val" / f"g{i}.png",
                   np.random.RandomState(i).choice([0, 1, 2], (20, 33 + i)))
    for processes in (1, 2, 4):
        run = Forked(tmp_path, "evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0,
                     "--out", tmp_path / str(processes), processes=processes)
        assert run.wait() == [0] * processes, run.text()
    one, two, four = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "124")
    assert one == two == four and one["images"] == 5


def test_the_scores_of_other_flags_are_not_overwritten(script, checkpoint, folder, tmp_path):
    flags = ["--checkpoint", checkpoint, "--root", folder, "--workers", 0, "--out", tmp_path / "o"]
    assert script("evaluate", *flags)[0] == 0
    before = (tmp_path / "o" / "metrics.json").read_bytes()
    status, _, err = script("evaluate", *flags, "--no-flip", "--scales", 0.5)
    assert (status == 2 and re.search(r"--flip +True +False\n", err)
            and (tmp_path / "o" / "metrics.json").read_bytes() == before)
    assert script("evaluate", *flags)[0] == 0


@pytest.mark.parametrize("flags, message", [(["--checkpoint", "nowhere.pt"], "nowhere.pt: no such file"),
                                            (["--stride", "8", "--window", "0"], "--stride without --window"),
                                            (["--root", "nowhere"], "nowhere: no such folder")])
def test_bad_flags_end_in_one_line_and_status_2(script, checkpoint, flags, message):
    status, _, err = script("evaluate", *([] if flags[0] == "--checkpoint" else ["--checkpoint", checkpoint]),
                            *flags)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_checkpoint_that_was_never_fine_tuned_is_refused(script, few_shapes, tmp_path):
    assert (script("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", "random", "--out",
                   tmp_path)[0] == 0)
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert status == 2 and "not a checkpoint of finetune.py" in err and err.count("\n") == 1


@pytest.mark.parametrize("more, message", [
    (["--window", "16", "--stride", "32"
      ], "--stride 32 is longer than --window 16: no window would see what lies between"),
    (["--data", "shapes"],
     "--data shapes has 7 classes (background, ash, birch ...), {checkpoint} was fine-tuned for 3 others (sky, sea, sand ...)"
     ),
    (["--save-predictions", "{file}"
      ], "{file}: cannot be written (File exists); pass another --save-predictions"),
    (["--save-predictions", "{file}/below"
      ], "{file}/below: cannot be written (Not a directory); pass another --save-predictions"),
    (["--out", "{file}"], "{file}: cannot be written (File exists); pass another --out"),
    (["--data", "folder", "--root", "{file}"], "{file}: not a folder; pass --root")
])
def test_a_wrong_request_ends_in_one_line_and_status_2(script, checkpoint, folder, tmp_path, more, message):
    (tmp_path / "file").write_text("a user's file")
    places = {"file": str(tmp_path / "file"), "checkpoint": str(checkpoint)}
    status, _, err = script("evaluate", "--checkpoint", checkpoint,
                            *([] if "--data" in more else ["--root", folder]), "--workers", 0,
                            *([] if "--out" in more else ["--out", tmp_path / "o"]),
                            *[flag.format(**places) for flag in more])
    assert status == 2 and message.format(**places) in err and err.count("\n") == 1, err
    assert (tmp_path / "file").read_text() == "a user's file"


def test_predictions_stay_in_their_folder_wherever_a_list_says_that_the_images_are(script, checkpoint, folder, tmp_path):
    images = [folder / "images" / "val" / "e.jpg", folder / "images" / "val" / "f.png"]
    before = [path.read_bytes() for path in images]
    masks = [folder / "masks" / "val" / "e.png", folder / "masks" / "val" / "f.png"]
    (tmp_path / "list.txt").write_text(f"{images[0]}\t{masks[0]}\n../{folder.name}/images/val/f.png\t{masks[1]}\n")
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--list", tmp_path / "list.txt",
                            "--workers", 0, "--save-predictions", tmp_path / "p", "--out", tmp_path / "o")
    assert status == 0, err
    assert [path.read_bytes() for path in images] == before
    assert len(list((tmp_path / "p" / "overlay").rglob("*.png"))) == 2


def test_other_data_than_the_fine_tunings_is_not_read_from_its_list(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.txt").write_text("image.png mask.png")
    content = torch.load(checkpoint, weights_only=True)
    content["args"]["val_list"] = "val.txt"
    torch.save(content, tmp_path / "listed.pt")
    for more, wanted in (([], "val.txt"), (["--root", "elsewhere"], None), (["--split", "train"], None)):
        args, *_ = evaluate.parse_arguments(["--checkpoint", str(tmp_path / "listed.pt"), *more])
        assert args.list == wanted


def finetuned(script, root, out, *more):
    status, _, err = script("finetune", "--data", "folder", "--root", root, "--encoder", "hybrid-small", "--width", 1 / 32,
                            "--crop-size", 32, "--steps", 1, "--batch-size", 2, "--workers", 0, "--out", out, *more)
    assert status == 0, err


def test_values_are_not_given_other_classes_where_classes_txt_is_missing(script, folder, tmp_path):
    (folder / "classes.txt").write_text("0 sand\n1 sea\n2 sky\n255 ignore\n")
    finetuned(script, folder, tmp_path / "same")
    (folder / "classes.txt").write_text("2 sky\n1 sea\n0 sand\n255 ignore\n")
    finetuned(script, folder, tmp_path / "other")
    (folder / "classes.txt").unlink()
    command = ["--root", folder, "--workers", 0]
    assert script("evaluate", "--checkpoint", tmp_path / "same" / "last.pt", *command)[0] == 0
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "other" / "last.pt", *command)
    assert status == 2 and "no classes.txt says which" in err and "copy the training data's classes.txt there" in err


def test_other_images_than_those_held_out_are_not_taken_for_them(script, folder, tmp_path):
    for kind in ("images", "masks"):
        for path in (folder / kind / "val").iterdir():
            path.rename(folder / kind / "train" / path.name)
        (folder / kind / "val").rmdir()
    finetuned(script, folder, tmp_path / "o", "--folds", 2)
    for name in ("last", "best"):
        assert script("evaluate", "--checkpoint", tmp_path / "o" / f"{name}.pt", "--workers", 0)[0] == 0
    for i in range(4):
        write_image(folder / "images" / "train" / f"new{i}.png")
        write_mask(folder / "masks" / "train" / f"new{i}.png", np.zeros((40, 56)))
    for name in ("last", "best"):
        command = ["--checkpoint", tmp_path / "o" / f"{name}.pt", "--workers", 0, "--out", tmp_path / name]
        status, _, err = script("evaluate", *command)
        listed = tmp_path / "o" / "validated.txt"
        assert status == 2 and f"the images changed since the training" in err and f"pass --list {listed}" in err
        status, out, err = script("evaluate", *command, "--list", listed)
        assert status == 0 and "3 images" in out, err


@pytest.mark.parametrize("names", [["b.png", "b.jpg", "b.png.tif"], ["a.png", "../photos/a.png", "../a.png"]])
def test_two_pictures_are_not_one_prediction(names, script, checkpoint, tmp_path):
    photos(tmp_path / "photos", *names)
    (tmp_path / "list.txt").write_text("\n".join(names))
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--data", "folder", "--root", tmp_path / "photos", "--list",
                            tmp_path / "list.txt", "--workers", 0, "--save-predictions", tmp_path / "p")
    assert status == 2 and f"{names[0]} and {names[2]}: their predictions would be one file" in err, err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("flag, name", [("--out", "metrics.json"), ("--save-predictions", "index"), ("--out", "photo.JPG")])
def test_what_is_not_ours_is_neither_overwritten_nor_hidden(flag, name, script, checkpoint, folder, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_text("a user's file")
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0, flag, tmp_path / "own")
    assert status == 2 and f"own: holds {name} but no args.json" in err and f"pass another {flag}" in err, err
    assert [path.name for path in (tmp_path / "own").iterdir()] == [name]
    for place in (folder, folder.parent):
        status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0, flag, place)
        assert status == 2 and f"{place}: holds the data" in err and not (place / "args.json").exists(), err


@pytest.mark.parametrize("text", ["[1]", '{"scales": [1', ""])
def test_an_args_json_that_is_torn_is_one_line(text, script, checkpoint, folder, tmp_path):
    (tmp_path / "args.json").write_text(text)
    status, _, err = script("evaluate", "--checkpoint", checkpoint, "--root", folder, "--workers", 0, "--out", tmp_path)
    assert status == 2 and "args.json: not a whole JSON object" in err and err.count("\n") == 1


def test_a_pipe_is_no_checkpoint(script, tmp_path):
    os.mkfifo(tmp_path / "best.pt")
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "best.pt")
    assert status == 2 and "best.pt: not a file" in err and err.count("\n") == 1
