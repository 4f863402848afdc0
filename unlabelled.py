"""Pictures for stages 1 and 2: millions, in folders or .tar files.

Their list, an array of records in torch.hub's cache folder, is mapped into memory: as str, the names would
take gigabytes in every process.
"""
import hashlib
import os
import platform
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from glob import glob
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torchvision import tv_tensors

import common
import shapes
from common import UserError
from data import read_image
from datasets import (DATA_SETS, PICTURES, Source, all_shapes, files_below, folder_of, form_of, home,
                      left_out, plain)

NO_CLASSES = {"images", "masks", "train", "training", "val", "valid", "validation", "test", "testing"}


def pretraining_images(args):
    """The source for stage 2."""
    if args.data == "shapes":
        return all_shapes(args, "unlabelled")
    if args.data == "imagenet21k":
        return in_classes(args)[0]
    row = DATA_SETS[args.data.removesuffix("_coarse")]
    pattern = plain(args.images or row.images)
    if args.data == "folder" and args.images is None:
        pattern = "images/*" if os.path.isdir(f"{args.root}/images") else "*"
    patterns = [pattern.replace("{part}", row.words[0])]
    if args.data == "cityscapes_coarse" and "{part}" in pattern:  # Table 3: "fine & coarse"
        patterns.append(pattern.replace("{part}", "train_extra"))
    return picture_list(home(args, row.places, folder_of(patterns[0])), patterns)


def classification_images(args):
    """(source, class names) for stage 1."""
    if args.data == "shapes":
        return all_shapes(args, "encoder_train"), [*shapes.CLASSES[1:]]
    source, tars = in_classes(args)
    if tars:
        names = [Path(tar).stem for tar in tars]
        others = [name for name in names if not re.fullmatch(r"n\d+", name)]  # such as shards
        if others:
            raise UserError(f"{source.root}/{others[0]}.tar: expected n and digits, or class folders")
    else:
        start = folder_of(plain(args.images or "*"))
        _, firsts = np.unique(source.rows["label"], return_index=True)
        names = [class_of(source.name(i), start) or "." for i in firsts]
        if "." in names or NO_CLASSES & {re.sub("[^a-z]", "", name.lower()) for name in names}:
            raise UserError(f"{source.root}: pictures in {names[:8]}, expected class folders; see --root")
    if len(names) < 2:
        raise UserError(f"{source.root}: one class, {names[0]}, expected two or more")
    return source, names


def in_classes(args):
    """(source, .tar files). Classes are folders or, in ImageNet-21k, .tar files, in --root or its train/."""
    root = home(args)
    if os.path.isdir(f"{root}/train"):
        root += "/train"
    tars = sorted(glob("*.tar", root_dir=root)) if args.data == "imagenet21k" else []
    if tars:
        common.refuse(args, ["images"], "on .tar files")
    return picture_list(root, [plain(args.images or "*")], tars), tars


# ---- The list


class PictureList(Source):
    """Pictures by records in a file: (path below root as bytes, offset, size, label).

    size: bytes in a .tar file, from offset on; -1 for a file. label: of the .tar file or class folder.
    """

    def __init__(self, npy, root, folders, note=""):
        rows = np.load(npy, mmap_mode="r")
        super().__init__(rows, f"{len(rows)} pictures in {root}{note}", folders)
        self.npy, self.root = npy, root

    def __reduce__(self):  # a worker that is not forked gets the path
        return PictureList, (self.npy, self.root, self.folders)

    def name(self, i):
        path, offset, size, _ = self.rows[i].tolist()
        name = os.fsdecode(path)
        return name if size < 0 else f"{name}, byte {offset}"

    def read(self, i):
        path, offset, size, label = self.rows[i].tolist()
        file = Path(self.root, os.fsdecode(path))
        if size >= 0:
            with open(file, "rb") as tar:
                tar.seek(offset)
                file = BytesIO(tar.read(size))
        image = read_image(file, Path(self.root, self.name(i)))
        return {"image": tv_tensors.Image(image), "label": label}


def picture_list(root, patterns, tars=()):
    """A PictureList of what matches a pattern below root, or is in .tar files."""
    known = [platform.node(), os.path.abspath(root), patterns]  # machines may share the cache
    for tar in tars:
        status = os.stat(f"{root}/{tar}")
        known.append((tar, status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    cache, note = torch.hub.get_dir(), ""
    npy = f"{cache}/pictures_{digest}.npy"
    # Folders are listed in each run, by a machine's first process: files may be new
    if not os.path.exists(npy) or (not tars and common.is_local_first()):
        os.makedirs(cache, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:  # first, in case the cache is read-only
            rows, note = list_tars(root, tars) if tars else list_folders(root, patterns)
            np.save(f"{folder}/rows.npy", rows)
            os.replace(f"{folder}/rows.npy", npy)
    folders = [] if tars else [Path(root, folder_of(pattern)) for pattern in patterns]
    return PictureList(npy, root, folders, note)


def records(paths, offset, size, label):
    rows = np.empty(len(paths), [("path", paths.dtype), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
    rows["path"], rows["offset"], rows["size"], rows["label"] = paths, offset, size, label
    return rows


def list_folders(root, patterns):
    """(records, a note on them)."""
    chunks, labels, shown, others, example = [], {}, [], 0, ""
    for pattern in patterns:
        start, form, before = folder_of(pattern), form_of(pattern), len(chunks)
        for folder, files in common.progress(files_below(root, start), unit=" folders", delay=1):
            names = [name for name in files if form.fullmatch(plain(folder + name))]
            if names:
                label = labels.setdefault(class_of(folder, start), len(labels))
                chunks.append(records(np.array([os.fsencode(folder + name) for name in names]), 0, -1, label))
                text = f"{folder.rstrip('/') or '.'} {len(names)}: {names[0]} to {names[-1]}"
                shown.append((-len(names), text))
            if len(names) < len(files):
                others += len(files) - len(names)
                example = example or folder + min({*files} - {*names})
        if len(chunks) == before:
            raise UserError(f"{root}: no pictures match {pattern}{left_out(others, example)}; see --images")
    largest = "; ".join(text for _, text in sorted(shown)[:8])
    more = "; ..." if len(shown) > 8 else ""
    return np.concatenate(chunks), f" ({largest}{more}){left_out(others, example)}"


def class_of(path, start):
    """The folder right below `start` on a picture's path, "" if there is none."""
    folder, slash, _ = path.removeprefix(start).partition("/")
    return folder if slash else ""


def list_tars(root, tars):
    with ProcessPoolExecutor(min(16, len(tars))) as pool:  # threads would wait for each other
        found = pool.map(tar_members, [f"{root}/{tar}" for tar in tars])
        found = list(common.progress(found, total=len(tars), unit=" .tar", delay=1))
    chunks = [records(np.full(len(members), os.fsencode(tar)), *members.T, label)
              for label, (tar, members) in enumerate(zip(tars, found))]
    return np.concatenate(chunks), ""


def tar_members(path):
    """An array (N, 2): offset and size in bytes of each picture."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [member for member in tar if member.isreg()]
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole .tar file ({error}); download it again") from None
    pictures = [(file.offset_data, file.size) for file in files if is_picture(file.name)]
    if not pictures:
        raise UserError(f"{path}: no pictures, expected those of a class")
    return np.array(pictures)


def is_picture(path):
    name = path.rpartition("/")[2]
    return os.path.splitext(name)[1].lower() in PICTURES and name[0] not in ".@"
