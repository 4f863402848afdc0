"""Evaluation: the mIoU of a fine-tuned network (§2, §5.1).

    python evaluate.py --checkpoint last.pt   # on the training's validation images
    python evaluate.py --checkpoint last.pt --data folder --root others
    torchrun --nproc_per_node=8 evaluate.py --checkpoint last.pt --flip --scales 0.5 0.75 1 1.25 1.5 1.75

Input: last.pt of finetune.py. Output in --out: metrics.json, scores from 0 to 1; in --save-predictions:
index/, PNGs with the values of the training masks, and overlay/, class colours over the images.

ONE confusion matrix counts the pixels of all images but the ignored (255).
"""
import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import common
from common import UserError, number, say
from data import IGNORE, Samples, to_pixels
from datasets import DATA_FLAGS, LABELLED
from labelled import Classes, classes_of, images_of, labelled
from model import unet_of
from pictures import writer
from unlabelled import PictureList, pretraining_images

# ---- Scores


def confusion_matrix(prediction, truth, num_classes):
    """int64 (N, N): entry [t, p] counts the pixels of class t that are predicted as p."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion, names):
    """IoU (TP / (TP + FP + FN)), accuracy (TP / (TP + FN)), Dice of each class, their means, pixel accuracy.

    0 / 0 is None. PAPER SILENT on classes that do not occur: the means leave None out.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)

    def defined(value):
        return None if math.isnan(value) else value

    found = {"pixel_accuracy": defined((hits.sum() / confusion.sum()).item())}
    for name, mean, values in (("iou", "miou", hits / (truth + predicted - hits)),
                               ("accuracy", "mean_accuracy", hits / truth),
                               ("dice", "mean_dice", 2 * hits / (truth + predicted))):
        found[mean] = defined(values.nanmean().item())
        found[name] = dict(zip(names, map(defined, values.tolist())))
    return found


def as_text(metrics):
    """A table, in percent."""
    rows = [(name, iou, metrics["accuracy"][name], metrics["dice"][name])
            for name, iou in metrics["iou"].items()]
    rows.append(("mean (mIoU)", metrics["miou"], metrics["mean_accuracy"], metrics["mean_dice"]))
    texts = [(name, *["-" if v is None else f"{100 * v:.2f}" for v in values]) for name, *values in rows]
    return common.table([("class", "IoU %", "accuracy", "Dice"), *texts])


# ---- Predictions


def predict(model, x, scales=(1.0,), flip=False, window=0, stride=None):
    """x (B, 3, H, W) in [-1, 1] -> float32 logits (B, C, H, W), the mean over scales and mirror images (5.1).

    PAPER SILENT on what "average the results" averages: here logits, resized to H x W (bilinear).
    """
    total = None
    for scale in scales:
        size = [max(1, round(scale * side)) for side in x.shape[-2:]]
        scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in range(1 + flip):
            logits = in_windows(model, scaled.flip(3) if mirrored else scaled, window, stride)
            logits = logits.to(room_for(logits, x.shape[-2:]))
            if scale != 1:
                logits = F.interpolate(logits, x.shape[-2:], mode="bilinear")
            if mirrored:
                logits = logits.flip(3)
            total = logits if total is None else total + logits.to(total.device)
    return total / (len(scales) * (1 + flip))


def in_windows(model, x, window, stride):
    """Logits of square windows, one every `stride` pixels (default: `window`) and one at the edge, or their
    mean. window 0: the whole image; 1024: the two patches of Cityscapes (5.1)."""
    size = x.shape[-2:]  # (H, W)
    stride = min(stride or window, window)
    if not window or window >= max(size):
        return model(x).float()
    tops, lefts = ({*range(0, max(1, side - window), stride), max(0, side - window)} for side in size)
    total = None
    for top in tops:
        for left in lefts:
            part = ..., slice(top, top + window), slice(left, left + window)
            logits = model(x[part]).float()
            if total is None:
                room = room_for(logits, size)
                total = logits.new_zeros(*logits.shape[:2], *size, device=room)
                count = torch.zeros_like(total[0, 0])
            total[part] += logits.to(room)
            count[part] += 1
    return total.div_(count)


def room_for(logits, size):
    """The device for logits of this size: from 1 GiB on the CPU."""
    return logits.device if math.prod((*logits.shape[:2], *size)) < 2 ** 28 else torch.device("cpu")


@torch.inference_mode()
def evaluate(model, source, names, device, rank=0, world=1, precision="fp32", workers=0, write=None, **how):
    """Scores. how: arguments of predict.

    write: called with (index, image (3, H, W) uint8, prediction (H, W) uint8).
    """
    model.eval()
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # images differ in size
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    indices = range(rank, len(source), world)
    loader = DataLoader(Samples(source, v2.Identity()), batch_size=1, sampler=[(0, i) for i in indices],
                        num_workers=workers)
    for batch, index in zip(common.progress(loader, unit="image", leave=None), indices):
        with common.autocast(precision, device):
            logits = predict(model, to_pixels(batch["image"].to(device)), **how)[0]  # (C, H, W)
        if not logits.isfinite().all():  # argmax would make NaN a class
            raise UserError(f"{source.name(index)}: a logit {common.NOT_FINITE}; train with a lower --lr, or "
                            "use --precision fp32")
        prediction = logits.argmax(0).byte().cpu()
        if "mask" in batch:
            confusion += confusion_matrix(prediction, batch["mask"][0], len(names))
        if write:
            write(index, batch["image"][0], prediction)
    torch.backends.cudnn.benchmark = before
    common.wait()  # some images take longer
    return {**scores(common.total(confusion.to(device)).cpu(), names), "images": len(source), "protocol": how,
            "precision": precision}


