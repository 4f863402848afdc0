"""What every script needs around its maths: user errors, arguments, processes and devices, rates, files, the log."""
import argparse
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# A user's mistake is one line on stderr and exit status 2


class Stopped(Exception):
    """A signal stopped the run, whose state is saved."""


TRY_AGAIN = 75                                                            # exit status of that: EX_TEMPFAIL, "the same command later"
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}


class InputError(Exception):
    """Something the user can mend: the message says what was wrong, where, what was expected and what to do."""
    everywhere = True                                                     # every process meets it; not so a fault in one image


@contextmanager
def as_input_error():
    """A ValueError of model.py or noise.py, which know nothing of this file, as the InputError that it is for a user."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where it has one and its help does not tell."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose help shows defaults, and which takes no abbreviations."""

    def __init__(self, description):
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False, formatter_class=HelpWithDefaults)

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def run(main):
    """Run a script's main(). Exit status 2 and a line for an InputError or a disk that cannot be written; TRY_AGAIN for Stopped."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM))}
    script, is_main = os.path.basename(sys.argv[0]), os.environ.get("RANK", "0") == "0"
    try:
        main()
    except InputError as error:
        if is_main or not error.everywhere:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        else:                                                             # the first process to exit ends all: let rank 0 speak
            time.sleep(5)
        sys.exit(2)
    except BrokenPipeError:                                               # nobody reads the output any more: ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"{script}: error: {error.filename or 'a file'} cannot be written ({error.strerror}); what was saved before is whole. "
              f"Mend that and type the same command again", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stop:
        if is_main:
            print(stop, file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def run_first(command, environment):
    """Run another script before this one goes on; signals are passed on to it. Its exit status; raises Stopped where a signal ended it."""
    process, told = subprocess.Popen(command, env=environment), []

    def pass_on(number, frame):
        told.append(signal.Signals(number).name)
        process.send_signal(signal.SIGTERM)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
    before = [signal.signal(number, pass_on) for number in numbers]
    status = process.wait()
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    if told:
        raise Stopped(f"stopped by {told[0]}, and so is {os.path.basename(command[1])}; the same command continues")
    return status


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def add_training_arguments(parser, data):
    """The flags that the three training stages share. Their defaults come from each stage's RECIPE."""
    add_data_arguments(parser, data)
    parser.add_argument("--out", metavar="DIR", help="where everything goes; a run already there is continued "
                                                     "(default: a folder of the script's name in runs/DATA)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, metavar="N", help="optimiser steps")
    length.add_argument("--epochs", type=positive_float, metavar="N", help="passes over the images, instead of --steps")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="images per step, over all processes")
    parser.add_argument("--micro-batch", type=positive_int, metavar="N",
                        help="the most images that one process puts through the network at once; gradients are accumulated")
    parser.add_argument("--lr", type=positive_float, metavar="X", help="peak learning rate of Adam (5.1)")
    parser.add_argument("--warmup-steps", type=non_negative_int, metavar="N", help="linear warm-up before the cosine; PAPER SILENT")
    parser.add_argument("--weight-decay", type=non_negative_float, metavar="X", help="L2 penalty of Adam (5.1 for fine-tuning)")
    parser.add_argument("--clip-norm", type=positive_float, metavar="X", help="largest norm of the gradient; PAPER SILENT, so none on real data")
    parser.add_argument("--decoupled-weight-decay", action="store_true", help="AdamW instead of Adam; PAPER SILENT on which")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="fresh weights, order, crops, flips, noise")
    parser.add_argument("--workers", type=non_negative_int, metavar="N", help="loader processes per process; 0: none")
    parser.add_argument("--save-every", type=steps_or_minutes, metavar="N", help="steps between checkpoints, or minutes: 500 or 10min")
    parser.add_argument("--log-every", type=positive_int, default=10, metavar="N", help="steps between lines of log.jsonl")
    add_device_arguments(parser)


def add_data_arguments(parser, data):
    parser.add_argument("--data", choices=data, default="shapes", help="the data set; it decides the other defaults")
    parser.add_argument("--root", metavar="DIR", help="folder of the data (shapes has none)")


def add_device_arguments(parser):
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
                        help="auto: bf16 autocast on CUDA, fp32 elsewhere; fp16 (CUDA) scales its loss")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")


