"""Every table of the paper is a command, and so is the same comparison on the toy data.

    python reproduce.py                                   # the comparison on the toy data
    python reproduce.py list                              # all tables, and what there is of them
    python reproduce.py table6 --dry-run                  # the commands that are missing of it
    python reproduce.py table6 --root imagenet21k=DIR pascal_context=DIR
    python reproduce.py table6 --root ... --shard 3/32    # a 32nd of its fine-tunings: for a Slurm array

A table is data, below: a row is how a network is initialised, a column how many labels it is fine-tuned on.
Tables share what they have in common, above all the pretrainings. A run with metrics.json is done: stop at
any time, the same command goes on.

Rates are chosen as in 5.1: each cell runs a grid of them on a seed of its own, whose score does not enter the
table, and takes the best. PAPER SILENT on the grid and on what a "task" is: here four by four values from
1e-5 to 3e-4, and a task is a cell. All repeats share one pretraining, as in the paper.
"""
import argparse
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product, zip_longest
from typing import NamedTuple

import torch
from tqdm import tqdm

import common
from common import UserError, say

# ---------------------------------------- The tables


class Row(NamedTuple):
    init: str           # none, supervised, or the flags of pretrain_decoder.py
    paper: tuple = ()   # mIoU %, for each column
    network: str = ""   # --width or --encoder, where they are not the paper's x1 and Hybrid-ViT
    data: str = ""      # where it is not the table's
    rates: dict = {}    # {column: flags of stage 2 and of stage 3}, where they have been chosen already


class Table(NamedTuple):
    title: str
    data: str
    columns: tuple
    rows: dict          # {name: Row, or the numbers of another paper}


DDEP = "--data imagenet21k --gamma 0.95"  # 100 epochs, batch 512, 224 px: the defaults of stage 2
DEP = "--method dep --data cityscapes_coarse --epochs 6000"
DEP_SIGMA = f"{DEP} --sigma 0.8"  # 3.4. PAPER SILENT on Table 1: as Table 2
SIMPLE = "--data imagenet21k --sigma 0.2294"  # PAPER SILENT: the same ratio of noise and image as gamma 0.95
RESNET = "--encoder resnet50"
CITYSCAPES, FIVE = ("100%", "1/4", "1/8", "1/30"), ("100%", "20%", "10%", "5%", "1%")


def three(prefix, none, supervised, ddep, network=""):
    """The three rows that most of the tables compare."""
    return {f"{prefix}No pretraining": Row("none", none, network),
            f"{prefix}Supervised": Row("supervised", supervised, network),
            f"{prefix}DDeP": Row(DDEP, ddep, network)}


