"""pretrain_decoder.py: what is frozen, what the flags change, the optimiser by hand."""

import json
import math
import re

import subprocess
import sys

import pytest
import torch
from conftest import TINY, copy_program, flags, load, losses, same_tensors

import data
import datasets
import launch
import model
import noise
import pretrain_decoder


def first_step(script, out, monkeypatch, *more):
    """(gradients before the first optimiser step, weights before it, weights after it) of a tiny stage 2."""
    kind = torch.optim.AdamW if "--decoupled-weight-decay" in more else torch.optim.Adam
    seen, step = [], kind.step

    def recorded(self, *args, **kwargs):
        parameters = self.param_groups[0]["params"]
        seen.append([p.grad.clone() for p in parameters])
        seen.append([p.detach().clone() for p in parameters])
        step(self, *args, **kwargs)
        seen.append([p.detach().clone() for p in parameters])

    with monkeypatch.context() as patched:
        patched.setattr(kind, "step", recorded)
        status, _, err = script("pretrain_decoder", *flags("pretrain_decoder"), "--warmup-steps", 0, *more,
                                "--out", out)
    assert status == 0, err
    return seen[:3]


def test_clipping_scales_a_long_gradient_down_and_leaves_a_short_one(script, few_shapes, tmp_path, monkeypatch):
    def norm_of(name, norm):
        gradients, _, _ = first_step(script, tmp_path / name, monkeypatch, "--clip-norm", norm)
        return torch.cat([gradient.flatten() for gradient in gradients])

    whole = norm_of("whole", 1e6)
    length = whole.norm().item()
    clipped = norm_of("clipped", length / 4)
    assert clipped.norm().item() == pytest.approx(length / 4, rel=1e-4)
    torch.testing.assert_close(clipped, whole / 4, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(norm_of("longer", 2 * length), whole)


def test_adam_is_coupled_unless_asked_otherwise(script, few_shapes, tmp_path, monkeypatch):
    """Adam's first step is lr * g / (|g| + 1e-8). Coupled, the decay is in g; decoupled, the weights shrink by lr * wd."""
    lr, decay = 0.01, 1e6
    gradients, before, after = first_step(script, tmp_path / "a", monkeypatch, "--lr", lr, "--weight-decay", decay)
    for g, w, moved in zip(gradients, before, after):
        whole = g + decay * w
        torch.testing.assert_close(moved, w - lr * whole / (whole.abs() + 1e-8), rtol=1e-3, atol=1e-5)
    decay = 0.5
    gradients, before, after = first_step(script, tmp_path / "b", monkeypatch, "--lr", lr, "--weight-decay", decay,
                                          "--decoupled-weight-decay")
    for g, w, moved in zip(gradients, before, after):
        step = lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(moved, w * (1 - lr * decay) - step, rtol=1e-3, atol=1e-5)


def test_ddep_leaves_every_byte_of_the_encoder_and_dep_trains_it(script, few_shapes, tmp_path):
    assert script("pretrain_encoder", *flags("pretrain_encoder"), "--out", tmp_path / "encoder")[0] == 0
    weights = tmp_path / "encoder" / "last.pt"
    before = {name: value for name, value in load(weights)["model"].items() if name.startswith("encoder.")}
    for method, moved in (("ddep", False), ("dep", True)):
        status, out, err = script("pretrain_decoder", *TINY["pretrain_decoder"], "--method", method,
                                  "--encoder-weights", weights, "--out", tmp_path / method)
        assert status == 0, err
        after = load(tmp_path / method / "last.pt")
        encoder = {name: value for name, value in after["model"].items() if name.startswith("encoder.")}
        assert same_tensors(encoder, before) != moved
        moments = sum(len(state) > 0 for state in after["optimizer"]["state"].values())
        assert moments == len(list(model.build_unet(**after["model_args"]).parameters())) - (
            0 if moved else len(list(model.build_encoder("hybrid-small").parameters())))


def test_the_loss_of_a_network_that_answers_nothing_is_one(script, few_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        model.UNetDecoder, "forward",
        lambda self, maps, size, gamma=None: self.head.bias.sum() * 0 + torch.zeros(len(maps[0]), 3, *size))
    assert script("pretrain_decoder", *flags("pretrain_decoder"), "--out", tmp_path)[0] == 0
    assert losses(tmp_path) == pytest.approx([1.0] * 4, abs=0.02)  # E ||e||^2 / n


@pytest.mark.parametrize(
    "more", [["--gamma", "0.5"], ["--gamma-range", "0.9", "0.95"], ["--sigma", "0.8"],
             ["--noise", "simple", "--sigma", "0.8"], ["--target", "image"], ["--condition"],
             ["--image-size", "48"], ["--min-area", "0.9"], ["--weight-decay", "0.1"],
             ["--weight-decay", "0.1", "--decoupled-weight-decay"], ["--warmup-steps", "0"],
             ["--clip-norm", "1e-4", "--weight-decay", "0.1"], ["--width", "0.0625"], ["--batch-size", "2"]])
def test_every_flag_changes_what_is_computed(more, script, few_shapes, tmp_path):
    base = [*flags("pretrain_decoder"), "--steps", 2]
    assert script("pretrain_decoder", *base, "--out", tmp_path / "plain")[0] == 0
    status, _, err = script("pretrain_decoder", *base, *more, "--out", tmp_path / "other")
    assert status == 0, err
    assert not same_tensors(
        load(tmp_path / "plain" / "last.pt")["model"],
        load(tmp_path / "other" / "last.pt")["model"])


def test_sigma_is_another_name_for_gamma(script, few_shapes, tmp_path):
    for name, more in (("gamma", ["--gamma", 0.5]), ("sigma", ["--sigma", 1])):
        assert script("pretrain_decoder", *flags("pretrain_decoder"), *more, "--out", tmp_path / name)[0] == 0
    assert losses(tmp_path / "gamma") == losses(tmp_path / "sigma")


def test_real_data_defaults_are_the_papers(monkeypatch):
    import finetune
    import pretrain_decoder

    for width, lr in ((None, 6e-5), ("2", 1e-4), ("3", 6e-5)):
        args = pretrain_decoder.parse_arguments(
            ["--data", "folder", "--root", "x", *(["--width", width] if width else [])])
        assert (args.batch_size, args.epochs, args.steps, args.image_size, args.lr,
                args.gamma) == (512, 100, None, 224, lr, 0.95)
        assert (args.encoder, args.width, args.method, args.target,
                args.noise) == ("hybrid", float(width or 1), "ddep", "noise", "scaled")
        assert launch.number_of_steps(args, 14_000_000) == math.ceil(100 * 14_000_000 / 512)
    args = finetune.parse_arguments(["--data", "folder", "--root", "x"])
    network = finetune.choose_network(args, init=None)
    assert (1e-5 <= args.lr <= 3e-4 and 1e-5 <= args.weight_decay <= 3e-4
            and (args.crop_size, network["encoder"], network["width"]) == (512, "hybrid", 1))


def test_the_card_command_trains_a_missing_encoder_first_and_keeps_it(tmp_path):
    """torchrun --nproc_per_node=N pretrain_decoder.py --gamma 0.95 in a fresh clone; here with two processes, two steps, a shorter stage 1."""
    copy_program(tmp_path)
    stage_1 = (tmp_path / "pretrain_encoder.py").read_text()
    assert "steps=500" in stage_1
    (tmp_path / "pretrain_encoder.py").write_text(stage_1.replace("steps=500", "steps=100"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "pretrain_decoder.py", "--gamma", "0.95", "--steps", "2"
    ]
    for attempt in range(2):
        done = subprocess.run([*command, *(["--seed", "1", "--out", "other"] if attempt else [])],
                              cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert ("training one first" in done.stdout) == (attempt == 0)
    encoder = load(tmp_path / "runs/shapes/pretrain_encoder/last.pt")
    assert (json.loads((tmp_path / "runs/shapes/pretrain_encoder/metrics.json").read_text())["top1"]
            > 0.25)  # chance is 0.17, with a standard error of 0.02
    ours = load(tmp_path / "runs/shapes/pretrain_decoder_ddep/last.pt")["model"]
    assert all(
        torch.equal(ours[name], value) for name, value in encoder["model"].items()
        if name.startswith("encoder."))


def test_a_checkpoint_of_another_architecture_or_width_is_refused(script, few_shapes, tmp_path):
    assert script("pretrain_decoder", *flags("pretrain_decoder"), "--out", tmp_path / "ddep")[0] == 0
    weights = tmp_path / "ddep" / "last.pt"
    for more, message in ((["--width", 0.0625], "--width 0.0625, but"),
                          (["--encoder", "resnet50"], "was made with encoder hybrid-small")):
        status, _, err = script("finetune", "--init", weights, *more, "--out", tmp_path / "o")
        assert status == 2 and message in err and err.count("\n") == 1
    status, _, err = script("pretrain_decoder", "--encoder", "resnet50", "--encoder-weights", weights,
                            "--out", tmp_path / "o")
    assert status == 2 and "does not fit ResNet50" in err and err.count("\n") == 1


def test_a_decoder_goes_on_from_a_checkpoint_of_this_stage(script, few_shapes, tmp_path):
    base = [*flags("pretrain_decoder"), "--width", 1 / 16]
    assert script("pretrain_decoder", *base, "--condition", "--out", tmp_path / "first")[0] == 0
    first = load(tmp_path / "first" / "last.pt")
    base = [*TINY["pretrain_decoder"], "--init", tmp_path / "first" / "last.pt", "--lr", 1e-30]
    same = ["--width", 1 / 16, "--condition"]
    status, out, err = script("pretrain_decoder", *base, *same, "--out", tmp_path / "more")
    assert status == 0 and f"encoder and decoder of {tmp_path / 'first' / 'last.pt'}" in out, err
    more = load(tmp_path / "more" / "last.pt")
    assert same_tensors(more["model"], first["model"])
    assert more["model_args"] == {**first["model_args"], "image_size": 64}  # as the position grid is
    for wrong, message in ((["--width", 1 / 32, "--condition"], "first/last.pt: expected a checkpoint of this stage with the "
                            "same flags, it was made with .*'width': 0.0625.* tensors of another shape"),
                           ([*same, "--encoder-weights", "random"], "--init brings its encoder along")):
        status, _, err = script("pretrain_decoder", *base, *wrong, "--out", tmp_path / "wrong")
        assert status == 2 and re.search(message, err) and err.count("\n") == 1, err
    assert script("pretrain_encoder", *TINY["pretrain_encoder"], "--out", tmp_path / "encoder")[0] == 0
    status, _, err = script("pretrain_decoder", *TINY["pretrain_decoder"], "--init", tmp_path / "encoder" / "last.pt",
                            "--out", tmp_path / "wrong")
    assert status == 2 and "expected a checkpoint of this stage" in err and err.count("\n") == 1


@pytest.mark.parametrize("stage", ["pretrain_encoder", "pretrain_decoder", "finetune"])
def test_no_stage_loads_more_than_a_micro_batch_at_once(stage, script, few_shapes, tmp_path, monkeypatch):
    sizes, collate = [], data._collate
    monkeypatch.setattr(data, "_collate", lambda items: (sizes.append(len(items)), collate(items))[1])
    more = ["--batch-size", 8, "--micro-batch", 2, "--steps", 2]
    assert script(stage, *flags(stage), *more, "--out", tmp_path)[0] == 0
    assert sizes[:8] == [2] * 8


@pytest.mark.parametrize("used", [0, 2])
def test_what_the_decoder_uses_is_the_rise_of_the_loss_without_each_map(used, few_shapes):
    """A decoder made by hand: it misses the noise by 0.5, but by 1 where the map that it uses was changed. Its loss is
    1/4, or 1, which is 3 times 1/4 more."""
    class Net(torch.nn.Module):
        encoder = torch.nn.Module()
        encoder.strides = (2, 4, 8)

        def encode(self, x):
            self.x = x
            return [torch.arange(16.0).reshape(16, 1, 1, 1).expand(16, 1, 4, 4)] * 3

        def decoder(self, maps, size, gamma):
            changed = not torch.equal(maps[used][:, 0, 0, 0], torch.arange(16.0))
            return self.eps + (1.0 if changed else 0.5)

    net, args = Net(), pretrain_decoder.parse_arguments(["--encoder-weights", "random"])
    source = datasets.Shapes("unlabelled", 20)
    samples = data.Samples(source, data.pretraining_transform(32), seed=0)
    seeds = [samples[key]["noise_seed"] for key in next(iter(data.Batches(20, 16, 1)))]
    net.eps = noise.sample_noise((16, 3, 32, 32), seeds)
    rises = pretrain_decoder.what_the_decoder_uses(args, net, samples, torch.device("cpu"))
    assert rises == {stride: pytest.approx(3.0 if i == used else 0, abs=1e-4) for i, stride in enumerate((2, 4, 8))}
