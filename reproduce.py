"""The paper's comparison on the embedded data: four initialisations x three label budgets x three seeds.

For each seed: stage 1 once, stage 2 twice (DDeP and DeP), then stage 3 from each initialisation with each
number of labels, all with one recipe. A seed is a full repetition: fresh weights in every stage, another
label subset. Each run is a script of its own in results/runs; a finished run is never repeated.

Out: table.md (mean ± standard deviation (number of runs)), results.json (every run) and two figures.
"""
import os
import signal
import statistics
import subprocess
import sys
import time
from itertools import product

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

METHODS = ("No pretraining", "Supervised", "DeP", "DDeP")
HERE = os.path.dirname(os.path.abspath(__file__))


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("--out", default="results", metavar="DIR", help="where everything goes")
    add("--labels", type=launch.positive_int, nargs="+", default=[8, 32, 128], help="label budgets")
    add("--seeds", type=launch.seed_int, nargs="+", default=[0, 1, 2], help="repetitions")
    add("--gamma", type=launch.unit_float, default=0.95, help="noise level of DeP and DDeP")
    add("--steps", type=launch.positive_int, nargs=3, metavar=("S1", "S2", "S3"),
        help="steps of the three stages (default: those of the scripts)")
    add("--jobs", type=launch.positive_int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    args = parser.parse_args(argv)
    for name, values in (("seeds", args.seeds), ("labels", args.labels)):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: expected each once")
    return args


# ---------------------------------------- The runs


def plan(args):
    """{name of a run: (its command, the names of the runs it needs)}, in order."""
    steps = [["--steps", str(n)] for n in args.steps] if args.steps else [[], [], []]
    runs = {}
    for seed in args.seeds:
        def add(name, script, *flags, needs=()):
            name = f"seed{seed}/{name}"
            command = [sys.executable, os.path.join(HERE, script), "--out", path(args, name),
                       "--seed", str(seed), "--device", args.device, *map(str, flags)]
            runs[name] = command, [f"seed{seed}/{need}" for need in needs]

        encoder, dep, ddep = (path(args, f"seed{seed}/{name}", "last.pt")
                              for name in ("encoder", "dep", "ddep"))
        add("encoder", "pretrain_encoder.py", *steps[0])
        add("dep", "pretrain_decoder.py", "--method", "dep", "--gamma", args.gamma, *steps[1])
        add("ddep", "pretrain_decoder.py", "--method", "ddep", "--gamma", args.gamma,
            "--encoder-weights", encoder, *steps[1], needs=["encoder"])
        inits = (("none", []), (encoder, ["encoder"]), (dep, ["dep"]), (ddep, ["ddep"]))
        for method, (init, needs) in zip(METHODS, inits):
            for labels in args.labels:
                add(run_name(method, labels), "finetune.py", "--init", init, "--labels", labels,
                    "--subset-seed", seed, *steps[2], needs=needs)
    return runs


def run_name(method, labels):
    return f"{method.lower().replace(' ', '_')}_{labels}_labels"


def path(args, run, *file):
    return os.path.join(args.out, "runs", *run.split("/"), *file)


def run_all(runs, args):
    """Run what is not finished, --jobs at a time, each with its share of the cores."""
    def finished(name):
        return is_finished(path(args, name))

    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    waiting = {name: run for name, run in runs.items() if not finished(name)}
    running, total, started = {}, len(waiting), time.perf_counter()
    bar = tqdm(total=len(runs), initial=len(runs) - total, unit="run", dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            ready = [name for name, (_, needs) in waiting.items() if all(map(finished, needs))]
            for name in ready[:args.jobs - len(running)]:
                command, _ = waiting.pop(name)
                os.makedirs(path(args, name), exist_ok=True)
                with open(path(args, name, "output.txt"), "a") as output:
                    running[name] = subprocess.Popen(command, env=environment, stdout=output,
                                                     stderr=subprocess.STDOUT)
            time.sleep(0.2)  # until one of the processes ends
            for name in [name for name, process in running.items() if process.poll() is not None]:
                status = running.pop(name).returncode
                if status or not finished(name):
                    output = path(args, name, "output.txt")
                    with open(output, errors="replace") as file:
                        last = (file.read().strip() or "no output").splitlines()[-1]
                    raise InputError(f"the run {name} ended with status {status}: {last} (see {output})")
                bar.update()
                if bar.disable:
                    left = len(waiting) + len(running)
                    minutes = (time.perf_counter() - started) / (total - left) * left / 60
                    say(f"{len(runs) - left}/{len(runs)} finished: {name}; about {minutes:.0f} min left")
    finally:
        bar.close()
        for process in running.values():  # each continues from its checkpoint next time
            process.terminate()
        for process in running.values():
            process.wait()


# ---------------------------------------- The results


def collect(args):
    """[{"method", "labels", "seed", and the content of metrics.json} of each fine-tuning run]."""
    results = []
    for seed, method, labels in product(args.seeds, METHODS, args.labels):
        metrics = path(args, f"seed{seed}/{run_name(method, labels)}", "metrics.json")
        results.append({"method": method, "labels": labels, "seed": seed, **read_json(metrics)})
    return results


def scores(results, method, labels):
    """mIoU in percent of each seed."""
    return [100 * run["miou"] for run in results if (run["method"], run["labels"]) == (method, labels)]


def spread(values):
    """(mean, standard deviation with n - 1; 0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results, args):
    """Markdown: methods x budgets, then differences, paired by seed."""
    rows = {method: [scores(results, method, labels) for labels in args.labels] for method in METHODS}
    for a, b in (("Supervised", "No pretraining"), ("DDeP", "Supervised"), ("DDeP", "DeP")):
        rows[f"*{a} − {b}*"] = [[x - y for x, y in zip(*columns)] for columns in zip(rows[a], rows[b])]
    lines = ["| mIoU % (runs) | " + " | ".join(f"{labels} labels" for labels in args.labels) + " |",
             "|---|" + "---|" * len(args.labels)]
    for title, columns in rows.items():
        cells = ["{:.1f} ± {:.1f} ({})".format(*spread(values), len(values)) for values in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def prediction_grid(args, rows=6):
    """Image, truth and the four predictions, of the first seed, at the middle budget."""
    budget = sorted(args.labels)[len(args.labels) // 2]
    val, names = segmentation_pairs("shapes", None, "val")
    colours, networks = class_colours("shapes", len(names)), []
    for method in METHODS:
        checkpoint = load_checkpoint(path(args, f"seed{args.seeds[0]}/{run_name(method, budget)}", "last.pt"))
        network = build_unet(**checkpoint["model_args"])
        network.load_state_dict(checkpoint["model"])
        networks.append(network.eval())
    pictures = []
    for row in range(rows):
        sample = val.read(row * len(val) // rows)
        x = to_pixels(sample["image"].as_subclass(torch.Tensor)[None])
        masks = [sample["mask"]] + [predict(network, x).argmax(1)[0] for network in networks]
        pictures.append([from_pixels(x[0])] + [colour_mask(mask, colours) for mask in masks])
    return sheet(pictures, ["image", "truth", *METHODS], 112, names, colours)


def main():
    args = parse_arguments()
    runs = plan(args)
    make_folder(args.out, written={"runs", "results.json", "table.md"})
    lock = lock_folder(args.out)  # noqa: F841  held until this process ends
    args_file = os.path.join(args.out, "args.json")
    if os.path.exists(args_file):
        refuse_other_flags(args.out, read_json(args_file), vars(args),
                           free={"out", "jobs", "device", "seeds", "labels"})
    write_json(args_file, vars(args))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are stopped, and save
    say(f"{len(runs)} runs into {args.out}/runs, {args.jobs} at a time; stop and start again at any time")
    run_all(runs, args)

    results = collect(args)
    write_json(os.path.join(args.out, "results.json"), results)
    text = table(results, args)
    with replacing(os.path.join(args.out, "table.md")) as file:
        file.write(f"{text}\n".encode())
    series = {method: [(labels, *spread(scores(results, method, labels))) for labels in sorted(args.labels)]
              for method in METHODS}
    curves(series, "labelled images", "mIoU %").save(os.path.join(args.out, "label_efficiency.png"))
    prediction_grid(args).save(os.path.join(args.out, "predictions.png"))
    say(f"{text}\n\nwritten to {args.out}: table.md, results.json, label_efficiency.png, predictions.png")


if __name__ == "__main__":
    launch.run_script(main)
