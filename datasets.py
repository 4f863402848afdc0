"""The data sets by name, as they are distributed: where images and masks lie, what the values of masks mean, which images are labelled.

    python datasets.py --data cityscapes --root cityscapes                                     # is all there? lists the pairs
    python datasets.py --data cityscapes --root cityscapes --fraction 1/8 > labelled.txt       # a nested label subset, as a list

Nothing has to be converted, renamed or unpacked. --root is the folder that holds

    cityscapes       leftImg8bit/{train,val,train_extra}/<city>/*_leftImg8bit.png
                     gtFine/{train,val}/<city>/*_gtFine_labelIds.png, or *_gtFine_labelTrainIds.png
    pascal_context   VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext}, ImageSets/SegmentationContext/{train,val}.txt
    ade20k           ADEChallengeData2016/{images,annotations}/{training,validation}
    voc              VOCdevkit/VOC20xx/{JPEGImages,SegmentationClass}, ImageSets/Segmentation/{train,val}.txt
    imagenet21k      nXXXXXXXX.tar files or nXXXXXXXX folders, there or in train/
    folder           your own: any images (stage 2), train/<class>/ (stage 1), images/{train,val} and masks/{train,val} (stage 3)

A source is what a stage reads: len(source), source.name(i), source.read(i) -> {"image": ..., "mask" or "label": ...}; source.note
says in a line what is unusual about it, or is empty; source.fingerprint() tells it from any other.
"""
import argparse
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

import runtime
import shapes
from data import SampleError, UnreadableImage, label_map, read_image, read_mask
from image_index import SYNSET, ImageIndex
from pictures import palette
from runtime import InputError

LABELLED = ("shapes", "folder", "cityscapes", "pascal_context", "ade20k", "voc")         # for stage 3 and evaluation
UNLABELLED = (*LABELLED, "imagenet21k")                                                  # for stage 2
CLASSIFIED = ("shapes", "folder", "imagenet21k")                                         # for stage 1

SHAPES_COUNTS = {"encoder_train": 4000, "encoder_val": 500, "unlabelled": 4000, "train": 512, "val": 250}
COUNTS = {("cityscapes", "train"): 2975, ("cityscapes", "val"): 500, ("cityscapes", "train and train_extra"): 2975 + 19_998,
          ("pascal_context", "train"): 4998, ("pascal_context", "val"): 5105, ("ade20k", "train"): 20_210, ("ade20k", "val"): 2000}
VOC_COUNTS = {2007: (209, 213), 2008: (511, 512), 2009: (749, 750), 2010: (964, 964), 2011: (1112, 1111), 2012: (1464, 1449)}
SYNSETS = {19_167: "winter21", 21_841: "fall11", 10_450: "21k-P"}


# ---------------------------------------------------------------------------------------------------------------------
# Sources


class ImageFiles:
    """Pictures of an ImageIndex (chosen: the numbers of some of them), without labels or, for stage 1, with one each.

    classes: the class of each of the index's containers.
    """

    def __init__(self, index, chosen=None, classes=None, note=""):
        self.index, self.chosen, self.classes, self.note = index, chosen, classes, note

    def __len__(self):
        return len(self.index if self.chosen is None else self.chosen)

    def _number(self, i):
        return i if self.chosen is None else int(self.chosen[i])

    def name(self, i):
        return self.index.name(self._number(i))

    def fingerprint(self):
        return f"{len(self)} images, {self.index.fingerprint()}"

    def read(self, i):
        number = self._number(i)
        path = os.path.join(self.index.root, self.index.name(number))
        try:
            file = self.index.open(number)
        except OSError as error:
            raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from None
        sample = {"image": tv_tensors.Image(read_image(file, path))}
        return sample if self.classes is None else {**sample, "label": int(self.classes[self.index.container(number)])}


