"""Evaluation: mIoU of a fine-tuned network over a whole data set (sections 2 and 5.1).

    python evaluate.py --checkpoint runs/shapes/finetune/best.pt              # its own validation images
    python evaluate.py --checkpoint best.pt --data folder --root my_data --flip           # your own data
    python evaluate.py --checkpoint best.pt --data folder --root photos --save-predictions out   # no masks
    torchrun --nproc_per_node=8 evaluate.py --checkpoint best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip

In: a checkpoint of finetune.py. Out, in --out: metrics.json (fractions of 1; incomplete.json where images
cannot be read) and args.json; in the folder of --save-predictions: index PNGs at the size of the images, and
colour overlays.

ONE confusion matrix counts the pixels of all images, without those of value 255. Per class IoU = TP / (TP +
FP + FN); mIoU is its mean over the classes that occur in the truth or in a prediction.
"""
import argparse
import os
import sys
from collections import Counter
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import launch
from data import IGNORE, Each, Pixels, Samples, Scale, UnreadableImage, in_rounds, load, to_pixels
from datasets import (DATA_SETS, LABELLED, SPLITS, class_colours, labelled_parts, listed_images, look_at,
                      pretraining_images, segmentation_pairs, stem)
from launch import InputError, say
from pictures import as_picture, overlay
from run_folder import (FREE_TO_CHANGE, build, intact, load_checkpoint, make_folder, read_json,
                        refuse_other_flags, write_json)

RECIPE = {  # 5.1
    "shapes": dict(scales=[1.0], flip=False, workers=0),
    "paper": dict(scales=[1.0], flip=True, workers=launch.default_workers()),
    **{name: data_set.evaluation for name, data_set in DATA_SETS.items()},
}
WRITTEN = {"metrics.json", "incomplete.json", "index", "overlay",  # in --out and --save-predictions
           "probabilities"}


# ---------------------------------------- Scores


def confusion_matrix(prediction, truth, num_classes):
    """int64 (N, N): entry [t, p] counts the pixels of class t that were predicted as p."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion, names):
    """Scores by class name, their means and pixel accuracy, 0 to 1; None for classes that do not occur.

    A mean is over the classes that occur in the truth or in a prediction. Precision is 0 for one of them that
    is never predicted, recall for one that is not in the truth.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    ratios = {"iou": hits / (truth + predicted - hits), "dice": 2 * hits / (truth + predicted),
              "precision": hits / predicted.clamp(min=1), "recall": hits / truth.clamp(min=1)}
    occurs = (truth + predicted > 0).tolist()
    found = {"pixel_accuracy": (hits.sum() / confusion.sum()).item() if any(occurs) else None}
    for name, values in ratios.items():
        values = [value if there else None for value, there in zip(values.tolist(), occurs)]
        occurring = [value for value in values if value is not None]
        mean = sum(occurring) / len(occurring) if occurring else None
        found.update({"miou" if name == "iou" else f"mean_{name}": mean, name: dict(zip(names, values))})
    return found


def table(metrics):
    """The scores as text, in percent."""
    columns = ("iou", "dice", "precision", "recall")
    means = [metrics["miou"], *(metrics[f"mean_{column}"] for column in columns[1:])]
    rows = [(name, [metrics[column][name] for column in columns]) for name in metrics["iou"]]
    width = max(map(len, [*metrics["iou"], "pixel accuracy"]))

    def line(name, values):
        return f"{name:{width}}" + "".join(f"{'-':>11}" if value is None else f"{100 * value:11.2f}"
                                           for value in values)

    return "\n".join([f"{'class':{width}}      IoU %     Dice %  precision     recall",
                      *(line(*row) for row in rows), "-" * (width + 44), line("mean (mIoU)", means),
                      line("pixel accuracy", [metrics["pixel_accuracy"]]), f"{metrics['images']} images"])


# ---------------------------------------- Predictions


def window_starts(size, window, stride):
    """Where windows start that cover `size`: every `stride`, the last one at the edge."""
    if window >= size:
        return [0]
    return [*range(0, size - window, stride), size - window]


