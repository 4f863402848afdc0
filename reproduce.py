"""Run and print the paper's tables, or a small comparison on the toy data.

    python reproduce.py        # the toy data
    python reproduce.py list   # all tables, with the results so far
    python reproduce.py table6 --root imagenet21k=DIR pascal_context=DIR

As in 5.1 each cell tries a grid of learning rates and weight decays with seed 100; the best mIoU wins.
Seeds 0, 1, ... then give the table; the toy data has no grid.
PAPER SILENT on the grid (here 4 x 4 values, 1e-5 to 3e-4) and on what a "task" is (here each cell).
PAPER SILENT on the images of that mIoU: here the validation images.
PAPER SILENT on what repeats share: here the pretraining (toy data: stage 1 alone), but no subset of labels.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import common
from common import UserError, say

# ---- The tables


class Row(NamedTuple):
    init: str           # none, supervised, or flags of pretrain_decoder.py
    paper: str = ""     # mIoU % of each column. *: see show()
    network: str = ""   # --width or --encoder, if not default
    data: str = ""      # if not Table.data


class Table(NamedTuple):
    title: str
    data: str
    columns: tuple
    rows: dict


DDEP = "--data imagenet21k --gamma 0.95"  # and the defaults of stage 2
# PAPER SILENT on "all Cityscapes images" (Table 2): here fine and coarse, as in Table 3
DEP = "--method dep --data cityscapes_coarse --epochs 6000"
DEP_SIGMA = f"{DEP} --sigma 0.8"  # 3.4. PAPER SILENT on Table 1: as Table 2
SIMPLE = "--data imagenet21k --sigma 0.2294"  # PAPER SILENT on sigma: that of gamma 0.95
# PAPER SILENT on the images of VOC: here all in JPEGImages
VOC, ADE, COARSE = (f"--data {data} --gamma 0.95" for data in ("voc", "ade20k", "cityscapes_coarse"))
RESNET = "--encoder resnet50"
PAIRS = (("DDeP", "Supervised"), ("DeP", "No pretraining"))  # equal fresh weights and labels
CITYSCAPES, FIVE = ("100%", "1/4", "1/8", "1/30"), ("100%", "20%", "10%", "5%", "1%")


def three(prefix, none, supervised, ddep, network=""):
    """The three rows that most tables compare."""
    return {f"{prefix}No pretraining": Row("none", none, network),
            f"{prefix}Supervised": Row("supervised", supervised, network),
            f"{prefix}DDeP": Row(DDEP, ddep, network)}


TABLES = {
    "shapes": Table("the toy data", "shapes", ("32 labels",), {
        "No pretraining": Row("none"),
        "Supervised": Row("supervised"),
        "DeP": Row("--method dep --data shapes --gamma 0.95"),
        "DDeP": Row("--data shapes --gamma 0.95")}),
    "table1": Table("predicting the image or the noise; DeP", "cityscapes", CITYSCAPES, {
        "predict x": Row(f"{DEP_SIGMA} --target image", "70.44 60.87 55.44 41.40"),
        "predict e": Row(DEP_SIGMA, "75.01* 67.26* 61.94 48.36")}),
    "table2": Table("denoising the whole network", "cityscapes", ("100%", "1/4", "2%", "1%"), {
        "No pretraining": Row("none", "63.47 39.63 21.23 18.52"),
        "Supervised": Row("supervised", "80.36 75.55 41.33 35.51"),
        "DeP": Row(DEP_SIGMA, "77.14* 68.87* 42.79 37.55")}),
    "figure5": Table("at the right: simple or scaled noise", "pascal_context", ("100%", "10%", "5%", "1%"), {
        "Pascal Context, simple": Row(SIMPLE, "59.64 44.70 39.14 18.05"),
        "Pascal Context, scaled": Row(DDEP, "60.00* 48.27* 41.93* 19.69*"),
        "ADE20K, simple": Row(SIMPLE, "48.88 34.21 24.07 9.17", data="ade20k"),
        "ADE20K, scaled": Row(DDEP, "48.97* 34.99* 26.86* 10.80*", data="ade20k")}),
    "table3": Table("the images of decoder pretraining", "pascal_context", ("100%", "10%", "5%"), {
        "Pascal Context, from Pascal VOC": Row(VOC, "60.13 49.95 44.30"),
        "Pascal Context, from ImageNet-21k": Row(DDEP, "60.57* 50.61* 45.13*"),
        "ADE20K, from ADE20K": Row(ADE, "48.92 36.14 28.49", data="ade20k"),
        "ADE20K, from ImageNet-21k": Row(DDEP, "49.37* 37.14* 29.74*", data="ade20k"),
        "Cityscapes, from fine and coarse": Row(COARSE, "80.53 72.67 62.23", data="cityscapes"),
        "Cityscapes, from ImageNet-21k": Row(DDEP, "80.72 73.21 66.51", data="cityscapes")}),
    "table4": Table("fixed or random gamma; x3", "pascal_context", ("100%", "20%", "10%"), {
        "gamma in U(0.9, 0.95)": Row("--data imagenet21k --gamma 0.9 0.95", "59.71 52.53 49.23", "--width 3"),
        "gamma = 0.95": Row(DDEP, "59.97* 53.36* 49.84*", "--width 3")}),
    # PAPER SILENT on DeP here but for scaled noise: gamma 0.95, images and length of Table 2
    "figure6": Table("Cityscapes", "cityscapes", CITYSCAPES, {
        **three("x1 ", "63.47 39.63 34.74 25.79", "80.36 75.55 72.56 54.72", "80.72 76.38 73.21 64.48"),
        "x1 DeP": Row(f"{DEP} --gamma 0.95", "79.07 74.68 70.36 61.79"),
        **three("x2 ", "62.25 37.72 33.73 24.93", "80.50 75.57 72.84 60.36",
                "80.91 76.86 73.81 64.75", "--width 2")}),
    "table5": Table("the row of this paper", "cityscapes", CITYSCAPES, {
        "x2 DDeP": Row(DDEP, "80.91 76.86 73.81 64.75", "--width 2")}),
    "table6": Table("Pascal Context, with Figure 1", "pascal_context", FIVE, {
        **three("x1 ", "16.78 7.21 5.69 4.53 2.57", "59.74 42.15 36.28 30.86 12.45",
                "60.95* 52.81 48.64* 42.20* 19.90*"),
        **three("x3 ", "17.22 7.32 6.16 4.97 2.95", "61.25 51.49 44.71 37.52 12.53",
                "62.04* 55.28* 51.55* 46.29 24.69", "--width 3")}),
    "figure7": Table("ADE20K", "ade20k", FIVE, {
        **three("x1 ", "19.43 5.26 4.07 2.80 1.87", "48.92 40.77 23.05 10.84 5.14",
                "49.96* 42.76 35.75* 27.29* 10.77*"),
        **three("x3 ", "16.67 5.88 4.20 2.91 1.90", "49.60 41.65 33.04 16.40 5.31",
                "50.88 43.26 39.01 32.30 16.30", "--width 3")}),
    "table7": Table("ResNet-50", "pascal_context", FIVE,
        three("", "19.01 8.46 6.72 5.30 2.73", "45.21 24.55 19.27 14.97 6.09",
              "46.07 30.38 26.39 21.12 9.63", RESNET)),
}
# PAPER SILENT on 10% of Cityscapes: here 298 images; Table 3's 73.21 is Figure 6's at 1/8
LABELS = {  # images of a column, but 100%
    "shapes": {"32 labels": 32},
    "cityscapes": {"1/4": 744, "1/8": 372, "10%": 298, "5%": 149, "1/30": 100, "2%": 60, "1%": 30},
    "pascal_context": {"20%": 1000, "10%": 500, "5%": 250, "1%": 50},
    "ade20k": {"20%": 4042, "10%": 2021, "5%": 1010, "1%": 202},
}
SETS = ("imagenet21k", "voc", "cityscapes", "pascal_context", "ade20k")
# Repeats (5.1), if not ten. PAPER SILENT on Cityscapes at other shares
REPEATS = {("cityscapes", "1/8"): 6, ("cityscapes", "1/4"): 4, ("pascal_context", "20%"): 5,
           ("ade20k", "20%"): 5, ("shapes", "32 labels"): 4}
GRID = [f"--lr {rate} --weight-decay {decay}"
        for rate, decay in product(("1e-5", "3e-5", "1e-4", "3e-4"), repeat=2)]
SWEEP_SEED = 100
HERE = Path(__file__).parent


# ---- Runs


class Run(NamedTuple):
    script: str
    out: str
    words: list  # its flags, --out too

    def result(self):
        """metrics.json; None until the run is finished."""
        path = Path(self.out, "metrics.json")
        return json.loads(path.read_text()) if path.exists() else None

    def can_start(self):
        starts = [word for word in self.words if word.endswith("last.pt")]
        return all(Path(start).with_name("metrics.json").exists() for start in starts)


def run_of(args, script, title, words):
    folder = f"{args.out}/{'_'.join(title.replace('--', '').replace('/', '-').split())}"
    if "shapes" in words:
        words = [*words, "--device", "cpu"]
    return Run(script, folder, ["--out", folder, *words])


def root_of(args, data):
    name = data.removesuffix("_coarse")
    if data != "shapes" and name not in args.roots and not (args.list or args.dry_run):
        raise UserError(f"--root {name}=DIR is missing")
    return [] if data == "shapes" else ["--root", args.roots.get(name, f"{name.upper()}_DIR")]


def runs_of(args, row, data, column, seed, rates=""):
    """The runs before a fine-tuning, in order, and itself. rates: more flags of it."""
    runs, init, network = [], row.init, row.network.split()
    encoder = "imagenet1k" if row.network == RESNET else "imagenet21k"
    if data == "shapes":
        runs.append(run_of(args, "pretrain_encoder.py", "encoder", ["--data", data]))
        encoder = f"{runs[-1].out}/last.pt"
    if init == "supervised":
        init = encoder
        if row.network == RESNET:
            network = []  # the weights say so
    elif init != "none":
        words = [*init.split(), *network]
        words += root_of(args, words[words.index("--data") + 1])
        if "--method dep" not in init:
            words += ["--encoder-weights", encoder]
        title = f"pretrain {init} {row.network}"
        if data == "shapes":  # the fine-tuning's: both draw the same fresh weights
            words += ["--seed", str(seed)]
            title += f" seed {seed}"
        runs.append(run_of(args, "pretrain_decoder.py", title, words))
        init, network = f"{runs[-1].out}/last.pt", []
    words = ["--data", data, *root_of(args, data), "--init", init, *network]
    if column in LABELS[data]:
        words += ["--labels", str(LABELS[data][column])]
    words += ["--seed", str(seed), *rates.split()]
    title = f"{data} {column} {row.init} {row.network} {rates} seed {seed}"
    return [*runs, run_of(args, "finetune.py", title, words)]


def best_rates(sweep):
    """GRID's candidate with the best mIoU; None until all are finished."""
    results = [runs[-1].result() for runs in sweep]
    if None in results:
        return None
    scores = [result["miou"] or 0 for result in results]
    return GRID[scores.index(max(scores))]


