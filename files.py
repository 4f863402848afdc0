"""Finding files: by patterns, by text files that select them, in .tar files. What they mean is in datasets.py.

PATTERNS are paths below a root folder, with "/" on every system. A `*` may span folders; behind a last one the
ending of any picture will do. What the `*` stand for is what an image and its mask have in common.
"""
import hashlib
import mmap
import os
import re
import tarfile
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import common
from common import UserError

PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
HIDDEN = ("__MACOSX", "lost+found")  # beside all that begins with "." or "@"


def files_below(root, folder):
    """(folder, names of its files) of root/folder and of each folder in it, sorted.

    A folder is "" or ends with "/". Hidden ones are left out. Links are followed; one that leads nowhere is an error.
    """
    with os.scandir(os.path.join(root, folder)) as entries:
        entries = sorted((entry for entry in entries if entry.name[0] not in ".@" and entry.name not in HIDDEN),
                         key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path}: a link that leads nowhere; mend or delete it")
    yield folder, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from files_below(root, f"{folder}{entry.name}/")


def is_picture(name):
    return f".{name.rpartition('.')[2].lower()}" in PICTURES and name[0] not in ".@"


def plain(path):
    """A path or pattern as people and lists write it, made comparable ("ü" may be one character or two)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").removeprefix("./"))


def form_of(pattern):
    """(the folder in which all matches lie, a regular expression of their paths with a group for each `*`)."""
    parts = [re.escape(part) for part in pattern.split("*")]
    if len(parts) == 1:
        raise UserError(f"{pattern}: expected a pattern with a *, such as images/*.jpg")
    parts[-1] = parts[-1] or f"(?i:{'|'.join(map(re.escape, PICTURES))})"
    return "".join(pattern.partition("*")[0].rpartition("/")[:2]), re.compile("(.*)".join(parts))


def read_lines(path):
    text = Path(path).read_text("utf-8-sig", "surrogateescape")
    return [line.strip() for line in text.splitlines() if line.strip()]


# ---------------------------------------- Images and their masks


class Pair(NamedTuple):
    star: str   # what the `*` stand for
    image: str  # path below the root, or None
    mask: str   # the same


def find_pairs(root, images, masks):
    """([Pair, ...] of all that matches one of two patterns, other pictures beside the images)."""
    mask_of, _ = matches(root, masks)
    image_of, others = matches(root, images, without={*mask_of.values()})
    return [Pair(star, image_of.get(star), mask_of.get(star)) for star in {**image_of, **mask_of}], others


def matches(root, pattern, without=()):
    """({what the `*` stand for: path}, other pictures beside them); nothing where the folder is missing."""
    folder, form = form_of(pattern)
    found, others = {}, []
    for folder, names in files_below(root, folder) if os.path.isdir(os.path.join(root, folder)) else ():
        for path in (folder + name for name in names if folder + name not in without):
            match = form.fullmatch(plain(path))
            if not match:
                others += [path] * is_picture(path.rpartition("/")[2])
            elif found.setdefault(star := "/".join(match.groups()), path) != path:
                raise UserError(f"{root}/{path} and {found[star]}: expected one file for both")
    return found, others


def select(list_file, pairs, own):
    """The pairs that a text file selects, in the order of its lines.

    The first word of a line names an image, since published lists hold pairs: by its path (folders before it do
    not matter), by what `*` stands for, or by an ending of these that no other image has. Of several with one
    `*` that in `own` is meant.
    """
    by_path = {plain(pair.image): pair for pair in pairs}
    by_star = {pair.star: pair for pair in [*pairs, *own]}
    by_ending = {}
    for pair in pairs:
        for name in {*endings(plain(pair.image)), *endings(pair.star)}:
            by_ending[name] = None if name in by_ending else pair
    chosen = {}
    for number, line in enumerate(read_lines(list_file), start=1):
        words = [plain(word).lstrip("/") for word in (line, line.split("\t")[0], line.split()[0])]
        found = [table.get(word) for table in (by_path, by_star, by_ending) for word in words]
        found += [by_path.get(ending) for word in words for ending in endings(word)]
        pair = next(filter(None, found), None)
        if pair is None or pair in chosen:
            raise UserError(f"{list_file}, line {number}: {line!r} {'twice' if pair else 'is not one image'}; "
                            "expected paths below --root, or what * stands for in --images")
        chosen[pair] = line
    if not chosen:
        raise UserError(f"{list_file}: no line in it; expected an image a line")
    return list(chosen)


def endings(path):
    """The path, then what is left of it without its first folder, its first two ..."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


