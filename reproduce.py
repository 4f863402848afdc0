"""Every table and figure of the paper is a command, and so is the same comparison on the embedded data.

    python reproduce.py                                    # the experiment on the embedded data
    python reproduce.py list                               # all tables, and how far they are
    python reproduce.py table6 --dry-run                   # its commands, and an estimate of the hours
    python reproduce.py table6 --imagenet21k DIR --pascal-context DIR        # what is missing of it
    python reproduce.py all --scale small --out small      # all tables on the embedded data, on two cores

A table is data, below: a row is how a network is initialised, a column how many labels it is fine-tuned on.
A run is one stage, a fine-tuning with its evaluation, in a folder OUT/runs/INITIALISATION/SETTINGS. Tables
share what they have in common, above all the pretrainings. A run with a result is done; stop at any time, the
same command goes on. Any number of these programs may work on one OUT at once, on one machine or many: a run is
claimed first.

Rates are chosen as in 5.1: each cell runs a grid of rates on a seed of its own, whose score does not enter
the table, and takes the best. PAPER SILENT on the grid and on what a "task" is: here four by four values
from 1e-5 to 3e-4, and a task is a row and a column. All repeats share one pretraining, as in the paper.

Out: results.md (all tables, beside the paper's numbers), results.json (every score), curves, predictions,
sweep_TABLE.md. Of fine-tunings only those of the first seed keep their weights.
"""
import functools
import importlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
from itertools import product
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import launch
from benchmark import measure, training_step
from datasets import DATA_SETS, segmentation_pairs
from launch import InputError, Stopped, say
from model import build_unet, freeze
from report import Pages, markdown, ours
from run_folder import SIGNALS, make_folder, read_json, refuse_other_flags
from workers import Run, Worker

# ---------------------------------------- The tables

# Learning rate and weight decay (5.1)
GRID = tuple(("", f"--lr {rate} --weight-decay {decay}")
             for rate, decay in product(("1e-5", "3e-5", "1e-4", "3e-4"), repeat=2))


class Row(NamedTuple):
    name: str
    data: str           # --data of fine-tuning and evaluation
    init: str           # NONE, SUPERVISED, or the flags of pretrain_decoder.py
    paper: tuple = ()   # mIoU % in the paper, for each column
    network: str = ""   # --width or --encoder, where they are not the paper's x1 and Hybrid-ViT
    rates: tuple = (("", ""),)  # without a sweep, for each column or for all: flags of stage 2 and of stage 3
    grid: tuple = GRID  # the sweep's candidates for them


class Table(NamedTuple):
    title: str
    columns: tuple = ()  # a share of the labels, or "8 labels"
    rows: tuple = ()
    cited: tuple = ()    # ((name, numbers), ...) of other papers
    curve: str = ""      # the x axis of its picture: "labels", or what the number at the end of a row's name is
    pairs: tuple = ()    # rows whose differences are shown, in pairs
    repeats: int = 10    # of each fine-tuning, where REPEATS has no other number
    sweep: bool = True   # whether the rates are chosen if no flag says otherwise
    sweep_seeds: tuple = (100,)  # no score of these enters the table
    sweep_column: str = ""       # where all columns take the rates of one


NONE, SUPERVISED = "none", "supervised"
DDEP = "--data imagenet21k --gamma 0.95"  # 100 epochs, batch 512, 224 px: the defaults of stage 2
DEP = "--method dep --data cityscapes --coarse"
DEP_SIGMA = f"{DEP} --noise simple --sigma 0.8"  # 3.4. PAPER SILENT on Table 1 and Figure 3: as Table 2
LABELS_CITYSCAPES = ("100%", "1/4", "1/8", "1/30")
LABELS = ("100%", "20%", "10%", "5%", "1%")


def three(prefix, data, none, supervised, ddep, network=""):
    """The three rows that most of the tables compare."""
    return (Row(f"{prefix}No pretraining", data, NONE, none, network),
            Row(f"{prefix}Supervised", data, SUPERVISED, supervised, network),
            Row(f"{prefix}DDeP", data, DDEP, ddep, network))


X1_CITYSCAPES = three("×1 ", "cityscapes", (63.47, 39.63, 34.74, 25.79), (80.36, 75.55, 72.56, 54.72),
                      (80.72, 76.38, 73.21, 64.48))
X2_CITYSCAPES = three("×2 ", "cityscapes", (62.25, 37.72, 33.73, 24.93), (80.50, 75.57, 72.84, 60.36),
                      (80.91, 76.86, 73.81, 64.75), "--width 2")
