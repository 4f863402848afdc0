"""benchmark.py: that it times what it says, in turns; not how long anything takes."""
import re
import time

import benchmark


def test_cases_take_turns_and_the_first_call_of_each_is_not_counted(monkeypatch, capsys):
    calls, now, seconds = [], [0], {"ours": [50, 4, 1, 4], "peer": [1, 4, 2, 8]}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name):
        calls.append(name)
        now[0] += seconds[name].pop(0)
    cases = {name: lambda name=name: call(name) for name in seconds}
    benchmark.measure("Title", cases, 8, 3)
    assert calls == ["ours", "peer"] * 4
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["ours", "8.000", "2.000", "2.00"], ["peer", "4.000", "2.000", "1.00"]]


def test_the_script_prints_a_row_for_each_case(script):
    status, out, err = script("benchmark", "--only", "data", "--rounds", 1, "--device", "cpu")
    assert status == 0, err
    (name, fastest, median), = re.findall(r"^  (.*?) +([\d.]+) +([\d.]+)$", out, re.M)
    assert name == "stage 2" and float(fastest) == float(median) > 0
