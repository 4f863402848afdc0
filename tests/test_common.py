"""common.py: what a user's mistake looks like, flags, rates and lengths by hand, checkpoints and the log."""
import argparse
import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch

import common
from common import UserError


def load():
    worker = dict(num_workers=1, collate_fn=lambda _: raises(UserError("imgs/a.png: broken")))
    loader = iter(torch.utils.data.DataLoader([0], **worker))
    try:
        next(loader)
    finally:
        loader._shutdown_workers()  # left to the collector they would be waited for, for 5 s


def raises(error):
    raise error


@pytest.mark.parametrize("main, part", [
    (lambda: raises(UserError("--lr 7: too high")), "--lr 7"), (load, "error: imgs/a.png: broken"),
    (lambda: torch.nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1)), "--micro-batch"),
    (common.users_mistakes()(lambda: raises(ValueError("a.pt: no weights"))), "a.pt: no weights"),
    (lambda: raises(RuntimeError("No working C++ compiler found\n\nSet X for more")), "--compile"),
    (lambda: torch.empty(10 ** 15), "--micro-batch"), (lambda: np.ones(10 ** 15), "--micro-batch"),
    (lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")), "--micro-batch"),
    (lambda: open("/nowhere/a.txt"), "/nowhere/a.txt"), (lambda: os.mkdir("/proc/no"), "/proc/no"),
    (lambda: os.makedirs("/proc/.cache/torch"), "TORCH_HOME"),
    (lambda: common.Parser().parse_args([f"imgs/{i}.jpg" for i in range(999)]), "quotes"),
    (lambda: raises(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")), "--workers"),
    (lambda: list(common.progress([1])) and raises(UserError("behind a bar")), "behind a bar"),
    (lambda: common.Parser().parse_args(["--nonsense"]), "--nonsense")])
def test_what_a_user_can_mend_is_one_line_and_status_2(main, part, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["/a/finetune.py"])
    with pytest.raises(SystemExit) as end:
        common.run(main)
    out, err = capfd.readouterr()
    *bars, line = err.replace("\r", "\n").splitlines()
    assert end.value.code == 2 and out == "" and len(err) < 500 and all("it/s" in bar for bar in bars if bar)
    assert line.startswith("finetune.py: ") and part in line and "Traceback" not in err


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("/.cache"), KeyError("c")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        common.run(lambda: raises(error))
    assert caught.value is error


RECIPES = {"shapes": dict(steps=500, lr=0.5, workers=0), "paper": dict(epochs=90, lr=0.25, workers=3),
           "mine": dict(steps=7, lr=0.125, workers=1)}


@pytest.mark.parametrize("flags, wanted", [
    ([], (500, None, 0.5)), (["--data", "mine"], (7, None, 0.125)), (["--data=other"], (None, 90, 0.25)),
    (["--epochs", "3"], (None, 3, 0.5)), (["--data", "other", "--steps", "4"], (4, None, 0.25)),
    (["--lr", "1e-3", "--steps=9"], (9, None, 1e-3))])
def test_defaults_follow_the_data_and_steps_and_epochs_replace_each_other(flags, wanted):
    parser = common.Parser()
    common.add_data_flags(parser, ("shapes", "mine", "other"))
    common.add_training_flags(parser)
    args = parser.parse(RECIPES, flags)
    assert (args.steps, args.epochs, args.lr) == wanted


@pytest.mark.parametrize("flags", [
    ["--steps", "3", "--epochs", "2"], ["--steps", "0"], ["--lr", "nan"], ["--seed", "1" * 400],
    ["--batch-size", "2.5"], ["--step", "3"], ["--seed", str(2 ** 63)], ["--lr", "inf"], ["--warmup", "1.5"]])
def test_a_flag_without_a_sensible_value_is_a_users_mistake_that_names_it(flags):
    parser = common.Parser()
    common.add_training_flags(parser)
    with pytest.raises(UserError, match=flags[-2]):
        parser.parse_args(flags)


@pytest.mark.parametrize("data, encoder, width, made_with, wanted", [
    ("shapes", None, None, {}, ("hybrid-small", 0.1875, None)), ("x", None, None, {}, ("hybrid", 1, None)),
    ("shapes", "resnet50", 3, {}, ("resnet50", 3, None)),
    ("x", "hybrid", None, {"encoder": "hybrid", "width": 2}, ("hybrid", 2, None)),
    ("x", None, None, {"encoder": "resnet50", "image_size": 384}, ("resnet50", 1, 384))])
def test_the_network_is_as_asked_and_as_its_weights_were_made(data, encoder, width, made_with, wanted):
    args = argparse.Namespace(data=data, encoder=encoder, width=width)
    made = common.network_args(args, made_with, "w.pt")
    assert made == dict(zip(("encoder", "width", "image_size"), wanted))
    args.encoder, args.width = "hybrid", 0.5
    for other in ({"encoder": "mine"}, {"encoder": "hybrid", "width": 0.25}):
        with pytest.raises(UserError, match=r"(hybrid|0\.5).*w.pt.*(mine|0\.25)"):
            common.network_args(args, other, "w.pt")


@pytest.mark.parametrize("steps, epochs, images, batch, wanted", [
    (None, 2, 12, 5, 5), (None, 2, 10, 5, 4), (None, 0.001, 10, 5, 1), (7, None, 10, 5, 7)])
def test_the_number_of_steps_is_given_or_covers_the_epochs(steps, epochs, images, batch, wanted):
    args = argparse.Namespace(steps=steps, epochs=epochs, batch_size=batch)
    assert common.number_of_steps(args, images, world=1) == wanted
    with pytest.raises(UserError, match=f"{batch}.* 3"):
        common.number_of_steps(args, images, world=3)


def test_the_rate_rises_linearly_then_falls_as_half_a_cosine():
    rates = [common.cosine_rate(step, 110, 2.0, 1 / 11) for step in range(110)]
    assert rates[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2, 2])
    assert (rates[35], rates[60], rates[85]) == pytest.approx((1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)))
    assert 0 < rates[109] == pytest.approx(2 * (math.pi / 200) ** 2, rel=1e-3)  # 1 + cos(pi - a) = a^2 / 2
    assert common.cosine_rate(0, 100, 3.0, 0) == common.cosine_rate(0, 1, 3.0, 0) == 3.0


