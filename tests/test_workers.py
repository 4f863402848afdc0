"""workers.py: runs are shared, none runs twice at once, none is lost, a failure is reported and the others go on."""

import collections
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import FAKE, cell_of, finish, grid_of, ran

import workers


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute")


def test_two_workers_split_a_grid_one_is_killed_the_other_finishes_and_no_run_runs_twice(worker, tmp_path):
    flags = ("table4", "--scale", "small", "--jobs", 2)
    one, two = (worker(name, *flags, TOGETHER="one two", SECONDS="0.8") for name in ("one", "two"))
    until(lambda: len(ran(tmp_path)) > 6 and {name for name, _ in ran(tmp_path)} == {"one", "two"})
    one.kill()  # its runs go on without it: they are waited for, not repeated
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    folders = collections.Counter(out for _, out in ran(tmp_path))
    # 1 encoder, 2 decoders; 2 rows with 2 candidates each, 6 cells with 2 repeats each
    assert len(folders) == 3 + 2 * 2 + 6 * 2 and set(folders.values()) == {1}
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["table4"]) == 12


def test_a_failed_run_is_reported_with_its_last_line_the_others_go_on_and_the_command_tries_it_again(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    status, _, errors = run_here("shapes", "--repeats", 1)
    assert status == 2 and "2 runs failed" in errors and "finetune.py: error: a fault of this run" in errors
    assert len(errors.splitlines()) == 1 and "output.txt" in errors
    assert len(ran(tmp_path)) == 3 + 8 - 2
    monkeypatch.delenv("FAIL")
    assert run_here("shapes", "--repeats", 1)[0] == 0 and len(ran(tmp_path)) == 3 + 8


def claim_file(claims, run, text, number=0):
    folder = claims.grid.path(run.name)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"claim-{number}")
    with open(path, "w") as file:
        file.write(text)
    return path


def gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_taken_over_where_its_owner_is_gone_or_silent_and_only_then(tmp_path, monkeypatch):
    grid = grid_of("shapes", "--out", tmp_path)
    run, now, here = grid.plan()[0][0], [1000.0], socket.gethostname()
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])

    def takes(text):
        claims = workers.Claims(grid)
        path = claim_file(claims, run, text)
        answers = [claims.take(run)]
        now[0] += 200
        answers.append(not answers[0] and claims.take(run))
        now[0] += 150  # 350 s without a sign of life
        answers.append(not any(answers) and claims.take(run))
        if any(answers):
            claims.give_up(run)
        os.path.exists(path) and os.remove(path)
        return answers

    assert takes(f"{here} {gone()}\n") == [True, False, False]  # gone: at once
    assert takes(f"{here} {gone()}\n{here} {os.getpid()}\n") == [False, False, True]  # its run still runs
    assert takes("elsewhere 1\n") == [False, False, True]
    assert takes("") == takes(here) == [False, False, True]  # killed while it wrote


