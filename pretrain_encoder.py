"""Stage 1: train the encoder to classify images (§2).

    python pretrain_encoder.py   # toy data, on a CPU
    python pretrain_encoder.py --data folder --root imagenet   # one GPU
    torchrun --nproc_per_node=8 pretrain_encoder.py --data imagenet21k --root imagenet21k

Input: a folder per class (root/train/<class>/ or root/<class>/) or, for imagenet21k, a .tar file. Output in
--out: last.pt, for --encoder-weights of stage 2; log.jsonl; metrics.json.
"""
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import common
from common import number, say
from data import Order, Samples, pretraining_transform, to_pixels
from datasets import CLASSIFIED
from model import ENCODERS, Classifier, build_encoder, use_batch_statistics
from unlabelled import classification_images

RECIPES = {  # PAPER SILENT on all settings of stage 1: "paper" has those usual for a ViT
    "shapes": dict(encoder="hybrid-small", steps=500, batch_size=32, micro_batch=32, lr=2e-3, warmup=0.04,
                   weight_decay=0.0, image_size=64, min_area=0.5, workers=0, save_every=250),
    "paper": dict(encoder="hybrid", epochs=90, batch_size=4096, micro_batch=64, lr=1e-3, warmup=0.03,
                  weight_decay=0.03, image_size=224, min_area=0.08, workers=common.default_workers(),
                  save_every=1000),
}


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--encoder", choices=ENCODERS, help="(%(default)s)")
    common.add_data_flags(parser, CLASSIFIED)
    add("--image-size", type=number(int, 32), help="side of the crops (%(default)s)")
    add("--min-area", type=number(float, 0, 1), help="smallest share of the image in a crop (%(default)s)")
    common.add_training_flags(parser)
    args = parser.parse(RECIPES, argv)
    args.out = args.out or f"runs/{args.data}/pretrain_encoder"
    return args


def main(argv=None):
    args = parse_arguments(argv)
    rank, world, device, precision = common.start_processes(args)
    cuda = device.type == "cuda"

    # Data
    with common.local_first():
        images, names = classification_images(args)
    steps = common.number_of_steps(args, len(images), world)
    checkpoint, start, made_of = common.resume(args, images=str(images))

    # Model: all weights are trained
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, num_classes=len(names))
    model = Classifier(build_encoder(args.encoder), len(names))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    use_batch_statistics(model, sync=world > 1 and cuda)
    network = common.prepare_for_training(model, args, device, world)

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    common.restore(checkpoint, optimizer, scaler)

    samples = Samples(images, pretraining_transform(args.image_size, args.min_area), args.seed, replace=True)
    order = Order(len(images), args.batch_size, args.micro_batch, steps, args.seed, start, rank, world)
    batches = iter(DataLoader(samples, batch_sampler=order, num_workers=args.workers, pin_memory=cuda))
    log = common.Log(args.out, start, steps, rank)
    say(f"stage 1: {args.encoder}, {len(names)} classes, {names[:8]}, {images.note}, {start} "
        f"of {steps} steps done, {world} x {device}, {precision}", rank)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        loss = 0
        for _ in range(order.parts):  # micro-batches: their gradients add up
            batch = next(batches)
            x = to_pixels(batch["image"].to(device, non_blocking=cuda))  # (B, 3, H, W) in [-1, 1]
            label = batch["label"].to(device, non_blocking=cuda)  # (B,)
            with common.autocast(precision, device):
                logits = network(x)  # (B, classes)
            part_loss = F.cross_entropy(logits.float(), label, reduction="sum") / args.batch_size
            scaler.scale(part_loss * world).backward()  # DDP divides by world
            loss += part_loss.detach()
        rate = common.cosine_rate(step - 1, steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = rate
        scaler.unscale_(optimizer)  # undoes fp16's scale
        loss = common.finite_loss(step, loss, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        log.write(step, loss=loss, rate=rate)
        if rank == 0 and (step % args.save_every == 0 or step == steps):
            common.save_checkpoint(args, step, model, model_args, optimizer, scaler, made_of,
                                   class_names=names)
    log.close()
    if rank == 0:
        common.save(f"{args.out}/metrics.json", {"step": steps})


if __name__ == "__main__":
    common.run(main)
