"""finetune.py: initialisations, loss, score; what all stages promise is in test_pretrain_decoder.py."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DEVICES, TINY, load, losses, one_line, pairs, same_tensors, write_mask
from PIL import Image
from torchvision.models import resnet50

import data
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


@pytest.mark.parametrize("init, kept", [
    ("none", ()), ("encoder", ("encoder.",)), ("ddep", ("encoder.", "decoder."))])
def test_what_the_weights_do_not_hold_is_fresh(init, kept, done, encoder, few, tmp_path):
    path = {"none": "none", "encoder": encoder, "ddep": tmp_path / "ddep" / "last.pt"}[init]
    if init == "ddep":
        done("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", encoder, "--condition",
             "--out", tmp_path / "ddep")
    done("finetune", *TINY["finetune"], "--init", path, *STILL, "--out", tmp_path / "o")
    theirs, ours = {} if init == "none" else torch.load(path)["model"], load(tmp_path / "o")
    expected = fresh_network(7, condition=init == "ddep")
    expected.update({name: value for name, value in theirs.items()
                     if name.startswith(kept) and not name.startswith("decoder.head.")})
    assert same_tensors(ours["model"], expected)
    assert ours["model_args"]["condition_on_gamma"] == (init == "ddep")


@pytest.mark.parametrize("method", ["ddep", "dep"])
def test_stages_2_and_3_draw_equal_fresh_weights_from_a_seed(method, done, few, encoder, tmp_path):
    weights, init = (["--encoder-weights", encoder], encoder) if method == "ddep" else ([], "none")
    more = [*STILL, "--seed", 3, "--out"]
    done("pretrain_decoder", *TINY["pretrain_decoder"], "--method", method, *weights, *more, tmp_path / "a")
    done("finetune", *TINY["finetune"], "--init", init, *more, tmp_path / "b")
    a, b = (load(tmp_path / out)["model"] for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a if not name.startswith("decoder.head."))


def test_a_fine_tuned_head_is_kept_for_the_same_classes_alone(done, folder, tmp_path):
    done(*own(folder, tmp_path / "a", "--steps", 2))
    expected, fresh = load(tmp_path / "a")["model"], fresh_network(3)
    done(*own(folder, tmp_path / "same", "--init", tmp_path / "a" / "last.pt", *STILL))
    assert same_tensors(load(tmp_path / "same")["model"], expected)
    (folder / "classes.txt").write_text("sky\nsand\nsea\n")
    done(*own(folder, tmp_path / "others", "--init", tmp_path / "a" / "last.pt", *STILL))
    expected.update({name: value for name, value in fresh.items() if name.startswith("decoder.head.")})
    assert same_tensors(load(tmp_path / "others")["model"], expected)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_resnet50_normalises_by_the_batch_if_fresh_and_as_stored_if_not(fresh, done, few, tmp_path):
    before = {name: value + 0.1 * (not fresh and "running" in name) for name, value in
              resnet50().state_dict().items()}
    torch.save(before, tmp_path / "resnet50.pth")
    init = "none" if fresh else tmp_path / "resnet50.pth"
    more = ["--encoder", "resnet50", "--init", init, "--steps", 1, "--out", tmp_path]
    done("finetune", *TINY["finetune"], *more)
    model_state = load(tmp_path)["model"]
    after = {name: model_state[f"encoder.{name}"] for name in before if name[:3] != "fc."}
    moved = [not torch.equal(after[name], before[name]) for name in after if "running" in name]
    assert moved == [fresh] * 106 and not torch.equal(after["conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_is_the_mean_over_the_labelled_pixels_of_the_whole_batch(device, done, folder, tmp_path):
    more = ["--crop-size", 48, "--micro-batch", 1, "--device", device, "--precision", "fp32", "--steps", 1]
    done(*own(folder, tmp_path / "o", *more))
    samples = data.Samples(pairs("folder", folder), data.segmentation_transform(48), 0)
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


def test_a_batch_without_a_labelled_pixel_has_loss_0_and_goes_on(done, folder, tmp_path):
    write_mask(folder / "masks" / "train" / "a.png", np.full((41, 57), 255))
    done(*own(folder, tmp_path / "o", "--batch-size", 1))
    assert sorted(loss == 0 for loss in losses(tmp_path / "o")) == [False, False, False, True]
    assert all(value.isfinite().all() for value in load(tmp_path / "o")["model"].values())


def test_the_validation_curve_ends_with_the_score_which_is_that_of_evaluate(done, few, tmp_path):
    done("finetune", *TINY["finetune"], "--eval-every", 2, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["miou" in line for line in lines] == [False, True] * 2 and lines[3]["miou"] == metrics["miou"]
    assert Image.open(tmp_path / "predictions.png").width > 300 and metrics.pop("step") == 4
    done("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert json.loads((tmp_path / "evaluate_val" / "metrics.json").read_text()).items() >= metrics.items()


def test_one_picture_is_enough_and_with_none_to_validate_on_there_is_no_score(done, folder, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
    done(*own(folder, tmp_path / "o", "--labels", 1, "--crop-size", 64))
    assert load(tmp_path / "o")["made_of"]["training_images"].startswith("1 images")
    assert np.isfinite(losses(tmp_path / "o")).all()
    assert json.loads((tmp_path / "o" / "metrics.json").read_text()) == {"step": 4}
    assert not (tmp_path / "o" / "predictions.png").exists()


def test_a_run_is_continued_on_the_same_data_elsewhere_and_not_on_any_other(script, done, folder, tmp_path):
    lists = {"train": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
    lists["train"].write_text("a\nb ö\nsub/d\n")
    lists["val"].write_text("e\nf\n")
    more = ["--labels", 3, "--train-list", lists["train"], "--val-list", lists["val"]]
    done(*own(folder, tmp_path / "o", *more))
    before, folder = load(tmp_path / "o")["model"], folder.rename(tmp_path / "moved")
    for path, text, named in (
            (lists["train"], "a\nc\nsub/d\n", "training-images"), (lists["train"], "b ö\na\nsub/d", "b ö"),
            (lists["val"], "e\nc\n", "c.jpg"), (lists["val"], "f\ne\n", "f.png"),
            (folder / "classes.txt", "1 sky\n0 sea\n2 sand\n255 ignore\n", "mask-values"),
            (folder / "classes.txt", "sky\nsea\nmud\n", "mud")):
        kept = path.read_text()
        path.write_text(text)
        assert one_line(script(*own(folder, tmp_path / "o", *more)), tmp_path / "o", named), text
        path.write_text(kept)
    for kind, name, other in (("masks", "a.png", "a.bmp"), ("images", "b ö.png", "b ö.gif")):
        (folder / kind / "train" / name).rename(folder / kind / "train" / other)
        assert one_line(script(*own(folder, tmp_path / "o", *more)), tmp_path / "o", "training-images")
        (folder / kind / "train" / other).rename(folder / kind / "train" / name)
    done(*own(folder, tmp_path / "o", *more))
    assert same_tensors(load(tmp_path / "o")["model"], before)
