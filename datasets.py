"""The data sets by name, as they are distributed. Nothing has to be converted, renamed or unpacked.

    python datasets.py --data cityscapes --root cityscapes                                  # lists the pairs
    python datasets.py --data cityscapes --root cityscapes --fraction 1/8 > labelled.txt    # a label subset

A source is what a stage reads: len(source), source.name(i), source.image(i) as it is in its file,
source.read(i) -> {"image": ..., "mask" or "label": ...}. source.note says in lines what is unusual about it,
or is empty; source.fingerprint() tells it from others.

To add a labelled set: write a class like those below (its files, label map, names, colours, official counts,
and what is special in fine-tuning and evaluation), and enter it in DATA_SETS.
"""
import argparse
import hashlib
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision import tv_tensors
from tqdm import tqdm

import launch
import shapes
from data import (IGNORE, RANGES, SYNSET, WORTH_KEEPING, ImageIndex, Pixels, UnreadableImage, digest_of_files,
                  label_map, mask_values, read_image, read_mask, split_page, values_text, walk)
from launch import InputError, SampleError
from pictures import palette

MULTI_SCALE = dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75])  # 5.1


# ---------------------------------------- Sources


class ImageFiles:
    """Pictures of an ImageIndex, without labels or, for stage 1, with one each.

    chosen: the numbers of some of them. classes: the class of each of the index's containers.
    """

    def __init__(self, index, chosen=None, classes=None, note="", pixels=Pixels()):
        self.index, self.chosen, self.classes, self.note, self.pixels = index, chosen, classes, note, pixels

    def __len__(self):
        return len(self.index if self.chosen is None else self.chosen)

    def _number(self, i):
        return i if self.chosen is None else int(self.chosen[i])

    def name(self, i):
        return self.index.name(self._number(i))

    def fingerprint(self):
        return f"{len(self)} images, {self.index.fingerprint()}"

    def content(self):
        """A digest of the files' sizes; "" for millions, and in .tar files: the fingerprint has their sizes."""
        if len(self) >= WORTH_KEEPING:
            return ""
        paths = [os.path.join(self.index.root, self.name(i)) for i in range(len(self))]
        are_files = all(os.path.isfile(split_page(path)[0]) for path in paths)
        return digest_of_files(paths) if are_files else ""

    def image(self, i):
        number = self._number(i)
        path = os.path.join(self.index.root, self.index.name(number))
        try:
            file = self.index.open(number)
        except OSError as error:
            raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from None
        return read_image(file, path, self.pixels)

    def read(self, i):
        sample = {"image": tv_tensors.Image(self.image(i))}
        if self.classes is not None:
            sample["label"] = int(self.classes[self.index.container(self._number(i))])
        return sample


class Pairs:
    """Pictures with masks: [(image path, mask path or None), ...] below root.

    label_maps: {ending of a mask's name: what its values mean}, see read_mask.
    """

    def __init__(self, root, pairs, label_maps, note="", pixels=Pixels()):
        self.root, self.pairs, self.label_maps, self.note = str(root), pairs, label_maps, note
        self.pixels = pixels

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    def line(self, i):
        """The pair as a line of a list file."""
        return "\t".join(self.pairs[i])

    def fingerprint(self):
        return f"{len(self)} pairs, {_digest(self.line(i) for i in range(len(self)))}"

    def content(self):
        """A digest of the masks and of parts of the images."""
        images, masks = ([os.path.join(self.root, path) for path in paths] for paths in zip(*self.pairs))
        return f"{digest_of_files(images, parts=True)} {digest_of_files(masks, whole=True)}"

    def meaning(self):
        """A digest of what the mask values mean."""
        return _digest(f"{ending} {labels if isinstance(labels, dict) else labels.tolist()}"
                       for ending, labels in self.label_maps.items())

    def subset(self, indices, note=""):
        return Pairs(self.root, [self.pairs[i] for i in indices], self.label_maps, note, self.pixels)

    def image(self, i):
        return read_image(os.path.join(self.root, self.pairs[i][0]), pixels=self.pixels)

    def read(self, i):
        if self.pairs[i][1] is None:
            return {"image": tv_tensors.Image(self.image(i))}
        image_path, mask_path = (os.path.join(self.root, path) for path in self.pairs[i])
        labels = [labels for ending, labels in self.label_maps.items() if mask_path.endswith(ending)]
        if not labels:
            raise SampleError(f"{mask_path}: unknown kind of mask, expected a name that ends with "
                              f"{' or '.join(self.label_maps)}")
        image, mask = self.image(i), read_mask(mask_path, labels[0])
        if image.shape[1:] != mask.shape:
            raise SampleError(f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, its image {image_path} "
                              f"is {image.shape[2]}x{image.shape[1]} (upright); expected the same size")
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}


