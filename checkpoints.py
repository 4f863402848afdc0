"""One run in one folder: its lock, its checkpoints, the signals that stop it. Kill it at any moment: the same command continues.

What a sample looks like is a function of (seed, epoch, index), see data.py. So a checkpoint holds weights, optimiser, scaler, step and
best score, and no state of generators or loaders; from it a run goes on to the same bits as an undisturbed one.

    last.pt         the newest checkpoint: written beside, flushed to disk, renamed
    previous.pt     the one before it, for when last.pt turns out to be damaged
    best.pt         weights of the best score so far, where a score decides
    metrics.json    written last: the run is finished
    lock            held by the process that writes in the folder
"""
import json
import os
import signal
import socket
import time

import torch

from model import PUBLISHED, published_weights, read_weights
from runtime import InputError, Stopped, as_input_error, replacing, write_json

try:
    import fcntl
except ImportError:                                                       # Windows: no lock there
    fcntl = None

# Flags that may change between a run and its continuation: they do not alter what is computed. (Of the data, the content counts.)
FREE_TO_CHANGE = {"out", "root", "cache", "workers", "save_every", "log_every", "device", "compile", "micro_batch"}


class Run:
    """The run in args.out. Raises InputError where another process runs there, or where one ran with other flags or data.

    data: a text that tells the data from any other. checkpoint: the one to continue from, None for a new run. notes: lines for the user.
    """

    def __init__(self, args, processes, data):
        self.args, self.processes, self.data, self.notes = args, processes, data, []
        self.signal, self.saved_step, self.saved_at = None, 0, time.monotonic()
        if processes.is_main:
            make_folder(args.out)
            self.lock = claim(args.out)
        self.checkpoint, damaged = self._newest()
        if self.checkpoint is not None:
            refuse_other_flags(args.out, {**self.checkpoint["args"], "data-content": self.checkpoint["data"]}, {**vars(args), "data-content": data})
            self.saved_step, before = self.checkpoint["step"], self.checkpoint["processes"]
            if before != processes.world:
                self.notes.append(f"begun on {before} processes, continued on {processes.world}: the same samples, results equal but for rounding")
        elif os.path.exists(self._path("args.json")):
            self.notes.append(f"{args.out}: a run began here and saved nothing; starting over")
        processes.barrier()                                               # all have read before one writes
        if processes.is_main:
            if damaged:
                os.replace(self._path("last.pt"), self._path("last.pt.damaged"))
            write_json(self._path("args.json"), vars(args))

    def _path(self, name):
        return os.path.join(self.args.out, name)

    def _newest(self):
        """(the newest whole checkpoint or None, whether last.pt is damaged)."""
        reasons = []
        for name in ("last.pt", "previous.pt"):
            if os.path.exists(self._path(name)):
                try:
                    checkpoint = load_checkpoint(self._path(name))
                except InputError as error:
                    reasons.append(str(error))
                    continue
                if reasons:
                    self.notes.append(f"{reasons[0]}; it is kept as last.pt.damaged, continuing from previous.pt, step {checkpoint['step']}")
                return checkpoint, bool(reasons)
        if reasons:
            raise InputError(f"{reasons[0]}; and there is no whole one before it. Remove {self.args.out} to start anew")
        return None, False

    def is_finished(self):
        return is_finished(self.args.out)

    def catch_signals(self):
        """From now on SIGTERM, SIGINT and SIGUSR1 stop the run at the end of its step. A second Ctrl-C ends it at once."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):                                     # no SIGUSR1 on Windows
                signal.signal(getattr(signal, name), self._note_signal)

    def _note_signal(self, number, frame):
        self.signal = signal.Signals(number).name
        if "TORCHELASTIC_RUN_ID" not in os.environ:                       # torchrun passes a Ctrl-C on that arrived already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def sum_loss(self, loss):
        """(the loss summed over the processes, whether any of them was told to stop): one exchange for both."""
        loss, stop = self.processes.sum(torch.stack([loss.float(), torch.tensor(float(self.signal is not None), device=loss.device)])).tolist()
        return loss, stop > 0

    def stop_if_told(self):
        """Raise Stopped on all processes when any was told to stop; all must call it equally often."""
        if self.processes.sum(torch.tensor(float(self.signal is not None), device=self.processes.device)).item():
            self.stop()

    def stop(self):
        raise Stopped(f"stopped by {self.signal or 'a signal to another process'}: saved at step {self.saved_step} in {self.args.out}; "
                      f"the same command continues")

    def save_is_due(self, step):
        """After step number `step` (from 1), by --save-every."""
        if isinstance(self.args.save_every, str):
            return time.monotonic() - self.saved_at >= 60 * float(self.args.save_every.removesuffix("min"))
        return step % self.args.save_every == 0

    def save(self, step, **content):
        """The checkpoint of `step`: previous.pt is what last.pt was. Only the main process writes."""
        self.saved_step, self.saved_at = step, time.monotonic()
        if self.processes.is_main:
            save(self._path("last.pt"), dict(content, step=step, args=vars(self.args), data=self.data, processes=self.processes.world),
                 keep=self._path("previous.pt"))

    def finish(self, metrics):
        """Write metrics.json, the last thing that a run does."""
        write_json(self._path("metrics.json"), metrics)


def make_folder(path, flag="--out"):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); pass another {flag}") from None


def claim(out):
    """The open file `lock` in `out`, locked for this process until it ends, however it ends."""
    try:
        file = open(os.path.join(out, "lock"), "a+")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); pass another --out") from None
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)              # not flock: loader workers would hold that one too
    except OSError:
        file.seek(0)
        raise InputError(f"{out}: another run is writing there ({file.read().strip()}); wait for its end, or pass another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def is_finished(out):
    return os.path.exists(os.path.join(out, "metrics.json"))


def save(path, checkpoint, keep=None):
    """torch.save that is there whole or not at all. keep: where the file goes that was there before."""
    with replacing(path, keep=keep) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:                                     # torch hides a full disk behind one of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_checkpoint(path):
    """A checkpoint of ours: a dict of tensors and plain values with "model" and "model_args"; refused where its checksums do not hold."""
    with as_input_error():
        checkpoint = read_weights(path)
    if not {"model", "model_args"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of these scripts; expected \"model\" and \"model_args\" in it")
    return checkpoint


def weights_path(source, encoder, processes):
    """The file that --encoder-weights or --init means: a path is itself, a published name is fetched, once per machine."""
    if source not in PUBLISHED:
        return source
    if encoder not in (None, PUBLISHED[source][0]):
        raise InputError(f"{source} are weights of --encoder {PUBLISHED[source][0]}, this is {encoder}; pass the one or the other")
    with as_input_error(), processes.one_first():
        return published_weights(source)


def refuse_other_flags(out, then, now, free=FREE_TO_CHANGE):
    """Raise InputError, with both in columns, where a flag has another value than it had in the run in `out`."""
    changed = [key for key in sorted((set(then) | set(now)) - free) if then.get(key) != now.get(key)]
    if changed:
        rows = [("", "then", "now")] + [("--" + key.replace("_", "-"), str(then.get(key)), str(now.get(key))) for key in changed]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = "\n".join(f"    {flag:{widths[0]}}  {a:{widths[1]}}  {b}" for flag, a, b in rows).replace("--data-content", "data          ")
        raise InputError(f"{out} holds a run with other flags or data; pass a new --out, or the same ones:\n{table}")


def read_json(path):
    with open(path) as file:
        return json.load(file)
