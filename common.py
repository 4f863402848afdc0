"""What all scripts share: errors, flags, processes, checkpoints, the log."""
import argparse
import hashlib
import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import gettempdir
from textwrap import shorten

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---- Errors


class UserError(Exception):
    """A user's mistake in one line: file or flag, value, what was expected, what to do."""


@contextmanager
def users_mistakes():
    """Turn a ValueError of model.py into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


MEMORY = "lower --micro-batch, the size of crops or windows, or --width"
HINTS = {" compiler": "install g++, or drop --compile",
         "shared memory": "lower --workers, or start a container with --ipc=host",
         "out of memory": MEMORY, "allocate": MEMORY,  # on CUDA, on CPUs
         "more than 1 value per channel": "raise --micro-batch or the size of crops"}


def run(main):
    """Call main(). What a user can fix is one line and status 2; the rest keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(errors="backslashreplace")  # for odd file names
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    except (UserError, OSError, MemoryError, RuntimeError, ValueError) as error:
        # A loader worker puts a traceback before the text
        text = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        if isinstance(error, MemoryError):
            text = text or "out of memory"
        if isinstance(error, OSError):
            if "/.cache" in text:
                text += "; set TORCH_HOME to another folder"
        elif not isinstance(error, UserError):
            hint = next((HINTS[part] for part in HINTS if part in text), None)
            if hint is None:
                raise
            text = f"{text.splitlines()[0]}; {hint}"
        tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)  # not behind a bar
        sys.exit(2)
    if dist.is_initialized():  # after an error it would wait
        dist.destroy_process_group()


