"""Shared by the tests: scripts run in this process or in processes that can be killed, and data."""
import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks are tiny: threads would wait for each other
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for CUDA spoils no process that forks

import common  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
TINY = {  # flags that make a stage as small as it can be, on toy data
    "pretrain_encoder": ["--steps", "4", "--batch-size", "4", "--image-size", "32", "--device", "cpu"],
    "pretrain_decoder": ["--steps", "4", "--batch-size", "4", "--image-size", "32", "--width", "0.03125",
                         "--device", "cpu"],
    "finetune": ["--steps", "4", "--batch-size", "4", "--crop-size", "32", "--width", "0.03125",
                 "--labels", "6", "--device", "cpu"],
}
STAGES = list(TINY)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The path of a checkpoint of stage 1, of fresh weights."""
    import model

    torch.manual_seed(0)
    classifier = model.Classifier(model.build_encoder("hybrid-small"), 6)
    path = tmp_path_factory.mktemp("encoder") / "last.pt"
    model_args = {"encoder": "hybrid-small", "num_classes": 6}
    common.save(path, {"model": classifier.state_dict(), "model_args": model_args, "args": {}, "step": 0})
    return str(path)


@pytest.fixture
def few(monkeypatch):
    """The toy data, cut to a dozen pictures a part."""
    import datasets

    monkeypatch.setattr(datasets, "SHAPES_COUNTS", {part: 12 for part in datasets.SHAPES_COUNTS})


@pytest.fixture
def script(monkeypatch, capsys):
    """script("finetune", "--steps", 4, ...) runs finetune.py in this process -> (status, stdout, stderr)."""
    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        status = 0
        capsys.readouterr()
        try:
            common.run(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def done(script):
    """done("finetune", ...) runs finetune.py to its end -> stderr."""
    def call(*command):
        status, _, err = script(*command)
        assert status == 0, err
        return err
    return call


def load(out):
    """last.pt of a run."""
    return torch.load(Path(out) / "last.pt", weights_only=True)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------- Processes that can be killed

# They fork from a server that has imported torch once: a run starts in a tenth of a second.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["conftest", "pretrain_encoder", "pretrain_decoder", "finetune", "evaluate"])


class Forked:
    """A stage in `processes` processes of its own, on a dozen toy pictures. before: a function that is called
    first in each, such as one that makes it die at a certain place."""

    def __init__(self, tmp_path, name, *flags, processes=1, before=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output = tmp_path / f"output_{port}.txt"
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes,
                 "LOCAL_WORLD_SIZE": processes}
        self.ranks = [FORK.Process(target=_stage, args=(
            name, [*map(str, flags)], {**group, "RANK": rank, "LOCAL_RANK": rank}, str(self.output), before))
            for rank in range(processes)]
        for rank in self.ranks:
            rank.start()

    def wait(self):
        """The exit statuses, rank by rank; -9 for a killed one."""
        for rank in self.ranks:
            rank.join(300)
            if rank.exitcode is None:  # hangs: end it, so that the test fails instead
                rank.kill()
                rank.join()
        return [rank.exitcode for rank in self.ranks]


def _stage(name, flags, environment, output, before):
    import datasets

    file = open(output, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    datasets.SHAPES_COUNTS = {part: 12 for part in datasets.SHAPES_COUNTS}
    if before:
        before()
    sys.argv = [f"{name}.py", *flags]
    common.run(importlib.import_module(name).main)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------- Data in its exact form


def write_image(path, height=40, width=56, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A user's own data, images/ and masks/ with train/ and val/: three classes, odd sizes, odd names."""
    root, rng = tmp_path / "my data", np.random.RandomState(0)
    for part, names in (("train", ["a", "b ö", "c", "sub/d"]), ("val", ["e", "f"])):
        for i, name in enumerate(names):
            write_image(root / "images" / part / f"{name}.{('jpg', 'png')[i % 2]}", 41 + i, 57 - i, seed=i)
            write_mask(root / "masks" / part / f"{name}.png", rng.choice([0, 1, 2, 255], (41 + i, 57 - i)))
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root


def jpeg(seed, mode="RGB"):
    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def imagenet21k(root):
    """Two synsets as they are distributed: six pictures, one of which does not decode, and other files."""
    write_tar(root / "n00000001.tar", {
        "n00000001_1.JPEG": jpeg(1), "README": b"no image", "n00000001_2.JPEG": jpeg(2, "L"),
        "._n00000001_1.JPEG": b"resource fork", "n00000001_" + "x" * 120 + ".JPEG": jpeg(3, "CMYK")})
    write_tar(root / "n00000002.tar", {"n00000002_9.JPEG": jpeg(4)[:150], "n00000002_10.JPEG": jpeg(5)})
    (root / "LICENSE.txt").write_text("not a synset")
    return root