def window_rows(model, x, window, stride, mirrored=False):
    """Logits of x (1, bands, H, W), window by window: yields blocks (1, C, h, W) of rows, top to bottom.

    Where windows overlap they are averaged; only rows that the next windows overlap are kept. Window 0: the
    whole image. window = stride = 1024 on 1024x2048 are Cityscapes' two patches (5.1). mirrored: the network
    sees the mirror image, its logits are mirrored back.
    """
    height, width = x.shape[-2:]
    if not window or window >= max(height, width):
        yield model(x.flip(3)).flip(3) if mirrored else model(x)
        return
    tops, total = window_starts(height, window, stride), None
    for top, next_top in zip(tops, [*tops[1:], height]):
        rows = x[..., top:top + window, :]
        rows = rows.flip(3) if mirrored else rows
        for left in window_starts(width, window, stride):
            logits = model(rows[..., left:left + window])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], 0, width)
                count = torch.zeros(0, width, device=x.device)
            missing = (0, 0, 0, rows.shape[2] - len(count))
            total, count = F.pad(total, missing), F.pad(count, missing)
            total[..., left:left + window] += logits
            count[:, left:left + window] += 1
        done = next_top - top
        block = total[:, :, :done] / count[:done]
        total, count = total[:, :, done:].clone(), count[done:].clone()
        block = block.flip(3) if mirrored else block
        yield block


def predict_rows(model, x, scales=(1.0,), flip=False, window=0, stride=None, average="logits"):
    """Scores of an image x (1, bands, H, W): the average over scales and mirror images (5.1).

    x: in [-1, 1], or uint8, which becomes that window by window. Yields blocks (1, C, h, W) of rows, from top
    to bottom: at scale 1 a row of windows at a time, so that the logits of a large image are never there as a
    whole. The logits of other scales are brought to the image's own size (bilinear), all in one block. PAPER
    SILENT on logits or probabilities ("average the results"): `average` takes either name.
    """
    def network(part):
        if part.dtype == torch.uint8:
            part = to_pixels(part).contiguous(memory_format=torch.channels_last)
        return model(part)

    def scores_at(scale, mirrored):
        scaled = x
        if scale != 1:
            size = [max(1, round(scale * side)) for side in x.shape[-2:]]
            pixels = to_pixels(x) if x.dtype == torch.uint8 else x
            scaled = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        blocks = (block.float() for block in window_rows(network, scaled, window, stride or window, mirrored))
        if set(scales) != {1}:
            logits = torch.cat(list(blocks), dim=2)
            blocks = [logits if scale == 1 else F.interpolate(logits, x.shape[-2:], mode="bilinear")]
        for logits in blocks:
            yield logits.softmax(1) if average == "probabilities" else logits

    mirrors = [False, True] if flip else [False]
    views = [scores_at(scale, mirrored) for scale in scales for mirrored in mirrors]
    for blocks in zip(*views):
        yield sum(blocks) / len(views)


def predict(model, x, **how):
    """The scores of predict_rows as a whole: (1, C, H, W)."""
    return torch.cat(list(predict_rows(model, x, **how)), dim=2)


@torch.inference_mode()
def evaluate(model, source, names, processes, precision="fp32", workers=0, progress=False, on_prediction=None,
             on_scores=None, on_unreadable=None, between=lambda: None, **how):
    """The scores of `model` on `source`: every image counts once, on any number of processes.

    on_unreadable(error): for an image that does not decode, which is left out; else the error is raised.
    how: for `predict_rows`, whose blocks on_scores(index, first row, image height, block) gets.
    on_prediction(index, prediction (H, W) uint8, image (bands, H, W) in [0, 255]) gets every image of this
    process; between(): see in_rounds. Without masks the scores are None.
    """
    was_training = model.training
    model.eval()
    device, n = processes.device, len(names)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    samples = Samples(source, Scale(source.pixels.range))
    loader = load(samples, Each(len(source), processes.rank, processes.world), workers)
    loader.keep_unreadable = on_unreadable is not None
    unread = 0
    for batch in tqdm(in_rounds(loader, between), total=len(loader), unit="image", disable=not progress):
        if isinstance(batch, UnreadableImage):
            on_unreadable(batch)
            unread += 1
            continue
        index, top = batch["index"].item(), 0
        x = batch["image"].to(device)
        if x.dtype != torch.uint8:
            x = to_pixels(x).contiguous(memory_format=torch.channels_last)
        prediction = torch.empty(x.shape[-2:], dtype=torch.uint8)
        with launch.autocast(precision, device):
            for block in predict_rows(model, x, **how):
                classes, rows = block.argmax(1)[0], slice(top, top + block.shape[2])
                prediction[rows] = classes.byte().cpu()
                if "mask" in batch:
                    confusion += confusion_matrix(classes, batch["mask"][0, rows].to(device), n)
                if on_scores is not None:
                    on_scores(index, top, len(prediction), block)
                top = rows.stop
        if on_prediction is not None:
            on_prediction(index, prediction, batch["image"][0])
    model.train(was_training)
    unread = processes.sum_numbers(unread)
    return {**scores(processes.sum(confusion).cpu(), names), "images": len(source) - int(unread)}


