"""The paper's experiment on the embedded data: four initialisations x three label budgets x three seeds.

    python reproduce.py                  # everything, into results/; stop it and start it again as you like

For each seed: stage 1 once, stage 2 twice (DDeP and DeP), then stage 3 from each initialisation with each number of labels, all
with one recipe: the same steps, rate and crops. A seed is a full repetition: fresh weights in every stage, another label subset.
Each run is one of this project's scripts in a process of its own, in results/runs; a finished run is never repeated. Nothing here
looks at which method wins.

Out: results/table.md (mean, standard deviation, number of runs), results.json (every run), label_efficiency.png (as Figure 1,
right), predictions.png.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import checkpoints
import runtime
from data import to_pixels
from datasets import class_colours, segmentation_pairs
from evaluate import predict
from model import build_unet
from pictures import colour_mask, curves, from_pixels, sheet
from runtime import InputError

METHODS = ("No pretraining", "Supervised", "DeP", "DDeP")
HERE = os.path.dirname(os.path.abspath(__file__))


def parse_arguments(argv=None):
    parser = runtime.Parser(__doc__)
    parser.add_argument("--out", default="results", metavar="DIR", help="where everything goes")
    parser.add_argument("--labels", type=runtime.positive_int, nargs="+", default=[8, 32, 128], metavar="N", help="label budgets")
    parser.add_argument("--seeds", type=runtime.non_negative_int, nargs="+", default=[0, 1, 2], metavar="N", help="repetitions")
    parser.add_argument("--gamma", type=runtime.unit_float, default=0.95, metavar="G", help="noise level of both denoising methods")
    parser.add_argument("--steps", type=runtime.positive_int, nargs=3, metavar=("S1", "S2", "S3"),
                        help="steps of the three stages (default: those of the scripts)")
    parser.add_argument("--jobs", type=runtime.positive_int, default=min(2, os.cpu_count() or 1), metavar="N", help="runs at a time")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def plan(args):
    """{name of the run: (command, names of the runs it needs)}, in order. A run's folder is results/runs/<name>."""
    steps = [["--steps", str(n)] for n in args.steps] if args.steps else [[], [], []]
    runs = {}
    for seed in args.seeds:
        def path(name, file=""):
            return os.path.join(args.out, "runs", f"seed{seed}", name, file).rstrip(os.sep)

        def add(name, script, *flags, needs=()):
            command = [sys.executable, os.path.join(HERE, script), "--out", path(name), "--seed", str(seed), "--device", args.device]
            runs[f"seed{seed}/{name}"] = [*command, *map(str, flags)], [f"seed{seed}/{need}" for need in needs]

        encoder, ddep, dep = (path(name, "last.pt") for name in ("encoder", "ddep", "dep"))
        add("encoder", "pretrain_encoder.py", *steps[0])
        add("dep", "pretrain_decoder.py", "--method", "dep", "--gamma", args.gamma, *steps[1])
        add("ddep", "pretrain_decoder.py", "--method", "ddep", "--gamma", args.gamma, "--encoder-weights", encoder, *steps[1],
            needs=["encoder"])
        for method, init, needs in zip(METHODS, ("none", encoder, dep, ddep), ([], ["encoder"], ["dep"], ["ddep"])):
            for labels in args.labels:
                add(run_name(method, labels), "finetune.py", "--init", init, "--labels", labels, "--subset-seed", seed, *steps[2],
                    needs=needs)
    return runs


def run_name(method, labels):
    return f"{method.lower().replace(' ', '_')}_{labels}_labels"


def run_all(runs, args):
    """Run what is not finished, --jobs at a time, each with its share of the cores. Their output goes to output.txt in their folders."""
    def finished(name):
        return checkpoints.is_finished(os.path.join(args.out, "runs", name))

    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), "PYTHONUNBUFFERED": "1"}
    waiting, running = {name: run for name, run in runs.items() if not finished(name)}, {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())
    started, total = time.perf_counter(), len(waiting)
    try:
        while waiting or running:
            for name in [name for name, (_, needs) in waiting.items() if all(map(finished, needs))][:args.jobs - len(running)]:
                folder = os.path.join(args.out, "runs", name)
                os.makedirs(folder, exist_ok=True)
                with open(os.path.join(folder, "output.txt"), "a") as output:
                    running[name] = subprocess.Popen(waiting.pop(name)[0], env=environment, stdout=output, stderr=subprocess.STDOUT)
                bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)                                               # until one of the processes ends
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode or not finished(name):
                        output = os.path.join(args.out, "runs", name, "output.txt")
                        with open(output) as file:
                            last = (file.read().strip().splitlines() or ["no output"])[-1]
                        raise InputError(f"the run {name} ended with exit status {process.returncode}: {last} (all of it: {output})")
                    bar.update()
                    if bar.disable:
                        done = total - len(waiting) - len(running)
                        left = (time.perf_counter() - started) / done * (total - done)
                        print(f"{len(runs) - total + done}/{len(runs)} finished: {name}; about {left / 60:.0f} min left", flush=True)
    finally:
        bar.close()
        for process in running.values():                                  # stopped: each continues from its checkpoint next time
            process.terminate()
        for process in running.values():
            process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def collect(args):
    """Every fine-tuning run: [{"method", "labels", "seed", "miou", "pixel_accuracy", "iou"}, ...]."""
    results = []
    for seed in args.seeds:
        for method in METHODS:
            for labels in args.labels:
                with open(os.path.join(args.out, "runs", f"seed{seed}", run_name(method, labels), "metrics.json")) as file:
                    results.append({"method": method, "labels": labels, "seed": seed, **json.load(file)})
    return results