# ---------------------------------------- Millions of pictures


def list_pictures(root, patterns, tars=()):
    """(the path of a .npy file of records, a note): all pictures that match, or those in .tar files of root.

    A record is (path below root as bytes, offset, size, label); size -1: all of the file. The label is the
    number of the folder right below the pattern's, or of the .tar. One process of a machine lists them, folders
    in each run anew (common.local_first), into torch.hub's cache folder; the others get the path alone.
    """
    known = patterns, [(tar, os.path.getsize(f"{root}/{tar}")) for tar in tars] or os.path.abspath(root)
    digest = hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path, note = os.path.join(torch.hub.get_dir(), f"pictures_{digest}.npy"), ""
    if not os.path.exists(path) or not tars and common.is_local_first():
        os.makedirs(torch.hub.get_dir(), exist_ok=True)
        with TemporaryDirectory(dir=torch.hub.get_dir()) as folder:  # before the work: it may be forbidden
            rows, note = list_tars(root, tars) if tars else list_folders(root, patterns)
            np.save(f"{folder}/rows.npy", rows)
            os.replace(f"{folder}/rows.npy", path)
    return path, note


def records(paths, offset, size, label):
    """paths: an array of bytes; the others: arrays as long, or numbers."""
    rows = np.empty(len(paths), [("path", paths.dtype), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
    rows["path"], rows["offset"], rows["size"], rows["label"] = paths, offset, size, label
    return rows


def list_folders(root, patterns):
    """(records of the pictures that match, a note of where they lie)."""
    chunks, labels, shown, others = [], {}, [], []
    for pattern in patterns:
        start, form = form_of(pattern)
        for folder, names in common.progress(files_below(root, start), unit=" folders", delay=1):
            taken = [name for name in names if form.fullmatch(plain(folder + name))]
            others += [folder + name for name in {*names} - {*taken}]
            if taken:
                label = labels.setdefault(folder[len(start):].partition("/")[0], len(labels))
                chunks.append(records(np.array([os.fsencode(folder + name) for name in taken]), 0, -1, label))
                text = f"{folder.rstrip('/') or '.'} {len(taken)}: {taken[0]} to {taken[-1]}"
                shown.append((-len(taken), text))
    if not chunks:
        raise UserError(f"{root}: no pictures in it (looked for {' and '.join(patterns)})")
    note = f" ({'; '.join(text for _, text in sorted(shown)[:8])}{'; ...' * (len(shown) > 8)})"
    note += f"; left out {len(others)} other files, such as {min(others)}" if others else ""
    return np.concatenate(chunks), note


def list_tars(root, tars):
    """(records of the pictures in .tar files, "")."""
    with ProcessPoolExecutor(16) as pool:  # threads would wait for each other, one process for a cold disk
        found = pool.map(tar_members, [f"{root}/{tar}" for tar in tars])
        found = list(common.progress(found, total=len(tars), unit=" .tar", delay=1))
    chunks = [records(np.full(len(members), os.fsencode(tar)), *members.T, label)
              for label, (tar, members) in enumerate(zip(tars, found))]
    return np.concatenate(chunks), ""


def tar_members(path):
    """An array (N, 2), offset and size of the pictures in a .tar file. Plain headers are read here, since
    tarfile takes ten times as long; where there is any other it reads the whole file."""
    found, at, end = [], 0, b""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            while tar[at + 257:at + 262] == b"ustar" and tar[at + 156] in b"0\0":
                name, size = tar[at:at + 100].partition(b"\0")[0], int(tar[at + 124:at + 135], 8)
                found.append((name.decode(errors="replace"), at + 512, size))
                at += 512 + (size + 511) // 512 * 512
            end = tar[at:at + 512]
    except ValueError:  # an empty file, or a size that is no number
        pass
    if end != bytes(512):
        try:
            with tarfile.open(path, "r:") as tar:
                found = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                    raise tarfile.ReadError("its end is missing")
        except tarfile.TarError as error:
            raise UserError(f"{path}: not a whole .tar file ({error}); download it again") from None
    pictures = [(offset, size) for name, offset, size in found if is_picture(name.rpartition("/")[2])]
    if not pictures:
        raise UserError(f"{path}: no pictures in it; expected those of one class")
    return np.array(pictures)
