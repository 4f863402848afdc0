"""Stage 3: fine-tune the whole network on labelled images (section 5.1), from any of the paper's four initialisations.

    python finetune.py --init runs/shapes/pretrain_decoder_ddep/last.pt --labels 32         # the embedded data, on a CPU
    python finetune.py --data folder --root my_data --init ddep.pt                          # your images and masks, one GPU
    torchrun --nproc_per_node=8 finetune.py --data folder --root my_data --init ddep.pt --fraction 1/8     # eight

    --init ddep.pt or dep.pt         a checkpoint of pretrain_decoder.py: encoder and decoder, all but the head     "DDeP", "DeP"
    --init encoder.pt, imagenet21k   a checkpoint of pretrain_encoder.py or published weights: the encoder alone    "Supervised"
    --init none                      nothing                                                                        "No Pretraining"

In: image and mask pairs. Out, in --out: best.pt (by mIoU on the validation images) and last.pt, which evaluate.py takes; log.jsonl,
args.json, labelled.txt (the images used), metrics.json (last.pt's scores), predictions.png. The same command again continues.
"""
import argparse
import os

import torch
import torch.nn.functional as F

import checkpoints
import runtime
from data import IGNORE, Batches, Samples, load, raise_errors, segmentation_transform, to_pixels
from datasets import LABELLED, add_subset_arguments, check, chosen_labels, class_colours, segmentation_pairs
from evaluate import evaluate, predict, table
from model import ENCODERS, PUBLISHED, build_unet, load_encoder_weights, load_strictly, read_weights
from pictures import colour_mask, from_pixels, sheet
from runtime import InputError

# 5.1 sweeps learning rate and weight decay over [1e-5, 3e-4] for each task; PAPER SILENT on what won, on batch size and steps.
RECIPE = {
    "shapes": dict(crop_size=64, crop="inception", min_area=0.5, steps=250, batch_size=4, micro_batch=4, lr=1e-3, warmup_steps=20,
                   weight_decay=0.0, clip_norm=1.0, workers=0, save_every=125, eval_every=250),
    "paper": dict(crop_size=512, crop="random", min_area=0.08, steps=10_000, batch_size=16, micro_batch=4, lr=1e-4, warmup_steps=0,
                  weight_decay=1e-4, workers=runtime.default_workers(), save_every=500, eval_every=500),
    "cityscapes": dict(crop_size=1024, micro_batch=2),                    # 5.1; the others 512
}
NETWORK = {"shapes": ("hybrid-small", 1 / 4), "paper": ("hybrid", 1.0)}          # encoder and width, where --init does not tell


def parse_arguments(argv=None):
    parser = runtime.Parser(__doc__)
    runtime.add_training_arguments(parser, LABELLED)
    parser.add_argument("--init", default="none", metavar="PATH", help="initial weights: a path, imagenet21k or imagenet1k; or none")
    parser.add_argument("--encoder", choices=ENCODERS, help="the encoder network (default: that of --init)")
    parser.add_argument("--width", type=runtime.positive_float, metavar="W", help="decoder width, see pretrain_decoder.py "
                        "(default: that of --init)")
    parser.add_argument("--num-classes", type=runtime.positive_int, metavar="N", help="folder: mask values are 0 to N-1, or 255 to ignore "
                        "(default: as many as ROOT/classes.txt names); pascal_context: 59, or 60 with the background; PAPER SILENT")
    parser.add_argument("--train-list", metavar="FILE", help="text file with one `image mask` per line, instead of ROOT/images/train")
    parser.add_argument("--val-list", metavar="FILE", help="the same for validation")
    add_subset_arguments(parser)
    parser.add_argument("--crop-size", type=runtime.positive_int, metavar="N",
                        help="side of the square training crops (5.1: 512, Cityscapes 1024)")
    parser.add_argument("--crop", choices=("random", "inception"),
                        help="5.1 says random crop, 6 says inception-style; PAPER SILENT on which")
    parser.add_argument("--min-area", type=runtime.unit_float, metavar="X",
                        help="inception: smallest share of a picture's area in a crop")
    parser.add_argument("--eval-every", type=runtime.positive_int, metavar="N", help="steps between validations")
    args = runtime.parse(parser, RECIPE, argv)

    args.out = args.out or os.path.join("runs", args.data, "finetune")
    return args


