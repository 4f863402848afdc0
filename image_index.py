"""A listing of millions of images, in folders or inside .tar files that stay unopened, as one NumPy array.

    index = ImageIndex.of_folder("photos")                  # every image below a folder
    index = ImageIndex.of_synsets("imagenet21k")            # nXXXXXXXX.tar files or nXXXXXXXX folders, as ImageNet-21k is distributed
    index.name(7), index.open(7)                            # where image 7 lies; the file, or its bytes in the .tar: one pread

ImageNet-21k holds 14 million images. As Python strings their names would take gigabytes, in every process. Here an image is a
record of fixed size (about 40 bytes), a large listing is kept in a file, and all processes and loader workers of a machine map
the same file: its pages are in memory once. Nothing is held per image in Python.

The index file is one line of JSON (the folders and .tar files, each with its size, time of change and count of images), then the
records. It is used again as long as no folder and no .tar has changed; what has changed is listed anew.
"""
import hashlib
import io
import json
import os
import re
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from runtime import InputError, replacing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FOLDER = ".ddep_index"                                                    # beside the data
WORTH_KEEPING = 100_000                                                   # images; fewer are listed anew each time
SYNSET = re.compile(r"n\d{8}(\.tar)?")


class ImageIndex:
    """Images of `root`: records (N,) of (name, offset, size), grouped by container, which is a folder (offset -1) or a .tar file.

    containers: {path relative to root: [time of change in ns, size, number of images]}, in the order of the records.
    """

    def __init__(self, root, containers, records, path=None):
        self.root, self.containers, self.records, self.path = root, list(containers), records, path
        self.ends = np.cumsum([count for _, _, count in containers.values()], dtype=np.int64)

    def __len__(self):
        return len(self.records)

    def container(self, i):
        """The number of the container of image i (an int or an array of them)."""
        return np.searchsorted(self.ends, i, side="right")

    def name(self, i):
        """Image i's path relative to root; inside a .tar: the path of the .tar, then the member's name."""
        return os.path.normpath(os.path.join(self.containers[self.container(i)], os.fsdecode(self.records["name"][i])))

    def open(self, i):
        """A path, or a file object with the bytes of a member of a .tar: what PIL.Image.open takes."""
        offset, size = int(self.records["offset"][i]), int(self.records["size"][i])
        if offset < 0:
            return os.path.join(self.root, self.name(i))
        file = os.open(os.path.join(self.root, self.containers[self.container(i)]), os.O_RDONLY)
        try:
            return io.BytesIO(os.pread(file, size, offset))
        finally:
            os.close(file)

    def fingerprint(self):
        """A digest of the folders and .tar files, and of the names, places and sizes in them."""
        digest = hashlib.blake2b(json.dumps([self.containers, self.ends.tolist()]).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.records))
        return digest.hexdigest()

    def __getstate__(self):                                               # loader workers that are not forked map the file too
        return {**self.__dict__, "records": None if self.path else self.records}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path:
            self.records = _read(self.path)[1]

    @classmethod
    def of_folder(cls, root, parts=(".",), cache=None):
        """Every image below the folders root/<part>; symbolic links are followed, hidden files left out."""
        return cls._listed(root, parts, cache)

    @classmethod
    def of_synsets(cls, root, cache=None):
        """The images of every nXXXXXXXX.tar and every folder nXXXXXXXX in root."""
        synsets = sorted(entry.name for entry in os.scandir(root) if SYNSET.fullmatch(entry.name))
        twice = {f"{name}.tar" for name in synsets} & set(synsets)
        if twice:
            raise InputError(f"{root}: holds {min(twice)} and a folder of the same name, whose images would count twice; keep one of the two there")
        return cls._listed(root, ("synsets",), cache, synsets)

    @classmethod
    def _listed(cls, root, parts, cache, containers=None):
        """The index from its file, or made anew and, if it is large or a .tar is in it, written there.

        containers: their names, or None for all folders below root/<part>. Raises InputError where there is no image, for a broken
        .tar, and where an index of .tar files or in `cache` cannot be written.
        """
        key = "\0".join([os.path.realpath(root) if cache else "", *parts])
        path = os.path.join(cache or os.path.join(root, FOLDER), hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
        old, records = _read(path)
        if old and containers in (None, list(old)) and all(_stamp(root, name) == known[:2] for name, known in old.items()):
            return cls(root, old, records, path)
        starts = dict(zip(old, np.cumsum([0] + [count for _, _, count in old.values()])))

        def listing(name):
            stamp = _stamp(root, name)
            if name in old and old[name][:2] == stamp:
                return stamp, records[starts[name]:starts[name] + old[name][2]]
            return stamp, _list_tar(root, name) if os.path.isfile(os.path.join(root, name)) else _list_folder(root, name)

        names = [folder for part in parts for folder in _folders_below(root, part)] if containers is None else containers
        with ThreadPoolExecutor(16) as pool:                              # on a shared disk each look takes its time
            listed = list(tqdm(pool.map(listing, names), total=len(names), unit="folder", delay=5, desc="listing images", dynamic_ncols=True))
        total = sum(len(group) for _, group in listed)
        if not total:
            raise InputError(f"{root}: no images in this folder; expected {', '.join(EXTENSIONS)} there or below")
        records = np.concatenate([group for _, group in listed])
        records = records.astype(_dtype(int(np.char.str_len(records["name"]).max())))          # a longer name may have gone
        containers = {name: [*stamp, len(group)] for name, (stamp, group) in zip(names, listed)}
        must_keep = bool(cache) or any(os.path.isfile(os.path.join(root, name)) for name in names)           # asked for, or .tar files
        if not must_keep and total < WORTH_KEEPING:
            return cls(root, containers, records)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if "." in containers:                                         # that folder may have just been made in it
                containers["."][:2] = _stamp(root, ".")
            with replacing(path, f"{path}.{socket.gethostname()}.{os.getpid()}.tmp") as file:          # other machines may list too
                file.write(json.dumps({"dtype": records.dtype.descr, "containers": containers}).encode() + b"\n")
                file.write(records.view(np.uint8))
        except OSError as error:
            if not must_keep:                                             # folders on a read-only disk: listed each time
                return cls(root, containers, records)
            raise InputError(f"{path}: the index of the images {'is older than the data and ' if old else ''}cannot be written "
                             f"({error.strerror}); pass --cache with a folder for it") from None
        if old:
            print(f"{root}: changed since it was listed; listed again", flush=True)
        return cls(root, *_read(path), path)


def _dtype(width):
    return np.dtype([("name", f"S{width}"), ("offset", "<i8"), ("size", "<i8")])


def _as_records(rows):
    """[(name, offset, size), ...] of one container."""
    rows = [(os.fsencode(name), offset, size) for name, offset, size in rows]
    return np.array(rows, _dtype(max((len(name) for name, _, _ in rows), default=1)))


def _read(path):
    """(containers, records) of an index file, the records mapped and not read; ({}, None) where it is missing or no whole index."""
    try:
        with open(path, "rb") as file:
            head = file.readline()
        known = json.loads(head)
        dtype = np.dtype([tuple(field) for field in known["dtype"]])
        count = sum(count for _, _, count in known["containers"].values())
        if os.path.getsize(path) != len(head) + count * dtype.itemsize:
            return {}, None
        return known["containers"], np.memmap(path, dtype, "r", offset=len(head), shape=(count,))
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


def _stamp(root, name):
    """[time of change, size] of a folder or .tar: when these are the same, what is in it is taken to be the same."""
    try:
        state = os.stat(os.path.join(root, name))
    except OSError:
        return None
    return [state.st_mtime_ns, state.st_size]


def _folders_below(root, part):
    found, seen = [], set()
    for folder, subfolders, _ in os.walk(os.path.join(root, part), followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name != FOLDER)
        real = os.path.realpath(folder)
        if real in seen:                                                  # a link that points to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        found.append(os.path.relpath(folder, root))
    return found


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _list_folder(root, name):
    with os.scandir(os.path.join(root, name)) as entries:
        return _as_records([(entry, -1, 0) for entry in sorted(entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir())])


def _list_tar(root, name):
    path, rows = os.path.join(root, name), []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()                                       # tarfile would keep them all
                if member.isreg() and _is_image(member.name):
                    rows.append((member.name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):                       # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no end of archive at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a whole .tar file ({error}); fetch it again") from None
    return _as_records(rows)