def cells(args):
    """For each cell of the chosen tables: (table, row, column, sweep, repeats).

    The last two list what runs_of returns; there are no repeats until the sweep is finished.
    """
    for name in args.tables:
        for (key, row), column in product(TABLES[name].rows.items(), TABLES[name].columns):
            data = row.data or TABLES[name].data
            sweep, repeats, rates = [], [], ""
            if args.sweep and name != "shapes":
                sweep = [runs_of(args, row, data, column, SWEEP_SEED, candidate) for candidate in GRID]
                rates = best_rates(sweep)
            if rates is not None:
                count = min(args.repeats, REPEATS.get((data, column), 10))
                repeats = [runs_of(args, row, data, column, seed, rates) for seed in range(count)]
            yield name, key, column, sweep, repeats


def missing_runs(args):
    """The unfinished runs, each once, pretrainings first; with --shard its fine-tunings alone."""
    every = {run.out: run for *_, sweep, repeats in cells(args) for runs in sweep + repeats for run in runs}
    missing = [run for run in every.values() if run.result() is None]
    if args.shard:  # by name, whatever else is finished
        part, parts = args.shard
        missing = [run for run in missing if run.script == "finetune.py"
                   and zlib.crc32(Path(run.out).name.encode()) % parts == part - 1]
    return sorted(missing, key=lambda run: run.script, reverse=True)  # stages in order


