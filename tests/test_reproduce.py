"""reproduce.py: every cell of the paper is there, tables share their runs, rates are chosen by hand-checked rules."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, cell_of, finish, grid_of, reproduce_arguments
from PIL import Image

import report
import reproduce

DATA = ("--imagenet21k", "--cityscapes", "--pascal-context", "--ade20k", "--voc")


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


def test_micro_batch_is_of_decoder_pretraining_alone_and_names_no_run():
    (_, plain), (_, small) = commands_of("table4", "--no-sweep"), commands_of("table4", "--no-sweep", "--micro-batch", 16)
    assert plain.keys() == small.keys()
    for name, run in small.items():
        added = ["--micro-batch", "16"] if name.endswith("pretrain_decoder") else []
        assert [command + added * (i == 0) for i, command in enumerate(plain[name].commands)] == run.commands


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
    small, paper = reproduce_arguments("all", "--scale", "small"), reproduce_arguments("all", "--dry-run")
    for name, table in paper.tables.items():
        ours = small.tables[name]
        assert ours.columns == table.columns and [row.name for row in ours.rows] == [row.name for row in table.rows]
        assert not reproduce.folders_of(ours)
        assert len({(row.init, row.network) for row in ours.rows}) >= len({(row.init, row.network) for row in table.rows}) - 3


def test_the_lengths_of_figure_3_stay_in_proportion_with_steps_of_ones_own():
    rows = grid_of("figure3", "--steps", 100, 600, 50).tables["figure3"].rows
    assert [row.init.rpartition(" --steps ")[2] for row in rows] == ["10", "30", "100", "300", "600"]
    commands = [run.commands[0] for run in grid_of("figure3", "--steps", 100, 600, 50).plan()[0] if "pretrain" in run.name]
    assert [command.count("--steps") for command in commands] == [1] * 5 and not any("--epochs" in command for command in commands)


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
    lines = report.sweep_markdown(grid, "shapes").splitlines()
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


# ------------------------------------------------------------------------------------------------ several programs


def test_a_table_that_another_program_began_meanwhile_is_shown_with_its_rates(tmp_path):
    args = reproduce_arguments("table5", "--scale", "small", "--out", tmp_path)
    sweeps = dict.fromkeys(args.known, True)
    grid, shown = reproduce.Grid(args, args.tables, sweeps), []
    for _ in range(2):  # the candidates, then the repeats
        for run in grid.plan()[0]:
            finish(grid, run)
    theirs = {**sweeps, "table4": False, "table5": False}  # table5 is ours
    (tmp_path / "args.json").write_text(json.dumps({"scale": "small", "steps": [300, 1200, 200], "sweeps": theirs}))

    class Recorder:
        def __init__(self):
            self.grid = reproduce.Grid(args, args.known, sweeps)

        def update(self, final=False):
            shown.append((self.grid.sweeps["table4"], self.grid.sweeps["table5"]))

    reproduce.run_all(grid, Recorder())
    assert set(shown) == {(False, True)}


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
    folder = tmp_path / "runs" / "ddep_data_shapes_objects_gamma_0.95_width_0.3125_lr_1e-3"
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
