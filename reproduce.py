"""The paper's comparison on the embedded data: four initialisations x two label budgets x five seeds.

For each seed: stage 1 once, stage 2 twice (DDeP and DeP), then stage 3 from each initialisation with each
number of labels. A seed is a full repetition: fresh weights in every stage, another label subset. All methods
see the same seeds, so differences are taken in pairs. Each run is a script of its own in results/runs; a
finished run is never repeated. The table is shown after every seed.

    python reproduce.py                # the table, with the rates that the sweep chose
    python reproduce.py --sweep        # the sweep: nine candidates for each method, on seeds of its own

Out: table.md (mean ± standard deviation (number of runs), differences), results.json (every run), two
figures; sweep.md.
"""
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm

import launch
from data import to_pixels
from datasets import class_colours, segmentation_pairs
from evaluate import predict
from launch import InputError, say
from model import build_unet
from pictures import colour_mask, curves, from_pixels, sheet
from run_folder import (is_finished, load_checkpoint, lock_folder, make_folder, read_json, refuse_other_flags,
                        replacing, write_json)

# Student's t at 97.5 % for 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
HERE = os.path.dirname(os.path.abspath(__file__))


class Row(NamedTuple):
    """An initialisation. ENCODER and DECODER in its flags are the last.pt of stage 1 and of its stage 2."""
    stage_2: str | None  # flags of pretrain_decoder.py; None: there is no stage 2
    stage_3: str         # flags of finetune.py
    rates: tuple         # flags of stage 2, of stage 3: the best of the sweep


ROWS = {
    "No pretraining": Row(None, "--init none", ("", "--lr 1e-3 --weight-decay 0")),
    "Supervised": Row(None, "--init ENCODER", ("", "--lr 1e-3 --weight-decay 0")),
    "DeP": Row("--method dep", "--init DECODER", ("--lr 1e-3", "--lr 1e-3")),
    "DDeP": Row("--encoder-weights ENCODER", "--init DECODER", ("--lr 1e-3", "--lr 1e-3")),
}
PAIRS = (("Supervised", "No pretraining"), ("DDeP", "Supervised"), ("DDeP", "DeP"))

# The sweep: nine candidates for each method, of stage 2 and stage 3, or of stage 3 alone.
STAGE_2_RATES = "--lr 3e-4", "--lr 1e-3", "--lr 3e-3"
STAGE_3_RATES = "--lr 5e-4", "--lr 1e-3", "--lr 2e-3"
WEIGHT_DECAYS = "--weight-decay 0", "--weight-decay 1e-4", "--weight-decay 1e-3"
SWEEP_SEEDS, SWEEP_LABELS = (100, 101), 8  # no score of these enters the table


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("--out", default="results", metavar="DIR", help="where everything goes")
    add("--sweep", action="store_true", help="run the candidates instead of the table")
    add("--labels", type=launch.positive_int, nargs="+", default=[8, 32], help="label budgets")
    add("--seeds", type=launch.seed_int, nargs="+", default=[0, 1, 2, 3, 4], help="repetitions")
    add("--steps", type=launch.positive_int, nargs=3, metavar=("S1", "S2", "S3"),
        help="steps of the three stages (default: those of the scripts)")
    add("--jobs", type=launch.positive_int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    args = parser.parse_args(argv)
    for name, values in (("seeds", args.seeds), ("labels", args.labels)):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: expected each once")
    if set(args.seeds) & set(SWEEP_SEEDS):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: {SWEEP_SEEDS} chose the rates, so their "
                         "scores would flatter; pass others")
    return args


# ---------------------------------------- The runs


class Run(NamedTuple):
    folder: str   # under OUT/runs, named by its settings
    command: list
    needs: list   # folders of the runs that come first


def candidates_of(row):
    """[(flags of stage 2, flags of stage 3)] of the sweep."""
    if row.stage_2:
        return list(product(STAGE_2_RATES, STAGE_3_RATES))
    return [("", f"{rate} {decay}") for rate, decay in product(STAGE_3_RATES, WEIGHT_DECAYS)]


