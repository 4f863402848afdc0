"""Stage 2: Decoder Denoising Pretraining (DDeP) or Denoising Pretraining (DeP).

    python pretrain_decoder.py --gamma 0.95   # toy data, on a CPU; runs stage 1 if needed
    python pretrain_decoder.py --data folder --root photos --encoder-weights imagenet21k   # one GPU
    torchrun --nproc_per_node=8 pretrain_decoder.py --data imagenet21k --root imagenet21k \\
        --encoder-weights imagenet21k

Input: images without labels and, for DDeP, a trained encoder. Output in --out: last.pt, for --init of
finetune.py; log.jsonl; panel.png; metrics.json.

DDeP (Eq. 6) trains the decoder g_phi; the encoder f_theta is frozen. e (`eps`) is unit Gaussian noise:

    O4(phi | theta, gamma) = E_x E_e || g_phi(f_theta(sqrt(gamma) x + sqrt(1 - gamma) e)) - e ||^2

DeP (§2) trains both, from random weights by default.
"""
import os

import torch
from torch.utils.data import DataLoader

import common
import noise
import pretrain_encoder
from common import number, say
from data import Order, Samples, pretraining_transform, to_pixels
from datasets import UNLABELLED
from model import ENCODERS, build_unet, freeze, load_weights, read_weights, unet_of, use_batch_statistics
from pictures import picture_table
from unlabelled import pretraining_images

# "paper": §5.1. PAPER SILENT on DeP but for its epochs (--epochs 6000, Table 2) and noise: the rest as DDeP
# PAPER SILENT on weight decay and warm-up: none, but a warm-up on toy data
# PAPER SILENT on where Adam and a cosine are used (5.1): here Adam in stages 2 and 3, a cosine in all
RECIPES = {
    "shapes": dict(steps=500, batch_size=8, micro_batch=8, lr=3e-3, warmup=0.02, weight_decay=0.0,
                   image_size=64, min_area=0.5, workers=0, save_every=250),
    "paper": dict(epochs=100, batch_size=512, micro_batch=64, warmup=0.0, weight_decay=0.0, image_size=224,
                  min_area=0.08, workers=common.default_workers(), save_every=10_000),
}
TOY_ENCODER = "runs/shapes/pretrain_encoder"


def parse_arguments(argv=None):
    parser = common.Parser(__doc__)
    add, level = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--method", choices=("ddep", "dep"), default="ddep", help="dep trains the encoder too (ddep)")
    level.add_argument("--gamma", type=number(float, 0, 1), nargs="+", metavar="G",
                       help="of Eq. 5 (0.95), or two: drawn between them for each image (§4.4)")
    level.add_argument("--sigma", type=number(float, 0), help="noise of Eq. 1 instead")
    add("--target", choices=("noise", "image"), default="noise", help="what to predict (%(default)s; §3.2)")
    add("--condition", action="store_true", help="tell the decoder gamma (§4.4)")
    add("--encoder", choices=ENCODERS, help="(as in the weights, else hybrid; shapes: hybrid-small)")
    add("--encoder-weights", metavar="PATH", help="last.pt of stage 1, or a download: imagenet21k (hybrid), "
        "imagenet1k (resnet50; PAPER SILENT on which weights)")
    add("--width", type=number(float, 1 / 64), metavar="W",
        help="decoder of [1024, 512, 256, 128, 64] * W (1; shapes: 0.1875; §4.3)")
    common.add_data_flags(parser, UNLABELLED)
    add("--image-size", type=number(int, 32), help="side of the crops (%(default)s; §5.1)")
    add("--min-area", type=number(float, 0, 1),
        help="smallest share of the image in a crop; PAPER SILENT (%(default)s)")
    common.add_training_flags(parser)
    args = parser.parse(RECIPES, argv)
    if args.gamma is None and args.sigma is None:
        args.gamma = [0.95]
    if args.gamma and (len(args.gamma) > 2 or args.gamma != sorted(args.gamma)):
        parser.error(f"--gamma {args.gamma}: expected one value, or LOW HIGH")
    is_toy = args.data == "shapes" and args.encoder in (None, "hybrid-small")
    if args.method == "ddep" and args.encoder_weights is None and not is_toy:
        parser.error("DDeP needs --encoder-weights PATH, imagenet21k or imagenet1k")
    args.out = args.out or f"runs/{args.data}/pretrain_decoder_{args.method}"
    return args