TABLES = {
    "table1": Table("Table 1: predicting the image or the noise; DeP, Cityscapes", LABELS_CITYSCAPES, (
        Row("predict x", "cityscapes", f"{DEP_SIGMA} --target image --epochs 6000",
            (70.44, 60.87, 55.44, 41.40)),
        Row("predict ε", "cityscapes", f"{DEP_SIGMA} --epochs 6000", (75.01, 67.26, 61.94, 48.36)))),
    "table2": Table("Table 2: denoising the whole network; Cityscapes", ("100%", "25%", "2%", "1%"), (
        Row("No pretraining", "cityscapes", NONE, (63.47, 39.63, 21.23, 18.52)),
        Row("Supervised", "cityscapes", SUPERVISED, (80.36, 75.55, 41.33, 35.51)),
        Row("DeP", "cityscapes", f"{DEP_SIGMA} --epochs 6000", (77.14, 68.87, 42.79, 37.55)))),
    # PAPER SILENT: a curve without numbers. The last row is Table 2's DeP
    "figure3": Table("Figure 3: length of pretraining; DeP, Cityscapes", ("25%", "1%"), tuple(
        Row(f"epochs {epochs}", "cityscapes", f"{DEP_SIGMA} --epochs {epochs}")
        for epochs in (100, 300, 1000, 3000, 6000)), curve="epochs of pretraining"),
    "figure4": Table("Figure 4: noise of some standard deviations; above simple (Eq. 1), below scaled (Eq. 5)"),
    # PAPER SILENT: a curve without numbers, best at the magnitude 0.22 = sqrt(1 - gamma)
    "figure5left": Table("Figure 5 left: noise magnitude; the mean of two data sets counts", ("1%",), tuple(
        Row(f"{name}, magnitude {math.sqrt(1 - gamma):.2f}", data, f"--data imagenet21k --gamma {gamma}")
        for name, data in (("Pascal Context", "pascal_context"), ("ADE20K", "ade20k"))
        for gamma in (0.99, 0.975, 0.95, 0.9, 0.8, 0.65)), curve="noise magnitude"),
    # PAPER SILENT on the noise of the simple one: the same ratio of noise and image, sqrt(1 / 0.95 - 1)
    "figure5right": Table("Figure 5 right: simple or scaled noise", ("100%", "10%", "5%", "1%"), tuple(
        Row(f"{name}, {kind}", data, init, paper) for name, data, kind, init, paper in (
            ("Pascal Context", "pascal_context", "simple", "--data imagenet21k --noise simple --sigma 0.2294",
             (59.64, 44.70, 39.14, 18.05)),
            ("Pascal Context", "pascal_context", "scaled", DDEP, (60.00, 48.27, 41.93, 19.69)),
            ("ADE20K", "ade20k", "simple", "--data imagenet21k --noise simple --sigma 0.2294",
             (48.88, 34.21, 24.07, 9.17)),
            ("ADE20K", "ade20k", "scaled", DDEP, (48.97, 34.99, 26.86, 10.80))))),
    "table3": Table("Table 3: the images of decoder pretraining", ("100%", "10%", "5%"), (
        Row("Pascal Context, from Pascal VOC", "pascal_context", "--data voc --gamma 0.95",
            (60.13, 49.95, 44.30)),
        Row("Pascal Context, from ImageNet-21k", "pascal_context", DDEP, (60.57, 50.61, 45.13)),
        Row("ADE20K, from ADE20K", "ade20k", "--data ade20k --gamma 0.95", (48.92, 36.14, 28.49)),
        Row("ADE20K, from ImageNet-21k", "ade20k", DDEP, (49.37, 37.14, 29.74)),
        Row("Cityscapes, from fine and coarse", "cityscapes", "--data cityscapes --coarse --gamma 0.95",
            (80.53, 72.67, 62.23)),
        Row("Cityscapes, from ImageNet-21k", "cityscapes", DDEP, (80.72, 73.21, 66.51)))),
    "table4": Table("Table 4: fixed or random gamma; Pascal Context, ×3", ("100%", "20%", "10%"), (
        Row("gamma in U(0.9, 0.95)", "pascal_context", "--data imagenet21k --gamma-range 0.9 0.95",
            (59.71, 52.53, 49.23), "--width 3"),
        Row("gamma = 0.95", "pascal_context", DDEP, (59.97, 53.36, 49.84), "--width 3"))),
    # PAPER SILENT on DeP here but for scaled noise: gamma 0.95, the images and the length of Table 2
    "figure6": Table("Figure 6: Cityscapes", LABELS_CITYSCAPES, (
        *X1_CITYSCAPES[:2],
        Row("×1 DeP", "cityscapes", f"{DEP} --gamma 0.95 --epochs 6000", (79.07, 74.68, 70.36, 61.79)),
        *X1_CITYSCAPES[2:], *X2_CITYSCAPES), curve="labels"),
    "table5": Table("Table 5: beside other methods; Cityscapes", LABELS_CITYSCAPES, X2_CITYSCAPES[2:], cited=(
        ("AdvSemSeg", (None, 62.3, 58.8, None)), ("s4GAN", (65.8, 61.9, 59.3, None)),
        ("DMT", (68.16, None, 63.03, 54.80)), ("ClassMix", (None, 63.63, 61.35, None)),
        ("CutMix", (None, 68.33, 65.82, 55.71)), ("PseudoSeg", (None, 72.36, 69.81, 60.96)),
        ("supervised baseline of PC2Seg", (74.88, 73.31, 68.72, 56.09)),
        ("PC2Seg", (75.99, 75.15, 72.29, 62.89)))),
    "table6": Table("Table 6 and Figure 1 right: Pascal Context", LABELS, (
        *three("×1 ", "pascal_context", (16.78, 7.21, 5.69, 4.53, 2.57), (59.74, 42.15, 36.28, 30.86, 12.45),
               (60.95, 52.81, 48.64, 42.20, 19.90)),
        *three("×3 ", "pascal_context", (17.22, 7.32, 6.16, 4.97, 2.95), (61.25, 51.49, 44.71, 37.52, 12.53),
               (62.04, 55.28, 51.55, 46.29, 24.69), "--width 3")), curve="labels"),
    "figure7": Table("Figure 7: ADE20K", LABELS, (
        *three("×1 ", "ade20k", (19.43, 5.26, 4.07, 2.80, 1.87), (48.92, 40.77, 23.05, 10.84, 5.14),
               (49.96, 42.76, 35.75, 27.29, 10.77)),
        *three("×3 ", "ade20k", (16.67, 5.88, 4.20, 2.91, 1.90), (49.60, 41.65, 33.04, 16.40, 5.31),
               (50.88, 43.26, 39.01, 32.30, 16.30), "--width 3")), curve="labels"),
    "table7": Table("Table 7: ResNet-50 on Pascal Context, one scale", LABELS, three(
        "", "pascal_context", (19.01, 8.46, 6.72, 5.30, 2.73), (45.21, 24.55, 19.27, 14.97, 6.09),
        (46.07, 30.38, 26.39, 21.12, 9.63), "--encoder resnet50"), curve="labels"),
}
# Repeats of fine-tuning (5.1), where they are not ten. PAPER SILENT on the shares that it does not name: ten
REPEATS = {("cityscapes", "1/8"): 6, ("cityscapes", "1/4"): 4, ("cityscapes", "25%"): 4,
           ("pascal_context", "20%"): 5, ("ade20k", "20%"): 5}

