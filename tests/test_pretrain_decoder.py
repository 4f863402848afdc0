"""What all three stages promise (a run that is killed, several processes, flags), then stage 2 itself."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (DEVICES, ROOT, STAGES, TINY, Forked, flags, imagenet21k, load, losses, one_line,
                      same_tensors, write_image, write_pairs)
from PIL import Image
from torchvision.models import resnet50

import data
import datasets
import model
import noise
import pretrain_decoder
import pretrain_encoder
import unlabelled

WEIGHTS = {"pretrain_encoder": None, "pretrain_decoder": "--encoder-weights", "finetune": "--init"}


def command(stage, weights, out, *more):
    given = [WEIGHTS[stage], weights] if WEIGHTS[stage] else []
    return [stage, *TINY[stage], *given, *more, "--out", out]


def left_by(out):  # the weights, the losses, the scores
    return load(out)["model"], losses(out), json.loads((out / "metrics.json").read_text())


def assert_same(ours, theirs, device="cpu"):
    if device == "cpu":
        assert same_tensors(ours[0], theirs[0]) and ours[1:] == theirs[1:]
    else:  # not all of its kernels are deterministic
        assert len(ours[1]) == len(theirs[1]) and ours[1] == pytest.approx(theirs[1], rel=1e-2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoder):
    """undisturbed(stage) -> what a run leaves that nobody disturbs; made once."""
    made = {}

    def make(stage, device="cpu"):
        if (stage, device) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            run = Forked(folder, *command(stage, encoder, folder / "o", "--device", device))
            assert run.wait() == [0], run.output.read_text()
            made[stage, device] = left_by(folder / "o")
        return made[stage, device]
    return make


def die_in_save(number, place):
    """Be killed in save `number` of last.pt: half of it written, or after it is renamed."""
    write, rename, saves = torch.save, os.replace, []
    die = partial(os.kill, os.getpid(), signal.SIGKILL)

    def save(content, file):
        write(content, file)
        saves.append(file)
        if len(saves) == number and place == "within":
            file.truncate(file.tell() // 2)
            die()
        if len(saves) == number:
            os.replace = lambda *paths: (rename(*paths), die())
    torch.save = save


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage, number, place", [
    *((stage, 2, "within") for stage in STAGES), ("finetune", 1, "after")])
def test_killed_in_a_save_a_run_ends_with_the_same_bits_without_the_weights_it_began_from(
        stage, number, place, device, undisturbed, encoder, tmp_path):
    weights = shutil.copy(encoder, tmp_path / "weights.pt")
    words = command(stage, weights, tmp_path / "o", "--save-every", 2, "--device", device)
    assert Forked(tmp_path, *words, before=partial(die_in_save, number, place)).wait() == [-9]
    os.remove(weights)
    run = Forked(tmp_path, *words)
    assert run.wait() == [0], run.output.read_text()
    assert_same(left_by(tmp_path / "o"), undisturbed(stage, device), device)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_repeats_its_ending_and_is_not_mixed_with_other_flags_or_weights(
        stage, script, few, encoder, tmp_path):
    weights, out, other = shutil.copy(encoder, tmp_path / "w.pt"), tmp_path / "o", torch.load(encoder)
    words = command(stage, weights, out, "--lr", 0.00125)
    status, said, _ = script(*words)
    assert status == 0 and str(out) not in said
    before, lines = left_by(out), (out / "log.jsonl").read_text()
    for flag, then, now in (("--lr", "0.00125", "0.00375"), ("--steps", "4", "9"), ("--seed", "0", "7")):
        assert one_line(script(*words, flag, now), then, now, out)
    other["model"] = {name: value + 1 for name, value in other["model"].items()}
    for content in (other, {"state_dict": other["model"]}) if WEIGHTS[stage] else ():  # under the same path
        torch.save(content, weights)
        assert one_line(script(*words), out, "weights")
    picture = {"pretrain_decoder": ["panel.png"], "finetune": ["predictions.png"]}.get(stage, [])
    for change, more in ((lambda: shutil.copy(encoder, weights), ""),  # the same bytes, or none
                         (lambda: os.remove(weights), "--workers 1 --save-every 1 --micro-batch 3")):
        change()
        for name in ("metrics.json", *picture):
            os.remove(out / name)
        status, said, _ = script(*words, *more.split())
        assert status == 0 and str(out) in said  # says that it is finished
        assert_same(left_by(out), before)
        assert all(np.asarray(Image.open(out / name)).std() > 0 for name in picture)
    assert same_tensors(load(out)["model"], before[0]) and (out / "log.jsonl").read_text() == lines


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_micro_batches_make_the_run_of_one_without(stage, encoder, folder, tmp_path):
    more, found = ["--lr", 3e-4, "--weight-decay", 0.1], {}  # with L2, Adam minds the scale of gradients
    if stage == "finetune":  # masks with very different numbers of ignored pixels
        more += ["--data", "folder", "--root", folder, "--labels", 4, "--workers", 0, "--batch-size", 4]
        more += ["--eval-every", 2]
    for processes, micro_batch in ((1, 4), (2, 1)):
        out = tmp_path / f"{processes}_{micro_batch}"
        words = command(stage, encoder, out, *more, "--micro-batch", micro_batch)
        assert Forked(tmp_path, *words, processes=processes).wait() == [0] * processes
        found[processes, micro_batch] = losses(out)
        assert not any("module." in name or "_orig_mod." in name for name in load(out)["model"])
    for ours in found.values():
        assert len(ours) == 4 and ours[:2] == pytest.approx(found[1, 4][:2], rel=1e-5)
        assert ours == pytest.approx(found[1, 4], rel=1e-3)


def in_a_folder_of_its_own(tmp_path):
    os.chdir(tmp_path / os.environ["RANK"])


@pytest.mark.parametrize("unequal", ["checkpoint", "data"])
@pytest.mark.parametrize("stage", STAGES)
def test_processes_that_see_different_checkpoints_or_data_all_end_with_one_line(
        stage, unequal, encoder, tmp_path):
    for rank in "01":
        names = [*"abcde", rank if unequal == "data" else "f"]
        write_pairs(tmp_path / rank / "d", *[f"{kind}/train/{'ij'[i % 2]}/{name}.png" for i, name in
                                             enumerate(names) for kind in ("images", "masks")])
    root = ["--root", "d/images" if stage == "pretrain_encoder" else "d", "--encoder", "hybrid-small"]
    words = command(stage, encoder, "o", "--data", "folder", *root, "--workers", 0)
    before = partial(in_a_folder_of_its_own, tmp_path)
    if unequal == "checkpoint":
        assert Forked(tmp_path, *words, before=before).wait() == [0]
    run = Forked(tmp_path, *words, processes=2, before=before)
    statuses, said = run.wait(), run.output.read_text()
    assert statuses == [2, 2] and said.count("error:") == said.count("o/last.pt") == 2, said
    assert "Traceback" not in said


def slowly(seconds, function, *args):
    time.sleep(seconds)  # longer, in all, than the timeout of two seconds below
    return function(*args)


def slow_and_impatient():
    real, read = torch.distributed.init_process_group, datasets.Shapes.read
    torch.distributed.init_process_group = lambda backend: real(backend, timeout=timedelta(seconds=2))
    unlabelled.list_tars = partial(slowly, 3, unlabelled.list_tars)
    if os.environ["RANK"] == "1":  # reads two pictures to validate on
        datasets.Shapes.read = lambda self, i: slowly(1.2 * (self.rows[i][0] == "val"), read, self, i)


@pytest.mark.parametrize("stage", ["pretrain_decoder", "finetune"])
def test_an_index_and_an_evaluation_may_take_longer_than_training_waits(stage, encoder, tmp_path):
    tars = ["--data", "imagenet21k", "--root", imagenet21k(tmp_path / "tars"), "--workers", 0]
    words = command(stage, encoder, tmp_path / "o", *(tars if stage == "pretrain_decoder" else []))
    run = Forked(tmp_path, *words, "--micro-batch", 2, processes=2, before=slow_and_impatient)
    assert run.wait() == [0, 0], run.output.read_text()
    assert len(losses(tmp_path / "o")) == 4 and (tmp_path / "o" / "metrics.json").exists()


def test_the_command_of_the_card_runs_in_an_empty_folder_as_one_process_does(
        done, encoder, tmp_path, monkeypatch):
    """torchrun --nproc_per_node=8 pretrain_decoder.py --gamma 0.95, with two steps of a narrow decoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there are fewer than eight
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    os.makedirs(pretrain_decoder.TOY_ENCODER)
    shutil.copy(encoder, pretrain_decoder.TOY_ENCODER)
    (tmp_path / pretrain_decoder.TOY_ENCODER / "metrics.json").write_text("{}")
    flags = ["--gamma", "0.95", "--steps", "2", "--width", "0.03125"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    ended = subprocess.run([*torchrun, ROOT / "pretrain_decoder.py", *flags], capture_output=True, text=True,
                           timeout=1200)
    out = tmp_path / "runs" / "shapes" / "pretrain_decoder_ddep"
    assert ended.returncode == 0 and load(out)["step"] == 2, ended.stderr
    done("pretrain_decoder", *flags, "--device", "cpu", "--out", "one")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5) and len(losses(out)) == 2


