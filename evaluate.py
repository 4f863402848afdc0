"""Evaluation: mIoU of a fine-tuned network over a whole data set (sections 2 and 5.1).

    python evaluate.py --checkpoint runs/shapes/finetune/best.pt                            # on what it was fine-tuned for
    python evaluate.py --checkpoint best.pt --data folder --root my_data --flip             # on your images and masks
    python evaluate.py --checkpoint best.pt --data folder --root photos --save-predictions out     # images without masks
    torchrun --nproc_per_node=8 evaluate.py --checkpoint best.pt --scales 0.5 0.75 1 1.25 1.5 1.75 --flip

In: a checkpoint of finetune.py. Out, in --out: metrics.json (fractions of 1) and args.json; index PNGs at the size of the images
and colour overlays in the folder of --save-predictions.

ONE confusion matrix is summed over all pixels of all images and processes; IoU = TP / (TP + FP + FN) per class, and mIoU is its
mean over the classes that occur, in the truth or in a prediction. Pixels with mask value 255 do not count.
"""
import argparse
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import checkpoints
import runtime
from data import IGNORE, Each, Samples, in_rounds, load, to_pixels
from datasets import LABELLED, class_colours, pretraining_images, segmentation_pairs
from model import build_unet, load_strictly
from pictures import overlay
from runtime import InputError

