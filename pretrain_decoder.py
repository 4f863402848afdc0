"""Stage 2: Decoder Denoising Pretraining (DDeP), or denoising pretraining of the whole network (DeP).

    python pretrain_decoder.py                                                              # the embedded data, on a CPU
    python pretrain_decoder.py --data folder --root photos --encoder-weights encoder.pt     # your own images, one GPU
    torchrun --nproc_per_node=8 pretrain_decoder.py --data imagenet21k --root imagenet21k --encoder-weights encoder.pt   # eight

In: any folder of images, no labels, and the weights of the encoder. Out, in --out: last.pt, which finetune.py takes as --init;
log.jsonl, args.json, panel_start.png and panel_end.png. The same command again continues where it stopped.

    DDeP   O4(phi | theta, gamma) = E_x E_e || g_phi(f_theta(sqrt(gamma) x + sqrt(1 - gamma) e)) - e ||^2     Eq. 6; theta frozen
    DeP    the same with theta trained as well, from fresh weights unless --encoder-weights says otherwise      (section 3)
"""
import os
import sys

import torch

import checkpoints
import noise
import runtime
from data import Batches, Samples, load, pretraining_transform, raise_errors, to_pixels
from datasets import UNLABELLED, pretraining_images
from model import ENCODERS, build_unet, freeze, load_encoder_weights
from pictures import from_pixels, sheet
from runtime import InputError

RECIPE = {
    "shapes": dict(encoder="hybrid-small", width=1 / 4, image_size=64, min_area=0.5, steps=200, batch_size=16, micro_batch=16, lr=5e-3,
                   warmup_steps=20, clip_norm=1.0, workers=0, save_every=100),
    "paper": dict(encoder="hybrid", width=1.0, image_size=224, min_area=0.08, epochs=100, batch_size=512, micro_batch=64,
                  warmup_steps=0, workers=runtime.default_workers(), save_every=1000),             # lr: by width, see below
}
SHAPES_ENCODER = os.path.join("runs", "shapes", "pretrain_encoder")


def parse_arguments(argv=None):
    parser = runtime.Parser(__doc__)
    runtime.add_training_arguments(parser, UNLABELLED)
    parser.set_defaults(weight_decay=0.0)                                 # PAPER SILENT on the weight decay of pretraining
    parser.add_argument("--cache", metavar="DIR", help="folder for the index of a large listing (default: beside the data)")
    parser.add_argument("--coarse", action="store_true", help="cityscapes: with the images of train_extra (Table 3: fine & coarse)")
    parser.add_argument("--method", choices=("ddep", "dep"), default="ddep", help="ddep: the encoder is frozen; dep: all trains")
    parser.add_argument("--gamma", type=runtime.unit_float, metavar="G",
                        help="noise level of Eq. 5, 0 to 1; 0.95 unless another flag sets it")
    parser.add_argument("--gamma-range", type=runtime.unit_float, nargs=2, metavar=("LOW", "HIGH"),
                        help="gamma drawn from U(LOW, HIGH) for each image (Table 4: 0.9 0.95; 4.4: 0 1)")
    parser.add_argument("--sigma", type=runtime.non_negative_float, metavar="S", help="the noise level as sigma = sqrt(1/gamma - 1)")
    parser.add_argument("--noise", choices=("scaled", "simple"), default="scaled", help="Eq. 5 or Eq. 1")
    parser.add_argument("--target", choices=("noise", "image"), default="noise", help="what to predict (3.2, Table 1)")
    parser.add_argument("--condition", action="store_true", help="tell the decoder's normalisation layers gamma (4.4)")
    parser.add_argument("--encoder", choices=ENCODERS, help="the encoder network")
    parser.add_argument("--encoder-weights", metavar="PATH", help="its weights: a checkpoint of pretrain_encoder.py, or Google's "
                        "R50+ViT-B_16.npz, timm's, torchvision's; imagenet21k (hybrid) or imagenet1k (resnet50): fetched; random: fresh "
                        "(the default for dep)")
    parser.add_argument("--width", type=runtime.positive_float, metavar="W", help="decoder of [1024, 512, 256, 128, 64] * W (4.3)")
    parser.add_argument("--image-size", type=runtime.positive_int, metavar="N", help="side of the square crops, in pixels (5.1: 224)")
    parser.add_argument("--min-area", type=runtime.unit_float, metavar="X", help="smallest share of a picture's area that a crop shows")
    args = runtime.parse(parser, RECIPE, argv)

    args.out = args.out or os.path.join("runs", args.data, f"pretrain_decoder_{args.method}")
    if args.lr is None:
        args.lr = 1e-4 if args.width == 2 else 6e-5                       # 5.1: 6e-5 for 1x and 3x, 1e-4 for 2x
    if sum(level is not None for level in (args.gamma, args.gamma_range, args.sigma)) > 1:
        raise InputError("--gamma, --gamma-range and --sigma all set the noise level; pass one of them")
    if args.noise == "simple" and (args.gamma is not None or args.gamma_range is not None):
        raise InputError("--noise simple (Eq. 1) has no gamma; pass --sigma (gamma 0.95 corresponds to sigma 0.2294)")
    if args.gamma_range is not None and args.gamma_range[0] > args.gamma_range[1]:
        raise InputError(f"--gamma-range {args.gamma_range[0]} {args.gamma_range[1]}: expected LOW <= HIGH")
    if args.sigma is not None:
        args.gamma = noise.sigma_to_gamma(args.sigma)
    elif args.gamma_range is None and args.gamma is None:
        args.gamma = 0.95                                                 # 4.1, Table 4; for Eq. 1, PAPER SILENT: the same level
    return args


