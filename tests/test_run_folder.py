"""run_folder.py, and what every stage promises. On one type of machine, with deterministic kernels; on CUDA some are not.

promise                                                            test
SIGKILL at any instant: the same bits in the end                   test_killed_at_random_instants_the_run_ends_with_the_same_bits
... inside a save, between any two renames                         test_killed_inside_a_save_the_run_ends_with_the_same_bits
what was saved is not computed again                               test_nothing_that_was_saved_is_done_again
a damaged last.pt is noticed, previous.pt is used, a line says so  test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used
                                                                   test_an_altered_byte_is_noticed_or_changes_nothing
SIGTERM, SIGINT, SIGUSR1: a save after the step, and status 75     test_a_signal_saves_at_the_end_of_the_step_and_the_run_can_continue
... all processes together, also in a validation                   test_a_signal_to_one_process_stops_all_even_in_a_validation
... through torchrun, while loader workers go on                   test_torchrun_passes_sigterm_on_and_loader_workers_do_not_die_first
torchrun --max-restarts continues from the last checkpoint         test_torchrun_restarts_the_group_when_a_process_is_killed
torchrun itself may be killed: its processes stop                  test_processes_whose_torchrun_was_killed_stop_and_the_command_continues
                                                                   test_processes_that_wait_for_a_group_end_with_their_torchrun
another number of processes may continue                           test_a_run_goes_on_with_another_number_of_processes
other flags or data in the same --out are refused, with both       test_other_flags_than_those_of_the_run_are_refused
                                                                   test_other_data_is_refused
... also where only the bytes differ; a copy elsewhere is not      test_a_mask_or_image_that_was_replaced_is_refused_and_a_copy_is_not
a second run in the same --out is refused (not on Windows)         test_a_second_run_into_the_same_folder_is_refused
a full or read-only disk stops the run with one line               test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint
                                                                   test_a_disk_that_cannot_be_written_is_said_in_one_line
a loss or gradient that is not finite stops the run first          test_a_gradient_that_is_not_finite_stops_the_run_and_lists_the_batch
... with fp16 the step is skipped                                  test_fp16_skips_a_step_that_overflows_and_stops_when_no_scale_will_help
1, 2 and 4 processes, with accumulation: one curve within 1e-5     test_1_2_and_4_processes_with_and_without_accumulation_are_one_run
... ResNet-50's batch statistics, without accumulation             test_batch_statistics_are_those_of_all_processes
weights that are not finite are not saved                          test_weights_that_are_not_finite_are_not_saved
a user's files in --out are neither overwritten nor hidden         test_a_folder_with_files_that_no_run_wrote_is_refused
                                                                   test_a_run_does_not_hide_the_pictures_it_learns_from
an altered checkpoint or --init is one line                        test_an_altered_checkpoint_is_not_continued_from
                                                                   test_altered_weights_are_not_begun_from
damaged pictures are skipped, named once, and replaced             test_pretraining_runs_through_damaged_files_as_if_they_were_their_neighbours
                                                                   test_what_is_said_of_each_bad_picture
evaluation: any number of processes, the same integers             test_the_number_of_processes_does_not_change_an_integer
                                                                   (test_evaluate.py)
"""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGES, TINY, Forked, copy_program, load, losses, same_tensors, write_image
from conftest import flags as tiny
from PIL import Image

import run_folder
import data
import datasets
import launch
import model

STEPS = {stage: ["--steps", 6, "--save-every", 2, "--eval-every", 3, "--micro-batch", 1] for stage in STAGES}
STEPS["pretrain_decoder"] = ["--steps", 6, "--save-every", 2, "--encoder-weights", "random"]


def flags(stage, out, *more):
    return [*TINY[stage], *STEPS[stage], *more, "--out", out]


def everything(out):
    """What a run leaves: the tensors of its checkpoints, its scores, the losses and scores in its log."""
    found = {
        name: torch.load(out / name, weights_only=True)
        for name in ("last.pt", "best.pt") if (out / name).exists()
    }
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [{key: line[key]
              for key in ("step", "loss", "rate", "top1", "miou") if key in line} for line in log]
    return ({
        name: {key: content[key]
               for key in ("model", "optimizer", "step", "best") if key in content}
        for name, content in found.items()
    }, json.loads((out / "metrics.json").read_text()), lines)


