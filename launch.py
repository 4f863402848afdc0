"""How a script starts and ends: its flags, its processes and device, and the one line on a user's mistake."""
import argparse
import errno
import math
import os
import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from model import ResNet50, WeightsError

# ---------------------------------------- The end of a script: exit statuses and error messages

STOPPED = 75  # EX_TEMPFAIL: a signal stopped the run, the same command continues it
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE}
NO_MEMORY = re.compile("out of memory|can't allocate memory|unable to allocate|calculation overflowed|"
                       "array is too big|killed by signal: killed", re.I)
SAVE_MEMORY = ("--micro-batch", "--crop-size", "--image-size", "--width", "--window", "--workers")


class InputError(Exception):
    """A user's mistake, in one line: what is wrong and where, what was expected, what to do."""


class SampleError(InputError):
    """A fault in one image or mask, known to the process that reads it alone."""


class Stopped(Exception):
    """A signal stopped the run; its state is saved."""


def of_environment(name, default):
    """The whole number in an environment variable; None where it holds something else."""
    text = os.environ.get(name, str(default))
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def speaks(rank):
    """Whether this process is the first of its group, or alone: then its RANK or LOCAL_RANK means nothing."""
    return (of_environment("WORLD_SIZE", 1) or 1) == 1 or os.environ.get(rank, "0") == "0"


def say(text):
    """Print a line, from the first process alone, above its progress bar."""
    if text and speaks("RANK"):
        tqdm.write(text)
        sys.stdout.flush()