# The embedded experiment: the four methods on the pictures of shapes.py, with the rates that its sweep chose.
# Gamma 0.5: figures/search.md.
RATES = ("5e-4", "1e-3", "2e-3")
STAGE_3 = tuple(("", f"--lr {rate} --weight-decay {decay}")
                for rate, decay in product(RATES, ("0", "1e-4", "1e-3")))
STAGES_2_AND_3 = tuple((f"--lr {two}", f"--lr {rate} --weight-decay 0")
                       for two, rate in product(("3e-4", "1e-3", "3e-3"), RATES))
SHAPES = Table("The embedded data", ("8 labels", "32 labels"), (
    Row("No pretraining", "shapes", NONE, grid=STAGE_3,
        rates=(("", "--lr 2e-3 --weight-decay 0"), ("", "--lr 2e-3 --weight-decay 1e-3"))),
    Row("Supervised", "shapes", SUPERVISED, grid=STAGE_3,
        rates=(("", "--lr 1e-3 --weight-decay 0"), ("", "--lr 2e-3 --weight-decay 1e-3"))),
    Row("DeP", "shapes", "--method dep --gamma 0.5", grid=STAGES_2_AND_3,
        rates=(("--lr 3e-4", "--lr 2e-3 --weight-decay 0"),)),
    Row("DDeP", "shapes", "--gamma 0.5", grid=STAGES_2_AND_3,
        rates=(("--lr 3e-3", "--lr 2e-3 --weight-decay 0"),))),
    curve="labels", pairs=(("Supervised", "No pretraining"), ("DDeP", "Supervised"), ("DDeP", "DeP")),
    repeats=5, sweep=False, sweep_seeds=(100, 101))

