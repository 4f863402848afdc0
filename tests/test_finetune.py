"""finetune.py: initialisations, loss, score; what all stages promise is in test_pretrain_decoder.py."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DEVICES, TINY, load, losses, same_tensors, write_mask
from PIL import Image
from torchvision.models import resnet50

import data
import datasets
import finetune
import model

STILL = ["--lr", 0, "--weight-decay", 0, "--steps", 1]  # the weights as they are before the first step


def own(folder, out, *more):
    """A tiny run on a user's folder, of four pairs to train on."""
    network = [] if "--init" in more else ["--encoder", "hybrid-small"]
    data_flags = ["--data", "folder", "--root", folder, "--labels", 4, "--workers", 0]
    return ["finetune", *TINY["finetune"], *data_flags, *network, *more, "--out", out]


def fresh_network(classes, condition=False):
    torch.manual_seed(0)
    return model.build_unet("hybrid-small", 0.03125, classes, condition, 64).state_dict()


@pytest.fixture
def ddep(script, few, tiny, tmp_path):
    """The path of a checkpoint of stage 2, conditioned on gamma."""
    words = tiny("pretrain_decoder", "--condition", "--out", tmp_path / "ddep")
    assert script("pretrain_decoder", *words)[0] == 0
    return tmp_path / "ddep" / "last.pt"


@pytest.mark.parametrize("init, kept", [
    ("none", ()), ("encoder", ("encoder.",)), ("ddep", ("encoder.", "decoder."))])
def test_what_the_weights_do_not_hold_is_fresh(init, kept, script, encoder, ddep, tmp_path):
    path = {"none": "none", "encoder": encoder, "ddep": ddep}[init]
    status, _, err = script("finetune", *TINY["finetune"], "--init", path, *STILL, "--out", tmp_path / "o")
    assert status == 0, err
    theirs, ours = {} if init == "none" else torch.load(path)["model"], load(tmp_path / "o")
    expected = fresh_network(7, condition=init == "ddep")
    expected.update({name: value for name, value in theirs.items()
                     if name.startswith(kept) and not name.startswith("decoder.head.")})
    assert same_tensors(ours["model"], expected)
    assert ours["model_args"]["condition_on_gamma"] == (init == "ddep")


@pytest.mark.parametrize("names, same", [("sky\nsea\nsand\n", True), ("sky\nsand\nsea\n", False)])
def test_a_fine_tuned_head_is_kept_for_the_same_classes_alone(names, same, script, folder, tmp_path):
    assert script(*own(folder, tmp_path / "a"))[0] == 0
    (folder / "classes.txt").write_text(names)
    status, _, err = script(*own(folder, tmp_path / "b", "--init", tmp_path / "a" / "last.pt", *STILL))
    assert status == 0, err
    expected = load(tmp_path / "a")["model"]
    if not same:
        head = {name: value for name, value in fresh_network(3).items() if name.startswith("decoder.head.")}
        expected = {**expected, **head}
    assert same_tensors(load(tmp_path / "b")["model"], expected)


@pytest.mark.parametrize("flag, then, now", [("--width", "0.03125", "0.0625"),
                                             ("--encoder", "hybrid-small", "resnet50")])
def test_another_network_than_that_of_the_weights_is_refused(flag, then, now, script, ddep, tmp_path):
    status, _, err = script("finetune", *TINY["finetune"], "--init", ddep, flag, now, "--out", tmp_path / "o")
    assert status == 2 and all(word in err for word in (flag, then, now, str(ddep))) and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_resnet50_normalises_by_the_batch_if_fresh_and_as_stored_if_not(script, few, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.SHAPES_COUNTS, "val", 1)
    state = {name: value + 0.1 * ("running" in name) for name, value in resnet50().state_dict().items()}
    torch.save(state, tmp_path / "resnet50.pth")
    moved = {}
    for init in ("none", tmp_path / "resnet50.pth"):
        out = tmp_path / f"from {init == 'none'}"
        more = ["--encoder", "resnet50", "--init", init, "--steps", 2, "--out", out]
        status, _, err = script("finetune", *TINY["finetune"], *more)
        assert status == 0, err
        before = resnet50().state_dict() if init == "none" else state
        after = {name[8:]: value for name, value in load(out)["model"].items() if name.startswith("encoder.")}
        statistics = [name for name in after if "running" in name]
        moved[init == "none"] = {not torch.equal(after[name], before[name]) for name in statistics}
        assert not torch.equal(after["conv1.weight"], before["conv1.weight"]) and len(statistics) == 106
    assert moved == {True: {True}, False: {False}}


