"""Stage 3: fine-tune the whole network on labelled images (§5.1).

    python finetune.py --init runs/shapes/pretrain_decoder_ddep/last.pt --labels 32   # toy data, on a CPU
    python finetune.py --data folder --root my_data --init ddep.pt   # one GPU
    torchrun --nproc_per_node=8 finetune.py --data cityscapes --root cityscapes --init ddep.pt --labels 372

What --init loads (and its name in the paper):

    none: nothing (No Pretraining)
    last.pt of stage 1, imagenet21k, imagenet1k: the encoder (Supervised)
    last.pt of stage 2: all but the head (DDeP, DeP)
    last.pt of this stage: all but the head; it too if the class names are equal

Input: pairs of image and mask. Output in --out: last.pt, for evaluate.py; log.jsonl; metrics.json;
predictions.png.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import common
from common import number, say
from data import IGNORE, Order, Samples, segmentation_transform, to_pixels
from datasets import LABELLED
from evaluate import as_text, evaluate, predict, protocol
from labelled import classes_of, survey, training_and_validation
from model import ENCODERS, build_unet, load_weights, read_weights, unet_of, use_batch_statistics
from pictures import colour_mask, picture_table

# PAPER SILENT on batch size, steps, warm-up and the chosen lr and weight_decay, swept over [1e-5, 3e-4] (5.1)
PAPER = dict(steps=10_000, batch_size=16, micro_batch=4, lr=1e-4, warmup=0.0, weight_decay=1e-4,
             crop_size=512, workers=common.default_workers(), save_every=500)
RECIPES = {
    "shapes": dict(steps=250, batch_size=8, micro_batch=8, lr=4e-3, warmup=0.04, weight_decay=0.0,
                   crop_size=64, min_area=0.5, workers=0, save_every=125),
    "paper": PAPER,
    "cityscapes": dict(PAPER, crop_size=1024, micro_batch=2),
}


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--init", default="none", metavar="PATH", help="or imagenet21k, imagenet1k (%(default)s)")
    add("--encoder", choices=ENCODERS, help="(as in --init, else hybrid; shapes: hybrid-small)")
    add("--width", type=number(float, 1 / 64), help="of the decoder (as in --init, else 1; shapes: 0.1875)")
    add("--labels", type=number(int, 1), help="how many images, drawn by --seed (all)")
    common.add_data_flags(parser, LABELLED)
    add("--masks", metavar="PATTERN", help='such as "labels/*_mask.png"')
    add("--train-list", metavar="FILE", help="text file of the training images")
    add("--val-list", metavar="FILE", help="text file of the validation images")
    add("--val-fraction", type=number(float, 0, 1), help="share to validate on")
    add("--crop-size", type=number(int, 32), help="side of the crops (%(default)s; §5.1)")
    add("--min-area", type=number(float, 0, 1),
        help="crops of at least this share, resized (§6; default: windows, §5.1; shapes: 0.5)")
    add("--eval-every", type=number(int, 1), metavar="N", help="log the validation mIoU every N steps")
    common.add_training_flags(parser)
    args = parser.parse(RECIPES, argv)
    args.out = args.out or f"runs/{args.data}/finetune"
    return args


@common.users_mistakes()
def segmentation_network(args, classes):
    """(UNet with the weights of --init, its model_args)."""
    with common.local_first():
        state, made_with = read_weights(args.init) if args.init != "none" else ({}, {})
    model_args = dict(common.network_args(args, made_with, args.init), out_channels=len(classes.names),
                      condition_on_gamma=made_with.get("condition_on_gamma", False))
    torch.manual_seed(args.seed)
    model = build_unet(**model_args)
    if state:
        fresh = ("decoder.",)  # weights that stay random
        if any(name.startswith("decoder.") for name in state):
            fresh = () if made_with["class_names"] == classes.names else ("decoder.head.",)
        load_weights(model, state, args.init, fresh)
    return model, model_args


def main():
    args = parse_arguments()
    rank, world, device, precision = common.start_processes(args)
    cuda = device.type == "cuda"

    # Data
    classes = classes_of(args)
    train, val = training_and_validation(args, classes)
    steps = common.number_of_steps(args, len(train), world)
    train.keep_out("--out", args.out)
    if not val:
        common.refuse(args, ["eval_every"], "without validation images")
    checkpoint, start, made_of = common.resume(args, training_images=str(train), validation_images=str(val),
                                               classes=classes.names, mask_values=classes.values)

    # Model: all weights are trained ("full fine-tuning", §6)
    if checkpoint:
        model, model_args = unet_of(checkpoint), checkpoint["model_args"]
    else:
        model, model_args = segmentation_network(args, classes)
    if rank == 0 and start == 0 and args.data != "shapes":
        say(survey({"train": train, "val": val} if val else {"train": train}, classes))
    common.wait()  # for the survey
    if args.init == "none":  # a new ResNet-50 has no BatchNorm statistics
        use_batch_statistics(model, sync=world > 1 and cuda)
    network = common.prepare_for_training(model, args, device, world)

    # Adam (5.1). PAPER SILENT on betas (torch's) and on coupled or decoupled weight decay (coupled)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    common.restore(checkpoint, optimizer, scaler)

    samples = Samples(train, segmentation_transform(args.crop_size, args.min_area), args.seed)
    order = Order(len(train), args.batch_size, args.micro_batch, steps, args.seed, start, rank, world)
    batches = iter(DataLoader(samples, batch_sampler=order, num_workers=args.workers, pin_memory=cuda))
    how = protocol(args.data, model_args["encoder"], args.crop_size)
    validate = partial(
        evaluate, model, val, classes.names, device, rank, world, precision, args.workers, **how)
    log = common.Log(args.out, start, steps, rank)
    say(f"stage 3: --init {args.init}, {model_args}, {train.note}, {len(train)} train, {len(val or [])} val, "
        f"{start} of {steps} steps done, {world} x {device}, {precision}", rank)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        loss = 0
        parts = [next(batches) for _ in range(order.parts)]  # micro-batches: their gradients add up
        # The mean is over the labelled pixels of the GLOBAL batch: all processes and parts
        pixels = common.total(sum((part["mask"] != IGNORE).sum() for part in parts).to(device)).clamp(min=1)
        for part in parts:
            x = to_pixels(part["image"].to(device, non_blocking=cuda))  # (B, 3, H, W) in [-1, 1]
            mask = part["mask"].to(device, non_blocking=cuda).long()  # (B, H, W)
            with common.autocast(precision, device):
                logits = network(x)  # (B, classes, H, W)
            part_loss = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE, reduction="sum") / pixels
            scaler.scale(part_loss * world).backward()  # DDP divides by world
            loss += part_loss.detach()
        rate = common.cosine_rate(step - 1, steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = rate
        scaler.unscale_(optimizer)  # undoes fp16's scale
        loss = common.finite_loss(step, loss, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        values = {"loss": loss, "rate": rate}
        if args.eval_every and step % args.eval_every == 0:
            values["miou"] = validate()["miou"]
            network.train()
        log.write(step, **values)
        if rank == 0 and (step % args.save_every == 0 or step == steps):
            common.save_checkpoint(
                args, step, model, model_args, optimizer, scaler, made_of, class_names=classes.names,
                class_colours=classes.colours, mask_values=classes.values)
    log.close()

    # PAPER SILENT on which weights are scored: the last
    metrics = {"step": steps}
    if val:
        metrics |= validate()
        say(f"{as_text(metrics)}\n{len(val)} validation images, {how}", rank)
        if rank == 0:
            page = draw_predictions(model, val, classes, device, precision, how["window"])
            page.save(f"{args.out}/predictions.png")
    if rank == 0:
        common.save(f"{args.out}/metrics.json", metrics)


@torch.inference_mode()
def draw_predictions(model, source, classes, device, precision, window):
    """Up to six images, truths and predictions."""
    page = []
    for i in sorted({row * len(source) // 6 for row in range(6)}):
        sample = source.read(i)
        image = sample["image"]
        with common.autocast(precision, device):
            logits = predict(model, to_pixels(image[None].to(device)), window=window)
        page.append([image.permute(1, 2, 0).numpy(), colour_mask(sample["mask"], classes.colours),
                     colour_mask(logits[0].argmax(0).cpu(), classes.colours)])
    return picture_table(page, ["image", "truth", "prediction"], classes.names, classes.colours)


if __name__ == "__main__":
    common.run(main)