# ---- Flags


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, doc=None, **options):
        super().__init__(description=doc, allow_abbrev=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{shorten(message, 300)} (--help lists the flags; patterns need quotes)")

    def parse(self, recipes, argv=None):
        """The flags. Defaults: recipes[--data], or recipes["paper"]."""
        first = Parser(add_help=False)
        for flag in ("--data", "--steps", "--epochs"):
            first.add_argument(flag)
        given = first.parse_known_args(argv)[0]
        self.set_defaults(**recipes.get(given.data or "shapes", recipes["paper"]))
        if given.steps or given.epochs:  # replaces both defaults
            self.set_defaults(steps=None, epochs=None)
        return self.parse_args(argv)


def refuse(args, flags, why):
    """UserError if one of `flags` was given."""
    for flag in flags:
        value = getattr(args, flag, None)
        if value is not None:
            raise UserError(f"--{flag.replace('_', '-')} {value} has no effect {why}; drop it")


def number(kind, least, most=2 ** 63 - 1):
    """A type for argparse."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    upper = f" to {most}" if most < 2 ** 62 else ""
    convert.__name__ = f"{kind.__name__} (from {least}{upper})"  # for argparse's message
    return convert


def add_data_flags(parser, data_sets, default="shapes"):
    add = parser.add_argument
    add("--data", choices=data_sets, default=default, help="sets the other defaults (%(default)s)")
    add("--root", metavar="DIR", help="folder of the data")
    add("--images", metavar="PATTERN", help='pictures below --root, such as "imgs/*.jpg"')
    add("--workers", type=number(int, 0), help="loader processes per process (%(default)s)")


def add_training_flags(parser):
    add, length = parser.add_argument, parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), help="optimiser steps (%(default)s)")
    length.add_argument("--epochs", type=number(float, 0), help="passes over the images (%(default)s)")
    add("--batch-size", type=number(int, 1), help="images per step of all processes (%(default)s)")
    add("--lr", type=number(float, 0), help="peak (%(default)s; §5.1, stage 2: 6e-5, --width 2: 1e-4)")
    add("--warmup", type=number(float, 0, 1),
        help="share of the steps in which the rate rises; PAPER SILENT (%(default)s)")
    add("--weight-decay", type=number(float, 0), help="(%(default)s; §5.1 sweeps it in stage 3)")
    add("--seed", type=number(int, 0), default=0, help="for weights, order, crops, noise and labels (0)")
    add("--out", metavar="DIR", help="folder; the same command continues (runs/DATA/STAGE)")
    add("--micro-batch", type=number(int, 1), help="images at once in a process; a ResNet-50 without weights "
        "normalises over them (%(default)s)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints (%(default)s)")
    add("--compile", action="store_true", help="use torch.compile")
    add_device_flags(parser)


def add_device_flags(parser):
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: a GPU, if any")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on GPUs, fp16 on older ones, else fp32")


def network_args(args, made_with, source):
    """encoder, width, image_size for build_unet: of the flags, else of the weights (`made_with`)."""
    chosen = {"image_size": made_with.get("image_size")}
    for name, paper, toy in (("encoder", "hybrid", "hybrid-small"), ("width", 1.0, 3 / 16)):
        asked, made = getattr(args, name), made_with.get(name)
        if asked and made and asked != made:
            raise UserError(f"--{name} {asked}, but {source} was made with {made}; drop the flag")
        chosen[name] = asked or made or (toy if args.data == "shapes" else paper)
    return chosen


# ---- Processes and the device


def start_processes(args):
    """Join torchrun's processes, if any: (rank, their number, device, precision)."""
    if getattr(args, "workers", 0) and len(gettempdir()) > 70:  # for sockets; else workers would hang
        raise UserError(f"TMPDIR {gettempdir()}: too long for loader workers; set another, or --workers 0")
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world, device = int(os.environ.get("WORLD_SIZE", 1)), args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available() and world == 1:  # MPS takes one process
            device = "mps"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs, expected one a process; start "
                            "fewer, or use --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    device = torch.device(device)
    return rank, world, device, choose_precision(args.precision, device)


def total(tensor):
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def is_local_first():
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def local_first():
    """A machine's first process runs the block before the others."""
    if not is_local_first():
        wait()
    yield
    if is_local_first():
        wait()


def wait():
    """Wait up to a day for all processes. By default it is minutes."""
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        dist.barrier(group)
        dist.destroy_process_group(group)  # frees its threads


def require_same(path, seen):
    """UserError, in every process, if they see different things."""
    if not dist.is_initialized():
        return
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen)
    for other in everywhere:
        if other != everywhere[0]:
            raise UserError(f"{path}: a process sees {everywhere[0]}, another {other}; give all the same "
                            "data, weights and --out")


def default_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_precision(precision, device):
    """Replace "auto". On CPUs bf16 is slower."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision, device):
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def prepare_for_training(model, args, device, world):
    """What to call: the model, compiled if asked; with several processes, DDP around it."""
    model.to(device, memory_format=torch.channels_last).train()
    torch.backends.cudnn.benchmark = True  # crops have one size
    network = torch.compile(model, dynamic=False) if args.compile else model
    return DistributedDataParallel(network, gradient_as_bucket_view=True) if world > 1 else network


def progress(items=None, **options):
    """tqdm, on a machine's first process; once a minute in a file."""
    return tqdm(items, dynamic_ncols=True, disable=not is_local_first(),
                mininterval=0.1 if sys.stderr.isatty() else 60, **options)


def say(text, rank=0):
    if rank == 0 and sys.stdout:  # None where it is closed
        tqdm.write(text)
        sys.stdout.flush()


def table(rows):
    """Rows of texts with aligned columns."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- Runs


def number_of_steps(args, images, world):
    """--steps, or enough for --epochs of `images` images."""
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {world}, the processes")
    return args.steps or max(1, math.ceil(args.epochs * images / args.batch_size))


def cosine_rate(step, steps, peak, warmup):
    """Rate of `step` (from 0): a linear rise in the share `warmup` of all, then half a cosine (5.1)."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


NOT_FINITE = "is not finite"


