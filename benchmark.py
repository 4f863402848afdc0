"""How fast this code is on your machine, beside what people would use instead.

    python benchmark.py                                        # ten minutes on two cores
    python benchmark.py --quick                                # two minutes
    python benchmark.py --only step data --peers --json speed.json

Within a group the cases take turns, round after round, so that a machine that is slow for a while is slow for
all of them; a line shows the fastest and the median round. Compare lines of one run, by their ratios.
--peers: segmentation_models_pytorch's Unet("resnet50") of the same widths, torchvision's usual pipeline, and
windows and mirror images one by one.
"""
import ctypes
import io
import itertools
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

import launch
import noise
from data import Batches, ImageIndex, Samples, load, pretraining_transform, segmentation_transform, to_pixels
from datasets import pretraining_images, segmentation_pairs
from evaluate import predict, window_starts
from launch import InputError, say
from model import build_unet, freeze
from run_folder import load_checkpoint, save, write_json

GROUPS = ("ceiling", "step", "small", "finetune", "evaluate", "data", "start", "checkpoint")
WIDTHS = (1024, 512, 256, 128, 64)


def parse_arguments(argv=None):
    parser = launch.Parser(__doc__)
    add = parser.add_argument
    add("--only", choices=GROUPS, nargs="+", metavar="GROUP",
        help=f"of {', '.join(GROUPS)} (default: all; quick: without finetune)")
    add("--quick", action="store_true", help="two minutes: fewer and smaller cases, two rounds")
    add("--rounds", type=launch.positive_int, help="how often each case is timed (default: 5; quick: 2)")
    add("--peers", action="store_true", help="time other libraries too, where they are installed")
    add("--json", metavar="FILE", help="write all figures there, too")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as in the stages")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.only = args.only or [group for group in GROUPS if group != "finetune" or not args.quick]
    return args


# ---------------------------------------- Timing


def measure(cases, rounds, device):
    """Time every case once a round, in turns, after one call to warm up.

    cases: {name: (function, units that a call does)}. Returns {name: [seconds a unit, one for each round]}.
    """
    seconds = {name: [] for name in cases}
    for number in range(-1, rounds):
        for name, (function, units) in cases.items():
            synchronise(device)
            started = time.perf_counter()
            function()
            synchronise(device)
            if number >= 0:
                seconds[name].append((time.perf_counter() - started) / units)
    return seconds


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(function, device):
    """GB that a call adds to what the process holds, at most; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already is not held
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before = _status("VmRSS")
        function()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return None


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def report(title, unit, seconds, flops=(), ceiling=None, memory=()):
    """Print a group, return its rows. flops, memory: {name: of a unit, GB}. Ratios: to the fastest peer."""
    peers = [min(times) for name, times in seconds.items() if name.startswith("peer")]
    rows = []
    say(f"\n{title}: {unit}s a second, fastest and median round")
    for name, times in seconds.items():
        row = {"group": title, "unit": unit, "name": name, "best": 1 / min(times),
               "median": 1 / statistics.median(times)}
        line = f"  {name:46} {row['best']:9.3f} {row['median']:9.3f}"
        if peers:
            row["ratio_to_peer"] = min(peers) / min(times)
            line += f"  {row['ratio_to_peer']:5.2f} x the peer"
        if name in flops:
            row["gflops"] = flops[name] / min(times) / 1e9
            line += f"  {row['gflops']:7.1f} GFLOP/s"
            if ceiling:
                row["of_ceiling"] = row["gflops"] / ceiling
                line += f", {row['of_ceiling']:.0%} of the ceiling"
        if name in memory and memory[name] is not None:
            row["memory_gb"] = memory[name]
            line += f", {row['memory_gb']:.2f} GB"
        rows.append(row)
        say(line)
    return rows


# ---------------------------------------- What is timed


def ceiling(args, device):
    """{dtype: GFLOP/s} of the fastest of the decoder's own 3x3 convolutions, forward."""
    dtypes = {"fp32": torch.float32}
    if device.type != "cpu" or not args.quick:
        dtypes["bf16"] = torch.bfloat16
    batch, best, seconds, flops = (64 if device.type == "cuda" else 4), {}, {}, {}
    for dtype_name, dtype in dtypes.items():
        cases = {}
        for channels, side in zip(WIDTHS, (14, 28, 56, 112, 224)):
            x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
            name = f"{dtype_name}, {channels} channels, {side} x {side}"
            cases[name] = (lambda x=x, weight=weight: F.conv2d(x, weight, padding=1), batch)
            flops[name] = 2 * 9 * channels ** 2 * side ** 2
        times = measure(cases, args.rounds, device)
        best[dtype_name] = max(flops[name] / min(times[name]) / 1e9 for name in times)
        seconds.update(times)
    return best, seconds, flops


