"""What all scripts share: one-line errors, flags, processes, checkpoints, the log. Nothing of the method."""
import argparse
import json
import math
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

# ---------------------------------------- Errors


class UserError(Exception):
    """A user's mistake, in one line: the file or flag, its value, what was expected, what to do."""


@contextmanager
def users_mistakes():
    """A ValueError inside, as of model.py for weights that do not fit, is a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


LESS = "lower --micro-batch, the size of crops or windows, or --width"
COMPILER = "install one, such as g++, or drop --compile"
HINTS = {"C++ compiler": COMPILER, "C compiler": COMPILER,
         "shared memory": "pass a lower --workers, or start a container with --ipc=host",
         "out of memory": LESS, "allocate": LESS,  # what torch and NumPy say on CUDA and on CPUs
         "more than 1 value per channel": "raise --micro-batch or the size of crops"}  # BatchNorm


def run(main):
    """Call main(). What a user can mend is one line on stderr and status 2; all else keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the console cannot print ends no run
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError, ValueError) as error:
        # From a loader worker the text begins with a traceback: the last part is ours
        text = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        text = text or ("out of memory" if isinstance(error, MemoryError) else "")
        if not isinstance(error, (UserError, OSError)):
            hint = next((HINTS[part] for part in HINTS if part in text), None)
            if hint is None:
                raise
            text = f"{text.splitlines()[0]}; {hint}"
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():  # after an error it would wait for the others
        dist.destroy_process_group()


# ---------------------------------------- Flags


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, without abbreviations, with the script's docstring as its help."""

    def __init__(self, doc=None, **options):
        super().__init__(description=doc, allow_abbrev=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def parse(self, recipes, argv=None):
        """The flags, with the defaults of the chosen --data: recipes[data], else recipes["paper"]."""
        first = Parser(add_help=False)
        for flag in ("--data", "--steps", "--epochs"):
            first.add_argument(flag)
        given = first.parse_known_args(argv)[0]
        recipe = recipes.get(given.data or "shapes", recipes["paper"])
        replaced = ("steps", "epochs") if given.steps or given.epochs else ()  # the one replaces the other
        self.set_defaults(**{name: value for name, value in recipe.items() if name not in replaced})
        return self.parse_args(argv)


def refuse(args, flags, why):
    """UserError for the first of `flags` that was given: it would have no effect."""
    for flag in flags:
        if getattr(args, flag, None) is not None:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} has no effect {why}; drop it")


def number(kind, least, most=2 ** 63 - 1):
    """A type for argparse: an int or float from `least` to `most`."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} from {least} to {most}"  # for argparse's message
    return convert


def add_data_flags(group, data_sets, default="shapes"):
    add = group.add_argument
    add("--data", choices=data_sets, default=default, help="it decides the other defaults (%(default)s)")
    add("--root", metavar="DIR", help="folder of the data; shapes has none")
    add("--images", metavar="PATTERN", help='pictures below --root, such as "imgs/*.jpg" (see README)')
    add("--workers", type=number(int, 0), help="loader processes per process (%(default)s)")


def add_optimisation_flags(parser):
    group = parser.add_argument_group("optimisation")
    add, length = group.add_argument, group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1), help="optimiser steps (%(default)s)")
    length.add_argument("--epochs", type=number(float, 0), help="passes over the images (%(default)s)")
    add("--batch-size", type=number(int, 1), help="images per step, over all processes (%(default)s)")
    add("--lr", type=number(float, 0), help="peak rate (%(default)s; stage 2: 6e-5, for x2 1e-4; §5.1)")
    add("--warmup", type=number(float, 0, 1),
        help="share of the steps in which the rate rises, before the cosine; PAPER SILENT (%(default)s)")
    add("--weight-decay", type=number(float, 0), help="(%(default)s; stage 3: §5.1)")
    add("--seed", type=number(int, 0), default=0, help="of weights, order, crops, noise, labels (0)")


def add_machine_flags(parser):
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--out", metavar="DIR", help="folder of the run, which the same command continues (runs/DATA/STAGE)")
    add("--micro-batch", type=number(int, 1),
        help="images in one process's network at once: lower it to save memory; a ResNet-50 that trains from "
             "nothing normalises over them (%(default)s)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints (%(default)s)")
    add_device_flags(group)


def add_device_flags(group):
    add = group.add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="of autocast; auto: bf16 on CUDA, else fp32")
    add("--compile", action="store_true", help="torch.compile the network")


def network_args(args, made_with, source):
    """encoder, width and image_size for build_unet: as the flags ask or as the weights in `source` were made,
    which must agree, else the paper's; those of a small network for the toy data."""
    toy = args.data == "shapes"
    usual = {"encoder": "hybrid-small" if toy else "hybrid", "width": 0.25 if toy else 1.0}
    for name in usual:
        asked, made = getattr(args, name), made_with.get(name)
        if None not in (asked, made) and asked != made:
            raise UserError(f"--{name} {asked}, but {source} was made with {made}; drop the flag")
        usual[name] = asked or made or usual[name]
    return {**usual, "image_size": made_with.get("image_size")}


# ---------------------------------------- Processes and the device


