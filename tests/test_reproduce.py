"""reproduce.py: stopped, continued, and reported as measured."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import reproduce


def made_up(method, labels, miou, rates=("", "")):
    """Results of seeds 0, 1, 2 with these scores."""
    return [dict(method=method, labels=labels, seed=seed, rates=rates, miou=value / 100)
            for seed, value in enumerate(miou)]


def test_the_table_has_means_deviations_and_differences_in_pairs_with_their_95_percent_intervals():
    results = (made_up("No pretraining", 8, [20, 30, 40]) + made_up("Supervised", 8, [40, 50, 60]) +
               made_up("DeP", 8, [30, 40, 50]) + made_up("DDeP", 8, [41, 52, 63]))
    lines = reproduce.table(results, [8]).splitlines()
    assert "| DDeP | 52.0 ± 11.0 (3) |" in lines
    # 1, 2 and 3 points: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303, by sqrt(3): 2.48
    assert "| *DDeP − Supervised, in pairs, ± 95 % interval* | +2.0 ± 2.5 |" in lines
    assert "| *Supervised − No pretraining, in pairs, ± 95 % interval* | +20.0 ± 0.0 |" in lines


def test_a_table_of_unfinished_seeds_pairs_the_finished_ones():
    results = made_up("Supervised", 8, [40, 50, 60]) + made_up("DDeP", 8, [41])
    text = reproduce.table(results, [8, 32])
    assert "| DDeP | 41.0 ± 0.0 (1) |  |" in text
    assert "*DDeP − Supervised, in pairs, ± 95 % interval* | +1.0 |  |" in text


def test_the_sweep_shows_every_candidate_and_marks_the_best_mean_of_each_method():
    low, high = ("--lr 1e-3", "--lr 5e-4"), ("--lr 1e-3", "--lr 2e-3")
    results = (made_up("DDeP", 8, [50, 60], low) + made_up("DDeP", 8, [56, 58], high) +
               made_up("DeP", 8, [1, 2], low))
    lines = reproduce.sweep_table(results).splitlines()
    assert lines[2:] == ["| DeP | --lr 1e-3 | --lr 5e-4 | 1.0 2.0 | **1.5** |",
                         "| DDeP | --lr 1e-3 | --lr 5e-4 | 50.0 60.0 | 55.0 |",
                         "| DDeP | --lr 1e-3 | --lr 2e-3 | 56.0 58.0 | **57.0** |"]


def test_every_method_is_swept_over_as_many_candidates_and_the_table_uses_one_of_them():
    for method, row in reproduce.ROWS.items():
        candidates = reproduce.candidates_of(row)
        assert len(set(candidates)) == 9 and row.rates in candidates, method


def test_the_stages_take_the_flags_of_every_run():
    args = reproduce.parse_arguments(["--out", "somewhere"])
    for method, row in reproduce.ROWS.items():
        for rates in reproduce.candidates_of(row):
            for run in reproduce.runs_of(args, method, 8, 0, rates):
                stage = os.path.basename(run.command[1]).removesuffix(".py")
                flags = importlib.import_module(stage).parse_arguments(run.command[2:])
                if stage != "pretrain_encoder":
                    assert flags.lr == float(rates[stage == "finetune"].split()[1])


def test_the_seeds_of_the_sweep_are_refused_in_the_table():
    with pytest.raises(reproduce.InputError, match="chose the rates"):
        reproduce.parse_arguments(["--seeds", "3", "100"])


def test_reproduce_can_be_stopped_and_runs_everything_once_and_reports_what_was_measured(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "reproduce.py"), "--out",
        str(tmp_path), "--labels", "3", "--seeds", "0", "--steps", "2", "2", "2"
    ]

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}

    stopped = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not times():
        assert stopped.poll() is None
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130
    before = times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert before.items() <= times().items() and len(times()) == 7  # none was made again, all are there
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(run["method"], run["labels"], run["seed"])
            for run in results] == [(m, 3, 0) for m in ("No pretraining", "Supervised", "DeP", "DDeP")]
    table = (tmp_path / "table.md").read_text()
    for run in results:
        folder = reproduce.slug(run["method"], *run["rates"], "3 labels")
        scores = json.loads((tmp_path / "runs/seed0" / folder / "metrics.json").read_text())
        assert (run["miou"] == scores["miou"]
                and f"| {run['method']} | {100 * run['miou']:.1f} ± 0.0 (1) |" in table)
    assert table.strip() in done.stdout
    assert all(
        (tmp_path / name).stat().st_size > 1000 for name in ("label_efficiency.png", "predictions.png"))
    again = times()
    assert subprocess.run(command, capture_output=True, timeout=1200).returncode == 0 and times() == again