def training_step(network, batch, size, device, precision, classes=None, loader=None):
    """One step as stage 2 takes it, with a frozen encoder; with `classes`, as stage 3. A function.

    loader: of the pictures, or None for the same ones in every step.
    """
    layout = getattr(network, "layout", torch.channels_last)
    network.to(device, memory_format=layout).train()
    same = {"image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)}
    batches = itertools.repeat(same) if loader is None else iter(loader)
    mask = torch.randint(classes or 1, (batch, size, size), device=device)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-5, fused=device.type in ("cpu", "cuda"))

    def step():
        optimizer.zero_grad()
        x = to_pixels(next(batches)["image"].to(device, non_blocking=True)).contiguous(memory_format=layout)
        with launch.autocast(precision, device):
            if classes is None:
                eps = noise.sample_noise(x.shape, range(batch), device)
                with torch.no_grad():
                    maps = network.encode(noise.scaled_additive_noise(x, eps, 0.95))
                loss = noise.denoising_loss(network.decoder(maps, x.shape[-2:]), eps)
            else:
                loss = F.cross_entropy(network(x).float(), mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        optimizer.step()
    return step


def pretraining(batch, peers, device, precision, photos):
    """Group "step": (cases, FLOPs, memory) of both networks of the paper, width 1, with a frozen encoder.

    photos: a folder; the last case takes its pictures from there, through the loader and its workers.
    """
    networks = {f"{encoder}, batch {batch}": build_unet(encoder) for encoder in ("resnet50", "hybrid")}
    if peers:
        networks |= {f"peer: smp resnet50, channels last, batch {batch}": PeerUnet(torch.channels_last),
                     f"peer: smp resnet50, NCHW, batch {batch}": PeerUnet(torch.contiguous_format)}
    for network in networks.values():
        freeze(network.encoder)
    steps = {name: training_step(network, batch, 224, device, precision) for name, network in networks.items()}
    images = pretraining_images("folder", photos)
    loader = load(Samples(images, pretraining_transform(224)), Batches(len(images), batch, 10 ** 6),
                  launch.default_workers(), pin_memory=device.type == "cuda")
    steps[f"hybrid, batch {batch}, with the loader"] = training_step(
        networks[f"hybrid, batch {batch}"], batch, 224, device, precision, loader=loader)
    return profile(steps, batch, device)


def profile(steps, batch, device):
    """({name: (step, batch)}, {name: FLOPs of an image}, {name: GB}) of {name: step}."""
    flops, memory = {}, {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        flops[name], memory[name] = counter.get_total_flops() / batch, peak_memory(step, device)
    return {name: (step, batch) for name, step in steps.items()}, flops, memory


class PeerUnet(torch.nn.Module):
    """segmentation_models_pytorch's UNet, same widths, with the interface of ours."""

    def __init__(self, layout):
        from segmentation_models_pytorch import Unet
        super().__init__()
        self.layout = layout
        self.net = Unet("resnet50", encoder_weights=None, classes=3, decoder_channels=WIDTHS)
        self.encoder = self.net.encoder
        self.decoder = lambda maps, size: self.net.segmentation_head(self.net.decoder(maps))

    def encode(self, x):
        return self.encoder(x)


def small_steps(device, precision):
    """Group "small": the steps of the embedded experiment."""
    denoise, segment = build_unet("hybrid-small", 1 / 4), build_unet("hybrid-small", 1 / 4, 7)
    freeze(denoise.encoder)
    return {"stage 2, 64 x 64, batch 16": (training_step(denoise, 16, 64, device, precision), 16),
            "stage 3, 64 x 64, batch 16": (training_step(segment, 16, 64, device, precision, 7), 16)}


def fine_tuning(device, precision):
    """Group "finetune": 512 x 512 pictures, 59 classes, everything trains."""
    batch = 8 if device.type == "cuda" else 1
    return profile({f"{encoder}, 512 x 512, batch {batch}": training_step(
        build_unet(encoder, 1, 59), batch, 512, device, precision, 59) for encoder in ("resnet50", "hybrid")},
        batch, device)


def evaluation(peers, device, precision):
    """Group "evaluate": predict(), beside a loop that keeps whole logits. On a CPU with the small network."""
    network = build_unet("hybrid", 1, 19) if device.type == "cuda" else build_unet("hybrid-small", 1 / 4, 19)
    network.to(device, memory_format=torch.channels_last).eval()
    street, photo = (torch.rand(1, 3, *size, device=device) * 2 - 1 for size in ((1024, 2048), (375, 500)))
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

    @torch.inference_mode()
    def run(function, *inputs, **how):
        with launch.autocast(precision, device):
            return function(network, *inputs, **how)

    groups = [{"1024 x 2048, two windows, flip": lambda: run(predict, street, window=1024, flip=True),
               "peer: one by one": lambda: run(one_by_one, street, [1.0], 1024)},
              {"375 x 500, six scales, flip": lambda: run(predict, photo, scales=scales, flip=True, window=512),
               "peer: one by one": lambda: run(one_by_one, photo, scales, 512)}]
    for cases in groups:
        cases = {name: (case, 1) for name, case in cases.items() if peers or not name.startswith("peer")}
        yield cases, {name: peak_memory(case, device) for name, (case, _) in cases.items()}


def one_by_one(network, x, scales, window):
    """What one writes first, to the same result: scales, mirrors and windows in turn, all logits kept."""
    views = []
    for scale in scales:
        scaled = x
        if scale != 1:
            size = [round(scale * side) for side in x.shape[2:]]
            scaled = F.interpolate(x, size, mode="bilinear", antialias=True)
        for mirrored in (False, True):
            image, total, count = scaled.flip(3) if mirrored else scaled, 0, 0
            for top in window_starts(image.shape[2], window, window):
                for left in window_starts(image.shape[3], window, window):
                    logits = network(image[:, :, top:top + window, left:left + window]).float()
                    place = (left, image.shape[3] - left - logits.shape[3], top,
                             image.shape[2] - top - logits.shape[2])
                    total, count = total + F.pad(logits, place), count + F.pad(torch.ones_like(logits), place)
            logits = total / count
            logits = logits.flip(3) if mirrored else logits
            views.append(F.interpolate(logits, x.shape[2:], mode="bilinear") if scale != 1 else logits)
    return torch.stack(views).mean(0)


def loading(args, folder):
    """Group "data", on one core: (title, cases) of pretraining's pictures and of fine-tuning's."""
    random, photos = np.random.default_rng(0), write_photos(folder)
    city, tars, count = f"{folder}/city", f"{folder}/tars", len(os.listdir(f"{photos}/n00000001"))
    for path in (f"{city}/images/train", f"{city}/masks/train", tars):
        os.makedirs(path)
    with tarfile.open(f"{tars}/n00000001.tar", "w") as tar:
        for i in range(count):
            tar.add(f"{photos}/n00000001/{i}.jpg", f"n00000001_{i}.JPEG")
    for i in range(4):
        picture(random, (2048, 1024)).save(f"{city}/images/train/{i}.png")
        mask = Image.fromarray(random.integers(0, 19, (32, 64), dtype=np.uint8)).resize((2048, 1024), 0)
        mask.save(f"{city}/masks/train/{i}.png")

    def epoch(source, transform, batch_size):
        batches = Batches(len(source), batch_size, len(source) // batch_size)
        loader = load(Samples(source, transform), batches)
        return lambda: sum(1 for _ in loader), len(source)

    cases = {"from a folder": epoch(pretraining_images("folder", photos), pretraining_transform(224), 16),
             "from a .tar": epoch(pretraining_images("imagenet21k", tars), pretraining_transform(224), 16)}
    if args.peers:
        usual = transforms.Compose([
            transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3)])
        loader = DataLoader(ImageFolder(photos, usual), 16, shuffle=True)
        cases["peer: torchvision's ImageFolder, usual transforms"] = (lambda: sum(1 for _ in loader), count)
    yield "JPEGs of 500 x 375, one core", cases
    pairs, _ = segmentation_pairs("folder", city, "train", 19)
    yield "PNGs of 2048 x 1024 with masks, one core", {
        "crops of 1024": epoch(pairs, segmentation_transform(1024), 2)}


def write_photos(folder):
    """The folder of 64 JPEGs, written once."""
    photos, random = os.path.join(folder, "photos"), np.random.default_rng(1)
    if not os.path.isdir(photos):
        os.makedirs(f"{photos}/n00000001")
        for i in range(64):
            picture(random, (500, 375)).save(f"{photos}/n00000001/{i}.jpg", quality=90)
    return photos


def picture(random, size):
    """Noise on a smooth ground, which a JPEG stores as a photograph's size."""
    ground = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    noisy = np.asarray(ground) + random.normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def start_up(args, folder):
    """Group "start": a .tar of many small images is listed; is found listed; its first epoch is shuffled."""
    count, entry = (20_000 if args.quick else 500_000), tarfile.TarInfo()
    root, entry.size = os.path.join(folder, "many"), 1
    os.makedirs(root)
    with tarfile.open(os.path.join(root, "n00000001.tar"), "w") as tar:
        for i in range(count):
            entry.name = f"n00000001_{i}.JPEG"
            tar.addfile(entry, io.BytesIO(b"x"))

    def list_anew():
        with tempfile.TemporaryDirectory() as cache:
            ImageIndex.of_synsets(root, cache)

    return {"a .tar, listed for the first time": (list_anew, count / 1e6),
            "... found listed": (lambda: ImageIndex.of_synsets(root), count / 1e6),
            "... its first batch": (lambda: next(iter(Batches(count, 512, 1))), count / 1e6)}


def checkpoints(folder):
    """Group "checkpoint": last.pt of hybrid x1 with Adam's state, to the disk and back."""
    network = build_unet("hybrid")
    moments = {name: torch.zeros(2, *value.shape) for name, value in network.decoder.state_dict().items()}
    content = {"model": network.state_dict(), "optimizer": moments, "model_args": {}, "args": {}}
    path = os.path.join(folder, "last.pt")
    return {"written, flushed to the disk": (lambda: save(path, content), 1),
            "read, with its checksums": (lambda: load_checkpoint(path), 1)}


def main():
    args = parse_arguments()
    device = launch.start_processes(args.device).device
    precision = launch.resolve_precision(args.precision, device)
    if args.peers and "step" in args.only:
        try:
            import segmentation_models_pytorch  # noqa: F401
        except ImportError:
            raise InputError("--peers: pip install segmentation-models-pytorch, or pass --only without "
                             "step") from None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}, "
               f"{time.strftime('%Y-%m-%d')}")
    rows, highest = [], None
    say(f"{machine}; {args.rounds} rounds")
    if "ceiling" in args.only:
        best, seconds, flops = ceiling(args, device)
        highest = best.get(precision)
        rows += report("The ceiling, the decoder's own convolutions", "image", seconds, flops)
    if "small" in args.only:
        cases = small_steps(device, precision)
        rows += report("The embedded experiment", "image", measure(cases, args.rounds, device))
    if "finetune" in args.only:
        cases, flops, memory = fine_tuning(device, precision)
        rows += report("Fine-tuning, width 1", "image", measure(cases, args.rounds, device), flops, highest,
                       memory)
    if "evaluate" in args.only:
        for cases, memory in evaluation(args.peers, device, precision):
            rows += report("Evaluation", "image", measure(cases, args.rounds, device), memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        if "step" in args.only:
            for batch in [2] if args.quick else [2, 8] + ([64] if device.type == "cuda" else []):
                cases, flops, memory = pretraining(batch, args.peers, device, precision, write_photos(folder))
                rows += report("Decoder pretraining, 224 x 224, width 1", "image",
                               measure(cases, args.rounds, device), flops, highest, memory)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if "data" in args.only:
            for title, cases in loading(args, folder):
                rows += report(title, "image", measure(cases, args.rounds, device))
        torch.set_num_threads(threads)
        if "start" in args.only:
            rows += report("Start-up", "million image", measure(start_up(args, folder), 2, device))
        if "checkpoint" in args.only:
            rows += report("A checkpoint of hybrid x1", "checkpoint", measure(checkpoints(folder), 2, device))
    if args.json:
        write_json(args.json, {"machine": machine, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    launch.run_script(main)