# --scale small: the paper on the embedded data, whose scenes stand for every labelled data set and for its own
# images without labels, and whose single objects stand for ImageNet-21k.
SMALL_GRID = (("--lr 1e-3", "--lr 1e-3"), ("--lr 1e-3", "--lr 2e-3"))
SMALL_STEPS = (300, 1200, 200)  # of the three stages; 6000 epochs of the paper are 1200 steps, too
SMALL_NETWORKS = {"": "--width 0.25", "--width 2": "--width 0.3125", "--width 3": "--width 0.375",
                  "--encoder resnet50": "--width 0.125 --encoder resnet50"}
FOLDERS = ("imagenet21k", *DATA_SETS)  # --imagenet21k DIR, --cityscapes DIR, ...
SMALL_NOTE = """Scaled down: the scenes of shapes.py stand for every labelled data set and its own images,
single objects for ImageNet-21k; a small Hybrid-ViT with decoders of 4/16, 5/16 and 6/16 of the width for ×1, ×2
and ×3, ResNet-50 with 2/16; {} / {} / {} steps of stages 1, 2 and 3; two repeats; two candidate rates, tried
in the last column for the whole row. Tables that differ in their data set alone are the same runs."""


def shortened(table, steps):
    """The table with this many steps of stage 2 for 6000 epochs, and as many fewer for fewer."""
    def short(row):
        return row._replace(init=re.sub(
            "--epochs ([0-9]+)", lambda epochs: f"--steps {max(1, steps * int(epochs[1]) // 6000)}", row.init))
    return table._replace(rows=tuple(map(short, table.rows)))


def scaled_down(table):
    """The table on the embedded data: small networks, two repeats, two candidate rates a row."""
    def small(row):
        init = row.init
        if init.startswith("--"):
            init = re.sub("--data (cityscapes|ade20k|voc)( --coarse)?", "--data shapes", init)
            init = init.replace("--data imagenet21k", "--data shapes_objects")
        return row._replace(data="shapes", init=init, network=SMALL_NETWORKS[row.network], rates=SMALL_GRID[:1],
                            grid=SMALL_GRID)
    rows, last = tuple(map(small, table.rows)), "".join(table.columns[-1:])
    return table._replace(rows=rows, repeats=2, sweep_column=last)


# ---------------------------------------- Flags


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("tables", nargs="*", default=["shapes"], metavar="TABLE",
        help=f"shapes, {', '.join(TABLES)}; all of the paper's; or list")
    add("--out", default="results", metavar="DIR", help="where everything goes; other workers may share it")
    add("--scale", choices=("paper", "small"), default="paper", help="small: the embedded data, on two cores")
    for name in FOLDERS:
        add(flag_of(name), metavar="DIR", help=f"the folder of {name}")
    add("--sweep", action="store_true", default=None,
        help="choose the rates (the default of the paper's tables)")
    add("--no-sweep", dest="sweep", action="store_false", default=None,
        help="do not choose: the rates in this file (the default of shapes), else those of the scripts")
    add("--repeats", type=launch.positive_int, metavar="N", help="only the first N repeats of each fine-tuning")
    add("--steps", type=launch.positive_int, nargs=3, metavar=("S1", "S2", "S3"),
        help="steps of the three stages (default: those of the scripts, or of the scale)")
    add("--dry-run", action="store_true", help="show the commands and an estimate of the hours, run nothing")
    add("--seconds-per-image", type=launch.positive_float, metavar="S",
        help="for the estimate: of decoder pretraining, hybrid, x1, as benchmark.py measures it (default: "
             "measured there and then)")
    add("--jobs", type=launch.positive_int,
        help="runs at a time (default: one for each GPU; without a GPU two)")
    add("--micro-batch", type=launch.positive_int, metavar="N",
        help="of decoder pretraining, images on one GPU at once (default: 64), where memory is short")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    args = parser.parse_args(argv)

    known = {"shapes": SHAPES, **TABLES}
    args.list = args.tables == ["list"]
    names = list(known) if args.list else list(TABLES) if args.tables == ["all"] else args.tables
    for name in names:
        if name not in known:
            raise InputError(f"{name}: no such table; expected {', '.join(known)}, or all or list alone")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; drop the flag")
    if args.list and os.path.exists(args_file(args)):  # of any scale
        args.scale, args.steps, _ = read_settings(args)
    elif args.scale == "small" and "shapes" in names and not args.list:
        raise InputError("--scale small is for the paper's tables: name one, or all; shapes is small without "
                         "it")
    if args.scale == "small":
        args.steps = args.steps or list(SMALL_STEPS)
        known.update({name: scaled_down(table) for name, table in TABLES.items()})
    if args.steps:
        known = {name: shortened(table, args.steps[1]) for name, table in known.items()}
    args.known, args.tables = known, {name: known[name] for name in dict.fromkeys(names)}
    if not (args.list or args.dry_run):
        check_folders(args)
    return args


