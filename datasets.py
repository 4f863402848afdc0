"""Where the files of each data set lie, what its mask values mean, and subsets of the labels."""
import dataclasses
import hashlib
import os
import re
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from glob import escape, glob
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

import common
import shapes
from common import UserError
from data import IGNORE, image_size, read_image, read_mask
from files import find_pairs, form_of, list_pictures, plain, read_lines, select


class DataSet(NamedTuple):
    images: str  # pattern (files.py); {part} is train or val
    masks: str  # pattern
    places: tuple = ("",)  # where the set may lie below --root
    words: tuple = ("train", "val")  # what stands for {part}
    lists: str = ""  # text files that list the images of a part


CONTEXT = DataSet("JPEGImages/*.jpg", "SegmentationClassContext/*.png", ("", "VOC2010", "VOCdevkit/VOC2010"),
                  lists="ImageSets/SegmentationContext/{part}.txt")
DATA_SETS = {  # the classes and mask values of a named set are in classes/
    "folder": DataSet("images/{part}/*", "masks/{part}/*"),
    "cityscapes": DataSet("leftImg8bit/{part}/*_leftImg8bit.png", "gtFine/{part}/*_gtFine_labelIds.png"),
    "pascal_context": CONTEXT,  # PAPER SILENT on 59 classes (no background) or 60
    "pascal_context_60": CONTEXT,
    "ade20k": DataSet("images/{part}/*.jpg", "annotations/{part}/*.png", ("", "ADEChallengeData2016"),
                      ("training", "validation")),
    "voc": DataSet("JPEGImages/*.jpg", "SegmentationClass/*.png", ("", "VOC20??", "VOCdevkit/VOC20??"),
                   lists="ImageSets/Segmentation/{part}.txt"),  # PAPER SILENT on evaluation on VOC
}
LABELLED = ("shapes", *DATA_SETS)  # for stage 3 and evaluation
UNLABELLED = (*LABELLED, "cityscapes_coarse", "imagenet21k")  # for stage 2
CLASSIFIED = ("shapes", "folder", "imagenet21k")  # for stage 1
SHAPES_COUNTS = {"encoder_train": 4000, "unlabelled": 4000, "train": 512, "val": 250}
FILES = ("root", "images", "masks", "train_list", "val_list", "val_fraction")  # flags that say what to read
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}


# ---- Sources: what a stage reads


@dataclasses.dataclass
class Source:
    """Pictures by number. A subclass adds name(i) and read(i); see data.py."""
    rows: list
    note: str  # what was found

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return f"{len(self)} images, {self.name(0)} to {self.name(len(self) - 1)}"

    def subset(self, chosen):
        return dataclasses.replace(self, rows=[self.rows[i] for i in chosen])


draw = cache(shapes.draw)


class Toy(Source):
    """Toy pictures; a row is (part, index)."""

    def name(self, i):
        return "{}-{:05d}".format(*self.rows[i])

    def read(self, i):
        part, index = self.rows[i]
        image, mask, label = draw(part, index)
        image = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        if part == "encoder_train":
            return {"image": image, "label": label}
        if part == "unlabelled":
            return {"image": image}
        return {"image": image, "mask": tv_tensors.Mask(torch.from_numpy(mask))}


def toy(args, part):
    common.refuse(args, FILES, "on shapes")
    rows = [(part, i) for i in range(SHAPES_COUNTS[part])]
    return Toy(rows, f"{len(rows)} toy pictures")


class Files(Source):
    """Pictures by the records of files.list_pictures, memory-mapped: a list of millions of str would take
    gigabytes in every process. folder: the one below root that holds all."""

    def __init__(self, npy, note, root, folder):
        super().__init__(np.load(npy, mmap_mode="r"), note)
        self.npy, self.root, self.folder = npy, root, folder

    def __reduce__(self):  # a loader worker that is not forked gets the path of the records
        return Files, (self.npy, self.note, self.root, self.folder)

    def name(self, i):
        path, offset, size, _ = self.rows[i].tolist()
        return os.fsdecode(path) + f", byte {offset}" * (size >= 0)

    def read(self, i):
        path, offset, size, label = self.rows[i].tolist()
        file = path = Path(self.root, os.fsdecode(path))
        if size >= 0:
            with open(path, "rb") as tar:
                tar.seek(offset)
                file, path = BytesIO(tar.read(size)), self.name(i)
        return {"image": tv_tensors.Image(read_image(file, path)), "label": label}