def find_encoder_weights(args, processes):
    """The path of the encoder's weights, or None for fresh ones. On shapes a missing stage 1 is run first, and kept."""
    if args.encoder_weights == "random" or (args.encoder_weights is None and args.method == "dep"):
        return None
    if args.encoder_weights is not None:
        return checkpoints.weights_path(args.encoder_weights, args.encoder, processes)
    if args.data != "shapes" or args.encoder != "hybrid-small":
        raise InputError("DDeP pretrains the decoder of a trained encoder: pass --encoder-weights PATH, or imagenet21k for the paper's; "
                         "--encoder-weights random freezes an untrained one")
    path = os.path.join(SHAPES_ENCODER, "last.pt")
    if processes.is_main and not checkpoints.is_finished(SHAPES_ENCODER):
        print(f"no encoder at {path}: training one first (stage 1, once)", flush=True)
        group = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}  # it runs alone, not as a process of torchrun's
        alone = {key: value for key, value in os.environ.items() if key not in group}
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrain_encoder.py")
        status = runtime.run_first([sys.executable, script, "--out", SHAPES_ENCODER, "--device", args.device], alone)
        if status:
            raise InputError(f"stage 1 ended with exit status {status}; see its message above")
    processes.barrier()
    return path


def add_noise(args, x, seeds):
    """(x~, e, gamma) for images x (B, 3, H, W) in [-1, 1], each with noise of its own seed."""
    eps = noise.sample_noise(x.shape, seeds, x.device)
    gamma = torch.full((len(x),), args.gamma) if args.gamma_range is None else noise.sample_gamma(*args.gamma_range, seeds)
    if args.noise == "simple":
        return noise.simple_additive_noise(x, eps, noise.gamma_to_sigma(gamma)), eps, gamma                 # Eq. 1
    return noise.scaled_additive_noise(x, eps, gamma), eps, gamma                                           # Eq. 5