def protocol(data, encoder, crop_size):
    """Arguments of predict for a data set (5.1).

    PAPER SILENT on windows but for Cityscapes (here of the size of training crops) and on flips in Table 7.
    """
    if data == "shapes":
        return dict(scales=[1.0], flip=False, window=0, stride=None)
    single = data in ("folder", "cityscapes") or encoder == "resnet50"  # Table 7
    scales = [1.0] if single else [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    return dict(scales=scales, flip=True, window=crop_size, stride=None)


# ---- The script


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", required=True)
    common.add_data_flags(parser, LABELLED, default=None)
    add("--masks", metavar="PATTERN", help="as of finetune.py")
    add("--val-list", metavar="FILE", help="as of finetune.py")
    add("--scales", type=number(float, 0.01), nargs="+", help="to average over")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image")
    add("--window", type=number(int, 0), help="side; 0: the whole image")
    add("--stride", type=number(int, 1), help="step between windows (the window)")
    add("--out", metavar="DIR", help="(evaluate_val or evaluate_DATA beside the checkpoint)")
    add("--save-predictions", metavar="DIR", help="works without masks too")
    common.add_device_flags(parser)
    return parser.parse({"paper": {"workers": common.default_workers()}}, argv)


def choose_source(args, trained, classes):
    """Pairs, or the PictureList of a --data folder without masks. Without --data the flags are those of the
    training, unless given."""
    flags = dict.fromkeys(DATA_FLAGS) if args.data else trained
    given = {name: value for name, value in vars(args).items() if value is not None}
    flags = argparse.Namespace(**{**flags, **given})
    if args.data == "folder" and not args.masks and not os.path.isdir(f"{args.root}/masks"):
        common.refuse(args, ("val_list", "out"), "on pictures without masks")
        return pretraining_images(args)
    if flags.data != "folder" or os.path.exists(f"{flags.root}/classes.txt"):
        own = classes_of(flags)  # mask values may differ from the training
        if own.names != classes.names:
            raise UserError(f"--data {flags.data}: classes {own.names}, expected {classes.names}")
        classes = own
    if flags.val_fraction is not None and not args.val_list:
        source = labelled(flags, classes).get("val")
    elif args.data == "folder" and args.images and "{part}" not in args.images and not args.val_list:
        source = images_of(flags, classes, "train")  # all: there are no parts
    else:
        source = images_of(flags, classes, "val")
    if source is None:
        raise UserError(f"{flags.root}: no validation images; see --val-list, --data, --images, --masks")
    return source


def main():
    args = parse_arguments()
    path = args.checkpoint
    rank, world, device, precision = common.start_processes(args)
    checkpoint = common.load(path)
    try:
        trained, names = checkpoint["args"], checkpoint["class_names"]
        classes = Classes(names, checkpoint["class_colours"], checkpoint["mask_values"])
        model = unet_of(checkpoint).to(device, memory_format=torch.channels_last)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of finetune.py ({error})") from error

    with common.local_first():
        source = choose_source(args, trained, classes)
    data = args.data or trained["data"]
    weights = common.checksum_of(path)
    common.require_same(data, [str(source), weights])
    how = protocol(data, checkpoint["model_args"]["encoder"], trained["crop_size"])
    how.update({key: getattr(args, key) for key in how if getattr(args, key) is not None})
    if not how["window"]:
        common.refuse(args, ["stride"], "without windows")
    place = "" if data == "shapes" else f" in {os.path.abspath(source.root)}"
    found = {"checkpoint": os.path.abspath(path), "step": checkpoint["step"], "weights": weights,
             "data": f"{data}{place}: {source}", "protocol": how}
    write, has_masks = None, not isinstance(source, PictureList)
    out = args.out or Path(path).parent / f"evaluate_{args.data or 'val'}"
    folder = args.save_predictions
    if folder:
        source.keep_out("--save-predictions", folder)
        is_used = os.path.exists(f"{folder}/index")
        common.require_same(folder, is_used)  # before one process writes
        if is_used:
            raise UserError(f"--save-predictions {folder}: holds predictions; pass another")
        write = writer(folder, source, classes)
    elif not has_masks:
        raise UserError(f"{args.root}: no masks; pass --masks or --save-predictions")
    if has_masks and os.path.exists(f"{out}/metrics.json"):
        before = json.loads(Path(out, "metrics.json").read_text())
        for key in ("weights", "data", "protocol"):
            if before.get(key) != found[key]:
                raise UserError(f"{out}: scores of other {key}, {before.get(key)}; pass another --out")
    say(f"{path} on {source.note}: {len(source)} images of {data}, {how}", rank)
    metrics = evaluate(model, source, names, device, rank, world, precision, args.workers, write, **how)
    if has_masks and rank == 0:
        say(as_text(metrics))
        os.makedirs(out, exist_ok=True)
        common.save(f"{out}/metrics.json", {**found, **metrics})


if __name__ == "__main__":
    common.run(main)
