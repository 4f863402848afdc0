"""How fast this code is on your machine.

    python benchmark.py
    python benchmark.py --only step --peers   # beside another U-Net of the same widths

Compare the lines of one run.
"""
import argparse
import os
import statistics
import tempfile
import time

import numpy as np
import torch
from PIL import Image

import common
import noise
from data import Samples, pretraining_transform, to_pixels
from model import build_unet, freeze
from pretrain_decoder import add_noise
from unlabelled import pretraining_images


def measure(title, cases, images, rounds):
    """Time each of {name: function} once a round; print images a second."""
    speeds = {name: [] for name in cases}
    for _ in range(1 + rounds):
        for name, function in cases.items():
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            speeds[name].append(images / (time.perf_counter() - started))
    print(f"\n{title}: images a second, fastest and median of {rounds} rounds")
    best = {name: max(found[1:]) for name, found in speeds.items()}  # the first round warms up
    for name, found in speeds.items():
        ratio = f" {best[name] / best['peer']:6.2f} x the peer" if "peer" in best else ""
        print(f"  {name:16} {best[name]:9.3f} {statistics.median(found[1:]):9.3f}{ratio}", flush=True)


def training_step(network, batch, args, device, precision):
    """A step of stage 2, always on the same pictures."""
    freeze(network.encoder)
    network = common.prepare_for_training(network, args, device, world=1)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8)
    level = argparse.Namespace(gamma=[0.95], sigma=None)

    def step():
        optimizer.zero_grad()
        x_noisy, eps, _ = add_noise(level, to_pixels(images.to(device)), range(batch))
        with common.autocast(precision, device):
            prediction = network(x_noisy)
        noise.denoising_loss(prediction, eps).backward()
        optimizer.step()
    return step


def loading(root):
    """Read and crop 64 JPEGs of 500x375, as stage 2 does."""
    os.makedirs(f"{root}/photos")
    random = np.random.default_rng(1)
    for i in range(64):
        blocks = random.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((500, 375)).save(f"{root}/photos/{i}.jpg", quality=90)
    torch.hub.set_dir(f"{root}/hub")  # for the list of pictures
    source = pretraining_images(argparse.Namespace(data="folder", root=root, images="photos/*"))
    samples = Samples(source, pretraining_transform(224))
    return {"stage 2": lambda: [samples[0, i] for i in range(64)]}


def main():
    parser, groups = common.Parser(__doc__), ("step", "data")
    add = parser.add_argument
    add("--only", choices=groups, nargs="+", default=groups, help="groups (all)")
    add("--rounds", type=common.number(int, 1), default=5, help="of each case (%(default)s)")
    add("--peers", action="store_true", help="time segmentation_models_pytorch, too")
    add("--compile", action="store_true", help="use torch.compile")
    common.add_device_flags(parser)
    args = parser.parse_args()
    *_, device, precision = common.start_processes(args)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%F')}")
    for batch in (2, 8, *[64] * (device.type == "cuda")) if "step" in args.only else ():
        networks = {name: build_unet(name) for name in ("resnet50", "hybrid")}
        if args.peers:
            from segmentation_models_pytorch import Unet
            networks["peer"] = Unet("resnet50", encoder_weights=None, classes=3,
                                    decoder_channels=(1024, 512, 256, 128, 64))
        cases = {name: training_step(network, batch, args, device, precision)
                 for name, network in networks.items()}
        measure(f"Stage 2, 224 px, x1, batch {batch}", cases, batch, args.rounds)
    if "data" in args.only:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as root:
            measure("Reading, one core", loading(root), 64, args.rounds)


if __name__ == "__main__":
    common.run(main)