def main():
    args = parse_arguments()
    processes = runtime.start_processes(args.device)
    device = processes.device
    args.precision = precision = runtime.resolve_precision(args.precision, device)
    share = runtime.share_of(args.batch_size, processes)

    # Data
    with processes.one_first():                                           # it lists the images, for all on its machine
        images = pretraining_images(args.data, args.root, args.cache, args.coarse)
    steps = runtime.steps_of(args, len(images))

    # Model
    encoder_weights = find_encoder_weights(args, processes)
    torch.manual_seed(args.seed)
    model_args = dict(encoder=args.encoder, width=args.width, out_channels=3, condition_on_gamma=args.condition)
    model = build_unet(**model_args)
    if args.image_size % model.encoder.strides[-1]:
        raise InputError(f"--image-size {args.image_size}: expected a multiple of the encoder's stride {model.encoder.strides[-1]}")
    if encoder_weights is not None:
        with runtime.as_input_error():
            encoder_weights = f"{load_encoder_weights(model.encoder, encoder_weights)}, {encoder_weights}"
    model.to(device, memory_format=torch.channels_last)
    if args.method == "ddep":
        freeze(model.encoder)                                             # before DDP and the optimiser see anything
    trained = model.decoder if args.method == "ddep" else model
    optimizer = runtime.adam(trained.parameters(), args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Continue, or say that there is nothing left to do
    run = checkpoints.Run(args, processes, data=images.fingerprint())
    start, loss, checkpoint = 0, None, run.checkpoint
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start, loss = checkpoint["step"], checkpoint["loss"]
    if run.is_finished():
        return runtime.say(processes, f"{args.out}: finished at step {steps}, see metrics.json there")

    if args.compile:                                                      # in place: the names in the checkpoint stay
        model.encoder.compile()
        model.decoder.compile()
    wrapped = processes.wrap(trained)

    def predict(x_noisy, gamma):
        gamma = gamma.to(device) if args.condition else None
        if args.method == "dep":
            return wrapped(x_noisy, gamma)
        with torch.no_grad():
            maps = model.encode(x_noisy)
        return wrapped(maps, x_noisy.shape[-2:], gamma)

    samples = Samples(images, pretraining_transform(args.image_size, args.min_area), args.seed, skip_unreadable=True)
    batches = Batches(len(images), args.batch_size, steps, args.seed, start, processes.rank, processes.world)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")

    log = runtime.Log(args, processes, steps, start)
    log.say(f"stage 2: {args.method}, {args.encoder} ({encoder_weights or 'fresh weights'}), decoder x{args.width:g}, "
            f"{len(images)} images, steps {start} to {steps}, {processes.world} x {device.type}, {precision}")
    for note in (images.note, *run.notes):
        log.say(note)
    if processes.is_main and start == 0:
        draw_panel(args, model, samples, device).save(os.path.join(args.out, "panel_start.png"))
    unreadable = runtime.Unreadable(len(images), processes, log, checkpoint["unreadable"] if checkpoint else [])
    run.catch_signals()
    model.train()
    for step, batch in enumerate(log.timed(raise_errors(loader)), start=start):
        runtime.set_rate(optimizer, rate := runtime.cosine_rate(step, steps, args.lr, args.warmup_steps))
        unreadable.note(batch, step)
        loss = torch.zeros((), device=device)
        for part, is_last in runtime.micro_batches(batch, args.micro_batch):
            x = to_pixels(part["image"].to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            x_noisy, eps, gamma = add_noise(args, x, part["noise_seed"])
            with runtime.gradient_sync(wrapped, now=is_last), runtime.autocast(precision, device):
                prediction = predict(x_noisy, gamma)
                part_loss = noise.denoising_loss(prediction, eps if args.target == "noise" else x) * (len(x) / share)
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        loss, stopping = run.sum_loss(loss / processes.world)
        norm = runtime.clip_gradients(trained.parameters(), args.clip_norm, optimizer, scaler)
        runtime.require_finite(loss, norm, step, scaler, batch, images, args, processes)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step + 1, loss, rate)

        done = step + 1
        if run.save_is_due(done) or done == steps or stopping:
            run.save(done, model=model.state_dict(), model_args=model_args, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     loss=loss, unreadable=sorted(unreadable.known))
        if stopping:
            run.stop()
    log.close()

    if processes.is_main:
        draw_panel(args, model, samples, device).save(os.path.join(args.out, "panel_end.png"))
        run.finish(dict(step=steps, loss=loss))
        print(f"the network for stage 3: --init {os.path.join(args.out, 'last.pt')}")


@torch.no_grad()
def draw_panel(args, model, samples, device, rows=4):
    """Image, noisy image, predicted noise, denoised image, for the first images of the set."""
    model.eval()
    pictures = []
    for index in range(min(rows, len(samples.source))):
        sample = samples[0, index]
        if isinstance(sample, InputError):
            raise sample
        x = to_pixels(sample["image"][None].to(device))
        x_noisy, eps, gamma = add_noise(args, x, [sample["noise_seed"]])
        prediction = model(x_noisy, gamma.to(device)).float()
        # Eq. 1 is Eq. 5 times 1/sqrt(gamma): bring x~ to the scale of Eq. 5, then solve that for what was not predicted
        scaled = x_noisy * gamma.sqrt().item() if args.noise == "simple" else x_noisy
        if args.target == "image":
            x_hat = prediction
            eps_hat = (scaled - gamma.sqrt().item() * x_hat) / max((1 - gamma).sqrt().item(), 1e-3)
        else:
            eps_hat = prediction
            x_hat = noise.remove_noise(scaled, eps_hat, gamma.clamp(min=1e-3))
        pictures.append([from_pixels(picture[0]) for picture in (x, x_noisy, eps_hat / 3, x_hat)])
    return sheet(pictures, ["image", "noisy image", "predicted noise", "denoised image"], height=160)


if __name__ == "__main__":
    runtime.run(main)