@dataclasses.dataclass
class Pairs(Source):
    """Images with masks; a row is (image, mask), paths below root. values: see read_mask."""
    root: str
    values: dict

    def name(self, i):
        return self.rows[i][0]

    def read(self, i):
        image = read_image(Path(self.root, self.rows[i][0]))
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(self.mask(i, image.shape[1:]))}

    def mask(self, i, size):
        path = Path(self.root, self.rows[i][1])
        mask = read_mask(path, self.values)
        if tuple(mask.shape) != tuple(size):
            raise UserError(f"{path}: {tuple(mask.shape)} (H, W), expected its image's {tuple(size)}")
        return mask


# ---- Stages 1 and 2: pictures with a class or no label


def home(args, places=("",), folder=""):
    """--root, or the one of `places` below it that holds `folder`."""
    if args.root is None:
        raise UserError(f"--data {args.data} needs a folder; pass --root DIR")
    paths = [path for place in places for path in glob(f"{escape(args.root)}/{place}".rstrip("/"))]
    found = [path for path in paths if Path(path, folder).is_dir()]
    if not found:
        raise UserError(f"--root {args.root}: no folder {folder or '.'}; see --root, --images, --masks")
    if len(found) > 1:
        raise UserError(f"--root {args.root}: holds {', '.join(found)}; pass one of them")
    return found[0]


def pretraining_images(args):
    """The source for stage 2."""
    if args.data == "shapes":
        return toy(args, "unlabelled")
    if args.data == "imagenet21k":
        return classification_images(args)[0]
    row = DATA_SETS[args.data.removesuffix("_coarse")]
    pattern = plain(args.images or row.images)
    if args.data == "folder" and args.images is None:
        pattern = "images/*" if os.path.isdir(f"{args.root}/images") else "*"
    words = row.words[:1]
    if args.data == "cityscapes_coarse":
        words += ("train_extra",)  # both, as in Table 3: "fine & coarse"
    patterns = [pattern.replace("{part}", word) for word in words]
    return files_of(home(args, row.places, form_of(patterns[0])[0]), patterns)


def files_of(root, patterns, tars=()):
    npy, note = list_pictures(root, patterns, tars)
    source = Files(npy, note, root, form_of(patterns[0])[0])
    source.note = f"{len(source)} pictures in {root}{note}"
    return source


def classification_images(args):
    """(source, class names) for stage 1: a folder or, in ImageNet-21k, a .tar file per class."""
    if args.data == "shapes":
        return toy(args, "encoder_train"), [*shapes.CLASSES[1:]]
    root = home(args)
    if os.path.isdir(f"{root}/train"):
        root += "/train"
    tars = sorted(glob("*.tar", root_dir=root)) if args.data == "imagenet21k" else []
    if tars:
        common.refuse(args, ["images"], "on .tar files")
    source = files_of(root, [plain(args.images or "*")], tars)
    names = [Path(tar).stem for tar in tars]
    if not tars:
        _, firsts = np.unique(source.rows["label"], return_index=True)
        paths = [os.fsdecode(source.rows[i]["path"]).removeprefix(source.folder) for i in firsts]
        names = [path.split("/")[0] if "/" in path else "." for path in paths]
    splits = [name for name in names if SPLITS & {*re.split("[^a-z]+", name.lower())}]  # "bullet train" too
    if len(names) < 2 or "." in names or len(splits) > 1 or any(name.lower() in SPLITS for name in splits):
        raise UserError(f"{root}: its pictures lie in {', '.join((splits or names)[:8])}; expected a "
                        "folder for each of two or more classes; pass the --root of those")
    return source, names


# ---- Stage 3: pictures with masks


