"""What all three stages promise (a run that is killed, several processes, flags), then stage 2 itself."""
import json
import os
import random
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT, STAGES, TINY, Forked, die, load, losses, same_tensors, torchrun, write_image, write_mask
from PIL import Image
from torchvision.models import resnet50

import data
import datasets
import model
import noise
import pretrain_decoder
import pretrain_encoder

WEIGHTS = {"pretrain_encoder": None, "pretrain_decoder": "--encoder-weights", "finetune": "--init"}


def command(stage, weights, out, *more):
    given = [WEIGHTS[stage], weights] if WEIGHTS[stage] else []
    return [stage, *TINY[stage], *given, *more, "--out", out]


def left_by(out):
    """What a run leaves: the weights, the losses, the scores."""
    return load(out)["model"], losses(out), json.loads((out / "metrics.json").read_text())


def assert_same(ours, theirs, device="cpu"):
    if device == "cpu":
        assert same_tensors(ours[0], theirs[0]) and ours[1:] == theirs[1:]
    else:  # not all of its kernels are deterministic
        assert len(ours[1]) == len(theirs[1]) and ours[1] == pytest.approx(theirs[1], rel=1e-2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder):
    """undisturbed(stage) -> (what a run leaves that nobody disturbs, the seconds that it took); made once."""
    made = {}

    def make(stage, device="cpu"):
        if (stage, device) not in made:
            folder, started = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
            run = Forked(folder, *command(stage, encoder, folder / "o", "--device", device))
            assert run.wait() == [0], run.output.read_text()
            made[stage, device] = left_by(folder / "o"), time.monotonic() - started
        return made[stage, device]
    return make


# ---------------------------------------- Killed


def die_in_save(number, place):
    """Be killed in save `number` of last.pt: half of it written, before it is renamed, or after."""
    write, rename, saves = torch.save, os.replace, []

    def dying_write(content, file):
        saves.append(0)
        write(content, file)
        if (len(saves), place) == (number, "within"):
            file.truncate(file.tell() // 2)
            die()

    def dying_rename(source, target):
        if (len(saves), place) == (number, "before"):
            die()
        rename(source, target)
        if (len(saves), place) == (number, "after"):
            die()
    torch.save, os.replace = dying_write, dying_rename


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage, number, place", [
    *((stage, 2, "within") for stage in STAGES), ("pretrain_decoder", 1, "within"), ("pretrain_encoder", 1, "before"),
    ("pretrain_decoder", 2, "before"), ("pretrain_decoder", 1, "after"), ("finetune", 2, "after")])
def test_killed_inside_a_save_a_run_ends_with_the_same_bits_without_the_weights_it_began_from(
        stage, number, place, device, undisturbed, encoder, tmp_path):
    weights = shutil.copy(encoder, tmp_path / "weights.pt")
    words = command(stage, weights, tmp_path / "o", "--save-every", 2, "--device", device)
    assert Forked(tmp_path, *words, before=partial(die_in_save, number, place)).wait() == [-9]
    if (tmp_path / "o" / "last.pt").exists():
        os.remove(weights)
    run = Forked(tmp_path, *words)
    assert run.wait() == [0], run.output.read_text()
    assert_same(left_by(tmp_path / "o"), undisturbed(stage, device)[0], device)