@pytest.mark.parametrize("loss, gradient, scale, fine", [
    (1, 2, 1, True), (1, math.inf, 2, True), (1, math.nan, 1, False), (1, math.inf, 1, False),
    (math.nan, 1, 2, False), (math.inf, 1, 1, False)])
def test_what_is_not_finite_is_refused_where_no_lower_scale_can_help(loss, gradient, scale, fine):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight, torch.nn.Parameter(torch.ones(1))], lr=9)
    scaler.scale((weight * gradient).sum()).backward()
    scaler.unscale_(optimizer)
    if fine:
        assert common.finite_loss(5, torch.tensor(float(loss)), optimizer, scaler) == loss
    else:
        with pytest.raises(UserError, match="5"):
            common.finite_loss(5, torch.tensor(float(loss)), optimizer, scaler)


@pytest.mark.parametrize("then, now, scale", [("bf16", "fp16", 2), ("fp32", "fp16", 2), ("fp16", "bf16", 1),
                                              ("fp16", "fp16", 8), ("bf16", "fp32", 1)])
def test_a_run_goes_on_where_the_gpu_has_another_precision(then, now, scale):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    before, after = (torch.amp.GradScaler("cpu", init_scale=first, enabled=precision == "fp16")
                     for first, precision in ((8, then), (2, now)))
    common.restore({"optimizer": optimizer.state_dict(), "scaler": before.state_dict()}, optimizer, after)
    assert after.get_scale() == scale and after.is_enabled() == (now == "fp16")