class Pairs:
    """Pictures with masks: [(image path, mask path), ...] below root. labels: {ending of a mask's name: its label_map}."""

    def __init__(self, root, pairs, labels, note=""):
        self.root, self.pairs, self.labels, self.note = str(root), pairs, labels, note

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    def line(self, i):
        """The pair as a line of a list file."""
        return "\t".join(self.pairs[i])

    def fingerprint(self):
        return f"{len(self)} pairs, {_digest(self.line(i) for i in range(len(self)))}"

    def subset(self, indices):
        return Pairs(self.root, [self.pairs[i] for i in indices], self.labels)

    def read(self, i):
        image_path, mask_path = (os.path.join(self.root, path) for path in self.pairs[i])
        labels = next((labels for ending, labels in self.labels.items() if mask_path.endswith(ending)), None)
        if labels is None:
            raise SampleError(f"{mask_path}: unknown kind of mask, expected a name that ends with {' or '.join(self.labels)}")
        image, mask = read_image(image_path), read_mask(mask_path, labels)
        if image.shape[1:] != mask.shape:
            raise SampleError(f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, its image {image_path} is "
                              f"{image.shape[2]}x{image.shape[1]} (upright); expected the same size")
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}


class Shapes:
    """`count` pictures of a part of the embedded data, drawn once and kept in memory (see shapes.py)."""
    note = ""

    def __init__(self, part, count=None, indices=None):
        self.part, self.indices, self.cache = part, range(count) if indices is None else indices, {}

    def __len__(self):
        return len(self.indices)

    def name(self, i):
        return f"{self.part}-{self.indices[i]:05d}"

    def line(self, i):
        return self.name(i)

    def fingerprint(self):
        return f"{len(self)} pictures, {_digest(self.name(i) for i in range(len(self)))}"

    def subset(self, indices):
        return Shapes(self.part, indices=[self.indices[i] for i in indices])

    def read(self, i):
        if i not in self.cache:
            self.cache[i] = shapes.draw(self.part, self.indices[i])
        image, mask, label = self.cache[i]
        sample = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))}
        if self.part.startswith("encoder"):
            return {**sample, "label": label}
        return sample if self.part == "unlabelled" else {**sample, "mask": tv_tensors.Mask(torch.from_numpy(mask))}


def _digest(lines):
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1 and 2: images with a class or without any label


def pretraining_images(data, root, cache=None, coarse=False):
    """Pictures for stage 2 (Table 3): no labels are read. cache: a folder for the index of a large listing, see image_index.py.

    cityscapes: the training images, and with coarse those of train_extra too. voc and pascal_context: all of the year's
    JPEGImages. PAPER SILENT on whether validation images, unlabelled, were among them.
    """
    if coarse and data != "cityscapes":
        raise InputError(f"--coarse belongs to --data cityscapes, this is {data}")
    if data == "shapes":
        return Shapes("unlabelled", SHAPES_COUNTS["unlabelled"])
    _require_folder(root)
    if data == "folder":
        return ImageFiles(ImageIndex.of_folder(root, cache=cache))
    if data == "imagenet21k":
        index, note = _synsets(root, cache)
        return ImageFiles(index, note=note)
    if data == "cityscapes":
        parts = ["leftImg8bit/train"] + ["leftImg8bit/train_extra"] * coarse
        base, official = _inside(root, ["."], parts, CITYSCAPES_TREE), COUNTS["cityscapes", "train and train_extra" if coarse else "train"]
    elif data == "ade20k":
        parts = ["images/training"]
        base, official = _inside(root, [".", "ADEChallengeData2016"], parts, ADE20K_TREE), COUNTS["ade20k", "train"]
    else:
        base, parts, official = _voc_folder(root, 2010 if data == "pascal_context" else None, ["JPEGImages"])[0], ["JPEGImages"], None
    index = ImageIndex.of_folder(base, parts, cache)
    return ImageFiles(index, note=_count_note(f"{data} {' and '.join(parts)}", len(index), official))


