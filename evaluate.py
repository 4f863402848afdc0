"""Evaluation: mIoU of a fine-tuned network over a whole data set (sections 2 and 5.1).

    python evaluate.py --checkpoint runs/shapes/finetune/best.pt              # its own validation images
    python evaluate.py --checkpoint best.pt --data folder --root my_data --flip           # your own data
    python evaluate.py --checkpoint best.pt --data folder --root photos --save-predictions out   # no masks
    torchrun --nproc_per_node=8 evaluate.py --checkpoint best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip

In: a checkpoint of finetune.py. Out, in --out: metrics.json (fractions of 1) and args.json; in the folder of
--save-predictions: index PNGs at the size of the images, and colour overlays.

ONE confusion matrix counts the pixels of all images, without those of value 255. Per class IoU = TP / (TP +
FP + FN); mIoU is its mean over the classes that occur in the truth or in a prediction.
"""
import argparse
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import launch
from data import IGNORE, Each, Samples, in_rounds, load, to_pixels
from datasets import DATA_SETS, LABELLED, class_colours, pretraining_images, segmentation_pairs
from launch import InputError, say
from model import build_unet, load_strictly
from pictures import overlay
from run_folder import FREE_TO_CHANGE, load_checkpoint, make_folder, read_json, refuse_other_flags, write_json

RECIPE = {  # 5.1
    "shapes": dict(scales=[1.0], flip=False, workers=0),
    "paper": dict(scales=[1.0], flip=True, workers=launch.default_workers()),
    **{name: data_set.evaluation for name, data_set in DATA_SETS.items()},
}


# ---------------------------------------- Scores


