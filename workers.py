"""Runs that any number of programs share through one folder, without a server.

A run is commands in a folder of its own; it is finished when its result is there. A worker claims a run, starts
its commands, one after the other, and goes on with the next. A failed run is reported, the others go on.

What to run comes from a grid, as reproduce.py's: grid.plan() is (the Runs that are known by now, in order;
those that depend on results to come), grid.path(name, *file) a file of a run's folder, grid.finished(run)
whether it is, grid.done the names of those that are.
"""
import math
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import NamedTuple

import torch

from launch import say

HERE = os.path.dirname(os.path.abspath(__file__))
SILENT = 300  # seconds without a sign of life, after which a claim is taken over
LOOK = 10  # seconds after which a worker looks for what others have finished


class Run(NamedTuple):
    name: str            # its folder below OUT/runs
    commands: list       # [[script, flag, ...], ...], one after the other
    needs: list          # the names of runs that come first
    result: str = "metrics.json"  # in its folder: it is finished
    network: str = ""    # flags, for the estimate
    batch: int = 1       # more: it runs on as many GPUs as divide this
    keep: bool = True    # last.pt when it is finished


class Claims:
    """Which runs this program has taken, and which others have.

    A claim is a file claim-N in the run's folder. To take it over is to create claim-(N + 1), which only one can.
    It may be taken over when none of its processes is left on this machine, or when it was not touched for
    SILENT seconds of our own clock.
    """

    def __init__(self, grid):
        self.grid, self.seen, self.mine, self.touched = grid, {}, {}, 0.0

    def take(self, run):
        """Whether the run is ours now."""
        newest = self._newest(run)
        if not self.may_take(run, newest):
            return False
        path = os.path.join(self.grid.path(run.name), f"claim-{newest + 1}")
        try:
            with open(path, "x") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
        except FileExistsError:
            return False
        self.mine[run.name] = path
        if self.grid.finished(run):  # in the meantime, by another
            self.give_up(run)
        return run.name in self.mine

    def may_take(self, run, newest=None):
        newest = self._newest(run) if newest is None else newest
        return newest < 0 or self._abandoned(os.path.join(self.grid.path(run.name), f"claim-{newest}"))

    def _newest(self, run):
        folder = self.grid.path(run.name)
        os.makedirs(folder, exist_ok=True)
        claims = [name for name in os.listdir(folder) if re.fullmatch("claim-[0-9]+", name)]
        return max((int(name.removeprefix("claim-")) for name in claims), default=-1)

    def add_process(self, run, pid):
        with open(self.mine[run.name], "a") as file:
            file.write(f"{socket.gethostname()} {pid}\n")

    def give_up(self, run, alone=False):
        """alone: remove our own claim, not the one that we took over: its owner turned out to be there."""
        newest = self.mine.pop(run.name)
        folder, number = os.path.dirname(newest), int(newest.rpartition("-")[2])
        for i in range(number if alone else 0, number + 1):  # ours last
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder, f"claim-{i}"))

    def show_life(self):
        if time.monotonic() - self.touched > SILENT / 10:
            self.touched = time.monotonic()
            for path in self.mine.values():
                with suppress(FileNotFoundError):
                    os.utime(path)

    def _abandoned(self, path):
        try:
            with open(path) as file:
                owners = [line.split() for line in file.read().splitlines()]
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:  # given up just now
            return False
        here = os.name == "posix" and owners and all(  # else a line may be torn: silence decides
            len(owner) == 2 and owner[0] == socket.gethostname() and owner[1].isdigit() for owner in owners)
        if here and not any(is_alive(int(owner[1])) for owner in owners):
            return True
        if self.seen.get(path, (0, 0))[0] != changed:
            self.seen[path] = changed, time.monotonic()
        return time.monotonic() - self.seen[path][1] > SILENT


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def gpus_of(device):
    """The names of the GPUs to use, as in CUDA_VISIBLE_DEVICES."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in visible.split(",") if name] or list(map(str, range(torch.cuda.device_count())))


def command_line(command, processes=1):
    """What follows "python" in it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(torchrun if processes > 1 else []), os.path.join(HERE, command[0]), *command[1:]]


class Active(NamedTuple):
    run: Run
    gpus: list
    process: subprocess.Popen
    commands: list  # that come after
    begins: int     # where its output begins in output.txt