class Shapes:
    """`count` pictures of a part of the embedded data, drawn once and kept in memory (see shapes.py)."""
    note, pixels = "", Pixels()

    def __init__(self, part, count=None, indices=None):
        self.part, self.indices, self.cache = part, range(count) if indices is None else indices, {}

    def __len__(self):
        return len(self.indices)

    def name(self, i):
        return f"{self.part}-{self.indices[i]:05d}"

    def line(self, i):
        return self.name(i)

    def meaning(self):
        return "as drawn"

    def content(self):
        return ""

    def fingerprint(self):
        return f"{len(self)} pictures, {_digest(self.name(i) for i in range(len(self)))}"

    def subset(self, indices, note=""):
        return Shapes(self.part, indices=[self.indices[i] for i in indices])

    def read(self, i):
        if i not in self.cache:
            self.cache[i] = shapes.draw(self.part, self.indices[i])
        image, mask, label = self.cache[i]
        sample = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))}
        if self.part.startswith("encoder"):
            sample["label"] = label
        elif self.part != "unlabelled":
            sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
        return sample


def _digest(lines):
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


# ---------------------------------------- The labelled data sets of the paper, a class each


def read_classes(name):
    """(names, colours (N, 3) uint8) of classes/<name>.txt: a line `R G B name` for each class, in order."""
    path = Path(__file__).with_name("classes") / f"{name}.txt"
    rows = [line.split(maxsplit=3) for line in path.read_text().splitlines()]
    return [row[3] for row in rows], np.array([row[:3] for row in rows]).astype(np.uint8)


class DataSet:
    """A data set below `root`. The docstring of a class says where its files lie."""
    pair = None  # (image, mask) of a name in a list, where the set's own lists hold names
    counts = {}  # official numbers of images
    finetuning, evaluation = {}, {}  # defaults of finetune.py and evaluate.py
    places = ["."]  # root, or a folder in it

    def __init__(self, root, num_classes=None):
        self.base = self.find(root, self.folders)
        self.names, _ = self.classes()

    @classmethod
    def find(cls, root, folders):
        """root, or its subfolder of `places`, which must hold all of `folders`."""
        bases = [os.path.normpath(os.path.join(root, place)) for place in cls.places]
        base = next((base for base in bases if os.path.isdir(os.path.join(base, folders[0]))), root)
        for folder in folders:
            if not os.path.isdir(os.path.join(base, folder)):
                raise InputError(f"{root}: no folder {folder} in it; expected {cls.__doc__}")
        return base

    @classmethod
    def pretraining_folders(cls, coarse):
        """(folders whose images stage 2 takes, their official number)."""
        return cls.folders[:1], cls.counts.get("train")


class Cityscapes(DataSet):
    """leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png"""
    folders = ["leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"]
    counts = {"train": 2975, "val": 500, "train_extra": 19_998}
    finetuning = dict(crop_size=1024, micro_batch=2)  # 5.1
    evaluation = dict(window=1024)  # 5.1: two halves of 1024x2048

    @staticmethod
    def classes():
        """(names, colours (N, 3) uint8), in the order of the trainIds."""
        trained = [c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < IGNORE]
        return [c.name for c in trained], np.array([c.color for c in trained], np.uint8)

    def __init__(self, root, num_classes=None):
        super().__init__(root)
        ids = {c.id: min(c.train_id, IGNORE) for c in torchvision.datasets.Cityscapes.classes if c.id >= 0}
        train_ids = {i: i for i in range(19)}  # such masks are made by users
        self.label_maps = {"_labelIds.png": label_map(ids), "_labelTrainIds.png": label_map(train_ids)}

    @classmethod
    def pretraining_folders(cls, coarse):
        parts = ["train", "train_extra"] if coarse else ["train"]  # Table 3: "fine & coarse"
        return [f"leftImg8bit/{part}" for part in parts], sum(cls.counts[part] for part in parts)

    def pairs(self, part):
        folder, pairs = os.path.join(self.base, "leftImg8bit", part), []
        for image in _files_below(folder, "_leftImg8bit.png"):
            stem = os.path.join("gtFine", part, image.removesuffix("_leftImg8bit.png") + "_gtFine")
            masks = [stem + ending for ending in self.label_maps]
            masks = [mask for mask in masks if os.path.isfile(os.path.join(self.base, mask))]
            if not masks:
                raise InputError(f"{os.path.join(folder, image)}: no mask for this image; expected "
                                 f"{os.path.join(self.base, stem)}_labelIds.png or _labelTrainIds.png")
            pairs.append((os.path.join("leftImg8bit", part, image), masks[0]))
        return pairs


class ADE20K(DataSet):
    """ADEChallengeData2016/{images,annotations}/{training,validation}"""
    folders = ["images/training", "images/validation", "annotations/training", "annotations/validation"]
    places = [".", "ADEChallengeData2016"]
    counts = {"train": 20_210, "val": 2000}
    evaluation = MULTI_SCALE

    @staticmethod
    def classes():
        return read_classes("ade20k")

    def __init__(self, root, num_classes=None):
        super().__init__(root)
        self.label_maps = {"": label_map({0: IGNORE, **{i + 1: i for i in range(150)}})}  # 0 is "other"

    def pairs(self, part):
        part = {"train": "training", "val": "validation"}[part]
        return _matched(self.base, os.path.join("images", part), os.path.join("annotations", part))


