"""reproduce.py: stopped, continued, and reported as measured."""

import json
import signal
import subprocess
import sys
import time

from conftest import ROOT


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
        scores = json.loads((tmp_path / "runs/seed0" / f"{run['method'].lower().replace(' ', '_')}_3_labels" /
                             "metrics.json").read_text())
        assert (run["miou"] == scores["miou"]
                and f"| {run['method']} | {100 * run['miou']:.1f} ± 0.0 (1) |" in table)
    assert table.strip() in done.stdout
    assert all(
        (tmp_path / name).stat().st_size > 1000 for name in ("label_efficiency.png", "predictions.png"))
    again = times()
    assert subprocess.run(command, capture_output=True, timeout=1200).returncode == 0 and times() == again