def confusion_matrix(prediction, truth, num_classes):
    """int64 (N, N): entry [t, p] counts the pixels of class t that were predicted as p."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion, names):
    """mIoU, IoU by class name and pixel accuracy, 0 to 1; None for what does not occur."""
    confusion = confusion.double()
    hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    iou = [(hit / total).item() if total else None for hit, total in zip(hits, union)]
    occurring = [value for value in iou if value is not None]
    return {"miou": sum(occurring) / len(occurring) if occurring else None, "iou": dict(zip(names, iou)),
            "pixel_accuracy": (hits.sum() / confusion.sum()).item() if occurring else None}


def table(metrics):
    """The scores as text, in percent."""
    totals = {"mIoU": metrics["miou"], "pixel accuracy": metrics["pixel_accuracy"]}
    width = max(map(len, [*metrics["iou"], *totals]))

    def line(name, value):
        return f"{name:{width}}  " + ("   -" if value is None else f"{100 * value:6.2f}")

    return "\n".join([f"{'class':{width}}   IoU %", *(line(*row) for row in metrics["iou"].items()),
                      "-" * (width + 8), *(line(*row) for row in totals.items()),
                      f"{metrics['images']} images"])


# ---------------------------------------- Predictions


def window_starts(size, window, stride):
    """Where windows start that cover `size`: every `stride`, the last one at the edge."""
    if window >= size:
        return [0]
    return [*range(0, size - window, stride), size - window]


def predict_windows(model, x, window, stride):
    """Logits (B, C, H, W) of x (B, 3, H, W), window by window, averaged where windows overlap.

    Window 0: the whole image. Cityscapes' "two 1024x1024 patches" (5.1): 1024 for both, on 1024x2048.
    """
    height, width = x.shape[-2:]
    if not window or window >= max(height, width):
        return model(x)
    total, count = None, torch.zeros(height, width, device=x.device)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            logits = model(x[..., rows, columns])
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def predict(model, x, scales=(1.0,), flip=False, window=0, stride=None, average="logits"):
    """Scores (1, C, H, W) of an image x (1, 3, H, W) in [-1, 1]: the average over scales and flips (5.1).

    The logits of every scale are brought to the image's own size (bilinear). PAPER SILENT on logits or
    probabilities ("average the results"): `average` takes either name. In memory at a time: one window in
    the network and three maps of logits.
    """
    total = 0.0
    for scale in scales:
        size = [max(1, round(scale * side)) for side in x.shape[-2:]]
        scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in [False, True] if flip else [False]:
            picture = scaled.flip(3) if mirrored else scaled
            logits = predict_windows(model, picture, window, stride or window).float()
            logits = logits.flip(3) if mirrored else logits
            logits = logits if scale == 1 else F.interpolate(logits, x.shape[-2:], mode="bilinear")
            total = total + (logits.softmax(1) if average == "probabilities" else logits)
    return total / (len(scales) * (1 + flip))


@torch.inference_mode()
def evaluate(model, source, names, processes, precision="fp32", workers=0, progress=False, on_prediction=None,
             between=lambda: None, **how):
    """The scores of `model` on `source`: every image counts once, on any number of processes.

    how: for `predict`. on_prediction(index, prediction (H, W) uint8, image (3, H, W) uint8) gets every image
    of this process; between(): see in_rounds. Without masks the scores are None.
    """
    was_training = model.training
    model.eval()
    device, n = processes.device, len(names)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    loader = load(Samples(source), Each(len(source), processes.rank, processes.world), workers)
    for batch in tqdm(in_rounds(loader, between), total=len(loader), unit="image", disable=not progress):
        x = to_pixels(batch["image"].to(device)).contiguous(memory_format=torch.channels_last)
        with launch.autocast(precision, device):
            prediction = predict(model, x, **how).argmax(1)[0]
        if "mask" in batch:
            confusion += confusion_matrix(prediction, batch["mask"][0].to(device), n)
        if on_prediction is not None:
            on_prediction(batch["index"].item(), prediction.byte().cpu(), batch["image"][0])
    model.train(was_training)
    return {**scores(processes.sum(confusion).cpu(), names), "images": len(source)}


# ---------------------------------------- The script


def parse_arguments(argv=None):
    """(args, checkpoint, whether there are masks). The checkpoint decides the default data set."""
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", required=True, help="best.pt or last.pt of finetune.py")
    launch.add_data_flags(parser, LABELLED)
    add("--split", choices=("val", "train"), default="val", help="which part of the data set")
    add("--list", metavar="FILE", help="text file, an `image mask` a line, instead of a split")
    add("--out", metavar="DIR", help="folder of metrics.json (default: evaluate_NAME beside NAME.pt)")
    add("--scales", type=launch.positive_float, nargs="+", help="image scales to average over (5.1)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image (5.1)")
    add("--window", type=launch.non_negative_int,
        help="side of the sliding window; 0: the whole image (default: the crop size of the fine-tuning); "
             "PAPER SILENT except for Cityscapes, 1024")
    add("--stride", type=launch.positive_int, help="step of the sliding window (default: its side)")
    add("--average", choices=("logits", "probabilities"), default="logits", help="what is averaged")
    add("--save-predictions", metavar="DIR",
        help="write index PNGs and colour overlays there; works without masks too, on all images in ROOT")
    add("--workers", type=launch.non_negative_int, help="loader processes per process")
    launch.add_device_flags(parser)

    path = launch.peek(argv, "--checkpoint")
    if path is None:  # --help, or a missing --checkpoint
        launch.parse(parser, RECIPE, argv)
    checkpoint = load_checkpoint(path)
    if "class_names" not in checkpoint or "width" not in checkpoint["model_args"]:
        raise InputError(f"{path}: not a checkpoint of finetune.py; this network was never fine-tuned for "
                         "segmentation")
    trained = checkpoint["args"]
    parser.set_defaults(window=trained.get("crop_size", 0))
    made_for = {"data": trained.get("data", "shapes"), "root": trained.get("root")}
    if launch.peek(argv, "--root") is None and launch.peek(argv, "--split") is None:
        made_for["list"] = trained.get("val_list")
    args = launch.parse(parser, RECIPE, argv, made_for)
    if checkpoint["model_args"]["encoder"] == "resnet50" and launch.peek(argv, "--scales") is None:
        args.scales = [1.0]  # Table 7: ResNet-50 without multi-scale
    if args.stride and not args.window:
        raise InputError("--stride without --window: the whole image is one window; pass --window N too")
    if args.stride and args.stride > args.window:
        raise InputError(f"--stride {args.stride} is longer than --window {args.window}: no window would see "
                         "what lies between; pass a shorter one")
    labelled = not (args.data == "folder" and args.list is None and os.path.isdir(args.root or "")
                    and not os.path.isdir(os.path.join(args.root, "masks")))
    if not labelled and args.save_predictions is None:
        raise InputError(f"{args.root}: no folder masks in it, so nothing to compare with; pass "
                         f"--save-predictions DIR to write predictions, or a root with images/{args.split} "
                         f"and masks/{args.split}")
    if not labelled:
        args.out = args.save_predictions  # there are no scores: everything goes there
    elif args.out is None:
        folder, name = os.path.split(os.path.splitext(path)[0])
        args.out = os.path.join(folder, f"evaluate_{name}")
    return args, checkpoint, labelled


def labelled_source(args, names):
    """The pairs to evaluate on; their classes must be `names`, those of the checkpoint."""
    by_checkpoint = args.data == "folder" or (args.data == "pascal_context" and len(names) == 60)
    num_classes = len(names) if by_checkpoint else None
    source, own_names = segmentation_pairs(args.data, args.root, args.split, num_classes, args.list)
    if source is None:
        raise InputError(f"{args.root}: no folder images/{args.split}; pass --split train, or --list FILE")
    if own_names != names and not own_names[0].startswith("class "):
        raise InputError(f"--data {args.data} has {len(own_names)} classes ({', '.join(own_names[:3])} ...), "
                         f"{args.checkpoint} was fine-tuned for {len(names)} others ({', '.join(names[:3])} "
                         "...); pass the data it was fine-tuned for, or another checkpoint")
    return source


def main():
    args, checkpoint, labelled = parse_arguments()
    processes = launch.start_processes(args.device)
    device = processes.device
    precision = launch.resolve_precision(args.precision, device)
    names = checkpoint["class_names"]
    source = labelled_source(args, names) if labelled else pretraining_images(args.data, args.root)

    model = build_unet(**checkpoint["model_args"])
    load_strictly(model, checkpoint["model"], f"{args.checkpoint}: does not fit its own model_args")
    model.to(device, memory_format=torch.channels_last).eval()
    if args.compile:
        model.compile()

    args_file = os.path.join(args.out, "args.json")
    if os.path.exists(args_file):
        free = (FREE_TO_CHANGE | {"save_predictions"}) - {"root"}
        refuse_other_flags(args.out, read_json(args_file), vars(args), free)
    processes.barrier()  # all have read what is there before the main one writes
    if processes.is_main:
        make_folder(args.out)
        if args.save_predictions:
            make_folder(args.save_predictions, "--save-predictions")
        write_json(args_file, vars(args))

    say(f"{args.checkpoint} on {len(source)} images of {args.root or args.data}, {processes.world} x "
        f"{device.type}, {precision}")
    say(source.note)
    colours = class_colours(checkpoint["args"]["data"], len(names))

    def write(index, prediction, image):
        """index/NAME.png (palette PNG of class indices) and overlay/NAME.png (colours)."""
        indices = Image.fromarray(prediction.numpy())
        indices.putpalette(colours.tobytes())
        coloured = Image.fromarray(overlay(image.permute(1, 2, 0).numpy(), prediction.numpy(), colours))
        # Below the folder, wherever a list says that the image lies: ../a.png and /a.png too.
        name = os.path.relpath(os.path.join("/", os.path.splitext(source.name(index))[0]), "/")
        for kind, picture in (("index", indices), ("overlay", coloured)):
            path = os.path.join(args.save_predictions, kind, f"{name}.png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path)

    metrics = evaluate(model, source, names, processes, precision, args.workers,
                       progress=processes.is_main and sys.stderr.isatty(),
                       on_prediction=write if args.save_predictions else None, scales=args.scales,
                       flip=args.flip, window=args.window, stride=args.stride, average=args.average)
    if labelled:
        if processes.is_main:
            write_json(os.path.join(args.out, "metrics.json"), metrics)
        say(table(metrics))
    else:
        say(f"{len(source)} images predicted, no masks to compare with")
    if args.save_predictions:
        say(f"predictions: {args.save_predictions}/index and {args.save_predictions}/overlay")


if __name__ == "__main__":
    launch.run_script(main)