def flag_of(folder):
    return f"--{folder.replace('_', '-')}"


def check_folders(args):
    """Raise InputError where a data set that a table needs is not there."""
    for name in FOLDERS:
        root = getattr(args, name)
        users = [key for key, table in args.tables.items() if name in folders_of(table)]
        if root is not None and not os.path.isdir(root):
            raise InputError(f"{flag_of(name)} {root}: no such folder")
        if users and root is None:
            raise InputError(f"{users[0]} needs {name}; pass {flag_of(name)} DIR")
        if name in [row.data for key in users for row in args.tables[key].rows]:
            segmentation_pairs(name, root, "val")  # raises where this is not the set


def folders_of(table):
    """The data sets whose folders a table needs."""
    return {name for row in table.rows for name in FOLDERS if name in (row.data, data_of(row.init))}


def data_of(init):
    return next(iter(re.findall("--data ([a-z0-9_]+)", init)), "shapes")


def args_file(args):
    return os.path.join(args.out, "args.json")


def read_settings(args):
    """(scale, steps, {table: whether its rates were chosen}) of the commands that ran in OUT."""
    content = read_json(args_file(args))
    scale, steps, sweeps = content.get("scale"), content.get("steps"), content.get("sweeps") or {}
    numbers = isinstance(steps, list) and len(steps) == 3 and all(isinstance(n, int) and n > 0 for n in steps)
    if not (scale in ("paper", "small") and (steps is None or numbers) and isinstance(sweeps, dict)
            and all(isinstance(value, bool) for value in sweeps.values())):
        raise InputError(f"{args_file(args)}: not written by this program; remove it, or pass another --out")
    return scale, steps, sweeps


# ---------------------------------------- The runs


class Cell(NamedTuple):
    table: str
    row: Row
    column: str