def runs_of(args, method, labels, seed, rates):
    """The Runs of one cell of the table: stages 1 and 2 where the method has them, then the fine-tuning."""
    row, (rates_2, rates_3) = ROWS[method], rates
    encoder, decoder = f"seed{seed}/encoder", f"seed{seed}/{slug(method, rates_2)}"
    steps = [f"--steps {n}" for n in args.steps] if args.steps else ["", "", ""]
    runs = []

    def add(folder, script, *flags):
        words = " ".join(flags).split()
        needs = [need for word, need in (("ENCODER", encoder), ("DECODER", decoder)) if word in words]
        checkpoints = {"ENCODER": path(args, encoder, "last.pt"), "DECODER": path(args, decoder, "last.pt")}
        command = [sys.executable, os.path.join(HERE, script), "--out", path(args, folder), "--seed", str(seed),
                   "--device", args.device, *(checkpoints.get(word, word) for word in words)]
        runs.append(Run(folder, command, needs))

    if "ENCODER" in f"{row.stage_2} {row.stage_3}":
        add(encoder, "pretrain_encoder.py", steps[0])
    if row.stage_2:
        add(decoder, "pretrain_decoder.py", row.stage_2, rates_2, steps[1])
    add(f"seed{seed}/{slug(method, *rates, f'{labels} labels')}", "finetune.py", row.stage_3, rates_3,
        f"--labels {labels} --subset-seed {seed}", steps[2])
    return runs


def slug(*parts):
    """A folder's name: "DDeP", "--lr 1e-3", "8 labels" -> "ddep_lr_1e-3_8_labels"."""
    return "_".join(" ".join(parts).lower().replace("--", "").split())


def path(args, folder, *file):
    return os.path.join(args.out, "runs", *folder.split("/"), *file)