class PascalVOC(DataSet):
    """VOCdevkit/VOC20xx with JPEGImages, SegmentationClass, ImageSets/Segmentation"""
    # Stage 2 takes all of JPEGImages. PAPER SILENT on whether validation images, unlabelled, were among them.
    folders = ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation"]
    year = None
    evaluation = MULTI_SCALE  # PAPER SILENT: as Pascal Context

    @staticmethod
    def classes():
        return read_classes("voc")

    def __init__(self, root, num_classes=None):
        super().__init__(root)
        self.label_maps = {"": label_map({i: i for i in range(len(self.names))})}

    @classmethod
    def pretraining_folders(cls, coarse):
        return ["JPEGImages"], None

    @classmethod
    def find(cls, root, folders):
        """root/VOCdevkit/VOC<year>, or the part of that path that root already is."""
        found = sorted([*Path(root).glob("VOC20??"), *Path(root, "VOCdevkit").glob("VOC20??")])
        if os.path.isdir(os.path.join(root, "JPEGImages")):
            found = [Path(os.path.realpath(root))]
        right = [place for place in found
                 if cls.year in (None, place.name) or not re.fullmatch("VOC20..", place.name)]
        names = ", ".join(place.name for place in found)
        if not right:
            raise InputError(f"{root}: {f'found {names}, ' if found else ''}expected {cls.__doc__}")
        if len(right) > 1:
            raise InputError(f"{root}: holds {names}; pass one of them as --root")
        return super().find(str(right[0]), folders)

    def pairs(self, part):
        _, _, lists = self.folders
        list_file = os.path.join(self.base, lists, f"{part}.txt")
        ids = " ".join(read_lines(list_file, "surrogateescape")).split()
        if not ids:
            raise InputError(f"{list_file}: no names in it, expected one a line")
        pairs = [self.pair(i) for i in ids]
        for path in sum(pairs, ()):
            if not os.path.isfile(os.path.join(self.base, path)):
                raise InputError(f"{os.path.join(self.base, path)}: no such file, but {list_file} names it")
        return pairs

    def pair(self, name):
        """(image, mask) of a line of the set's own lists."""
        return os.path.join("JPEGImages", f"{name}.jpg"), os.path.join(self.folders[1], f"{name}.png")


class PascalContext(PascalVOC):
    """VOCdevkit/VOC2010 with JPEGImages, SegmentationClassContext, ImageSets/SegmentationContext"""
    folders = ["JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"]
    year = "VOC2010"
    counts = {"train": 4998, "val": 5105}

    @staticmethod
    def classes():
        return read_classes("pascal_context")  # of the values that the usual converter writes, 0 to 59

    def __init__(self, root, num_classes=None):
        super().__init__(root)
        if num_classes != 60:  # PAPER SILENT: without the background, value 0
            self.names = self.names[1:]
            self.label_maps = {"": label_map({0: IGNORE, **{i + 1: i for i in range(59)}})}


DATA_SETS = {"cityscapes": Cityscapes, "pascal_context": PascalContext, "ade20k": ADE20K, "voc": PascalVOC}

SPLITS = ("train", "val", "test")  # test: of folder alone
LABELLED = ("shapes", "folder", *DATA_SETS)  # for stage 3 and evaluation
UNLABELLED = (*LABELLED, "shapes_objects", "imagenet21k")  # for stage 2; objects: the pictures of stage 1
CLASSIFIED = ("shapes", "folder", "imagenet21k")  # for stage 1
SHAPES_COUNTS = {"encoder_train": 4000, "encoder_val": 500, "unlabelled": 4000, "train": 512, "val": 250}
SYNSETS = (19_167, 21_841, 10_450)  # ImageNet-21k winter21, fall11, 21k-P


def class_colours(data, count, source=None):
    """(count, 3) uint8: the set's own colours, those of `source`'s classes.txt, or those of pictures.py."""
    own = getattr(source, "label_maps", {}).get("")
    if isinstance(own, dict):
        of_class = {k: colour for colour, k in own.items()}
        return np.array([of_class[k] for k in range(count)], np.uint8)
    if data not in DATA_SETS:
        return palette(count)
    _, colours = DATA_SETS[data].classes()
    return colours[-count:]  # pascal_context: without the background, which is first


