"""Shared by the tests: the project's scripts run in this process or in processes of their own, on the smallest networks."""

import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks are tiny; threads only wait for each other

import launch  # noqa: E402
import run_folder  # noqa: E402

# Flags that make a stage as small as it can be, on the embedded data
TINY = {
    "pretrain_encoder": [
        "--steps", "4", "--batch-size", "4", "--eval-every", "100", "--log-every", "1", "--image-size", "32"
    ], "pretrain_decoder": [
        "--steps", "4", "--batch-size", "4", "--width", "0.03125", "--log-every", "1", "--image-size", "32"
    ], "finetune": [
        "--steps", "4", "--batch-size", "4", "--width", "0.03125", "--eval-every", "100", "--log-every", "1",
        "--labels", "6", "--crop-size", "32"
    ]
}

STAGES = list(TINY)


def flags(stage, *more):
    """The flags of a tiny run; stage 2 with a random encoder."""
    random = stage == "pretrain_decoder" and "dep" not in more
    return [*TINY[stage], *(["--encoder-weights", "random"] if random else []), *more]


def load(path):
    return torch.load(path, weights_only=True)


def losses(out):
    """The losses in the log of a run."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def script(monkeypatch, capsys):
    """script("finetune", "--steps", 4, ...) runs finetune.py in this process -> (exit status, stdout, stderr)."""

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        status = 0
        handlers = {number: signal.getsignal(number) for number in run_folder.SIGNALS}
        capsys.readouterr()
        try:
            launch.run_script(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code
        for number, handler in handlers.items():  # a run that is stopped keeps them
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded data, cut to a dozen pictures a part."""
    import datasets

    monkeypatch.setattr(datasets, "SHAPES_COUNTS", {part: 12 for part in datasets.SHAPES_COUNTS})


def torchrun(processes, name, *flags, cwd=None):
    """A script under torchrun -> CompletedProcess."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        str(ROOT / f"{name}.py")
    ]
    return subprocess.run([*command, *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200)


# ------------------------------------------------------------------------------------------------ processes that can be killed

# They fork from a server that has imported torch once: a run starts in a tenth of a second.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["conftest", "run_folder", "pretrain_encoder", "pretrain_decoder", "finetune", "evaluate"])


class Forked:
    """A stage in processes of its own, on a dozen shapes; patches: functions of this module with their arguments, called first."""

    def __init__(self, tmp_path, name, *flags, processes=1, patches=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes
        }
        self.output = tmp_path / f"output_{port}.txt"
        self.ranks = [
            FORK.Process(
                target=_stage, args=(name, list(map(str,
                                                    flags)), {**group, "RANK": rank,
                                                              "LOCAL_RANK": rank}, str(self.output), patches))
            for rank in range(processes)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self):
        """The exit statuses, rank by rank; -9 for a killed one."""
        for rank in self.ranks:
            rank.join(600)
            if rank.exitcode is None:  # hangs: end it, so that the test fails instead
                rank.kill()
                rank.join()
        return [rank.exitcode for rank in self.ranks]

    def until(self, there):
        """Wait until there() is true; fail if the run ends before."""
        while not there():
            assert self.ranks[0].is_alive(), self.text()
            time.sleep(0.01)

    def text(self):
        return self.output.read_text()


def _stage(name, flags, environment, output, patches):
    import datasets

    file = open(output, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update({key: str(value) for key, value in environment.items()})
    datasets.SHAPES_COUNTS = {part: 12 for part in datasets.SHAPES_COUNTS}
    for patch, *arguments in patches:
        globals()[patch](*arguments)
    sys.argv = [f"{name}.py", *flags]
    launch.run_script(importlib.import_module(name).main)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_rename(number, after):
    """SIGKILL before or after the number-th file takes its place."""
    replace, calls = os.replace, []

    def dying(*args):
        calls.append(0)
        if len(calls) == number and not after:
            _die()
        replace(*args)
        if len(calls) == number:
            _die()

    os.replace = dying


def die_in_save(number):
    """SIGKILL in the middle of writing the number-th checkpoint."""
    import io

    save, calls = torch.save, []

    def dying(content, file):
        calls.append(0)
        if len(calls) < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        _die()

    torch.save = dying


def fill_disk(saves):
    """After so many checkpoints no file can grow beyond 2 kB: a stand-in for a full disk."""
    import resource

    save, calls = torch.save, []

    def filling(content, file):
        calls.append(0)
        if len(calls) > saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        save(content, file)

    torch.save = filling


def validate_slowly(marker):
    """Each image of a validation takes a while, and leaves `marker`."""
    import data
    import evaluate
    import pretrain_encoder

    def slow(*args):
        for batch in data.in_rounds(*args):
            Path(marker).touch()
            time.sleep(0.2)
            yield batch

    evaluate.in_rounds = pretrain_encoder.in_rounds = slow


def step_slowly():
    step = torch.optim.Adam.step

    def slow(self, *args, **kwargs):
        time.sleep(0.4)
        return step(self, *args, **kwargs)

    torch.optim.Adam.step = slow


def write_image(path, height=40, width=56, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3),
                                                        dtype=np.uint8)).save(path)


def png16(path, values):
    """A PNG of 16-bit values (H, W, 1 to 4), which Pillow cannot write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(content)