class Classes(NamedTuple):
    names: list
    colours: list  # (R, G, B)
    values: dict  # {mask value or (R, G, B): class index or IGNORE}


def palette(count):
    """`count` colours (R, G, B): black for class 0, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return [(0, 0, 0), *(tuple(map(round, hue)) for hue in hues)][:count]


def classes_of(args):
    """The Classes of --data, from a text file that README.md describes."""
    if args.data == "shapes":
        names = [*shapes.CLASSES]
        return Classes(names, palette(len(names)), {i: i for i in range(len(names))})
    name, path = args.data, Path(__file__).parent / "classes"
    if name == "folder":
        name, path = "classes", home(args)
    elif name == "cityscapes" and re.search("train_?id", args.masks or "", re.IGNORECASE):
        name = "cityscapes_train_ids"
    path = Path(path, f"{name}.txt")
    lines = [line.split() for line in read_lines(path)]
    count = next(n for n in (4, 3, 1, 0)  # of numbers before the name
                 if all(len(words) > n and all(map(str.isdecimal, words[:n])) for words in lines))
    numbers = [tuple(map(int, words[:count])) or (i,) for i, words in enumerate(lines)]
    keys = numbers if count == 3 else [number[0] for number in numbers]
    named = [" ".join(words[count:]) for words in lines]
    names = [name for name in dict.fromkeys(named) if name != "ignore"]
    # Such as `1: sky`, mixed forms, `__ignore__`; without numbers before the names also `sky 1` and `sky,1`
    wrong = [name for name in named if name[0] in "#-+.0123456789" or "ignore" in name.lower() != "ignore"
             or not count and re.search(r"[\s,;:=]\d+$", name)]
    if wrong or len({*keys}) < len(keys) or not 2 <= len(names) <= 255 or max(map(max, numbers)) > 255:
        raise UserError(f"{path}: {wrong[0] if wrong else f'{len(names)} classes'}; expected 2 to 255, "
                        "all lines `name` (line n is value n, from 0), `value name`, `R G B name` or "
                        "`value R G B name`; each value once, from 0 to 255; `ignore` is no class")
    colours = [numbers[named.index(name)][-3:] for name in names] if count > 2 else palette(len(names))
    values = {key: IGNORE if name == "ignore" else names.index(name) for key, name in zip(keys, named)}
    return Classes(names, colours, values if count else {IGNORE: IGNORE, **values})


def labelled(args, classes, wanted=("train", "val")):
    """{part: source} for the parts in `wanted` (train, val) that have images. args: flags of finetune.py.

    A part has the images that its list names, from the folders of both parts; without a list, those in its
    own folder. Patterns without {part} mean one folder, for training. The training images lose those of
    --val-list, if that is the only list, or a --val-fraction.
    """
    if args.data == "shapes":
        return {part: toy(args, part) for part in wanted}
    row = DATA_SETS[args.data]
    images, masks = plain(args.images or row.images), plain(args.masks or row.masks)
    root = home(args, row.places, form_of(masks.replace("{part}", "*"))[0])
    own = row.lists and f"{root}/{row.lists}"
    lists = {"train": args.train_list or own, "val": args.val_list or own}
    if args.val_fraction is not None or args.val_list and "train" in wanted:
        wanted = ("train", "val")
    listed = any(lists[part] for part in wanted)
    found = {}  # {part: ([Pair, ...], other pictures)}, by folders
    for part, word in zip(lists, row.words if "{part}" in images else [""]):
        if listed or part in wanted:
            found[part] = find_pairs(root, images.replace("{part}", word), masks.replace("{part}", word))
    everywhere = [pair for pairs, _ in found.values() for pair in pairs if pair.image]
    sources = {}
    for part in wanted:
        pairs, others = found.get(part, ([], []))
        if lists[part]:
            pairs, others = select(str(lists[part]).replace("{part}", part), everywhere, pairs), []
        alone = [pair.image or pair.mask for pair in pairs if None in pair]
        if alone:
            raise UserError(f"{Path(root, alone[0])}: {len(alone)} without a partner; expected {images} and "
                            f"{masks} with equal text for *; add it, pass other patterns, or name the images "
                            "that have masks in --train-list and --val-list")
        if pairs:
            note = f"; left out {len(others)} other pictures, such as {others[0]}" if others else ""
            rows = [(pair.image, pair.mask) for pair in pairs]
            sources[part] = Pairs(rows, f"{len(rows)} pairs{note}", root, classes.values)
    train, val = sources.get("train"), sources.get("val")
    if train and args.val_list and not args.train_list:
        held_out = {*val.rows}
        sources["train"] = train.subset([i for i, row in enumerate(train.rows) if row not in held_out])
    elif train and args.val_fraction is not None:
        ranked, count = ranking(train, "validation"), round(args.val_fraction * len(train))
        if val or not 0 < count < len(train):
            problem = "there are validation images; drop it" if val else f"{count} of {len(train)} images"
            raise UserError(f"--val-fraction {args.val_fraction}: {problem}")
        sources["train"] = train.subset(sorted(ranked[count:]))
        sources["val"] = train.subset(sorted(ranked[:count]))
    return sources


def training_and_validation(args, classes):
    """(train, val or None), with --labels of the training images."""
    sources = labelled(args, classes)
    train, val = sources.get("train"), sources.get("val")
    if not train:
        raise UserError(f"{args.root}: no training images; pass another --root, or --images and --masks")
    both = {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val or []))}
    if both:
        raise UserError(f"{min(both)}: both a training and a validation image; put it in one list")
    if args.labels is not None:
        if args.labels > len(train):
            raise UserError(f"--labels {args.labels}: there are {len(train)} labelled images")
        train = train.subset(sorted(ranking(train, args.seed)[:args.labels]))
    return train, val


def ranking(source, seed):
    """Indices of a source, sorted by a hash of seed and name, so that smaller subsets lie in larger ones.

    PAPER SILENT on how subsets of the labels are drawn.
    """
    def key(i):
        return hashlib.sha256(f"{seed}/{source.name(i)}".encode("utf-8", "surrogateescape")).digest()
    return sorted(range(len(source)), key=key)


def survey(parts, classes):
    """A table of the share of each class in up to 500 masks of each part in {part: Pairs}.

    UserError for an unknown value, a size other than the image's, a value that has two colours (some programs
    make a palette per file), and fewer than two classes.
    """
    def look(source, i):
        image, path = (Path(source.root, path) for path in source.rows[i])
        pixels = np.bincount(source.mask(i, image_size(image)).flatten(), minlength=256)
        with Image.open(path) as picture:
            if picture.mode != "P" or isinstance(next(iter(classes.values)), tuple):
                return path, pixels, {}
            table = picture.getpalette("RGB")
            return path, pixels, {value: table[3 * value:3 * value + 3] for _, value in picture.getcolors()}

    shares, seen = {}, {}  # {mask value: (its colour, the file)}
    for part, source in parts.items():
        pixels, some = np.zeros(256), np.unique(np.linspace(0, len(source) - 1, 500).astype(int))
        with ThreadPoolExecutor(8) as pool:
            for path, counts, colours in pool.map(look, repeat(source), some):
                pixels += counts
                for value, colour in colours.items():
                    first, where = seen.setdefault(value, (colour, path))
                    if colour != first:
                        raise UserError(f"{path}: value {value} is {colour} in its palette, but {first} in "
                                        f"{where}; write `R G B name` lines to classes.txt")
        shares[part] = pixels[[*range(len(classes.names)), IGNORE]] / pixels.sum()
    if (shares["train"][:-1] > 0).sum() < 2:
        raise UserError(f"{parts['train'].root}: the training masks hold fewer than two of "
                        f"{', '.join(classes.names[:8])}; in a classes.txt of names alone line n is value n, "
                        "and 255 is ignored")
    rows = [(name, *[f"{share[k]:.2%}" for share in shares.values()])
            for k, name in enumerate([*classes.names, "ignored"])]
    return common.table([("of the pixels", *shares), *rows])