def run_all(args, runs):
    """Run what is not finished, --jobs at a time, each with its share of the cores. Yields after every run."""
    def finished(folder):
        return is_finished(path(args, folder))

    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    runs = {run.folder: run for run in runs}  # each once, in order
    waiting = {folder: run for folder, run in runs.items() if not finished(folder)}
    running, total, started = {}, len(waiting), time.perf_counter()
    yield  # what was finished before
    bar = tqdm(total=len(runs), initial=len(runs) - total, unit="run", dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            ready = [run for run in waiting.values() if all(map(finished, run.needs))]
            for run in ready[:args.jobs - len(running)]:
                del waiting[run.folder]
                os.makedirs(path(args, run.folder), exist_ok=True)
                with open(path(args, run.folder, "output.txt"), "a") as output:
                    running[run.folder] = subprocess.Popen(run.command, env=environment, stdout=output,
                                                           stderr=subprocess.STDOUT)
            time.sleep(0.2)  # until one of the processes ends
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                status = running.pop(folder).returncode
                if status or not finished(folder):
                    output = path(args, folder, "output.txt")
                    with open(output, errors="replace") as file:
                        last = (file.read().strip() or "no output").splitlines()[-1]
                    raise InputError(f"the run {folder} ended with status {status}: {last} (see {output})")
                bar.update()
                if bar.disable:
                    left = len(waiting) + len(running)
                    minutes = (time.perf_counter() - started) / (total - left) * left / 60
                    say(f"{len(runs) - left}/{len(runs)} finished: {folder}; about {minutes:.0f} min left")
                yield
    finally:
        bar.close()
        for process in running.values():  # each continues from its checkpoint next time
            process.terminate()
        for process in running.values():
            process.wait()


# ---------------------------------------- The results


def collect(args, cells):
    """[{"method", "labels", "seed", "rates", and the content of metrics.json}] of the finished cells."""
    return [{**keys, **read_json(path(args, runs[-1].folder, "metrics.json"))} for keys, runs in cells
            if is_finished(path(args, runs[-1].folder))]


def scores(results, **keys):
    """{seed: mIoU in percent} of the results with these keys."""
    return {result["seed"]: 100 * result["miou"] for result in results
            if all(result[key] == value for key, value in keys.items())}


def spread(values):
    """(mean, standard deviation with n - 1; 0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def interval(differences):
    """Half of the 95 % confidence interval of the mean of two and more, by Student's t."""
    n = len(differences)
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.1
    return quantile * statistics.stdev(differences) / math.sqrt(n)


def table(results, labels):
    """Markdown: methods x budgets, then the differences, paired by seed."""
    lines = ["| mIoU % ± standard deviation (runs) | " + " | ".join(f"{n} labels" for n in labels) + " |",
             "|---|" + "---|" * len(labels)]
    columns = {name: [scores(results, method=name, labels=n) for n in labels] for name in ROWS}
    for name, cells in columns.items():
        texts = ["{:.1f} ± {:.1f} ({})".format(*spread(cell.values()), len(cell)) if cell else ""
                 for cell in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    for a, b in PAIRS:
        texts = []
        for ours, theirs in zip(columns[a], columns[b]):
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            half = f" ± {interval(pairs):.1f}" if len(pairs) > 1 else ""
            texts.append(f"{statistics.mean(pairs):+.1f}{half}" if pairs else "")
        lines.append(f"| *{a} − {b}, in pairs, ± 95 % interval* | {' | '.join(texts)} |")
    return "\n".join(lines)


def sweep_table(results):
    """Markdown: every candidate of every method with its score for each seed; the best in bold."""
    lines = [f"| {SWEEP_LABELS} labels | stage 2 | stage 3 | mIoU % | mean |", "|---|---|---|---|---|"]
    for name in ROWS:
        candidates = {rates: scores(results, method=name, rates=rates)
                      for rates in dict.fromkeys(r["rates"] for r in results if r["method"] == name)}
        best = max(candidates, key=lambda rates: statistics.mean(candidates[rates].values()), default=None)
        for rates, cell in candidates.items():
            bold = "**" if rates == best else ""
            values = " ".join(f"{value:.1f}" for value in cell.values())
            mean = f"{bold}{statistics.mean(cell.values()):.1f}{bold}"
            lines.append(f"| {name} | {' | '.join(rates)} | {values} | {mean} |")
    return "\n".join(lines)


@torch.no_grad()
def prediction_grid(args, cells, rows=6):
    """Image, truth and the four predictions, of the first seed, with the most labels."""
    most = max(keys["labels"] for keys, _ in cells)
    runs = [runs[-1] for keys, runs in cells if (keys["seed"], keys["labels"]) == (args.seeds[0], most)]
    val, names = segmentation_pairs("shapes", None, "val")
    colours, networks = class_colours("shapes", len(names)), []
    for run in runs:
        checkpoint = load_checkpoint(path(args, run.folder, "last.pt"))
        network = build_unet(**checkpoint["model_args"])
        network.load_state_dict(checkpoint["model"])
        networks.append(network.eval())
    pictures = []
    for row in range(rows):
        sample = val.read(row * len(val) // rows)
        x = to_pixels(sample["image"].as_subclass(torch.Tensor)[None])
        masks = [sample["mask"]] + [predict(network, x).argmax(1)[0] for network in networks]
        pictures.append([from_pixels(x[0])] + [colour_mask(mask, colours) for mask in masks])
    return sheet(pictures, ["image", "truth", *ROWS], 112, names, colours)


def main():
    args = parse_arguments()
    labels, seeds, name = args.labels, args.seeds, "results"
    if args.sweep:
        labels, seeds, name = [SWEEP_LABELS], SWEEP_SEEDS, "sweep"
    cells = [(dict(method=method, labels=n, seed=seed, rates=rates), runs_of(args, method, n, seed, rates))
             for seed in seeds for method, row in ROWS.items()
             for rates in (candidates_of(row) if args.sweep else [row.rates]) for n in labels]

    make_folder(args.out, written={"runs", "results.json", "table.md", "sweep.json", "sweep.md"})
    lock = lock_folder(args.out)  # noqa: F841  held until this process ends
    args_file = os.path.join(args.out, "args.json")
    if os.path.exists(args_file):
        refuse_other_flags(args.out, read_json(args_file), vars(args),
                           free={"out", "jobs", "device", "seeds", "labels", "sweep"})
    write_json(args_file, vars(args))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are stopped, and save
    say(f"{len(cells)} fine-tunings into {args.out}/runs, {args.jobs} runs at a time; stop and start again at "
        "any time")
    shown = 0
    for _ in run_all(args, [run for _, runs in cells for run in runs]):
        results = collect(args, cells)
        done = Counter(result["seed"] for result in results)
        complete = sum(count == len(cells) // len(seeds) for count in done.values())
        if complete > shown:
            shown = complete
            write_json(os.path.join(args.out, f"{name}.json"), results)
            text = sweep_table(results) if args.sweep else table(results, labels)
            with replacing(os.path.join(args.out, "sweep.md" if args.sweep else "table.md")) as file:
                file.write(f"{text}\n".encode())
            say(f"\n{text}\n")
    if args.sweep:
        return say(f"written to {args.out}: sweep.md, sweep.json")

    series = {method: [(n, *spread(scores(results, method=method, labels=n).values())) for n in sorted(labels)]
              for method in ROWS}
    curves(series, "labelled images", "mIoU %").save(os.path.join(args.out, "label_efficiency.png"))
    prediction_grid(args, cells).save(os.path.join(args.out, "predictions.png"))
    say(f"written to {args.out}: table.md, results.json, label_efficiency.png, predictions.png")


if __name__ == "__main__":
    launch.run_script(main)