def with_network(args, init):
    """args with --encoder and --width filled in: those that `init` was made with, or else those of the data set."""
    made_with = {"encoder": PUBLISHED[args.init][0]} if args.init in PUBLISHED else (init or {}).get("model_args", {})
    network = {}
    for key, fallback in zip(("encoder", "width"), NETWORK["shapes" if args.data == "shapes" else "paper"]):
        asked = getattr(args, key)
        if key in made_with and asked not in (None, made_with[key]):
            raise InputError(f"--{key} {asked}, but {args.init} was made with {key} {made_with[key]}; drop the flag, or pass another --init")
        network[key] = asked if asked is not None else made_with.get(key, fallback)
    return argparse.Namespace(**{**vars(args), **network})


def initialise(model, args, init):
    """Load what --init holds into `model`; everything but the head from stage 2, the encoder from stage 1. Say which is which."""
    with runtime.as_input_error():
        if init is not None and any(name.startswith("decoder.") for name in init.get("model", {})):
            head = {name: value for name, value in model.state_dict().items() if name.startswith("decoder.head.")}
            body = {name: value for name, value in init["model"].items() if not name.startswith("decoder.head.")}
            load_strictly(model, {**body, **head}, f"{args.init}: does not fit this network")
            loaded, fresh = "encoder and decoder blocks", list(head)
        elif init is not None:
            kind = load_encoder_weights(model.encoder, init, label=args.init)
            loaded, fresh = f"the encoder of {kind}", [name for name in model.state_dict() if not name.startswith("encoder.")]
        else:
            loaded, fresh = "nothing", list(model.state_dict())
    total = len(model.state_dict())
    what = f"the head ({', '.join(fresh)})" if len(fresh) == 2 else "everything" if len(fresh) == total else "the decoder"
    return f"init {args.init}: loaded {total - len(fresh)} tensors ({loaded}); fresh: {len(fresh)} tensors, {what}"


