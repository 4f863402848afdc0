"""Stage 2: Decoder Denoising Pretraining (DDeP), or denoising pretraining of the whole network (DeP).

    python pretrain_decoder.py                                                        # toy data, on a CPU
    python pretrain_decoder.py --data folder --root photos --encoder-weights imagenet21k           # one GPU
    torchrun --nproc_per_node=8 pretrain_decoder.py --data imagenet21k --root imagenet21k \\
        --encoder-weights imagenet21k                                                                  # eight

In: images without labels, and the weights of the encoder. Out, in --out (run_folder.py): last.pt, which
finetune.py takes as --init; panel_start.png, panel_end.png; uses.png, which encoder maps the decoder uses.

DDeP (Eq. 6):  O4(phi | theta, gamma) = E_x E_e || g_phi(f_theta(sqrt(gamma) x + sqrt(1 - gamma) e)) - e ||^2

The encoder f_theta is frozen, the decoder g_phi is trained. DeP (section 3) trains both, theta from fresh
weights unless --encoder-weights names others.
"""
import math
import os

import torch
from torch.nn.parallel import DistributedDataParallel

import launch
import noise
import pretrain_encoder
from data import Batches, Pixels, Samples, load, pretraining_transform, to_pixels
from datasets import UNLABELLED, pretraining_images
from launch import InputError, say
from model import ENCODERS, build_unet, freeze, image_size_of, load_encoder_weights, load_strictly
from pictures import curves, from_pixels, sheet
from run_folder import RunFolder, initial_weights, is_finished

RECIPE = {  # shapes: the rate that the sweep of reproduce.py chose for DDeP (figures/sweep.md)
    "shapes": dict(encoder="hybrid-small", width=1 / 4, image_size=64, min_area=0.5, steps=1600, batch_size=4,
                   micro_batch=4, lr=3e-3, warmup_steps=20, clip_norm=1.0, workers=0, save_every="400"),
    "paper": dict(encoder="hybrid", width=1.0, image_size=224, min_area=0.08, epochs=100, batch_size=512,
                  micro_batch=64, warmup_steps=0, workers=launch.default_workers(), save_every="1000"),
}
SHAPES_ENCODER = os.path.join("runs", "shapes", "pretrain_encoder")


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    launch.add_training_flags(parser, UNLABELLED)
    parser.set_defaults(weight_decay=0.0)  # PAPER SILENT
    add = parser.add_argument
    add("--cache", metavar="DIR", help="folder for the index of the images (default: beside the data)")
    add("--coarse", action="store_true", help="cityscapes: with the images of train_extra (Table 3)")
    add("--method", choices=("ddep", "dep"), default="ddep", help="what trains: decoder, or encoder too")
    add("--gamma", type=launch.unit_float, help="gamma of Eq. 5: 1 is no noise, 0 noise alone (default: 0.95)")
    add("--gamma-range", type=launch.unit_float, nargs=2, metavar=("LOW", "HIGH"),
        help="gamma drawn from U(LOW, HIGH) for each image (Table 4: 0.9 0.95; 4.4: 0 1)")
    add("--sigma", type=launch.noise_sigma, help="the noise level as sigma = sqrt(1/gamma - 1)")
    add("--noise", choices=("scaled", "simple"), default="scaled", help="Eq. 5 or Eq. 1")
    add("--target", choices=("noise", "image"), default="noise", help="what to predict (3.2, Table 1)")
    add("--condition", action="store_true", help="condition the decoder's norms on gamma (4.4)")
    add("--init", metavar="PATH", help="a checkpoint of this stage with the same network flags, to go on from")
    add("--encoder", choices=ENCODERS, help="the encoder network")
    add("--encoder-weights", metavar="PATH",
        help="a checkpoint of pretrain_encoder.py, or published weights; imagenet21k (hybrid) or imagenet1k "
             "(resnet50) are downloaded; random: fresh ones (the default of dep)")
    add("--width", type=launch.decoder_width, help="decoder of [1024, 512, 256, 128, 64] * W channels (4.3)")
    add("--image-size", type=launch.positive_int, help="side of the square crops (5.1: 224)")
    add("--min-area", type=launch.unit_float, help="smallest crop, as a fraction of the image's area")
    args = launch.parse(parser, RECIPE, argv)

    # Defaults that depend on other flags
    if args.init is not None and args.encoder_weights is not None:
        raise InputError("--init brings its encoder along; drop --encoder-weights")
    args.out = args.out or os.path.join("runs", args.data, f"pretrain_decoder_{args.method}")
    if args.lr is None:
        args.lr = 1e-4 if args.width == 2 else 6e-5  # 5.1: 6e-5 for 1x and 3x, 1e-4 for 2x
    if args.noise == "simple" and (args.gamma is not None or args.gamma_range is not None):
        raise InputError("--noise simple (Eq. 1) has no gamma; pass --sigma (gamma 0.95 is sigma 0.2294)")
    if args.batch_norm == "batch" and args.method == "ddep":
        raise InputError("--batch-norm batch: DDeP freezes the encoder, statistics included; drop the flag")
    levels = sum(level is not None for level in (args.gamma, args.gamma_range, args.sigma))
    if levels > 1:
        raise InputError("--gamma, --gamma-range and --sigma all set the noise level; pass one of them")
    if levels == 0:
        args.gamma = 0.95  # 4.1, Table 4. PAPER SILENT for Eq. 1 (but for DeP's sigma 0.8 in Table 2)
    if args.sigma is not None:
        args.gamma = noise.sigma_to_gamma(args.sigma)
    if args.gamma_range is not None and args.gamma_range[0] > args.gamma_range[1]:
        raise InputError(f"--gamma-range {args.gamma_range[0]} {args.gamma_range[1]}: expected LOW <= HIGH")
    return args