def execute(run):
    """Run it, with an output.txt; return whether it succeeded."""
    say(f"now {run.out}")
    gpus, output, environment = torch.cuda.device_count(), Path(run.out, "output.txt"), {**os.environ}
    command = [sys.executable]
    if "shapes" in run.words:
        environment["OMP_NUM_THREADS"] = "1"
    elif gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    Path(run.out).mkdir(parents=True, exist_ok=True)
    with open(output, "w") as file:
        command += [f"{HERE}/{run.script}", *run.words]
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    diverged = status and common.NOT_FINITE in output.read_text(errors="replace")
    if diverged and run.out.endswith(f"seed_{SWEEP_SEED}"):
        common.save(f"{run.out}/metrics.json", {"miou": 0.0})  # not to be chosen
    elif status:
        return False
    if run.script == "finetune.py" and not run.out.endswith("seed_0"):
        Path(run.out, "last.pt").unlink(missing_ok=True)  # there are more than a thousand
    return True


# ---- Results


def summary(scores, error=False):
    """Mean ± standard deviation, or standard error, and how many scores."""
    if not scores:
        return "-"
    spread = ""
    if len(scores) > 1:
        spread = f" ± {statistics.stdev(scores) / (len(scores) ** 0.5 if error else 1):.1f}"
    return f"{statistics.mean(scores):.1f}{spread} ({len(scores)})"