def main():
    args = parse_arguments()
    processes = runtime.start_processes(args.device)
    init_path = checkpoints.weights_path(args.init, args.encoder, processes)
    with runtime.as_input_error():
        init = None if args.init == "none" else read_weights(init_path)
    args = with_network(args, init)
    device = processes.device
    args.precision = precision = runtime.resolve_precision(args.precision, device)
    runtime.share_of(args.batch_size, processes)

    # Data: all labelled images, or a nested subset of them
    train, names = segmentation_pairs(args.data, args.root, "train", args.num_classes, args.train_list)
    val = None
    if args.val_list is not None or args.train_list is None or args.root is not None:
        val, _ = segmentation_pairs(args.data, args.root, "val", args.num_classes, args.val_list)
    notes, train = [source.note for source in (train, val) if source is not None], chosen_labels(train, args)
    steps = runtime.steps_of(args, len(train))

    # Model: everything trains (section 2)
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, width=args.width, out_channels=len(names),
                      condition_on_gamma=(init or {}).get("model_args", {}).get("condition_on_gamma", False))
    model = build_unet(**model_args)
    origin = initialise(model, args, init)
    model.to(device, memory_format=torch.channels_last)
    optimizer = runtime.adam(model.parameters(), args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Continue, or say that there is nothing left to do
    run = checkpoints.Run(args, processes, data="; ".join(source.fingerprint() for source in (train, val) if source is not None))
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
    samples = Samples(train, segmentation_transform(args.crop_size, args.crop, args.min_area), args.seed)
    batches = Batches(len(train), args.batch_size, steps, args.seed, start, processes.rank, processes.world)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")

    log = runtime.Log(args, processes, steps, start)
    log.say(f"stage 3: {args.encoder}, decoder x{args.width:g}, {len(train)} labelled images, {len(names)} classes, "
            f"{len(val) if val else 'no'} validation images, steps {start} to {steps}, {processes.world} x {device.type}, {precision}")
    log.say(origin)
    for note in (*notes, *run.notes):
        log.say(note)
    if args.data == "folder":                                             # the named sets are not read twice
        for source in (train, *([val] if val is not None else [])):
            log.say(f"checking {len(source)} images and masks")
            check(source, processes.rank, processes.world)
    if processes.is_main:
        with runtime.replacing(os.path.join(args.out, "labelled.txt")) as file:
            file.writelines(os.fsencode(train.line(i)) + b"\n" for i in range(len(train)))

    def validate(done):
        """Measure, and keep the weights in best.pt if none were better: (scores, best mIoU so far)."""
        metrics = evaluate(model, val, names, processes, precision, args.workers, between=run.stop_if_told, window=args.crop_size)
        miou = metrics["miou"] or 0.0                                     # None where every validation pixel is ignored
        log.record(step=done, miou=miou, pixel_accuracy=metrics["pixel_accuracy"])
        log.say(f"step {done}: mIoU {miou:.4f}")
        if miou > best and processes.is_main:
            checkpoints.save(os.path.join(args.out, "best.pt"), dict(model=model.state_dict(), model_args=model_args, step=done, best=miou,
                                                                     class_names=names, args=vars(args)))
        return metrics, max(best, miou)

    run.catch_signals()
    model.train()
    for step, batch in enumerate(log.timed(raise_errors(loader)), start=start):
        if val is not None and step and step % args.eval_every == 0:      # after the save of this step: a stop may come
            _, best = validate(step)
        runtime.set_rate(optimizer, rate := runtime.cosine_rate(step, steps, args.lr, args.warmup_steps))
        # The mean is over the pixels that count in the GLOBAL batch: a mean per process would weigh them by where they lie.
        counted = processes.sum((batch["mask"] != IGNORE).sum().to(device)).clamp(min=1)
        loss = torch.zeros((), device=device)
        for part, is_last in runtime.micro_batches(batch, args.micro_batch):
            x = to_pixels(part["image"].to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            mask = part["mask"].to(device, non_blocking=True).long()
            with runtime.gradient_sync(wrapped, now=is_last), runtime.autocast(precision, device):
                logits = wrapped(x)
                part_loss = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE, reduction="sum") / counted
                scaler.scale(part_loss * processes.world).backward()      # DDP divides by the number of processes
            loss += part_loss.detach()
        loss, stopping = run.sum_loss(loss)
        norm = runtime.clip_gradients(model.parameters(), args.clip_norm, optimizer, scaler)
        runtime.require_finite(loss, norm, step, scaler, batch, train, args, processes)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step + 1, loss, rate)

        done = step + 1
        if run.save_is_due(done) or done % args.eval_every == 0 or done == steps or stopping:
            run.save(done, model=model.state_dict(), model_args=model_args, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     loss=loss, best=best, class_names=names)
        if stopping:
            run.stop()

    metrics, best = validate(steps) if val is not None else ({"loss": loss}, None)
    log.close()
    if processes.is_main:
        if val is not None:
            draw_predictions(model, val, class_colours(args.data, len(names)), device, args.crop_size).save(os.path.join(args.out, "predictions.png"))
            print(table(metrics))
        run.finish(metrics)
        print(f"fine-tuned: {os.path.join(args.out, 'last.pt')}" + (f"; best.pt has mIoU {best:.4f}" if val is not None else ""))


@torch.no_grad()
def draw_predictions(model, source, colours, device, window, rows=6):
    """Image, truth and prediction of validation images, evenly picked."""
    model.eval()
    pictures = []
    for i in range(0, len(source), max(1, len(source) // rows)):
        sample = source.read(i)
        x = to_pixels(sample["image"].as_subclass(torch.Tensor)[None].to(device))
        said = predict(model, x, window=window).argmax(1)[0].cpu()
        pictures.append([from_pixels(x[0]), colour_mask(sample["mask"], colours), colour_mask(said, colours)])
    return sheet(pictures[:rows], ["image", "truth", "prediction"], height=160)


if __name__ == "__main__":
    runtime.run(main)
