"""Evaluation: the mIoU of a fine-tuned network (sections 2 and 5.1).

    python evaluate.py --checkpoint last.pt                              # the training's validation images
    python evaluate.py --checkpoint last.pt --data folder --root other   # other images
    torchrun --nproc_per_node=8 evaluate.py --checkpoint last.pt --flip --scales 0.5 0.75 1 1.25 1.5 1.75

Input: last.pt of finetune.py. Output: metrics.json in --out, scores from 0 to 1. --save-predictions
gets index/, PNGs with the values of the training masks, and overlay/, class colours over the images.
Defaults: the validation images of the training; scales, flip and window of 5.1 (see protocol).

ONE confusion matrix counts the pixels of all images; ignored pixels (255) do not count. The IoU of a class is
TP / (TP + FP + FN). mIoU is the mean over the classes that occur in the truth or in a prediction.
"""
import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import common
import datasets
from common import UserError, say
from data import IGNORE, Samples, to_pixels
from model import unet_of

# ---- Scores


def confusion_matrix(prediction, truth, num_classes):
    """int64 (N, N): entry [t, p] is the number of pixels of class t that are predicted as p."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion, names):
    """IoU, accuracy (TP / (TP + FN)) and Dice of each class, their means, and pixel accuracy.

    A score of the form 0 / 0 is None. PAPER SILENT on classes that do not occur: the means leave None out.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)

    def number(value):
        return None if math.isnan(value) else value

    found = {"pixel_accuracy": number((hits.sum() / confusion.sum()).item())}
    for name, mean, values in (("iou", "miou", hits / (truth + predicted - hits)),
                               ("accuracy", "mean_accuracy", hits / truth),
                               ("dice", "mean_dice", 2 * hits / (truth + predicted))):
        found[mean] = number(values.nanmean().item())
        found[name] = dict(zip(names, map(number, values.tolist())))
    return found


def as_text(metrics):
    """The scores as a table, in percent."""
    kinds = {"iou": "miou", "accuracy": "mean_accuracy", "dice": "mean_dice"}
    rows = [(name, *[metrics[kind][name] for kind in kinds]) for name in metrics["iou"]]
    rows.append(("mean (mIoU)", *[metrics[mean] for mean in kinds.values()]))
    texts = [(name, *["-" if v is None else f"{100 * v:.2f}" for v in values]) for name, *values in rows]
    return common.table([("class", "IoU %", "accuracy", "Dice"), *texts])


# ---- Predictions


def predict(model, x, scales=(1.0,), flip=False, window=0, stride=None):
    """x (B, 3, H, W) in [-1, 1] -> float32 logits (B, C, H, W), the mean over scales and mirror images (5.1).

    PAPER SILENT on what "average the results" averages: here logits, resized to H x W (bilinear).
    """
    total = 0
    for scale in scales:
        size = [max(1, round(scale * side)) for side in x.shape[-2:]]
        scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in range(1 + flip):
            logits = in_windows(model, scaled.flip(3) if mirrored else scaled, window, stride)
            if scale != 1:
                logits = F.interpolate(logits, x.shape[-2:], mode="bilinear")
            total += logits.flip(3) if mirrored else logits
    return total / (len(scales) * (1 + flip))


def in_windows(model, x, window, stride):
    """Logits of square windows, one every `stride` pixels (default: `window`) and one at the edge, their mean
    where they overlap. 0: the whole image. 1024: the two patches of Cityscapes (5.1)."""
    height, width = x.shape[-2:]
    stride = min(stride or window, window)
    if not window or window >= max(height, width):
        return model(x).float()
    tops, lefts = ({*range(0, max(1, side - window), stride), max(0, side - window)}
                   for side in (height, width))
    total, count = None, torch.zeros(height, width, device=x.device)
    for top in tops:
        for left in lefts:
            part = ..., slice(top, top + window), slice(left, left + window)
            logits = model(x[part]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[part] += logits
            count[part] += 1
    return total.div_(count)


@torch.inference_mode()
def evaluate(model, source, names, device, rank=0, world=1, precision="fp32", workers=0, write=None, **how):
    """The scores of `model` on `source`; every image counts once, on any number of processes.

    write: called with (index, image (3, H, W) uint8, prediction (H, W) uint8). how: arguments of predict.
    """
    model.eval()
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)
    indices = range(rank, len(source), world)
    loader = DataLoader(Samples(source, v2.Identity()), batch_size=1, sampler=[(0, i) for i in indices],
                        num_workers=workers)
    for index, batch in zip(indices, common.progress(loader, unit="image")):
        with common.autocast(precision, device):
            logits = predict(model, to_pixels(batch["image"].to(device)), **how)[0]  # (C, H, W)
        if not logits.isfinite().all():  # argmax would make NaN a class
            raise UserError(f"{source.name(index)}: a logit {common.NOT_FINITE}; train with a lower --lr, or "
                            "pass --precision fp32")
        prediction = logits.argmax(0)
        if "mask" in batch:
            confusion += confusion_matrix(prediction, batch["mask"][0].to(device), len(names))
        if write:
            write(index, batch["image"][0], prediction.byte().cpu())
    return {**scores(common.total(confusion).cpu(), names), "images": len(source)}


