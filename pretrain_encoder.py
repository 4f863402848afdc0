"""Stage 1: train the encoder as a classifier (section 2: "The encoder is pre-trained on ImageNet-21k classification").

    python pretrain_encoder.py                                                            # the embedded data, on a CPU
    python pretrain_encoder.py --data folder --root imagenet                              # class folders, one GPU
    torchrun --nproc_per_node=8 pretrain_encoder.py --data folder --root imagenet         # eight

In: class folders (root/train/<class>/, root/val/<class>/, or root/<class>/). Out, in --out: last.pt and best.pt (by top-1), whose
encoder stage 2 takes as --encoder-weights; log.jsonl, args.json, metrics.json, samples.png. The same command again continues
where it stopped. The paper takes its encoder ready-made (ImageNet-21k, R50+ViT-B/16): with published weights skip this stage.
"""
import os

import torch
import torch.nn.functional as F

import checkpoints
import runtime
from data import Batches, Each, Samples, centre_crop, in_rounds, load, pretraining_transform, raise_errors, to_pixels
from datasets import CLASSIFIED, classification_images
from model import ENCODERS, build_classifier
from pictures import from_pixels, sheet

# PAPER SILENT on all of stage 1: it takes published weights. "paper" holds ImageNet's usual figures for ViT training with Adam.
RECIPE = {
    "shapes": dict(encoder="hybrid-small", image_size=64, min_area=0.5, steps=250, batch_size=32, micro_batch=32, lr=2e-3, warmup_steps=20,
                   weight_decay=0.0, clip_norm=1.0, workers=0, save_every=100, eval_every=250),
    "paper": dict(encoder="hybrid", image_size=224, min_area=0.08, epochs=90, batch_size=4096, micro_batch=64, lr=1e-3,
                  warmup_steps=10_000, weight_decay=0.03, decoupled_weight_decay=True, workers=runtime.default_workers(),
                  save_every=1000, eval_every=5000),
}


def parse_arguments(argv=None):
    parser = runtime.Parser(__doc__)
    runtime.add_training_arguments(parser, CLASSIFIED)
    parser.add_argument("--cache", metavar="DIR", help="folder for the index of a large listing (default: beside the data)")
    parser.add_argument("--encoder", choices=ENCODERS, help="the network")
    parser.add_argument("--image-size", type=runtime.positive_int, metavar="N", help="side of the square crops, in pixels")
    parser.add_argument("--min-area", type=runtime.unit_float, metavar="X", help="smallest share of a picture's area that a crop shows")
    parser.add_argument("--eval-every", type=runtime.positive_int, metavar="N", help="steps between measurements of top-1")
    args = runtime.parse(parser, RECIPE, argv)
    args.out = args.out or os.path.join("runs", args.data, "pretrain_encoder")
    return args


@torch.no_grad()
def top1(model, loader, autocast, processes, between=lambda: None):
    """Share of right answers over the whole validation set, every image once. between: called before each batch."""
    model.eval()
    right, seen = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for batch in in_rounds(loader, between):
        with autocast():
            logits = model(to_pixels(batch["image"].to(processes.device)))
        right += (logits.argmax(1).cpu() == batch["label"]).sum()
        seen += len(logits)
    model.train()
    right, seen = processes.sum(torch.stack([right, seen]).to(processes.device)).tolist()
    return right / seen


