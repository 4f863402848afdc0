"""launch.py: rates and lengths by hand, and the one line that bad flags get."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flags, load, torchrun, write_image

import launch


def test_the_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [launch.cosine_rate(step, 110, 2.0, 10) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert (rates[60] == pytest.approx(1.0) and rates[35] == pytest.approx(1 + math.sqrt(0.5))
            and rates[110] == pytest.approx(0))
    assert launch.cosine_rate(0, 100, 3.0, 0) == 3.0


def test_epochs_replace_the_recipes_steps(script, few_shapes, tmp_path):
    base = ["--width", 1 / 32, "--image-size", 32, "--encoder-weights", "random"]
    assert script("pretrain_decoder", *base, "--batch-size", 5, "--epochs", 2, "--out", tmp_path)[0] == 0
    assert load(tmp_path / "last.pt")["step"] == 5  # 24 samples in batches of 5: the last one is filled up
    status, _, err = script("pretrain_decoder", *base, "--steps", 3, "--epochs", 2, "--out", tmp_path / "o")
    assert status == 2 and "not allowed with argument" in err


@pytest.mark.parametrize(
    "stage, more, message",
    [("pretrain_decoder", ["--data", "folder"], "which folder? pass --root DIR"),
     ("pretrain_decoder", ["--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
     ("pretrain_decoder", ["--data", "folder", "--root", "{empty}"
                           ], "no images in this folder, expected .jpg"),
     ("pretrain_decoder", ["--root", "{empty}"], "--root given, but --data shapes is drawn by code"),
     ("pretrain_decoder", ["--data", "folder", "--root", "{images}"
                           ], "DDeP pretrains the decoder of a trained encoder: pass --encoder-weights PATH"),
     ("pretrain_decoder", ["--encoder-weights", "nowhere.pt"], "nowhere.pt: no such file; expected weights"),
     ("pretrain_decoder", ["--gamma", "0.5", "--sigma", "1"
                           ], "--gamma, --gamma-range and --sigma all set the noise level"),
     ("pretrain_decoder", ["--gamma", "1.5"], "'1.5' is not a number from 0 to 1"),
     ("pretrain_decoder", ["--gamma-range", "0.9", "0.8"], "expected LOW <= HIGH"),
     ("pretrain_decoder", ["--noise", "simple", "--gamma", "0.9"
                           ], "--noise simple (Eq. 1) has no gamma; pass --sigma"),
     ("pretrain_decoder", ["--image-size", "50", "--encoder-weights", "random"
                           ], "expected a multiple of the encoder's stride 16"),
     ("pretrain_decoder", ["--steps", "0"], "'0' is not a whole number above 0"),
     ("pretrain_decoder", ["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs CUDA"),
     ("pretrain_decoder", ["--gama", "0.9"], "unrecognized arguments: --gama"),
     ("pretrain_encoder", ["--data", "folder", "--root", "{images}"], "class folders, expected two or more"),
     ("pretrain_decoder", ["--encoder-weights", "imagenet21k"
                           ], "imagenet21k are weights of --encoder hybrid, this is hybrid-small"),
     ("pretrain_decoder", [
         "--data", "folder", "--root", "{images}", "--coarse", "--encoder-weights", "random"
     ], "--coarse belongs to --data cityscapes"),
     ("pretrain_decoder", ["--save-every", "0min"], "'0' is not a number above 0"),
     ("finetune", ["--init", "imagenet1k", "--encoder", "hybrid"
                   ], "imagenet1k are weights of --encoder resnet50, this is hybrid"),
     ("finetune", ["--data", "ade20k", "--root", "{images}"
                   ], "no folder images/training in it; expected ADEChallengeData2016/"),
     ("finetune", ["--data", "imagenet21k", "--root", "{images}"], "invalid choice: 'imagenet21k'"),
     ("finetune", ["--init", "nowhere.pt"], "nowhere.pt: no such file"),
     ("finetune", ["--init", "{text}"], "cannot be read as weights"),
     ("finetune", ["--labels", "4", "--fraction", "0.5"], "not allowed with argument"),
     ("finetune", ["--fraction", "2"], "'2' is not a share of the images"),
     ("finetune", ["--labels", "100000"
                   ], "there are 512 labelled images, 100000 asked for; expected 1 to 512"),
     ("finetune", ["--data", "folder", "--root", "{images}", "--num-classes", "3"
                   ], "no folder images/train; expected"),
     ("finetune", ["--data", "folder", "--root", "{images}", "--num-classes", "300"
                   ], "--num-classes 300: expected 2 to 255"),
     ("finetune", ["--data", "folder", "--root", "{images}"], "how many classes? pass --num-classes"),
     ("finetune", ["--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
     ("finetune", ["--data", "folder"], "which folder? pass --root DIR")])
def test_bad_flags_end_in_one_line_and_status_2(stage, more, message, script, tmp_path):
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "images" / "one.png")
    (tmp_path / "text.pt").write_text("hello")
    places = {name: str(tmp_path / name)
              for name in ("empty", "images")} | {"text": str(tmp_path / "text.pt")}
    status, _, err = script(stage, *[flag.format(**places) for flag in more], "--out", tmp_path / "out")
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path):
    done = torchrun(2, "pretrain_decoder", "--batch-size", "5", "--encoder-weights", "random", "--out",
                    tmp_path)
    assert (done.returncode != 0
            and "--batch-size 5 does not divide over 2 processes; pass a multiple of 2" in done.stderr)


def test_an_output_folder_that_cannot_be_made_is_refused(script, few_shapes, tmp_path):
    (tmp_path / "file").write_text("a user's file")
    status, _, err = script("pretrain_decoder", *flags("pretrain_decoder"), "--out",
                            tmp_path / "file" / "out")
    assert status == 2 and "cannot be written" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a user's file"


@pytest.mark.parametrize("stage, more, message", [
    ("pretrain_decoder", ["--seed", 2**70], "is not a whole number of 63 bits"),
    ("finetune", ["--width", 0.001], "'0.001' is not a number from 1/64 to 64"),
    ("finetune", ["--width", 1e9], "is not a number from 1/64 to 64"),
    ("finetune", ["--init", "{here}"], "{here}: a folder; expected weights")])
def test_absurd_values_end_in_one_line(stage, more, message, script, few_shapes, tmp_path):
    more = [str(word).format(here=tmp_path) for word in more]
    status, _, err = script(stage, *flags(stage), *more, "--out", tmp_path / "o")
    assert status == 2 and message.format(here=tmp_path) in err and err.count("\n") == 1


def test_out_of_memory_is_one_line_with_what_was_asked_and_the_flags_that_help(script, few_shapes, tmp_path):
    status, _, err = script("finetune", *flags("finetune"), "--crop-size", 10**7, "--out", tmp_path / "o")
    assert status == 2 and "out of memory (" in err and "allocate" in err and err.count("\n") == 1
    assert err.rstrip().endswith("Lower --micro-batch or --crop-size or --width or --workers")
    status, _, err = script("pretrain_decoder", *flags("pretrain_decoder"), "--image-size", 16 * 10**6, "--out",
                            tmp_path / "o2")
    assert status == 2 and "out of memory (" in err and "--image-size" in err and err.count("\n") == 1


@pytest.mark.parametrize("environment", [{"RANK": "5"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "0"},
                                         {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost",
                                          "MASTER_PORT": "1"}])
def test_half_an_environment_of_a_group_is_refused(environment, script, few_shapes, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, _, err = script("pretrain_encoder", *flags("pretrain_encoder"), "--out", tmp_path / "o")
    assert status == 2 and "makes no process of a group; start it with torchrun" in err and err.count("\n") == 1


def test_a_terminal_that_is_not_utf8_ends_no_run(folder, tmp_path):
    """Class names and paths that ASCII lacks are printed escaped, and the scores are on disk."""
    (folder / "classes.txt").write_text("h\u00e9\nsea\nsand\n", encoding="utf-8")
    command = [sys.executable, ROOT / "finetune.py", "--data", "folder", "--root", folder, "--encoder", "hybrid-small",
               "--width", 1 / 32, "--crop-size", 32, "--steps", 1, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "o"]
    done = subprocess.run(list(map(str, command)), capture_output=True, env={
        **os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and b"h\\xe9" in done.stdout, done.stderr
    assert "h\u00e9" in json.loads((tmp_path / "o" / "metrics.json").read_text())["iou"]


def test_what_a_process_of_a_group_waits_for_is_said(monkeypatch, capsys):
    class Formed:  # after 20 s
        seconds = 0

        def wait(self, seconds):
            self.seconds += seconds
            return self.seconds > 20

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launch._watch(Formed(), "process 1 waits for there:1")
    assert capsys.readouterr().out == "process 1 waits for there:1\n"


@pytest.mark.parametrize("error, line", [
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Segmentation fault. \nMore"),
     "Segmentation fault. ; repeat with --workers 0"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), "out of memory (DataLoader worker (pid 5)"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "`ulimit -n 4096`"),
    (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:11677."), "another process of the group ended"),
    (RuntimeError("shape mismatch"), None)])
def test_errors_of_torch_that_a_user_can_mend_are_one_line(error, line):
    explained = launch.explain(error)
    assert explained is None if line is None else line in explained and "\n" not in explained


def test_default_workers_follow_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert launch.default_workers() == 3


@pytest.mark.parametrize("stage, more, message", [
    ("finetune", ["--init", ""], "--init is empty"), ("finetune", ["--root="], "--root is empty"),
    ("evaluate", ["--checkpoint", ""], "--checkpoint is empty"),
    ("finetune", ["--steps", 2**31], "is not a whole number above 0, of 31 bits"),
    ("finetune", ["--workers", "9" * 5000], "is not a whole number, 0 or more, of 31 bits"),
    ("finetune", ["--lr", "1e10"], "'1e10' is not a number above 0, at most 1e9"),
    ("finetune", ["--epochs", "1e9"], "--epochs 1e+09 are 3000000000 steps; expected fewer than 2 ** 31"),
    ("pretrain_decoder", ["--sigma", "2e6"], "'2e6' is not a number from 0 to 1e6"),
    ("datasets", ["--data", "folder", "--pixel-range", "5", "5"], "--pixel-range 5 5: expected two numbers, LOW < HIGH"),
    ("datasets", ["--data", "folder", "--pixel-range", "0", "1e-40"], "--pixel-range 0 1e-40: expected"),
    ("datasets", ["--data", "folder", "--pixel-range=-inf", "5"], ""),
    ("datasets", ["--data", "folder", "--pixel-range", "1000000000", "1000000001"], "which differ in float32"),
    ("reproduce", ["--repeats", "0"], "'0' is not a whole number above 0")])
def test_a_flag_without_a_sensible_value_is_refused(stage, more, message, script, few_shapes, tmp_path):
    status, _, err = script(stage, *more, *([] if stage == "datasets" else ["--out", tmp_path / "o"]))
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("environment", [{"RANK": "0", "LOCAL_RANK": "3"}, {"RANK": "7"}, {"LOCAL_WORLD_SIZE": "0"},
                                         {"LOCAL_WORLD_SIZE": "many"}, {"WORLD_SIZE": "9" * 5000}])
def test_an_odd_environment_silences_no_error(environment, script, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.default_workers() >= 1
    status, _, err = script("finetune", "--init", "nowhere.pt")
    assert status == 2 and err.count("\n") == 1 and ("nowhere.pt: no such file" in err or "makes no process" in err)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused(port, script, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    status, _, err = script("finetune")
    assert status == 2 and f"MASTER_PORT={port}, which makes no process of a group" in err and err.count("\n") == 1


@pytest.mark.parametrize("redirection, status, message", [(">&-", 0, ""), (">&- 2>&-", 0, ""), ("2>&-", 0, ""), (
    ">/dev/full", 2, "datasets.py: error: a file or the output cannot be read or written (No space left on device)")])
def test_a_closed_or_full_output_is_no_traceback(redirection, status, message):
    done = subprocess.run(f"{sys.executable} {ROOT / 'datasets.py'} --labels 2 {redirection}", shell=True, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") <= 2


def test_a_compiler_that_is_missing_is_one_line(script, few_shapes, tmp_path, monkeypatch):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", ("nowhere-g++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    status, _, err = script("pretrain_decoder", *flags("pretrain_decoder"), "--compile", "--out", tmp_path / "o")
    assert status == 2 and "--compile failed: " in err and "drop --compile" in err and err.count("\n") == 1, err
