"""How fast this code is on your machine, beside what people would use instead.

    python benchmark.py                              # some minutes on two cores
    python benchmark.py --only step data --peers --json speed.json

Within a group the cases take turns, round after round, so that a machine that is slow for a while is slow for all of
them; a line shows the fastest and the median round. Compare lines of one run, by their ratios. --peers:
segmentation_models_pytorch's Unet("resnet50") of the same widths, and torchvision's usual pipeline.
"""
import argparse
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import common
import noise
from data import Order, Samples, pretraining_transform, to_pixels
from datasets import pretraining_images
from evaluate import predict
from model import build_unet, freeze
from pretrain_decoder import add_noise

GROUPS = ("ceiling", "step", "toy", "evaluate", "data")
WIDTHS = (1024, 512, 256, 128, 64)


def measure(title, cases, rounds, device, ceiling=None):
    """Print a line a case: {name: (function, images it takes)}, each timed once a round; returns their rows."""
    seconds, rows = {name: [] for name in cases}, []
    flops, memory = {}, {}
    for name, (function, _) in cases.items():  # once to warm up, counted
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            function()
        flops[name] = counter.get_total_flops()
        memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0
    for _ in range(rounds):
        for name, (function, _) in cases.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    print(f"\n{title}: images a second, fastest and median round")
    peer = min((min(seconds[name]) / cases[name][1] for name in cases if name.startswith("peer")), default=None)
    for name, (_, images) in cases.items():
        fastest = min(seconds[name])
        row = {"group": title, "name": name, "fastest": images / fastest,
               "median": images / statistics.median(seconds[name]), "gflops": flops[name] / fastest / 1e9}
        line = f"  {name:44} {row['fastest']:9.3f} {row['median']:9.3f} {row['gflops']:9.1f} GFLOP/s"
        if peer:
            row["ratio"] = peer * row["fastest"]
            line += f" {row['ratio']:6.2f} x the peer"
        if ceiling:
            line += f" {row['gflops'] / ceiling:5.0%} of the ceiling"
        if memory[name]:
            row["memory_gb"] = memory[name]
            line += f" {memory[name]:6.1f} GB"
        print(line, flush=True)
        rows.append(row)
    return rows


def training_step(network, batch, size, device, precision):
    """A function: one step of stage 2 on a frozen encoder, on the same pictures each time."""
    freeze(network.encoder)
    network.to(device, memory_format=torch.channels_last).train()
    args = argparse.Namespace(gamma=[0.95], sigma=None)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-5)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)

    def step():
        optimizer.zero_grad()
        x_noisy, eps, _ = add_noise(args, to_pixels(images.to(device)), range(batch))
        with common.autocast(precision, device):
            prediction = network(x_noisy)
        noise.denoising_loss(prediction, eps).backward()
        optimizer.step()
    return step, batch


def peer_unet():
    from segmentation_models_pytorch import Unet
    return Unet("resnet50", encoder_weights=None, classes=3, decoder_channels=WIDTHS)


def ceiling(device, precision):
    """The decoder's own 3x3 convolutions, forward: {name: (function, images)}."""
    cases, batch = {}, 64 if device.type == "cuda" else 4
    for channels, side in zip(WIDTHS, (14, 28, 56, 112, 224)):
        x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)

        def convolve(x=x, weight=weight):
            with torch.no_grad(), common.autocast(precision, device):
                F.conv2d(x, weight, padding=1)
        cases[f"{channels} channels, {side} x {side}"] = (convolve, batch)
    return cases


def evaluation(device, precision):
    """Cityscapes' protocol on one picture; on a CPU with the small network."""
    network = build_unet("hybrid", 1, 19) if device.type == "cuda" else build_unet("hybrid-small", 1 / 4, 19)
    network.to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(1, 3, 1024, 2048, device=device) * 2 - 1

    @torch.inference_mode()
    def run():
        with common.autocast(precision, device):
            predict(network, x, flip=True, window=1024)
    return {"1024 x 2048, two windows, flip": (run, 1)}


def loading(folder, peers):
    """JPEGs of 500x375, crop and flip, on one core, from a folder and from a .tar."""
    random, count = np.random.default_rng(1), 64
    os.makedirs(f"{folder}/photos/n00000001")
    for i in range(count):  # noise on a smooth ground, which a JPEG stores as a photograph's size
        ground = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(ground) + random.normal(0, 12, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(f"{folder}/photos/n00000001/{i}.jpg", quality=90)
    for name in ("n00000001", "n00000002"):
        os.makedirs(f"{folder}/tars", exist_ok=True)
        with tarfile.open(f"{folder}/tars/{name}.tar", "w") as tar:
            tar.add(f"{folder}/photos/n00000001", ".")
    torch.hub.set_dir(f"{folder}/hub")  # where the index of the .tar files goes
    cases = {}
    for name, data, root in (("from a folder", "folder", "photos"), ("from a .tar", "imagenet21k", "tars")):
        source = pretraining_images(argparse.Namespace(data=data, root=f"{folder}/{root}", images=None))
        loader = DataLoader(Samples(source, pretraining_transform(224)),
                            batch_sampler=Order(len(source), 16, count // 16))
        cases[name] = (lambda loader=loader: sum(1 for _ in loader), count)
    if peers:
        usual = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
        loader = DataLoader(ImageFolder(f"{folder}/photos", usual), 16, shuffle=True)
        cases["peer: torchvision's ImageFolder"] = (lambda: sum(1 for _ in loader), count)
    return cases


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS, help="groups (all)")
    parser.add_argument("--rounds", type=common.number(int, 1), default=5, help="of each case (%(default)s)")
    parser.add_argument("--peers", action="store_true", help="time other libraries, too")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    common.add_device_flags(parser)
    args = parser.parse_args()
    _, _, device = common.start_processes(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    rows, highest = [], None
    print(machine)
    if "ceiling" in args.only:
        rows += measure("Ceiling: the decoder's convolutions", ceiling(device, args.precision), args.rounds, device)
        highest = max(row["gflops"] for row in rows)
    for batch in ((2, 8, 64) if device.type == "cuda" else (2, 8)) if "step" in args.only else ():
        networks = {"resnet50": build_unet("resnet50"), "hybrid": build_unet("hybrid"),
                    **({"peer: smp, resnet50": peer_unet()} if args.peers else {})}
        for network in networks.values():
            network.compile() if args.compile else None
        cases = {name: training_step(network, batch, 224, device, args.precision) for name, network in networks.items()}
        rows += measure(f"Stage 2, 224 px, x1, batch {batch}", cases, args.rounds, device, highest)
    if "toy" in args.only:
        step = training_step(build_unet("hybrid-small", 1 / 4), 8, 64, device, args.precision)
        rows += measure("Stage 2 on toy data", {"64 px, batch 8": step}, args.rounds, device)
    if "evaluate" in args.only:
        rows += measure("Evaluation", evaluation(device, args.precision), args.rounds, device)
    if "data" in args.only:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows += measure("Loader, one core", loading(folder, args.peers), args.rounds, device)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    common.run(main)
