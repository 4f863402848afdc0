"""benchmark.py: that it times what it says, in turns; not how long anything takes."""
import json
import time

import torch

import benchmark


def test_cases_take_turns_and_the_first_call_of_each_is_not_counted(monkeypatch):
    calls, now, seconds = [], [0], {"ours": [50, 4, 1, 4], "peer: b": [50, 2, 1, 4]}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name):
        calls.append(name)
        now[0] += seconds[name].pop(0)
    cases = {"ours": (lambda: call("ours"), 8), "peer: b": (lambda: call("peer: b"), 2)}
    rows = benchmark.measure("Title", cases, 3, torch.device("cpu"))
    assert calls == ["ours", "peer: b"] * 4
    assert [(row["fastest"], row["median"], row["ratio"]) for row in rows] == [(8, 2, 4), (2, 1, 1)]


def test_the_script_writes_its_rows(script, tmp_path):
    path = tmp_path / "speed.json"
    status, out, err = script("benchmark", "--only", "toy", "--rounds", 1, "--json", path, "--device", "cpu")
    assert status == 0, err
    row, = json.loads(path.read_text())["rows"]
    assert row["fastest"] == row["median"] > 0 and row["gflops"] > 0 and row["name"] in out
