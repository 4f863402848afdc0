"""reproduce.py: every cell of the paper is there, runs are shared and never lost, results are reported as measured."""

import collections
import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import reproduce

DATA = ("--imagenet21k", "--cityscapes", "--pascal-context", "--ade20k", "--voc")


def parse(*flags):
    return reproduce.parse_arguments(list(map(str, flags)))


def grid_of(*flags):
    args = parse(*flags, "--dry-run")
    sweeps = {name: table.sweep if args.sweep is None else args.sweep for name, table in args.known.items()}
    return reproduce.Grid(args, args.tables, sweeps)


def cell_of(grid, table, name, column):
    return next(cell for cell in grid.cells if (cell.table, cell.row.name, cell.column) == (table, name, column))


def finish(grid, run, miou=0.5):
    """Write the result of a run, as its command would."""
    path = grid.path(run.name, *run.result.split("/"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump({"miou": miou}, file)


# ------------------------------------------------------------------------------------------------ the tables

COLUMNS = {"table1": "100% 1/4 1/8 1/30", "table2": "100% 25% 2% 1%", "figure5right": "100% 10% 5% 1%",
           "table3": "100% 10% 5%", "table4": "100% 20% 10%", "figure6": "100% 1/4 1/8 1/30",
           "table5": "100% 1/4 1/8 1/30", "table6": "100% 20% 10% 5% 1%", "figure7": "100% 20% 10% 5% 1%",
           "table7": "100% 20% 10% 5% 1%"}
NAMES = {"None": "No pretraining", "Sup": "Supervised", "predict e": "predict ε", "gamma ~ U(0.9, 0.95)": "gamma in U(0.9, 0.95)",
         "fixed gamma": "gamma = 0.95", "Pascal VOC": "from Pascal VOC", "fine & coarse": "fine and coarse"}


def page():
    """{table: [(the end of a row's name, numbers), ...]} of paper_tables.md, in its order."""
    text, found = (ROOT / "tests" / "paper_tables.md").read_text().replace("gamma = 0.95 ", "fixed gamma "), {}
    for title, body in re.findall(r"\*\*(Table \d|Figure \d right|Figure [67])\*\*(.*?)(?=\*\*(?:Table|Figure)|The paper disagrees)",
                                  text, re.S):
        for line in re.findall(r"^- (.*)$", body, re.M):
            for name, numbers in re.findall(r"([^;]*?):? ((?:(?:\d+\.\d+|-)(?: |$|(?=;))){3,})", line):
                name = re.split(r": |, (?=s)", name.strip())[-1]
                values = tuple(None if word == "-" else float(word) for word in numbers.split())
                found.setdefault(title.lower().replace(" ", ""), []).append((NAMES.get(name, name), values))
    return found


def test_every_cell_of_the_papers_tables_is_a_cell_of_the_program_with_its_number():
    pages = page()
    assert set(pages) == set(COLUMNS)
    assert sum(value is not None for rows in pages.values() for _, values in rows for value in values) == 187
    for name, rows in pages.items():
        table = reproduce.TABLES[name]
        assert table.columns == tuple(COLUMNS[name].split())
        ours = [(row.name, row.paper) for row in table.rows]
        if name == "table5":  # the page lists those of others and names ours in words
            assert list(table.cited) == rows and ours == [("×2 DDeP", (80.91, 76.86, 73.81, 64.75))]
            continue
        assert [numbers for _, numbers in ours] == [numbers for _, numbers in rows], name
        for (ours_name, _), (theirs, _) in zip(ours, rows):
            assert ours_name.endswith(theirs), (name, ours_name, theirs)


def test_each_row_is_initialised_as_the_paper_says():
    for name, table in reproduce.TABLES.items():
        for row in table.rows:
            if "No pretraining" in row.name:
                assert row.init == "none"
            elif "Supervised" in row.name:
                assert row.init == "supervised"
            else:
                assert ("--method dep" in row.init) == (name in ("table1", "table2", "figure3") or "DeP" in row.name.split())
            width = re.search("×([23])", row.name) or (name == "table4" and re.search("×(3)", table.title))
            assert ("--encoder resnet50" == row.network) if name == "table7" else (row.network == (f"--width {width[1]}" if width else ""))


def test_fine_tuning_is_repeated_as_often_as_section_5_1_says():
    grid = grid_of("all")
    repeats = {(cell.row.data, cell.column): len(grid.seeds(cell)) for cell in grid.cells}
    for data in ("pascal_context", "ade20k"):
        assert [repeats[data, column] for column in ("100%", "20%", "10%", "5%", "1%")] == [10, 5, 10, 10, 10]
    assert [repeats["cityscapes", column] for column in ("100%", "1/4", "25%", "1/8", "1/30")] == [10, 4, 4, 6, 10]


def test_the_sweep_of_the_paper_covers_its_range_of_rates_and_decays():
    grid = {tuple(rates.split()) for _, rates in reproduce.GRID}
    values = {float(word) for words in grid for word in (words[1], words[3])}
    assert len(grid) == 16 and (min(values), max(values)) == (1e-5, 3e-4)


def test_the_embedded_methods_are_swept_over_as_many_candidates_and_the_table_uses_one_of_them():
    grid = grid_of("shapes", "--sweep")
    for cell in grid.cells:
        rates = [candidate for candidate, _ in grid.candidates(cell)]
        assert len(set(rates)) == 9 and grid_of("shapes").rates(cell) in rates, cell.row.name


# ------------------------------------------------------------------------------------------------ the commands


def commands_of(*flags):
    """Every command of every table, each once."""
    grid = grid_of(*flags)
    runs, _ = grid.plan()
    return grid, {run.name: run for run in runs}


@pytest.mark.parametrize("flags", [("all", "--no-sweep", "--repeats", 1), ("all", "--scale", "small"), ("shapes", "--sweep")])
def test_the_stages_take_the_flags_of_every_command(flags, tmp_path, monkeypatch):
    grid, runs = commands_of(*flags, "--out", tmp_path)
    checkpoint = tmp_path / "fine-tuned.pt"
    for name, run in runs.items():
        assert all(need in runs for need in run.needs)
        for script, *command in run.commands:
            stage = importlib.import_module(script.removesuffix(".py"))
            if script == "evaluate.py":  # it reads the checkpoint first
                torch.save(dict(model={}, model_args=dict(encoder="hybrid", width=1.0, out_channels=2), class_names=["a", "b"],
                                args=dict(data=args.data, root=args.root, crop_size=args.crop_size)), checkpoint)
                assert command[:4] == ["--out", grid.path(name, "evaluate"), "--checkpoint", grid.path(name, "last.pt")]
                evaluation, _, _ = stage.parse_arguments(["--checkpoint", str(checkpoint), *command[4:]])
                assert (evaluation.data, evaluation.root, evaluation.flip) == (args.data, args.root, True)
                # 5.1: Cityscapes in halves of 1024, the others at six scales
                assert len(evaluation.scales) == (1 if args.data == "cityscapes" else 6)
                continue
            args = stage.parse_arguments(command)
            assert args.out == grid.path(name)
            if "--width" in run.network and getattr(args, "init", None) != "none" and script == "finetune.py":
                assert args.width is None or "encoder" in name  # else it comes with --init


def test_a_paper_scale_chain_reads_as_the_paper_does():
    grid = grid_of("table6", "--imagenet21k", "IN", "--pascal-context", "PC", "--out", "R")
    pretraining, finetuning = grid.chain(cell_of(grid, "table6", "×3 DDeP", "5%"), 7, ("", "--lr 1e-4"))
    folder = os.path.join("R", "runs", "ddep_data_imagenet21k_gamma_0.95_width_3")
    assert pretraining.commands == [shlex.split(
        f"pretrain_decoder.py --out {folder}/pretrain_decoder --seed 0 --data imagenet21k --gamma 0.95 --root IN "
        "--encoder-weights imagenet21k --width 3")]
    run = f"{folder}/pascal_context_fraction_5%_seed_7_lr_1e-4"
    assert finetuning.commands == [shlex.split(
        f"finetune.py --out {run} --data pascal_context --init {folder}/pretrain_decoder/last.pt --fraction 5% --seed 7 "
        "--subset-seed 7 --root PC --lr 1e-4 --eval-every 1000000"),
        shlex.split(f"evaluate.py --out {run}/evaluate --checkpoint {run}/last.pt --root PC")]
    for init, flags in (("×3 Supervised", "--init imagenet21k"), ("×3 No pretraining", "--init none")):
        run, = grid.chain(cell_of(grid, "table6", init, "5%"), 0, ("", ""))
        assert flags in " ".join(run.commands[0]) and "--width 3" in " ".join(run.commands[0])


def test_tables_share_the_pretrainings_and_fine_tunings_that_they_have_in_common():
    _, runs = commands_of("all", "--no-sweep")
    pretrainings = [name for name in runs if name.endswith("pretrain_decoder")]
    # Of the tables 13 (paper_tables.md), but Table 1's second row is taken to be Table 2's DeP; of the curves Figure 3's other four
    # lengths and Figure 5's other five magnitudes
    assert len(pretrainings) == 13 - 1 + 4 + 5
    _, one = commands_of("table6", "--no-sweep")
    _, two = commands_of("table6", "figure5right", "--no-sweep")
    shared = {name for name in two if name.startswith("ddep_data_imagenet21k_gamma_0.95/pascal_context")}
    # New are the decoder of simple noise, and 40 fine-tunings of it on Pascal Context; all of ADE20K: two rows of 40
    assert len(shared) == 45 and shared <= set(one) and len(set(two) - set(one)) == 1 + 40 + 2 * 40


def test_small_scale_keeps_every_row_and_column_and_needs_no_data():
    small, paper = parse("all", "--scale", "small"), parse("all", "--dry-run")
    for name, table in paper.tables.items():
        ours = small.tables[name]
        assert ours.columns == table.columns and [row.name for row in ours.rows] == [row.name for row in table.rows]
        assert not reproduce.folders_of(ours)
        assert len({(row.init, row.network) for row in ours.rows}) >= len({(row.init, row.network) for row in table.rows}) - 3


def test_a_dry_run_shows_every_command_and_the_hours_of_given_step_times(script, tmp_path):
    flags = ["table4", "--no-sweep", "--out", tmp_path, "--dry-run", "--jobs", 1, "--device", "cpu", "--seconds-per-image"]
    status, out, _ = script("reproduce", *flags, "0.01")
    lines = out.splitlines()
    assert status == 0 and sum(line.startswith("python finetune.py") for line in lines) == 2 * (10 + 5 + 10)
    assert "0 of 52 runs are finished, 52 are missing" in out and not (tmp_path / "runs").exists()
    hours = [[float(number) for number in re.findall("about ([0-9.]+) hours of", text)]
             for text in (out, script("reproduce", *flags, "0.02")[1])]
    assert hours[1] == pytest.approx([2 * hours[0][0], 2 * hours[0][1]], rel=1e-3)  # starting processes hardly counts
    # Two pretrainings of 100 epochs of 14,197,122 images at 0.01 s are 7,887 hours at x1; at x3 a step takes 2 to 9 times as many
    # multiply-adds
    assert 2 * 2 * 3943 < hours[0][0] < 2 * 9 * 3943
    # 50 fine-tunings of 160,000 crops of 5.2 times the area; the encoder trains, too: 2 to 9 times, and up to 3 times
    assert 2 * 50 * 160_000 * 5.2 * 0.01 / 3600 < hours[0][1] < 9 * 3 * 50 * 160_000 * 5.2 * 0.01 / 3600


# ------------------------------------------------------------------------------------------------ the choice of rates


def test_the_rates_with_the_best_mean_are_chosen_of_equals_the_first_and_none_before_all_are_run(tmp_path):
    grid = grid_of("shapes", "--sweep", "--out", tmp_path)
    cell = cell_of(grid, "shapes", "DDeP", "32 labels")
    candidates = grid.candidates(cell)
    means = {3: (0.5, 0.61), 5: (0.6, 0.51)}  # both 55.5 %; the others 55.0 %, with the best single score among them
    for number, (_, chains) in enumerate(candidates):
        assert grid.rates(cell) is None
        for chain, miou in zip(chains, means.get(number, (0.3, 0.8))):
            finish(grid, chain[-1], miou)
    assert grid.rates(cell) == candidates[3][0] == ("--lr 1e-3", "--lr 5e-4 --weight-decay 0")
    lines = reproduce.sweep_markdown(grid, "shapes").splitlines()
    assert lines[2] == "| DDeP | 32 labels | --lr 3e-4 | --lr 5e-4 --weight-decay 0 | 30.0 80.0 | 55.0 |"
    assert lines[5] == "| DDeP | 32 labels | --lr 1e-3 | --lr 5e-4 --weight-decay 0 | 50.0 61.0 | **55.5** |"
    assert grid_of("shapes", "--out", tmp_path).rates(cell) == cell.row.rates[-1]  # no sweep: those written in the table


def test_scores_of_the_sweep_never_enter_the_table():
    for flags in (("shapes", "--sweep"), ("table4",), ("table4", "--scale", "small")):
        grid = grid_of(*flags)
        for cell in grid.cells:
            tuning = {chain[-1].name for _, chains in grid.candidates(cell) for chain in chains}
            rates = [rates for rates, _ in grid.candidates(cell)]
            assert not tuning & {grid.chain(cell, seed, rate)[-1].name for seed in grid.seeds(cell) for rate in rates}


# ------------------------------------------------------------------------------------------------ rendering

SMALL = reproduce.Table("", ("8 labels",), tuple(reproduce.Row(name, "shapes", "none") for name in ("A", "B")), pairs=(("B", "A"),))


def test_a_table_has_means_deviations_and_differences_in_pairs_with_their_95_percent_intervals():
    scores = {("A", "8 labels"): {0: 40, 1: 50, 2: 60, 3: 70}, ("B", "8 labels"): {0: 41, 1: 52, 2: 63}}
    lines = reproduce.markdown(SMALL, scores).splitlines()
    assert "| A | 55.0 ± 12.9 (4) |" in lines and "| B | 52.0 ± 11.0 (3) |" in lines
    # 1, 2 and 3 points: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303, by sqrt(3): 2.48
    assert "| *B − A, in pairs, ± 95 % interval* | +2.0 ± 2.5 |" in lines


def test_a_table_of_the_paper_shows_its_numbers_and_the_difference():
    table = reproduce.TABLES["table5"]
    scores = {("×2 DDeP", column): {} for column in table.columns}
    scores["×2 DDeP", "1/8"] = {0: 72.0, 1: 74.0}
    lines = reproduce.markdown(table, scores).splitlines()
    assert lines[2] == "| ×2 DDeP | –; 80.91 | –; 76.86 | 73.0 ± 1.4 (2); 73.81; -0.8 | –; 64.75 |"
    assert lines[3] == "| AdvSemSeg (cited in the paper, not run here) | – | 62.30 | 58.80 | – |"


def test_student_quantiles_are_those_of_the_distribution():
    """By the integral of Student's density from -t to t, in steps of a thousandth."""
    for degrees, t in enumerate(reproduce.STUDENT, 1):
        x = np.linspace(-t, t, 2 * int(t * 1000) + 1)
        density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        wide = np.tan(np.linspace(-np.pi / 2 + 1e-6, np.pi / 2 - 1e-6, 200_001))
        whole = np.trapezoid((1 + wide * wide / degrees) ** (-(degrees + 1) / 2), wide)
        assert np.trapezoid(density, x) / whole == pytest.approx(0.95, abs=0.001)


def test_curves_have_the_share_of_labels_or_the_number_in_the_rows_name_along_x(monkeypatch):
    drawn = {}
    monkeypatch.setattr(reproduce, "curves", lambda series, *labels: drawn.update(series=series, labels=labels))
    table = reproduce.TABLES["figure6"]
    reproduce.curve(table, {(row.name, column): {0: 1.0, 1: 3.0} for row in table.rows for column in table.columns})
    assert [point[0] for point in drawn["series"]["×2 DDeP"]] == pytest.approx([100 / 30, 12.5, 25, 100])
    assert drawn["series"]["×2 DDeP"][0][1:] == (2.0, pytest.approx(2 ** 0.5))
    table = reproduce.TABLES["figure5left"]
    reproduce.curve(table, {(row.name, "1%"): {0: 10.0 if "ADE" in row.name else 20.0} for row in table.rows})
    assert [point[0] for point in drawn["series"]["mean"]] == [0.1, 0.16, 0.22, 0.32, 0.45, 0.59]
    assert {point[1] for point in drawn["series"]["mean"]} == {15.0}


def test_figure_4_shows_the_image_and_both_kinds_of_noise_at_each_level():
    class Grey:
        def read(self, i):
            return {"image": torch.full((3, 64, 64), 128, dtype=torch.uint8)}

    panel = np.asarray(reproduce.noise_panel(Grey())).astype(float)
    deviation = [[panel[top + 5:top + 150, left + 5:left + 150].std() / 127.5 for left in range(6, 997, 166)] for top in (24, 190)]
    assert deviation[0][0] == deviation[1][0] == 0
    assert deviation[0][1:3] == pytest.approx([0.1, 0.23], rel=0.05)
    # Eq. 5: sqrt(1 - gamma) with gamma = 1 / (1 + sigma^2)
    assert deviation[1][1:3] == pytest.approx([0.1 / 1.01 ** 0.5, 0.23 / (1 + 0.23 ** 2) ** 0.5], rel=0.05)


# ------------------------------------------------------------------------------------------------ workers

FAKE = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
needs = [word for word in sys.argv if word.endswith("last.pt")]
assert all(map(os.path.exists, needs)), needs
if os.environ.get("FAIL") and "finetune" in sys.argv[0] and f"{os.sep}dep_" in out:
    sys.exit("finetune.py: error: a fault of this run")
while not all(os.path.exists(os.environ["RAN"] + "." + name) for name in os.environ.get("TOGETHER", "").split()):
    time.sleep(0.1)  # until these workers have begun
with open(os.environ["RAN"], "a") as file:
    file.write(f"{os.environ['WORKER']} {out}\\n")
time.sleep(float(os.environ.get("SECONDS", 0.02)))
os.makedirs(out, exist_ok=True)
open(os.path.join(out, "last.pt"), "w").close()
with open(os.path.join(out, "metrics.json.tmp"), "w") as file:
    json.dump({"miou": 0.5}, file)
os.replace(os.path.join(out, "metrics.json.tmp"), os.path.join(out, "metrics.json"))
"""


@pytest.fixture
def fake_stages(tmp_path):
    """Stages that only write down that they ran; the environment to run them in."""
    for stage in ("pretrain_encoder", "pretrain_decoder", "finetune"):
        (tmp_path / f"{stage}.py").write_text(FAKE)
    return {"RAN": str(tmp_path / "ran"), "WORKER": "here"}


@pytest.fixture
def worker(tmp_path, fake_stages):
    """worker(name, flag, ...) starts reproduce.py on fake stages in a process of its own."""
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reproduce, launch; reproduce.HERE = {str(tmp_path)!r}; reproduce.LOOK = 0.5; "
               "reproduce.prediction_grid = lambda *args: None; sys.argv[0] = 'reproduce.py'; "
               "import os; open(os.environ['RAN'] + '.' + os.environ['WORKER'], 'w').close(); launch.run_script(reproduce.main)")
    started = []

    def start(name, *flags, **environment):
        started.append(subprocess.Popen(
            [sys.executable, "-c", program, *map(str, flags), "--out", str(tmp_path / "out"), "--device", "cpu"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **fake_stages, "WORKER": name, **environment}))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def run_here(tmp_path, fake_stages, script, monkeypatch):
    """run_here(flag, ...) runs reproduce.py on fake stages, in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(reproduce, "HERE", str(tmp_path))
    monkeypatch.setattr(reproduce, "prediction_grid", lambda *args: None)
    for name, value in fake_stages.items():
        monkeypatch.setenv(name, value)
    return lambda *flags: script("reproduce", *flags, "--out", tmp_path / "out", "--device", "cpu", "--jobs", 4)


def ran(tmp_path):
    path = tmp_path / "ran"
    return [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []


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
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])

    def takes(text):
        claims = reproduce.Claims(grid)
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
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    owner, other = reproduce.Claims(grid), reproduce.Claims(grid)
    monkeypatch.setattr(reproduce.socket, "gethostname", lambda: "another machine")
    assert owner.take(run)
    monkeypatch.undo()
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
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
    one, two = reproduce.Claims(grid), reproduce.Claims(grid)
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
    claims = reproduce.Claims(grid)
    assert not claims.take(run) and not claims.mine and not list(tmp_path.rglob("claim-*"))


def test_the_last_line_of_a_run_is_of_its_last_attempt(tmp_path):
    output = tmp_path / "output.txt"
    output.write_text("finetune.py: error: of the first attempt\n")
    begins = output.stat().st_size
    assert reproduce.last_line(output, begins) == "no output"
    output.write_text(output.read_text() + "finetune.py: error: a full disk\nW1125 torchrun says more\n\n")
    assert reproduce.last_line(output, begins) == "finetune.py: error: a full disk"


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
        monkeypatch.setattr(reproduce, "gpus_of", lambda device: list(names))
        monkeypatch.setattr(reproduce.subprocess, "Popen", Process)
        return started

    return pretend


def test_pretraining_takes_as_many_gpus_as_its_batch_divides_over(tmp_path, gpus):
    for count, taken in ((1, 1), (2, 2), (3, 2), (6, 4), (8, 8)):
        gpus(*map(str, range(count)))
        grid = grid_of("table4", "shapes", "--no-sweep", "--out", tmp_path)
        counts = {run.name: reproduce.Worker(grid).processes(run) for run in grid.plan()[0]}
        assert counts["ddep_data_imagenet21k_gamma_0.95_width_3/pretrain_decoder"] == taken
        assert {name: n for name, n in counts.items() if n > 1 and "imagenet21k" not in name} == {}  # of shapes, batch 4


def test_gpus_are_not_kept_idle_for_a_pretraining_that_another_worker_has(tmp_path, gpus):
    started = gpus("0", "1")
    grid = grid_of("table6", "--no-sweep", "--out", tmp_path)
    runs, _ = grid.plan()
    for run in runs:
        if run.batch > 1:
            claim_file(reproduce.Claims(grid), run, "elsewhere 1\n")
    worker = reproduce.Worker(grid)
    assert worker._start(runs) and [names for _, names in started] == ["0", "1"]
    name, active = next(iter(worker.running.items()))
    active.process.returncode = 0
    finish(grid, active.run)
    worker.running[name] = active._replace(commands=[])  # the evaluation is done, too
    assert worker._ended() and worker._start(runs) and [names for _, names in started] == ["0", "1", "0"]


def test_a_worker_goes_on_where_another_finishes_the_last_candidate_between_its_plan_and_its_start(tmp_path):
    grid = grid_of("table5", "--scale", "small", "--out", tmp_path)
    other = grid_of("table5", "--scale", "small", "--out", tmp_path)
    work = reproduce.Worker(grid).work()
    _, unknown = next(work)
    for run in other.plan()[0]:
        finish(other, run)
    assert unknown == 8 and next(work)[1] == 0  # it does not return: the repeats are known now
    work.close()


def test_pretraining_takes_all_gpus_and_each_fine_tuning_one(tmp_path, gpus):
    started = gpus("2", "5")
    grid = grid_of("table4", "--no-sweep", "--out", tmp_path)
    worker = reproduce.Worker(grid)
    runs, _ = grid.plan()
    worker._start(runs)
    (command, names), = started
    assert names == "2,5" and command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert command[5] == os.path.join(reproduce.HERE, "pretrain_decoder.py")
    for run in runs[:2]:
        finish(grid, run)
    worker, started[:] = reproduce.Worker(grid), []
    worker._start(runs)
    assert [(os.path.basename(command[1]), names) for command, names in started] == [("finetune.py", "2"), ("finetune.py", "5")]


def test_a_pretraining_that_runs_under_a_torchrun_of_the_users_is_waited_for(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "SILENT", 0)
    (tmp_path / "pretrain_decoder.py").write_text(
        "import os, sys\n"
        "if os.path.exists(os.environ['RAN'] + '.elsewhere'):\n"
        "    os.remove(os.environ['RAN'] + '.elsewhere')\n"
        "    sys.exit('pretrain_decoder.py: error: out: another run is writing there (process 1 on node2); wait for its end')\n" + FAKE)
    (tmp_path / "ran.elsewhere").touch()
    status, _, errors = run_here("shapes", "--repeats", 1)
    assert status == 0 and len(ran(tmp_path)) == 3 + 8, errors


def test_an_evaluation_that_left_images_out_is_no_score(tmp_path):
    """evaluate.py writes its scores and ends with status 2 where images cannot be read."""
    grid = grid_of("table4", "--no-sweep", "--out", tmp_path)
    run = next(run for run in grid.plan()[0] if run.result != "metrics.json")
    os.makedirs(grid.path(run.name, "evaluate"))
    worker = reproduce.Worker(grid)
    assert worker.claims.take(run)
    output = tmp_path / "runs" / run.name / "output.txt"
    output.write_text("evaluate.py: error: 3 of 5105 images cannot be read; the scores are of the others\n")
    finish(grid, run)
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    ended.wait()
    worker.running[run.name] = reproduce.Active(run, [None], ended, [], 0)
    assert worker._ended() and "3 of 5105 images" in worker.failed[run.name]
    assert not grid.finished(run)


def test_the_page_keeps_all_repeats_and_the_rates_of_earlier_commands(run_here, tmp_path):
    def scores():
        return {name: len(runs) for name, runs in json.loads((tmp_path / "out" / "results.json").read_text()).items()}

    for flags in (("table5", "--scale", "small", "--no-sweep"), ("table4", "--scale", "small")):
        assert run_here(*flags)[0] == 0
    assert scores()["table5"] == 8 and scores()["table4"] == 12
    kept = [path.parent.name for path in (tmp_path / "out").rglob("last.pt") if path.parent.name.startswith("shapes")]
    assert len(kept) == 4 + 6 and all("seed_0" in name for name in kept)  # of fine-tunings the first seed's weights
    assert not list((tmp_path / "out").rglob("claim-*")) and not list((tmp_path / "out").glob("*.tmp"))
    assert run_here("table5", "--scale", "small", "--no-sweep", "--repeats", 1)[0] == 0
    assert scores()["table5"] == 8 and scores()["table4"] == 12
    listed = run_here("list", "--scale", "small")[1]
    assert "table5        Table 5: beside other methods; Cityscapes: 8 of 8" in listed and "12 of 12" in listed


def test_the_page_keeps_the_tables_of_earlier_commands(run_here, tmp_path):
    for table in ("table5", "figure4", "figure3"):
        assert run_here(table, "--scale", "small", "--no-sweep")[0] == 0
    page = (tmp_path / "out" / "results.md").read_text()
    titles = [line.removeprefix("## ").split(":")[0] for line in page.splitlines() if line.startswith("## ")]
    # Tables 1 and 2 share their 1/4 = 25 % with Figure 3, Figure 6 its x2 DDeP with Table 5
    assert titles == ["Table 1", "Table 2", "Figure 3", "Figure 4", "Figure 6", "Table 5"]
    assert "| ×2 DDeP | 50.0 ± 0.0 (2); 80.91 |" in page and "(figure4_noise.png)" in page and "(figure3_curve.png)" in page


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("flags, words", [
    (["table8"], "table8: no such table; expected shapes, table1, table2"),
    (["list", "table1"], "list: no such table"),
    (["table6"], "table6 needs imagenet21k; pass --imagenet21k DIR"),
    (["table6", "--imagenet21k", "."], "table6 needs pascal_context; pass --pascal-context DIR"),
    (["table6", "--imagenet21k", "nowhere", "--pascal-context", "."], "--imagenet21k nowhere: no such folder"),
    (["figure4", "--imagenet21k", "nowhere"], "--imagenet21k nowhere: no such folder"),
    (["shapes", "--scale", "small"], "shapes is small without it"),
    (["shapes", "--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    (["table4", "--imagenet21k", ".", "--pascal-context", "."], "expected VOCdevkit/VOC2010")])
def test_a_mistake_is_one_line_that_says_what_to_do(flags, words, script, monkeypatch):
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    status, _, err = script("reproduce", *flags)
    assert status == 2 and words in err and len(err.splitlines()) == 1


def test_a_folder_of_another_scale_or_other_steps_is_refused(script, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"scale": "small", "steps": [300, 1200, 200]}))
    for flags in (["table4"], ["table4", "--scale", "small", "--steps", 2, 2, 2]):
        status, _, err = script("reproduce", *flags, "--dry-run", "--out", tmp_path)
        assert status == 2 and "holds a run with other flags" in err
    status, out, _ = script("reproduce", "list", "--out", tmp_path)  # takes it as it is
    assert status == 0 and "table4        Table 4" in out and "0 of 12" in out
    for content in ({"scale": "paper", "steps": None, "sweeps": 7}, {"scale": "paper", "steps": None, "sweeps": {"shapes": []}},
                    {"scale": "large", "steps": None}, {}, {"scale": "small", "steps": "abc"}):
        (tmp_path / "args.json").write_text(json.dumps(content))
        status, _, err = script("reproduce", "list", "--out", tmp_path)
        assert status == 2 and "not written by this program" in err and len(err.splitlines()) == 1


def test_a_result_without_a_score_is_named(script, tmp_path):
    grid = grid_of("shapes", "--out", tmp_path)
    run = next(run for run in grid.plan()[0] if "labels" in run.name)
    finish(grid, run)
    path = grid.path(run.name, "metrics.json")
    for content in ('{"miou"', '{"loss": 1}', '{"miou": "x"}', '{"miou": NaN}', '{"miou": -3}', '{"miou": [1]}'):
        with open(path, "w") as file:
            file.write(content)
        status, _, err = script("reproduce", "list", "--out", tmp_path)
        assert status == 2 and path in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ for real


def test_a_table_can_be_stopped_and_runs_everything_once_and_reports_what_was_measured(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "table5", "--scale", "small", "--no-sweep", "--repeats", "1",
               "--steps", "2", "2", "2", "--out", str(tmp_path)]

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}

    stopped = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not times():
        assert stopped.poll() is None
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75
    before = times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert before.items() <= times().items() and len(times()) == 2 + 4  # none was made again, all are there
    results = {run["column"]: run["miou"] for run in json.loads((tmp_path / "results.json").read_text())["table5"]}
    folder = tmp_path / "runs" / "ddep_data_shapes_objects_gamma_0.95_width_0.25_lr_1e-3"
    texts = []
    for column in ("100%", "1/4", "1/8", "1/30"):
        run = f"shapes{'' if column == '100%' else '_fraction_' + column.replace('/', '-')}_seed_0_lr_1e-3"
        miou = json.loads((folder / run / "metrics.json").read_text())["miou"]
        assert results[column] == pytest.approx(miou)
        texts.append(f"{100 * miou:.1f} (1)")
    page = (tmp_path / "results.md").read_text()
    row = "| ×2 DDeP | {}; 80.91 | {}; 76.86 | {}; 73.81 | {}; 64.75 |".format(*texts)
    assert row in page and row in done.stdout
    assert "table5_predictions.png" in page and Image.open(tmp_path / "table5_predictions.png").width > 300
