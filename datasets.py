"""The named data sets, the toy pictures, and what labelled.py and unlabelled.py share.

A pattern is a path below a root folder. Each `*` stands for any text, "/" included; a final `*` takes
pictures only. An image and its mask have the same text for each `*`.
"""
import dataclasses
import hashlib
import os
import re
import unicodedata
from functools import cache
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

import shapes
from common import UserError, refuse


class DataSet(NamedTuple):
    images: str  # pattern; {part} is train or val
    masks: str  # pattern
    places: tuple = ("",)  # where it may lie below --root
    words: tuple = ("train", "val")  # what stands for {part}
    lists: str = ""  # text files of the images of a part


CONTEXT = DataSet("JPEGImages/*.jpg", "SegmentationClassContext/*.png", ("", "VOC2010", "VOCdevkit/VOC2010"),
                  lists="ImageSets/SegmentationContext/{part}.txt")
DATA_SETS = {  # their classes and mask values are in classes/
    "folder": DataSet("images/{part}/*", "masks/{part}/*"),
    "cityscapes": DataSet("leftImg8bit/{part}/*_leftImg8bit.png", "gtFine/{part}/*_gtFine_labelIds.png"),
    "pascal_context": CONTEXT,  # PAPER SILENT on 59 classes (no background) or 60
    "pascal_context_60": CONTEXT,
    "ade20k": DataSet("images/{part}/*.jpg", "annotations/{part}/*.png", ("", "ADEChallengeData2016"),
                      ("training", "validation")),
    "voc": DataSet("JPEGImages/*.jpg", "SegmentationClass/*.png", ("", "VOC20??", "VOCdevkit/VOC20??"),
                   lists="ImageSets/Segmentation/{part}.txt"),  # PAPER SILENT on evaluation on VOC
}
LABELLED = ("shapes", *DATA_SETS)  # stage 3
UNLABELLED = (*LABELLED, "cityscapes_coarse", "imagenet21k")  # stage 2
CLASSIFIED = ("shapes", "folder", "imagenet21k")  # stage 1
SHAPES_COUNTS = {"encoder_train": 4000, "unlabelled": 4000, "train": 512, "val": 100}
DATA_FLAGS = ("root", "images", "masks", "train_list", "val_list", "val_fraction")


# ---- Sources


@dataclasses.dataclass
class Source:
    """Pictures by number. Subclasses add name(i) and read(i); see data.py."""
    rows: list
    note: str       # what was found
    folders: list   # where the files lie

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        """What a resumed run compares. The checksum is of all names, in order."""
        rows = self.rows if isinstance(self.rows, np.ndarray) else repr(self.rows).encode()
        checksum = hashlib.sha256(rows).hexdigest()[:12]
        return f"{len(self)} images, {self.name(0)} to {self.name(len(self) - 1)}, checksum {checksum}"

    def subset(self, chosen):
        return dataclasses.replace(self, rows=[self.rows[i] for i in chosen])

    def keep_out(self, flag, path):
        """UserError if an output would lie among these pictures."""
        for folder in self.folders:
            if Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise UserError(f"{flag} {path}: lies among the pictures in {folder}; pass one outside")


draw = cache(shapes.draw)


class Shapes(Source):
    """Toy pictures; a row is (part, index)."""

    def name(self, i):
        return "{}-{:05d}".format(*self.rows[i])

    def read(self, i):
        part, index = self.rows[i]
        image, mask, label = draw(part, index)
        sample = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))}
        if part == "encoder_train":
            sample["label"] = label
        elif part != "unlabelled":
            sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
        return sample


def all_shapes(args, part):
    refuse(args, DATA_FLAGS, "on shapes")
    rows = [(part, i) for i in range(SHAPES_COUNTS[part])]
    return Shapes(rows, f"{len(rows)} toy pictures", folders=[])


# ---- Finding files

PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
HIDDEN = ("__MACOSX", "lost+found")


def home(args, places=("",), folder=""):
    """--root, or the one of `places` below it that holds `folder`."""
    if args.root is None:
        raise UserError(f"--data {args.data} needs a folder; pass --root DIR")
    paths = [path for place in places for path in glob(f"{escape(args.root)}/{place}".rstrip("/"))]
    found = [path for path in paths if Path(path, folder).is_dir()]
    if not found:
        raise UserError(f"--root {args.root}: no folder {folder or '.'}; see --root, --images, --masks")
    if len(found) > 1:
        raise UserError(f"--root {args.root}: holds {found}; pass one")
    return found[0]


def files_below(root, folder):
    """Yield (folder, its file names) for root/folder ("" or ending with "/") and all below, sorted, without
    hidden ones. Links are followed."""
    names, folders = [], []
    for entry in sorted(os.scandir(Path(root, folder)), key=lambda entry: entry.name):
        if entry.name[0] in ".@" or entry.name in HIDDEN:
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path}: a dead link; delete it")
        if entry.is_dir():
            folders.append(f"{folder}{entry.name}/")
        else:
            names.append(entry.name)
    yield folder, names
    for inner in folders:
        yield from files_below(root, inner)


def plain(path):
    """A path in one spelling: "ü" can be one character or two."""
    return unicodedata.normalize("NFC", path.replace("\\", "/").removeprefix("./"))


def folder_of(pattern):
    """The folder of all matches: "" or ending with "/"."""
    start = pattern.partition("*")[0]
    return start[:start.rfind("/") + 1]


def form_of(pattern):
    """A regular expression with a group for each `*`."""
    parts = [re.escape(part) for part in pattern.split("*")]
    if len(parts) == 1:
        raise UserError(f"{pattern}: expected a *, as in images/*.jpg")
    if not parts[-1]:
        parts[-1] = f"(?i:{'|'.join(map(re.escape, PICTURES))})"
    return re.compile("(.*)".join(parts))


def left_out(count, example):
    """A note on the files that do not match."""
    return f"; left out {count} files, such as {example}" if count else ""