def test_batch_statistics_of_one_value_are_a_mistake_in_one_line(script, few, tmp_path):
    more = ["--encoder", "resnet50", "--init", "none", "--batch-size", 1, "--out", tmp_path]
    status, _, err = script("finetune", *TINY["finetune"], *more)
    assert status == 2 and err.count("error:") == 1 and "--micro-batch" in err and "Traceback" not in err


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_is_the_mean_over_the_labelled_pixels_of_the_whole_batch(device, script, folder, tmp_path):
    for i, path in enumerate(sorted((folder / "masks" / "train").rglob("*.png"))):
        mask = np.array(Image.open(path))
        mask[:(0, 38, 20, 40)[i]] = 255
        write_mask(path, mask)
    more = ["--crop-size", 48, "--micro-batch", 1, "--device", device, "--precision", "fp32"]
    status, _, err = script(*own(folder, tmp_path / "o", *more))
    assert status == 0, err
    args = finetune.parse_arguments(["--data", "folder", "--root", str(folder)])
    source, _ = datasets.training_and_validation(args, datasets.classes_of(args))
    samples = data.Samples(source, data.segmentation_transform(48), 0)
    network = model.build_unet("hybrid-small", 0.03125, 3, False, 64)
    network.load_state_dict(fresh_network(3))
    total, pixels, means = 0, 0, []
    for key in next(iter(data.Order(4, 4, 4, 1, 0))):
        x, mask = samples[key]["image"] / 127.5 - 1, samples[key]["mask"].long()
        with torch.no_grad():
            logits = network(x[None])[0].double()
        own_total = sum(-torch.log_softmax(logits, 0)[k][mask == k].sum().item() for k in range(3))
        total, pixels = total + own_total, pixels + (mask != 255).sum().item()
        means.append(own_total / (mask != 255).sum().item())
    close = 1e-5 if device == "cpu" else 1e-2
    assert losses(tmp_path / "o")[0] == pytest.approx(total / pixels, rel=close)
    assert abs(np.mean(means) / (total / pixels) - 1) > 1e-3  # a mean of means would have been noticed


def test_a_batch_without_a_labelled_pixel_has_loss_0_and_goes_on(script, folder, tmp_path):
    write_mask(folder / "masks" / "train" / "a.png", np.full((41, 57), 255))
    status, _, err = script(*own(folder, tmp_path / "o", "--batch-size", 1))
    assert status == 0, err
    assert sorted(loss == 0 for loss in losses(tmp_path / "o")) == [False, False, False, True]
    assert all(value.isfinite().all() for value in load(tmp_path / "o")["model"].values())


def test_the_score_is_that_of_counting_by_hand_and_of_evaluate(script, few, tmp_path):
    status, _, err = script("finetune", *TINY["finetune"], "--steps", 30, "--lr", 5e-3, "--out", tmp_path)
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    network = model.unet_of(load(tmp_path)).eval()
    truth, answer = [], []
    for i in range(12):
        sample = datasets.toy("val").read(i)
        with torch.no_grad():
            answer += network(sample["image"][None] / 127.5 - 1)[0].argmax(0).flatten().tolist()
        truth += sample["mask"].flatten().tolist()
    pairs, ious = np.array([truth, answer]), {}
    for k, name in enumerate(("background", "ash", "birch", "cedar", "elm", "fir", "oak")):
        ious[name] = ((pairs == k).all(0).sum() / (pairs == k).any(0).sum()).item()
    assert metrics["iou"] == pytest.approx(ious, abs=1e-4)
    assert metrics["miou"] == pytest.approx(np.mean([*ious.values()]), abs=1e-4) and metrics["step"] == 30
    assert len(set(answer)) > 1 and Image.open(tmp_path / "predictions.png").width > 300
    assert script("evaluate", "--checkpoint", tmp_path / "last.pt")[0] == 0
    assert json.loads((tmp_path / "evaluate_val" / "metrics.json").read_text())["iou"] == metrics["iou"]


def test_without_validation_images_a_run_has_no_score(script, folder, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
    status, _, err = script(*own(folder, tmp_path / "o"))
    assert status == 0 and load(tmp_path / "o")["class_names"] == ["sky", "sea", "sand"], err
    assert json.loads((tmp_path / "o" / "metrics.json").read_text()) == {"step": 4}
    assert not (tmp_path / "o" / "predictions.png").exists()


@pytest.mark.parametrize("crop", [32, 64])
def test_one_picture_of_odd_sizes_is_enough(crop, script, folder, tmp_path):
    status, _, err = script(*own(folder, tmp_path / "o", "--labels", 1, "--crop-size", crop))
    assert status == 0, err
    assert load(tmp_path / "o")["data"].startswith("1 images") and np.isfinite(losses(tmp_path / "o")).all()
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["images"] == 2


def test_a_run_is_not_continued_on_other_pictures_or_classes(script, folder, tmp_path):
    assert script(*own(folder, tmp_path / "o"))[0] == 0
    moved = folder.rename(tmp_path / "moved")
    assert script(*own(moved, tmp_path / "o"))[0] == 0
    (moved / "classes.txt").write_text("sky\nsea\nmud\n")
    status, _, err = script(*own(moved, tmp_path / "o"))
    assert status == 2 and "sand" in err and "mud" in err
    (moved / "classes.txt").write_text("sky\nsea\nsand\n")
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (moved / kind / "train" / f"a.{ending}").rename(moved / kind / "train" / f"0.{ending}")
    assert script(*own(moved, tmp_path / "o"))[0] == 2
