"""reproduce.py: the numbers of the paper, the commands of its tables, what runs and when."""
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import reproduce

COLUMNS = {"table1": "100% 1/4 1/8 1/30", "table2": "100% 1/4 2% 1%", "figure5": "100% 10% 5% 1%",
           "table3": "100% 10% 5%", "table4": "100% 20% 10%", "figure6": "100% 1/4 1/8 1/30",
           "table5": "100% 1/4 1/8 1/30", "table6": "100% 20% 10% 5% 1%", "figure7": "100% 20% 10% 5% 1%",
           "table7": "100% 20% 10% 5% 1%"}
NAMES = {"None": "No pretraining", "Sup": "Supervised", "gamma ~ U(0.9, 0.95)": "gamma in U(0.9, 0.95)",
         "fixed gamma": "gamma = 0.95", "Pascal VOC": "from Pascal VOC", "fine & coarse": "fine and coarse"}


def page():
    """{table: [(the end of a row's name, its numbers), ...]} of paper_tables.md, without other papers'."""
    text = (ROOT / "tests" / "paper_tables.md").read_text().replace("gamma = 0.95 ", "fixed gamma ")
    tables = r"\*\*(Table \d|Figure 5 right|Figure [67])\*\*(.*?)(?=\*\*(?:Table|Figure)|The paper disagrees)"
    found = {}
    for title, body in re.findall(tables, text, re.S):
        for line in re.findall(r"^- (.*)$", body, re.M):
            for name, numbers in re.findall(r"([^;]*?):? ((?:\d+\.\d+(?: |$|(?=;))){3,})", line):
                name = re.split(r": |, (?=s)", name.strip())[-1]
                found.setdefault(title.lower().replace(" ", "").removesuffix("right"), []).append(
                    (NAMES.get(name, name), tuple(map(float, numbers.split()))))
    return {**found, "table5": [("DDeP", (80.91, 76.86, 73.81, 64.75))]}  # which the page names in words


def cells(*flags):
    words = [*map(str, flags), "--out", "nowhere", "--dry-run"]
    return list(reproduce.cells(reproduce.parse_arguments(words)))


STAGE = """import json, os, shlex, sys
out, words = sys.argv[2], [os.path.basename(sys.argv[0]), *sys.argv[1:]]
print(shlex.join(words), file=open(os.path.dirname(sys.argv[0]) + "/commands", "a"))
fails = os.path.dirname(sys.argv[0]) + "/fails"
if os.path.exists(fails) and open(fails).read() in words:
    print("error: step 3: the loss, nan, " + "is not finite\\n\\r 5%|" * ("1e-4" in words), file=sys.stderr)
    sys.exit(2)
open(out + "/last.pt", "w").close()
seed = int(out.rpartition("_")[2]) if "--seed" in words else 0
score = 0.5 + 0.001 * seed + 0.2 * ("3e-5" in words) + 0.01 * seed * ("pretrain" in str(words))
json.dump({"miou": score}, open(out + "/metrics.json", "w"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Stages that are done at once, better at a rate or decay of 3e-5; fake() -> the commands that ran."""
    for name in ("pretrain_encoder", "pretrain_decoder", "finetune"):
        (tmp_path / f"{name}.py").write_text(STAGE)
    (tmp_path / "commands").touch()
    monkeypatch.setattr(reproduce, "HERE", str(tmp_path))
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 0)
    return lambda: commands_in((tmp_path / "commands").read_text())


def commands_in(text):
    """[[script, word, ...], ...] of lines of commands."""
    lines = [shlex.split(line) for line in text.splitlines()]
    return [line[next(i for i, word in enumerate(line) if word.endswith(".py")):] for line in lines]


def test_every_number_of_the_papers_tables_is_a_cell():
    pages = page()
    assert set(pages) == set(COLUMNS) == set(reproduce.TABLES) - {"shapes"}
    assert sum(len(row) for rows in pages.values() for _, row in rows) == 163 + 4
    for name, rows in pages.items():
        table = reproduce.TABLES[name]
        assert table.columns == tuple(COLUMNS[name].split()) and len(table.rows) == len(rows)
        ours = {key: tuple(float(n.strip("*")) for n in row.paper.split()) for key, row in table.rows.items()}
        for theirs, numbers in rows:
            assert any(key.endswith(theirs) and row == numbers for key, row in ours.items()), theirs