def run_script(main):
    """Call main(). A user's mistake or a disk that cannot be written is one line and status 2."""
    script, is_main = os.path.basename(sys.argv[0]), speaks("LOCAL_RANK")
    # Of DDP, where a 1x1 kernel's gradient lies in memory as its weight but is described in other words
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except (InputError, WeightsError) as error:
        if is_main or isinstance(error, SampleError):
            print(f"{script}: error: {error}", file=sys.stderr)
        else:
            time.sleep(5)  # torchrun ends all processes when one exits: let the first print its line
        sys.exit(2)
    except BrokenPipeError:  # python evaluate.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"{script}: error: {error.filename or 'a file or the output'} cannot be read or written "
              f"({error.strerror}); what was saved before is intact. Mend that or pass another folder, "
              "then repeat the command",
              file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        reason = explain(error)
        if reason is None:
            raise
        print(f"{script}: error: {reason}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if is_main:
            print(stop, file=sys.stderr)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def explain(error):
    """One line for an error of Python or torch that a user can mend; None for others."""
    text = str(error)
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        flags = [flag for flag in SAVE_MEMORY if flag in Parser.known]
        reason = next((line for line in text.splitlines() if NO_MEMORY.search(line)), "")
        return (f"out of memory ({reason.strip()[:300]}); what was saved before is intact. Lower "
                f"{' or '.join(flags)}")
    if text.startswith("DataLoader worker"):
        return f"{text.splitlines()[0]}; repeat with --workers 0 to see what it failed on"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(text.split("\n\n")[0].split())[:300]
        return f"--compile failed: {reason}; install a C++ compiler, or drop --compile"
    if "Too many open files" in text:
        return "too many open files; raise the limit (`ulimit -n 4096`) or lower --workers"
    if "closed by peer" in text or "reset by peer" in text:
        return "another process of the group ended; its own message says why"
    return None


# ---------------------------------------- Flags


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        return action.help if no_default else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, with defaults in the help, without abbreviated flags."""
    known = ()  # the flags of the script, for run_script

    def __init__(self, description):
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=HelpWithDefaults)

    def parse_args(self, *args):
        Parser.known = tuple(self._option_string_actions)
        args = super().parse_args(*args)
        for name, value in vars(args).items():
            if value == "":
                self.error(f"--{name.replace('_', '-')} is empty, expected a value")
        if getattr(args, "pixel_range", None) is not None:
            low, high = torch.tensor(args.pixel_range).tolist()  # as float32, in which pixels are scaled
            if not 1e-36 < high - low < 1e36:
                raise InputError("--pixel-range {:g} {:g}: expected two numbers, LOW < HIGH, which differ in "
                                 "float32".format(*args.pixel_range))
        return args

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def add_training_flags(parser, data_sets):
    """The flags of all three stages. Their defaults come from each stage's RECIPE."""
    add_data_flags(parser, data_sets)
    add_bands_flag(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder of the run; a run already there is continued "
                                     "(default: runs/DATA/NAME OF THE SCRIPT)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, help="optimiser steps")
    length.add_argument("--epochs", type=positive_float, help="passes over the images, instead of --steps")
    add("--batch-size", type=positive_int, help="images per step, over all processes")
    add("--micro-batch", type=positive_int, help="images in one process's network at once (accumulation)")
    add("--lr", type=positive_float, help="peak learning rate of Adam (paper 5.1)")
    add("--warmup-steps", type=non_negative_int, help="linear warm-up before the cosine (not in the paper)")
    add("--weight-decay", type=non_negative_float, help="L2 penalty of Adam (paper 5.1)")
    add("--clip-norm", type=positive_float, help="maximum gradient norm (not in the paper: off on real data)")
    add("--decoupled-weight-decay", action="store_true", help="AdamW instead of Adam (not in the paper)")
    add("--batch-norm", choices=("stored", "batch"),
        help="resnet50: normalise with stored statistics, or those of the batch over all processes (default: "
             "batch where the encoder trains from fresh weights, else stored)")
    add("--seed", type=seed_int, default=0,
        help="random seed of fresh weights, order, crops, flips, noise")
    add("--workers", type=non_negative_int, help="loader processes per process; 0: none")
    add("--save-every", type=steps_or_minutes, help="steps between checkpoints, or minutes: 10min")
    add("--log-every", type=positive_int, default=10, help="steps between lines of log.jsonl")
    add_device_flags(parser)


def add_bands_flag(parser):
    parser.add_argument("--bands", type=positive_int,
                        help="bands of the pictures (default: 3; stage 3: those of --init)")


def add_data_flags(parser, data_sets):
    parser.add_argument("--data", choices=data_sets, default="shapes",
                        help="the data set; it decides the other defaults")
    parser.add_argument("--root", metavar="DIR", help="folder of the data (shapes has none)")
    parser.add_argument("--pixel-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="values that become -1 and 1, what is outside is clipped (default: 0 255 for "
                             "files of 8 bits, 0 65535 for 16; other files need the flag)")
    parser.add_argument("--huge", action="store_true", help="read pictures of more than 179 megapixels too")


def add_device_flags(parser):
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 autocast on CUDA, fp32 elsewhere; fp16 (CUDA) scales the loss")
    add("--compile", action="store_true", help="torch.compile the network")


def peek(argv, flag, default=None):
    """The value of one flag, before the defaults of the others are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", default=default, dest="value")
    value = parser.parse_known_args(argv)[0].value
    if value == "":
        raise InputError(f"{flag} is empty, expected a value")
    return value


def parse(parser, recipe, argv=None, of_checkpoint=None):
    """Parse the command line with the defaults of the chosen data set.

    recipe: {"shapes": defaults, "paper": those of real data, NAME: what differs for this set}.
    of_checkpoint: the data set that a checkpoint was made with, and its flags (evaluate.py).
    """
    usual = of_checkpoint or {"data": "shapes"}
    data = peek(argv, "--data", usual["data"])
    embedded = (data or "").startswith("shapes")
    defaults = recipe["shapes"] if embedded else {**recipe["paper"], **recipe.get(data, {})}
    parser.set_defaults(**defaults)
    if data == usual["data"]:
        parser.set_defaults(**usual)
    for given, other in (("--steps", "epochs"), ("--epochs", "steps")):
        if peek(argv, given) is not None:  # replaces the recipe's other one
            parser.set_defaults(**{other: None})
    args = parser.parse_args(argv)
    if embedded and (args.pixel_range or getattr(args, "bands", None) not in (None, 3)):
        raise InputError(f"--data {data} has 3 bands of 8 bits; --bands and --pixel-range are for files")
    if embedded and args.root is not None:
        raise InputError(f"--root given, but --data {data} is drawn by code; pass --data folder, or another "
                         "set")
    return args


def number(kind, allowed, expected):
    """A type for argparse: what `kind` reads and is `allowed`."""
    def convert(text):
        with suppress(ValueError):
            value = kind(text)
            if allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return convert


positive_int = number(int, lambda n: 0 < n < 2 ** 31, "a whole number above 0, of 31 bits")
non_negative_int = number(int, lambda n: 0 <= n < 2 ** 31, "a whole number, 0 or more, of 31 bits")
seed_int = number(int, lambda n: 0 <= n < 2 ** 63, "a whole number of 63 bits, 0 or more")
decoder_width = number(float, lambda x: 1 / 64 <= x <= 64, "a number from 1/64 to 64")
positive_float = number(float, lambda x: 0 < x <= 1e9, "a number above 0, at most 1e9")
non_negative_float = number(float, lambda x: 0 <= x <= 1e9, "a number, 0 or more, at most 1e9")
noise_sigma = number(float, lambda x: 0 <= x <= 1e6, "a number from 0 to 1e6")
unit_float = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def steps_or_minutes(text):
    """The text itself, checked: "500" or "10min"."""
    check = positive_float if text.endswith("min") else positive_int
    check(text.removesuffix("min"))
    return text


# ---------------------------------------- Processes, device, precision


@dataclass(frozen=True)
class Processes:
    """This process: number `rank` of the `world` that torchrun started, and its device."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum over all processes."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, *numbers):
        """The sums of numbers, bools or scalar tensors over all processes, in one exchange: a float32 tensor."""
        numbers = [torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in numbers]
        return self.sum(torch.stack(numbers))

    def gather(self, thing):
        """[thing of process 0, thing of process 1, ...]; it is pickled."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def one_first(self):
        """One process of each machine runs the block first: it makes a file, the others find it."""
        first = speaks("LOCAL_RANK")
        if not first:
            self.barrier()
        try:
            yield
        finally:
            if first:
                self.barrier()

    def share(self, batch_size):
        """Images per process of a global batch."""
        if batch_size % self.world:
            raise InputError(f"--batch-size {batch_size} does not divide over {self.world} processes; "
                             f"pass a multiple of {self.world}")
        return batch_size // self.world


def start_processes(device="auto"):
    """Join torchrun's process group, if there is one; choose this process's device."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    numbers = [of_environment(name, default) for name, default in alone.items()]
    rank, world, local_rank = numbers if None not in numbers else (0, 0, 0)
    has_address = "MASTER_ADDR" in os.environ and 0 < (of_environment("MASTER_PORT", 0) or 0) < 2 ** 16
    if rank >= world or (world > 1 and not has_address):
        names = [name for name in [*alone, "MASTER_PORT"] if name in os.environ]
        given = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise InputError(f"the environment has {given}, which makes no process of a group; start it with "
                         "torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none of them")
    mps = torch.backends.mps.is_available() and world == 1  # MPS has no collectives
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; pass --device cpu, or a torch with CUDA")
    if device == "mps" and not mps:
        raise InputError("--device mps: needs an Apple GPU and one process; pass --device cpu")
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if (of_environment("LOCAL_WORLD_SIZE", 1) or 1) <= gpus:  # NCCL wants a GPU for each process
            backend = "nccl"
        device = f"cuda:{local_rank % gpus}"
        torch.cuda.set_device(device)
    if world > 1:
        patience = timedelta(minutes=60)
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        waiting = f"process {rank} waits for {address} and for all {world} processes, at most 60 minutes"
        formed = threading.Event()
        threading.Thread(target=_watch, args=[formed, waiting], daemon=True).start()
        # When torchrun restarts a group (--max-restarts) its store still holds the addresses of the dead one.
        store = next(rendezvous("env://", timeout=patience))[0]
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        formed.set()
    return Processes(rank, world, torch.device(device))


def torchrun_is_gone(parent=os.getppid()):
    """Whether the torchrun that started this process has ended, as by SIGKILL, which it cannot pass on.

    parent: known since the import, which comes before anything that waits.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent


def _watch(formed, waiting):
    """Until the group has formed: say after 15 s what is waited for; end this process if torchrun ends."""
    seconds = 0
    while not formed.wait(1):
        seconds += 1
        if seconds == 15:
            print(waiting, flush=True)
        if torchrun_is_gone():
            os._exit(STOPPED)


def default_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // (of_environment("LOCAL_WORLD_SIZE", 1) or 1)))


def resolve_precision(precision, device):
    """"fp32", "bf16" or "fp16". auto is fp32 on a CPU, where bf16 is mostly slower."""
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA, this is {device.type}; pass bf16 or fp32")
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def autocast(precision, device):
    """torch.autocast of this precision; with fp32 it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


# ---------------------------------------- What the training flags mean


def number_of_steps(args, images):
    """--steps, or enough for --epochs over `images` images; the last batch reaches into the next epoch."""
    steps = args.steps or math.ceil(args.epochs * images / args.batch_size)
    if steps >= 2 ** 31:
        raise InputError(f"--epochs {args.epochs:g} are {steps} steps; expected fewer than 2 ** 31")
    return steps


def cosine_rate(step, steps, peak, warmup_steps):
    """Rate of `step` (from 0): linear warm-up to `peak`, then half a cosine to 0 at `steps` (5.1)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def set_batch_norm(encoder, args, processes, fresh):
    """Set what a ResNet-50 normalises with while it trains, by --batch-norm.

    fresh: it trains from fresh weights, whose stored statistics, 0 and 1, would normalise nothing. Returns
    how many images share batch statistics, which must not change when a run continues; None without them.
    """
    if not isinstance(encoder, ResNet50):
        if args.batch_norm is not None:
            raise InputError("--batch-norm belongs to --encoder resnet50; other encoders have no BatchNorm")
        return None
    encoder.batch_statistics = fresh if args.batch_norm is None else args.batch_norm == "batch"
    images = min(args.micro_batch, processes.share(args.batch_size)) * processes.world
    return images if encoder.batch_statistics else None
