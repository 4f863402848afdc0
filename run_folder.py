"""One training run in one folder. Kill it at any moment: the same command continues, to the same bits.

A sample is a function of (seed, epoch, index), see data.py. So a checkpoint holds no state of generators or
loaders.

    last.pt         the newest checkpoint
    previous.pt     the one before it, in case last.pt is damaged
    best.pt         the weights with the best score so far, in stages that validate
    curve.png       the loss and the score over the steps, drawn at every save
    log.jsonl       a line every --log-every steps ("waiting": share of the time spent waiting for data), and
                    one for every validation
    args.json       the flags
    metrics.json    written last: the run is finished
    lock            held by the process that writes in the folder
"""
import hashlib
import json
import math
import mmap
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from tqdm import tqdm

from launch import NO_MEMORY, InputError, Stopped, say, torchrun_is_gone
from model import (PUBLISHED, WeightsError, build_classifier, build_unet, image_size_of, load_strictly,
                   published_weights, read_weights, recognise)
from pictures import training_curve

try:
    import fcntl
except ImportError:  # Windows has no lock
    fcntl = None

# Flags that may change when a run continues: they do not change what is computed. Of the data, the content
# is compared, not the path.
FREE_TO_CHANGE = {"out", "root", "cache", "workers", "save_every", "log_every", "device", "compile",
                  "micro_batch", "huge"}