def peek(argv, flag, default=None):
    """The value of one flag, before the rest of the command line is looked at."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(flag, nargs="?", default=default, dest="value")
    return first.parse_known_args(argv)[0].value


def parse(parser, recipe, argv=None, usual=None):
    """Parse the command line with the defaults of the chosen data set: recipe["shapes"], or for real data recipe["paper"], overlaid
    with recipe[data] where there is one.

    usual: other defaults, of "data" and of flags that belong to that data set (evaluate.py: what the checkpoint was made with).
    """
    usual = usual or {"data": "shapes"}
    data = peek(argv, "--data", usual["data"])
    defaults = recipe["shapes"] if data == "shapes" else {**recipe["paper"], **recipe.get(data, {})}
    parser.set_defaults(**defaults, **(usual if data == usual["data"] else {}))
    for flag, other in (("--steps", "epochs"), ("--epochs", "steps")):    # the one that is given replaces the recipe's
        if peek(argv, flag) is not None:
            parser.set_defaults(**{other: None})
    args = parser.parse_args(argv)
    if args.data == "shapes" and args.root is not None:
        raise InputError("--root given, but --data shapes is drawn by code; pass --data to name another set, folder for your own")
    return args


def positive_int(text):
    return _number(text, int, lambda n: n > 0, "a whole number above 0")


def non_negative_int(text):
    return _number(text, int, lambda n: n >= 0, "a whole number, 0 or more")


def positive_float(text):
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def non_negative_float(text):
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number, 0 or more")


def unit_float(text):
    return _number(text, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def steps_or_minutes(text):
    if text.endswith("min"):
        return f"{positive_float(text.removesuffix('min')):g}min"
    return positive_int(text)


def _number(text, kind, allowed, expected):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def steps_of(args, count):
    """The number of steps: --steps, or enough for --epochs over `count` images (the last batch is filled from the next epoch)."""
    return args.steps if args.steps is not None else max(1, math.ceil(args.epochs * count / args.batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# Processes, device, precision


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started: rank of world, and the device it computes on."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum of `tensor` over all processes."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing):
        """[thing of process 0, thing of process 1, ...], any picklable thing."""
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
        """One process of each machine does what is inside before the others: it makes a file, they find it."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            self.barrier()
        try:
            yield
        finally:
            if first:
                self.barrier()

    def wrap(self, module):
        """`module`, its gradients averaged over the processes. Freeze first: wrap only what trains."""
        return DistributedDataParallel(module) if self.world > 1 else module