TABLES = {
    "shapes": Table("The toy data", "shapes", ("8 labels", "32 labels"), {
        "No pretraining": Row("none", rates={
            "8 labels": ("", "--lr 2e-3 --weight-decay 1e-3"), "32 labels": ("", "--lr 4e-3")}),
        "Supervised": Row("supervised", rates={
            "8 labels": ("", "--lr 4e-3"), "32 labels": ("", "--lr 4e-3 --weight-decay 1e-3")}),
        "DeP": Row("--method dep --data shapes --gamma 0.95", rates={
            "8 labels": ("--lr 3e-3", "--lr 4e-3"), "32 labels": ("--lr 3e-3", "--lr 4e-3")}),
        "DDeP": Row("--data shapes --gamma 0.95", rates={
            "8 labels": ("--lr 1e-3", "--lr 2e-3"), "32 labels": ("--lr 3e-3", "--lr 4e-3")})}),
    "table1": Table("Table 1: predicting the image or the noise; DeP", "cityscapes", CITYSCAPES, {
        "predict x": Row(f"{DEP_SIGMA} --target image", (70.44, 60.87, 55.44, 41.40)),
        "predict e": Row(DEP_SIGMA, (75.01, 67.26, 61.94, 48.36))}),
    "table2": Table("Table 2: denoising the whole network", "cityscapes", ("100%", "1/4", "2%", "1%"), {
        "No pretraining": Row("none", (63.47, 39.63, 21.23, 18.52)),
        "Supervised": Row("supervised", (80.36, 75.55, 41.33, 35.51)),
        "DeP": Row(DEP_SIGMA, (77.14, 68.87, 42.79, 37.55))}),
    "figure5": Table("Figure 5 right: simple or scaled noise", "", ("100%", "10%", "5%", "1%"), {
        "Pascal Context, simple": Row(SIMPLE, (59.64, 44.70, 39.14, 18.05), data="pascal_context"),
        "Pascal Context, scaled": Row(DDEP, (60.00, 48.27, 41.93, 19.69), data="pascal_context"),
        "ADE20K, simple": Row(SIMPLE, (48.88, 34.21, 24.07, 9.17), data="ade20k"),
        "ADE20K, scaled": Row(DDEP, (48.97, 34.99, 26.86, 10.80), data="ade20k")}),
    "table3": Table("Table 3: the images of decoder pretraining", "", ("100%", "10%", "5%"), {
        "Pascal Context, from Pascal VOC": Row("--data voc --gamma 0.95", (60.13, 49.95, 44.30),
                                               data="pascal_context"),
        "Pascal Context, from ImageNet-21k": Row(DDEP, (60.57, 50.61, 45.13), data="pascal_context"),
        "ADE20K, from ADE20K": Row("--data ade20k --gamma 0.95", (48.92, 36.14, 28.49), data="ade20k"),
        "ADE20K, from ImageNet-21k": Row(DDEP, (49.37, 37.14, 29.74), data="ade20k"),
        "Cityscapes, from fine and coarse": Row("--data cityscapes_coarse --gamma 0.95",
                                                (80.53, 72.67, 62.23), data="cityscapes"),
        "Cityscapes, from ImageNet-21k": Row(DDEP, (80.72, 73.21, 66.51), data="cityscapes")}),
    "table4": Table("Table 4: fixed or random gamma; x3", "pascal_context", ("100%", "20%", "10%"), {
        "gamma in U(0.9, 0.95)": Row("--data imagenet21k --gamma 0.9 0.95", (59.71, 52.53, 49.23),
                                     "--width 3"),
        "gamma = 0.95": Row(DDEP, (59.97, 53.36, 49.84), "--width 3")}),
    # PAPER SILENT on DeP here but for scaled noise: gamma 0.95, the images and the length of Table 2
    "figure6": Table("Figure 6: Cityscapes", "cityscapes", CITYSCAPES, {
        **three("x1 ", (63.47, 39.63, 34.74, 25.79), (80.36, 75.55, 72.56, 54.72),
                (80.72, 76.38, 73.21, 64.48)),
        "x1 DeP": Row(f"{DEP} --gamma 0.95", (79.07, 74.68, 70.36, 61.79)),
        **three("x2 ", (62.25, 37.72, 33.73, 24.93), (80.50, 75.57, 72.84, 60.36),
                (80.91, 76.86, 73.81, 64.75), "--width 2")}),
    "table5": Table("Table 5: beside other methods", "cityscapes", CITYSCAPES, {
        "AdvSemSeg": (None, 62.3, 58.8, None), "s4GAN": (65.8, 61.9, 59.3, None),
        "DMT": (68.16, None, 63.03, 54.80), "ClassMix": (None, 63.63, 61.35, None),
        "CutMix": (None, 68.33, 65.82, 55.71), "PseudoSeg": (None, 72.36, 69.81, 60.96),
        "Sup. baseline of PC2Seg": (74.88, 73.31, 68.72, 56.09), "PC2Seg": (75.99, 75.15, 72.29, 62.89),
        "x2 DDeP": Row(DDEP, (80.91, 76.86, 73.81, 64.75), "--width 2")}),
    "table6": Table("Table 6 and Figure 1: Pascal Context", "pascal_context", FIVE, {
        **three("x1 ", (16.78, 7.21, 5.69, 4.53, 2.57), (59.74, 42.15, 36.28, 30.86, 12.45),
                (60.95, 52.81, 48.64, 42.20, 19.90)),
        **three("x3 ", (17.22, 7.32, 6.16, 4.97, 2.95), (61.25, 51.49, 44.71, 37.52, 12.53),
                (62.04, 55.28, 51.55, 46.29, 24.69), "--width 3")}),
    "figure7": Table("Figure 7: ADE20K", "ade20k", FIVE, {
        **three("x1 ", (19.43, 5.26, 4.07, 2.80, 1.87), (48.92, 40.77, 23.05, 10.84, 5.14),
                (49.96, 42.76, 35.75, 27.29, 10.77)),
        **three("x3 ", (16.67, 5.88, 4.20, 2.91, 1.90), (49.60, 41.65, 33.04, 16.40, 5.31),
                (50.88, 43.26, 39.01, 32.30, 16.30), "--width 3")}),
    "table7": Table("Table 7: ResNet-50", "pascal_context", FIVE, three(
        "", (19.01, 8.46, 6.72, 5.30, 2.73), (45.21, 24.55, 19.27, 14.97, 6.09),
        (46.07, 30.38, 26.39, 21.12, 9.63), RESNET)),
}
LABELS = {  # images of a column; all of 100%
    "shapes": {"8 labels": 8, "32 labels": 32},
    "cityscapes": {"1/4": 744, "1/8": 372, "10%": 298, "5%": 149, "1/30": 100, "2%": 60, "1%": 30},
    "pascal_context": {"20%": 1000, "10%": 500, "5%": 250, "1%": 50},
    "ade20k": {"20%": 4042, "10%": 2021, "5%": 1010, "1%": 202},
}
SETS = ("imagenet21k", "voc", "cityscapes", "pascal_context", "ade20k")
# Repeats (5.1), where they are not ten. PAPER SILENT on Cityscapes at other shares
REPEATS = {("cityscapes", "1/8"): 6, ("cityscapes", "1/4"): 4, ("pascal_context", "20%"): 5,
           ("ade20k", "20%"): 5, ("shapes", "8 labels"): 3, ("shapes", "32 labels"): 3}
