"""Stage 3: fine-tune the whole network on labelled images (5.1), from one of four initialisations.

    python finetune.py --init runs/shapes/pretrain_decoder_ddep/last.pt --labels 32      # toy data, on a CPU
    python finetune.py --data folder --root my_data --init ddep.pt                       # your own, one GPU
    torchrun --nproc_per_node=8 finetune.py --data cityscapes --root cityscapes --init ddep.pt --fraction 1/8

    --init ddep.pt or dep.pt: a checkpoint of pretrain_decoder.py, all but its head         "DDeP", "DeP"
    --init encoder.pt or imagenet21k: of pretrain_encoder.py or published, the encoder      "Supervised"
    --init none: fresh weights                                                              "No Pretraining"

In: pairs of image and mask. Out, in --out (run_folder.py): best.pt (by mIoU on the validation images) and
last.pt, which evaluate.py takes; metrics.json (last.pt's scores), labelled.txt and validated.txt (the images
used), masks.txt (the share of each class), predictions.png.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import launch
from data import IGNORE, Batches, Pixels, Samples, Scale, load, segmentation_transform, to_pixels
from datasets import (DATA_SETS, LABELLED, add_subset_flags, choose_labels, class_colours, labelled_parts,
                      survey_masks)
from evaluate import evaluate, predict_rows, table
from launch import InputError, say
from model import ENCODERS, PUBLISHED, build_unet, freeze, image_size_of, load_encoder_weights, load_strictly
from pictures import as_picture, colour_mask, sheet
from run_folder import RunFolder, initial_weights, is_finished, write_lines

# 5.1 sweeps lr and weight_decay over [1e-5, 3e-4]. PAPER SILENT on what won, on batch size and steps. On shapes the
# sweep of reproduce.py chose this rate for DDeP (figures/sweep.md).
RECIPE = {
    "shapes": dict(crop_size=64, crop="inception", min_area=0.5, steps=500, batch_size=4, micro_batch=4,
                   lr=2e-3, warmup_steps=20, weight_decay=0.0, clip_norm=1.0, workers=0, save_every="250",
                   eval_every=500),
    "paper": dict(crop_size=512, crop="random", min_area=0.08, steps=10_000, batch_size=16, micro_batch=4,
                  lr=1e-4, warmup_steps=0, weight_decay=1e-4, workers=launch.default_workers(),
                  save_every="500", eval_every=500),
    **{name: data_set.finetuning for name, data_set in DATA_SETS.items()},
}


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    launch.add_training_flags(parser, LABELLED)
    add = parser.add_argument
    add("--init", default="none", metavar="PATH", help="a path, imagenet21k, imagenet1k or none")
    add("--encoder", choices=ENCODERS, help="the encoder network (default: that of --init, else the paper's)")
    add("--width", type=launch.decoder_width,
        help="decoder of [1024, 512, 256, 128, 64] * W (default: that of --init, else 1; shapes: 1/4)")
    add("--num-classes", type=launch.positive_int,
        help="folder: mask values are 0 to N-1, or 255 to ignore (default: by ROOT/classes.txt); "
             "pascal_context: 59, or 60 with the background")
    add("--train-list", metavar="FILE", help="file with an `image mask` a line, instead of ROOT/images/train")
    add("--val-list", metavar="FILE", help="the same for validation")
    add("--val-fraction", type=launch.unit_float, metavar="F",
        help="hold out this share of the labelled images, where there are none for validation")
    add("--folds", type=launch.positive_int, metavar="K", help="hold out one of K parts: cross-validation")
    add("--fold", type=launch.non_negative_int, metavar="I", help="which part, 0 to K-1 (default: 0)")
    add_subset_flags(parser)
    add("--crop-size", type=launch.positive_int, help="side of the square crops (5.1: 512, Cityscapes 1024)")
    add("--crop", choices=("random", "inception"), help="paper 5.1 says random crop, 6 says inception-style")
    add("--min-area", type=launch.unit_float, help="inception: smallest crop, as a fraction of the area")
    add("--eval-every", type=launch.positive_int, help="steps between validations")
    add("--encoder-lr", type=launch.non_negative_float,
        help="peak learning rate of the encoder; 0 freezes it (default: --lr)")
    add("--class-weights", choices=("balanced",),
        help="weight of a pixel of class c in the loss: min(10, pixels / (classes * pixels of c)), over the "
             "classes that occur in the training masks")
    args = launch.parse(parser, RECIPE, argv)
    args.out = args.out or os.path.join("runs", args.data, "finetune")
    if args.val_fraction is not None and args.folds is not None:
        raise InputError("--val-fraction and --folds both hold out images; pass one of them")
    if args.encoder_lr == 0 and args.batch_norm == "batch":
        raise InputError("--encoder-lr 0 freezes the encoder, statistics included; drop --batch-norm batch")
    if args.fold is not None and args.fold >= (args.folds or 0):
        raise InputError(f"--fold {args.fold}: expected 0 to K-1, with --folds K")
    return args


def choose_network(args, init):
    """Arguments for build_unet: those of `init` (the content of --init), else of the flags, else defaults."""
    small = args.data == "shapes"
    network = dict(encoder="hybrid-small" if small else "hybrid", width=1 / 4 if small else 1.0,
                   condition_on_gamma=False, bands=3,
                   image_size=None if init is None else image_size_of(init))
    from_init = {}
    if args.init in PUBLISHED:
        from_init = {"encoder": PUBLISHED[args.init][0]}
    elif init is not None and "model_args" in init:
        made_with = {"bands": 3, **init["model_args"]}
        from_init = {key: value for key, value in made_with.items() if key in network}
    for key, asked in (("encoder", args.encoder), ("width", args.width), ("bands", args.bands)):
        if key in from_init and asked not in (None, from_init[key]):
            raise InputError(f"--{key} {asked}, but {args.init} was made with {key} {from_init[key]}; drop "
                             "the flag, or pass another --init")
        if asked is not None:
            network[key] = asked
    return {**network, **from_init}


def initialise(model, name, init):
    """Load what `init` holds for `model`. Returns a line that says what is loaded and what is fresh."""
    ours = model.state_dict()
    if init is None:
        loaded, fresh, what = "nothing", ours, "everything"
    elif any(key.startswith("decoder.") for key in init.get("model", {})):
        fresh = {key: value for key, value in ours.items() if key.startswith("decoder.head.")}
        load_strictly(model, {**init["model"], **fresh}, f"{name}: does not fit this network")
        loaded, what = "encoder and decoder blocks", f"the head ({', '.join(fresh)})"
    else:
        kind = load_encoder_weights(model.encoder, init, name)
        loaded = f"the encoder of {kind}"
        fresh, what = [key for key in ours if not key.startswith("encoder.")], "the decoder"
    count = len(ours) - len(fresh)
    return f"init {name}: loaded {count} tensors ({loaded}); fresh: {len(fresh)} tensors, {what}"


def main():
    args = parse_arguments()
    processes = launch.start_processes(args.device)
    device = processes.device
    precision = launch.resolve_precision(args.precision, device)
    processes.share(args.batch_size)  # raises if it does not divide

    # Initial weights, which decide the network
    init, digest = initial_weights(args.init, args.encoder, args.out, processes)
    network = choose_network(args, init)

    # Data: all labelled images, or a nested subset of them
    pixels = Pixels(network["bands"], args.pixel_range, args.huge)
    all_labelled, val, names = labelled_parts(args, pixels)
    train = choose_labels(all_labelled, args)
    sources = [train] if val is None else [train, val]
    colours = class_colours(args.data, len(names), train)
    steps = launch.number_of_steps(args, len(train))

    # Model: everything trains (section 2)
    torch.manual_seed(args.seed)
    model_args = {**network, "out_channels": len(names)}
    described = dict(model_args=model_args, class_names=names, class_colours=colours.tolist())
    model = build_unet(**model_args)
    origin = initialise(model, args.init, init)
    # ResNet-50 alone: stored or batch statistics; how many images share them must not change on resume
    batch_norm_images = launch.set_batch_norm(model.encoder, args, processes, fresh=init is None)
    model.to(device, memory_format=torch.channels_last)

    # Adam (5.1). PAPER SILENT on its betas (here torch's defaults) and on coupled weight decay or not
    adam = torch.optim.AdamW if args.decoupled_weight_decay else torch.optim.Adam
    groups, peak_rates = [{"params": model.parameters()}], [args.lr]
    if args.encoder_lr == 0:
        freeze(model.encoder)  # before DDP and the optimiser see its parameters
        groups = [{"params": model.decoder.parameters()}]
    elif args.encoder_lr is not None:
        groups = [{"params": part.parameters()} for part in (model.decoder, model.encoder)]
        peak_rates = [args.lr, args.encoder_lr]
    optimizer = adam(groups, lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda"))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Resume: `settings` must be those of the run. (step, last loss, best score); (0, None, -1) for a new run
    settings = {**vars(args), "precision": precision, "images-per-batch-norm": batch_norm_images,
                "encoder": network["encoder"], "width": network["width"], "bands": network["bands"],
                "classes-of-masks": f"{', '.join(names)} ({train.meaning()})", "weights-bytes": digest}
    run = RunFolder(settings, sources, steps, processes)
    start, loss, best = run.restore(model, optimizer, scaler)
    if is_finished(args.out):
        return say(f"{args.out}: finished at step {steps}, see metrics.json there")

    if args.compile:  # in place: no "_orig_mod." in the names of parameters
        model.compile()
    wrapped = DistributedDataParallel(model) if processes.world > 1 else model
    transform = segmentation_transform(args.crop_size, args.crop, args.min_area, pixels.range)
    samples = Samples(train, transform, args.seed)
    batches = Batches(len(train), args.batch_size, steps, args.seed, start, processes.rank, processes.world,
                      args.micro_batch)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")

    def validate(done):
        """Measure mIoU; the best weights so far go to best.pt. Returns the scores and the best mIoU."""
        metrics = evaluate(model, val, names, processes, precision, args.workers, window=args.crop_size,
                           between=run.stop_if_told)
        miou = metrics["miou"]  # None where every validation pixel is ignored
        run.record(step=done, miou=miou, pixel_accuracy=metrics["pixel_accuracy"])
        say(f"step {done}: no labelled validation pixel" if miou is None else f"step {done}: mIoU {miou:.4f}")
        miou = miou or 0.0
        if miou > best:
            run.save_best(model, **described, step=done, best=miou)
        return metrics, max(best, miou)

    say(f"stage 3: {network['encoder']}, decoder x{network['width']:g}, {len(train)} labelled images, "
        f"{len(names)} classes, {len(val) if val else 'no'} validation images, steps {start} to {steps}, "
        f"{processes.world} x {device.type}, {precision}")
    say(origin)
    for source in [all_labelled, *sources[1:]]:  # what is unusual about the data, if anything
        say(source.note)
    class_weights = torch.ones(len(names), device=device)
    if args.data == "folder" or args.class_weights:  # all files are read: a fault is named before training
        say(f"reading {sum(map(len, sources))} images and masks")
        parts = {"training": train} if val is None else {"training": train, "validation": val}
        text, counts = survey_masks(parts, names, processes)
        say(text)
        if args.class_weights == "balanced":  # a class that does not occur has 10, which no pixel uses
            training_pixels = counts["training"][0, :len(names)].to(device, torch.float32)
            mean = training_pixels.sum() / (training_pixels > 0).sum()
            class_weights = (mean / training_pixels).clamp(max=10)
        if processes.is_main:
            write_lines(run.path("masks.txt"), text.splitlines())
    if processes.is_main:
        write_lines(run.path("labelled.txt"), [train.line(i) for i in range(len(train))])
        if val is not None:
            write_lines(run.path("validated.txt"), [val.line(i) for i in range(len(val))])
    batch_pixels = args.batch_size * args.crop_size ** 2
    run.begin(start)  # opens the log; from here on a signal stops the run after its step
    model.train()
    for step, batch in enumerate(run.batches(loader), start):
        # One iteration late, when the checkpoint of this step is saved: a kill here loses no training.
        if val is not None and step and step % args.eval_every == 0:
            _, best = validate(step)
        rates = [launch.cosine_rate(step, steps, peak, args.warmup_steps) for peak in peak_rates]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate

        # The loss is the mean over the labelled pixels of the GLOBAL batch, by the weights of their classes: a
        # mean per process would depend on the number of processes. How many there are is known after the last
        # micro-batch alone: until then divide by all pixels, then by the share of them that counts.
        # Gradient accumulation: --micro-batch images are loaded at a time, so that the batch fits in memory.
        optimizer.zero_grad()
        loss, share = torch.zeros(2, device=device)
        for part in batch:
            x = to_pixels(part["image"].to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)
            mask = part["mask"].to(device, non_blocking=True).long()
            # Synchronise gradients in the last micro-batch alone, as DDP.no_sync() does; ignored without DDP.
            wrapped.require_backward_grad_sync = part["is_last"]
            with launch.autocast(precision, device):
                logits = wrapped(x)
            part_loss = F.cross_entropy(logits.float(), mask, class_weights, ignore_index=IGNORE,
                                        reduction="sum") / batch_pixels
            scaler.scale(part_loss * processes.world).backward()  # times world: DDP averages, we need the sum
            loss += part_loss.detach()
            pixels_of_class = torch.bincount(part["mask"].flatten(), minlength=IGNORE + 1)[:len(names)]
            share += (class_weights * pixels_of_class.to(device)).sum() / batch_pixels

        # One all-reduce sums them and tells whether a process got a signal: all stop at the same step.
        loss, share, stopping = processes.sum_numbers(loss, share, run.signal is not None)
        share = torch.where(share > 0, share, 1.0)  # all void: the loss is 0
        loss /= share
        scaler.unscale_(optimizer)  # clipping needs the true gradient; without --clip-norm it only measures
        for parameter in trained:
            parameter.grad /= share
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_norm or math.inf)
        loss, norm, stopping = torch.stack([loss, norm, stopping]).tolist()  # the one wait for the device
        # Stop before a NaN reaches the weights, and list this batch's files; fp16's scaler may skip a step.
        run.require_finite(step + 1, loss, norm, scaler)
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        run.log_step(done, loss, rates[0])  # names the unreadable images of the batch, too
        if run.save_is_due(done) or done % args.eval_every == 0 or done == steps or stopping:
            run.save(done, model, optimizer, scaler, **described, loss=loss, best=best)
        if stopping:
            run.stop()

    if val is None:
        run.finish({"loss": loss})
        return say(f"fine-tuned: {run.path('last.pt')}")
    metrics, best = validate(steps)
    if processes.is_main:
        whole = Samples(val, Scale(pixels.range))
        page = draw_predictions(model, whole, names, colours, device, args.crop_size)
        page.save(run.path("predictions.png"))
    run.finish(metrics)
    say(table(metrics))
    say(f"fine-tuned: {run.path('last.pt')}; best.pt has mIoU {best:.4f}")


@torch.no_grad()
def draw_predictions(model, samples, names, colours, device, window, rows=6):
    """A PIL page: image, truth and prediction of `rows` images, spread over the set."""
    model.eval()
    pictures = []
    rows = min(rows, len(samples.source))
    for row in range(rows):
        sample = samples[0, row * len(samples.source) // rows]
        x = sample["image"][None].to(device)
        x = x if x.dtype == torch.uint8 else to_pixels(x)
        blocks = [block.argmax(1)[0].byte().cpu() for block in predict_rows(model, x, window=window)]
        masks = [colour_mask(mask, colours) for mask in (sample["mask"], torch.cat(blocks))]
        pictures.append([as_picture(sample["image"]), *masks])
    return sheet(pictures, ["image", "truth", "prediction"], 160, names, colours)


if __name__ == "__main__":
    launch.run_script(main)