def toy_encoder(args, rank):
    """The path of the toy encoder. Stage 1 trains it if it is missing."""
    path, finished = f"{TOY_ENCODER}/last.pt", f"{TOY_ENCODER}/metrics.json"
    common.require_same(finished, os.path.exists(finished))  # else only some would train it
    if not os.path.exists(finished):
        say(f"stage 1 trains an encoder first, in {TOY_ENCODER}", rank)
        pretrain_encoder.main(["--out", TOY_ENCODER, "--device", args.device, "--precision", args.precision])
        common.wait()  # the first process may still be writing
        common.require_same(path, os.path.exists(path))
    return path


@common.users_mistakes()
def denoising_network(args, source):
    """(UNet, its model_args). Its encoder gets the weights in `source`, if given."""
    with common.local_first():
        state, made_with = read_weights(source) if source else ({}, {})
    made_with.pop("width", None)  # a decoder in the file is not used
    model_args = dict(common.network_args(args, made_with, source), condition_on_gamma=args.condition)
    torch.manual_seed(args.seed)  # after stage 1, which draws too
    model = build_unet(**model_args)
    if source:
        load_weights(model, state, source, fresh=("decoder.",))
    return model, model_args


def add_noise(args, x, seeds):
    """x (B, 3, H, W) in [-1, 1] -> x~ and e of its shape, gamma (B,). seeds: one per image."""
    eps = noise.sample_noise(x.shape, seeds, x.device)
    if args.sigma is not None:
        gamma = torch.full((len(x),), noise.sigma_to_gamma(args.sigma), device=x.device)
        return noise.simple_additive_noise(x, eps, args.sigma), eps, gamma  # Eq. 1
    gamma = noise.sample_gamma(args.gamma[0], args.gamma[-1], seeds).to(x.device, non_blocking=x.is_cuda)
    return noise.scaled_additive_noise(x, eps, gamma), eps, gamma  # Eq. 5


