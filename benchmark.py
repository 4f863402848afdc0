"""How fast this code is on your machine, beside what people would use instead.

    python benchmark.py                              # some minutes on two cores
    python benchmark.py --only step data --peers --json speed.json

Within a group the cases take turns, round after round, so that a machine that is slow for a while is slow
for all of them; a line shows the fastest and the median round. Compare lines of one run, by their ratios.
--peers: segmentation_models_pytorch's Unet("resnet50") of the same widths, and torchvision's usual pipeline.
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

GROUPS = ("step", "toy", "evaluate", "data")


def measure(title, cases, rounds, device):
    """Time each of {name: (function, images it takes)} once a round, print a line each, return their rows."""
    def run(function):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rows = {}
    for name, (function, images) in cases.items():  # once to warm up, counted
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            run(function)
        rows[name] = {"group": title, "name": name, "gflop": counter.get_total_flops() / images / 1e9}
        if device.type == "cuda":
            rows[name]["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    turns = [{name: images / run(function) for name, (function, images) in cases.items()}
             for _ in range(rounds)]
    print(f"\n{title}: images a second, fastest and median round")
    peer = [max(turn[name] for turn in turns) for name in cases if name.startswith("peer")]
    for name, row in rows.items():
        speeds = [turn[name] for turn in turns]
        row.update(fastest=max(speeds), median=statistics.median(speeds), gflops=row["gflop"] * max(speeds))
        line = f"  {name:32} {row['fastest']:9.3f} {row['median']:9.3f} {row['gflops']:9.1f} GFLOP/s"
        if peer:
            row["ratio"] = max(speeds) / max(peer)
            line += f" {row['ratio']:6.2f} x the peer"
        print(line + (f" {row['memory_gb']:6.1f} GB" if "memory_gb" in row else ""), flush=True)
    return list(rows.values())


def training_step(network, batch, size, device, precision):
    """(one step of stage 2 on a frozen encoder, always on the same pictures; how many)."""
    freeze(network.encoder)
    network.to(device, memory_format=torch.channels_last).train()
    args = argparse.Namespace(gamma=[0.95], sigma=None)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True)
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
    return Unet("resnet50", encoder_weights=None, classes=3, decoder_channels=(1024, 512, 256, 128, 64))


def evaluation(device, precision):
    """Cityscapes' protocol on one picture; on a CPU with the small network."""
    network = build_unet("hybrid", 1, 19) if device.type == "cuda" else build_unet("hybrid-small", 1 / 4, 19)
    network.to(device, memory_format=torch.channels_last).eval()
    x = torch.rand(1, 3, 1024, 2048, device=device) * 2 - 1

    @torch.inference_mode()
    def run():
        with common.autocast(precision, device):
            predict(network, x, flip=True, window=1024)
    return run, 1


def loading(folder, peers, count=64):
    """JPEGs of 500x375, crop and flip, on one core, from a folder and from a .tar."""
    random, photos = np.random.default_rng(1), f"{folder}/photos/n00000001"
    os.makedirs(photos)
    os.makedirs(f"{folder}/tars")
    for i in range(count):  # noise on a smooth ground, which a JPEG stores as a photograph's size
        ground = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(ground) + random.normal(0, 12, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(f"{photos}/{i}.jpg", quality=90)
    for half in (0, 1):  # two classes
        with tarfile.open(f"{folder}/tars/n0000000{half}.tar", "w") as tar:
            for i in range(half, count, 2):
                tar.add(f"{photos}/{i}.jpg", f"{i}.jpg")
    torch.hub.set_dir(f"{folder}/hub")  # where the index of the .tar files goes
    loaders = {}
    for name, data, root in (("from a folder", "folder", "photos"), ("from a .tar", "imagenet21k", "tars")):
        source = pretraining_images(argparse.Namespace(data=data, root=f"{folder}/{root}", images=None))
        loaders[name] = DataLoader(Samples(source, pretraining_transform(224)),
                                   batch_sampler=Order(count, 16, 16, count // 16))
    if peers:
        usual = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
        loaders["peer: torchvision's ImageFolder"] = DataLoader(ImageFolder(f"{folder}/photos", usual), 16)
    return {name: (lambda loader=loader: list(loader), count) for name, loader in loaders.items()}


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
    machine = (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
               f"{time.strftime('%Y-%m-%d')}")
    print(machine)
    groups = {}  # title: what makes its cases
    if "step" in args.only:
        for batch in (2, 8, 64) if device.type == "cuda" else (2, 8):
            networks = {"resnet50": build_unet("resnet50"), "hybrid": build_unet("hybrid")}
            if args.peers:
                networks["peer: smp, resnet50"] = peer_unet()
            for network in networks.values() if args.compile else ():
                network.compile()
            groups[f"Stage 2, 224 px, x1, batch {batch}"] = {
                name: training_step(network, batch, 224, device, args.precision)
                for name, network in networks.items()}
    if "toy" in args.only:
        toy = build_unet("hybrid-small", 1 / 4)
        groups["Stage 2 on toy data"] = {"64 px, batch 8": training_step(toy, 8, 64, device, args.precision)}
    if "evaluate" in args.only:
        groups["Evaluation"] = {"1024 x 2048, windows, flip": evaluation(device, args.precision)}
    rows = [row for title, cases in groups.items() for row in measure(title, cases, args.rounds, device)]
    if "data" in args.only:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows += measure("Loader, one core", loading(folder, args.peers), args.rounds, device)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    common.run(main)