def main():
    args = parse_arguments()
    processes = runtime.start_processes(args.device)
    device = processes.device
    args.precision = precision = runtime.resolve_precision(args.precision, device)
    share = runtime.share_of(args.batch_size, processes)

    # Data
    with processes.one_first():                                           # it lists the images, for all on its machine
        train, val, names = classification_images(args.data, args.root, args.cache)
    steps = runtime.steps_of(args, len(train))

    # Model: everything trains
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, num_classes=len(names))
    model = build_classifier(**model_args).to(device, memory_format=torch.channels_last)
    optimizer = runtime.adam(model.parameters(), args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Continue, or say that there is nothing left to do
    run = checkpoints.Run(args, processes, data=f"{train.fingerprint()}; {val.fingerprint()}")
    start, best, loss, checkpoint = 0, -1.0, None, run.checkpoint
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start, best, loss = checkpoint["step"], checkpoint["best"], checkpoint["loss"]
    if run.is_finished():
        return runtime.say(processes, f"{args.out}: finished at step {steps}, see metrics.json there")

    if args.compile:
        model.compile()
    wrapped = processes.wrap(model)
    samples = Samples(train, pretraining_transform(args.image_size, args.min_area), args.seed, skip_unreadable=True)
    batches = Batches(len(train), args.batch_size, steps, args.seed, start, processes.rank, processes.world)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")
    val_samples = Samples(val, centre_crop(args.image_size), skip_unreadable=True)
    val_loader = load(val_samples, Each(len(val), processes.rank, processes.world, args.micro_batch), args.workers)

    log = runtime.Log(args, processes, steps, start)
    log.say(f"stage 1: {args.encoder} as a classifier of {len(names)} classes, {len(train)} images, steps {start} to {steps}, "
            f"{processes.world} x {device.type}, {precision}")
    for note in (train.note, *run.notes):
        log.say(note)
    unreadable = runtime.Unreadable(len(train), processes, log, checkpoint["unreadable"] if checkpoint else [])

    def validate(done):
        """Measure top-1, and keep the weights in best.pt if none were better: (top-1, best so far)."""
        score = top1(model, val_loader, lambda: runtime.autocast(precision, device), processes, run.stop_if_told)
        log.record(step=done, top1=score)
        log.say(f"step {done}: top-1 {score:.4f} on {len(val)} validation images")
        if score > best and processes.is_main:
            checkpoints.save(os.path.join(args.out, "best.pt"),
                             dict(model=model.state_dict(), model_args=model_args, step=done, best=score, class_names=names))
        return score, max(best, score)

    run.catch_signals()
    model.train()
    for step, batch in enumerate(log.timed(raise_errors(loader)), start=start):
        if step and step % args.eval_every == 0:                          # after the save of this step: a stop may come
            _, best = validate(step)
        runtime.set_rate(optimizer, rate := runtime.cosine_rate(step, steps, args.lr, args.warmup_steps))
        unreadable.note(batch, step)
        loss = torch.zeros((), device=device)
        for part, is_last in runtime.micro_batches(batch, args.micro_batch):
            images = to_pixels(part["image"].to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            with runtime.gradient_sync(wrapped, now=is_last), runtime.autocast(precision, device):
                logits = wrapped(images)
                part_loss = F.cross_entropy(logits.float(), part["label"].to(device), reduction="sum") / share
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        loss, stopping = run.sum_loss(loss / processes.world)
        norm = runtime.clip_gradients(model.parameters(), args.clip_norm, optimizer, scaler)
        runtime.require_finite(loss, norm, step, scaler, batch, train, args, processes)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step + 1, loss, rate)

        done = step + 1
        if run.save_is_due(done) or done % args.eval_every == 0 or done == steps or stopping:
            run.save(done, model=model.state_dict(), model_args=model_args, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     loss=loss, best=best, class_names=names, unreadable=sorted(unreadable.known))
        if stopping:
            run.stop()

    score, best = validate(steps)
    log.close()
    if processes.is_main:
        draw_samples(model, val_samples, names, device).save(os.path.join(args.out, "samples.png"))
        run.finish(dict(top1=score, best_top1=best, images=len(val), loss=loss))
        print(f"top-1 {score:.4f}; the encoder for stage 2: --encoder-weights {os.path.join(args.out, 'last.pt')}")


@torch.no_grad()
def draw_samples(model, samples, names, device, columns=6):
    """Up to eighteen validation images, with what they are said to be and, where that is wrong, what they are."""
    model.eval()
    pictures, captions = [], []
    for i in range(0, len(samples.source), max(1, len(samples.source) // 18)):
        sample = samples[0, i]
        x = to_pixels(sample["image"][None].to(device))
        said, true = names[model(x).argmax().item()], names[sample["label"]]
        pictures.append(from_pixels(x[0]))
        captions.append(said if said == true else f"{said} (is {true})")
    rows = [slice(i, i + columns) for i in range(0, min(18, len(pictures)), columns)]
    return sheet([pictures[row] for row in rows], captions=[captions[row] for row in rows], height=160)


if __name__ == "__main__":
    runtime.run(main)