def main():
    args = parse_arguments()
    rank, world, device, precision = common.start_processes(args)
    cuda = device.type == "cuda"

    # Data
    with common.local_first():
        images = pretraining_images(args)
    steps = common.number_of_steps(args, len(images), world)
    images.keep_out("--out", args.out)
    checkpoint, start, made_of = common.resume(args, images=str(images))

    # Model: DDeP freezes the encoder
    if checkpoint:
        model, model_args = unet_of(checkpoint), checkpoint["model_args"]
    else:
        source = args.encoder_weights
        if source is None and args.method == "ddep":
            source = toy_encoder(args, rank)
        model, model_args = denoising_network(args, source)
    if args.method == "ddep":
        freeze(model.encoder)  # before DDP sees its parameters
    elif args.encoder_weights is None:  # a new ResNet-50 has no BatchNorm statistics
        use_batch_statistics(model, sync=world > 1 and cuda)
    network = common.prepare_for_training(model, args, device, world)

    # PAPER SILENT on the betas of Adam: torch's. Its rate is set at each step
    peak_rate = args.lr
    if peak_rate is None:  # 5.1
        peak_rate = 1e-4 if model_args["width"] == 2 else 6e-5
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    common.restore(checkpoint, optimizer, scaler)

    samples = Samples(images, pretraining_transform(args.image_size, args.min_area), args.seed, replace=True)
    order = Order(len(images), args.batch_size, args.micro_batch, steps, args.seed, start, rank, world)
    batches = iter(DataLoader(samples, batch_sampler=order, num_workers=args.workers, pin_memory=cuda))
    log = common.Log(args.out, start, steps, rank)
    say(f"stage 2: {args.method}, {model_args}, {images.note}, {start} of {steps} steps done, "
        f"{world} x {device}, {precision}", rank)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        loss = 0
        for _ in range(order.parts):  # micro-batches: their gradients add up
            batch = next(batches)
            x = to_pixels(batch["image"].to(device, non_blocking=cuda))  # (B, 3, H, W) in [-1, 1]
            x_noisy, eps, gamma = add_noise(args, x, batch["noise_seed"])
            with common.autocast(precision, device):
                prediction = network(x_noisy, gamma)  # (B, 3, H, W)
            target = eps if args.target == "noise" else x
            part_loss = noise.denoising_loss(prediction, target) * len(x) / args.batch_size
            scaler.scale(part_loss * world).backward()  # DDP divides by world
            loss += part_loss.detach()
        rate = common.cosine_rate(step - 1, steps, peak_rate, args.warmup)
        optimizer.param_groups[0]["lr"] = rate
        scaler.unscale_(optimizer)  # undoes fp16's scale
        loss = common.finite_loss(step, loss, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        log.write(step, loss=loss, rate=rate)
        if rank == 0 and (step % args.save_every == 0 or step == steps):
            common.save_checkpoint(args, step, model, model_args, optimizer, scaler, made_of)
    log.close()
    if rank == 0:
        metrics, panel = look_at(args, model, samples, device)
        panel.save(f"{args.out}/panel.png")
        common.save(f"{args.out}/metrics.json", {"step": steps, **metrics})


@torch.no_grad()
def look_at(args, model, samples, device):
    """Prints how well the first 16 training images are denoised; returns (metrics, panel.png)."""
    model.eval()
    order = Order(len(samples.source), 16, 16, 1, args.seed)
    batch = next(iter(DataLoader(samples, batch_sampler=order)))
    x = to_pixels(batch["image"].to(device))
    x_noisy, eps, gamma = add_noise(args, x, batch["noise_seed"])
    target = eps if args.target == "noise" else x
    maps = model.encode(x_noisy)
    prediction = model.decoder(maps, x.shape[-2:], gamma)
    loss = noise.denoising_loss(prediction, target).item()

    # A baseline: the best multiple of the noisy image (least squares)
    factor = (target * x_noisy).sum() / x_noisy.square().sum()
    loss_of_multiple = noise.denoising_loss(factor * x_noisy, target).item()
    say(f"denoising loss {loss:.4f}; {factor:.3f} times the noisy image has {loss_of_multiple:.4f}")
    if loss >= loss_of_multiple and 0 < gamma.min() and gamma.max() < 1:
        say("WARNING: the network is no better; raise --steps or change --lr, in a new --out")

    # Each map is replaced by its mean over the images. If the loss does not rise, the decoder ignores the map
    rises = {}
    for i, stride in enumerate(model.encoder.strides):
        changed = list(maps)
        changed[i] = maps[i].mean(0, keepdim=True).expand_as(maps[i])
        without = noise.denoising_loss(model.decoder(changed, x.shape[-2:], gamma), target).item()
        rises[stride] = without / loss - 1
        say(f"the loss rises by {rises[stride]:.1%} without the map of stride {stride}")

    columns, denoised = {"image": x, "noisy image": x_noisy}, prediction
    if args.target == "noise":
        columns["predicted noise"] = prediction / 3  # [-1, 1] shows 3 standard deviations
        if args.sigma is None:  # Eq. 5 cannot be solved at gamma 0
            denoised = noise.remove_noise(x_noisy, prediction, gamma.clamp(min=1e-3))
        else:
            denoised = x_noisy - args.sigma * prediction
    columns["denoised image"] = denoised
    pictures = torch.stack([*columns.values()], dim=1)[:4].clamp(-1, 1)  # (4, columns, 3, H, W)
    pictures = ((pictures + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    metrics = {"loss": loss, "loss_of_multiple": loss_of_multiple, "rise_of_loss_without_map": rises}
    return metrics, picture_table(pictures, list(columns))


if __name__ == "__main__":
    common.run(main)