def find_or_train_encoder(args, processes):
    """What holds the encoder's weights; None: fresh ones. On the toy data stage 1 makes them, once."""
    if args.encoder_weights is not None or args.method == "dep":
        return args.encoder_weights
    if args.data != "shapes" or args.encoder != "hybrid-small":
        raise InputError("DDeP pretrains the decoder of a trained encoder: pass --encoder-weights PATH, or "
                         "imagenet21k for the paper's; --encoder-weights random freezes an untrained one")
    if processes.is_main and not is_finished(SHAPES_ENCODER):
        say(f"no encoder in {SHAPES_ENCODER}: training one first (stage 1, once)")
        alone = launch.Processes(rank=0, world=1, device=processes.device)
        pretrain_encoder.main(["--out", SHAPES_ENCODER, "--device", args.device], alone)
    processes.barrier()
    return os.path.join(SHAPES_ENCODER, "last.pt")


def add_noise(args, x, seeds):
    """(x~, e, gamma (B,)) of images x (B, bands, H, W) in [-1, 1]; noise and gamma by each image's seed."""
    eps = noise.sample_noise(x.shape, seeds, x.device)
    if args.gamma_range is None:
        gamma = torch.full((len(x),), args.gamma)
    else:
        gamma = noise.sample_gamma(*args.gamma_range, seeds)
    if args.noise == "simple":
        sigma = noise.gamma_to_sigma(args.gamma) if args.sigma is None else args.sigma
        return noise.simple_additive_noise(x, eps, sigma), eps, gamma  # Eq. 1
    return noise.scaled_additive_noise(x, eps, gamma), eps, gamma  # Eq. 5


