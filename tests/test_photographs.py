"""examples/photographs.py: it stands alone, goes on, and says how sure it is."""
import argparse
import inspect
import json
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_image, write_mask

import evaluate
import noise

sys.path.append(str(ROOT / "examples"))
import photographs


def test_the_example_runs_alone_goes_on_and_compares_equals(tmp_path, monkeypatch):
    for path in ("examples/photographs.py", "model.py", "noise.py"):
        shutil.copy(ROOT / path, tmp_path)
    parts = [inspect.getsource(function) for function in (evaluate.confusion_matrix, evaluate.scores)]
    (tmp_path / "evaluate.py").write_text("\n".join(["import math\nimport torch\nIGNORE = 255", *parts]))
    for i, part in enumerate(("train", "train", "train", "train", "val", "val", "test", "test")):
        write_image(tmp_path / part / f"{i}.png", 36, 48, seed=i)
        write_mask(tmp_path / f"{part}annot/{i}.png", np.random.RandomState(i).randint(12, size=(36, 48)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(photographs.EfficientNetLite0, "load_state_dict", lambda self, state: None)
    torch.save({}, "w.pth")
    state = photographs.EfficientNetLite0("w.pth").state_dict()  # random weights, in the file's form
    torch.save({**state, "_fc.bias": torch.zeros(1000)}, "w.pth")
    known = [{"seed": s, "0.0003": [20, 21 + s], "0.001": [9, 8]} for s in (1, 2, 2)]  # 2 counts once
    (tmp_path / "w_2_2.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in known))
    command = f"{sys.executable} photographs.py --camvid . --weights w.pth --pairs 3 --steps 2 2".split()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *before, line = map(json.loads, open("w_2_2.jsonl"))
    assert before == known and line["seed"] == 0 and line["0.001"][0] != line["0.001"][1]
    differences = [2.0, 3.0, line["0.0003"][1] - line["0.0003"][0]]
    interval = 4.30 * statistics.stdev(differences) / 3 ** 0.5  # 4.30: Student's t for two degrees of freedom
    assert f"difference {statistics.mean(differences):.1f} ± {interval:.1f}" in out
    # Both are equal where denoising teaches nothing; what the mask ignores is not scored
    monkeypatch.setattr(photographs, "SIZE", (32, 32))
    monkeypatch.setattr(noise, "denoising_loss", lambda prediction, _: 0 * prediction.sum())
    scored, scorer = [], photographs.confusion_matrix
    monkeypatch.setattr(photographs, "confusion_matrix", lambda *a: scored.append(a[:2]) or scorer(*a))
    photographs.run(argparse.Namespace(camvid=".", weights="w.pth", steps=[2, 2], out="o"), 0)
    predicted, truth = (torch.stack(maps).flatten().numpy() for maps in zip(*scored[-2:]))
    hits = [((predicted == k) & (truth == k)).sum() for k in range(11)]
    unions = [((predicted == k) & (truth < 11) | (truth == k)).sum() for k in range(11)]
    assert json.load(open("o"))["0.001"] == pytest.approx([100 * np.mean(np.divide(hits, unions))] * 2)