def tiff(path, values):
    """An uncompressed TIFF of values (H, W, bands) of any type, as scientific programs write it."""
    height, width, bands = values.shape
    content = b"\0" * 8 + values.astype(values.dtype.newbyteorder("<")).tobytes()

    def shorts(*numbers):  # in the tag itself, or in a place that it points to
        nonlocal content
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        place, content = len(content), content + (packed if len(packed) > 4 else b"")
        return len(numbers), packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", place)

    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields = {256: shorts(width), 257: shorts(height), 258: shorts(*[8 * values.dtype.itemsize] * bands),
              259: shorts(1), 262: shorts(2 if bands >= 3 else 1), 273: (1, struct.pack("<I", 8)), 277: shorts(bands),
              278: shorts(height), 279: (1, struct.pack("<I", values.nbytes)), 339: shorts(*[kind] * bands)}
    if bands > 3:
        fields[338] = shorts(*[0] * (bands - 3))  # further bands, of no stated meaning
    tags = [struct.pack("<HHI", tag, 4 if tag in (273, 279) else 3, count) + value
            for tag, (count, value) in sorted(fields.items())]
    header = b"II*\0" + struct.pack("<I", len(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + content[8:] + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4))


def write_stack(path, pages):
    """A multi-page TIFF of uint8 pages (H, W) or (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=rest)


def write_mask(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A user's own data: images/ and masks/ with train/ and val/, three classes, odd sizes, a name with a space and an umlaut."""
    root = tmp_path / "my data"
    rng = np.random.RandomState(0)
    for part, names in (("train", ["a", "b ö", "c", "sub/d"]), ("val", ["e", "f"])):
        for i, name in enumerate(names):
            write_image(root / "images" / part / f"{name}.{('jpg', 'png')[i % 2]}", 41 + i, 57 - i, seed=i)
            write_mask(root / "masks" / part / f"{name}.png", rng.choice([0, 1, 2, 255], (41 + i, 57 - i)))
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root


def jpeg(seed, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (20, 30, 3),
                                                        dtype=np.uint8)).convert(mode).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def imagenet21k(root):
    write_tar(
        root / "n00000001.tar", {
            "n00000001_1.JPEG": jpeg(1), "README": b"no image", "n00000001_2.JPEG": jpeg(2, "L"),
            "._n00000001_1.JPEG": b"resource fork", "n00000001_" + "x" * 120 + ".JPEG": jpeg(3, "CMYK")
        })
    write_tar(root / "n00000002.tar", {"n00000002_9.JPEG": jpeg(4)[:150], "n00000002_10.JPEG": jpeg(5)})
    (root / "LICENSE.txt").write_text("not a synset")
    return root