SWEEP_SEED = 100
HERE = os.path.dirname(os.path.abspath(__file__))


def grid(row, data):
    """[(flags of stage 2, flags of stage 3), ...]: the candidates of the sweep."""
    if data != "shapes":
        twos, (rates, decays) = [""], [("1e-5", "3e-5", "1e-4", "3e-4")] * 2
    elif row.init.startswith("--"):  # six for each row
        twos, rates, decays = ["--lr 1e-3", "--lr 3e-3"], ("1e-3", "2e-3", "4e-3"), ("0",)
    else:
        twos, rates, decays = [""], ("1e-3", "2e-3", "4e-3"), ("0", "1e-3")
    return [(two, f"--lr {rate} --weight-decay {decay}") for two, rate, decay in product(twos, rates, decays)]


# ---------------------------------------- Runs. A run is a command, a list of words: SCRIPT --out DIR ...


def runs_of(args, row, data, column, seed, rates):
    """The runs of one fine-tuning, in order: what it needs, then itself. rates: flags of stages 2 and 3."""
    def out(*parts):
        return os.path.join(args.out, "_".join(" ".join(parts).replace("--", "").replace("/", "-").split()))

    def root(data):
        name = data.removesuffix("_coarse")
        return [] if data == "shapes" else ["--root", args.roots.get(name, f"{name.upper()}_DIR")]

    runs, init, network = [], row.init, row.network.split()
    encoder = "imagenet1k" if row.network == RESNET else "imagenet21k"
    if data == "shapes":  # stage 1
        encoder = os.path.join(out("encoder"), "last.pt")
        runs.append(["pretrain_encoder.py", "--out", out("encoder")])
    if init.startswith("--"):  # stage 2
        folder = out("pretrain", init, row.network, rates[0])
        words = [*init.split(), *network, *rates[0].split()]
        if "dep" not in words:
            words += ["--encoder-weights", encoder]
        images = words[words.index("--data") + 1]
        runs.append(["pretrain_decoder.py", "--out", folder, *words, *root(images)])
        init, network = os.path.join(folder, "last.pt"), []
    elif init == "supervised":
        init, network = encoder, network if "--width" in network else []
    labels = LABELS[data].get(column)
    return [*runs, ["finetune.py", "--out", out(data, column, row.init, row.network, *rates, f"seed {seed}"),
                    "--data", data, *root(data), "--init", init, *network,
                    *(["--labels", str(labels)] if labels else []), "--seed", str(seed), *rates[1].split()]]


def result(run):
    """The content of a finished run's metrics.json, else None."""
    path = os.path.join(run[2], "metrics.json")
    return json.loads(open(path).read()) if os.path.exists(path) else None


def can_start(run):
    """Whether the pretraining of a fine-tuning is finished."""
    init = run[run.index("--init") + 1]
    return not init.endswith("last.pt") or os.path.exists(os.path.join(os.path.dirname(init), "metrics.json"))


def cells(args):
    """For each cell of the chosen tables: (table's name, row's name, column, its sweep, its repeats).

    sweep: [(rates, runs of the candidate), ...]; repeats: [runs, ...], empty while the sweep is not finished.
    """
    for name in args.tables:
        table = TABLES[name]
        rows = [(key, row) for key, row in table.rows.items() if isinstance(row, Row)]
        for (key, row), column in product(rows, table.columns):
            data, sweep = row.data or table.data, []
            rates = row.rates.get(column, ("", ""))
            if args.sweep or (args.sweep is None and data != "shapes"):
                sweep = [(rates, runs_of(args, row, data, column, SWEEP_SEED, rates))
                         for rates in grid(row, data)]
                scores = [result(runs[-1]) for _, runs in sweep]
                best = max(range(len(sweep)), key=lambda i: (scores[i] or {}).get("miou", 0))
                rates = None if None in scores else sweep[best][0]
            repeats = min(args.repeats, REPEATS.get((data, column), 10)) if rates else 0
            yield name, key, column, sweep, [runs_of(args, row, data, column, seed, rates)
                                             for seed in range(repeats)]