def spread(values):
    """(mean, standard deviation with n - 1; 0 for one value) of fractions, in percent."""
    values = [100 * value for value in values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results, args):
    """The table as Markdown: methods x budgets, then the differences that the paper is about, seed by seed."""
    def miou(method, labels):
        return [run["miou"] for run in results if (run["method"], run["labels"]) == (method, labels)]

    def row(title, values):
        return f"| {title} | " + " | ".join("{:.1f} ± {:.1f} ({})".format(*spread(v), len(v)) for v in values) + " |"

    def difference(a, b):
        return [[x - y for x, y in zip(miou(a, labels), miou(b, labels))] for labels in args.labels]

    lines = ["| mIoU % (runs) | " + " | ".join(f"{labels} labels" for labels in args.labels) + " |",
             "|---|" + "---|" * len(args.labels)]
    lines += [row(method, [miou(method, labels) for labels in args.labels]) for method in METHODS]
    lines += [row("*Supervised − No pretraining*", difference("Supervised", "No pretraining")),
              row("*DDeP − Supervised*", difference("DDeP", "Supervised")), row("*DDeP − DeP*", difference("DDeP", "DeP"))]
    return "\n".join(lines)


@torch.no_grad()
def prediction_grid(args, rows=6):
    """Image, truth and the predictions of the four networks of the first seed, at the middle budget."""
    budget = sorted(args.labels)[len(args.labels) // 2]
    val, names = segmentation_pairs("shapes", None, "val")
    networks = []
    for method in METHODS:
        checkpoint = checkpoints.load_checkpoint(os.path.join(args.out, "runs", f"seed{args.seeds[0]}", run_name(method, budget), "last.pt"))
        network = build_unet(**checkpoint["model_args"])
        network.load_state_dict(checkpoint["model"])
        networks.append(network.eval())
    pictures = []
    for i in range(0, len(val), len(val) // rows):
        sample = val.read(i)
        x = to_pixels(sample["image"].as_subclass(torch.Tensor)[None])
        masks = [sample["mask"]] + [predict(network, x).argmax(1)[0] for network in networks]
        pictures.append([from_pixels(x[0])] + [colour_mask(mask, class_colours("shapes", len(names))) for mask in masks])
    return sheet(pictures[:rows], ["image", "truth", *METHODS], height=112)


def main():
    args = parse_arguments()
    runs = plan(args)
    checkpoints.make_folder(args.out)
    lock = checkpoints.claim(args.out)                                    # noqa: F841  held until this process ends
    if os.path.exists(path := os.path.join(args.out, "args.json")):
        checkpoints.refuse_other_flags(args.out, checkpoints.read_json(path), vars(args), free={"out", "jobs", "device", "seeds", "labels"})
    runtime.write_json(path, vars(args))
    signal.signal(signal.SIGTERM, signal.default_int_handler)             # as Ctrl-C: the runs are stopped, and save
    print(f"{len(runs)} runs into {args.out}/runs, {args.jobs} at a time; stop and start again as you like", flush=True)
    run_all(runs, args)

    results = collect(args)
    with open(os.path.join(args.out, "results.json"), "w") as file:
        json.dump(results, file, indent=2)
    with open(os.path.join(args.out, "table.md"), "w", encoding="utf-8") as file:
        file.write(table(results, args) + "\n")
    series = {method: [(labels, *spread([run["miou"] for run in results if (run["method"], run["labels"]) == (method, labels)]))
                       for labels in sorted(args.labels)] for method in METHODS}
    curves(series, "labelled images", "mIoU %").save(os.path.join(args.out, "label_efficiency.png"))
    prediction_grid(args).save(os.path.join(args.out, "predictions.png"))
    print(table(results, args))
    print(f"\nwritten to {args.out}: table.md, results.json, label_efficiency.png, predictions.png")


if __name__ == "__main__":
    runtime.run(main)