def start_processes(device="auto"):
    """Join torchrun's group, if there is one: (rank, world, this process's device)."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("srun started several tasks, each of which would train alone; start one a machine, and "
                        "in it torchrun")
    rank, world, local = (int(os.environ.get(name, default)) for name, default
                          in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world == 1  # MPS has no collectives
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--device cuda: {torch.cuda.device_count()} GPUs, expected one a process; start "
                            "fewer processes, or pass --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device)


def total(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def is_local_first():
    """Whether this is the first process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def local_first():
    """One process of each machine runs the block before the others: it makes a file, they find it."""
    if not dist.is_initialized():
        yield
        return
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # training's gives up after minutes
    if not is_local_first():
        dist.barrier(waiting)
    yield
    if is_local_first():
        dist.barrier(waiting)


def default_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_precision(precision, device):
    """What `auto` is: bf16 on GPUs that have it, fp16 on older ones, elsewhere fp32: on CPUs bf16 is slower."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision, device):
    """torch.autocast; it does nothing in fp32."""
    precision = choose_precision(precision, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def progress(items=None, **options):
    """tqdm, every minute where nobody watches; on the first process of a machine."""
    return tqdm(items, dynamic_ncols=True, disable=not is_local_first(),
                mininterval=0.1 if sys.stderr.isatty() else 60, **options)


def say(text, rank=0):
    """Print a line, from the first process alone."""
    if rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


# ---------------------------------------- A run: its length and rate, its checkpoints, its log


def number_of_steps(args, images, world):
    """--steps, or enough for --epochs over `images` images; the last batch reaches into the next epoch."""
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} does not divide over {world} processes")
    return args.steps or max(1, math.ceil(args.epochs * images / args.batch_size))


def cosine_rate(step, steps, peak, warmup):
    """Rate of `step` (from 0): a linear rise in the share `warmup` of the steps, then half a cosine (5.1)."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


NOT_FINITE = "is not finite"


def finish_step(step, loss, optimizer, scaler):
    """The optimiser's step after backward; returns the loss summed over all processes, a float.

    UserError before a loss or gradient that is not finite reaches the weights. fp16's scaler skips a step with
    such a gradient and halves its scale; when that has come down to 1 no lower one will help.
    """
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]).item()
    loss = total(loss).item()
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)):
        raise UserError(f"step {step}: the loss, {loss:g}, or its gradient {NOT_FINITE}; the weights are as "
                        "before. Lower --lr, raise --warmup, or pass --precision fp32")
    scaler.step(optimizer)
    scaler.update()
    return loss


def save(path, content):
    """torch.save, or by the path's ending JSON or a picture; whole or not at all: written beside, flushed to
    disk, renamed. UserError where that fails, as on a full disk."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            if str(path).endswith(".json"):
                file.write(json.dumps(content, indent=2).encode())
            elif str(path).endswith(".png"):
                content.save(file, "PNG")
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch's own for a full disk is a RuntimeError
        raise UserError(f"{path}: cannot be written ({error})") from error


def load(path):
    """The checkpoint in a file of `save`. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of all kinds
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); bring back a whole copy, or delete "
                        "it to begin anew") from error


FREE = ("out", "root", "workers", "save_every", "device", "compile", "micro_batch")  # may change on resume


def resume(args, data):
    """The checkpoint in --out, or None. UserError where it is of other flags or data (a description), or where
    not all processes see the same one."""
    path, checkpoint = os.path.join(args.out, "last.pt"), None
    if os.path.exists(path):
        checkpoint = load(path)
        then, now = {**checkpoint["args"], "images": checkpoint["data"]}, {**vars(args), "images": data}
        free = FREE
        if checkpoint["model_args"]["encoder"] == "resnet50" and now.get("encoder_weights") is None and (
                now.get("init") in (None, "none")):
            free = FREE[:-1]  # a fresh ResNet-50 normalises over the micro-batch
        changed = [f"{key.replace('_', '-')} {then.get(key)} then, {now.get(key)} now"
                   for key in {**then, **now} if then.get(key) != now.get(key) and key not in free]
        if changed:
            raise UserError(f"{path} is of another run ({'; '.join(changed)}); pass a new --out")
    require_same(path, checkpoint and checkpoint["step"])
    return checkpoint


def require_same(path, seen):
    """UserError in every process where they do not all see the same at a path."""
    everywhere = [seen]
    if dist.is_initialized():
        everywhere *= dist.get_world_size()
        dist.all_gather_object(everywhere, seen)
    if everywhere.count(seen) < len(everywhere):
        raise UserError(f"{path}: the processes see {', '.join(map(str, everywhere))}; expected the same for all: "
                        "--out must lie on a disk that all machines share")


class Log:
    """On the first process: a progress bar, and in `out` log.jsonl and TensorBoard's events, where installed.

    start: steps that a run which continues has done; what was logged after them is dropped.
    """

    def __init__(self, out, start, steps, rank):
        self.bar = progress(total=steps, initial=start, unit="step")
        self.file = self.board = None
        if rank > 0:
            return
        os.makedirs(out, exist_ok=True)
        self.file = open(os.path.join(out, "log.jsonl"), "a+", buffering=1)
        self.file.seek(0)
        for _ in range(start):  # a line a step
            self.file.readline()
        self.file.truncate(self.file.tell())
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=start + 1)
        except Exception:  # not installed, or broken
            pass

    def write(self, step, **values):
        """A line of numbers after `step` steps."""
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self.bar.update()
        if self.file:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:  # which does not name it
                raise UserError(f"{self.file.name}: cannot be written ({error})") from error
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self):
        for stream in filter(None, (self.bar, self.file, self.board)):
            stream.close()