def test_labels_are_their_share_of_the_data_and_repeats_those_of_5_1():
    for data, images in (("cityscapes", 2975), ("pascal_context", 4998), ("ade20k", 20210)):
        for column, labels in reproduce.LABELS[data].items():
            assert abs(labels - eval(column.replace("%", "/100")) * images) < 1, (data, column)
    repeats = {(name, column): len(repeats) for name, _, column, _, repeats in cells("all", "--no-sweep")}
    for name in ("table6", "figure7", "table7"):
        assert [repeats[name, column] for column in COLUMNS[name].split()] == [10, 5, 10, 10, 10]
    assert [repeats["figure6", column] for column in COLUMNS["figure6"].split()] == [10, 4, 6, 10]


@pytest.mark.parametrize("flags", [["all", "--no-sweep", "--repeats", 1], ["table7", "table4"], ["shapes"]])
def test_the_stages_take_every_command_with_what_its_row_says(flags):
    pretrainings = set()
    for name, key, column, sweep, repeats in cells(*flags):
        data = reproduce.TABLES[name].rows[key].data or reproduce.TABLES[name].data
        for runs in sweep + repeats:
            parsed = [importlib.import_module(run.script[:-3]).parse_arguments(run.words) for run in runs]
            args = network = parsed[-1]
            assert [args.out for args in parsed] == [run.out for run in runs]
            assert (args.data, args.labels) == (data, reproduce.LABELS[data].get(column))
            published = "imagenet1k" if name == "table7" else "imagenet21k"
            init, encoder = "none", f"{runs[0].out}/last.pt" if data == "shapes" else published
            if "Supervised" in key:
                init = encoder
            elif "No pretraining" not in key:
                network, is_dep = parsed[-2], name in ("table1", "table2") or "DeP" in key.split()
                init = f"{network.out}/last.pt"
                pretrainings.add(network.out)
                assert network.method == ("dep" if is_dep else "ddep")
                assert network.encoder_weights == (None if is_dep else encoder)
            assert args.init == init
            assert network.width == {"x2": 2, "x3": 3}.get("x3" if name == "table4" else key[:2])
            assert (network.encoder == "resnet50") == (name == "table7" and init != encoder)
    if flags[0] == "all":
        assert len(pretrainings) == 13 - 1  # paper_tables.md; Table 1's second row is taken for Table 2's DeP


def test_the_sweep_of_the_paper_covers_its_range_with_a_seed_that_no_repeat_has():
    for *_, sweep, repeats in cells("table6"):
        assert repeats == [] and len({runs[-1].out for runs in sweep}) == len(sweep) == 16
        words = [runs[-1].words for runs in sweep]
        assert {line[line.index("--seed") + 1] for line in words} == {"100"}
        for flag in ("--lr", "--weight-decay"):
            values = {float(line[line.index(flag) + 1]) for line in words}
            assert (min(values), max(values), len(values)) == (1e-5, 3e-4, 4)


def test_a_dry_run_prints_what_is_missing_and_the_program_runs_each_once(script, fake, tmp_path):
    flags = ["reproduce", "--out", tmp_path / "r", "--repeats", 2]
    status, out, _ = script(*flags, "--dry-run")
    printed = commands_in(out)
    assert status == 0 and not fake() and not (tmp_path / "r").exists() and len(printed) == 1 + (2 + 4) * 2
    status, out, err = script(*flags)
    assert status == 0 and sorted(fake()) == sorted(printed), err
    for commands in (printed, fake()):
        for i, words in enumerate(commands):
            finished = {f"{earlier[2]}/last.pt" for earlier in commands[:i]}
            assert all(word in finished for word in words if word.endswith("last.pt"))
    assert out.count("| 50.0 ± 0.1 (2)") == 2 == out.count("| 50.5 ± 0.8 (2)")  # 50, 50.1; 50, 51.1
    assert out.count("| 0.5 ± 0.5 (2)") == 2  # 0 and 1 in pairs
    assert {path.parent.name[-6:] for path in (tmp_path / "r").glob("shapes_*/last.pt")} == {"seed_0"}
    (Path(printed[-1][2]) / "metrics.json").unlink()
    assert script(*flags)[0] == 0 and fake()[len(printed):] == [printed[-1]]
    assert script(*flags, "--dry-run")[1] == ""