class Predictions:
    """The files in --save-predictions: index/NAME.png, overlay/NAME.png, probabilities/NAME.npy."""

    def __init__(self, folder, source, colours, average):
        self.folder, self.source, self.colours, self.average = folder, source, colours, average
        self.probabilities = {}  # open files by the image's index
        names = [source.name(i) for i in range(len(source))] if folder else []
        stems, self.places, taken = Counter(map(stem, names)), [], {}
        for name in names:
            place = stem(name) if stems[stem(name)] == 1 else name  # a.png.png beside a.jpg.png
            # Always below the folder, though list files may name ../a.png or /a.png
            self.places.append(os.path.relpath(os.path.join("/", place), "/"))
            first = taken.setdefault(self.places[-1], name)
            if first != name:
                raise InputError(f"{first} and {name}: their predictions would be one file; predict them in "
                                 "two runs, with --list and a --save-predictions for each")

    def place(self, kind, index, ending):
        """The file for image `index`."""
        path = os.path.join(self.folder, kind, self.places[index] + ending)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def write(self, index, prediction, image):
        """A palette PNG of class indices, and their colours over the image."""
        indices = Image.fromarray(prediction.numpy())
        indices.putpalette(self.colours.tobytes())
        indices.save(self.place("index", index, ".png"))
        coloured = overlay(as_picture(image), prediction.numpy(), self.colours)
        Image.fromarray(coloured).save(self.place("overlay", index, ".png"))

    def write_probabilities(self, index, top, height, block):
        """float16 (classes, H, W): its rows from `top` on."""
        if top == 0:
            path, shape = self.place("probabilities", index, ".npy"), (block.shape[1], height, block.shape[3])
            self.probabilities[index] = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        block = block if self.average == "probabilities" else block.softmax(1)
        self.probabilities[index][:, top:top + block.shape[2]] = block[0].cpu().numpy()
        if top + block.shape[2] == height:
            del self.probabilities[index]


# ---------------------------------------- The script


