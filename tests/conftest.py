"""Shared by the tests: scripts run in this process or in processes that can be killed, and data."""
import argparse
import importlib
import io
import json
import multiprocessing
import os
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
import datasets  # noqa: E402
import labelled  # noqa: E402
import model  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SMALL = ["--steps", "4", "--batch-size", "4", "--device", "cpu"]
TINY = {  # flags that make a stage as small as it can be, on toy data
    "pretrain_encoder": [*SMALL, "--image-size", "32"],
    "pretrain_decoder": [*SMALL, "--image-size", "32", "--width", "0.03125"],
    "finetune": [*SMALL, "--crop-size", "32", "--width", "0.03125", "--labels", "6"]}
STAGES = list(TINY)
FEW = {**dict.fromkeys(datasets.SHAPES_COUNTS, 12), "val": 4}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """torch.hub's cache folder, where the lists of pictures lie, is the test's own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: f"{tmp_path}_hub")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The path of a checkpoint of stage 1, of fresh weights."""
    torch.manual_seed(0)
    classifier = model.Classifier(model.build_encoder("hybrid-small"), 6)
    path = tmp_path_factory.mktemp("encoder") / "last.pt"
    common.save(path, dict(model=classifier.state_dict(), model_args={"encoder": "hybrid-small"}, step=0))
    return str(path)


@pytest.fixture
def few(monkeypatch):
    """The toy data, cut to a few pictures."""
    monkeypatch.setattr(datasets, "SHAPES_COUNTS", FEW)


@pytest.fixture
def script(monkeypatch, capsys):
    """script("finetune", "--steps", 4, ...) runs finetune.py in this process -> (status, stdout, stderr)."""
    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        status, _ = 0, capsys.readouterr()
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


def one_line(ended, *words):
    """Whether a script ended with status 2 and one line of stderr that has all `words`."""
    status, _, err = ended
    return status == 2 and err.count("\n") == 1 and all(str(word) in err for word in words)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Within the test tensors are fake: shapes, dtypes and devices under CUDA's own autocast, no numbers."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    common_amp = pytest.importorskip("torch.cuda.amp.common")
    monkeypatch.setattr(common_amp, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # made where it stays
    with fake.FakeTensorMode(), torch.device("cuda:0"):
        yield


# ---------------------------------------- Processes that can be killed

# They fork from a server that has imported torch once: a run starts in a tenth of a second.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["conftest", "pretrain_encoder", "pretrain_decoder", "finetune", "evaluate"])


class Forked:
    """A stage in `processes` processes of its own, on a few toy pictures. before: called first in each."""

    def __init__(self, tmp_path, name, *flags, processes=1, before=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output = tmp_path / f"output_{port}.txt"
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes,
                 "LOCAL_WORLD_SIZE": processes, "TORCH_HOME": f"{tmp_path}_home"}
        self.ranks = [FORK.Process(target=_stage, args=(
            name, [*map(str, flags)], {**group, "RANK": rank, "LOCAL_RANK": rank}, str(self.output), before))
            for rank in range(processes)]
        for rank in self.ranks:
            rank.start()

    def wait(self):
        """The exit statuses, rank by rank; -9 for a killed one."""
        for rank in self.ranks:
            rank.join(300)
            rank.kill()  # if it hangs, the test fails instead
            rank.join()
        return [rank.exitcode for rank in self.ranks]


def _stage(name, flags, environment, output, before):
    file = open(output, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({key: str(value) for key, value in environment.items()})
    multiprocessing.set_start_method("fork", force=True)  # else loader workers start a server of their own
    datasets.SHAPES_COUNTS = FEW
    if before:
        before()
    sys.argv = [f"{name}.py", *flags]
    common.run(importlib.import_module(name).main)


# ---------------------------------------- Data in its exact form, and what reads it


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write_image(path, height=40, width=56, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8)).save(path)


def write_pairs(root, *paths, values=(0, 1)):
    """Images and masks, in turn, at these paths, each pair of a size of its own, and classes.txt."""
    for i, (image, mask) in enumerate(zip(paths[::2], paths[1::2])):
        write_image(root / image, 33 + i, 40, seed=i)
        write_mask(root / mask, np.array(values)[np.indices((33 + i, 40)).sum(0) % len(values)])
    (root / "classes.txt").write_text("sky\nsea\n")


def pixels(path, mode=None):
    image = Image.open(path)
    return np.array(image.convert(mode) if mode else image)


@pytest.fixture
def folder(tmp_path):
    """A user's own data: three classes, odd sizes, odd names, very different numbers of ignored pixels."""
    root, rng = tmp_path / "my data", np.random.RandomState(0)
    for part, names in (("train", ["a", "b ö", "c", "sub/d"]), ("val", ["e", "f", "g"])):
        for i, name in enumerate(names):
            write_image(root / "images" / part / f"{name}.{('jpg', 'png')[i % 2]}", 41 + i, 57 - i, seed=i)
            mask = rng.choice([0, 1, 2, 255], (41 + i, 57 - i))
            mask[:(0, 31, 14, 26)[i]] = 255
            write_mask(root / "masks" / part / f"{name}.png", mask)
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root


def jpeg(seed, mode="RGB"):
    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def imagenet21k(root, *form):
    """Two synsets as they are distributed: five pictures, one of which does not decode, and other files."""
    write_tar(root / "n00000001.tar", {
        "n00000001_1.JPEG": jpeg(1), "README": b"no image", "n00000001_2.JPEG": jpeg(2, "L"),
        "._n00000001_1.JPEG": b"resource fork", f"{'x' * 90}/{'y' * 60}.JPEG": jpeg(3, "CMYK")}, *form)
    write_tar(root / "n00000002.tar", {"n00000002_9.JPEG": jpeg(4)[:150], "ü.JPEG": jpeg(5)}, *form)
    (root / "LICENSE.txt").write_text("not a synset")
    return root


def flags(data, root, **more):
    """What a stage hands to the modules that read data."""
    usual = dict.fromkeys((*datasets.DATA_FLAGS, "labels"))
    return argparse.Namespace(**{**usual, "seed": 0, "data": data, "root": root and str(root), **more})


def pairs(data, root, part="train", **more):
    given = flags(data, root, **more)
    return labelled.labelled(given, labelled.classes_of(given)).get(part)


def names(source):
    return [source.name(i) for i in range(len(source or []))]