@pytest.mark.parametrize("module, name", [(os, "replace"), (os, "fsync"), (torch, "save"), (json, "dumps")])
def test_a_save_that_is_interrupted_leaves_the_file_before_it(module, name, tmp_path, monkeypatch):
    path = tmp_path / ("a.json" if module is json else "a.pt")
    common.save(path, {"step": 1})
    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), UserError)):
        with monkeypatch.context() as patched, pytest.raises(seen) as caught:
            patched.setattr(module, name, lambda *_, **__: raises(error))
            common.save(path, {"step": 2})
        assert seen is KeyboardInterrupt or str(path) in str(caught.value)
        assert (json.loads(path.read_text()) if module is json else torch.load(path)) == {"step": 1}
    common.save(path, {"step": 3})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("encoder, init, by_batch", [("hybrid", "none", False), ("resnet50", "none", True),
                                                     ("resnet50", None, True), ("resnet50", "a.pt", False)])
def test_a_run_is_resumed_with_the_flags_and_data_that_it_began_with(
        encoder, init, by_batch, tmp_path, monkeypatch):
    def resume(images="50 a", **more):
        return common.resume(argparse.Namespace(**{**args, **more}), images=images)

    args = dict(out=str(tmp_path), init=init, lr=0.125, workers=1, batch_size=8, steps=9, micro_batch=4)
    checkpoint, step, made_of = resume()
    assert (checkpoint, step) == (None, 0)
    saved = {"args": args, "made_of": made_of, "step": 4, "model_args": {"encoder": encoder}}
    common.save(tmp_path / "last.pt", saved)
    assert resume()[1:] == (4, made_of)
    assert resume(root="elsewhere", workers=7, save_every=3, device="cpu", compile=True)[1] == 4
    for more, processes, named, free in (
            ({"lr": 0.25}, 1, r"lr 0\.125 .*0\.25", False), ({"images": "50 b"}, 1, "50 a .*50 b", False),
            ({"batch_size": 16}, 1, "batch-size 8 .*16", False), ({"new": 77}, 1, "new .*77", False),
            ({"micro_batch": 2}, 1, "batch 4 .*2", not by_batch), ({}, 2, "processes 1 .*2", not by_batch)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        if free:
            assert resume(**more)[1] == 4
        else:
            with pytest.raises(UserError, match=f"{tmp_path}.*{named}"):
                resume(**more)


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: whole[:200], lambda whole: whole.replace(bytes(396), bytes(395) + b"1"),
    lambda whole: bytes(len(whole)), lambda whole: b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_checkpoint_is_named_in_one_line(spoil, tmp_path):
    common.save(tmp_path / "last.pt", {"step": 4, "model": torch.zeros(99)})
    (tmp_path / "last.pt").write_bytes(spoil((tmp_path / "last.pt").read_bytes()))
    with pytest.raises(UserError, match="last.pt") as caught:
        common.resume(argparse.Namespace(out=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked, device, bf16, wanted", [
    ("auto", "cpu", True, "fp32"), ("auto", "cuda:0", True, "bf16"), ("auto", "cuda:1", False, "fp16"),
    ("auto", "mps", True, "fp32"), ("fp32", "cuda:0", True, "fp32"), ("bf16", "cpu", False, "bf16")])
def test_auto_is_bf16_without_emulation_then_fp16_and_else_fp32(asked, device, bf16, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or bf16)
    assert common.choose_precision(asked, torch.device(device)) == wanted


@pytest.mark.parametrize("error", [ImportError, TypeError])
def test_the_log_of_a_resumed_run_drops_what_came_after_its_checkpoint_without_tensorboard_too(
        error, tmp_path, monkeypatch):
    module = types.ModuleType("tensorboard")  # not installed, or broken
    module.__getattr__ = lambda name: raises(error("Descriptors cannot be created directly"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for start, value, rank in ((0, 1.0, 0), (2, 5.0, 0), (2, 9.0, 1)):  # process 1 writes none
        (tmp_path / "metrics.json").touch()
        log = common.Log(tmp_path, start, 4, rank)
        assert (tmp_path / "metrics.json").exists() == (start > 0)  # of another run, or of this one
        for step in range(start, 4):
            log.write(step + 1, loss=value)
        log.close()
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write('{"step": 5, "lo')  # as of a run that is killed while it writes
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:-1]]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