MULTI_SCALE = dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
RECIPE = {                                                                # 5.1
    "shapes": dict(scales=[1.0], flip=False, workers=0),
    "paper": dict(scales=[1.0], flip=True, workers=runtime.default_workers()),
    "cityscapes": dict(window=1024),                                      # two halves of 1024x2048
    "pascal_context": MULTI_SCALE,
    "ade20k": MULTI_SCALE,
    "voc": MULTI_SCALE,                                                   # PAPER SILENT: as Pascal Context, whose images they are
}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def confusion_matrix(prediction, truth, num_classes):
    """int64 (N, N): entry [t, p] counts the pixels of class t that were called p. Both uint8 or int64, of one shape."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(confusion, names):
    """mIoU over the classes that occur, IoU by class name (None: does not occur), pixel accuracy; None where nothing was counted."""
    confusion = confusion.double()
    hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    iou = [(hit / all_).item() if all_ else None for hit, all_ in zip(hits, union)]
    occurring = [value for value in iou if value is not None]
    return {"miou": sum(occurring) / len(occurring) if occurring else None, "iou": dict(zip(names, iou)),
            "pixel_accuracy": (hits.sum() / confusion.sum()).item() if occurring else None}


def table(metrics):
    """The scores as text, in percent."""
    def percent(value):
        return "   -  " if value is None else f"{100 * value:6.2f}"
    width = max(map(len, [*metrics["iou"], "pixel accuracy"]))
    lines = [f"{name:{width}}  {percent(value)}" for name, value in metrics["iou"].items()]
    return "\n".join([f"{'class':{width}}   IoU %", *lines, "-" * (width + 8), f"{'mIoU':{width}}  {percent(metrics['miou'])}",
                      f"{'pixel accuracy':{width}}  {percent(metrics['pixel_accuracy'])}", f"{metrics['images']} images"])


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def window_starts(size, window, stride):
    """Where windows of length `window` start so that they cover `size`: every `stride`, the last one moved back to the edge."""
    if window >= size:
        return [0]
    return [*range(0, size - window, stride), size - window]


def predict_windows(model, x, window, stride):
    """Logits (B, C, H, W) of x (B, 3, H, W), window by window, averaged where windows overlap. window 0: the whole image at once.

    Cityscapes' "two 1024x1024 patches" of 5.1 are window = stride = 1024 on 1024x2048. One window is in memory at a time.
    """
    height, width = x.shape[-2:]
    if not window or (window >= height and window >= width):
        return model(x)
    total, count = None, torch.zeros(height, width, device=x.device)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            rows, columns = slice(top, min(top + window, height)), slice(left, min(left + window, width))
            logits = model(x[..., rows, columns])
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return total / count


def predict(model, x, scales=(1.0,), flip=False, window=0, stride=None, average="logits"):
    """Averaged scores (1, C, H, W) of one image x (1, 3, H, W) in [-1, 1] over scales, each with its mirror image if `flip` (5.1).

    Every scale's logits are brought to the image's own size (bilinear) and averaged. In memory at a time: ONE window in the network
    and three maps of logits, (C, H, W), the scaled one and the image's own two. PAPER SILENT on averaging logits or
    probabilities ("average the results"): `average` takes either name.
    """
    total = 0.0
    for scale in scales:
        size = [max(1, round(scale * side)) for side in x.shape[-2:]]
        scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in ((False, True) if flip else (False,)):
            logits = predict_windows(model, scaled.flip(3) if mirrored else scaled, window, stride or window).float()
            logits = logits.flip(3) if mirrored else logits
            logits = logits if scale == 1 else F.interpolate(logits, x.shape[-2:], mode="bilinear")
            total = total + (logits.softmax(1) if average == "probabilities" else logits)
    return total / (len(scales) * (1 + flip))


@torch.inference_mode()
def evaluate(model, source, names, processes, precision="fp32", workers=0, progress=False, on_prediction=None, between=lambda: None, **how):
    """The scores of `model` on `source`, every image counted once whatever the number of processes; the same on each of them.

    how: the arguments of `predict`. on_prediction(index, prediction (H, W) uint8, image (3, H, W) uint8) sees every image of this
    process; between() is called before each, equally often on all processes. A source without masks gives empty scores.
    """
    was_training = model.training
    model.eval()
    device, n = processes.device, len(names)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    loader = load(Samples(source), Each(len(source), processes.rank, processes.world), workers)
    for batch in tqdm(in_rounds(loader, between), total=len(loader), unit="image", disable=not progress):
        x = to_pixels(batch["image"].to(device)).contiguous(memory_format=torch.channels_last)
        with runtime.autocast(precision, device):
            prediction = predict(model, x, **how).argmax(1)[0]
        if "mask" in batch:
            confusion += confusion_matrix(prediction, batch["mask"][0].to(device), n)
        if on_prediction is not None:
            on_prediction(batch["index"].item(), prediction.byte().cpu(), batch["image"][0])
    model.train(was_training)
    return {**scores(processes.sum(confusion).cpu(), names), "images": len(source)}


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse_arguments(argv=None):
    parser = runtime.Parser(__doc__)
    parser.add_argument("--checkpoint", metavar="PATH", required=True, help="best.pt or last.pt of finetune.py")
    path = runtime.peek(argv, "--checkpoint")                             # it supplies the default data set
    checkpoint = checkpoints.load_checkpoint(path) if path else None
    if checkpoint is not None and ("class_names" not in checkpoint or "width" not in checkpoint["model_args"]):
        raise InputError(f"{path}: not a checkpoint of finetune.py; this network was never fine-tuned for segmentation")

    runtime.add_data_arguments(parser, LABELLED)
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which part of the data set")
    parser.add_argument("--list", metavar="FILE", help="text file with one `image mask` per line, instead of a split")
    parser.add_argument("--out", metavar="DIR", help="where metrics.json goes (default: evaluate_NAME beside the checkpoint NAME.pt)")
    parser.add_argument("--scales", type=runtime.positive_float, nargs="+", metavar="S", help="image scales to average over (5.1)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image (5.1)")
    parser.add_argument("--window", type=runtime.non_negative_int, metavar="N", help="side of the sliding window; 0: the whole image; "
                        "PAPER SILENT except for Cityscapes, 1024 (default: the crop size of the fine-tuning)")
    parser.add_argument("--stride", type=runtime.positive_int, metavar="N", help="step of the sliding window (default: its side)")
    parser.add_argument("--average", choices=("logits", "probabilities"), default="logits", help="what is averaged; PAPER SILENT")
    parser.add_argument("--save-predictions", metavar="DIR",
                        help="write index PNGs and colour overlays there; works without masks too, on all images in ROOT")
    parser.add_argument("--workers", type=runtime.non_negative_int, metavar="N", help="loader processes per process")
    runtime.add_device_arguments(parser)
    then = {} if checkpoint is None else checkpoint["args"]
    parser.set_defaults(window=then.get("crop_size", 0))
    usual = {"data": then.get("data", "shapes"), "root": then.get("root"), "list": then.get("val_list")}
    args = runtime.parse(parser, RECIPE, argv, usual)
    if checkpoint["model_args"]["encoder"] == "resnet50" and runtime.peek(argv, "--scales") is None:
        args.scales = [1.0]                                               # Table 7: ResNet-50 without multi-scale
    if args.stride is not None and not args.window:
        raise InputError("--stride without --window: the whole image is one window; pass --window N too")
    if args.stride is not None and args.stride > args.window:
        raise InputError(f"--stride {args.stride} is longer than --window {args.window}: no window would see what lies between; pass a shorter one")
    args.out = args.out or os.path.join(os.path.dirname(path), f"evaluate_{os.path.splitext(os.path.basename(path))[0]}")
    return args, checkpoint


def main():
    args, checkpoint = parse_arguments()
    processes = runtime.start_processes(args.device)
    device, precision = processes.device, runtime.resolve_precision(args.precision, processes.device)
    names = checkpoint["class_names"]

    if args.data == "folder" and args.list is None and args.root and not os.path.isdir(os.path.join(args.root, "masks")):
        source, labelled = pretraining_images(args.data, args.root), False
        if args.save_predictions is None:
            raise InputError(f"{args.root}: no folder masks in it, so nothing to compare with; pass --save-predictions DIR to write "
                             f"predictions, or a root with images/{args.split} and masks/{args.split}")
        args.out = args.save_predictions                                  # there are no scores: everything goes there
    else:
        asked = len(names) if args.data == "folder" or len(names) == 60 and args.data == "pascal_context" else None
        source, own_names = segmentation_pairs(args.data, args.root, args.split, asked, args.list)
        labelled = True
        if source is None:
            raise InputError(f"{args.root}: no folder images/{args.split}; pass --split train, or --list FILE")
        if own_names != names and not own_names[0].startswith("class "):
            raise InputError(f"--data {args.data} has {len(own_names)} classes ({', '.join(own_names[:3])} ...), {args.checkpoint} was fine-tuned for "
                             f"{len(names)} others ({', '.join(names[:3])} ...); pass the data it was fine-tuned for, or another checkpoint")

    model = build_unet(**checkpoint["model_args"])
    with runtime.as_input_error():
        load_strictly(model, checkpoint["model"], f"{args.checkpoint}: does not fit the network its model_args describe")
    model.to(device, memory_format=torch.channels_last).eval()
    if args.compile:
        model.compile()
    args_path = os.path.join(args.out, "args.json")
    if os.path.exists(args_path):                                         # the scores of other flags are not overwritten
        checkpoints.refuse_other_flags(args.out, checkpoints.read_json(args_path), vars(args), (checkpoints.FREE_TO_CHANGE | {"save_predictions"}) - {"root"})
    processes.barrier()                                                   # all have read what is there before the main one writes
    if processes.is_main:
        checkpoints.make_folder(args.out)
        if args.save_predictions:
            checkpoints.make_folder(args.save_predictions, "--save-predictions")
        runtime.write_json(args_path, vars(args))

    runtime.say(processes, f"{args.checkpoint} on {len(source)} images of {args.root or args.data}, {processes.world} x {device.type}, {precision}")

    if source.note:
        runtime.say(processes, source.note)
    colours = class_colours(checkpoint["args"]["data"], len(names))

    def write(index, prediction, image):
        write_prediction(args.save_predictions, os.path.splitext(source.name(index))[0], prediction, image, colours)

    metrics = evaluate(model, source, names, processes, precision, args.workers, progress=processes.is_main and sys.stderr.isatty(),
                       on_prediction=write if args.save_predictions else None, scales=args.scales, flip=args.flip, window=args.window,
                       stride=args.stride, average=args.average)
    if processes.is_main:
        if labelled:
            runtime.write_json(os.path.join(args.out, "metrics.json"), metrics)
            print(table(metrics))
        else:
            print(f"{len(source)} images predicted, no masks to compare with")
        if args.save_predictions:
            print(f"predictions: {os.path.join(args.save_predictions, 'index')} and {os.path.join(args.save_predictions, 'overlay')}")


def write_prediction(folder, name, prediction, image, colours):
    """folder/index/<name>.png (palette PNG of class indices) and folder/overlay/<name>.png (colours over the image)."""
    index_path, overlay_path = (os.path.join(folder, kind, name + ".png") for kind in ("index", "overlay"))
    os.makedirs(os.path.dirname(index_path), exist_ok=True)
    os.makedirs(os.path.dirname(overlay_path), exist_ok=True)
    index = Image.fromarray(prediction.numpy())
    index.putpalette(colours.tobytes())
    index.save(index_path)
    Image.fromarray(overlay(image.permute(1, 2, 0).numpy(), prediction.numpy(), colours)).save(overlay_path)


if __name__ == "__main__":
    runtime.run(main)
