"""Find files: by patterns, by text files that list them, and in .tar files.

A pattern is a path below a root folder, with "/" on every system. Each `*` stands for any text, "/" included;
at the end it needs the ending of a picture. An image and its mask have the same text for each `*`.
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
HIDDEN = ("__MACOSX", "lost+found")  # and all names that begin with "." or "@"


def files_below(root, folder):
    """Yield (folder, its file names) for root/folder ("" or ending with "/") and all folders in it, sorted,
    without hidden ones. Links are followed."""
    with os.scandir(Path(root, folder)) as entries:
        entries = [entry for entry in entries if entry.name[0] not in ".@" and entry.name not in HIDDEN]
    entries.sort(key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path}: a link that leads nowhere; repair or delete it")
    yield folder, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from files_below(root, f"{folder}{entry.name}/")


def is_picture(path):
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" in PICTURES and name[0] not in ".@"


def plain(path):
    """A path in one spelling: "ü" may be one character or two."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").removeprefix("./"))


def form_of(pattern):
    """(the folder of all matches, a regular expression with a group for each `*`)."""
    parts = [re.escape(part) for part in pattern.split("*")]
    if len(parts) == 1:
        raise UserError(f"{pattern}: expected a pattern with a *, such as images/*.jpg")
    parts[-1] = parts[-1] or f"(?i:{'|'.join(map(re.escape, PICTURES))})"
    return "".join(pattern.partition("*")[0].rpartition("/")[:2]), re.compile("(.*)".join(parts))


def read_lines(path):
    text = Path(path).read_text("utf-8-sig", "surrogateescape")
    return [line.strip() for line in text.splitlines() if line.strip()]


# ---- Images and their masks


class Pair(NamedTuple):
    star: str   # the text for the `*`
    image: str  # path below the root, or None
    mask: str   # the same


def find_pairs(root, images, masks):
    """([Pair, ...], other pictures in the folder of the images)."""
    mask_of, _ = matches(root, masks)
    image_of, others = matches(root, images, without={*mask_of.values()})
    return [Pair(star, image_of.get(star), mask_of.get(star)) for star in {**image_of, **mask_of}], others


def matches(root, pattern, without=()):
    """({text for the `*`: path}, other pictures in the folder), both empty if there is no folder."""
    start, form = form_of(pattern)
    found, others = {}, []
    if not Path(root, start).is_dir():
        return found, others
    for folder, names in files_below(root, start):
        for path in (folder + name for name in names if folder + name not in without):
            match = form.fullmatch(plain(path))
            if match:
                star = "/".join(match.groups())
                if star in found:
                    raise UserError(f"{root}/{path} and {found[star]}: both match {pattern}; delete one")
                found[star] = path
            elif is_picture(path):
                others.append(path)
    return found, others


def select(list_file, pairs, own):
    """The pairs that a text file lists, in its order.

    A line names one image: by its path (after any other folders), by the text for `*`, or by a unique end of
    either. Its mask may follow after a tab or space. Of several images with one text for `*`, the one in
    `own` is meant.
    """
    by_path, by_ending, chosen = {plain(pair.image): pair for pair in pairs}, {}, {}
    for pair in pairs:
        for ending in {*endings(plain(pair.image)), *endings(pair.star)}:
            by_ending[ending] = None if ending in by_ending else pair
    known = {**by_ending, **{pair.star: pair for pair in [*pairs, *own] if pair.image}, **by_path}
    for number, line in enumerate(read_lines(list_file), start=1):
        names = [plain(name).lstrip("/") for name in (line, line.split("\t")[0], line.split()[0])]
        found = [known.get(name) for name in names]
        found += [by_path.get(ending) for name in names for ending in endings(name)]
        pair = next(filter(None, found), None)
        if pair is None or pair in chosen:
            problem = "again" if pair else "is not one image"
            raise UserError(f"{list_file}, line {number}: {line!r} {problem}; expected each image once, by "
                            "its path below --root or its text for *")
        chosen[pair] = None  # in a dict, which is searched fast
    if not chosen:
        raise UserError(f"{list_file}: empty; expected one image per line")
    return list(chosen)