FLAGS = ["--lr 5e-4", "--warmup 0.5", "--weight-decay 0.1", "--seed 1", "--batch-size 2", "--min-area 0.9",
         "--precision bf16", "--workers 2"]
OWN = {"pretrain_encoder": ["--image-size 48"],
       "finetune": ["--crop-size 48", "--labels 3", "--width 0.0625", "--eval-every 3"],
       "pretrain_decoder": ["--image-size 48", "--gamma 0.5", "--gamma 0.9 0.95", "--sigma 0.8",
                            "--target image", "--condition", "--width 0.0625"]}


@pytest.mark.parametrize("stage, flag", [(name, flag) for name in STAGES for flag in FLAGS + OWN[name]])
def test_every_flag_but_those_of_loader_workers_and_validation_changes_the_weights(
        stage, flag, done, few, undisturbed, encoder, tmp_path):
    done(*command(stage, encoder, tmp_path / "o", *flag.split()))
    same = same_tensors(load(tmp_path / "o")["model"], undisturbed(stage)[0])
    assert same == (flag in ("--workers 2", "--eval-every 3"))


def test_a_compiled_network_makes_the_same_run_under_the_same_names(
        done, few, undisturbed, encoder, tmp_path, monkeypatch):
    graphs = []  # torch's own backend takes minutes on two cores
    own = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    monkeypatch.setattr(torch, "compile", own)
    done(*command("pretrain_decoder", encoder, tmp_path / "o", "--compile"))
    weights, ours, _ = left_by(tmp_path / "o")
    wanted = undisturbed("pretrain_decoder")
    assert graphs and weights.keys() == wanted[0].keys() and ours == pytest.approx(wanted[1], rel=1e-3)