def same(a, b):
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(stage, processes) -> what a run leaves that nobody disturbs; made once."""
    made = {}

    def make(stage, processes=1):
        if (stage, processes) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            assert (Forked(folder, stage, *flags(stage, folder / "out"),
                           processes=processes).wait() == [0] * processes)
            made[stage, processes] = everything(folder / "out")
        return made[stage, processes]

    return make


# ------------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_instants_the_run_ends_with_the_same_bits(stage, undisturbed, tmp_path):
    wanted, rng, kills = undisturbed(stage), random.Random(stage), 0
    started = time.monotonic()
    run = Forked(tmp_path, stage, *flags(stage, tmp_path / "whole"))
    assert run.wait() == [0]
    duration = time.monotonic() - started
    while kills < 8:
        run = Forked(tmp_path, stage, *flags(stage, tmp_path / "out"))
        run.ranks[0].join(rng.uniform(0, 1.2 * duration))
        if run.ranks[0].is_alive():
            run.ranks[0].kill()
            assert run.wait() in ([-9], [0])
            kills += 1
        if (tmp_path / "out" / "metrics.json").exists():  # finished: once more from the start
            assert same(everything(tmp_path / "out"), wanted)
            shutil.rmtree(tmp_path / "out")
    assert Forked(tmp_path, stage, *flags(stage, tmp_path / "out")).wait() == [0]
    assert same(everything(tmp_path / "out"), wanted)


@pytest.mark.parametrize("patch", [("die_in_save", n) for n in (1, 2, 3)] + [("die_in_rename", n, after)
                                                                             for n in range(1, 11)
                                                                             for after in (False, True)],
                         ids=lambda patch: "-".join(map(str, patch)))
def test_killed_inside_a_save_the_run_ends_with_the_same_bits(patch, undisturbed, tmp_path):
    run = Forked(tmp_path, "finetune", *flags("finetune", tmp_path / "out"), patches=[patch])
    assert run.wait() == [-9], run.text()
    again = Forked(tmp_path, "finetune", *flags("finetune", tmp_path / "out"))
    assert again.wait() == [0], again.text()
    assert same(everything(tmp_path / "out"), undisturbed("finetune"))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_nothing_that_was_saved_is_done_again(tmp_path):
    run = Forked(tmp_path, "pretrain_decoder", *flags("pretrain_decoder", tmp_path / "out"),
                 patches=[("die_in_save", 3)])
    assert run.wait() == [-9]
    again = Forked(tmp_path, "pretrain_decoder", *flags("pretrain_decoder", tmp_path / "out"))
    assert again.wait() == [0] and "steps 4 to 6" in again.text()


@pytest.mark.parametrize("every, before", [("10min", [2, 4]), ("5min", [1, 2, 3, 4]), ("1000min", []),
                                           ("3", [3])])
def test_checkpoints_come_every_so_many_minutes_or_steps(every, before, script, few_shapes, tmp_path,
                                                         monkeypatch):
    clock, saved = type("Clock", (), {"now": 0}), []
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock.now)
    step, save = torch.optim.Adam.step, run_folder.save

    def slow(self, *args, **kwargs):  # five minutes a step
        clock.now += 300
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", slow)
    monkeypatch.setattr(
        run_folder, "save",
        lambda path, content, keep=None: saved.append(content["step"]) or save(path, content, keep))
    assert (script("pretrain_decoder", *TINY["pretrain_decoder"], "--steps", 5, "--encoder-weights", "random",
                   "--save-every", every, "--out", tmp_path)[0] == 0)
    assert saved == [*before, 5]


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:5000] + b"\xff" + path.read_bytes()[5001:]),
    lambda path: path.unlink()
])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(spoil, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert Forked(tmp_path, "finetune", *flags("finetune", out)).wait() == [0]
    assert torch.load(out / "previous.pt", weights_only=True)["step"] == 4
    spoil(out / "last.pt")
    (out / "metrics.json").unlink()
    there = (out / "last.pt").exists()
    run = Forked(tmp_path, "finetune", *flags("finetune", out))
    assert run.wait() == [0] and "steps 4 to 6" in run.text()
    assert (("last.pt: cannot be read as weights (" in run.text()
             and "continuing from previous.pt, step 4" in run.text()) == there ==
            (out / "last.pt.damaged").exists())
    assert same(everything(out), undisturbed("finetune"))


def test_two_damaged_checkpoints_are_refused(tmp_path):
    out = tmp_path / "out"
    assert Forked(tmp_path, "finetune", *flags("finetune", out)).wait() == [0]
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"PK")
    run = Forked(tmp_path, "finetune", *flags("finetune", out))
    assert (run.wait() == [2] and "last.pt: cannot be read as weights (" in run.text()
            and f"Remove {out} to start anew" in run.text())


def test_a_checkpoint_that_cannot_be_continued_is_refused(script, few_shapes, tmp_path):
    out = tmp_path / "out"
    assert script("finetune", *flags("finetune", out))[0] == 0
    (out / "metrics.json").unlink()
    (out / "previous.pt").unlink()
    shutil.copy(out / "best.pt", out / "last.pt")
    status, _, err = script("finetune", *flags("finetune", out))
    assert status == 2 and "last.pt: cannot be continued from" in err and err.count("\n") == 1


def test_a_folder_in_the_place_of_the_log_is_named(script, few_shapes, tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    status, _, err = script("pretrain_encoder", *flags("pretrain_encoder", tmp_path))
    assert status == 2 and "log.jsonl" in err and err.count("\n") == 1 and "Traceback" not in err


def test_an_altered_byte_is_noticed_or_changes_nothing(tmp_path):
    content = {
        "model": {f"layer {i}": torch.randn(20, 30)
                  for i in range(5)}, "model_args": {}, "step": 3, "args": {"lr": 0.1}
    }
    run_folder.save(tmp_path / "a.pt", content)
    whole, rng, noticed = (tmp_path / "a.pt").read_bytes(), random.Random(0), 0
    assert same(run_folder.load_checkpoint(tmp_path / "a.pt"), content)
    for _ in range(300):
        at = rng.randrange(len(whole))
        (tmp_path / "b.pt").write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) +
                                        whole[at + 1:])
        try:
            assert same(run_folder.load_checkpoint(tmp_path / "b.pt"), content)
        except model.WeightsError:
            noticed += 1
    assert noticed > 200


@pytest.mark.parametrize("stage, flag", [("finetune", "--init"), ("pretrain_decoder", "--encoder-weights")])
def test_altered_weights_are_refused_as_a_start_too(stage, flag, script, few_shapes, tmp_path):
    assert script("pretrain_encoder", *TINY["pretrain_encoder"], "--out", tmp_path)[0] == 0
    whole = bytearray((tmp_path / "last.pt").read_bytes())
    tensor = torch.load(tmp_path / "last.pt", weights_only=True)["model"]["encoder.transformer.0.qkv.weight"]
    at = whole.index(tensor.numpy().tobytes())
    whole[at] ^= 1
    (tmp_path / "last.pt").write_bytes(whole)
    status, _, err = script(stage, *TINY[stage], flag, tmp_path / "last.pt", "--out", tmp_path / "o")
    assert status == 2 and "does not match its checksum" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ signals


def test_a_signal_to_stage_2_stops_the_stage_1_that_it_started(tmp_path):
    """The first command of README, stopped while it trains the missing encoder: nobody is left behind, and the encoder is saved."""
    copy_program(tmp_path)
    log = tmp_path / "runs/shapes/pretrain_encoder/log.jsonl"
    run = subprocess.Popen([sys.executable, "pretrain_decoder.py", "--gamma", "0.95"], cwd=tmp_path,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (log.exists() and log.read_text().count("\n")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate()
    assert (run.returncode == launch.STOPPED and "stopped by SIGTERM" in err
            and "saved at step" in err)
    assert torch.load(log.parent / "last.pt", weights_only=True)["step"] >= 10
    run_folder.lock_folder(str(log.parent)).close()  # nobody holds it any more


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_can_continue(stage, name, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Forked(tmp_path, stage, *flags(stage, out), patches=[("step_slowly", )])
    run.until(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 1)
    os.kill(run.ranks[0].pid, getattr(signal, name))
    assert run.wait() == [launch.STOPPED], run.text()
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert (f"stopped by {name}: saved at step {step} in {out}; the same command continues" in run.text()
            and 1 <= step < 6)
    again = Forked(tmp_path, stage, *flags(stage, out))
    assert again.wait() == [0] and f"steps {step} to 6" in again.text()
    assert same(everything(out), undisturbed(stage))


@pytest.mark.parametrize("stage", ["pretrain_encoder", "finetune"])
def test_a_signal_to_one_process_stops_all_even_in_a_validation(stage, undisturbed, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "validating"
    run = Forked(tmp_path, stage, *flags(stage, out), processes=2, patches=[("validate_slowly", str(marker))])
    run.until(lambda:
              (out / "last.pt").exists() and torch.load(out / "last.pt", weights_only=True)["step"] == 3)
    marker.unlink(missing_ok=True)
    run.until(marker.exists)
    os.kill(run.ranks[1].pid, signal.SIGTERM)
    assert run.wait() == [launch.STOPPED] * 2, run.text()
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3 and not {"miou", "top1"} & set(
        (out / "log.jsonl").read_text().split('"'))
    assert Forked(tmp_path, stage, *flags(stage, out), processes=2).wait() == [0, 0]
    assert same(everything(out), undisturbed(stage, 2))


def driver(tmp_path, stage, body=""):
    """A script for torchrun: the stage on a dozen shapes, after `body`."""
    path = tmp_path / "driver.py"
    path.write_text(
        f"import os, signal, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import conftest, datasets, launch, torch, {stage}\n{body}\n"
        f"datasets.SHAPES_COUNTS = {{part: 12 for part in datasets.SHAPES_COUNTS}}\nlaunch.run_script({stage}.main)\n"
    )
    return path


def torchrun_command(path, *more):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more,
        str(path)
    ]


def test_torchrun_passes_sigterm_on_and_loader_workers_do_not_die_first(undisturbed, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    path = driver(tmp_path, "pretrain_decoder", "conftest.step_slowly()")
    with open(text, "w") as file:
        run = subprocess.Popen(
            [*torchrun_command(path), *map(str, flags("pretrain_decoder", out, "--workers", 2))], stdout=file,
            stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n")):
            assert run.poll() is None, text.read_text()
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        run.wait()
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert (f"stopped by SIGTERM: saved at step {step}" in text.read_text()
            and "DataLoader worker" not in text.read_text() and step < 6)
    assert Forked(tmp_path, "pretrain_decoder", *flags("pretrain_decoder", out), processes=2).wait() == [0, 0]
    assert same(everything(out), undisturbed("pretrain_decoder", 2))


def test_processes_whose_torchrun_was_killed_stop_and_the_command_continues(undisturbed, tmp_path):
    out = tmp_path / "out"
    with open(tmp_path / "text.txt", "w") as file:
        run = subprocess.Popen([*torchrun_command(driver(tmp_path, "finetune", "conftest.step_slowly()")),
                                *map(str, flags("finetune", out))], stdout=file, stderr=file,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n")):
            assert run.poll() is None, (tmp_path / "text.txt").read_text()
            time.sleep(0.05)
        run.kill()
        run.wait()
    for _ in range(600):  # until nobody holds the folder
        try:
            run_folder.lock_folder(str(out)).close()
            break
        except launch.InputError:
            time.sleep(0.1)
    step = load(out / "last.pt")["step"]
    assert step < 6 and f"stopped by the end of torchrun: saved at step {step}" in (tmp_path / "text.txt").read_text()
    assert Forked(tmp_path, "finetune", *flags("finetune", out), processes=2).wait() == [0, 0]
    assert same(everything(out), undisturbed("finetune", 2))


def test_processes_that_wait_for_a_group_end_with_their_torchrun(tmp_path):
    """A process of a group whose other one never comes; its parent stands in for torchrun."""
    waiting = tmp_path / "waiting.py"
    waiting.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport launch\n"
                       f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                       "os.environ.update(TORCHELASTIC_RUN_ID='1', WORLD_SIZE='2', RANK='1', MASTER_ADDR='127.0.0.1',"
                       " MASTER_PORT='1')\nlaunch.start_processes('cpu')\n")
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, "
                               f"{str(waiting)!r}])"])
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    time.sleep(1)
    os.kill(pid, 0)  # it waits
    parent.kill()
    parent.wait()
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it still waits")


def test_torchrun_restarts_the_group_when_a_process_is_killed(undisturbed, tmp_path):
    body = f"""