def parse_arguments(argv=None):
    """(args, checkpoint, whether there are masks). The checkpoint decides the default data set."""
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", required=True, help="best.pt or last.pt of finetune.py")
    launch.add_data_flags(parser, LABELLED)
    add("--split", choices=SPLITS, default="val", help="which part of the data set")
    add("--list", metavar="FILE", help="text file, an `image mask` a line, instead of a split; with "
                                       "--save-predictions an `image` a line will do")
    add("--out", metavar="DIR",
        help="folder of metrics.json (default: beside NAME.pt, evaluate_NAME or evaluate_NAME_SPLIT)")
    add("--scales", type=launch.positive_float, nargs="+", help="image scales to average over (5.1)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image (5.1)")
    add("--window", type=launch.non_negative_int,
        help="side of the sliding window; 0: the whole image (default: the crop size of the fine-tuning); "
             "PAPER SILENT except for Cityscapes, 1024")
    add("--stride", type=launch.positive_int, help="step of the sliding window (default: its side)")
    add("--average", choices=("logits", "probabilities"), default="logits",
        help="what is averaged over scales and mirror images")
    add("--save-predictions", metavar="DIR",
        help="write index PNGs and colour overlays there; works without masks too, on all images in ROOT")
    add("--save-probabilities", action="store_true",
        help="with --save-predictions: class probabilities too, float16 .npy (classes, H, W): the softmax of "
             "the averaged logits or, with --average probabilities, the averaged softmax")
    add("--workers", type=launch.non_negative_int, help="loader processes per process")
    launch.add_device_flags(parser)

    # The checkpoint is read first: what it was made with are the defaults of the other flags
    path = launch.peek(argv, "--checkpoint")
    if path is None:  # --help, or a missing --checkpoint
        launch.parse(parser, RECIPE, argv)
    checkpoint = load_checkpoint(path)
    with intact(path):
        if "class_names" not in checkpoint or "width" not in checkpoint["model_args"]:
            raise InputError(f"{path}: not a checkpoint of finetune.py; this network was never fine-tuned for "
                             "segmentation")
        trained, names = checkpoint["args"], checkpoint["class_names"]
        window, data = trained.get("crop_size", 0), trained.get("data", "shapes")
        outputs = checkpoint["model_args"].get("out_channels", len(names))
        if len({*map(str.strip, names)}) != outputs or data not in LABELLED or not 0 <= int(window) == window:
            raise ValueError(f"--data {data}, classes {names}, window {window}")
        parser.set_defaults(window=window)
        made_for = {"data": data, "root": trained.get("root"),
                    "pixel_range": trained.get("pixel_range"), "huge": trained.get("huge", False)}
        if made_for["pixel_range"] is not None:
            made_for["pixel_range"] = list(map(float, made_for["pixel_range"]))
        if launch.peek(argv, "--root") is None and launch.peek(argv, "--split") is None:
            made_for["list"] = trained.get("val_list")
        args = launch.parse(parser, RECIPE, argv, made_for)
        if checkpoint["model_args"]["encoder"] == "resnet50" and launch.peek(argv, "--scales") is None:
            args.scales = [1.0]  # Table 7: ResNet-50 without multi-scale
        os.path.join(args.root or "", args.list or "")  # a TypeError for what is no path
    if args.stride and not args.window:
        raise InputError("--stride without --window: the whole image is one window; pass --window N too")
    if args.stride and args.stride > args.window:
        raise InputError(f"--stride {args.stride} is longer than --window {args.window}: no window would see "
                         "what lies between; pass a shorter one")
    if args.data != "folder":
        labelled = True
    elif args.list is not None:
        labelled = listed_images(args.list, args.root) is None
    else:
        labelled = not os.path.isdir(args.root or "") or os.path.isdir(os.path.join(args.root, "masks"))
    if args.save_probabilities and args.save_predictions is None:
        raise InputError("--save-probabilities goes with --save-predictions DIR")
    if not labelled and args.save_predictions is None:
        where = f"{args.root}: no folder masks in it" if args.list is None else f"{args.list}: names no masks"
        raise InputError(f"{where}, so nothing to compare with; pass --save-predictions DIR to write "
                         f"predictions, or a root with images/{args.split} and masks/{args.split}")
    if not labelled:
        args.out = args.save_predictions  # there are no scores: everything goes there
    elif args.out is None:
        folder, name = os.path.split(os.path.splitext(path)[0])
        args.out = os.path.join(folder, f"evaluate_{name}" + ("" if args.split == "val" else f"_{args.split}"))
    return args, checkpoint, labelled


def labelled_source(args, checkpoint, pixels):
    """The pairs to evaluate on, with the classes of the checkpoint."""
    trained, names = checkpoint["args"], checkpoint["class_names"]
    without_names = args.data == "folder" and not os.path.isfile(os.path.join(args.root or "", "classes.txt"))
    by_checkpoint = without_names or (args.data == "pascal_context" and len(names) == 60)
    num_classes = len(names) if by_checkpoint else None
    held_out = trained.get("val_fraction") is not None or trained.get("folds") is not None
    same_data = (args.data, args.root, args.list) == (trained.get("data"), trained.get("root"), None)
    if held_out and args.split == "val" and same_data:
        with intact(args.checkpoint):
            _, source, own_names = labelled_parts(argparse.Namespace(**trained), pixels)
        if not str(checkpoint.get("data", source.fingerprint())).endswith(source.fingerprint()):
            listed = os.path.join(os.path.dirname(args.checkpoint), "validated.txt")
            raise InputError(f"{args.root}: the images changed since the training, now others would be held "
                             f"out, which it may have seen; pass --list {listed}")
    else:
        source, own_names = segmentation_pairs(args.data, args.root, args.split, num_classes, args.list,
                                               pixels)
    if source is None:
        raise InputError(f"{args.root}: no folder images/{args.split}; pass the --split that there is, or "
                         "--list FILE with pairs, such as a run's validated.txt")
    if own_names not in (names, [f"class {i}" for i in range(len(names))]):
        raise InputError(f"--data {args.data} has {len(own_names)} classes ({', '.join(own_names[:3])} ...), "
                         f"{args.checkpoint} was fine-tuned for {len(names)} others ({', '.join(names[:3])} "
                         "...); pass the data it was fine-tuned for, or another checkpoint")
    if by_checkpoint and source.meaning() not in str(trained.get("classes-of-masks", source.meaning())):
        raise InputError(f"{args.root}: no classes.txt says which mask values are which classes, and in the "
                         "training they were not 0, 1, 2 ...; copy the training data's classes.txt there")
    return source