def missing_runs(args):
    """The runs that are not finished, each once, pretrainings first."""
    every = {}
    for *_, sweep, repeats in cells(args):
        for runs in [*(runs for _, runs in sweep), *repeats]:
            every.update({run[2]: run for run in runs})
    scripts = ["pretrain_encoder.py", "pretrain_decoder.py", "finetune.py"]
    missing = [run for run in every.values() if result(run) is None]
    return sorted(missing, key=lambda run: scripts.index(run[0]))


def show(args):
    """Each table with our mean ± standard deviation (number of runs) beside the paper's number."""
    measured = {}
    for name, key, column, _, repeats in cells(args):
        done = [100 * result(runs[-1])["miou"] for runs in repeats if result(runs[-1])]
        if done:
            spread = f" ± {statistics.stdev(done):.1f}" if len(done) > 1 else ""
            measured[name, key, column] = f"{statistics.mean(done):.1f}{spread} ({len(done)})"
    for name in args.tables:
        table = TABLES[name]
        say(f"\n{name}: {table.title}; mIoU %, ours (runs) / the paper's\n")
        say(f"| | {' | '.join(table.columns)} |\n|---{'|---' * len(table.columns)}|")
        for key, row in table.rows.items():
            paper = row.paper if isinstance(row, Row) else row
            texts = [measured.get((name, key, column), "-") + (f" / {number:.2f}" if number else "")
                     for column, number in zip_longest(table.columns, paper)]
            say(f"| {key} | {' | '.join(texts)} |")


# ---------------------------------------- The program


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
    add("--sweep", action=argparse.BooleanOptionalAction,
        help="choose the rates (the default but for shapes), or take those in this file or of the scripts")
    add("--repeats", type=common.number(int, 1), default=10, help="at most so many of each fine-tuning")
    add("--shard", type=shard, metavar="I/N", help="part I (from 1) of N of the fine-tunings alone")
    add("--dry-run", action="store_true", help="print the commands that are missing, run nothing")
    args = parser.parse_args(argv)
    args.list, args.roots = args.tables == ["list"], dict(pair.partition("=")[::2] for pair in args.root)
    if args.tables in (["all"], ["list"]):
        args.tables = [name for name in TABLES if name != "shapes" or args.list]
    wrong = {*args.tables} - {*TABLES} or {*args.roots} - {*SETS}
    if wrong:
        parser.error(f"{wrong}: expected tables of {', '.join(TABLES)}, --root SET=DIR of "
                     f"{', '.join(SETS)}")
    return args


def start(run, gpus, threads, free):
    """Run a command and wait for it, its output in DIR/output.txt; returns its exit status."""
    os.makedirs(run[2], exist_ok=True)
    gpu, environment = free.get(), {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, os.path.join(HERE, run[0]), *run[1:]]
    if gpus and run[0] != "finetune.py":  # all of them
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    elif gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with open(os.path.join(run[2], "output.txt"), "a") as output:
        status = subprocess.run(words, env=environment, stdout=output, stderr=output).returncode
    free.put(gpu)
    if status:
        say(f"failed: {shlex.join(run)}; see {output.name}")
    elif run[0] == "finetune.py" and not run[2].endswith("seed_0"):
        os.remove(os.path.join(run[2], "last.pt"))  # there are more than a thousand
    return status


def main():
    args = parse_arguments()
    if args.dry_run:
        for run in missing_runs(args):
            torchrun = run[0] != "finetune.py" and "shapes" not in run
            say(f"{'torchrun --nproc_per_node=8' if torchrun else 'python'} {shlex.join(run)}")
        return
    gpus, failed = torch.cuda.device_count(), []
    while not (args.list or failed):
        todo = missing_runs(args)
        if args.shard:
            part, parts = args.shard
            todo = [run for run in todo if run[0] == "finetune.py" and can_start(run)
                    and zlib.crc32(run[2].encode()) % parts == part - 1]
        runs = [run for run in todo if run[0] == todo[0][0]]  # of one stage
        if not runs:
            break
        free = queue.Queue()
        slots = min(len(runs), 2 if not gpus else gpus if runs[0][0] == "finetune.py" else 1)
        for slot in range(slots):
            free.put(slot)
        threads = max(1, os.cpu_count() // slots)
        say(f"{len(todo)} runs are missing; now {len(runs)} of {runs[0][0]}, {slots} at a time")
        with ThreadPoolExecutor(slots) as pool:
            statuses = pool.map(lambda run: start(run, gpus, threads, free), runs)
            statuses = tqdm(statuses, total=len(runs), unit="run")
            failed = [run for run, status in zip(runs, statuses) if status]
    show(args)
    if failed:
        raise UserError(f"{len(failed)} runs failed, see above; mend that, then repeat the command")


if __name__ == "__main__":
    common.run(main)