def protocol(data, encoder, crop_size):
    """Arguments of predict for a data set (5.1).

    PAPER SILENT on windows but for Cityscapes (here as large as the training crops) and on flips in Table 7.
    """
    if data == "shapes":
        return dict(scales=(1.0,), flip=False, window=0)
    single = data in ("folder", "cityscapes") or encoder == "resnet50"  # Table 7
    return dict(scales=(1.0,) if single else (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True, window=crop_size)


# ---- Pictures


def colour_mask(mask, colours):
    """Class indices (H, W) in `colours` (N, 3) as uint8 (H, W, 3). Ignored pixels, 255, are hatched."""
    mask = np.asarray(mask)
    colour_of = np.full((256, 3), 255, np.uint8)
    colour_of[:len(colours)] = colours
    page = colour_of[mask]
    y, x = np.indices(mask.shape)
    page[(mask == IGNORE) & ((x + y) % 8 >= 6)] = 150
    return page


def picture_table(rows, titles, names=(), colours=(), width=160):
    """A PIL image: titles, rows of uint8 (H, W, 3) and a legend, `width` a column or as wide as its texts."""
    font = ImageFont.load_default(13)
    entries = [*enumerate(names), (IGNORE, "ignored")] if names else []
    width = math.ceil(max(width, *map(font.getlength, titles),
                          *(23 + font.getlength(name) for _, name in entries)))
    heights = [max(1, round(width * row[0].shape[0] / row[0].shape[1])) for row in rows]
    legend = 24 + sum(heights) + 6 * len(rows)  # its y
    size = 6 + (width + 6) * len(titles), legend + 20 * math.ceil(len(entries) / len(titles))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        x, y = 6 + (width + 6) * column, 24
        draw.text((x, 5), title, "black", font)
        for row, height in zip(rows, heights):
            page.paste(Image.fromarray(row[column]).resize((width, height), Image.Resampling.BOX), (x, y))
            y += height + 6
    for i, (k, name) in enumerate(entries):
        x, y = 6 + (width + 6) * (i % len(titles)), legend + 20 * (i // len(titles))
        draw.rectangle([x, y + 1, x + 13, y + 14], outline="black")
        page.paste(Image.fromarray(colour_mask(np.full((12, 12), k), colours)), (x + 1, y + 2))
        draw.text((x + 19, y), name, "black", font)
    return page


def writer(folder, source, classes):
    """A function for evaluate's `write` that fills folder/index and folder/overlay."""
    names = [source.name(i) for i in range(len(source))]
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) == len(stems):  # not so for a.jpg and a.png
        names = stems
    value_of = {k: value for value, k in reversed(classes.values.items())}  # the first value of each class
    in_colours = isinstance(value_of[0], tuple)
    index_of = np.array([k if in_colours else value_of[k] for k in range(len(classes.names))], np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    palette[index_of] = classes.colours

    def write(index, image, prediction):
        mask = Image.fromarray(index_of[prediction.numpy()])
        mask.putpalette(palette.tobytes())
        overlay = image.permute(1, 2, 0).numpy() // 2 + colour_mask(prediction, classes.colours) // 2
        for kind, picture in (("index", mask), ("overlay", Image.fromarray(overlay))):
            path = f"{folder}/{kind}/{os.path.normpath('/' + names[index])}.png"  # without a leading ../
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path)
    return write


# ---- The script


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", required=True, help="last.pt of finetune.py")
    common.add_data_flags(parser, datasets.LABELLED, default=None)
    add("--masks", metavar="PATTERN", help='where the masks are, such as "labels/*_mask.png"')
    add("--val-list", metavar="FILE", help="text file with an image per line")
    add("--scales", type=common.number(float, 0.01), nargs="+", help="to average over")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image")
    add("--window", type=common.number(int, 0), help="side of the windows; 0: the whole image")
    add("--stride", type=common.number(int, 1), help="step between windows (their side)")
    add("--out", metavar="DIR", help="(evaluate_val beside the checkpoint)")
    add("--save-predictions", metavar="DIR", help="works without masks too")
    common.add_device_flags(parser)
    return parser.parse({"paper": {"workers": common.default_workers()}}, argv)


def choose_source(args, trained, classes):
    """The images to score (Pairs), or those of a --data folder without masks (Files).

    Without --data, flags that are not given are those of the training, `trained`.
    """
    flags = dict.fromkeys(datasets.FILES) if args.data else dict(trained)
    flags.update({name: value for name, value in vars(args).items() if value is not None})
    flags = argparse.Namespace(**flags)
    if args.data == "folder" and not args.masks and not os.path.isdir(f"{args.root}/masks"):
        common.refuse(args, ("val_list", "out"), "on pictures without masks")
        return datasets.pretraining_images(args)
    if args.data and (args.data != "folder" or os.path.exists(f"{args.root}/classes.txt")):
        own = datasets.classes_of(flags)  # mask values may differ from the training
        if own.names != classes.names:
            raise UserError(f"--data {args.data}: classes {', '.join(own.names[:4])} ..., expected "
                            f"{', '.join(classes.names[:4])} ...")
        classes = own
    part = "val"
    if args.val_list:
        flags.val_fraction = None
    elif args.data == "folder" and args.images and "{part}" not in args.images:  # no parts: take all
        part = "train"
    source = datasets.labelled(flags, classes, [part]).get(part)
    if source is None:
        raise UserError(f"{flags.root}: no validation images; pass --val-list, or --data with --images and "
                        "--masks")
    return source


def main():
    args = parse_arguments()
    rank, world, device, precision = common.start_processes(args)
    checkpoint = common.load(args.checkpoint)
    try:
        trained, names = checkpoint["args"], checkpoint["class_names"]
        classes = datasets.Classes(names, checkpoint["class_colours"], checkpoint["mask_values"])
        model = unet_of(checkpoint).to(device, memory_format=torch.channels_last)
    except (KeyError, TypeError) as error:
        raise UserError(f"{args.checkpoint}: not a checkpoint of finetune.py ({error})") from error
    if args.compile:
        model.compile(dynamic=False)

    with common.local_first():
        source = choose_source(args, trained, classes)
    has_masks = not isinstance(source, datasets.Files)
    if not has_masks:
        if not args.save_predictions:
            raise UserError(f"{args.root}: no masks to compare with; pass --masks or --save-predictions DIR")
        if Path(args.save_predictions).resolve().is_relative_to(Path(source.root, source.folder).resolve()):
            raise UserError(f"--save-predictions {args.save_predictions}: lies among the pictures")
    data = args.data or trained["data"]
    how = protocol(data, checkpoint["model_args"]["encoder"], trained["crop_size"])
    how.update({key: getattr(args, key) for key in how if getattr(args, key) is not None}, stride=args.stride)
    if not how["window"]:
        common.refuse(args, ["stride"], "without windows")
    say(f"{args.checkpoint} on {len(source)} images of {data}, {how}", rank)
    write = writer(args.save_predictions, source, classes) if args.save_predictions else None
    metrics = evaluate(model, source, names, device, rank, world, precision, args.workers, write, **how)
    if has_masks and rank == 0:
        say(as_text(metrics))
        out = args.out or f"{os.path.dirname(args.checkpoint) or '.'}/evaluate_val"
        os.makedirs(out, exist_ok=True)
        common.save(f"{out}/metrics.json", metrics)


if __name__ == "__main__":
    common.run(main)