def main():
    args, checkpoint, labelled = parse_arguments()
    processes = launch.start_processes(args.device)
    device = processes.device
    precision = launch.resolve_precision(args.precision, device)
    model = build(checkpoint, args.checkpoint)
    model.to(device, memory_format=torch.channels_last).eval()
    if args.compile:
        model.compile()

    names = checkpoint["class_names"]
    pixels = Pixels(checkpoint["model_args"].get("bands", 3), args.pixel_range, args.huge)
    if labelled:
        source = labelled_source(args, checkpoint, pixels)
    elif args.list is not None:
        source = look_at(listed_images(args.list, args.root, pixels))
    else:
        source = pretraining_images(args.data, args.root, pixels=pixels)

    if "class_colours" in checkpoint:
        with intact(args.checkpoint):
            colours = np.array(checkpoint["class_colours"], np.uint8).reshape(len(names), 3)
    else:
        colours = class_colours(checkpoint["args"]["data"], len(names))
    predictions = Predictions(args.save_predictions, source, colours, args.average)

    # args.json says what a folder holds: other scores or predictions are not overwritten, nor taken for data
    folders = {args.save_predictions or args.out: "--save-predictions", args.out: "--out"}
    free = (FREE_TO_CHANGE | {"save_predictions", "save_probabilities"}) - {"root"}
    for folder in folders:
        if os.path.exists(os.path.join(folder, "args.json")):
            moved = set() if WRITTEN & {*os.listdir(folder)} else {"root", "checkpoint"}  # nothing is there yet
            refuse_other_flags(folder, read_json(os.path.join(folder, "args.json")), vars(args), free | moved)
    processes.barrier()  # all have read what is there before the main one writes
    if processes.is_main:
        for folder, flag in folders.items():
            make_folder(folder, flag, args.root, WRITTEN)
        for folder in folders:
            write_json(os.path.join(folder, "args.json"), vars(args))

    say(f"{args.checkpoint} on {len(source)} images of {args.root or args.data}, {processes.world} x "
        f"{device.type}, {precision}")
    say(source.note)
    metrics = evaluate(model, source, names, processes, precision, args.workers,
                       progress=processes.is_main and sys.stderr.isatty(),
                       on_prediction=predictions.write if args.save_predictions else None,
                       on_scores=predictions.write_probabilities if args.save_probabilities else None,
                       on_unreadable=lambda error: print(f"skipped {error}", flush=True), scales=args.scales,
                       flip=args.flip, window=args.window, stride=args.stride, average=args.average)
    skipped = len(source) - metrics["images"]
    if labelled:
        if processes.is_main:
            write_json(os.path.join(args.out, "incomplete.json" if skipped else "metrics.json"), metrics)
            if not skipped:
                with suppress(FileNotFoundError):  # of an earlier try
                    os.remove(os.path.join(args.out, "incomplete.json"))
        say(table(metrics))
    else:
        say(f"{metrics['images']} images predicted, no masks to compare with")
    if args.save_predictions:
        say(f"predictions: {args.save_predictions}/index and {args.save_predictions}/overlay")
    if skipped and labelled:
        raise InputError(f"{skipped} of {len(source)} images cannot be read, see above; the scores, in "
                         "incomplete.json, are of the others")
    if skipped:
        say(f"{skipped} of {len(source)} images cannot be read, see above")


if __name__ == "__main__":
    launch.run_script(main)
