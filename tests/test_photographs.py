"""examples/photographs.py: it stands alone, goes on, and says how sure it is."""
import inspect
import json
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluate

sys.path.append(str(ROOT / "examples"))
import photographs


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder with the example, what it imports, eight pictures of CamVid's layout and random weights."""
    for path in ("examples/photographs.py", "model.py", "noise.py"):
        shutil.copy(ROOT / path, tmp_path)
    parts = [inspect.getsource(part) for part in (evaluate.confusion_matrix, evaluate.scores)]
    (tmp_path / "evaluate.py").write_text("\n".join(["import math\nimport torch\nIGNORE = 255", *parts]))
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2), ("test", 2)):
        (tmp_path / part).mkdir()
        (tmp_path / f"{part}annot").mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(256, size=(36, 48, 3), dtype=np.uint8)).save(tmp_path / part / f"{i}.png")
            mask = rng.integers(12, size=(36, 48), dtype=np.uint8)
            Image.fromarray(mask).save(tmp_path / f"{part}annot" / f"{i}.png")
    monkeypatch.setattr(photographs.EfficientNetLite0, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "lite0.pth")
    state = photographs.EfficientNetLite0(tmp_path / "lite0.pth").state_dict()
    torch.save({**state, "_fc.bias": torch.zeros(1000)}, tmp_path / "lite0.pth")
    return tmp_path


def test_the_example_runs_alone_goes_on_and_prints_the_interval_of_the_differences(alone):
    known = [{"seed": seed, "0.0003": [20.0, 21.0 + seed], "0.001": [9.0, 8.0]} for seed in (1, 2)]
    (alone / "photographs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    command = [sys.executable, "photographs.py", "--camvid", ".", "--weights", "lite0.pth", "--steps", "1", "2"]
    out = subprocess.run([*command, "--pairs", "3"], cwd=alone, check=True, capture_output=True, text=True).stdout
    *before, line = map(json.loads, (alone / "photographs.jsonl").read_text().splitlines())
    assert before == known and line["seed"] == 0
    assert all(0 < score < 20 for rate in ("0.0003", "0.001") for score in line[rate])  # chance: 1 / 22
    differences = [2.0, 3.0, line["0.0003"][1] - line["0.0003"][0]]
    interval = 4.30 * statistics.stdev(differences) / 3 ** 0.5  # 4.30: Student's t for two degrees of freedom
    assert f"difference {statistics.mean(differences):.1f} ± {interval:.1f}" in out
