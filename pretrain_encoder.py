"""Stage 1: train the encoder as a classifier (section 2: "The encoder is pre-trained on ImageNet-21k
classification").

    python pretrain_encoder.py                                                # built-in toy data, on a CPU
    python pretrain_encoder.py --data folder --root imagenet                  # class folders, one GPU
    torchrun --nproc_per_node=8 pretrain_encoder.py --data imagenet21k --root imagenet21k          # eight

In: class folders (root/train/<class>/, root/val/<class>/, or root/<class>/). Out, in --out (run_folder.py):
last.pt and best.pt (by top-1), which stage 2 takes as --encoder-weights. The paper's encoder is published
(imagenet21k): with it, skip this stage.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import launch
from data import (Batches, Each, Pixels, Samples, centre_crop, in_rounds, load, pretraining_transform,
                  to_pixels)
from datasets import CLASSIFIED, classification_images
from launch import say
from model import ENCODERS, build_classifier
from run_folder import RunFolder, is_finished

# PAPER SILENT on all of stage 1. "paper" holds the usual figures of ViT training on ImageNet with Adam.
RECIPE = {
    "shapes": dict(encoder="hybrid-small", image_size=64, min_area=0.5, steps=500, batch_size=32,
                   micro_batch=32, lr=2e-3, warmup_steps=20, weight_decay=0.0, clip_norm=1.0, workers=0,
                   save_every="250", eval_every=500),
    "paper": dict(encoder="hybrid", image_size=224, min_area=0.08, epochs=90, batch_size=4096, micro_batch=64,
                  lr=1e-3, warmup_steps=10_000, weight_decay=0.03, decoupled_weight_decay=True,
                  workers=launch.default_workers(), save_every="1000", eval_every=5000),
}


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    launch.add_training_flags(parser, CLASSIFIED)
    add = parser.add_argument
    add("--cache", metavar="DIR", help="folder for the index of the images (default: beside the data)")
    add("--encoder", choices=ENCODERS, help="the network")
    add("--image-size", type=launch.positive_int, help="side of the square crops, in pixels")
    add("--min-area", type=launch.unit_float, help="smallest crop, as a fraction of the image's area")
    add("--eval-every", type=launch.positive_int, help="steps between measurements of top-1")
    args = launch.parse(parser, RECIPE, argv)
    args.out = args.out or os.path.join("runs", args.data, "pretrain_encoder")
    return args


@torch.no_grad()
def top1(model, loader, precision, processes, between=lambda: None):
    """Share of right answers over the validation set. between() is called before each batch."""
    model.eval()
    right = seen = 0
    for batch in in_rounds(loader, between):
        for _, message in batch["unreadable"]:
            print(f"validation: the next image in place of {message}", flush=True)
        with launch.autocast(precision, processes.device):
            logits = model(to_pixels(batch["image"].to(processes.device)))
        right += (logits.argmax(1).cpu() == batch["label"]).sum().item()
        seen += len(logits)
    model.train()
    right, seen = processes.sum(torch.tensor([right, seen], device=processes.device)).tolist()
    return right / seen


def main(argv=None, processes=None):
    """processes: given by stage 2, where it trains a missing encoder."""
    args = parse_arguments(argv)
    processes = processes or launch.start_processes(args.device)
    device = processes.device
    precision = launch.resolve_precision(args.precision, device)
    images_per_process = processes.share(args.batch_size)

    # Data
    pixels = Pixels(args.bands or 3, args.pixel_range, args.huge)
    with processes.one_first():  # one process of a machine builds the index
        train, val, names = classification_images(args.data, args.root, args.cache, pixels)
    steps = launch.number_of_steps(args, len(train))

    # Model: everything trains
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, num_classes=len(names), bands=pixels.bands)
    model = build_classifier(**model_args).to(device, memory_format=torch.channels_last)
    # ResNet-50 alone: stored or batch statistics; how many images share them must not change on resume
    batch_norm_images = launch.set_batch_norm(model.encoder, args, processes, fresh=True)

    # Adam (5.1). PAPER SILENT on its betas (here torch's defaults) and on coupled weight decay or not
    adam = torch.optim.AdamW if args.decoupled_weight_decay else torch.optim.Adam
    optimizer = adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                     fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Resume: `settings` must be those of the run. (step, last loss, best score); (0, None, -1) for a new run
    settings = {**vars(args), "bands": pixels.bands, "precision": precision,
                "images-per-batch-norm": batch_norm_images}
    run = RunFolder(settings, [train, val], steps, processes)
    start, loss, best = run.restore(model, optimizer, scaler)
    if is_finished(args.out):
        return say(f"{args.out}: finished at step {steps}, see metrics.json there")

    if args.compile:  # in place: no "_orig_mod." in the names of parameters
        model.compile()
    wrapped = DistributedDataParallel(model) if processes.world > 1 else model
    samples = Samples(train, pretraining_transform(args.image_size, args.min_area, pixels.range), args.seed,
                      skip_unreadable=True)
    batches = Batches(len(train), args.batch_size, steps, args.seed, start, processes.rank, processes.world,
                      args.micro_batch)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")
    val_batches = Each(len(val), processes.rank, processes.world, args.micro_batch)
    val_samples = Samples(val, centre_crop(args.image_size, pixels.range), skip_unreadable=True)
    val_loader = load(val_samples, val_batches, args.workers)

    def validate(done):
        """Measure top-1; the best weights so far go to best.pt. Returns top-1 and the best one."""
        score = top1(model, val_loader, precision, processes, run.stop_if_told)
        run.record(step=done, top1=score)
        say(f"step {done}: top-1 {score:.4f} on {len(val)} validation images")
        if score > best:
            run.save_best(model, model_args=model_args, step=done, best=score, class_names=names)
        return score, max(best, score)

    say(f"stage 1: {args.encoder} as a classifier of {len(names)} classes, {len(train)} images, steps "
        f"{start} to {steps}, {processes.world} x {device.type}, {precision}")
    say(train.note)
    run.begin(start)  # opens the log; from here on a signal stops the run after its step
    model.train()
    for step, batch in enumerate(run.batches(loader), start):
        # One iteration late, when the checkpoint of this step is saved: a kill here loses no training.
        if step and step % args.eval_every == 0:
            _, best = validate(step)
        rate = launch.cosine_rate(step, steps, args.lr, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # Gradient accumulation: --micro-batch images are loaded at a time, so that the batch fits in memory.
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for part in batch:
            x = to_pixels(part["image"].to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)
            # Synchronise gradients in the last micro-batch alone, as DDP.no_sync() does; ignored without DDP.
            wrapped.require_backward_grad_sync = part["is_last"]
            with launch.autocast(precision, device):
                logits = wrapped(x)
            # The parts add up to the mean over this process's images; DDP averages the processes.
            label = part["label"].to(device)
            part_loss = F.cross_entropy(logits.float(), label, reduction="sum") / images_per_process
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        # One all-reduce sums the loss and tells whether a process got a signal: all stop at the same step.
        loss, stopping = processes.sum_numbers(loss / processes.world, run.signal is not None)
        scaler.unscale_(optimizer)  # clipping needs the true gradient; without --clip-norm it only measures
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        loss, norm, stopping = torch.stack([loss, norm, stopping]).tolist()  # the one wait for the device
        # Stop before a NaN reaches the weights, and list this batch's files; fp16's scaler may skip a step.
        run.require_finite(step + 1, loss, norm, scaler)
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        run.log_step(done, loss, rate)  # names the unreadable images of the batch, too
        if run.save_is_due(done) or done % args.eval_every == 0 or done == steps or stopping:
            run.save(done, model, optimizer, scaler, model_args=model_args, class_names=names, loss=loss,
                     best=best)
        if stopping:
            run.stop()

    score, best = validate(steps)
    run.finish(dict(top1=score, best_top1=best, images=len(val), loss=loss))
    say(f"top-1 {score:.4f}; the encoder for stage 2: --encoder-weights {run.path('last.pt')}")


if __name__ == "__main__":
    launch.run_script(main)