WEIGHTS = {"init", "encoder_weights"}  # their content is compared, too
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")  # of pictures
WRITTEN = {"last.pt", "previous.pt", "best.pt", "last.pt.damaged", "log.jsonl", "metrics.json", "masks.txt",
           "labelled.txt", "validated.txt"}  # and pictures
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class RunFolder:
    """The run in settings["out"], new or continued.

    settings: the flags, and what they were resolved to. sources: the data, first what trains. steps: of the
    whole run. Raises InputError where another process runs there, or one ran with other settings or data.
    """

    def __init__(self, settings, sources, steps, processes):
        content = [source.content() for source in sources] if processes.is_main else []
        settings = {**settings, "data-bytes": " ".join(processes.gather(content)[0])}
        self.out, self.settings, self.steps, self.processes = settings["out"], settings, steps, processes
        self.source, self.data = sources[0], "; ".join(source.fingerprint() for source in sources)
        self.signal, self.saved_step, self.saved_at = None, 0, time.monotonic()
        self.unreadable, self.new_unreadable = set(), []
        if processes.is_main:
            make_folder(self.out, root=settings.get("root"), written=WRITTEN)
            self.lock = lock_folder(self.out)
        self.checkpoint, damaged = self._newest_checkpoint()
        if self.checkpoint is not None:
            with intact(self.begun):
                self._compare_with_checkpoint()
        elif any(map(os.path.exists, [self.path("metrics.json"), self.path("best.pt")])):
            raise InputError(f"{self.out}: holds metrics.json or best.pt, but last.pt is gone; put it back or "
                             "pass another --out")
        elif os.path.exists(self.path("args.json")):
            say(f"{self.out}: a run began here and saved nothing; starting over")
        if len(set(processes.gather(self.saved_step))) > 1:  # also waits: all have read before one writes
            raise InputError(f"{self.out} holds another run on another machine; --out must be on a shared "
                             "disk")
        if processes.is_main:
            if damaged:
                os.replace(self.path("last.pt"), self.path("last.pt.damaged"))
            write_json(self.path("args.json"), settings)

    def _compare_with_checkpoint(self):
        """Raise InputError where it is of other settings or data."""
        # What runs of older versions did not save
        now, args = self.settings, self.checkpoint["args"]
        of_old_runs = {"bands": 3, "classes-of-masks": now.get("classes-of-masks"),
                       "data-bytes": now["data-bytes"], "weights-bytes": now.get("weights-bytes")}
        same_weights = "weights-bytes" in args and args["weights-bytes"] == now["weights-bytes"]
        then = {**of_old_runs, **args, "data-content": self.checkpoint["data"]}
        refuse_other_flags(self.out, then, {**now, "data-content": self.data},
                           FREE_TO_CHANGE | (WEIGHTS if same_weights else set()))
        self.unreadable.update(map(int, self.checkpoint.get("unreadable", [])))
        self.saved_step, before = self.checkpoint["step"], self.checkpoint["processes"]
        if before != self.processes.world:
            say(f"begun on {before} processes, continued on {self.processes.world}: the same samples, results "
                "equal but for rounding")

    def path(self, name):
        return os.path.join(self.out, name)

    def _newest_checkpoint(self):
        """(the newest whole checkpoint or None, whether last.pt is damaged)."""
        damage = []
        for path in filter(os.path.exists, [self.path("last.pt"), self.path("previous.pt")]):
            try:
                checkpoint = load_checkpoint(path)
                if not {"step", "optimizer", "scaler", "data", "processes", "loss"} <= set(checkpoint):
                    raise InputError(f"{path}: cannot be continued from, as a best.pt")
            except (InputError, WeightsError) as error:
                damage.append(error)
                continue
            if damage:
                say(f"{damage[0]}; it is kept as last.pt.damaged, continuing from previous.pt, step "
                    f"{checkpoint['step']}")
            self.begun = path
            return checkpoint, bool(damage)
        if damage:
            raise InputError(f"{damage[0]}; and there is no whole one before it. Remove {self.out} to start "
                             "anew")
        return None, False

    def restore(self, model, optimizer, scaler):
        """Load the checkpoint into these: (its step, loss, best score); without one (0, None, -1)."""
        checkpoint, self.checkpoint = self.checkpoint, None  # its memory is needed
        if checkpoint is None:
            return 0, None, -1.0
        with intact(self.begun):
            load_strictly(model, checkpoint["model"], f"{self.begun}: does not fit the network of its flags")
            groups = optimizer.state_dict()["param_groups"]  # by the flags
            optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
            for parameter, state in optimizer.state.items():
                if not parameter.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                    raise ValueError("the optimizer's state is not of these weights")
            scaler.load_state_dict(checkpoint["scaler"])
            step, loss, best = (checkpoint.get(name) for name in ("step", "loss", "best"))
            if not (isinstance(step, int) and 0 < step <= self.steps
                    and isinstance(loss, float) and isinstance(best, (float, int, type(None)))):
                raise ValueError(f"step {step}, loss {loss}, best {best}")
        return step, loss, best

    def begin(self, start):
        """After `start` steps: open the log, show the progress.

        From now on a signal stops the run after its step; a second Ctrl-C ends it at once.
        """
        self.waiting = 0.0
        self.started = self.last_log = self.last_print = time.perf_counter()
        self.start = self.last_log_step = start
        on_terminal = self.processes.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not on_terminal)
        if self.processes.is_main:
            with replacing(self.path("log.jsonl")) as file:
                file.writelines(lines_before(self.path("log.jsonl"), start))
            self.log = open(self.path("log.jsonl"), "a", buffering=1)
        self.handlers = {number: signal.signal(number, self._note_signal) for number in SIGNALS}

    def _note_signal(self, number, frame):
        self.signal = signal.Signals(number).name
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun passes on a Ctrl-C that has arrived already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def batches(self, loader):
        """For each step an iterator of its micro-batches, which come one at a time."""
        micro_batches = iter(loader)
        for _ in range(self.start, self.steps):
            if torchrun_is_gone():
                self.signal = "the end of torchrun"
            self.indices = []  # of the step's images
            yield self._of_one_step(micro_batches, loader.batch_sampler.parts)

    def _of_one_step(self, micro_batches, parts):
        for part in range(parts):
            asked = time.perf_counter()
            batch = next(micro_batches)
            self.waiting += time.perf_counter() - asked
            self.indices += batch["index"].tolist()
            self.new_unreadable += batch["unreadable"]
            yield {**batch, "is_last": part == parts - 1}

    def log_step(self, step, loss, rate):
        """After step number `step` (from 1), on all processes: every --log-every steps a line in the log.

        Images that did not decode are then named, each once; more than 1 % of all end the run.
        """
        self.bar.update()
        if step % self.settings["log_every"] and step != self.steps:
            return
        count = len(self.source)
        for index, message in sorted(set(sum(self.processes.gather(self.new_unreadable), []))):
            if index not in self.unreadable:
                self.unreadable.add(index)
                say(f"skipped {message} ({len(self.unreadable)} of {count} so far)")
        self.new_unreadable = []
        if len(self.unreadable) > count / 100:
            raise InputError(f"{len(self.unreadable)} of {count} images are unreadable, more than 1 %; "
                             "remove or repair them")
        now = time.perf_counter()
        elapsed = now - self.last_log
        speed = (step - self.last_log_step) * self.settings["batch_size"] / elapsed
        waiting = min(1.0, self.waiting / elapsed)
        self.record(step=step, loss=loss, rate=rate, images_per_second=round(speed, 2),
                    waiting=round(waiting, 4))
        self.last_log, self.last_log_step, self.waiting = now, step, 0.0
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, waiting {waiting:.0%}")
        if self.bar.disable and (now - self.last_print > 60 or step == self.steps):
            left = (now - self.started) / (step - self.start) * (self.steps - step)
            say(f"step {step}/{self.steps}  loss {loss:.4f}  {speed:.1f} images/s  waiting for data "
                f"{waiting:.0%}  left {timedelta(seconds=round(left))}")
            self.last_print = now

    def record(self, **values):
        """Add a line to log.jsonl; `step` must be among the values."""
        if self.processes.is_main:
            try:
                self.log.write(json.dumps(values) + "\n")
            except OSError as error:  # a full disk: name the file
                error.filename = self.log.name
                raise

    def require_finite(self, step, loss, norm, scaler):
        """Raise InputError before step number `step` (from 1) where its loss or gradient norm is not finite.

        With fp16 the scaler skips such a step and lowers its scale, until no lower scale will help.
        """
        scaler_helps = scaler.is_enabled() and scaler.get_scale() > 1e-6
        if math.isfinite(loss) and math.isfinite(norm) or scaler_helps:
            return
        listing = self.path(f"not_finite_step_{step}.txt")
        names = sum(self.processes.gather([self.source.name(i) for i in self.indices]), [])
        if self.processes.is_main:
            write_lines(listing, names)
        raise InputError(f"the loss is {loss:g} and its gradient's norm is {norm:g} at step {step}: stopped "
                         "before they reached the weights; last.pt is as last saved. The batch's images are "
                         f"listed in {listing}. Try a lower --lr, --warmup-steps, --clip-norm, or "
                         "--precision fp32")

    def save_is_due(self, step):
        """Whether --save-every asks for a checkpoint after `step` steps."""
        every = self.settings["save_every"]
        if every.endswith("min"):
            return time.monotonic() - self.saved_at >= 60 * float(every.removesuffix("min"))
        return step % int(every) == 0

    def save(self, step, model, optimizer, scaler, **content):
        """Write last.pt, after `step` steps; the one before becomes previous.pt."""
        self._require_finite_weights(step, model)
        self.saved_step, self.saved_at = step, time.monotonic()
        if self.processes.is_main:
            self._draw_curve()
            content.update(step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
                           scaler=scaler.state_dict(), args=self.settings, data=self.data,
                           processes=self.processes.world, unreadable=sorted(self.unreadable))
            save(self.path("last.pt"), content, keep=self.path("previous.pt"))

    def _draw_curve(self):
        """curve.png: what log.jsonl says of the loss and, in stages that validate, of the score."""
        panels = {}
        with open(self.path("log.jsonl")) as file:
            for values in map(json.loads, file):
                for name in ("loss", "top1", "miou"):
                    value = values.get(name)
                    if value is not None and math.isfinite(value):  # fp16 may log an infinite loss
                        panels.setdefault(name, []).append((values["step"], value))
        if panels:
            with replacing(self.path("curve.png")) as file:
                training_curve(panels).save(file, "PNG")

    def save_best(self, model, **content):
        """Write best.pt, of the weights that last.pt has already."""
        if self.processes.is_main:
            content.update(model=model.state_dict(), args=self.settings, data=self.data)
            save(self.path("best.pt"), content)

    def _require_finite_weights(self, step, model):
        finite = torch.stack([value.isfinite().all() for value in model.state_dict().values()])
        if not finite.all():  # one wait for the device
            raise InputError(f"the weights are not finite after step {step}: not saved, what was saved before "
                             "is intact; lower --lr")

    def stop_if_told(self):
        """Raise Stopped on all processes when any of them got a signal; all must call it equally often."""
        if any(self.processes.sum_numbers(self.signal is not None)):
            self.stop()

    def stop(self):
        raise Stopped(f"stopped by {self.signal or 'a signal to another process'}: saved at step "
                      f"{self.saved_step} in {self.out}; the same command continues")

    def finish(self, metrics):
        """Write metrics.json; give signals, log and lock back."""
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.processes.is_main:
            self.log.close()
            self._draw_curve()
            write_json(self.path("metrics.json"), metrics)
            self.lock.close()


