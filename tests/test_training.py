"""The three stages and the plumbing under them, on the smallest networks."""
import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, torchrun, write_image, write_mask

import checkpoints
import data
import model
import runtime

STAGES = list(TINY)


def flags(stage, *more):
    return [*TINY[stage], *(["--encoder-weights", "random"] if stage == "pretrain_decoder" and "dep" not in more else []), *more]


def load(path):
    return torch.load(path, weights_only=True)


def losses(out):
    return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ plumbing


def test_the_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [runtime.cosine_rate(step, 110, peak=2.0, warmup_steps=10) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0) and rates[35] == pytest.approx(1 + math.sqrt(0.5)) and rates[110] == pytest.approx(0)
    assert runtime.cosine_rate(0, 100, 3.0) == 3.0


def test_clipping_scales_a_long_gradient_down_and_leaves_a_short_one():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.Adam([weight]), torch.amp.GradScaler("cpu", enabled=False)
    for norm, wanted in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (None, [3.0, 4.0])):
        weight.grad = torch.tensor([3.0, 4.0])
        runtime.clip_gradients([weight], norm, optimizer, scaler)
        assert weight.grad.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    checkpoints.save(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(Exception):
        checkpoints.save(tmp_path / "last.pt", {"step": lambda: None})        # cannot be pickled
    assert load(tmp_path / "last.pt") == {"step": 1}


def test_micro_batches_are_the_batch_in_order():
    parts = runtime.micro_batches({"x": torch.arange(7), "unreadable": []}, 3)
    assert [(part["x"].tolist(), last) for part, last in parts] == [([0, 1, 2], False), ([3, 4, 5], False), ([6], True)]


def test_adam_is_coupled_unless_asked_otherwise():
    args = argparse.Namespace(lr=0.1, weight_decay=0.5, decoupled_weight_decay=False)
    weight = torch.nn.Parameter(torch.ones(1))
    for decoupled, wanted in ((False, 1 - 0.1), (True, 1 - 0.1 * 0.5)):   # gradient 0: coupled, Adam's first step is lr; decoupled, lr * wd
        args.decoupled_weight_decay, weight.data, weight.grad = decoupled, torch.ones(1), torch.zeros(1)
        runtime.adam([weight], args, torch.device("cpu")).step()
        assert weight.item() == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------ every stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_what_it_promises_and_says_when_it_is_finished(stage, script, few_shapes, tmp_path):
    status, out, err = script(stage, *flags(stage), "--out", tmp_path)
    assert status == 0, err
    checkpoint = load(tmp_path / "last.pt")                               # weights_only: tensors and plain containers
    builder = model.build_classifier if stage == "pretrain_encoder" else model.build_unet
    builder(**checkpoint["model_args"]).load_state_dict(checkpoint["model"])
    assert json.loads((tmp_path / "args.json").read_text())["steps"] == 4 and (tmp_path / "metrics.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all({"loss", "rate", "images_per_second", "waiting"} <= set(line) for line in lines if "loss" in line)
    pictures = {"pretrain_encoder": ["samples.png"], "pretrain_decoder": ["panel_start.png", "panel_end.png"], "finetune": ["predictions.png"]}
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures[stage])
    assert (tmp_path / "best.pt").exists() == (stage != "pretrain_decoder")

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, _ = script(stage, *flags(stage), "--out", tmp_path)
    assert status == 0 and "finished at step 4" in out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    (tmp_path / "metrics.json").unlink()                                  # killed after the last checkpoint and before the last word
    assert script(stage, *flags(stage), "--out", tmp_path)[0] == 0
    assert (tmp_path / "metrics.json").read_bytes() == before[tmp_path / "metrics.json"]
    assert (tmp_path / "last.pt").read_bytes() == before[tmp_path / "last.pt"]


@pytest.mark.parametrize("stage", STAGES)
def test_other_flags_than_those_of_the_run_are_refused(stage, script, few_shapes, tmp_path):
    assert script(stage, *flags(stage), "--out", tmp_path)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, _, err = script(stage, *flags(stage), "--lr", 0.5, "--seed", 3, "--out", tmp_path)
    assert status == 2 and "with other flags or data; pass a new --out" in err
    rows = [line.split() for line in err.splitlines()[1:]]
    assert rows[0] == ["then", "now"] and rows[2] == ["--seed", "0", "3"] and (rows[1][0], rows[1][2]) == ("--lr", "0.5") and len(rows) == 3
    assert (tmp_path / "last.pt").read_bytes() == before
    assert script(stage, *flags(stage), "--save-every", 1, "--workers", 1, "--out", tmp_path)[0] == 0        # these change nothing


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(stage, script, few_shapes, tmp_path, monkeypatch):
    cross_entropy, mse_loss, calls = torch.nn.functional.cross_entropy, torch.nn.functional.mse_loss, []

    def spoil(loss):
        def spoiled(*args, **kwargs):
            calls.append(0)
            return loss(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)
        return spoiled

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoil(cross_entropy))
    monkeypatch.setattr(torch.nn.functional, "mse_loss", spoil(mse_loss))
    status, _, err = script(stage, *flags(stage), "--save-every", 1, "--out", tmp_path)
    assert status == 2 and "the loss is nan at step 2" in err and err.count("\n") == 1
    checkpoint = load(tmp_path / "last.pt")
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_the_result(stage, script, few_shapes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert script(stage, *flags(stage), "--seed", seed, "--steps", 2, "--out", tmp_path / name)[0] == 0
    a, b, c = (load(tmp_path / name / "last.pt")["model"] for name in "abc")
    assert same_tensors(a, b) and not same_tensors(a, c)


# ------------------------------------------------------------------------------------------------ stage 1


def test_top1_is_the_share_of_right_answers():
    from pretrain_encoder import top1
    class Five:
        def __len__(self):
            return 5

        def read(self, i):
            return {"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "label": [0, 1, 2, 0, 1][i]}

    loader = data.load(data.Samples(Five()), data.Each(5, batch_size=2))

    class AlwaysOne(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.5]).expand(len(x), 3)

    assert top1(AlwaysOne(), loader, torch.no_grad, runtime.Processes(0, 1, torch.device("cpu"))) == 2 / 5


# ------------------------------------------------------------------------------------------------ stage 2


def test_ddep_leaves_every_byte_of_the_encoder_and_dep_trains_it(script, few_shapes, tmp_path):
    assert script("pretrain_encoder", *flags("pretrain_encoder"), "--out", tmp_path / "encoder")[0] == 0
    weights = tmp_path / "encoder" / "last.pt"
    before = {name: value for name, value in load(weights)["model"].items() if name.startswith("encoder.")}
    for method, moved in (("ddep", False), ("dep", True)):
        status, out, err = script("pretrain_decoder", *TINY["pretrain_decoder"], "--method", method, "--encoder-weights", weights, "--out", tmp_path / method)
        assert status == 0, err
        after = load(tmp_path / method / "last.pt")
        encoder = {name: value for name, value in after["model"].items() if name.startswith("encoder.")}
        assert same_tensors(encoder, before) != moved
        moments = sum(len(state) > 0 for state in after["optimizer"]["state"].values())
        assert moments == len(list(model.build_unet(**after["model_args"]).parameters())) - (0 if moved else len(list(model.build_encoder("hybrid-small").parameters())))


def test_the_loss_of_a_network_that_answers_nothing_is_one(script, few_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(model.UNetDecoder, "forward", lambda self, maps, size, gamma=None: self.head.bias.sum() * 0 + torch.zeros(len(maps[0]), 3, *size))
    assert script("pretrain_decoder", *flags("pretrain_decoder"), "--out", tmp_path)[0] == 0
    assert losses(tmp_path) == pytest.approx([1.0] * 4, abs=0.02)         # E ||e||^2 / n


@pytest.mark.parametrize("more", [["--gamma", "0.5"], ["--gamma-range", "0.9", "0.95"], ["--sigma", "0.8"], ["--noise", "simple", "--sigma", "0.8"],
                                  ["--target", "image"], ["--condition"], ["--image-size", "48"], ["--min-area", "0.9"], ["--weight-decay", "0.1"],
                                  ["--weight-decay", "0.1", "--decoupled-weight-decay"], ["--warmup-steps", "0"], ["--clip-norm", "1e-4", "--weight-decay", "0.1"], ["--width", "0.0625"], ["--batch-size", "2"]])
def test_every_flag_changes_what_is_computed(more, script, few_shapes, tmp_path):
    base = [*flags("pretrain_decoder"), "--steps", 2]
    assert script("pretrain_decoder", *base, "--out", tmp_path / "plain")[0] == 0
    status, _, err = script("pretrain_decoder", *base, *more, "--out", tmp_path / "other")
    assert status == 0, err
    assert not same_tensors(load(tmp_path / "plain" / "last.pt")["model"], load(tmp_path / "other" / "last.pt")["model"])


def test_epochs_replace_the_recipes_steps(script, few_shapes, tmp_path):
    base = ["--width", 1 / 32, "--image-size", 32, "--encoder-weights", "random"]
    assert script("pretrain_decoder", *base, "--batch-size", 5, "--epochs", 2, "--out", tmp_path)[0] == 0
    assert load(tmp_path / "last.pt")["step"] == 5                        # 24 samples in batches of 5: the last one is filled up
    status, _, err = script("pretrain_decoder", *base, "--steps", 3, "--epochs", 2, "--out", tmp_path / "o")
    assert status == 2 and "not allowed with argument" in err


def test_sigma_is_another_name_for_gamma(script, few_shapes, tmp_path):
    for name, more in (("gamma", ["--gamma", 0.5]), ("sigma", ["--sigma", 1])):
        assert script("pretrain_decoder", *flags("pretrain_decoder"), *more, "--out", tmp_path / name)[0] == 0
    assert losses(tmp_path / "gamma") == losses(tmp_path / "sigma")


def test_real_data_defaults_are_the_papers(monkeypatch):
    import finetune
    import pretrain_decoder
    for width, lr in ((None, 6e-5), ("2", 1e-4), ("3", 6e-5)):
        args = pretrain_decoder.parse_arguments(["--data", "folder", "--root", "x", *(["--width", width] if width else [])])
        assert (args.batch_size, args.epochs, args.steps, args.image_size, args.lr, args.gamma) == (512, 100, None, 224, lr, 0.95)
        assert (args.encoder, args.width, args.method, args.target, args.noise) == ("hybrid", float(width or 1), "ddep", "noise", "scaled")
        assert runtime.steps_of(args, 14_000_000) == math.ceil(100 * 14_000_000 / 512)
    args = finetune.with_network(finetune.parse_arguments(["--data", "folder", "--root", "x"]), init=None)
    assert 1e-5 <= args.lr <= 3e-4 and 1e-5 <= args.weight_decay <= 3e-4 and (args.crop_size, args.encoder, args.width) == (512, "hybrid", 1)


def test_the_card_command_trains_a_missing_encoder_first_and_keeps_it(tmp_path):
    """torchrun --nproc_per_node=N pretrain_decoder.py --gamma 0.95 in a fresh clone; here with two processes and two steps."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain_decoder.py", "--gamma", "0.95", "--steps", "2"]
    for attempt in range(2):
        done = subprocess.run([*command, *(["--seed", "1", "--out", "other"] if attempt else [])], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert ("training one first" in done.stdout) == (attempt == 0)
    encoder = load(tmp_path / "runs/shapes/pretrain_encoder/last.pt")
    assert json.loads((tmp_path / "runs/shapes/pretrain_encoder/metrics.json").read_text())["top1"] > 0.5     # chance is 0.17
    ours = load(tmp_path / "runs/shapes/pretrain_decoder_ddep/last.pt")["model"]
    assert all(torch.equal(ours[name], value) for name, value in encoder["model"].items() if name.startswith("encoder."))


def test_more_than_one_unreadable_image_in_a_hundred_stops_the_run(script, tmp_path):
    for i in range(150):
        write_image(tmp_path / "photos" / f"{i:03}.png", 32, 32, seed=i)
    (tmp_path / "photos" / "007.png").write_text("broken")
    base = ["--data", "folder", "--root", tmp_path / "photos", "--encoder", "hybrid-small", "--width", 1 / 32, "--image-size", 32, "--steps", 40,
            "--batch-size", 8, "--encoder-weights", "random", "--workers", 0]
    status, out, err = script("pretrain_decoder", *base, "--out", tmp_path / "a")
    assert status == 0 and out.count("007.png: not a readable image") == 1 and "1 of 150" in out, err
    (tmp_path / "photos" / "100.png").write_text("broken")
    status, out, err = script("pretrain_decoder", *base, "--out", tmp_path / "b")
    assert status == 2 and "2 of 150 images are unreadable, more than 1 %" in err and "100.png" in out and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ stage 3


def test_each_initialisation_loads_what_it_says(script, few_shapes, tmp_path):
    assert script("pretrain_encoder", *flags("pretrain_encoder"), "--out", tmp_path / "encoder")[0] == 0
    assert script("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", tmp_path / "encoder/last.pt", "--out", tmp_path / "ddep")[0] == 0
    encoder, ddep = load(tmp_path / "encoder/last.pt")["model"], load(tmp_path / "ddep/last.pt")["model"]
    total, in_encoder = len(ddep), sum(name.startswith("encoder.") for name in ddep)

    def start(init):                                                      # the weights before the first step: a rate too small to move them
        out = tmp_path / f"from_{init.parent.name if init != 'none' else init}"
        status, text, err = script("finetune", *flags("finetune"), "--init", init, "--lr", 1e-30, "--weight-decay", 0, "--steps", 1, "--out", out)
        assert status == 0, err
        return load(out / "last.pt")["model"], next(line for line in text.splitlines() if line.startswith("init "))

    weights, said = start(tmp_path / "ddep/last.pt")
    assert f"loaded {total - 2} tensors (encoder and decoder blocks); fresh: 2 tensors, the head (decoder.head.weight, decoder.head.bias)" in said
    assert all(torch.equal(weights[name], value) for name, value in ddep.items() if not name.startswith("decoder.head"))
    assert weights["decoder.head.weight"].shape[0] == 7

    weights, said = start(tmp_path / "encoder/last.pt")
    assert f"loaded {in_encoder} tensors (the encoder of a checkpoint of this project); fresh: {total - in_encoder} tensors, the decoder" in said
    assert all(torch.equal(weights[name], value) for name, value in encoder.items() if name.startswith("encoder."))
    assert not torch.equal(weights["decoder.blocks.0.conv1.weight"], ddep["decoder.blocks.0.conv1.weight"])

    weights, said = start("none")
    assert f"loaded 0 tensors (nothing); fresh: {total} tensors, everything" in said
    assert not torch.equal(weights["encoder.conv_root.weight"], encoder["encoder.conv_root.weight"])


def test_all_parameters_train_in_fine_tuning(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune"), "--lr", 1e-30, "--out", tmp_path / "still")[0] == 0
    assert script("finetune", *flags("finetune"), "--out", tmp_path / "moved")[0] == 0
    still, moved = (load(tmp_path / name / "last.pt")["model"] for name in ("still", "moved"))
    assert all(not torch.equal(still[name], moved[name]) for name in still)


def test_fine_tuning_and_evaluate_agree_on_the_score(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune"), "--out", tmp_path)[0] == 0
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert status == 0, err
    assert json.loads((tmp_path / "evaluate_last" / "metrics.json").read_text()) == json.loads((tmp_path / "metrics.json").read_text())


def test_a_folder_is_fine_tuned_and_its_subset_can_be_passed_back(script, folder, tmp_path):
    base = ["--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width", 1 / 32, "--crop-size", 32, "--steps", 2,
            "--batch-size", 2, "--workers", 0, "--eval-every", 1]
    status, out, err = script("finetune", *base, "--labels", 2, "--out", tmp_path / "a")
    assert status == 0 and "2 labelled images, 3 classes, 2 validation images" in out, err
    assert (tmp_path / "a" / "best.pt").exists() and "sand" in out
    shutil.copy(tmp_path / "a" / "labelled.txt", tmp_path / "again.txt")
    status, out, err = script("finetune", *base, "--train-list", tmp_path / "again.txt", "--out", tmp_path / "b")
    assert status == 0 and "2 labelled images, 3 classes, 2 validation images" in out, err
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_folder_without_validation_images_trains_and_has_no_score(script, folder, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
    status, out, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width", 1 / 32, "--crop-size", 32,
                              "--steps", 2, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "o")
    assert status == 0 and "no validation images" in out and (tmp_path / "o" / "last.pt").exists() and not (tmp_path / "o" / "best.pt").exists(), err
    assert set(json.loads((tmp_path / "o" / "metrics.json").read_text())) == {"loss"}


def test_masks_that_are_all_ignored_train_to_nothing_and_no_error(script, folder, tmp_path):
    for path in (folder / "masks").rglob("*.png"):
        height, width = __import__("PIL.Image").Image.open(path).size[::-1]
        write_mask(path, [[255] * width] * height)
    status, out, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width", 1 / 32, "--crop-size", 32,
                              "--steps", 2, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "o")
    assert status == 0 and losses(tmp_path / "o") == [0.0], err           # logged at the last step


# ------------------------------------------------------------------------------------------------ README


@pytest.mark.parametrize("stage", ["pretrain_decoder", "finetune"])
def test_a_checkpoint_works_with_model_py_alone_as_readme_shows(stage, script, few_shapes, tmp_path):
    assert script(stage, *flags(stage), "--out", tmp_path)[0] == 0
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "torch.load" in block)
    shutil.copy(ROOT / "model.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", code + "\nprint(tuple(y.shape))"], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.stdout.strip() == f"(1, {7 if stage == 'finetune' else 3}, 300, 500)", done.stderr


def test_every_file_and_flag_that_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`(\w+\.py)`", readme):
        assert (ROOT / name).exists(), name
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", readme) if f"def {name}(" not in tests]
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    flags_named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - {"--nproc_per_node", "--nproc", "--nnodes", "--node", "--master", "--help", "--no-flip", "--max-restarts"}
    assert not [flag for flag in flags_named if f'"{flag}"' not in sources]


# ------------------------------------------------------------------------------------------------ bad input: one line, status 2


@pytest.mark.parametrize("stage, more, message", [
    ("pretrain_decoder", ["--data", "folder"], "which folder? pass --root DIR"),
    ("pretrain_decoder", ["--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
    ("pretrain_decoder", ["--data", "folder", "--root", "{empty}"], "no images in this folder; expected .jpg"),
    ("pretrain_decoder", ["--root", "{empty}"], "--root given, but --data shapes is drawn by code"),
    ("pretrain_decoder", ["--data", "folder", "--root", "{images}"], "DDeP pretrains the decoder of a trained encoder: pass --encoder-weights PATH"),
    ("pretrain_decoder", ["--encoder-weights", "nowhere.pt"], "nowhere.pt: no such file; expected weights"),
    ("pretrain_decoder", ["--gamma", "0.5", "--sigma", "1"], "--gamma, --gamma-range and --sigma all set the noise level"),
    ("pretrain_decoder", ["--gamma", "1.5"], "'1.5' is not a number from 0 to 1"),
    ("pretrain_decoder", ["--gamma-range", "0.9", "0.8"], "expected LOW <= HIGH"),
    ("pretrain_decoder", ["--noise", "simple", "--gamma", "0.9"], "--noise simple (Eq. 1) has no gamma; pass --sigma"),
    ("pretrain_decoder", ["--image-size", "50", "--encoder-weights", "random"], "expected a multiple of the encoder's stride 16"),
    ("pretrain_decoder", ["--steps", "0"], "'0' is not a whole number above 0"),
    ("pretrain_decoder", ["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs CUDA"),
    ("pretrain_decoder", ["--gama", "0.9"], "unrecognized arguments: --gama"),
    ("pretrain_encoder", ["--data", "folder", "--root", "{images}"], "class folders, expected two or more"),
    ("pretrain_decoder", ["--encoder-weights", "imagenet21k"], "imagenet21k are weights of --encoder hybrid, this is hybrid-small"),
    ("pretrain_decoder", ["--data", "folder", "--root", "{images}", "--coarse", "--encoder-weights", "random"], "--coarse belongs to --data cityscapes"),
    ("pretrain_decoder", ["--save-every", "0min"], "'0' is not a number above 0"),
    ("finetune", ["--init", "imagenet1k", "--encoder", "hybrid"], "imagenet1k are weights of --encoder resnet50, this is hybrid"),
    ("finetune", ["--data", "ade20k", "--root", "{images}"], "no folder images/training in it; expected ADEChallengeData2016/"),
    ("finetune", ["--data", "imagenet21k", "--root", "{images}"], "invalid choice: 'imagenet21k'"),
    ("finetune", ["--init", "nowhere.pt"], "nowhere.pt: no such file"),
    ("finetune", ["--init", "{text}"], "cannot be read as weights"),
    ("finetune", ["--labels", "4", "--fraction", "0.5"], "not allowed with argument"),
    ("finetune", ["--fraction", "2"], "'2' is not a share of the images"),
    ("finetune", ["--labels", "100000"], "there are 512 labelled images, 100000 asked for; expected 1 to 512"),
    ("finetune", ["--data", "folder", "--root", "{images}", "--num-classes", "3"], "no folder images/train; expected"),
    ("finetune", ["--data", "folder", "--root", "{images}", "--num-classes", "300"], "--num-classes 300: expected 2 to 255"),
    ("finetune", ["--data", "folder", "--root", "{images}"], "how many classes? pass --num-classes"),
    ("finetune", ["--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
    ("finetune", ["--data", "folder"], "which folder? pass --root DIR"),
])
def test_bad_flags_end_in_one_line_and_status_2(stage, more, message, script, tmp_path):
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "images" / "one.png")
    (tmp_path / "text.pt").write_text("hello")
    places = {name: str(tmp_path / name) for name in ("empty", "images")} | {"text": str(tmp_path / "text.pt")}
    status, _, err = script(stage, *[flag.format(**places) for flag in more], "--out", tmp_path / "out")
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path):
    done = torchrun(2, "pretrain_decoder", "--batch-size", "5", "--encoder-weights", "random", "--out", tmp_path)
    assert done.returncode != 0 and "--batch-size 5 does not divide over 2 processes; pass a multiple of 2" in done.stderr


@pytest.mark.parametrize("spoil, message", [
    (lambda root: write_mask(root / "masks/val/f.png", [[9] * 56] * 42), "masks/val/f.png: mask value 9, expected 0 to 2"),
    (lambda root: write_image(root / "masks/train/c.png", 43, 55), "masks/train/c.png: mask is RGB"),
    (lambda root: write_mask(root / "masks/train/c.png", [[0]]), "masks/train/c.png: mask is 1x1"),
    (lambda root: (root / "images/val/e.jpg").write_text("broken"), "images/val/e.jpg: not a readable image")])
def test_a_fault_in_a_labelled_folder_is_named_before_training(spoil, message, script, folder, tmp_path):
    spoil(folder)
    status, out, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width", 1 / 32, "--workers", 0, "--out", tmp_path / "o")
    assert status == 2 and message in err and err.count("\n") == 1 and "step" not in out.split("checking")[1]


def test_a_checkpoint_of_another_architecture_or_width_is_refused(script, few_shapes, tmp_path):
    assert script("pretrain_decoder", *flags("pretrain_decoder"), "--out", tmp_path / "ddep")[0] == 0
    weights = tmp_path / "ddep" / "last.pt"
    for more, message in ((["--width", 0.0625], "--width 0.0625, but"), (["--encoder", "resnet50"], "was made with encoder hybrid-small")):
        status, _, err = script("finetune", "--init", weights, *more, "--out", tmp_path / "o")
        assert status == 2 and message in err and err.count("\n") == 1
    status, _, err = script("pretrain_decoder", "--encoder", "resnet50", "--encoder-weights", weights, "--out", tmp_path / "o")
    assert status == 2 and "does not fit ResNet50" in err and err.count("\n") == 1


def test_an_output_folder_that_cannot_be_made_is_refused(script, few_shapes, tmp_path):
    (tmp_path / "file").write_text("a user's file")
    status, _, err = script("pretrain_decoder", *flags("pretrain_decoder"), "--out", tmp_path / "file" / "out")
    assert status == 2 and "cannot be written" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a user's file"


# ------------------------------------------------------------------------------------------------ reproduce.py


def test_reproduce_can_be_stopped_and_runs_everything_once_and_reports_what_was_measured(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "--out", str(tmp_path), "--labels", "3", "--seeds", "0", "--steps", "2", "2", "2"]

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}

    stopped = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not times():
        assert stopped.poll() is None
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130
    before = times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert before.items() <= times().items() and len(times()) == 7        # none was made again, all are there
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["method"], run["labels"], run["seed"]) for run in results] == [(m, 3, 0) for m in ("No pretraining", "Supervised", "DeP", "DDeP")]
    table = (tmp_path / "table.md").read_text()
    for run in results:
        scores = json.loads((tmp_path / "runs/seed0" / f"{run['method'].lower().replace(' ', '_')}_3_labels" / "metrics.json").read_text())
        assert run["miou"] == scores["miou"] and f"| {run['method']} | {100 * run['miou']:.1f} ± 0.0 (1) |" in table
    assert table.strip() in done.stdout
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("label_efficiency.png", "predictions.png"))
    again = times()
    assert subprocess.run(command, capture_output=True, timeout=1200).returncode == 0 and times() == again