def start_processes(device="auto"):
    """Join the group that torchrun announces in the environment, if it does; choose this process's device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world == 1            # no collectives on MPS
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; pass --device cpu, or install a CUDA build of torch")
    if device == "mps" and not (torch.backends.mps.is_available() and world == 1):
        raise InputError("--device mps: needs an Apple GPU and one process; pass --device cpu")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(local_rank % gpus)
    if world > 1:                                                         # NCCL wants a GPU for each process; gloo shares
        backend, patience = "nccl" if device == "cuda" and local_world <= gpus else "gloo", timedelta(minutes=60)
        # A group that torchrun restarts (--max-restarts) must not read the addresses that the one before it left in the store.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", next(rendezvous("env://", timeout=patience))[0])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return Processes(rank, world, torch.device(device, local_rank % gpus) if device == "cuda" else torch.device(device))


def share_of(batch_size, processes):
    """Images of a global batch per process."""
    if batch_size % processes.world:
        raise InputError(f"--batch-size {batch_size} does not divide over {processes.world} processes; "
                         f"pass a multiple of {processes.world}")
    return batch_size // processes.world


def default_workers():
    return min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def resolve_precision(precision, device):
    """"fp32", "bf16" or "fp16". bf16 is slower than fp32 on most CPUs, so auto keeps to fp32 there."""
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA, this is {device.type}; pass bf16 or fp32")
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def autocast(precision, device):
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser and rate


def adam(parameters, args, device):
    """Adam (5.1). PAPER SILENT on betas (torch's defaults) and on whether weight decay is coupled (L2, as in Adam) or not."""
    kind = torch.optim.AdamW if args.decoupled_weight_decay else torch.optim.Adam
    return kind(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=device.type in ("cpu", "cuda"))


def cosine_rate(step, steps, peak, warmup_steps=0):
    """Learning rate of `step` (from 0): linear warm-up to `peak`, then half a cosine to 0 at `steps` (5.1)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def micro_batches(batch, size):
    """The tensors of a batch in slices of at most `size`: [(slice, is_last), ...]."""
    keys = [key for key, value in batch.items() if isinstance(value, torch.Tensor)]
    slices = zip(*(batch[key].split(size) for key in keys))
    slices = [dict(zip(keys, parts)) for parts in slices]
    return [(part, part is slices[-1]) for part in slices]


def gradient_sync(module, now):
    """DDP exchanges gradients only in the last micro-batch of a step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not now else nullcontext()


def clip_gradients(parameters, norm, optimizer, scaler):
    """Scale the gradient down to `norm`, where it is longer; None: leave it. Returns how long it was."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if norm is None else norm).item()


def require_finite(loss, norm, step, scaler, batch, source, args, processes):
    """Stop a run whose loss or gradient is infinite or no number, before that reaches the weights, and name the images of the batch.

    With fp16 its scaler skips such steps, and lowers its scale; when that has fallen below 1e-6, nothing will help.
    """
    if math.isfinite(loss) and math.isfinite(norm) or scaler.is_enabled() and scaler.get_scale() > 1e-6:
        return
    names = sum(processes.gather([source.name(int(i)) for i in batch["index"]]), [])
    listing = os.path.join(args.out, f"not_finite_step_{step}.txt")
    if processes.is_main:
        with replacing(listing) as file:
            file.writelines(os.fsencode(name) + b"\n" for name in names)
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:g}, but its gradient's norm is {norm},"
    raise InputError(f"{what} at step {step}: stopped before it reached the weights; {args.out}/last.pt holds the last good ones, if one "
                     f"was saved. The batch's images are listed in {listing}. Try a lower --lr, --warmup-steps, --clip-norm, or --precision fp32")


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path, beside=None, keep=None):
    """A file to write in, which takes the place of `path` whole or not at all: written beside, flushed to disk, renamed.

    keep: where the file goes that was there before. Raises OSError, with the path, where it cannot be written.
    """
    beside = beside or f"{path}.tmp"
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and os.path.exists(path):
            os.replace(path, keep)
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(beside)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def write_json(path, content):
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode())


def say(processes, text):
    if processes.is_main and text:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Log


class Unreadable:
    """Files that did not decode: each named once, all counted; more than one in a hundred of the data set stops the run."""

    def __init__(self, count, processes, log, known=()):
        self.count, self.processes, self.log, self.known, self.fresh = count, processes, log, set(known), []

    def note(self, batch, step):
        """Take in what a batch reports; the processes compare notes every log_every steps and at the end."""
        self.fresh += batch["unreadable"]
        if (step + 1) % self.log.every and step + 1 != self.log.steps:
            return
        for index, message in sorted(set(sum(self.processes.gather(self.fresh), []))):
            if index not in self.known:
                self.known.add(index)
                self.log.say(f"skipped {message} ({len(self.known)} of {self.count} so far)")
        self.fresh = []
        if len(self.known) > self.count / 100:
            raise InputError(f"{len(self.known)} of {self.count} images are unreadable, more than 1 %; remove or mend them")


def kept_lines(path, start):
    """The lines of a log that a run which goes on at step `start` will not write again; a torn line is dropped."""
    if start == 0 or not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if line.endswith(b"\n") and values["step"] < start + ("loss" in values):           # a score of step `start` is measured again
                    yield line


class Log:
    """log.jsonl and what the user sees: a progress bar on a terminal, elsewhere a line a minute. Silent but on the main process."""

    def __init__(self, args, processes, steps, start):
        self.is_main, self.steps, self.every, self.batch_size = processes.is_main, steps, args.log_every, args.batch_size
        self.terminal = self.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.terminal)
        self.start_step = self.mark_step = start
        self.started = self.mark = self.printed = time.perf_counter()
        self.waiting = 0.0
        if self.is_main:
            path = os.path.join(args.out, "log.jsonl")
            with replacing(path) as file:
                file.writelines(kept_lines(path, start))
            self.file = open(path, "a", buffering=1)

    def timed(self, batches):
        """The batches, the time spent waiting for each counted."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def step(self, step, loss, rate):
        """After step number `step` (from 1): its loss, and the rate it was made with."""
        if not self.is_main:
            return
        now = time.perf_counter()
        self.bar.update()
        if step % self.every == 0 or step == self.steps:
            elapsed = now - self.mark
            speed = (step - self.mark_step) * self.batch_size / elapsed
            waiting = min(1.0, self.waiting / elapsed)
            self.record(step=step, loss=loss, rate=rate, images_per_second=round(speed, 2), waiting=round(waiting, 4))
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, waiting {waiting:.0%}")
            self.mark, self.mark_step, self.waiting = now, step, 0.0
            if not self.terminal and (now - self.printed > 60 or step == self.steps):
                left = (now - self.started) / (step - self.start_step) * (self.steps - step)
                print(f"step {step}/{self.steps}  loss {loss:.4f}  {speed:.1f} images/s  waiting for data {waiting:.0%}  "
                      f"left {timedelta(seconds=round(left))}", flush=True)
                self.printed = now

    def record(self, **values):
        """One line of log.jsonl; "step" must be among the values."""
        if self.is_main:
            try:
                self.file.write(json.dumps(values) + "\n")
            except OSError as error:                                      # a full disk, say: name the file, for `run`
                error.filename = self.file.name
                raise

    def say(self, text):
        """A line for the user, above the progress bar; none for an empty text."""
        if self.is_main and text:
            self.bar.write(text) if self.terminal else print(text, flush=True)

    def close(self):
        self.bar.close()
        if self.is_main:
            self.file.close()