def batch_of(count, device="cpu"):
    """(x in [-1, 1], e, seeds) of the first `count` samples of a tiny run with seed 3."""
    source = datasets.all_shapes(flags("shapes", None), "unlabelled")
    samples = data.Samples(source, data.pretraining_transform(32, 0.5), 3)
    batch = [samples[key] for key in next(iter(data.Order(len(source), count, count, 1, 3)))]
    x = torch.stack([sample["image"] for sample in batch]).to(device) / 127.5 - 1
    seeds = [sample["noise_seed"] for sample in batch]
    generators = (torch.Generator(device).manual_seed(seed) for seed in seeds)
    return x, torch.stack([torch.randn(3, 32, 32, generator=g, device=device) for g in generators]), seeds


def by_hand(variant, x, eps, seeds):
    """(noisy images, target, gamma) by Eq. 1 and Eq. 5."""
    if variant == "simple":
        return x + 0.8 * eps, eps, torch.full((len(x),), 1 / (1 + 0.8 ** 2))
    gamma = torch.full((len(x),), 0.95)
    if variant in ("range", "condition"):
        generators = (torch.Generator().manual_seed(seed + 1) for seed in seeds)
        gamma = torch.stack([0.3 + 0.6 * torch.rand((), generator=g) for g in generators])
        assert len(set(gamma.tolist())) == len(x)
    g = gamma.to(x.device).reshape(-1, 1, 1, 1)
    return g.sqrt() * x + (1 - g).sqrt() * eps, x if variant == "image" else eps, gamma


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant, more", [
    ("plain", []), ("range", ["--gamma", 0.3, 0.9]), ("simple", ["--sigma", 0.8]),
    ("image", ["--target", "image"]), ("condition", ["--gamma", 0.3, 0.9, "--condition"])])
def test_the_loss_is_that_of_the_equations(variant, more, device, done, few, encoder, tmp_path, monkeypatch):
    torch.manual_seed(3)
    network = model.build_unet("hybrid-small", 0.03125, 3, variant == "condition", 64)
    network.load_state_dict(torch.load(encoder)["model"], strict=False)
    if variant == "condition":  # fresh weights do not look at gamma
        for name, weights in network.named_parameters():
            weights.data += 0.1 * torch.randn_like(weights) * ("gamma" in name)
        monkeypatch.setattr(pretrain_decoder, "build_unet", lambda **_: copy.deepcopy(network))
    more = [*more, "--seed", 3, "--device", device, "--precision", "fp32"]
    done(*command("pretrain_decoder", encoder, tmp_path, *more))
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
    page = np.asarray(Image.open(tmp_path / "panel.png"))[26:24 + 4 * 166:5, 8:, :]  # five pixels for one
    x, shown = batch_of(4)[0], [(x_noisy[0].cpu(), 166)]
    for image, left in [(x[0], 0), *shown]:
        assert np.abs(page[:32, left:left + 160:5] / 127.5 - 1 - image.clamp(-1, 1).permute(1, 2, 0).numpy()
                      ).max() < 0.005
    rises = metrics["rise_of_loss_without_map"]
    mean = mse(x_noisy, target, gamma, lambda maps: [maps[0].mean(0, True).expand_as(maps[0]), *maps[1:]])
    assert list(rises) == ["2", "4", "8", "16"]
    assert rises["2"] == pytest.approx(mean / metrics["loss"] - 1, abs=1e-4)