def test_shards_divide_the_fine_tunings(script, fake, tmp_path):
    flags = ["reproduce", "--out", tmp_path / "r", "--repeats", 1]
    whole = commands_in(script(*flags, "--dry-run")[1])
    printed = [commands_in(script(*flags, "--dry-run", "--shard", f"{i}/3")[1]) for i in (1, 2, 3)]
    assert sorted(sum(printed, [])) == sorted(whole[3:])
    assert script(*flags, "--shard", "1/1")[0] == 2 and len(fake()) == 1  # that which needs no pretraining
    shutil.rmtree(tmp_path / "r")
    for words in whole[:3]:
        Path(words[2]).mkdir(parents=True)
        for name in ("last.pt", "metrics.json"):
            (Path(words[2]) / name).write_text("{}")
    for i, commands in enumerate(printed, 1):
        before = len(fake())
        assert script(*flags, "--shard", f"{i}/3")[0] == 0 and len(commands) < 4
        assert sorted(fake()[before:]) == sorted(commands)


def test_a_run_that_fails_is_named_and_none_that_needs_it_is_begun(script, fake, tmp_path):
    (tmp_path / "fails").write_text("dep")
    status, out, err = script("reproduce", "--repeats", 1, "--out", tmp_path / "r")
    assert status == 2 and "--method dep" in out and err.count("error:") == 1
    assert len(fake()) == 1 + 2 + 3 and out.count("50.0 (1)") == 3  # the others ran


def test_the_best_candidate_is_repeated_one_that_diverges_has_0_and_no_other_failure_counts_so(
        script, fake, tmp_path, monkeypatch):
    flags = "reproduce table7 --repeats 1 --root imagenet21k=a pascal_context=b --out".split()
    table = reproduce.TABLES["table7"]
    rows = {key: table.rows[key] for key in ("Supervised", "DDeP")}  # two sweeps of 16
    monkeypatch.setitem(reproduce.TABLES, "table7", table._replace(columns=("100%",), rows=rows))
    (tmp_path / "fails").write_text("1e-4")
    status, out, err = script(*flags, tmp_path / "r")
    repeated = [words for words in fake() if words[2].endswith("seed_0")]
    assert status == 0 and len(repeated) == 2 and all("3e-5" in words for words in repeated), err
    assert len(fake()) == 1 + 2 * (16 + 1)
    assert out.count("70.0 (1)") == 2 and "80.0" not in out  # 80 is that of seed 100: it is in no table
    results = {path.parent.name: path.read_text() for path in (tmp_path / "r").glob("pascal*/metrics.json")}
    diverged = [name for name, text in results.items() if '"miou": 0.0' in text]
    assert len(diverged) == 2 * 7 and all("_1e-4" in name for name in diverged)  # 7 of 16 have it
    (tmp_path / "fails").write_text("100")  # the seed of the candidates, for another reason
    assert script(*flags, tmp_path / "other")[0] == 2


@pytest.mark.parametrize("gpus, data, many", [(0, "voc", 0), (1, "voc", 0), (2, "voc", 1), (2, "shapes", 0)])
def test_a_run_has_all_gpus(gpus, data, many, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **files: started.extend(command) or done)
    started, done = [], subprocess.CompletedProcess([], 0)
    assert reproduce.execute(reproduce.Run("finetune.py", str(tmp_path), ["--data", data]))
    assert (f"--nproc_per_node={gpus}" in started) == many and started[-2:] == ["--data", data]


def test_an_interrupt_is_one_line_ends_the_run_and_the_same_command_goes_on(script, fake, tmp_path):
    stages = list(tmp_path.glob("*.py"))
    for path in stages:
        path.write_text("import sys, time\nopen(sys.argv[2] + '/begun', 'w')\ntime.sleep(60)\n" + STAGE)
    shutil.copy(ROOT / "reproduce.py", tmp_path)
    command = [sys.executable, tmp_path / "reproduce.py", "--out", tmp_path / "r", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE,
                             start_new_session=True)
    at_once = min(3, reproduce.common.default_workers())
    while first.poll() is None and len([*tmp_path.glob("r/*/begun")]) < at_once:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    err = first.communicate(timeout=30)[1]
    assert first.returncode and err.count("interrupted") == err.count("\n") == 1 and not fake()
    for path in stages:
        path.write_text(STAGE)
    assert script("reproduce", *command[2:])[0] == 0 and len(fake()) == 1 + 2 + 4


@pytest.mark.parametrize("flags", ["list table1", "list --dry-run", "list --shard 1/2", "table8",
                                   "--root photos=a", "--root=voc=a table7", "--shard 0/4", "--shard 5/4"])
def test_a_mistake_is_one_line(flags, script, fake, tmp_path):
    status, _, err = script("reproduce", *flags.split(), "--out", tmp_path / "r")
    assert status == 2 and re.split("[ =]", flags)[0] in err and err.count("error:") == 1 and not fake()