def test_a_sign_of_life_keeps_a_claim(tmp_path, monkeypatch):
    grid = grid_of("shapes", "--out", tmp_path)
    run, now = grid.plan()[0][0], [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    owner, other = workers.Claims(grid), workers.Claims(grid)
    monkeypatch.setattr(workers.socket, "gethostname", lambda: "another machine")
    assert owner.take(run)
    monkeypatch.undo()
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    for _ in range(5):
        assert not other.take(run)
        now[0] += 200
        time.sleep(0.01)  # file times are of the real clock
        owner.show_life()
    assert not other.take(run)
    now[0] += 400  # a machine that crashed
    assert other.take(run)
    owner.mine.clear()


def test_of_two_that_take_over_a_claim_one_wins(tmp_path, monkeypatch):
    grid = grid_of("shapes", "--out", tmp_path)
    run = grid.plan()[0][0]
    one, two = workers.Claims(grid), workers.Claims(grid)
    claim_file(one, run, f"{socket.gethostname()} {gone()}\n")
    judge = two._abandoned

    def meanwhile(path):  # both have found it abandoned when the first makes its claim
        answer = judge(path)
        assert one.take(run)
        return answer

    monkeypatch.setattr(two, "_abandoned", meanwhile)
    assert not two.take(run) and run.name in one.mine


def test_a_run_that_another_finished_meanwhile_is_not_taken(tmp_path):
    grid = grid_of("shapes", "--out", tmp_path)
    run = grid.plan()[0][0]
    finish(grid, run)
    claims = workers.Claims(grid)
    assert not claims.take(run) and not claims.mine and not list(tmp_path.rglob("claim-*"))


def test_the_last_line_of_a_run_is_of_its_last_attempt(tmp_path):
    output = tmp_path / "output.txt"
    output.write_text("finetune.py: error: of the first attempt\n")
    begins = output.stat().st_size
    assert workers.last_line(output, begins) == "no output"
    output.write_text(output.read_text() + "finetune.py: error: a full disk\nW1125 torchrun says more\n\n")
    assert workers.last_line(output, begins) == "finetune.py: error: a full disk"


@pytest.fixture
def gpus(monkeypatch):
    """gpus("0", "1") pretends to have these -> a list of (command, its GPUs) that are started and never end."""
    started = []

    class Process:
        returncode, pid = None, 1

        def __init__(self, command, env, **other):
            started.append((command, env["CUDA_VISIBLE_DEVICES"]))

        def poll(self):
            return self.returncode

    def pretend(*names):
        monkeypatch.setattr(workers, "gpus_of", lambda device: list(names))
        monkeypatch.setattr(workers.subprocess, "Popen", Process)
        return started

    return pretend


def test_pretraining_takes_as_many_gpus_as_its_batch_divides_over(tmp_path, gpus):
    for count, taken in ((1, 1), (2, 2), (3, 2), (6, 4), (8, 8)):
        gpus(*map(str, range(count)))
        grid = grid_of("table4", "shapes", "--no-sweep", "--out", tmp_path)
        counts = {run.name: workers.Worker(grid).processes(run) for run in grid.plan()[0]}
        assert counts["ddep_data_imagenet21k_gamma_0.95_width_3/pretrain_decoder"] == taken
        assert {name: n for name, n in counts.items() if n > 1 and "imagenet21k" not in name} == {}  # of shapes, batch 4


def test_gpus_are_not_kept_idle_for_a_pretraining_that_another_worker_has(tmp_path, gpus):
    started = gpus("0", "1")
    grid = grid_of("table6", "--no-sweep", "--out", tmp_path)
    runs, _ = grid.plan()
    for run in runs:
        if run.batch > 1:
            claim_file(workers.Claims(grid), run, "elsewhere 1\n")
    worker = workers.Worker(grid)
    assert worker._start(runs) and [names for _, names in started] == ["0", "1"]
    name, active = next(iter(worker.running.items()))
    active.process.returncode = 0
    finish(grid, active.run)
    worker.running[name] = active._replace(commands=[])  # the evaluation is done, too
    assert worker._ended() and worker._start(runs) and [names for _, names in started] == ["0", "1", "0"]


def test_gpus_are_not_kept_idle_for_a_pretraining_under_a_torchrun_of_the_users(tmp_path, gpus):
    started = gpus("0", "1")
    grid = grid_of("table6", "--no-sweep", "--out", tmp_path)
    runs, _ = grid.plan()
    worker = workers.Worker(grid)
    worker.free.pop()
    assert not worker._start(runs) and not started  # it would come first
    worker.busy = {run.name: -1e9 for run in runs if run.batch > 1}  # but was found locked, a while ago
    worker._start(runs)
    assert [names for _, names in started] == ["0"] and "finetune.py" in started[0][0][1]


def test_a_worker_goes_on_where_another_finishes_the_last_candidate_between_its_plan_and_its_start(tmp_path):
    grid = grid_of("table5", "--scale", "small", "--out", tmp_path)
    other = grid_of("table5", "--scale", "small", "--out", tmp_path)
    work = workers.Worker(grid).work()
    _, later = next(work)
    for run in other.plan()[0]:
        finish(other, run)
    assert len(later) == 8 and next(work)[1] == []  # it does not return: the repeats are known now
    work.close()


def test_pretraining_takes_all_gpus_and_each_fine_tuning_one(tmp_path, gpus):
    started = gpus("2", "5")
    grid = grid_of("table4", "--no-sweep", "--out", tmp_path)
    worker = workers.Worker(grid)
    runs, _ = grid.plan()
    worker._start(runs)
    (command, names), = started
    assert names == "2,5" and command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert command[5] == os.path.join(workers.HERE, "pretrain_decoder.py")
    for run in runs[:2]:
        finish(grid, run)
    worker, started[:] = workers.Worker(grid), []
    worker._start(runs)
    assert [(os.path.basename(command[1]), names) for command, names in started] == [("finetune.py", "2"), ("finetune.py", "5")]


def test_a_pretraining_that_runs_under_a_torchrun_of_the_users_is_waited_for(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SILENT", 0)
    (tmp_path / "pretrain_decoder.py").write_text(
        "import os, sys\n"
        "if os.path.exists(os.environ['RAN'] + '.elsewhere'):\n"
        "    os.remove(os.environ['RAN'] + '.elsewhere')\n"
        "    sys.exit('pretrain_decoder.py: error: out: another run is writing there (process 1 on node2); wait for its end')\n" + FAKE)
    (tmp_path / "ran.elsewhere").touch()
    status, out, errors = run_here("shapes", "--repeats", 1)
    assert status == 0 and len(ran(tmp_path)) == 3 + 8 and "another run is writing there (process 1 on node2)" in out, errors


def test_an_evaluation_that_left_images_out_is_no_score(tmp_path):
    """evaluate.py writes incomplete.json and ends with status 2 where images cannot be read."""
    grid = grid_of("table4", "--no-sweep", "--out", tmp_path)
    run = next(run for run in grid.plan()[0] if run.result != "metrics.json")
    os.makedirs(grid.path(run.name, "evaluate"))
    worker = workers.Worker(grid)
    assert worker.claims.take(run)
    output = tmp_path / "runs" / run.name / "output.txt"
    output.write_text("evaluate.py: error: 3 of 5105 images cannot be read; the scores are of the others\n")
    (output.parent / "evaluate" / "incomplete.json").write_text('{"miou": 0.5}')
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    ended.wait()
    worker.running[run.name] = workers.Active(run, [None], ended, [], 0)
    assert worker._ended() and "3 of 5105 images" in worker.failed[run.name]
    assert not grid.finished(run) and grid.scores(cell_of(grid, "table4", "gamma = 0.95", "100%")) == {}
