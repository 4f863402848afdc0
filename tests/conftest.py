"""Shared by the tests: the project's scripts run in this process or in processes of their own, on the smallest networks."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                                # the networks are tiny; threads only wait for each other

import runtime  # noqa: E402

# Flags that make a stage as small as it can be, on the embedded data
TINY = {"pretrain_encoder": ["--steps", "4", "--batch-size", "4", "--eval-every", "100", "--log-every", "1", "--image-size", "32"],
        "pretrain_decoder": ["--steps", "4", "--batch-size", "4", "--width", "0.03125", "--log-every", "1",
                             "--image-size", "32"],
        "finetune": ["--steps", "4", "--batch-size", "4", "--width", "0.03125", "--eval-every", "100", "--log-every", "1", "--labels", "6",
                     "--crop-size", "32"]}


class Ended(Exception):
    """A script ended with this exit status."""


@pytest.fixture
def script(monkeypatch, capsys):
    """script("finetune", "--steps", 4, ...) runs finetune.py in this process -> (exit status, stdout, stderr)."""
    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        status = 0
        capsys.readouterr()
        try:
            runtime.run(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err
    return call


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded data, cut to a dozen pictures a part."""
    import datasets
    monkeypatch.setattr(datasets, "SHAPES_COUNTS", {part: 12 for part in datasets.SHAPES_COUNTS})


def torchrun(processes, name, *flags, cwd=None):
    """A script under torchrun -> CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(ROOT / f"{name}.py")]
    return subprocess.run([*command, *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200)


def write_image(path, height=40, width=56, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A user's own data: images/ and masks/ with train/ and val/, three classes, odd sizes, a name with a space and an umlaut."""
    root = tmp_path / "my data"
    rng = np.random.RandomState(0)
    for part, names in (("train", ["a", "b ö", "c", "sub/d"]), ("val", ["e", "f"])):
        for i, name in enumerate(names):
            write_image(root / "images" / part / f"{name}.{('jpg', 'png')[i % 2]}", 41 + i, 57 - i, seed=i)
            write_mask(root / "masks" / part / f"{name}.png", rng.choice([0, 1, 2, 255], (41 + i, 57 - i)))
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root