def finite_loss(step, loss, optimizer, scaler):
    """The loss, summed over processes, as a float. UserError if it or the unscaled gradient is not finite.

    In fp16 such a gradient is no error while the scale is above 1: the scaler skips the step and halves it.
    """
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss, norm = torch.stack([total(loss), norm]).tolist()  # one wait for the GPU
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)):
        raise UserError(f"step {step}: the loss, {loss:g}, or its gradient {NOT_FINITE}; lower --lr, "
                        "raise --warmup, or use --precision fp32")
    return loss


def save(path, content):
    """Write a checkpoint or JSON (path.json). The old file stays until the new one is on disk."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            if str(path).endswith(".json"):
                file.write(json.dumps(content, indent=2).encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise UserError(f"{path}: not written ({error})") from error


def load(path):
    try:
        if zipfile.ZipFile(path).testzip():  # torch checks no sums
            raise ValueError("damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise all kinds
        reason = str(error).splitlines()[:1]
        raise UserError(f"{path}: no whole checkpoint {reason}; restore or delete it") from error


def save_checkpoint(args, step, model, model_args, optimizer, scaler, made_of, **classes):
    save(f"{args.out}/last.pt", dict(
        step=step, model=model.state_dict(), model_args=model_args, args=vars(args), made_of=made_of,
        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), **classes))


# May change on resume
FREE = {"out", "root", "workers", "save_every", "eval_every", "device", "compile", "micro_batch", "processes"}


def resume(args, **data):
    """(the checkpoint in --out or None, steps done, what the run is made of).

    UserError if flags, data or weights changed, or the last two differ between processes.
    """
    path = f"{args.out}/last.pt"
    checkpoint = load(path) if os.path.exists(path) else None
    step = checkpoint["step"] if checkpoint else 0
    weights = getattr(args, "init", None) or getattr(args, "encoder_weights", None)
    made_of = {**data, "weights": checksum_of(weights), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    require_same(path, {"step": step, **made_of})
    if checkpoint:
        before = checkpoint.get("made_of", {})
        made_of["weights"] = made_of["weights"] or before.get("weights")  # the file may be gone
        then, now = {**checkpoint["args"], **before}, {**vars(args), **made_of}
        free = FREE
        if checkpoint["model_args"]["encoder"] == "resnet50" and weights in (None, "none"):
            free = FREE - {"micro_batch", "processes"}  # it normalises over the micro-batch
        changed = [f"{key.replace('_', '-')} {then.get(key)} then, {now.get(key)} now"
                   for key in {**then, **now} if then.get(key) != now.get(key) and key not in free]
        if changed:
            raise UserError(f"{path} is from another run ({'; '.join(changed)}); pass a new --out")
    return checkpoint, step, made_of


def checksum_of(path):
    """Of a file's content, if there is one."""
    if os.path.isfile(path or ""):
        return "checksum " + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return None


def restore(checkpoint, optimizer, scaler):
    """Load a resumed run's states, then free the checkpoint's memory."""
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        elif scaler.is_enabled() and is_local_first():
            say("now fp16, with a new scaler")
        checkpoint.clear()


class Log:
    """A progress bar; on process 0 log.jsonl, cut after `start` steps, and TensorBoard, if installed."""

    def __init__(self, out, start, steps, rank):
        self.bar = progress(total=steps, initial=start, unit="step")
        self.file = self.board = None
        if rank > 0:
            return
        os.makedirs(out, exist_ok=True)
        if start == steps:
            say(f"{out} is finished; only its ending is repeated")
        if start == 0:
            Path(out, "metrics.json").unlink(missing_ok=True)  # of another run
        self.file = open(f"{out}/log.jsonl", "a+", buffering=1)
        self.file.seek(0)
        for _ in range(start):  # one line per step
            self.file.readline()
        self.file.truncate(self.file.tell())
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=start + 1)
        except Exception:  # not installed, or broken
            pass

    def write(self, step, **values):
        self.bar.set_postfix(values, refresh=False)
        self.bar.update()
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)

    def close(self):
        for part in filter(None, (self.bar, self.file, self.board)):
            part.close()