def test_killed_at_random_instants_a_run_ends_with_the_same_bits(undisturbed, encoder, tmp_path):
    wanted, seconds = undisturbed("pretrain_decoder")
    words, rng = command("pretrain_decoder", encoder, tmp_path / "o", "--save-every", 1), random.Random(3)
    for _ in range(8):
        run = Forked(tmp_path, *words)
        run.ranks[0].join(rng.uniform(0.2, 1) * seconds)
        run.ranks[0].kill()
        assert run.wait() in ([-9], [0])
        if (tmp_path / "o" / "metrics.json").exists():  # finished: from the start again
            assert_same(left_by(tmp_path / "o"), wanted)
            shutil.rmtree(tmp_path / "o")
    assert Forked(tmp_path, *words).wait() == [0]
    assert_same(left_by(tmp_path / "o"), wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_repeats_its_ending_and_is_not_mixed_with_other_flags(stage, script, few, encoder, tmp_path):
    words, log = command(stage, encoder, tmp_path / "o", "--lr", 0.00125), tmp_path / "o" / "log.jsonl"
    assert script(*words)[0] == 0
    before, picture = left_by(tmp_path / "o"), {"pretrain_decoder": "panel.png", "finetune": "predictions.png"}.get(stage)
    for more in ([], ["--workers", 1], ["--save-every", 1], ["--micro-batch", 3]):
        for name in filter(None, ("metrics.json", picture)):
            os.remove(tmp_path / "o" / name)
        assert script(*words, *more)[0] == 0
        assert_same(left_by(tmp_path / "o"), before)
        assert picture is None or np.asarray(Image.open(tmp_path / "o" / picture)).std() > 0
    lines = log.read_text()
    for flag, then, now in (("--lr", "0.00125", "0.00375"), ("--steps", "4", "9"), ("--seed", "0", "7")):
        status, _, err = script(*words, flag, now)
        assert status == 2 and then in err and now in err and str(tmp_path / "o") in err and err.count("\n") == 1
    assert same_tensors(load(tmp_path / "o")["model"], before[0]) and log.read_text() == lines


# ---------------------------------------- Processes, micro-batches, loader workers


@pytest.mark.parametrize("stage", STAGES)
def test_processes_and_micro_batches_make_one_run_and_workers_the_same_bits(stage, encoder, folder, tmp_path):
    more = ["--lr", 3e-4]
    if stage == "finetune":  # masks with very different numbers of ignored pixels
        for i, path in enumerate(sorted((folder / "masks" / "train").rglob("*.png"))):
            mask = np.array(Image.open(path))
            mask[:(0, 36, 20, 40)[i]] = 255
            write_mask(path, mask)
        more += ["--data", "folder", "--root", folder, "--labels", 4, "--workers", 0, "--batch-size", 4]
    found = {}
    for processes, micro_batch, workers in ((1, 4, 0), (1, 1, 2), (1, 1, 0), (2, 4, 0)):
        out = tmp_path / f"{processes}_{micro_batch}_{workers}"
        run = Forked(tmp_path, *command(stage, encoder, out, *more, "--micro-batch", micro_batch, "--workers", workers),
                     processes=processes)
        assert run.wait() == [0] * processes, run.output.read_text()
        found[processes, micro_batch, workers] = left_by(out)
        assert not any("module." in name or "_orig_mod." in name for name in found[processes, micro_batch, workers][0])
    assert_same(found[1, 1, 2], found[1, 1, 0])
    one = found[1, 4, 0][1]
    for _, ours, _ in found.values():
        assert ours[:2] == pytest.approx(one[:2], rel=1e-5) and ours == pytest.approx(one, rel=1e-3) and len(ours) == 4


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(encoder, tmp_path):
    run = Forked(tmp_path, *command("pretrain_decoder", encoder, tmp_path / "o", "--batch-size", 3), processes=2)
    assert run.wait() == [2, 2] and not (tmp_path / "o").exists()


def test_the_command_of_the_card_runs_in_an_empty_folder_as_one_process_does(script, encoder, tmp_path, monkeypatch):
    """torchrun --nproc_per_node=8 pretrain_decoder.py --gamma 0.95, with two steps of a narrow decoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there are fewer than eight
    os.makedirs(pretrain_decoder.TOY_ENCODER)
    shutil.copy(encoder, pretrain_decoder.TOY_ENCODER)
    (tmp_path / pretrain_decoder.TOY_ENCODER / "metrics.json").write_text("{}")
    flags = ["pretrain_decoder", "--gamma", 0.95, "--steps", 2, "--width", 0.03125]
    done = torchrun(8, *flags, cwd=tmp_path)
    out = tmp_path / "runs" / "shapes" / "pretrain_decoder_ddep"
    assert done.returncode == 0 and load(out)["step"] == 2, done.stderr
    assert script(*flags, "--device", "cpu", "--out", "one")[0] == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5) and len(losses(out)) == 2


# ---------------------------------------- Flags and numbers


OPTIMISATION = [("--lr", 5e-4), ("--warmup", 0.5), ("--weight-decay", 0.1), ("--seed", 1), ("--batch-size", 2),
                ("--steps", 2), ("--min-area", 0.9), ("--precision", "bf16")]
FLAGS = {"pretrain_encoder": [("--image-size", 48)],
         "pretrain_decoder": [("--image-size", 48), ("--gamma", 0.5), ("--gamma", 0.9, 0.95), ("--sigma", 0.8),
                              ("--target", "image"), ("--condition",), ("--width", 0.0625)],
         "finetune": [("--crop-size", 48), ("--labels", 3), ("--width", 0.0625)]}


@pytest.mark.parametrize("stage, flag", [(stage, flag) for stage in STAGES for flag in [(), *OPTIMISATION, *FLAGS[stage]]])
def test_every_flag_changes_what_is_computed(stage, flag, script, few, undisturbed, encoder, tmp_path):
    status, _, err = script(*command(stage, encoder, tmp_path / "o", *flag))
    assert status == 0, err
    weights, _, _ = undisturbed(stage)[0]
    assert same_tensors(load(tmp_path / "o")["model"], weights) == (flag == ())


@pytest.mark.parametrize("stage", STAGES)
def test_epochs_are_passes_over_the_images(stage, script, few, encoder, tmp_path):
    words = [str(word) for word in command(stage, encoder, tmp_path / "o", "--epochs", 1.5)]
    at = words.index("--steps")
    assert script(*words[:at], *words[at + 2:])[0] == 0
    assert len(losses(tmp_path / "o")) == {"finetune": 3}.get(stage, 5)  # 1.5 x 6 labelled, or 1.5 x 12, in fours


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_makes_the_same_run_under_the_same_names(script, few, undisturbed, encoder, tmp_path):
    status, _, err = script(*command("pretrain_decoder", encoder, tmp_path / "o", "--compile", "--steps", 4))
    assert status == 0, err
    weights, ours, _ = left_by(tmp_path / "o")
    wanted = undisturbed("pretrain_decoder")[0]
    assert weights.keys() == wanted[0].keys() and ours == pytest.approx(wanted[1], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_1_decays_weights_apart_from_adam_and_stages_2_and_3_within(stage, script, few, encoder, tmp_path, monkeypatch):
    """Adam's first step is lr g / (|g| + 1e-8)."""
    kind = torch.optim.AdamW if stage == "pretrain_encoder" else torch.optim.Adam
    seen, step = [], kind.step

    def recorded(self, *args, **kwargs):
        weights = self.param_groups[0]["params"]
        seen.append([(p.grad.clone(), p.detach().clone()) for p in weights])
        step(self, *args, **kwargs)
        seen.append([p.detach().clone() for p in weights])
    monkeypatch.setattr(kind, "step", recorded)
    lr, decay = 0.01, 0.5
    assert script(*command(stage, encoder, tmp_path, "--warmup", 0, "--lr", lr, "--weight-decay", decay))[0] == 0
    for (g, w), after in zip(*seen[:2]):
        whole = g if stage == "pretrain_encoder" else g + decay * w
        start = w * (1 - lr * decay) if stage == "pretrain_encoder" else w
        torch.testing.assert_close(after, start - lr * whole / (whole.abs() + 1e-8), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_or_gradient_that_is_not_finite_does_not_reach_the_weights(
        stage, kind, script, few, encoder, tmp_path, monkeypatch):
    calls = []

    def spoil(loss):
        def spoiled(prediction, *args, **kwargs):
            calls.append(0)
            value = loss(prediction, *args, **kwargs)
            if len(calls) != 3:
                return value
            return value * float("nan") if kind == "loss" else value + (prediction.sum() * 0).sqrt()
        return spoiled
    for name in ("cross_entropy", "mse_loss"):
        monkeypatch.setattr(F, name, spoil(getattr(F, name)))
    status, _, err = script(*command(stage, encoder, tmp_path, "--save-every", 1))
    assert status == 2 and "step 3" in err and err.count("error:") == 1
    assert load(tmp_path)["step"] == 2 and all(value.isfinite().all() for value in load(tmp_path)["model"].values())


# ---------------------------------------- Stage 2


def batch_of(count, device="cpu"):
    """(x in [-1, 1], e, seeds) of the first `count` samples of a tiny run with seed 3."""
    source = datasets.pretraining_images(pretrain_decoder.parse_arguments([]))
    samples = data.Samples(source, data.pretraining_transform(32, 0.5), 3)
    batch = [samples[key] for key in next(iter(data.Order(len(source), count, 1, 3)))]
    x = torch.stack([sample["image"] for sample in batch]).to(device) / 127.5 - 1
    seeds = [sample["noise_seed"] for sample in batch]
    draw = (torch.randn(3, 32, 32, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds)
    return x, torch.stack([*draw]), seeds


def by_hand(variant, x, eps, seeds):
    """(noisy images, target, gamma) by Eq. 1 and Eq. 5."""
    if variant == "simple":
        return x + 0.8 * eps, eps, torch.full((len(x),), 1 / (1 + 0.8 ** 2))
    gamma = torch.full((len(x),), 0.95)
    if variant in ("range", "condition"):
        gamma = torch.stack([0.3 + 0.6 * torch.rand((), generator=torch.Generator().manual_seed(s + 1)) for s in seeds])
        assert len(set(gamma.tolist())) == len(x)
    g = gamma.to(x.device).reshape(-1, 1, 1, 1)
    return g.sqrt() * x + (1 - g).sqrt() * eps, x if variant == "image" else eps, gamma


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant, more", [
    ("plain", []), ("range", ["--gamma", 0.3, 0.9]), ("simple", ["--sigma", 0.8]), ("image", ["--target", "image"]),
    ("condition", ["--gamma", 0.3, 0.9, "--condition"])])
def test_the_loss_is_that_of_the_equations(variant, more, device, script, few, encoder, tmp_path):
    torch.manual_seed(3)
    network = model.build_unet("hybrid-small", 0.03125, 3, variant == "condition", 64)
    network.load_state_dict(torch.load(encoder)["model"], strict=False)
    if variant == "condition":  # fresh ones do not look at gamma
        for name, weights in network.named_parameters():
            weights.data += 0.1 * torch.randn_like(weights) * ("gamma" in name)
        torch.save({"model": network.state_dict(), "model_args": {"encoder": "hybrid-small", "width": 0.03125,
                                                                  "image_size": 64}}, tmp_path / "init.pt")
        more = [*more, "--init", tmp_path / "init.pt"]
    weights = [] if variant == "condition" else ["--encoder-weights", encoder]
    status, _, err = script("pretrain_decoder", *TINY["pretrain_decoder"], *weights, *more, "--seed", 3, "--device", device,
                            "--precision", "fp32", "--out", tmp_path)
    assert status == 0, err
    close = {"rel": 1e-5 if device == "cpu" else 1e-2}
    network.to(device)

    def mse(x_noisy, target, gamma, change=lambda maps: maps):
        with torch.no_grad():
            answer = network.decoder(change(network.encoder(x_noisy)), (32, 32), gamma.to(device))
        return (answer - target).square().mean().item()
    assert losses(tmp_path)[0] == pytest.approx(mse(*by_hand(variant, *batch_of(4, device))), **close)

    x_noisy, target, gamma = by_hand(variant, *batch_of(16, device))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    explained = (target * x_noisy).sum() ** 2 / x_noisy.square().sum()  # of the squares, by the best multiple
    assert metrics["loss_of_multiple"] == pytest.approx(
        ((target.square().sum() - explained) / target.numel()).item(), rel=1e-4)
    network.load_state_dict(load(tmp_path)["model"])
    assert metrics["loss"] == pytest.approx(mse(x_noisy, target, gamma), **close)
    mean = mse(x_noisy, target, gamma, lambda maps: [maps[0].mean(0, keepdim=True).expand_as(maps[0]), *maps[1:]])
    rises = metrics["rise_of_loss_without_map"]
    assert list(rises) == ["2", "4", "8", "16"] and rises["2"] == pytest.approx(mean / metrics["loss"] - 1, abs=1e-4)
