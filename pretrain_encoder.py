"""Stage 1: train the encoder as a classifier (section 2: "The encoder is pre-trained on ImageNet-21k
classification").

    python pretrain_encoder.py                                                             # toy data, a CPU
    python pretrain_encoder.py --data folder --root imagenet                               # one GPU
    torchrun --nproc_per_node=8 pretrain_encoder.py --data imagenet21k --root imagenet21k  # eight

In: class folders (root/train/<class>/ or root/<class>/) or .tar files. Out, in --out: last.pt, which stage 2
takes as --encoder-weights; log.jsonl; metrics.json, which says that the run is finished. Such an encoder is
published (--encoder-weights imagenet21k): with it, skip this stage.
"""
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import common
from common import say
from data import Order, Samples, pretraining_transform, to_pixels
from datasets import CLASSIFIED, classification_images
from model import ENCODERS, Classifier, build_encoder, use_batch_statistics

RECIPES = {  # PAPER SILENT on all of stage 1. "paper": the usual figures of ViT training on ImageNet
    "shapes": dict(encoder="hybrid-small", steps=500, batch_size=32, micro_batch=32, lr=2e-3, warmup=0.04,
                   weight_decay=0.0, image_size=64, min_area=0.5, workers=0, save_every=250),
    "paper": dict(encoder="hybrid", epochs=90, batch_size=4096, micro_batch=64, lr=1e-3, warmup=0.03,
                  weight_decay=0.03, image_size=224, min_area=0.08, workers=common.default_workers(),
                  save_every=1000),
}


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("method")
    group.add_argument("--encoder", choices=ENCODERS, help="the network (%(default)s)")
    group = parser.add_argument_group("data")
    common.add_data_flags(group, CLASSIFIED)
    group.add_argument("--image-size", type=common.number(int, 32), help="side of the crops (%(default)s)")
    group.add_argument("--min-area", type=common.number(float, 0, 1),
                       help="least share of an image that a crop shows (%(default)s)")
    common.add_optimisation_flags(parser)
    common.add_machine_flags(parser)
    args = parser.parse(RECIPES, argv)
    args.out = args.out or os.path.join("runs", args.data, "pretrain_encoder")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    rank, world, device = common.start_processes(args.device)
    precision = common.choose_precision(args.precision, device)

    # Data: images with a class
    with common.local_first():  # one process of a machine writes the index of .tar files
        images, names = classification_images(args)
    steps = common.number_of_steps(args, len(images), world)
    checkpoint = common.resume(args, str(images))
    start = checkpoint["step"] if checkpoint else 0

    # Model: everything trains
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, num_classes=len(names))
    model = Classifier(build_encoder(args.encoder), len(names))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    use_batch_statistics(model, sync=world > 1 and device.type == "cuda")
    model.to(device, memory_format=torch.channels_last).train()
    if args.compile:
        model.compile(dynamic=False)  # in place: no "_orig_mod." in the names of parameters
    network = DistributedDataParallel(model) if world > 1 else model

    # Adam with decoupled weight decay, as Dosovitskiy et al. trained it
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        checkpoint = None  # its memory is free

    samples = Samples(images, pretraining_transform(args.image_size, args.min_area), args.seed, replace=True)
    order = Order(len(images), args.batch_size, args.micro_batch, steps, args.seed, start, rank, world)
    loader = DataLoader(samples, batch_sampler=order, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    log = common.Log(args.out, start, steps, rank)
    say(f"stage 1: {args.encoder}, {len(names)} classes ({', '.join(names[:8])} ...), {images.note}, {start} "
        f"of {steps} steps done, {world} x {device}, {precision}", rank)
    batches = iter(loader)  # of micro-batches: gradients are accumulated, so that a batch fits in memory
    for step in range(start + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = common.cosine_rate(step - 1, steps, args.lr, args.warmup)

        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for part in range(order.parts):
            batch = next(batches)
            x = to_pixels(batch["image"].to(device))  # (B, 3, H, W) in [-1, 1]
            label = batch["label"].to(device)         # (B,)
            network.require_backward_grad_sync = part == order.parts - 1  # DDP: exchange gradients once a step
            with common.autocast(precision, device):
                logits = network(x)                                 # (B, classes)
            # The parts of all processes add up to the mean over the global batch
            part_loss = F.cross_entropy(logits.float(), label, reduction="sum") / args.batch_size
            scaler.scale(part_loss * world).backward()  # times world: DDP averages, we need the sum
            loss += part_loss.detach()

        loss = common.finish_step(step, loss, optimizer, scaler)
        log.write(step, loss=loss, rate=optimizer.param_groups[0]["lr"])
        if rank == 0 and (step % args.save_every == 0 or step == steps):
            common.save(os.path.join(args.out, "last.pt"), dict(
                step=step, model=model.state_dict(), model_args=model_args, args=vars(args),
                optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), data=str(images),
                class_names=names))
    log.close()
    if rank == 0:
        common.save(os.path.join(args.out, "metrics.json"), {"step": steps})


if __name__ == "__main__":
    common.run(main)