class Grid:
    """All runs of some tables: what they are, which are finished, what came out."""

    def __init__(self, args, tables, sweeps, repeats=None):
        """sweeps: {table: whether a sweep chooses its rates}. repeats: at most so many of each fine-tuning."""
        self.args, self.tables, self.sweeps, self.repeats = args, tables, sweeps, repeats
        self.done, self.read = set(), {}
        self.cells = [Cell(name, row, column) for name, table in tables.items()
                      for row in table.rows for column in table.columns]

    def path(self, name, *file):
        return os.path.join(self.args.out, "runs", *name.split("/"), *file)

    def finished(self, run):
        if run.name not in self.done and os.path.exists(self.path(run.name, *run.result.split("/"))):
            self.done.add(run.name)
        return run.name in self.done

    def miou(self, run):
        """In percent, of a finished run; 0 where no labelled pixel was there to measure it."""
        if run.name not in self.read:
            path = self.path(run.name, *run.result.split("/"))
            miou = read_json(path).get("miou", "nothing")
            if miou is not None and (isinstance(miou, (str, list, dict)) or not 0 <= miou <= 1):
                raise InputError(f"{path}: its miou is {miou}, expected 0 to 1; remove {self.path(run.name)}, "
                                 "and it runs again")
            self.read[run.name] = 100 * (miou or 0)
        return self.read[run.name]

    def seeds(self, cell):
        repeats = REPEATS.get((cell.row.data, cell.column), self.tables[cell.table].repeats)
        return range(min(repeats, self.repeats or repeats))

    def chain(self, cell, seed, rates, tuning=False):
        """The Runs that end in a fine-tuning: the pretrainings of seed 0 that it needs, then itself."""
        row, embedded = cell.row, cell.row.data == "shapes"
        folder, init, runs = self.initialisation(row, rates[0])
        labels, network = labels_of(cell.column), "" if row.init.startswith("--") else row.network
        name = f"{folder}/" + slug(row.data, labels, f"seed {seed}", network, rates[1])
        at_its_end = "" if embedded else "--eval-every 1000000"
        finetune = self.command("finetune.py", name, f"--data {row.data} --init {init} {labels} --seed {seed}",
                                f"--subset-seed {seed}" if labels else "", root(row.data), network,
                                self.length(2), rates[1], at_its_end)
        commands, result, needs = [finetune], "metrics.json", [run.name for run in runs[-1:]]
        if not (embedded or tuning):  # as 5.1. PAPER SILENT: the last weights, not those that validate best
            evaluate = self.command("evaluate.py", f"{name}/evaluate", f"--checkpoint {name}@", root(row.data))
            commands.append(evaluate)
            result = "evaluate/metrics.json"
        keep = not tuning and seed == 0
        return [*runs, Run(name, commands, needs, result, row.network, keep=keep)]

    def initialisation(self, row, rates):
        """(folder of its fine-tunings, their --init, the Runs that make it) of a row."""
        if row.init == NONE:
            return NONE, "none", []
        runs, dep, encoder = [], "--method dep" in row.init, "imagenet21k"
        own = " ".join(re.findall("--encoder [^ ]+", row.network))
        if own:
            encoder = "imagenet1k"  # ResNet-50's
        if row.data == "shapes" and not dep:  # stage 1
            name = slug("encoder", own) + "/pretrain_encoder"
            command = self.command("pretrain_encoder.py", name, "--seed 0", own, self.length(0))
            runs.append(Run(name, [command], [], network=row.network))
            encoder = f"{name}@"
        if row.init == SUPERVISED:
            return slug("encoder", own), encoder, runs
        folder = slug("dep" if dep else "ddep", row.init.replace("--method dep", ""), row.network, rates)
        name = f"{folder}/pretrain_decoder"
        memory = f"--micro-batch {self.args.micro_batch}" if self.args.micro_batch else ""
        command = self.command("pretrain_decoder.py", name, "--seed 0", row.init, root(data_of(row.init)),
                               "" if dep else f"--encoder-weights {encoder}", row.network,
                               "" if "--steps" in row.init else self.length(1), rates, memory)
        needs, batch = [run.name for run in runs], 1 if row.data == "shapes" else 512
        runs.append(Run(name, [command], needs, network=row.network, batch=batch))
        return folder, f"{name}@", runs

    def length(self, stage):
        return f"--steps {self.args.steps[stage]}" if self.args.steps else ""

    def command(self, script, name, *flags):
        """[script, "--out", folder, flag, ...]. In flags RUN@ is its last.pt, ROOT@SET a folder of data."""
        device = "" if self.args.device == "auto" else f"--device {self.args.device}"
        words = []
        for word in " ".join([*flags, device]).split():
            if word.startswith("ROOT@"):
                word = getattr(self.args, word[5:]) or f"{word[5:].upper()}_DIR"
            elif word.endswith("@"):
                word = self.path(word[:-1], "last.pt")
            words.append(word)
        return [script, "--out", self.path(name), *words]

    def candidates(self, cell):
        """[(rates, the chain of each sweep seed), ...] of a cell."""
        seeds = self.tables[cell.table].sweep_seeds
        cell = cell._replace(column=self.tables[cell.table].sweep_column or cell.column)
        return [(rates, [self.chain(cell, seed, rates, tuning=True) for seed in seeds])
                for rates in cell.row.grid]

    def tuned(self, cell):
        """[(mean mIoU, rates, scores), ...] of the finished candidates, in order."""
        found = []
        for rates, chains in self.candidates(cell):
            if all(self.finished(chain[-1]) for chain in chains):
                scores = [self.miou(chain[-1]) for chain in chains]
                found.append((statistics.mean(scores), rates, scores))
        return found

    def rates(self, cell):
        """The rates of a cell; None: not all its candidates have been run. Ties go to the first."""
        if not self.sweeps[cell.table]:
            rates = cell.row.rates
            return rates[self.tables[cell.table].columns.index(cell.column) if len(rates) > 1 else 0]
        tuned = self.tuned(cell)
        if len(tuned) < len(cell.row.grid):
            return None
        return max(tuned, key=lambda candidate: candidate[0])[1]

    def scores(self, cell):
        """{seed: mIoU %} of a cell's finished repeats."""
        rates = self.rates(cell)
        last = {} if rates is None else {seed: self.chain(cell, seed, rates)[-1] for seed in self.seeds(cell)}
        return {seed: self.miou(run) for seed, run in last.items() if self.finished(run)}

    def scores_of(self, table):
        """{(row's name, column): {seed: mIoU %}} of a table."""
        return {(cell.row.name, cell.column): self.scores(cell) for cell in self.cells if cell.table == table}

    def plan(self):
        """(all Runs that are known by now, in order; the fine-tunings that wait for their rates)."""
        chains, repeats, later = [], [], {}
        for cell in self.cells:
            if self.sweeps[cell.table]:
                chains += [chain for _, chains_of_rates in self.candidates(cell) for chain in chains_of_rates]
            rates = self.rates(cell)
            for seed in self.seeds(cell):
                chain = self.chain(cell, seed, rates or ("?", ""))
                if rates is None:
                    later[chain[-1].name] = chain[-1]
                else:
                    repeats.append((seed, chain))
        repeats.sort(key=lambda repeat: repeat[0])  # a first number for every cell comes early
        chains += [chain for _, chain in repeats]
        order = list({run.name: run for chain in chains for run in chain}.values())  # each once
        order.sort(key=lambda run: run.batch == 1)  # first what needs many GPUs: later it would wait for them
        return order, list(later.values())