def classification_images(data, root, cache=None):
    """(training source, validation source, class names) for stage 1.

    root/train/<class>/ and root/val/<class>/ with folder, the same or synsets with imagenet21k; without val/, or with the
    classes right in root, every hundredth image is held out for validation, and no more than 10,000.
    """
    if data == "shapes":
        return (Shapes("encoder_train", SHAPES_COUNTS["encoder_train"]), Shapes("encoder_val", SHAPES_COUNTS["encoder_val"]),
                list(shapes.CLASSES[1:]))
    _require_folder(root)
    if data == "imagenet21k":
        train, note = _synsets(root, cache)
    else:
        train, note = ImageIndex.of_folder(os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root, cache=cache), ""
    names = sorted({_class_of(container) for container in train.containers} - {"."})
    if len(names) < 2:
        raise InputError(f"{train.root}: {len(names)} class folders, expected two or more, each with the images of one class")
    present = {_class_of(container) for container, count in zip(train.containers, np.diff(train.ends, prepend=0)) if count}
    if set(names) - present:
        raise InputError(f"{os.path.join(train.root, min(set(names) - present))}: no images of this class")
    if train.root != root and os.path.isdir(os.path.join(root, "val")):
        val = ImageIndex.of_folder(os.path.join(root, "val"), cache=cache)
        unknown = {_class_of(container) for container in val.containers} - {*names, "."}
        if unknown:
            raise InputError(f"{os.path.join(root, 'val', min(unknown))}: a class without a folder in {train.root}")
        return ImageFiles(train, None, _classes(train, names), note), ImageFiles(val, None, _classes(val, names)), names
    held_out = np.arange(0, len(train), max(100, -(-len(train) // 10_000)), dtype=np.int32)
    rest = np.delete(np.arange(len(train), dtype=np.int32), held_out)
    return ImageFiles(train, rest, _classes(train, names), note), ImageFiles(train, held_out, _classes(train, names)), names


def _class_of(container):
    """The class of a folder or .tar of an index: the first part of its path."""
    return Path(container).parts[0].removesuffix(".tar") if container != "." else "."


def _classes(index, names):
    """The class number of each container of the index."""
    if index.containers[index.container(0)] == ".":                       # the folder itself comes first
        raise InputError(f"{os.path.join(index.root, index.name(0))}: an image outside the class folders; expected {index.root}/<class>/<image>")
    number = {name: i for i, name in enumerate(names)}
    return np.array([number.get(_class_of(container), -1) for container in index.containers], np.int32)


def _synsets(root, cache):
    """(index, note) of ImageNet-21k: .tar files or folders in root, or in root/train."""
    for base in (root, os.path.join(root, "train")):
        if os.path.isdir(base) and any(SYNSET.fullmatch(entry.name) for entry in os.scandir(base)):
            index = ImageIndex.of_synsets(base, cache)
            count = len(index.containers)
            known = " or ".join(f"{n} ({release})" for n, release in SYNSETS.items())
            return index, "" if count in SYNSETS else f"imagenet21k: {count} synsets, the distributed sets have {known}"
    raise InputError(f"{root}: no ImageNet-21k in this folder; expected nXXXXXXXX.tar files or nXXXXXXXX folders there, or in train/")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: images with masks


def segmentation_pairs(data, root, part, num_classes=None, list_file=None):
    """(source of image and mask pairs, class names) of `part`, "train" or "val"; source None where a folder has no val.

    list_file: a text file with one `image mask` per line instead, relative to the set's folder (folder: root, or else the file's).
    num_classes: for folder without classes.txt; 60 takes Pascal Context's background as a class (PAPER SILENT; 59 is likelier).
    """
    if data == "shapes":
        if num_classes not in (None, len(shapes.CLASSES)) or list_file is not None:
            raise InputError(f"--data shapes has {len(shapes.CLASSES)} classes and no list files")
        return Shapes(part, SHAPES_COUNTS[part]), list(shapes.CLASSES)
    if root is not None or data != "folder" or list_file is None:
        _require_folder(root)
    if data == "folder":
        names = class_names(root, num_classes)
        labels = {"": label_map({i: i for i in range(len(names))})}
        base, find = root, _folder_pairs
    else:
        named = {"cityscapes": _cityscapes, "pascal_context": _pascal_context, "ade20k": _ade20k, "voc": _voc}
        base, find, names, labels = named[data](root, num_classes)
        if num_classes not in (None, len(names)):
            raise InputError(f"--num-classes {num_classes}, but {data} has {'59, or 60' if data == 'pascal_context' else len(names)}")
    if list_file is not None:
        base = base if base is not None else os.path.dirname(os.path.abspath(list_file))
        pairs, note = _listed_pairs(list_file, base, labels)
        return Pairs(base, pairs, labels, note), names
    pairs = find(base, part)
    if pairs is None:
        return None, names
    official = COUNTS.get((data, part))
    if data == "voc" and (year := re.search(r"VOC(\d{4})", os.path.basename(os.path.realpath(base)))):
        official = VOC_COUNTS.get(int(year[1]), (None, None))[part == "val"]
    return Pairs(base, pairs, labels, _count_note(f"{data} {part}", len(pairs), official)), names


def _count_note(what, count, official):
    return f"{what}: {count} images, the official set has {official}" if official not in (None, count) else ""


def _cityscapes(root, num_classes):
    def find(base, part):
        folder, pairs = os.path.join(base, "leftImg8bit", part), []
        for image in _files_below(folder, "_leftImg8bit.png"):
            stem = os.path.join("gtFine", part, image.removesuffix("_leftImg8bit.png") + "_gtFine")
            masks = [stem + ending for ending in CITYSCAPES_LABELS if os.path.isfile(os.path.join(base, stem + ending))]
            if not masks:
                raise InputError(f"{os.path.join(folder, image)}: no mask for this image; expected {os.path.join(base, stem)}_labelIds.png "
                                 f"or _labelTrainIds.png")
            pairs.append((os.path.join("leftImg8bit", part, image), masks[0]))
        return pairs
    base = _inside(root, ["."], ["leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"], CITYSCAPES_TREE)
    return base, find, CITYSCAPES.split(", "), CITYSCAPES_LABELS


def _ade20k(root, num_classes):
    def find(base, part):
        part = {"train": "training", "val": "validation"}[part]
        return _matched(base, os.path.join("images", part), os.path.join("annotations", part))
    folders = [f"{kind}/{part}" for kind in ("images", "annotations") for part in ("training", "validation")]
    base = _inside(root, [".", "ADEChallengeData2016"], folders, ADE20K_TREE)
    return base, find, ADE20K.split(", "), {"": label_map({0: 255, **{i + 1: i for i in range(150)}})}


def _pascal_context(root, num_classes):
    base, find = _voc_folder(root, 2010, ["JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"])
    names = PASCAL_CONTEXT.split(", ")
    if num_classes == 60:
        return base, find, ["background", *names], {"": label_map({i: i for i in range(60)})}
    return base, find, names, {"": label_map({0: 255, **{i + 1: i for i in range(59)}})}


def _voc(root, num_classes):
    base, find = _voc_folder(root, None, ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation"])
    return base, find, VOC.split(", "), {"": label_map({i: i for i in range(21)})}


def _voc_folder(root, year, folders):
    """(root/VOCdevkit/VOC<year> or the part of it that root already is, the function that finds its pairs)."""
    years = sorted(os.path.join(place, name) for place in (root, os.path.join(root, "VOCdevkit")) if os.path.isdir(place)
                   for name in os.listdir(place) if re.fullmatch(r"VOC\d{4}", name))
    if os.path.isdir(os.path.join(root, "JPEGImages")):
        years = [root]
    tree = f"VOCdevkit/VOC{year or '20xx'} with {', '.join(folders)}"
    other_year = re.compile(rf"VOC(?!{year})\d{{4}}") if year else re.compile("(?!)")
    of_that_year = [place for place in years if not other_year.fullmatch(os.path.basename(os.path.realpath(place)))]
    if not of_that_year:
        found = f"found {', '.join(map(os.path.basename, years))}, " if years else ""
        raise InputError(f"{root}: {found}expected {tree}")
    if len(of_that_year) > 1:
        raise InputError(f"{root}: holds {', '.join(map(os.path.basename, years))}; pass one of them as --root")

    def find(base, part):
        _, masks, lists = folders
        list_path = os.path.join(base, lists, f"{part}.txt")
        try:
            ids = Path(list_path).read_text().split()
        except OSError as error:
            raise InputError(f"{list_path}: cannot be read ({error.strerror}); expected the names of the images of {part}, one a line") from None
        pairs = [(os.path.join("JPEGImages", f"{name}.jpg"), os.path.join(masks, f"{name}.png")) for name in ids]
        for pair in pairs:
            for path in pair:
                if not os.path.isfile(os.path.join(base, path)):
                    raise InputError(f"{os.path.join(base, path)}: no such file, but {list_path} names it")
        if not pairs:
            raise InputError(f"{list_path}: no names in it, expected one a line")
        return pairs
    return _inside(of_that_year[0], ["."], folders, tree), find


def _inside(root, places, folders, tree):
    """The first of root/<place> that holds the first of `folders`; it must hold them all."""
    base = next((os.path.normpath(os.path.join(root, place)) for place in places if os.path.isdir(os.path.join(root, place, folders[0]))),
                root)
    for folder in folders:
        if not os.path.isdir(os.path.join(base, folder)):
            raise InputError(f"{root}: no folder {folder} in it; expected {tree}")
    return base


def _files_below(folder, ending):
    """Paths relative to `folder` of the files in it and below that end so, sorted."""
    found = sorted(os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder, followlinks=True)
                   for name in names if name.endswith(ending))
    if not found:
        raise InputError(f"{folder}: no files *{ending} there or below")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A user's own pairs: folders, lists, class names


def _folder_pairs(root, part):
    if not os.path.isdir(os.path.join(root, "images", part)):
        if part == "train":
            raise InputError(f"{root}: no folder images/train; expected images/train and masks/train "
                             f"(and images/val and masks/val), or --train-list FILE")
        return None
    return _matched(root, os.path.join("images", part), os.path.join("masks", part))


def _matched(root, image_folder, mask_folder):
    """[(image, mask), ...] of two folders, matched by path without extension."""
    def by_stem(folder):
        _require_folder(os.path.join(root, folder))
        index = ImageIndex.of_folder(os.path.join(root, folder))
        paths = sorted(index.name(i) for i in range(len(index)))
        for a, b in zip(paths, paths[1:]):
            if os.path.splitext(a)[0] == os.path.splitext(b)[0]:
                raise InputError(f"{os.path.join(root, folder)}: {a} and {b} differ in their extension alone; expected one file per image")
        return {os.path.splitext(path)[0]: os.path.join(folder, path) for path in paths}

    images, masks = by_stem(image_folder), by_stem(mask_folder)
    for stem in images:
        if stem not in masks:
            raise InputError(f"{os.path.join(root, images[stem])}: no mask for this image; expected "
                             f"{os.path.join(root, mask_folder, stem + '.png')}")
    for stem in masks:
        if stem not in images:
            raise InputError(f"{os.path.join(root, masks[stem])}: no image for this mask in {os.path.join(root, image_folder)}")
    return [(images[stem], masks[stem]) for stem in images]


def _listed_pairs(list_file, base, labels):
    """([(image, mask), ...], note) of a text file with one pair a line. Names may hold spaces: a tab separates, or else the
    space at which both halves are files that exist. A published list may name Cityscapes' labelTrainIds where there are labelIds."""
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{list_file}: cannot be read ({error})") from None

    def exists(path):
        return os.path.isfile(os.path.join(base, path))

    pairs, note = [], ""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words = line.strip().split("\t") if "\t" in line.strip() else line.strip().split(" ")
        splits = [(" ".join(words[:i]).strip(), " ".join(words[i:]).strip()) for i in range(1, len(words))]
        if labels is CITYSCAPES_LABELS:
            official = [(image, mask.replace("_labelTrainIds", "_labelIds")) for image, mask in splits]
            if not any(exists(mask) for _, mask in splits) and any(exists(mask) for _, mask in official):
                splits, note = official, f"{list_file} names labelTrainIds, which are not there; read are the labelIds"
        found = [pair for pair in splits if all(map(exists, pair))]
        if not found:
            missing = [path for path in splits[0] if not exists(path)] if len(splits) == 1 else None
            raise InputError(f"{list_file}, line {number}: " + (f"no such file: {os.path.join(base, missing[0])}" if missing else
                             f"expected `image mask`, two files below {base}, got {line.strip()!r}"))
        pairs.append(found[0])
    if not pairs:
        raise InputError(f"{list_file}: no pairs; expected one `image mask` per line")
    return pairs, note


def class_names(root, num_classes=None):
    """The lines of root/classes.txt; without that file "class 0" to "class N-1". Both given: they must agree."""
    path = None if root is None else os.path.join(root, "classes.txt")
    if path is None or not os.path.isfile(path):
        if num_classes is None:
            raise InputError(f"{root or 'without --root'}: how many classes? pass --num-classes N, or write their names, one a line, to classes.txt")
        if not 2 <= num_classes <= 255:
            raise InputError(f"--num-classes {num_classes}: expected 2 to 255 (mask values are bytes, and 255 is ignored)")
        return [f"class {i}" for i in range(num_classes)]
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if num_classes not in (None, len(names)):
        raise InputError(f"{path}: {len(names)} names, but --num-classes is {num_classes}")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a class name stands there twice")
    if not 2 <= len(names) <= 255:
        raise InputError(f"{path}: {len(names)} names, expected 2 to 255")
    return names


def _require_folder(root):
    if root is None:
        raise InputError("which folder? pass --root DIR")
    if not os.path.isdir(root):
        raise InputError(f"{root}: {'not a folder' if os.path.exists(root) else 'no such folder'}; pass --root with the folder of the data")


# ---------------------------------------------------------------------------------------------------------------------
# Label subsets

# The counts that the paper gives and rounding (half to even) does not: 1/30 of Cityscapes is the published split of 100, and many
# have two images of Pascal Context less.
PAPER_COUNTS = {(2975, Fraction(1, 30)): 100, (4996, Fraction(1, 5)): 1000}


def label_subset(ids, amount, seed):
    """Indices of a subset of `ids`: of as many as the int `amount`, or of the share Fraction `amount` in (0, 1].

    A function of (ids, amount, seed): the ids are ranked by a hash of seed and id, and the first ones taken. So the 1 % subset
    lies inside the 5 % subset of the same seed, and the order in which ids are listed does not matter.
    """
    count = amount
    if isinstance(amount, Fraction):
        count = PAPER_COUNTS.get((len(ids), amount), round(len(ids) * amount))
    if not 1 <= count <= len(ids):
        asked = f"{amount} of them is {count}" if isinstance(amount, Fraction) else f"{amount} asked for"
        raise InputError(f"there are {len(ids)} labelled images, {asked}; expected 1 to {len(ids)}")
    ranked = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{Path(ids[i]).as_posix()}".encode()).digest())
    return sorted(ranked[:count])


def add_subset_arguments(parser):
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--fraction", type=fraction, metavar="F", help="share of the labelled images: 1/8, 0.05, 5%% (default: all)")
    labels.add_argument("--labels", type=runtime.positive_int, metavar="N", help="number of labelled images")
    parser.add_argument("--subset-seed", type=runtime.non_negative_int, default=0, metavar="N",
                        help="which ones; subsets of one seed are nested")


def fraction(text):
    """"1/8", "0.05" or "5%" as a string that says the same in lowest terms: arguments are saved as plain values."""
    try:
        value = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the images, such as 1/8, 0.05 or 5%")
    return str(value)


def chosen_labels(source, args):
    """`source`, or the subset of it that --fraction or --labels asks for."""
    if args.labels is None and args.fraction is None:
        return source
    return source.subset(label_subset([source.name(i) for i in range(len(source))], args.labels or Fraction(args.fraction), args.subset_seed))


def check(source, first=0, step=1, progress=False):
    """Read every step-th sample: a wrong mask is named now, not after hours of training."""
    with ThreadPoolExecutor(8) as pool:
        numbers = range(first, len(source), step)
        for _ in tqdm(pool.map(source.read, numbers), total=len(numbers), unit="image", disable=not progress):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# Classes and colours


def class_colours(data, count):
    """(count, 3) uint8: the set's own colours, or those of pictures.py."""
    if data == "cityscapes":
        return _hex_colours(CITYSCAPES_COLOURS)
    if data == "ade20k":
        return _hex_colours(ADE20K_COLOURS)
    if data in ("voc", "pascal_context"):                                 # the VOC development kit's colour map; without background: from 1
        values = np.arange(256)[:, None]
        bits = sum(((values >> 3 * j + np.arange(3)) & 1) << 7 - j for j in range(3)).astype(np.uint8)
        return bits[1:count + 1] if count == 59 else bits[:count]
    return palette(count)


def _hex_colours(text):
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3)


CITYSCAPES_TREE = "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png"
CITYSCAPES = ("road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, "
              "truck, bus, train, motorcycle, bicycle")
CITYSCAPES_COLOURS = ("804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 "
                      "005064 0000e6 770b20")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)          # labelId of each class
CITYSCAPES_LABELS = {"_labelIds.png": label_map({**dict.fromkeys(range(34), 255), **{v: i for i, v in enumerate(CITYSCAPES_IDS)}}),
                     "_labelTrainIds.png": label_map({i: i for i in range(19)})}

VOC = ("background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
       "pottedplant, sheep, sofa, train, tvmonitor")

# In the order of the values that the usual converter writes, which is alphabetical.
PASCAL_CONTEXT = ("aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, ceiling, "
                  "chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse, keyboard, "
                  "light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, "
                  "sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood")

ADE20K_TREE = "ADEChallengeData2016/{images,annotations}/{training,validation}"
ADE20K = ("wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table, "
          "mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, "
          "fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, "
          "sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, "
          "screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, "
          "stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, "
          "chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, "
          "escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, "
          "swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, "
          "microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, "
          "ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag")
ADE20K_COLOURS = ("787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 "
                  "8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 "
                  "ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff "
                  "8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff "
                  "00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff "
                  "ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff "
                  "00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 "
                  "5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 "
                  "0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff "
                  "b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff")


# ---------------------------------------------------------------------------------------------------------------------
# The script: look at a data set before a GPU waits for it


def main():
    parser = runtime.Parser(__doc__)
    runtime.add_data_arguments(parser, LABELLED)
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which part of the data set")
    parser.add_argument("--num-classes", type=runtime.positive_int, metavar="N", help="as in finetune.py")
    add_subset_arguments(parser)
    parser.add_argument("--check", action="store_true", help="read every image and mask of the list")
    args = parser.parse_args()
    source, names = segmentation_pairs(args.data, args.root, args.split, args.num_classes)
    if source is None:
        raise InputError(f"{args.root}: no folder images/{args.split}")
    subset = chosen_labels(source, args)
    for line in (source.note, f"{len(names)} classes, {len(subset)} of {len(source)} pairs of {args.split}"):
        if line:
            print(line, file=sys.stderr)
    if args.check:
        check(subset, progress=sys.stderr.isatty())
        print(f"{len(subset)} images and masks read, all as they should be", file=sys.stderr)
    for i in range(len(subset)):
        print(subset.line(i))


if __name__ == "__main__":
    runtime.run(main)