step, calls = torch.optim.Adam.step, []
def dying(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == 4 and os.environ["RANK"] == "1" and not os.path.exists({str(tmp_path / "died")!r}):
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
torch.optim.Adam.step = dying"""
    done = subprocess.run([
        *torchrun_command(driver(tmp_path, "finetune", body), "--max-restarts=1"),
        *map(str, flags("finetune", tmp_path / "out"))
    ], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "died").exists() and "steps 0 to 6" in done.stdout
            and re.search("steps [34] to 6", done.stdout))
    assert same(everything(tmp_path / "out"), undisturbed("finetune", 2))


# ------------------------------------------------------------------------------------------------ processes


def losses_of_splits(tmp_path, stage, splits, *more):
    """{(processes, micro-batch): the losses of two steps of 8 images}."""
    size = "--crop-size" if stage == "finetune" else "--image-size"
    base = [*tiny(stage, *more), "--steps", 2, "--batch-size", 8, size, 32, "--lr", 1e-4]
    found = {}
    for processes, micro_batch in splits:
        out = tmp_path / f"{processes}_{micro_batch}"
        run = Forked(tmp_path, stage, *base, "--micro-batch", micro_batch, "--out", out, processes=processes)
        assert run.wait() == [0] * processes, run.text()
        found[processes, micro_batch] = losses(out)
        assert not any("module." in name or "_orig_mod" in name for name in load(out / "last.pt")["model"])
    return found


@pytest.mark.parametrize("encoder", [["hybrid-small"], ["resnet50", "--batch-norm", "stored"]])
@pytest.mark.parametrize("stage, more", [("pretrain_encoder", []), ("pretrain_decoder", []),
                                         ("pretrain_decoder", ["--method", "dep"]), ("finetune", [])])
def test_1_2_and_4_processes_with_and_without_accumulation_are_one_run(stage, more, encoder, tmp_path):
    splits = [(1, 8), (1, 3), (2, 4), (4, 1)]
    if "resnet50" in encoder:  # which takes long to start: processes and accumulation at once
        splits = [(1, 8), (2, 3)]
    found = losses_of_splits(tmp_path, stage, splits, *more, "--encoder", *encoder)
    for key, values in found.items():
        assert len(values) == 2 and values == pytest.approx(found[1, 8], rel=1e-5), key


def test_class_weights_are_those_of_the_global_batch(tmp_path):
    found = losses_of_splits(tmp_path, "finetune", ((1, 8), (2, 3)), "--class-weights", "balanced")
    assert len(found[1, 8]) == 2 and found[2, 3] == pytest.approx(found[1, 8], rel=1e-5)


@pytest.mark.parametrize("stage, more", [("pretrain_encoder", []), ("pretrain_decoder", ["--method", "dep"]),
                                         ("finetune", [])])
def test_batch_statistics_are_those_of_all_processes(stage, more, tmp_path):
    splits = [(1, 8), (2, 4), *([(4, 2)] if stage == "finetune" else [])]
    found = losses_of_splits(tmp_path, stage, splits, *more, "--encoder", "resnet50", "--batch-norm", "batch")
    for key, values in found.items():
        assert len(values) == 2 and values == pytest.approx(found[1, 8], rel=1e-5), key
    states = [load(tmp_path / f"{processes}_{micro}" / "last.pt")["model"] for processes, micro in splits]
    for name in ("encoder.bn1.running_mean", "encoder.bn1.running_var", "encoder.layer4.2.bn2.running_var"):
        assert not torch.equal(states[0][name], torch.zeros(()).expand_as(states[0][name]))
        for state in states[1:]:
            torch.testing.assert_close(state[name], states[0][name], rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(undisturbed, tmp_path):
    out = tmp_path / "out"
    assert Forked(tmp_path, "finetune", *flags("finetune", out), patches=[("die_in_save", 4)]).wait() == [-9]
    run = Forked(tmp_path, "finetune", *flags("finetune", out), processes=2)
    assert run.wait() == [0, 0] and "begun on 1 processes, continued on 2: the same samples" in run.text()
    (_, _, ours), (_, _, wanted) = everything(out), undisturbed("finetune")
    ours, wanted = ([line["loss"] for line in lines if "loss" in line] for lines in (ours, wanted))
    assert len(ours) == 6 and ours == pytest.approx(wanted, rel=1e-5)


def test_a_mask_or_image_that_was_replaced_is_refused_and_a_copy_is_not(script, folder, tmp_path):
    """Even where the size stays: an inverted mask, and a changed pixel of an array."""
    np.save(folder / "images" / "train" / "z.npy", np.zeros((41, 57, 3), np.uint8))
    shutil.copy(folder / "masks" / "train" / "a.png", folder / "masks" / "train" / "z.png")
    base = ["--data", "folder", "--encoder", "hybrid-small", "--width", 1 / 32, "--crop-size", 32, "--steps", 2, "--batch-size",
            2, "--workers", 0, "--out", tmp_path / "out"]
    assert script("finetune", *base, "--root", folder)[0] == 0
    shutil.copytree(folder, tmp_path / "copy")  # other times, the same bytes
    assert "finished" in script("finetune", *base, "--root", tmp_path / "copy")[1]
    mask = folder / "masks" / "train" / "a.png"
    whole = mask.read_bytes()
    Image.fromarray((2 - np.minimum(np.asarray(Image.open(mask)), 2)).astype(np.uint8)).save(mask)
    status, _, err = script("finetune", *base, "--root", folder)
    assert status == 2 and "other flags or data" in err and "data-bytes" in err
    mask.write_bytes(whole)
    assert "finished" in script("finetune", *base, "--root", folder)[1]
    values = np.load(folder / "images" / "train" / "z.npy")
    values[-1, -1] = 9
    np.save(folder / "images" / "train" / "z.npy", values)
    status, _, err = script("finetune", *base, "--root", folder)
    assert status == 2 and "data-bytes" in err


def test_a_picture_of_another_size_is_refused_in_pretraining(script, tmp_path):
    for i in range(4):
        write_image(tmp_path / "photos" / f"{i}.png", 40, 40, seed=i)
    base = ["--data", "folder", "--root", tmp_path / "photos", "--encoder", "hybrid-small", *TINY["pretrain_decoder"],
            "--encoder-weights", "random", "--workers", 0, "--out", tmp_path / "out"]
    assert script("pretrain_decoder", *base)[0] == 0
    write_image(tmp_path / "photos" / "2.png", 60, 40)
    status, _, err = script("pretrain_decoder", *base)
    assert status == 2 and "data-bytes" in err


def test_other_data_is_refused(script, tmp_path):
    for i in range(4):
        write_image(tmp_path / "photos" / f"{i}.png", 40, 40, seed=i)
    base = [
        "--data", "folder", "--root", tmp_path / "photos", "--encoder", "hybrid-small",
        *TINY["pretrain_decoder"], "--encoder-weights", "random", "--workers", 0, "--out", tmp_path / "out"
    ]
    assert script("pretrain_decoder", *base)[0] == 0
    shutil.move(tmp_path / "photos", tmp_path / "moved")  # the same images elsewhere are the same data
    moved = [tmp_path / "moved" if flag == tmp_path / "photos" else flag for flag in base]
    assert "finished" in script("pretrain_decoder", *moved)[1]
    write_image(tmp_path / "moved" / "another.png", 40, 40)
    status, _, err = script("pretrain_decoder", *moved)
    rows = err.splitlines()
    row = next(row for row in rows if row.split()[0] == "data-content")
    assert status == 2 and "other flags or data" in rows[0] and "4 images" in row and "5 images" in row


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    first = Forked(tmp_path, "finetune", *flags("finetune", out), patches=[("step_slowly", )])
    first.until(lambda: (out / "log.jsonl").exists())
    second = Forked(tmp_path, "finetune", *flags("finetune", out))
    assert (second.wait() == [2]
            and f"another run is writing there (process {first.ranks[0].pid} on " in second.text())
    third = Forked(tmp_path, "finetune", *flags("finetune", out), processes=2)
    assert third.wait() == [2, 2] and "another run is writing there" in third.text()
    assert "Traceback" not in third.text()
    assert first.wait() == [0]


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    with pytest.raises(run_folder.InputError, match="no file can be locked there .No locks available.; pass an --out"):
        run_folder.lock_folder(tmp_path)


@pytest.mark.parametrize("stage, flag", [("finetune", "--init"), ("pretrain_decoder", "--encoder-weights"),
                                         ("pretrain_decoder", "--init")])
def test_weights_are_told_by_their_content_and_a_run_has_its_own(stage, flag, script, few_shapes, tmp_path):
    maker = "pretrain_encoder" if flag == "--encoder-weights" else "pretrain_decoder"
    for name, seed in (("a", 0), ("b", 1)):
        assert script(maker, *tiny(maker), "--seed", seed, "--out", tmp_path / name)[0] == 0
    shutil.copy(tmp_path / "a" / "last.pt", tmp_path / "copy.pt")
    network = {"pretrain_decoder": ["--encoder", "hybrid-small"], "finetune": []}[stage]

    def run(weights):
        return script(stage, *TINY[stage], *network, flag, tmp_path / weights, "--save-every", 1, "--out", tmp_path / "out")

    assert run("a/last.pt")[0] == 0
    finished = everything(tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()  # as if killed before it was finished
    (tmp_path / "out" / "previous.pt").replace(tmp_path / "out" / "last.pt")
    status, _, err = run("b/last.pt")
    assert status == 2 and "weights-bytes" in err and flag in err
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "kept.pt").write_bytes((tmp_path / "out" / "last.pt").read_bytes())
    assert run("copy.pt")[0] == 0 and same(finished, everything(tmp_path / "out"))
    (tmp_path / "out" / "metrics.json").unlink()
    (tmp_path / "kept.pt").replace(tmp_path / "out" / "last.pt")
    status, out, err = run("a/last.pt")
    assert status == 0 and "a/last.pt is gone; the run in" in out, err
    assert same(finished, everything(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    assert run("a/last.pt")[0] == 2


# ------------------------------------------------------------------------------------------------ disks


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Forked(tmp_path, "pretrain_decoder", *flags("pretrain_decoder", out), patches=[("fill_disk", 1)])
    assert run.wait() == [2], run.text()
    assert ("last.pt cannot be read or written (File too large); what was saved before is intact" in run.text()
            and "Traceback" not in run.text())
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2 and not list(out.glob("*.tmp"))
    assert Forked(tmp_path, "pretrain_decoder", *flags("pretrain_decoder", out)).wait() == [0]
    assert same(everything(out), undisturbed("pretrain_decoder"))


@pytest.mark.parametrize("number, text", [(errno.ENOSPC, "No space left on device"),
                                          (errno.EROFS, "Read-only file system"),
                                          (errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("where", ["last.pt", "log.jsonl", "metrics.json"])
def test_a_disk_that_cannot_be_written_is_said_in_one_line(number, text, where, script, few_shapes, tmp_path,
                                                           monkeypatch):

    def failing(path, mode="r", *args, **kwargs):
        if where in str(path) and ("w" in mode or "a" in mode):
            raise OSError(number, text, str(path))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(run_folder, "open", failing, raising=False)
    status, _, err = script("finetune", *flags("finetune", tmp_path))
    assert status == 2 and where in err and f"cannot be read or written ({text})" in err and err.count("\n") == 1
    monkeypatch.undo()
    assert not (tmp_path / "metrics.json").exists()


def test_a_disk_that_fills_up_under_the_log_is_said_with_its_name(script, few_shapes, tmp_path, monkeypatch):

    class Full(io.StringIO):
        name = str(tmp_path / "log.jsonl")

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it: without the name

    monkeypatch.setattr(
        run_folder, "open", lambda path, mode="r", *rest, **how: Full()
        if mode == "a" else open(path, mode, *rest, **how), raising=False)
    status, _, err = script("pretrain_decoder", *flags("pretrain_decoder", tmp_path))
    assert (status == 2 and "log.jsonl cannot be read or written (No space left on device)" in err
            and err.count("\n") == 1)


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_the_run_and_lists_the_batch(stage, script, few_shapes, tmp_path,
                                                                         monkeypatch):
    calls = []

    def spoil(loss):

        def spoiled(prediction, *args, **kwargs):
            calls.append(0)  # a finite loss whose gradient is inf * 0
            return loss(prediction, *args, **kwargs) + (
                (prediction.sum() * 0).sqrt() if len(calls) == 3 else 0)

        return spoiled

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoil(torch.nn.functional.cross_entropy))
    monkeypatch.setattr(torch.nn.functional, "mse_loss", spoil(torch.nn.functional.mse_loss))
    status, _, err = script(stage, *flags(stage, tmp_path, "--micro-batch", 4))
    assert status == 2 and "its gradient's norm is nan at step 3" in err and err.count("\n") == 1
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["model"].values())
    names = (tmp_path / "not_finite_step_3.txt").read_text().split()
    source = {
        "pretrain_encoder": datasets.classification_images("shapes", None)[0],
        "pretrain_decoder": datasets.pretraining_images("shapes", None),
        "finetune": datasets.segmentation_pairs("shapes", None, "train")[0]
    }[stage]
    if stage == "finetune":
        source = source.subset(datasets.label_subset([source.name(i) for i in range(12)], 6, 0))
    batch = list(data.Batches(len(source), 4, 6))[2]
    assert names == [source.name(i) for _, i in batch]


class Scaler:
    """A stand-in for CUDA's GradScaler: scales by 1024, halves the scale when a step is skipped."""
    scale_now = 1024.0

    def __init__(self, *args, **kwargs):
        pass

    def is_enabled(self):
        return True

    def get_scale(self):
        return Scaler.scale_now

    def scale(self, loss):
        return loss * Scaler.scale_now

    def unscale_(self, optimizer):
        self.gradients = [p.grad.div_(Scaler.scale_now) for p in optimizer.param_groups[0]["params"]]

    def step(self, optimizer):
        self.skipped = not all(gradient.isfinite().all() for gradient in self.gradients)
        if not self.skipped:
            optimizer.step()

    def update(self):
        Scaler.scale_now *= 0.5 if self.skipped else 1

    def state_dict(self):
        return {"scale": Scaler.scale_now}


def test_fp16_skips_a_step_that_overflows_and_stops_when_no_scale_will_help(script, few_shapes, tmp_path,
                                                                            monkeypatch):
    loss, calls = torch.nn.functional.mse_loss, []

    def overflowing(*args, **kwargs):
        calls.append(0)
        return loss(*args, **kwargs) * (float("inf") if len(calls) in spoiled else 1)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", overflowing)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    run = [*tiny("pretrain_decoder"), "--save-every", 1]
    spoiled = {2}
    assert script("pretrain_decoder", *run, "--steps", 2, "--out", tmp_path / "skips")[0] == 0
    before, after = (load(tmp_path / "skips" / name)["model"] for name in ("previous.pt", "last.pt"))
    assert same_tensors(before, after) and Scaler.scale_now == 512  # the second step was made without effect
    Scaler.scale_now, spoiled = 1024.0, set()
    calls.clear()
    assert script("pretrain_decoder", *run, "--steps", 2, "--out", tmp_path / "moves")[0] == 0
    before, after = (load(tmp_path / "moves" / name)["model"] for name in ("previous.pt", "last.pt"))
    assert not same_tensors(before, after)
    Scaler.scale_now, spoiled = 1e-7, {2}
    calls.clear()
    status, _, err = script("pretrain_decoder", *run, "--out", tmp_path / "stops")
    assert status == 2 and "the loss is inf" in err and "at step 2: stopped" in err


# ------------------------------------------------------------------------------------------------ bad pictures


def png_with_header(width, height, rows=b""):

    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content +
                struct.pack(">I", zlib.crc32(kind + content)))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) +
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def bad_pictures(folder):
    """Ten kinds, by name; those in UNREADABLE do not decode, the others are only unusual."""
    colours = np.random.RandomState(9).randint(0, 256, (24, 36, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    picture.save(folder / "00100_truncated.jpg")
    (folder / "00100_truncated.jpg").write_bytes((folder / "00100_truncated.jpg").read_bytes()[:400])
    (folder / "00300_zero_bytes.png").write_bytes(b"")
    (folder / "00301_text.jpg").write_text("<html>404</html>")  # next to the other: two replacements in a row
    (folder / "00700_huge_header.png").write_bytes(png_with_header(60_000, 60_000))
    (folder / "00900_bomb.png").write_bytes(png_with_header(20_000, 20_000, bytes(2501 * 20_000)))
    picture.save(folder / "01100_animated.webp", save_all=True,
                 append_images=[Image.fromarray(255 - colours)], duration=100, lossless=True)
    Image.fromarray(colours[:1, :1]).save(folder / "01200_one_pixel.png")
    picture.convert("CMYK").save(folder / "01300_cmyk.jpg")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(folder / "01400_16_bit.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    picture.save(folder / "01500_rotated.jpg", exif=exif)


UNREADABLE = {
    "00100_truncated.jpg": "truncated", "00300_zero_bytes.png": "cannot identify image file",
    "00301_text.jpg": "cannot identify image file", "00700_huge_header.png": "over 179 megapixels",
    "00900_bomb.png": "over 179 megapixels"
}


def test_what_is_said_of_each_bad_picture(tmp_path):
    bad_pictures(tmp_path)
    source = datasets.pretraining_images("folder", str(tmp_path))
    said = {}
    for i in range(len(source)):
        try:
            image = source.read(i)["image"]
            assert image.dtype in (torch.uint8, torch.uint16) and image.shape[0] == 3
        except data.UnreadableImage as error:
            said[source.name(i)] = str(error)
    assert said.keys() == UNREADABLE.keys() and len(source) == 10
    for name, reason in UNREADABLE.items():
        assert (said[name].startswith(f"{tmp_path / name}: not a readable image (") and reason in said[name]
                and "\n" not in said[name])


def test_pretraining_runs_through_damaged_files_as_if_they_were_their_neighbours(script, tmp_path):
    photos, clean = tmp_path / "photos", tmp_path / "clean"
    photos.mkdir()
    rng = np.random.RandomState(0)
    for i in range(1990):
        Image.fromarray(rng.randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(photos / f"{i:05}.png")
    bad_pictures(photos)
    base = [
        "--data", "folder", "--encoder", "hybrid-small", "--width", 1 / 32, "--image-size", 16,
        "--batch-size", 100, "--micro-batch", 100, "--epochs", 2, "--log-every", 1, "--encoder-weights",
        "random", "--workers", 0
    ]
    status, out, err = script("pretrain_decoder", *base, "--root", photos, "--out", tmp_path / "a")
    assert status == 0, err
    for name in UNREADABLE:
        assert out.count(f"{name}: not a readable image") == 1, name  # once, though each came up twice
    assert out.count("skipped") == len(UNREADABLE)
    shutil.copytree(photos, clean)
    names = sorted(os.listdir(photos))
    for name in UNREADABLE:
        neighbour = next(other for other in names[names.index(name) + 1:] if other not in UNREADABLE)
        (clean / name).write_bytes((photos / neighbour).read_bytes())
    status, out, err = script("pretrain_decoder", *base, "--root", clean, "--out", tmp_path / "b")
    assert status == 0 and "skipped" not in out, err
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in "ab")
    assert same(a["model"], b["model"]) and a["step"] == 40


# ----- every stage


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    run_folder.save(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(Exception):
        run_folder.save(tmp_path / "last.pt", {"step": lambda: None})  # cannot be pickled
    assert load(tmp_path / "last.pt") == {"step": 1}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_what_it_promises_and_says_when_it_is_finished(stage, script, few_shapes, tmp_path):
    status, out, err = script(stage, *tiny(stage), "--out", tmp_path)
    assert status == 0, err
    checkpoint = load(tmp_path / "last.pt")  # weights_only: tensors and plain containers
    builder = model.build_classifier if stage == "pretrain_encoder" else model.build_unet
    builder(**checkpoint["model_args"]).load_state_dict(checkpoint["model"])
    assert (json.loads((tmp_path / "args.json").read_text())["steps"] == 4
            and (tmp_path / "metrics.json").exists())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all({"loss", "rate", "images_per_second", "waiting"} <= set(line) for line in lines
               if "loss" in line)
    pictures = {
        "pretrain_encoder": [], "pretrain_decoder": ["panel_start.png", "panel_end.png", "uses.png"],
        "finetune": ["predictions.png"]
    }
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures[stage])
    assert (tmp_path / "best.pt").exists() == (stage != "pretrain_decoder")

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, _ = script(stage, *tiny(stage), "--out", tmp_path)
    assert status == 0 and "finished at step 4" in out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    (tmp_path / "metrics.json").unlink()  # killed after the last checkpoint and before the last word
    assert script(stage, *tiny(stage), "--out", tmp_path)[0] == 0
    assert (tmp_path / "metrics.json").read_bytes() == before[tmp_path / "metrics.json"]
    assert (tmp_path / "last.pt").read_bytes() == before[tmp_path / "last.pt"]


@pytest.mark.parametrize("stage", STAGES)
def test_other_flags_than_those_of_the_run_are_refused(stage, script, few_shapes, tmp_path):
    assert script(stage, *tiny(stage), "--out", tmp_path)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, _, err = script(stage, *tiny(stage), "--lr", 0.5, "--seed", 3, "--out", tmp_path)
    assert status == 2 and "with other flags or data; pass a new --out" in err
    rows = [line.split() for line in err.splitlines()[1:]]
    assert (rows[0] == ["then", "now"] and rows[2] == ["--seed", "0", "3"]
            and (rows[1][0], rows[1][2]) == ("--lr", "0.5") and len(rows) == 3)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert (script(stage, *tiny(stage), "--save-every", 1, "--workers", 1, "--out",
                   tmp_path)[0] == 0)  # these change nothing


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        stage, script, few_shapes, tmp_path, monkeypatch):
    calls = []

    def spoil(loss):

        def spoiled(*args, **kwargs):
            calls.append(0)
            return loss(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

        return spoiled

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoil(torch.nn.functional.cross_entropy))
    monkeypatch.setattr(torch.nn.functional, "mse_loss", spoil(torch.nn.functional.mse_loss))
    status, _, err = script(stage, *tiny(stage), "--save-every", 1, "--out", tmp_path)
    assert status == 2 and "the loss is nan and its gradient's norm is nan at step 3" in err and err.count("\n") == 1
    checkpoint = load(tmp_path / "last.pt")
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_the_result(stage, script, few_shapes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert script(stage, *tiny(stage), "--seed", seed, "--steps", 2, "--out", tmp_path / name)[0] == 0
    a, b, c = (load(tmp_path / name / "last.pt")["model"] for name in "abc")
    assert same_tensors(a, b) and not same_tensors(a, c)


def test_more_than_one_unreadable_image_in_a_hundred_stops_the_run(script, tmp_path):
    for i in range(150):
        write_image(tmp_path / "photos" / f"{i:03}.png", 32, 32, seed=i)
    (tmp_path / "photos" / "007.png").write_text("broken")
    base = [
        "--data", "folder", "--root", tmp_path / "photos", "--encoder", "hybrid-small", "--width", 1 / 32,
        "--image-size", 32, "--steps", 40, "--batch-size", 8, "--encoder-weights", "random", "--workers", 0
    ]
    status, out, err = script("pretrain_decoder", *base, "--out", tmp_path / "a")
    assert status == 0 and out.count("007.png: not a readable image") == 1 and "1 of 150" in out, err
    (tmp_path / "photos" / "100.png").write_text("broken")
    status, out, err = script("pretrain_decoder", *base, "--out", tmp_path / "b")
    assert (status == 2 and "2 of 150 images are unreadable, more than 1 %" in err and "100.png" in out
            and err.count("\n") == 1)


# ------------------------------------------------------------------------------------------------ odd folders and content


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["last.pt", "log.jsonl", "metrics.json", "photo.JPG"])
def test_a_folder_with_files_that_no_run_wrote_is_refused(stage, name, script, few_shapes, tmp_path):
    (tmp_path / name).write_text("a user's file")
    status, _, err = script(stage, *flags(stage, tmp_path))
    assert status == 2 and f"{tmp_path}: holds {name} but no args.json" in err and "pass another --out" in err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "a user's file"


def test_a_run_does_not_hide_the_pictures_it_learns_from(script, tmp_path):
    for i in range(4):
        write_image(tmp_path / "photos" / "more" / f"{i}.png", seed=i)
    command = ["pretrain_decoder", *tiny("pretrain_decoder"), "--data", "folder", "--root", tmp_path / "photos", "--encoder",
               "hybrid-small", "--workers", 0, "--out"]
    for place in (tmp_path / "photos", tmp_path):
        status, _, err = script(*command, place)
        assert status == 2 and f"{place}: holds the data" in err and not (place / "args.json").exists(), err
    for place in (tmp_path / "photos" / "run", tmp_path / "elsewhere"):
        place.mkdir()
        (place / "notes.txt").write_text("unrelated")
        status, _, err = script(*command, place)
        assert status == 0, err


def test_a_finished_run_without_its_checkpoints_is_not_begun_anew(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune", tmp_path))[0] == 0
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    status, _, err = script("finetune", *flags("finetune", tmp_path))
    assert status == 2 and "holds metrics.json or best.pt, but last.pt is gone" in err


def test_weights_that_are_not_finite_are_not_saved(script, few_shapes, tmp_path, monkeypatch):
    step = torch.optim.Adam.step

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        spoil.calls += 1
        if spoil.calls == 6:  # the last one, whose loss no other step would tell
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    spoil.calls = 0
    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    status, _, err = script("finetune", *flags("finetune", tmp_path))
    assert status == 2 and "the weights are not finite after step 6: not saved" in err and err.count("\n") == 1
    assert load(tmp_path / "last.pt")["step"] == 4 and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("spoil", [
    lambda content: content.update(step="x"), lambda content: content.update(step=7), lambda content: content.update(step=-1),
    lambda content: content.update(best="x"), lambda content: content.update(loss=[]), lambda content: content.update(data=5),
    lambda content: content.update(unreadable=["x"]), lambda content: content.update(optimizer=[]),
    lambda content: content["optimizer"].update(state={0: {}}), lambda content: content["optimizer"].update(state=5),
    lambda content: content["optimizer"]["state"][0].update(exp_avg="x"),
    lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda content: content["optimizer"]["state"][0].pop("exp_avg_sq"),
    lambda content: content["model"].pop("decoder.head.bias"), lambda content: content["model"].update({5: torch.zeros(1)}),
    lambda content: content["args"].update({5: 5})])
def test_an_altered_checkpoint_is_not_continued_from(spoil, script, few_shapes, finetuned, tmp_path):
    shutil.copytree(finetuned, tmp_path, dirs_exist_ok=True)
    (tmp_path / "previous.pt").unlink()
    content = load(tmp_path / "last.pt")
    spoil(content)
    torch.save(content, tmp_path / "last.pt")
    status, _, err = script("finetune", *flags("finetune", tmp_path))
    table = "holds a run with other flags or data" in err
    assert status == 2 and str(tmp_path) in err and (table or err.count("\n") == 1), err


@pytest.mark.parametrize("spoil", [
    lambda content: content.update(model=[5]), lambda content: content.update(model_args=5),
    lambda content: content["model_args"].update(width="x"), lambda content: content["model_args"].update(bands=[]),
    lambda content: content["model"].update({5: torch.zeros(1)}),
    lambda content: content["model"].update({"encoder.pos_embedding": torch.zeros(())}),
    lambda content: content["model"].update({"decoder.head.bias": "x", "encoder.pos_embedding": 5})])
def test_altered_weights_are_not_begun_from(spoil, script, few_shapes, finetuned, tmp_path):
    content = load(finetuned / "last.pt")
    spoil(content)
    torch.save(content, tmp_path / "odd.pt")
    status, _, err = script("finetune", *flags("finetune", tmp_path / "o", "--init", tmp_path / "odd.pt"))
    assert status == 2 and "odd.pt: " in err and err.count("\n") == 1, err


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned")
    assert Forked(out, "finetune", *flags("finetune", out / "o")).wait() == [0]
    return out / "o"


def test_a_run_stands_in_for_the_weights_it_began_from_and_for_no_others(script, few_shapes, finetuned, tmp_path):
    shutil.copy(finetuned / "last.pt", tmp_path / "init.pt")
    command = ["finetune", *flags("finetune", tmp_path / "o"), "--init"]
    assert script(*command, tmp_path / "init.pt")[0] == 0
    (tmp_path / "o" / "metrics.json").unlink()
    (tmp_path / "init.pt").unlink()
    (tmp_path / "init.pt").mkdir()
    (tmp_path / "o" / "last.pt").write_bytes(b"PK")  # previous.pt serves
    status, _, err = script(*command, tmp_path / "int.pt")
    assert status == 2 and "int.pt: no such file" in err and err.count("\n") == 1
    status, out, err = script(*command, tmp_path / "init.pt")
    assert status == 0 and "init.pt is gone; the run in" in out and "steps 4 to 6" in out, err