def lines_before(path, start):
    """The lines of a log, as bytes, that a run which continues after `start` steps will not write again.

    It measures the score of step `start` again. A torn line is dropped.
    """
    if start == 0 or not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                of_a_step = "loss" in values
                done = values["step"] <= start if of_a_step else values["step"] < start
                if done and line.endswith(b"\n"):
                    yield line


def is_finished(out):
    return os.path.exists(os.path.join(out, "metrics.json"))


def make_folder(path, flag="--out", root=None, written=()):
    """Make a folder of ours. Raises InputError where what is written there would cost the user something.

    root: the folder of the data: ImageIndex leaves out what has an args.json. written: the names of the files.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "args.json")):
        foreign = [name for name in sorted(os.listdir(path))
                   if name in written or name.lower().endswith(EXTENSIONS)]
        here, data = (os.path.join(os.path.realpath(place or ""), "") for place in (path, root))
        if root is not None and data.startswith(here):
            raise InputError(f"{path}: holds the data, which would then be taken for results; pass another "
                             f"{flag}")
        if foreign:
            raise InputError(f"{path}: holds {foreign[0]} but no args.json, so no script of these made it; pass "
                             f"another {flag}")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); pass another {flag}") from None


def lock_folder(out):
    """The open file out/lock, locked for this process until it ends, however it ends."""
    try:
        file = open(os.path.join(out, "lock"), "a+")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); pass another --out") from None
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader workers would hold too
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{out}: another run is writing there ({file.read().strip()}); wait for its end, or "
                         "pass another --out") from None
    except OSError as error:
        raise InputError(f"{out}: no file can be locked there ({error.strerror}); pass an --out on a file system "
                         "with locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def refuse_other_flags(out, then, now, free=FREE_TO_CHANGE):
    """Raise InputError, with a table, where a flag differs from that of the run in `out`."""
    changed = [key for key in sorted((set(then) | set(now)) - free) if then.get(key) != now.get(key)]
    if not changed:
        return
    rows = [("", "then", "now")]
    for key in changed:
        flag = key if "-" in key else "--" + key.replace("_", "-")  # what is no flag has a "-" in its key
        rows.append((flag, str(then.get(key)), str(now.get(key))))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"    {flag:{widths[0]}}  {a:{widths[1]}}  {b}" for flag, a, b in rows)
    raise InputError(f"{out} holds a run with other flags or data; pass a new --out, or these:\n{table}")


# ---------------------------------------- Files that are there whole or not at all


@contextmanager
def replacing(path, beside=None, keep=None):
    """A binary file to write in: made beside `path`, flushed to disk, renamed to `path`.

    keep: the new name of the file that was there before. Raises OSError, with the path.
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