def endings(path):
    """a/b/c -> [a/b/c, b/c, c]."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


# ---- Millions of pictures


def list_pictures(root, patterns, tars=()):
    """List all pictures that match, or those in .tar files: (path of a .npy file of records, a note).

    A record is (path below root as bytes, offset, size, label); size -1: the whole file. Labels number the
    .tar files or the folders right below the pattern's. The first process of a machine makes the file, in
    torch.hub's cache; the others find it and get an empty note.
    """
    sizes = [(tar, os.path.getsize(f"{root}/{tar}")) for tar in tars]
    known = repr((patterns, sizes or os.path.abspath(root))).encode("utf-8", "surrogateescape")
    cache, note = torch.hub.get_dir(), ""
    path = f"{cache}/pictures_{hashlib.sha256(known).hexdigest()[:16]}.npy"
    # Folders are listed in each run, since files in them may be new
    if not os.path.exists(path) or (not tars and common.is_local_first()):
        os.makedirs(cache, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:  # before the listing, in case the cache is read-only
            rows, note = list_tars(root, tars) if tars else list_folders(root, patterns)
            np.save(f"{folder}/rows.npy", rows)
            os.replace(f"{folder}/rows.npy", path)
    return path, note


def records(paths, offset, size, label):
    rows = np.empty(len(paths), [("path", paths.dtype), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
    rows["path"], rows["offset"], rows["size"], rows["label"] = paths, offset, size, label
    return rows


def list_folders(root, patterns):
    """(records, a note that says where they lie)."""
    chunks, labels, shown = [], {}, []
    for pattern in patterns:
        start, form = form_of(pattern)
        for folder, names in common.progress(files_below(root, start), unit=" folders", delay=1):
            names = [name for name in names if form.fullmatch(plain(folder + name))]
            if names:
                label = labels.setdefault(folder[len(start):].partition("/")[0], len(labels))
                chunks.append(records(np.array([os.fsencode(folder + name) for name in names]), 0, -1, label))
                text = f"{folder.rstrip('/') or '.'} {len(names)}: {names[0]} to {names[-1]}"
                shown.append((-len(names), text))
    if not chunks:
        raise UserError(f"{root}: no pictures match {' and '.join(patterns)}; see --root and --images")
    largest = "; ".join(text for _, text in sorted(shown)[:8])
    return np.concatenate(chunks), f" ({largest}{'; ...' * (len(shown) > 8)})"


def list_tars(root, tars):
    with ProcessPoolExecutor(16) as pool:  # one process would wait for the disk, threads for each other
        found = pool.map(tar_members, [f"{root}/{tar}" for tar in tars])
        found = list(common.progress(found, total=len(tars), unit=" .tar", delay=1))
    chunks = [records(np.full(len(members), os.fsencode(tar)), *members.T, label)
              for label, (tar, members) in enumerate(zip(tars, found))]
    return np.concatenate(chunks), ""


def tar_members(path):
    """An array (N, 2): offset and size in bytes of each picture in a .tar file.

    Plain headers are read here, ten times as fast as by tarfile, which reads the file if it has others.
    """
    found, at, end = [], 0, b""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            while tar[at + 257:at + 262] == b"ustar" and tar[at + 156] in b"0\0":
                name, size = tar[at:at + 100].partition(b"\0")[0], int(tar[at + 124:at + 135], 8)
                found.append((name.decode(errors="replace"), at + 512, size))
                at += 512 + (size + 511) // 512 * 512
            end = tar[at:at + 512]
    except ValueError:  # an empty file or a broken size
        pass
    if end != bytes(512):
        try:
            with tarfile.open(path, "r:") as tar:
                found = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512) != bytes(512):  # tarfile stops at a broken header as at the end
                    raise tarfile.ReadError("its end is missing")
        except tarfile.TarError as error:
            raise UserError(f"{path}: not a whole .tar file ({error}); download it again") from None
    pictures = [(offset, size) for name, offset, size in found if is_picture(name)]
    if not pictures:
        raise UserError(f"{path}: no pictures in it; expected those of one class")
    return np.array(pictures)