def _files_below(folder, ending):
    """Paths relative to `folder` of the files in it and below that end so, sorted."""
    found = []
    for place, _, names in walk(folder):
        names = [name for name in names if name.endswith(ending)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    if not found:
        raise InputError(f"{folder}: no files *{ending} there or below")
    return sorted(found)


def _require_folder(root):
    if root is None:
        raise InputError("which folder? pass --root DIR")
    if not os.path.isdir(root):
        what = "not a folder" if os.path.exists(root) else "no such folder"
        raise InputError(f"{root}: {what}; pass --root with the folder of the data")


# ---------------------------------------- Stage 1 and 2: images with a class or without any label


def pretraining_images(data, root, cache=None, coarse=False, pixels=Pixels()):
    """A source of images for stage 2; no labels are read.

    cache: folder for the index of a large listing. coarse: cityscapes with train_extra (Table 3).
    """
    if coarse and data != "cityscapes":
        raise InputError(f"--coarse belongs to --data cityscapes, this is {data}")
    if data in ("shapes", "shapes_objects"):
        part = "unlabelled" if data == "shapes" else "encoder_train"
        return Shapes(part, SHAPES_COUNTS[part])
    _require_folder(root)
    if data == "folder":
        if {"images", "masks"} <= set(os.listdir(root)):
            raise InputError(f"{root}: holds images and masks; pass --root {os.path.join(root, 'images')}")
        return look_at(ImageFiles(ImageIndex.of_folder(root, cache=cache), pixels=pixels))
    if data == "imagenet21k":
        index, note = _synsets(root, cache)
        return ImageFiles(index, note=note, pixels=pixels)
    folders, official = DATA_SETS[data].pretraining_folders(coarse)
    index = ImageIndex.of_folder(DATA_SETS[data].find(root, folders), folders, cache)
    note = _count_note(f"{data} {' and '.join(folders)}", len(index), official)
    return ImageFiles(index, note=note, pixels=pixels)


def extremes(name, image):
    """The lowest and the highest value of a picture; SampleError for NaN and infinities."""
    values = image.numpy()  # torch has no minimum of 16 bits
    low, high = values.min().item(), values.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise SampleError(f"{name}: NaN or infinite pixels; replace them")
    return low, high


def look_at(source, count=16):
    """`source`; reads about `count` of its pictures, adds to its note what is unusual about their pixels.

    Raises InputError for pixels without a range, and for what read_image refuses.
    """
    names, dtypes, lows, highs = [], [], [], []
    for i in range(0, len(source), max(1, len(source) // count)):
        try:
            image = source.image(i)
            low, high = extremes(source.name(i), image)
        except UnreadableImage:  # dealt with where it is met
            continue
        except SampleError as error:  # all processes look at the same pictures
            raise InputError(str(error)) from None
        names.append(source.name(i))
        dtypes.append(image.numpy().dtype.name)
        lows.append(low)
        highs.append(high)
    if not names:
        return source
    lowest, highest = min(lows), max(highs)
    low, high = source.pixels.range or RANGES.get(dtypes[0], (None, None))
    if low is None:
        raise InputError(f"{names[0]}: {dtypes[0]} pixels, from {lowest:g} to {highest:g} in the first "
                         "pictures; which values are black and white? pass --pixel-range LOW HIGH")
    notes = [source.note] if source.note else []
    looked = f"of {len(names)} pictures looked at"
    if highest < low or lowest > high:
        raise InputError(f"{names[0]}: the first pictures have values from {lowest:g} to {highest:g}, all "
                         f"outside --pixel-range {low:g} {high:g}")
    if highest - lowest < 0.1 * (high - low):
        whole = lowest >= 0 and isinstance(highest, int)  # 12 bits: 0 to 4095
        wider = (0, 2 ** highest.bit_length() - 1) if whole else (lowest, highest)
        notes.append(f"the pixels {looked} lie between {lowest:g} and {highest:g}, within a tenth of the "
                     f"range {low:g} to {high:g}; consider --pixel-range {wider[0]:g} {wider[1]:g}")
    if lowest < low or highest > high:
        notes.append(f"the pixels {looked} lie between {lowest:g} and {highest:g}; what is outside "
                     f"--pixel-range {low:g} {high:g} is clipped")
    constant = [name for name, least, most in zip(names, lows, highs) if least == most]
    if constant:
        notes.append(f"{len(constant)} {looked} have one value throughout, such as {constant[0]}; they are "
                     "kept")
    source.note = "\n".join(notes)
    return source


def classification_images(data, root, cache=None, pixels=Pixels()):
    """(training source, validation source, class names) for stage 1.

    folder: root/train/<class>/ and root/val/<class>/; imagenet21k: the same, or synsets. Without val/, or
    with the classes right in root, every hundredth image, at most 10,000, is held out for validation.
    """
    if data == "shapes":
        parts = [Shapes(part, SHAPES_COUNTS[part]) for part in ("encoder_train", "encoder_val")]
        return (*parts, list(shapes.CLASSES[1:]))
    _require_folder(root)
    note, train_root = "", os.path.join(root, "train")
    if data == "imagenet21k":
        train, note = _synsets(root, cache)
    else:
        train = ImageIndex.of_folder(train_root if os.path.isdir(train_root) else root, cache=cache)
        note = look_at(ImageFiles(train, pixels=pixels)).note
    names = sorted({_class_of(container) for container in train.containers} - {"."})
    if len(names) < 2:
        raise InputError(f"{train.root}: {len(names)} class folders, expected two or more, each with the "
                         "images of one class")
    filled = np.flatnonzero(np.diff(train.ends, prepend=0))  # the containers with images
    empty = set(names) - {_class_of(train.containers[i]) for i in filled}
    if empty:
        raise InputError(f"{os.path.join(train.root, min(empty))}: no images of this class")
    classes = _class_numbers(train, names)
    if train.root != root and os.path.isdir(os.path.join(root, "val")):
        val = ImageIndex.of_folder(os.path.join(root, "val"), cache=cache)
        unknown = {_class_of(container) for container in val.containers} - {*names, "."}
        if unknown:
            raise InputError(f"{os.path.join(val.root, min(unknown))}: a class that {train.root} lacks")
        train, val_classes = ImageFiles(train, None, classes, note, pixels), _class_numbers(val, names)
        return train, ImageFiles(val, None, val_classes, pixels=pixels), names
    every = max(100, -(-len(train) // 10_000))
    held_out = np.arange(0, len(train), every, dtype=np.int32)
    rest = np.delete(np.arange(len(train), dtype=np.int32), held_out)
    return (ImageFiles(train, rest, classes, note, pixels),
            ImageFiles(train, held_out, classes, pixels=pixels), names)


def _class_of(container):
    """The class of a folder or .tar of an index: the first part of its path."""
    return "." if container == "." else Path(container).parts[0].removesuffix(".tar")


def _class_numbers(index, names):
    """The class number of each container of the index."""
    if index.containers[index.container(0)] == ".":  # the folder itself comes first
        raise InputError(f"{os.path.join(index.root, index.name(0))}: an image outside the class folders")
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(_class_of(container), -1) for container in index.containers], np.int32)


def _synsets(root, cache):
    """(index, note) of ImageNet-21k: .tar files or folders in root, or in root/train."""
    for base in (root, os.path.join(root, "train")):
        if os.path.isdir(base) and any(SYNSET.fullmatch(name) for name in os.listdir(base)):
            index = ImageIndex.of_synsets(base, cache)
            count = len(index.containers)
            note = f"imagenet21k: {count} synsets, the releases have {SYNSETS}"
            return index, "" if count in SYNSETS else note
    raise InputError(f"{root}: no ImageNet-21k in this folder; expected nXXXXXXXX.tar files or nXXXXXXXX "
                     "folders there, or in train/")


def _count_note(what, count, official):
    return "" if official in (None, count) else f"{what}: {count} images, the official set has {official}"


# ---------------------------------------- Stage 3: images with masks


def labelled_parts(args, pixels):
    """(training source, validation source or None, class names), by the flags of finetune.py."""
    data, root, classes = args.data, args.root, args.num_classes
    train, names = segmentation_pairs(data, root, "train", classes, args.train_list, pixels)
    val = None  # --train-list without --root or --val-list: nothing to validate on
    if args.val_list is not None or args.train_list is None or root is not None:
        val, _ = segmentation_pairs(data, root, "val", classes, args.val_list, pixels)
    if args.val_fraction is None and args.folds is None:
        return train, val, names
    if val is not None:
        raise InputError(f"{root or data}: has validation images; --val-fraction and --folds hold out "
                         "training images where there are none; drop the flag")
    ranked = _ranked([train.name(i) for i in range(len(train))], "validation")
    if args.folds is not None:
        held_out = ranked[args.fold or 0::args.folds]
    else:
        held_out = ranked[:round(args.val_fraction * len(ranked))]
    if not 0 < len(held_out) < len(ranked):
        raise InputError(f"there are {len(ranked)} labelled images, of which {len(held_out)} would be held "
                         "out; expected at least one to train on and one to validate on")
    rest = set(ranked) - set(held_out)
    return train.subset(sorted(rest), train.note), train.subset(sorted(held_out)), names


def segmentation_pairs(data, root, part, num_classes=None, list_file=None, pixels=Pixels()):
    """(source of image and mask pairs, class names) of `part`, "train" or "val"; folder: or "test".

    The source is None where a folder has no such part. list_file: a text file with one `image mask` a line
    instead, relative to the set's folder (folder: root, or else the file's own). num_classes: of a folder
    without classes.txt; 60 takes Pascal Context's background as a class.
    """
    if data != "folder" and part == "test":
        raise InputError(f"--split test: {data} has no labelled test images; pass --split val")
    if data == "shapes":
        if num_classes not in (None, len(shapes.CLASSES)) or list_file is not None:
            raise InputError(f"--data shapes has {len(shapes.CLASSES)} classes and no list files")
        return Shapes(part, SHAPES_COUNTS[part]), list(shapes.CLASSES)
    if root is not None or data != "folder" or list_file is None:
        _require_folder(root)
    note = ""
    if data == "folder":
        base = root
        names, labels = own_classes(root, num_classes)
        label_maps = {"": labels}
    else:
        data_set = DATA_SETS[data](root, num_classes)
        base, names, label_maps = data_set.base, data_set.names, data_set.label_maps
        if num_classes not in (None, len(names)):
            known = "59, or 60" if data == "pascal_context" else len(names)
            raise InputError(f"--num-classes {num_classes}, but {data} has {known}")
    if list_file is not None:
        base = base or os.path.dirname(os.path.abspath(list_file))
        pairs, note = _listed_pairs(list_file, base, None if data == "folder" else data_set.pair)
    elif data == "folder":
        if not os.path.isdir(os.path.join(root, "images", part)):
            if part != "train":
                return None, names
            raise InputError(f"{root}: no folder images/train; expected images/train and masks/train (and "
                             "images/val and masks/val), or --train-list FILE")
        pairs = _matched(root, os.path.join("images", part), os.path.join("masks", part))
    else:
        pairs = data_set.pairs(part)
        note = _count_note(f"{data} {part}", len(pairs), data_set.counts.get(part))
    source = Pairs(base, pairs, label_maps, note, pixels)
    return look_at(source) if data == "folder" else source, names


def _matched(root, image_folder, mask_folder):
    """[(image, mask), ...] of two folders, matched by path without extension; stacks page by page."""
    def by_stem(folder):
        _require_folder(os.path.join(root, folder))
        index, paths = ImageIndex.of_folder(os.path.join(root, folder)), {}
        for path in sorted(index.name(i) for i in range(len(index))):
            if stem(path) in paths:
                other = os.path.relpath(paths[stem(path)], folder)
                raise InputError(f"{os.path.join(root, folder)}: {other} and {path} differ in their extension "
                                 "alone; expected one file per image")
            paths[stem(path)] = os.path.join(folder, path)
        return paths

    def pages(paths):
        """{path of a file, without extension: how many pages it has}."""
        return Counter(os.path.splitext(os.path.relpath(path, start))[0] for path, start in paths)

    images, masks = by_stem(image_folder), by_stem(mask_folder)
    image_pages = pages((path, image_folder) for path in images.values())
    mask_pages = pages((path, mask_folder) for path in masks.values())
    for name, count in image_pages.items():
        if mask_pages.get(name, count) != count:
            raise InputError(f"{os.path.join(root, mask_folder, name)}: {mask_pages[name]} pages, its image "
                             f"in {image_folder} has {count}; expected a page for a page")
    for name in images:
        if name not in masks:
            raise InputError(f"{os.path.join(root, images[name])}: no mask for this image; expected "
                             f"{os.path.join(root, mask_folder, name + '.png')}")
    for name in masks:
        if name not in images:
            raise InputError(f"{os.path.join(root, masks[name])}: no image for this mask in "
                             f"{os.path.join(root, image_folder)}")
    return [(images[name], masks[name]) for name in images]


def stem(path):
    """A path without extension, but with its page: "a/b.tif#3" -> "a/b#3"."""
    file, page = split_page(path)
    return os.path.splitext(file)[0] + (f"#{page}" if file != path else "")


def listed_images(list_file, root, pixels=Pixels()):
    """The pictures that a text file names, one a line, as a source; None where its lines are something else.

    The paths are relative to root or, without one, to the file's own folder.
    """
    base = root or os.path.dirname(os.path.abspath(list_file))
    names = [line.strip() for line in read_lines(list_file, "surrogateescape")]
    there = [os.path.isfile(os.path.join(base, split_page(name)[0])) for name in names]
    if not any(there):
        return None
    missing = [i for i, name in enumerate(names) if name and not there[i]]
    if missing:
        raise InputError(f"{list_file}, line {missing[0] + 1}: no such file: "
                         f"{os.path.join(base, names[missing[0]])}; other lines name an image each, to predict")
    return Pairs(base, [(name, None) for name in names if name], {}, pixels=pixels)


def _listed_pairs(list_file, base, pair=None):
    """([(image, mask), ...], note) of a text file with one pair a line, the paths relative to `base`.

    Names may hold spaces: a tab separates, or else the space at which both halves are files that exist.
    Published lists may begin paths with /, or name Cityscapes' labelTrainIds where there are only labelIds.
    pair: see DataSet; lines may then be a name alone.
    """
    def exists(path):
        return os.path.isfile(os.path.join(base, split_page(path)[0]))

    pairs, note = [], ""
    for number, line in enumerate(read_lines(list_file, "surrogateescape"), start=1):
        separator = "\t" if "\t" in line.strip() else " "
        words = line.strip().split(separator)
        if words == [""]:
            continue
        splits = [(separator.join(words[:i]).strip(), separator.join(words[i:]).strip())
                  for i in range(1, len(words))]
        if len(words) == 1 and pair is not None:
            splits = [pair(words[0])]
        if line.startswith("/") and not any(exists(image) for image, _ in splits):
            splits = [(image.lstrip("/"), mask.lstrip("/")) for image, mask in splits]
        distributed = [(image, mask.replace("_labelTrainIds.png", "_labelIds.png")) for image, mask in splits]
        if not any(exists(mask) for _, mask in splits) and any(exists(mask) for _, mask in distributed):
            splits, note = distributed, f"{list_file} names labelTrainIds; labelIds are read instead"
        found = [pair for pair in splits if exists(pair[0]) and exists(pair[1])]
        if found:
            pairs.append(found[0])
        elif len(splits) == 1:
            missing = splits[0][0] if not exists(splits[0][0]) else splits[0][1]
            raise InputError(f"{list_file}, line {number}: no such file: {os.path.join(base, missing)}")
        else:
            raise InputError(f"{list_file}, line {number}: expected `image mask`, two files below {base}, or "
                             f"in all lines one image to predict; got {line.strip()!r}")
    if not pairs:
        raise InputError(f"{list_file}: no pairs; expected one `image mask` a line")
    return pairs, note


def read_lines(path, errors="strict"):
    """The lines of a text file; InputError where there is none in UTF-8.

    errors: "surrogateescape" for names of files, which may be of any bytes, as write_lines keeps them.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: cannot be read (not a file); expected a text file")
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors=errors).split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as UTF-8; save it as UTF-8 text") from None


def own_classes(root, num_classes=None):
    """(names, what mask values mean: see read_mask) of root/classes.txt; without it "class 0", "class 1" ...

    Its lines are all `name` (line n is value n, 255 is ignored), all `value name` or all `R G B name`. A
    class called "ignore" is ignored. num_classes: what --num-classes asks for; it must agree.
    """
    path = os.path.join(root or "", "classes.txt")
    if root is None or not os.path.exists(path):
        if num_classes is None:
            raise InputError(f"{root or 'without --root'}: how many classes? pass --num-classes N, or write "
                             "their names, one a line, to classes.txt")
        if not 2 <= num_classes <= IGNORE:
            raise InputError(f"--num-classes {num_classes}: expected 2 to 255 (mask values are bytes, and "
                             "255 is ignored)")
        return [f"class {i}" for i in range(num_classes)], label_map({i: i for i in range(num_classes)})
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    keys, named = [], []
    for line in lines:
        values, name = re.fullmatch(r"((?:\d{1,9}\s+){3}|\d{1,9}\s+)?(.+)", line).groups()
        if re.match(r"[-+]?\d+\.?\d*[,:;=)\s]", name):  # `1: sky`, `1.0 sky`, `1 2 sky`
            raise InputError(f"{path}: {line[:40]!r}, expected `name`, `value name` or `R G B name`, in whole "
                             "numbers from 0 to 255")
        keys.append(tuple(map(int, (values or "").split())))
        named.append(name)
        if len(keys[-1]) != len(keys[0]):
            raise InputError(f"{path}: {lines[0]!r} and {line!r} are of two forms; expected `name` in all "
                             "lines, or `value name`, or `R G B name`")
        if max(keys[-1], default=0) > 255:
            raise InputError(f"{path}: {line!r} has a mask value of {max(keys[-1])}, expected 0 to 255")
    names = [name for name in named if name != "ignore"]
    for what, things in (("mask value", list(filter(None, keys))), ("class name", names)):
        twice = [thing for thing, count in Counter(things).items() if count > 1]
        if twice:
            again = lines[(keys if what == "mask value" else named).index(twice[0])]
            raise InputError(f"{path}: a {what} occurs twice, as in {again!r}; expected each once")
    if num_classes not in (None, len(names)):
        raise InputError(f"{path}: {len(names)} names, but --num-classes is {num_classes}")
    if not 2 <= len(names) <= IGNORE:
        raise InputError(f"{path}: {len(names)} names besides ignore, expected 2 to 255")
    classes = [IGNORE if name == "ignore" else names.index(name) for name in named]
    if len(keys[0]) == 3:
        return names, dict(zip(keys, classes))
    values = [key[0] for key in keys] if keys[0] else range(len(keys))
    return names, label_map(dict(zip(values, classes)), ignore_255=not keys[0])


# ---------------------------------------- What the masks hold


def survey_masks(parts, names, processes=None, progress=False):
    """Read every image and mask of `parts`, {"training": source, ...}: (text, {part: counts}).

    counts: int64 (3, 256), first of the pixels and of the images in which a class (or 255) occurs. The text
    is a table of their shares and lines on what is unusual. The processes share the work. Raises InputError
    for a fault in a file, and for training masks that hold fewer than two classes.
    """
    def count(i):
        """int64 (3, 256): pixels of each class, whether it occurs; [2, 0]: whether the image is constant."""
        sample = source.read(i)
        pixels = torch.bincount(sample["mask"].flatten(), minlength=256)
        low, high = extremes(source.name(i), sample["image"])
        return torch.stack([pixels, (pixels > 0).long(), torch.full((256,), int(low == high))])

    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    width, lines, counted = max(map(len, [*names, "validation masks"])), [], {}
    for part, source in parts.items():
        numbers = range(rank, len(source), world)
        with ThreadPoolExecutor(8) as pool:
            found = tqdm(pool.map(count, numbers), total=len(numbers), unit="image", disable=not progress)
            counts = sum(found, torch.zeros(3, 256, dtype=torch.int64))
        if processes:
            counts = processes.sum(counts.to(processes.device)).cpu()
        if part == "training" and (counts[0, :len(names)] > 0).sum() < 2:
            raise InputError(_too_few_classes(source))
        counted[part], total = counts, counts[0].sum()
        lines.append(f"{f'{part} masks':{width}}  pixels %  images %")
        for k, name in [*enumerate(names), (IGNORE, "ignored")]:
            pixels, images = counts[0, k] / total, counts[1, k] / len(source)
            lines.append(f"{name:{width}}  {100 * pixels:8.2f}  {100 * images:8.2f}")
        absent = [name for k, name in enumerate(names) if not counts[0, k]]
        if absent:
            lines.append(f"in no {part} mask: {', '.join(absent)}")
        if counts[0, IGNORE] > total / 2:
            lines.append(f"most pixels of the {part} masks are ignored")
        if counts[2, 0]:
            lines.append(f"{counts[2, 0]} {part} images have one value throughout; they are kept")
    return "\n".join(lines), counted


def _too_few_classes(source):
    """What to do about masks with fewer than two classes: their values, and lines for classes.txt."""
    colours = isinstance(next(iter(source.label_maps.values())), dict)
    values = np.unique(np.concatenate([
        np.unique(mask_values(os.path.join(source.root, mask), colours)) for _, mask in source.pairs[:100]]))
    example = "" if len(values) < 2 or colours else f", such as `{values[0]} background`, `{values[-1]} object`"
    return (f"{source.root}: the training masks hold fewer than two classes; their values are "
            f"{values_text(values, colours)}; write to classes.txt what each one means, a line each{example}")


# ---------------------------------------- Label subsets

# Counts of the paper that rounding (half to even) does not give: 1/30 of Cityscapes is the published split of
# 100, and many people have two images of Pascal Context less.
PAPER_COUNTS = {(2975, Fraction(1, 30)): 100, (4996, Fraction(1, 5)): 1000}


def label_subset(ids, amount, seed):
    """Indices of a subset of `ids`: of `amount` (int), or of the share `amount` (Fraction in (0, 1]).

    The ids are ranked by a hash of seed and id, and the first ones taken. So the 1 % subset lies in the 5 %
    subset of one seed, and the order in which ids are listed does not matter. PAPER SILENT on how.
    """
    count = amount
    if isinstance(amount, Fraction):
        count = PAPER_COUNTS.get((len(ids), amount), round(len(ids) * amount))
    if not 1 <= count <= len(ids):
        asked = f"{amount} of them is {count}" if isinstance(amount, Fraction) else f"{amount} asked for"
        raise InputError(f"there are {len(ids)} labelled images, {asked}; expected 1 to {len(ids)}")

    return sorted(_ranked(ids, seed)[:count])


def _ranked(ids, seed):
    """The indices of `ids` in the order of a hash of seed and id."""
    def key(i):
        return hashlib.sha256(f"{seed}/{Path(ids[i]).as_posix()}".encode("utf-8", "surrogateescape")).digest()

    return sorted(range(len(ids)), key=key)


def add_subset_flags(parser):
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--fraction", type=fraction, metavar="F",
                        help="share of the labelled images: 1/8, 0.05, 5%% (default: all)")
    labels.add_argument("--labels", type=launch.positive_int, help="number of labelled images")
    parser.add_argument("--subset-seed", type=launch.seed_int, default=0,
                        help="seed that picks them; subsets of one seed are nested")


def fraction(text):
    """"1/8", "0.05" or "5%" in lowest terms, as a string: arguments are saved as plain values."""
    try:
        if not re.fullmatch(r"[\d./]{1,40}%?", text):  # an exponent may take hours
            raise ValueError
        value = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the images, such as 1/8, 0.05 or 5%")
    return str(value)


def choose_labels(source, args):
    """`source`, or the subset of it that --fraction or --labels asks for."""
    if args.labels is None and args.fraction is None:
        return source
    ids = [source.name(i) for i in range(len(source))]
    return source.subset(label_subset(ids, args.labels or Fraction(args.fraction), args.subset_seed))


# ---------------------------------------- The script: look at a data set before a GPU waits for it


def main():
    parser = launch.Parser(__doc__)
    launch.add_data_flags(parser, LABELLED)
    launch.add_bands_flag(parser)
    parser.add_argument("--split", choices=SPLITS, default="train", help="which part of the data set")
    parser.add_argument("--num-classes", type=launch.positive_int, help="as in finetune.py")
    add_subset_flags(parser)
    parser.add_argument("--check", action="store_true", help="read every image and mask of the list")
    args = parser.parse_args()
    pixels = Pixels(args.bands or 3, args.pixel_range, args.huge)
    source, names = segmentation_pairs(args.data, args.root, args.split, args.num_classes, pixels=pixels)
    if source is None:
        raise InputError(f"{args.root}: no folder images/{args.split}")
    subset = choose_labels(source, args)
    if source.note:
        print(source.note, file=sys.stderr)
    print(f"{len(names)} classes, {len(subset)} of {len(source)} pairs of {args.split}", file=sys.stderr)
    if args.check:
        part = "training" if args.split == "train" else args.split
        text, _ = survey_masks({part: subset}, names, progress=sys.stderr.isatty())
        print(f"{len(subset)} images and masks read, no fault found\n{text}", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # as write_lines: names of any bytes
    for i in range(len(subset)):
        print(subset.line(i))


if __name__ == "__main__":
    launch.run_script(main)