def root(data):
    return f"--root ROOT@{data}" if data in FOLDERS else ""


def labels_of(column):
    """The flags of a column: "100%" -> "", "1/8" -> "--fraction 1/8", "8 labels" -> "--labels 8"."""
    if column.endswith(" labels"):
        return f"--labels {column.removesuffix(' labels')}"
    return "" if column == "100%" else f"--fraction {column.replace('25%', '1/4')}"  # the same subset


def slug(*parts):
    """A folder's name: ("ddep", "--lr 1e-3", "--fraction 1/8") -> "ddep_lr_1e-3_fraction_1-8"."""
    return "_".join(" ".join(parts).replace("--", "").replace("/", "-").split())


# ---------------------------------------- What it will cost

# Images of a set that stage 2 passes over; those that are validated, and their pixels at scale 1
PASSED_OVER = {"imagenet21k": 14_197_122, "cityscapes": 2975, "ade20k": 20_210, "voc": 17_125}
COARSE = 19_998
VALIDATED = {"shapes": (250, 64 * 64), "cityscapes": (500, 1024 * 2048), "pascal_context": (5105, 375 * 500),
             "ade20k": (2000, 512 * 683)}
START = 6  # seconds, of a process


@functools.cache
def flops_of(encoder, width, size, train_encoder=True, backward=True):
    """Multiply-adds, times two, of a step on one square image, counted on tensors without memory."""
    with torch.device("meta"):
        network = build_unet(encoder=encoder, width=width, out_channels=60)
        x = torch.empty(1, 3, size, size)
    network.requires_grad_(backward)
    network.encoder.requires_grad_(backward and train_encoder)
    with FlopCounterMode(display=False) as counter:
        y = network(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def flops_of_run(run):
    """All of a run: the images that its commands pass through the network, by the flags' own parsers."""
    (script, *flags), *evaluation = run.commands
    args = importlib.import_module(script.removesuffix(".py")).parse_arguments(flags)
    small, words = args.data.startswith("shapes"), run.network.split()
    network = dict(zip(words[::2], words[1::2]))
    encoder = network.get("--encoder", "hybrid-small" if small else "hybrid")
    width = float(network.get("--width", 1 / 4 if small else 1))
    finetuning = script == "finetune.py"
    size = args.crop_size if finetuning else args.image_size
    if args.steps is None:
        images = args.epochs * (PASSED_OVER[args.data] + (COARSE if args.coarse else 0))
    else:
        images = args.steps * args.batch_size
    total = images * flops_of(encoder, width, size, getattr(args, "method", "") != "ddep")
    if finetuning:
        views = [1.0]  # of each validation image, by their size
        if evaluation:
            scales = [1.0] if encoder == "resnet50" else DATA_SETS[args.data].evaluation.get("scales", [1.0])
            views += 2 * [scale ** 2 for scale in scales]  # mirrored, too
        number, pixels = VALIDATED[args.data]
        total += number * sum(views) * pixels / size ** 2 * flops_of(encoder, width, size, True, False)
    return total


def estimate(grid, runs, slots):
    """A sentence on the hours of some runs, by their multiply-adds and the time of one step."""
    seconds, how = grid.args.seconds_per_image, "given"
    rows = [row for table in grid.tables.values() for row in table.rows]
    small = seconds is None and all(row.data == "shapes" for row in rows)
    encoder, width, size = ("hybrid-small", 0.25, 64) if small else ("hybrid", 1.0, 224)
    if seconds is None:
        device, how = launch.start_processes(grid.args.device).device, "measured now"
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // slots))  # as each run has
        network, batch = build_unet(encoder, width), 64 if device.type == "cuda" else 4
        freeze(network.encoder)
        step = training_step(network, batch, size, device, launch.resolve_precision("auto", device))
        seconds = min(measure({"step": (step, batch)}, 3, device)["step"])
    rate, hours = seconds / flops_of(encoder, width, size, False), {"pretraining": 0.0, "fine-tuning": 0.0}
    for run in runs:
        kind = "pretraining" if "pretrain" in run.name else "fine-tuning"
        hours[kind] += (flops_of_run(run) * rate + START) / 3600
    return (" and ".join(f"about {value:.1f} hours of {kind}" for kind, value in hours.items()) +
            f" on one device; this machine runs {slots} at a time. At {seconds:.3g} s an image of decoder "
            f"pretraining ({encoder}, x{width:g}, {size} px; {how}); others by their multiply-adds; reading "
            "images and checkpoints not included")


# ---------------------------------------- The program


def dry_run(grid):
    """Print every command in order, the number of runs, and an estimate of the hours."""
    worker, (runs, later) = Worker(grid), grid.plan()
    missing = [run for run in runs if not grid.finished(run)]
    for run in missing:
        count = worker.processes(run)
        for command in run.commands:
            start = ["torchrun", f"--nproc_per_node={count}"] if count > 1 else ["python"]
            say(shlex.join([*start, *command]))
    if later:
        say(f"... and {len(later)} fine-tunings with the rates that the sweep will choose")
    count = len(missing) + len(later)
    say(f"{len(runs) - len(missing)} of {len(runs) + len(later)} runs are finished, {count} are missing")
    if count:
        say(estimate(grid, missing + later, len(worker.gpus)))


def show_list(grid):
    """Each table's state, and what there is of it."""
    for name, table in grid.tables.items():
        scores = grid.scores_of(name)
        total = sum(len(grid.seeds(cell)) for cell in grid.cells if cell.table == name)
        say(f"{name:14}{table.title}: {sum(map(len, scores.values()))} of {total} fine-tunings")
        if any(scores.values()):
            say(f"\n{markdown(table, scores)}\n")


def main():
    args = parse_arguments()
    settings, sweeps = {"scale": args.scale, "steps": args.steps}, {}
    if os.path.exists(args_file(args)):
        scale, steps, sweeps = read_settings(args)
        refuse_other_flags(args.out, {"scale": scale, "steps": steps}, settings, free=set())
    for name, table in args.known.items():  # of other tables: as in the command that ran them
        if not args.list and name in args.tables or name not in sweeps:
            sweeps[name] = table.sweep if args.sweep is None else args.sweep
    everything, grid = Grid(args, args.known, sweeps), Grid(args, args.tables, sweeps, args.repeats)
    if args.list:
        return show_list(everything)
    if args.dry_run:
        return dry_run(grid)

    make_folder(args.out, written={"results.json", "results.md"})
    with ours(args.out, "args.json") as file:
        file.write(json.dumps({**settings, "sweeps": sweeps}).encode())
    for number in SIGNALS:  # as Ctrl-C: the runs are stopped, and save
        signal.signal(number, signal.default_int_handler)
    try:
        note = SMALL_NOTE.format(*args.steps) if args.scale == "small" else ""
        run_all(grid, Pages(everything, list(args.tables), note))
    except KeyboardInterrupt:
        raise Stopped("stopped; what ran has saved, the same command continues") from None


def run_all(grid, pages):
    """Run what is missing, and keep the pages up to date."""
    worker, started, begun, last, out = Worker(grid), time.perf_counter(), None, None, grid.args.out
    bar = tqdm(unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())
    for runs, later in worker.work():
        done, total = sum(map(grid.finished, runs)), len(runs) + len(later)
        if begun is None:
            begun = done
            say(f"{total - done} of {total} runs are missing; {len(worker.gpus)} at a time, into {out}/runs; "
                "stop and start again at any time")
        if done == last:
            continue
        if bar.disable and done > begun:
            minutes = (time.perf_counter() - started) / (done - begun) * (total - done) / 60
            say(f"{done}/{total} finished; about {minutes:.0f} min left")
        bar.total, bar.n, last = total, done, done
        bar.refresh()
        theirs = read_settings(grid.args)[2]  # of programs that have begun with other tables since
        pages.grid.sweeps.update({name: theirs[name] for name in theirs if name not in grid.tables})
        pages.update()
    bar.close()
    pages.update(final=True)
    say(f"written to {out}: results.md, results.json, and the pictures")
    if worker.failed:
        raise InputError(f"{len(worker.failed)} runs failed, and what needs them did not run; the first: "
                         f"{next(iter(worker.failed.values()))}; mend it, then repeat the command")


if __name__ == "__main__":
    launch.run_script(main)