@pytest.mark.parametrize("method, encoder_name", [("ddep", "hybrid-small"), ("dep", "hybrid-small"),
                                                  ("dep", "resnet50")])
def test_ddep_leaves_every_byte_of_the_encoder_and_dep_trains_it(
        method, encoder_name, done, few, encoder, tmp_path):
    if encoder_name == "resnet50":  # as torchvision publishes it
        encoder = tmp_path / "resnet50.pth"
        network = resnet50(norm_layer=partial(torch.nn.BatchNorm2d, momentum=None))
        network(torch.randn(4, 3, 64, 64))  # its statistics are those of data
        torch.save(network.state_dict(), encoder)
    done(*command("pretrain_decoder", encoder, tmp_path / "o", "--method", method))
    before = torch.load(encoder)
    if encoder_name == "hybrid-small":
        before = {name.removeprefix("encoder."): value for name, value in before["model"].items()}
    after = load(tmp_path / "o")["model"]
    torch.manual_seed(0)
    fresh = model.build_unet(encoder_name, 0.03125, 3, False, 64)
    start = {**fresh.state_dict(), **{f"encoder.{name}": value for name, value in before.items()}}
    trains = {name for name, _ in fresh.named_parameters() if method == "dep" or name.startswith("decoder.")}
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    assert moved <= trains and len(moved) > 0.9 * len(trains)  # a ReLU may be dead


def test_a_network_that_is_no_better_than_a_multiple_of_its_input_is_warned_of(
        script, few, encoder, tmp_path, monkeypatch):
    for level in ("--gamma 0.95", "--gamma 0", "--gamma 1", "--sigma 0"):
        words = command("pretrain_decoder", encoder, tmp_path / level, *level.split())
        assert ("WARNING" in script(*words)[1]) == (level == "--gamma 0.95")  # else there is no task
    monkeypatch.setattr(noise, "sample_noise", lambda shape, seeds, device="cpu": torch.full(shape, 0.3))
    monkeypatch.setattr(model.UNetDecoder, "forward", lambda self, maps, size, gamma=None: (
        self.head.bias.sum() * 0 + torch.full((len(maps[0]), 3, *size), 0.31)))  # knows this noise
    status, out, err = script(*command("pretrain_decoder", encoder, tmp_path / "b"))
    assert status == 0 and "WARNING" not in out, err


def test_on_the_toy_data_a_missing_encoder_is_trained_once_and_changes_nothing_else(
        done, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pretrain_encoder.RECIPES["shapes"], "steps", 2)
    path, written = tmp_path / pretrain_decoder.TOY_ENCODER / "last.pt", set()
    for out in "ab":
        done("pretrain_decoder", *TINY["pretrain_decoder"], "--out", out)
        written.add(path.stat().st_mtime_ns)
    assert len(written) == 1
    trained, a, b = (load(folder)["model"] for folder in (path.parent, "a", "b"))
    assert all(torch.equal(a[name], trained[name]) for name in a if name.startswith("encoder."))
    assert same_tensors(a, b)  # nothing else depends on whether the encoder was there


def test_of_real_pictures_an_unreadable_one_is_replaced_ddep_needs_an_encoder_and_no_output_lies_among_them(
        script, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        write_image(tmp_path / "d" / f"{i}.png", 33 + i, 50, seed=i)
    (tmp_path / "d" / "2.png").write_text("broken")
    words = ["pretrain_decoder", *TINY["pretrain_decoder"], "--data", "folder", "--workers", 0]
    assert one_line(script(*words, "--root", "d", "--out", "o"), "--encoder-weights")
    words += ["--encoder-weights", encoder, "--root"]
    for more, named in (("d --out d/o", "d/o"), (". --out o", " o"), (".", "runs/folder/pretrain_decoder")):
        assert one_line(script(*words, *more.split()), named)
        assert {path.parent.name for path in tmp_path.rglob("*.*")} == {"d"}
    status, _, err = script(*words, "d", "--out", "o")
    assert status == 0 and "2.png" in err and len(losses("o")) == 4
