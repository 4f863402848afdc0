"""benchmark.py: that it times what it says, in turns; not how long anything takes."""

import json
import time

import pytest
import torch

import benchmark
from evaluate import predict
from model import build_unet


def test_cases_take_turns_and_the_first_call_of_each_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    cases = {name: (lambda name=name: calls.append(name), units) for name, units in (("a", 1), ("b", 2))}
    assert benchmark.measure(cases, 3, torch.device("cpu")) == {"a": [1, 1, 1], "b": [0.5, 0.5, 0.5]}
    assert calls == ["a", "b"] * 4


def test_a_line_gives_the_fastest_and_the_median_round_and_the_ratio_to_the_fastest_peer(capsys):
    rows = benchmark.report("Title", "image", {"ours": [0.5, 0.25, 1.0], "peer: slow": [2.0], "peer: fast": [0.5]},
                            flops={"ours": 1e9}, ceiling=8, memory={"ours": 0.5})
    assert (rows[0]["best"], rows[0]["median"], rows[0]["ratio_to_peer"]) == (4, 2, 2)
    assert (rows[0]["gflops"], rows[0]["of_ceiling"]) == (4, 0.5) and rows[1]["ratio_to_peer"] == 0.25
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line == "ours 4.000 2.000 2.00 x the peer 4.0 GFLOP/s, 50% of the ceiling, 0.50 GB".split()


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.5]])
def test_the_peer_of_the_evaluation_computes_the_same(scales):
    torch.manual_seed(0)
    network, x = build_unet("hybrid-small", 1 / 32, 5).eval(), torch.rand(1, 3, 70, 96)
    with torch.inference_mode():
        torch.testing.assert_close(benchmark.one_by_one(network, x, scales, 64),
                                   predict(network, x, scales=scales, flip=True, window=64))


def test_memory_is_what_a_call_adds_at_most():
    peak = benchmark.peak_memory(lambda: torch.ones(50_000_000), torch.device("cpu"))
    assert peak is None or 0.19 < peak < 0.25


def test_the_script_writes_its_figures(script, tmp_path):
    status, out, err = script("benchmark", "--only", "small", "data", "--quick", "--rounds", 1, "--json",
                              tmp_path / "speed.json", "--device", "cpu")
    assert status == 0, err
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [row["name"] for row in written["rows"]] == [
        "stage 2, 64 x 64, batch 16", "stage 3, 64 x 64, batch 16", "from a folder", "from a .tar", "crops of 1024"]
    assert all(row["best"] >= row["median"] > 0 and row["name"] in out for row in written["rows"])
