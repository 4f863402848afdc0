"""What came out: each table beside the paper's numbers, curves, predictions, all on one page."""
import json
import math
import os
import socket
import statistics
import time
from fractions import Fraction

import torch

import launch
import noise
from data import to_pixels
from datasets import class_colours, pretraining_images, segmentation_pairs
from evaluate import predict
from launch import InputError, say
from model import WeightsError
from pictures import colour_mask, curves, from_pixels, sheet
from run_folder import build, load_checkpoint, replacing

PICTURES = ("noise", "curve", "predictions")  # of a table
# Student's t at 97.5 % for 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)


def interval(differences):
    """Half of the 95 % confidence interval of the mean of two and more, by Student's t."""
    n = len(differences)
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.1
    return quantile * statistics.stdev(differences) / math.sqrt(n)


def mean_text(values):
    """Mean ± standard deviation (number of values)."""
    mean, deviation = spread(values)
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def spread(values):
    """(mean, standard deviation with n - 1; 0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table, scores):
    """A table. scores: {(row's name, column): {seed: mIoU %}}."""
    same_data = any(row.data != "shapes" for row in table.rows)  # else a difference would mean nothing
    beside = "; the paper's" + "; difference" * same_data if any(row.paper for row in table.rows) else ""
    lines = [f"| mIoU %: ours ± standard deviation (runs){beside} | {' | '.join(table.columns)} |",
             "|---|" + "---|" * len(table.columns)]
    for row in table.rows:
        texts = []
        for i, column in enumerate(table.columns):
            values = list(scores[row.name, column].values())
            parts = [mean_text(values) if values else "–"]
            if row.paper:
                parts.append(f"{row.paper[i]:.2f}")
                parts += [f"{statistics.mean(values) - row.paper[i]:+.1f}"] if values and same_data else []
            texts.append("; ".join(parts))
        lines.append(f"| {row.name} | {' | '.join(texts)} |")
    for name, numbers in table.cited:
        texts = ["–" if number is None else f"{number:.2f}" for number in numbers]
        lines.append(f"| {name} (cited in the paper, not run here) | {' | '.join(texts)} |")
    for a, b in table.pairs:
        texts = []
        for column in table.columns:
            first, second = scores[a, column], scores[b, column]
            pairs = [first[seed] - second[seed] for seed in first if seed in second]
            half = f" ± {interval(pairs):.1f}" if len(pairs) > 1 else ""
            texts.append(f"{statistics.mean(pairs):+.1f}{half}" if pairs else "")
        lines.append(f"| *{a} − {b}, in pairs, ± 95 % interval* | {' | '.join(texts)} |")
    return "\n".join(lines)


def sweep_markdown(grid, name):
    """All candidates of a table's cells that have been run; the chosen ones in bold."""
    lines = ["| row | labels | stage 2 | stage 3 | mIoU % | mean |", "|---|---|---|---|---|---|"]
    for cell in grid.cells:
        if cell.table != name or grid.tables[name].sweep_column not in ("", cell.column):
            continue
        chosen = grid.rates(cell) if grid.sweeps[name] else None
        for mean, rates, scores in grid.tuned(cell):
            bold = "**" if rates == chosen else ""
            values = " ".join(f"{score:.1f}" for score in scores)
            stage_2 = rates[0] if cell.row.init.startswith("--") else ""
            lines.append(f"| {cell.row.name} | {cell.column} | {stage_2} | {rates[1]} | {values} | "
                         f"{bold}{mean:.1f}{bold} |")
    return "\n".join(lines)


def share_of(column):
    """A column as a number: labelled images, or percent of them."""
    if column.endswith((" labels", "%")):
        return float(column.removesuffix(" labels").removesuffix("%"))
    return float(100 * Fraction(column))


def curve(table, scores):
    """The picture of a table that is a curve in the paper, of what is there; None: of nothing yet."""
    series = {}
    for row in table.rows:
        for column in table.columns:
            values = list(scores[row.name, column].values())
            if not values:
                continue
            if table.curve == "labels":
                series.setdefault(row.name, []).append((share_of(column), *spread(values)))
            else:  # "Pascal Context, magnitude 0.22": the number is x, what stands before it the series
                name, _, x = row.name.rpartition(" ")
                name = f"{name.rpartition(', ')[0]} {column}".strip()
                series.setdefault(name, []).append((float(x), *spread(values)))
    if table.curve == "noise magnitude" and len(series) > 1:
        lines = [{x: mean for x, mean, _ in line} for line in series.values()]
        common = [x for x in lines[0] if all(x in line for line in lines)]
        if common:
            series["mean"] = [(x, statistics.mean(line[x] for line in lines), 0) for x in common]
    series = {in_pictures(name): sorted(line) for name, line in series.items()}
    unit = "labelled images" if table.columns[0].endswith("labels") else "% of the labels"
    return curves(series, unit if table.curve == "labels" else table.curve, "mIoU %") if series else None


def in_pictures(name):
    """A row's name in the characters that Pillow's own font has."""
    return name.replace("×", "x").replace("ε", "noise")


def noise_panel(source):
    """Figure 4: an image of a source with simple noise (Eq. 1) and scaled noise (Eq. 5) of the same ratio."""
    sigmas = (0.1, 0.23, 0.5, 0.8, 1.2)
    x = to_pixels(source.read(0)["image"].as_subclass(torch.Tensor)[None])[..., :256, :256]
    eps = noise.sample_noise(x.shape, [0], x.device)
    simple = [noise.simple_additive_noise(x, eps, sigma)[0] for sigma in sigmas]
    scaled = [noise.scaled_additive_noise(x, eps, noise.sigma_to_gamma(sigma))[0] for sigma in sigmas]
    rows = [[from_pixels(picture) for picture in (x[0], *pictures)] for pictures in (simple, scaled)]
    return sheet(rows, ["image", *(f"sigma {sigma}" for sigma in sigmas)], 160)


@torch.no_grad()
def prediction_grid(grid, name, pictures=6):
    """Validation images, truth, and what each row on the first row's data set predicts after fine-tuning on the
    fewest labels, with the first seed. None: there are no weights yet.
    """
    table, device = grid.tables[name], launch.start_processes(grid.args.device).device
    column = min(table.columns, key=share_of)
    data = table.rows[0].data
    cells = [cell for cell in grid.cells if (cell.table, cell.column, cell.row.data) == (name, column, data)]
    networks, seen = {}, set()
    for cell in cells:
        rates = grid.rates(cell)
        if rates is None:
            continue
        path = grid.path(grid.chain(cell, 0, rates)[-1].name, "last.pt")
        if path not in seen and os.path.exists(path):  # two rows may be one run
            seen.add(path)
            checkpoint = load_checkpoint(path)
            window = checkpoint["args"].get("crop_size", 0)
            networks[cell.row.name] = build(checkpoint, path).to(device).eval(), window
    if not networks:
        return None
    val, names = segmentation_pairs(data, getattr(grid.args, data, None), "val")
    colours, rows = class_colours(data, len(names)), []
    for number in range(pictures):
        sample = val.read(number * len(val) // pictures)
        x = to_pixels(sample["image"].as_subclass(torch.Tensor)[None])
        masks = [predict(network, x.to(device), window=window).argmax(1)[0].cpu()
                 for network, window in networks.values()]
        rows.append([from_pixels(x[0]), *(colour_mask(mask, colours) for mask in (sample["mask"], *masks))])
    titles = ["image", "truth", *map(in_pictures, networks)]
    return sheet(rows, titles, 112, names if len(names) < 30 else (), colours)


class Pages:
    """results.md, results.json, sweep_TABLE.md, pictures: of this command's tables and of earlier ones'."""

    def __init__(self, grid, asked, note=""):
        """grid: all tables and all repeats that may be in the folder; asked: the tables of this command."""
        self.grid, self.asked, self.note, self.out = grid, asked, note, grid.args.out
        self.printed, self.last_printed, self.complete = {}, time.monotonic(), {}

    def update(self, final=False):
        """Write the pages, print what is new; final: draw the pictures, too."""
        scores = {name: self.grid.scores_of(name) for name in self.grid.tables}
        for name in self.asked:
            self._print(name, scores[name], final)
            if final:
                try:
                    self._draw(name, scores[name])
                except (InputError, WeightsError) as error:  # of a file that is gone or damaged since
                    say(f"{name}: no picture: {error}")
        self._write_pages(scores)

    def _print(self, name, scores, final):
        """A table with one more repeat in all cells; before the first, every three minutes what is there."""
        text, complete = markdown(self.grid.tables[name], scores), min(map(len, scores.values()), default=0)
        early = complete == 0 and time.monotonic() - self.last_printed > 180
        due = complete > self.complete.get(name, 0) or early or final
        if due and any(scores.values()) and text != self.printed.get(name):
            self.complete[name], self.printed[name], self.last_printed = complete, text, time.monotonic()
            say(f"\n{self.grid.tables[name].title}\n\n{text}\n")

    def _write_pages(self, scores):
        sections, results = [], {}
        for name, table in self.grid.tables.items():
            pictures = [f"![{table.title}: {kind}]({name}_{kind}.png)" for kind in PICTURES
                        if os.path.exists(os.path.join(self.out, f"{name}_{kind}.png"))]
            if not (any(scores[name].values()) or pictures or name in self.asked):
                continue
            text = [markdown(table, scores[name])] if table.rows else []
            sections += [f"## {table.title}", *text, *pictures]
            sweep = sweep_markdown(self.grid, name)
            if len(sweep.splitlines()) > 2:
                self._write(f"sweep_{name}.md", f"# The rates: {table.title}\n\n{sweep}\n")
                sections.append(f"How the rates were chosen: [all candidates](sweep_{name}.md).")
            results[name] = [{"row": row, "column": column, "seed": seed, "miou": value / 100}
                             for (row, column), cell in scores[name].items() for seed, value in cell.items()]
        self._write("results.md", "\n\n".join(["# Results", *filter(None, [self.note]), *sections]) + "\n")
        self._write("results.json", json.dumps(results, indent=1))

    def _draw(self, name, scores):
        table, pictures = self.grid.tables[name], {}
        if name == "figure4":
            folder = self.grid.args.imagenet21k if self.grid.args.scale == "paper" else None
            pictures["noise"] = noise_panel(pretraining_images("imagenet21k" if folder else "shapes", folder))
        if table.curve:
            pictures["curve"] = curve(table, scores)
        if table.rows:
            pictures["predictions"] = prediction_grid(self.grid, name)
        for kind, picture in pictures.items():
            if picture is not None:
                with ours(self.out, f"{name}_{kind}.png") as file:
                    picture.save(file, "PNG")

    def _write(self, name, text):
        with ours(self.out, name) as file:
            file.write(text.encode())


def ours(out, name):
    """A file of OUT to write in, beside which no other worker writes."""
    beside = f"{socket.gethostname()}_{os.getpid()}.tmp"
    return replacing(os.path.join(out, name), beside=os.path.join(out, beside))