class Worker:
    """Runs what is not finished and not claimed, on this machine's GPUs or cores."""

    def __init__(self, grid):
        self.grid, self.claims, gpus = grid, Claims(grid), gpus_of(grid.args.device)
        jobs = grid.args.jobs or len(gpus) or min(2, os.cpu_count() or 1)
        self.gpus = gpus[:jobs] if gpus else [None] * jobs
        self.free = list(self.gpus)
        self.running, self.failed = {}, {}  # {name: Active}, {name: why}
        self.busy = {}  # {name: when another process was found to write there, as a torchrun of the user's}

    def work(self):
        """Until all is finished or failed. Yields the grid's plan, at least every LOOK seconds."""
        try:
            while True:
                runs, later = self.grid.plan()
                known = len(self.grid.done)
                yield runs, later
                checked = time.monotonic()
                waits = self._start(runs)
                self.claims.show_life()
                if not self.running and not waits:
                    if len(self.grid.done) == known:
                        return
                    continue  # another worker finished one meanwhile, on which more may depend
                while not self._ended():
                    time.sleep(0.2)  # there is no portable way to wait for the first of several processes
                    self.claims.show_life()
                    if time.monotonic() - checked > LOOK:
                        break
        finally:
            for active in self.running.values():  # each continues from its checkpoint next time
                active.process.terminate()
            for active in self.running.values():
                active.process.wait()
                self.claims.give_up(active.run)

    def _start(self, runs):
        """Start what can be; returns whether another worker's run is waited for."""
        finished, waits = self.grid.finished, False
        by_name = {run.name: run for run in runs}
        for run in runs:
            if finished(run) or run.name in self.failed or run.name in self.running:
                continue
            if not all(finished(by_name[need]) for need in run.needs):
                continue
            if time.monotonic() - self.busy.get(run.name, -math.inf) < SILENT:
                waits = True
                continue
            needed = self.processes(run)
            if not self.free or (needed > len(self.free) and run.name not in self.busy
                                 and self.claims.may_take(run)):
                break  # the first in order comes first, also where it must wait for GPUs
            if needed > len(self.free) or not self.claims.take(run):
                waits = waits or not finished(run)
                continue
            self._start_command(run, [self.free.pop(0) for _ in range(needed)], run.commands)
        return waits

    def processes(self, run):
        """On how many GPUs it runs: as many as its batch divides over."""
        most = len(self.gpus) if self.gpus[0] is not None else 1
        return max(n for n in range(1, most + 1) if run.batch % n == 0)

    def _start_command(self, run, gpus, commands):
        threads = max(1, (os.cpu_count() or 1) // len(self.gpus))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if gpus[0] is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with open(self.grid.path(run.name, "output.txt"), "a") as output:
            begins = os.stat(output.name).st_size
            process = subprocess.Popen([sys.executable, *command_line(commands[0], len(gpus))],
                                       env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.running[run.name] = Active(run, gpus, process, commands[1:], begins)
        self.claims.add_process(run, process.pid)

    def _ended(self):
        """Whether a run ended; starts the second command of those that have one."""
        any_ended = False
        for name, (run, gpus, process, commands, begins) in list(self.running.items()):
            if process.poll() is None:
                continue
            if process.returncode == 0 and commands:
                self._start_command(run, gpus, commands)
                continue
            any_ended, busy = True, False
            del self.running[name]
            self.free += gpus
            if not self.grid.finished(run):
                output = self.grid.path(name, "output.txt")
                why = last_line(output, begins)
                busy = "another run is writing there" in why
                if busy:
                    if name not in self.busy:
                        say(f"waits for: {name}, {why}")
                    self.busy[name] = time.monotonic()
                else:
                    self.failed[name] = f"status {process.returncode}: {why} (see {output})"
                    say(f"failed: {name}, {self.failed[name]}")
            else:
                for file in ("previous.pt", "best.pt", *([] if run.keep else ["last.pt"])):
                    with suppress(FileNotFoundError):
                        os.remove(self.grid.path(name, file))
            self.claims.give_up(run, alone=busy)
        return any_ended


def last_line(path, begins):
    """The error in a run's output, else its last line."""
    with open(path, "rb") as file:
        file.seek(begins)
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line for line in lines if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if ": error: " in line), lines[-1])