def main():
    args = parse_arguments()
    processes = launch.start_processes(args.device)
    device = processes.device
    precision = launch.resolve_precision(args.precision, device)
    images_per_process = processes.share(args.batch_size)

    # Data
    bands = args.bands or 3
    pixels = Pixels(bands, args.pixel_range, args.huge)
    with processes.one_first():  # one process of a machine builds the index
        images = pretraining_images(args.data, args.root, args.cache, args.coarse, pixels)
    steps = launch.number_of_steps(args, len(images))

    # Model, from the weights of a whole network (--init) or of an encoder
    weights_file = args.init or find_or_train_encoder(args, processes)
    weights, digest = initial_weights(weights_file, args.encoder, args.out, processes)
    # image_size: of the position grid in the weights (224, 384), not of the crops
    model_args = dict(encoder=args.encoder, width=args.width, out_channels=bands, bands=bands,
                      condition_on_gamma=args.condition,
                      image_size=None if weights is None else image_size_of(weights))
    torch.manual_seed(args.seed)
    model = build_unet(**model_args)
    if args.image_size % model.encoder.strides[-1]:
        raise InputError(f"--image-size {args.image_size}: expected a multiple of the encoder's stride "
                         f"{model.encoder.strides[-1]}")
    origin = "fresh weights"
    if args.init is not None:
        complaint = (f"{args.init}: expected a checkpoint of this stage with the same flags, it was made with "
                     f"{weights.get('model_args')}")
        load_strictly(model, weights.get("model", weights), complaint)
        origin = f"encoder and decoder of {args.init}"
    elif weights is not None:
        kind = load_encoder_weights(model.encoder, weights, weights_file)
        origin = f"{kind}, {weights_file}"
    # ResNet-50 alone: stored or batch statistics; how many images share them must not change on resume
    fresh = weights is None and args.method == "dep"
    batch_norm_images = launch.set_batch_norm(model.encoder, args, processes, fresh)
    model.to(device, memory_format=torch.channels_last)
    trained = model
    if args.method == "ddep":
        freeze(model.encoder)  # before DDP and the optimiser see its parameters
        trained = model.decoder

    # Adam (5.1). PAPER SILENT on its betas (here torch's defaults) and on coupled weight decay or not
    adam = torch.optim.AdamW if args.decoupled_weight_decay else torch.optim.Adam
    optimizer = adam(trained.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                     fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Resume: `settings` must be those of the run. (step, last loss, best score); (0, None, -1) for a new run
    settings = {**vars(args), "bands": bands, "precision": precision,
                "images-per-batch-norm": batch_norm_images, "weights-bytes": digest}
    run = RunFolder(settings, [images], steps, processes)
    start, loss, _ = run.restore(model, optimizer, scaler)
    if is_finished(args.out):
        return say(f"{args.out}: finished at step {steps}, see metrics.json there")

    if args.compile:  # in place: no "_orig_mod." in the names of parameters
        model.encoder.compile()
        model.decoder.compile()
    # Around what trains alone: a frozen encoder has no gradients to exchange
    wrapped = DistributedDataParallel(trained) if processes.world > 1 else trained
    samples = Samples(images, pretraining_transform(args.image_size, args.min_area, pixels.range), args.seed,
                      skip_unreadable=True)
    batches = Batches(len(images), args.batch_size, steps, args.seed, start, processes.rank, processes.world,
                      args.micro_batch)
    loader = load(samples, batches, args.workers, pin_memory=device.type == "cuda")

    say(f"stage 2: {args.method}, {args.encoder} ({origin}), decoder x{args.width:g}, {len(images)} images, "
        f"steps {start} to {steps}, {processes.world} x {device.type}, {precision}")
    say(images.note)
    if processes.is_main and start == 0:
        draw_panel(args, model, samples, device).save(run.path("panel_start.png"))
    run.begin(start)  # opens the log; from here on a signal stops the run after its step
    model.train()
    for step, batch in enumerate(run.batches(loader), start):
        rate = launch.cosine_rate(step, steps, args.lr, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # Gradient accumulation: --micro-batch images are loaded at a time, so that the batch fits in memory.
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for part in batch:
            x = to_pixels(part["image"].to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)
            x_noisy, eps, gamma = add_noise(args, x, part["noise_seed"])
            # Synchronise gradients in the last micro-batch alone, as DDP.no_sync() does; ignored without DDP.
            wrapped.require_backward_grad_sync = part["is_last"]
            with launch.autocast(precision, device):
                if args.method == "ddep":
                    with torch.no_grad():  # frozen: keep no activations for a gradient
                        maps = model.encode(x_noisy)
                    prediction = wrapped(maps, x_noisy.shape[-2:], gamma.to(device))
                else:
                    prediction = wrapped(x_noisy, gamma.to(device))
            # By their sizes, the means of the parts add up to the mean over this process's images.
            target = eps if args.target == "noise" else x
            part_loss = noise.denoising_loss(prediction, target) * (len(x) / images_per_process)
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        # One all-reduce sums the loss and tells whether a process got a signal: all stop at the same step.
        loss, stopping = processes.sum_numbers(loss / processes.world, run.signal is not None)
        scaler.unscale_(optimizer)  # clipping needs the true gradient; without --clip-norm it only measures
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.clip_norm or math.inf)
        loss, norm, stopping = torch.stack([loss, norm, stopping]).tolist()  # the one wait for the device
        # Stop before a NaN reaches the weights, and list this batch's files; fp16's scaler may skip a step.
        run.require_finite(step + 1, loss, norm, scaler)
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        run.log_step(done, loss, rate)  # names the unreadable images of the batch, too
        if run.save_is_due(done) or done == steps or stopping:
            run.save(done, model, optimizer, scaler, model_args=model_args, loss=loss)
        if stopping:
            run.stop()

    rises = {}
    if processes.is_main:
        draw_panel(args, model, samples, device).save(run.path("panel_end.png"))
        rises = what_the_decoder_uses(args, model, samples, device)
        curves({args.method: [(stride, 100 * rise, 0) for stride, rise in rises.items()]},
               "stride of the encoder map", "% more loss where the map is its mean").save(run.path("uses.png"))
    run.finish(dict(step=steps, loss=loss, rise_of_loss_without_map=rises))
    say("loss where one encoder map is replaced by its mean over a batch: "
        + ", ".join(f"stride {stride} {rise:+.1%}" for stride, rise in rises.items()))
    say(f"the network for stage 3: --init {run.path('last.pt')}")


@torch.no_grad()
def what_the_decoder_uses(args, model, samples, device):
    """{stride: by what share the denoising loss rises when this encoder map is its mean over 16 images}.

    Near 0: the decoder learnt nothing from this map, and the blocks behind it are hardly pretrained.
    """
    model.eval()
    batch = next(iter(load(samples, Batches(len(samples.source), 16, 1))))
    x = to_pixels(batch["image"].to(device))
    x_noisy, eps, gamma = add_noise(args, x, batch["noise_seed"])
    maps = model.encode(x_noisy)

    def loss(maps):
        prediction = model.decoder(maps, x.shape[-2:], gamma.to(device))
        return noise.denoising_loss(prediction, eps if args.target == "noise" else x).item()

    whole, means = loss(maps), [values.mean(0, keepdim=True).expand_as(values) for values in maps]
    return {stride: loss([*maps[:i], means[i], *maps[i + 1:]]) / whole - 1
            for i, stride in enumerate(model.encoder.strides)}


@torch.no_grad()
def draw_panel(args, model, samples, device, rows=4):
    """A PIL page: image, noisy image, predicted noise, denoised image of the first images of the set."""
    model.eval()
    pictures = []
    for index in range(min(rows, len(samples.source))):
        sample = samples[0, index]
        if isinstance(sample, InputError):
            raise sample
        x = to_pixels(sample["image"][None].to(device))
        x_noisy, _, gamma = add_noise(args, x, [sample["noise_seed"]])
        prediction = model(x_noisy, gamma.to(device)).float()
        gamma = gamma.clamp(min=1e-3).item()  # no division by 0
        # Eq. 1 is Eq. 5 divided by sqrt(gamma): bring x~ to the scale of Eq. 5, then solve that
        scaled = x_noisy * math.sqrt(gamma) if args.noise == "simple" else x_noisy
        if args.target == "image":
            x_hat = prediction
            eps_hat = (scaled - math.sqrt(gamma) * x_hat) / max(math.sqrt(1 - gamma), 1e-3)
        else:
            eps_hat = prediction
            x_hat = noise.remove_noise(scaled, eps_hat, gamma)
        shown = (x, x_noisy, eps_hat / 3, x_hat)  # [-1, 1] shows noise up to 3 standard deviations
        pictures.append([from_pixels(picture[0]) for picture in shown])
    return sheet(pictures, ["image", "noisy image", "predicted noise", "denoised image"], width=160)


if __name__ == "__main__":
    launch.run_script(main)