def write_lines(path, lines):
    """A text file in UTF-8, but for names of files, which may be of any bytes."""
    with replacing(path) as file:
        file.writelines(f"{line}\n".encode("utf-8", "surrogateescape") for line in lines)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a whole JSON object; remove it, or pass another folder")
    return content


def save(path, checkpoint, keep=None):
    """torch.save through `replacing`."""
    with replacing(path, keep=keep) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides a full disk behind an error of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_checkpoint(path):
    """A checkpoint of ours. Raises WeightsError where it is damaged, InputError where it is another file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a file, expected a checkpoint")
    checkpoint = read_weights(path)
    model, *others = (checkpoint.get(name) for name in ("model", "model_args", "args"))
    if not isinstance(model, dict) or not all(isinstance(part, dict) for part in others):
        raise InputError(f"{path}: not a checkpoint of these scripts, which hold model, model_args and args")
    if not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise InputError(f"{path}: its model does not hold tensors alone; it was altered")
    return checkpoint


@contextmanager
def intact(path):
    """Around code that takes the content of the checkpoint `path` as it is: its errors become InputErrors."""
    try:
        yield
    except WeightsError:  # a ValueError, which says all
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if NO_MEMORY.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its content is not what these scripts write ({type(error).__name__}: "
                         f"{reason}); it was altered") from None


def build(checkpoint, path):
    """The UNet of a checkpoint, with its weights. Raises InputError or WeightsError where they do not fit."""
    with intact(path):
        network = build_unet(**checkpoint["model_args"])
        load_strictly(network, checkpoint["model"], f"{path}: does not fit its own model_args")
    return network


def initial_weights(source, encoder, out, processes):
    """(content, digest) of what --init or --encoder-weights names: a path, a published name, "none", "random".

    Where it is gone, the run that continues in `out` stands in for it, whose weights are restored anyway.
    """
    if source in (None, "none", "random"):
        return None, None
    if source in PUBLISHED and encoder not in (None, PUBLISHED[source][0]):
        raise InputError(f"{source} are weights of --encoder {PUBLISHED[source][0]}, this is {encoder}; pass "
                         "the one or the other")
    try:
        path = source
        if source in PUBLISHED:
            with processes.one_first():
                path = published_weights(source)
        content = read_weights(path)
        if "model" in content:  # ours
            with intact(path), torch.device("meta"):  # without memory: whether it describes a network
                image_size_of(content)
                _, state = recognise(content, path)
                if not all(isinstance(value, torch.Tensor) for value in state.values()):
                    raise ValueError("its model does not hold tensors alone")
                model_args = content.get("model_args", {})
                (build_classifier if "num_classes" in model_args else build_unet)(**model_args)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return content, hashlib.blake2b(whole, digest_size=8).hexdigest()
    except WeightsError:
        begun = [os.path.join(out, name) for name in ("last.pt", "previous.pt")]
        for path in [] if source not in PUBLISHED and os.path.isfile(source) else begun:
            with suppress(InputError, WeightsError):  # RunFolder says what is wrong with it
                run = load_checkpoint(path)
                if source in (run["args"].get("init"), run["args"].get("encoder_weights")):
                    say(f"{source} is gone; the run in {out} has its own weights")
                    return run, run["args"].get("weights-bytes")
        raise