def copy_program(folder):
    """A fresh clone of the program."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "classes", folder / "classes")


# ------------------------------------------------------------------------------------------------ reproduce.py, and workers on stages that do nothing


def reproduce_arguments(*flags):
    import reproduce

    return reproduce.parse_arguments(list(map(str, flags)))


def grid_of(*flags):
    """The grid of reproduce.py with these flags."""
    import reproduce

    args = reproduce_arguments(*flags, "--dry-run")
    sweeps = {name: table.sweep if args.sweep is None else args.sweep for name, table in args.known.items()}
    return reproduce.Grid(args, args.tables, sweeps, args.repeats)


def cell_of(grid, table, name, column):
    return next(cell for cell in grid.cells if (cell.table, cell.row.name, cell.column) == (table, name, column))


def finish(grid, run, miou=0.5):
    """Write the result of a run, as its command would."""
    path = grid.path(run.name, *run.result.split("/"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump({"miou": miou}, file)


FAKE = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
needs = [word for word in sys.argv if word.endswith("last.pt")]
assert all(map(os.path.exists, needs)), needs
if os.environ.get("FAIL") and "finetune" in sys.argv[0] and f"{os.sep}dep_" in out:
    sys.exit("finetune.py: error: a fault of this run")
while not all(os.path.exists(os.environ["RAN"] + "." + name) for name in os.environ.get("TOGETHER", "").split()):
    time.sleep(0.1)  # until these workers have begun
with open(os.environ["RAN"], "a") as file:
    file.write(f"{os.environ['WORKER']} {out}\\n")
time.sleep(float(os.environ.get("SECONDS", 0.02)))
os.makedirs(out, exist_ok=True)
open(os.path.join(out, "last.pt"), "w").close()
with open(os.path.join(out, "metrics.json.tmp"), "w") as file:
    json.dump({"miou": 0.5}, file)
os.replace(os.path.join(out, "metrics.json.tmp"), os.path.join(out, "metrics.json"))
"""


@pytest.fixture
def fake_stages(tmp_path):
    """Stages that only write down that they ran; the environment to run them in."""
    for stage in ("pretrain_encoder", "pretrain_decoder", "finetune"):
        (tmp_path / f"{stage}.py").write_text(FAKE)
    return {"RAN": str(tmp_path / "ran"), "WORKER": "here"}


@pytest.fixture
def worker(tmp_path, fake_stages):
    """worker(name, flag, ...) starts reproduce.py on fake stages in a process of its own."""
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launch, report, reproduce, workers; workers.HERE = {str(tmp_path)!r}; "
               "workers.LOOK = 0.5; report.prediction_grid = lambda *args: None; sys.argv[0] = 'reproduce.py'; "
               "import os; open(os.environ['RAN'] + '.' + os.environ['WORKER'], 'w').close(); launch.run_script(reproduce.main)")
    started = []

    def start(name, *flags, **environment):
        started.append(subprocess.Popen(
            [sys.executable, "-c", program, *map(str, flags), "--out", str(tmp_path / "out"), "--device", "cpu"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **fake_stages, "WORKER": name, **environment}))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def run_here(tmp_path, fake_stages, script, monkeypatch):
    """run_here(flag, ...) runs reproduce.py on fake stages, in this process -> (exit status, stdout, stderr)."""
    import report
    import workers

    monkeypatch.setattr(workers, "HERE", str(tmp_path))
    monkeypatch.setattr(report, "prediction_grid", lambda *args: None)
    for name, value in fake_stages.items():
        monkeypatch.setenv(name, value)
    return lambda *flags: script("reproduce", *flags, "--out", tmp_path / "out", "--device", "cpu", "--jobs", 4)


def ran(tmp_path):
    path = tmp_path / "ran"
    return [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []
