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
    for i, path in enumerate(sorted((folder / "masks" / "train").rglob("*.png"))):
        mask = np.array(Image.open(path))
        mask[:(0, 38, 20, 40)[i]] = 255
        write_mask(path, mask)
    more = ["--crop-size", 48, "--micro-batch", 1, "--device", device, "--precision", "fp32", "--steps", 1]
    done(*own(folder, tmp_path / "o", *more))
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


def test_a_batch_without_a_labelled_pixel_has_loss_0_and_goes_on(done, folder, tmp_path):
    write_mask(folder / "masks" / "train" / "a.png", np.full((41, 57), 255))
    done(*own(folder, tmp_path / "o", "--batch-size", 1))
    assert sorted(loss == 0 for loss in losses(tmp_path / "o")) == [False, False, False, True]
    assert all(value.isfinite().all() for value in load(tmp_path / "o")["model"].values())


def test_toy_data_needs_no_flags_predictions_are_drawn_and_the_score_is_that_of_evaluate(done, few, tmp_path):
    done("finetune", *TINY["finetune"], "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert Image.open(tmp_path / "predictions.png").width > 300 and metrics.pop("step") == 4
    done("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert json.loads((tmp_path / "evaluate_val" / "metrics.json").read_text()) == metrics


def test_one_picture_is_enough_and_with_none_to_validate_on_there_is_no_score(done, folder, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
    done(*own(folder, tmp_path / "o", "--labels", 1, "--crop-size", 64))
    assert load(tmp_path / "o")["data"].startswith("1 images") and np.isfinite(losses(tmp_path / "o")).all()
    assert json.loads((tmp_path / "o" / "metrics.json").read_text()) == {"step": 4}
    assert not (tmp_path / "o" / "predictions.png").exists()


def test_a_run_is_not_continued_on_other_pictures_or_classes(script, done, folder, tmp_path):
    done(*own(folder, tmp_path / "o"))
    moved = folder.rename(tmp_path / "moved")
    done(*own(moved, tmp_path / "o"))
    (moved / "classes.txt").write_text("sky\nsea\nmud\n")
    status, _, err = script(*own(moved, tmp_path / "o"))
    assert status == 2 and "sand" in err and "mud" in err
    (moved / "classes.txt").write_text("sky\nsea\nsand\n")
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (moved / kind / "train" / f"a.{ending}").rename(moved / kind / "train" / f"0.{ending}")
    assert script(*own(moved, tmp_path / "o"))[0] == 2