def show(args):
    """Our summaries beside the paper's numbers; of the toy data also differences at equal seeds."""
    measured = {}
    for name, key, column, _, repeats in cells(args):
        results = enumerate(runs[-1].result() for runs in repeats)
        measured[name, key, column] = {seed: 100 * (found["miou"] or 0) for seed, found in results if found}
    if args.tables != ["shapes"]:
        say("* The paper has other numbers for the same run, too (13 runs)")
    for name in args.tables:
        table = TABLES[name]
        say(f"\n{name}: {table.title}; mIoU %, ours (runs) / the paper's\n")
        say(f"| | {' | '.join(table.columns)} |\n|---{'|---' * len(table.columns)}|")
        for key, row in table.rows.items():
            texts = [summary(measured[name, key, column].values()) for column in table.columns]
            if row.paper:
                texts = [f"{ours} / {paper}" for ours, paper in zip(texts, row.paper.split())]
            say(f"| {key} | {' | '.join(texts)} |")
        for first, second in PAIRS if name == "shapes" else ():
            texts = []
            for column in table.columns:
                left, right = measured[name, first, column], measured[name, second, column]
                differences = [left[seed] - right[seed] for seed in left if seed in right]
                texts.append(summary(differences, error=True))
            say(f"| {first} - {second}, ± standard error | {' | '.join(texts)} |")


# ---- The program


def shard(text):
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError
    return part, parts


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("tables", nargs="*", default=["shapes"], metavar="TABLE", help=f"{', '.join(TABLES)}; all; or list")
    add("--root", nargs="+", default=[], metavar="SET=DIR", help="where the data sets lie")
    add("--out", default="results", metavar="DIR", help="where all runs go (%(default)s)")
    add("--no-sweep", dest="sweep", action="store_false", help="the rates of finetune.py")
    add("--repeats", type=common.number(int, 1), default=10, help="at most so many of each fine-tuning")
    add("--shard", type=shard, metavar="I/N", help="only part I (from 1) of N of the fine-tunings")
    add("--dry-run", action="store_true", help="print the missing commands, run nothing")
    args = parser.parse_args(argv)
    args.list, args.roots = args.tables == ["list"], dict(pair.partition("=")[::2] for pair in args.root)
    if args.list and (args.shard or args.dry_run):
        parser.error("list runs nothing; drop --shard and --dry-run")
    if args.tables in (["all"], ["list"]):
        args.tables = [name for name in TABLES if name != "shapes" or args.list]
    wrong = {*args.tables} - {*TABLES} or {*args.roots} - {*SETS}
    if wrong:
        parser.error(f"{wrong}: expected tables of {', '.join(TABLES)}, --root SET=DIR of {', '.join(SETS)}")
    return args


def main():
    args, failed = parse_arguments(), set()
    if args.dry_run:
        for run in missing_runs(args):
            start = "python" if "shapes" in run.words else "torchrun --nproc_per_node=8"
            say(f"{start} {run.script} {shlex.join(run.words)}")
        return
    while not args.list:
        missing = missing_runs(args)
        todo = [run for run in missing if run.can_start() and run.out not in failed]
        say(f"{len(missing)} runs are missing, {len(todo)} can start")
        if not todo:
            break
        is_toy = all("shapes" in run.words for run in todo)
        pool = ThreadPoolExecutor(common.default_workers() if is_toy else 1)  # toy: one a core, up to 8
        try:
            for run, succeeded in zip(todo, pool.map(execute, todo)):
                if not succeeded:
                    say(f"failed: {run.script} {shlex.join(run.words)}; see {run.out}/output.txt")
                    failed.add(run.out)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C none is begun
    show(args)
    if not args.list and missing and not failed:
        raise UserError(f"{len(missing)} runs wait for those that --dry-run prints without --shard")
    if failed:
        raise UserError(f"{len(failed)} runs failed, see above; mend the cause and repeat the command")


if __name__ == "__main__":
    common.run(main)
