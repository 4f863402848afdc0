"""Where each data set's files lie and what its mask values mean; label subsets.

PATTERNS. Below --root, `{part}` is train or val, and `*` is what an image and its mask have in common; it may
span folders, and behind a final `*` any ending of a picture will do. Hidden files never match, links are
followed.
"""
import hashlib
import os
import tarfile
import unicodedata
from collections import Counter
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from glob import escape, glob
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from tqdm import tqdm

import shapes
from common import UserError
from data import IGNORE, read_image, read_mask


class DataSet(NamedTuple):
    images: str                      # pattern
    masks: str                       # pattern
    values: tuple = ()               # mask values of its classes, in the order of classes/<name>.txt
    ignored: tuple = ()              # other mask values
    places: tuple = ("",)            # root itself, or where the set may lie below it, as it is distributed
    words: tuple = ("train", "val")  # its own for {part}
    lists: str = ""                  # text files with the names of a part
    counts: tuple = (0, 0)           # official numbers of pairs, train and val
    scales: tuple = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the evaluation (5.1)


CONTEXT = DataSet("JPEGImages/*.jpg", "SegmentationClassContext/*.png", tuple(range(1, 60)), (0,),
                  ("", "VOC2010", "VOCdevkit/VOC2010"), counts=(4998, 5105),
                  lists="ImageSets/SegmentationContext/{part}.txt")
DATA_SETS = {
    "folder": DataSet("images/{part}/*", "masks/{part}/*", scales=(1.0,)),
    "cityscapes": DataSet(
        "leftImg8bit/{part}/*_leftImg8bit.png", "gtFine/{part}/*_gtFine_labelIds.png",
        (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), tuple(range(34)),
        counts=(2975, 500), scales=(1.0,)),
    "pascal_context": CONTEXT,  # PAPER SILENT: 59 classes, without the background, or 60
    "pascal_context_60": CONTEXT._replace(values=tuple(range(60)), ignored=()),
    "ade20k": DataSet("images/{part}/*.jpg", "annotations/{part}/*.png", tuple(range(1, 151)), (0,),
                      ("", "ADEChallengeData2016"), ("training", "validation"), counts=(20_210, 2000)),
    "voc": DataSet("JPEGImages/*.jpg", "SegmentationClass/*.png", tuple(range(21)),
                   places=("", "VOC20??", "VOCdevkit/VOC20??"),
                   lists="ImageSets/Segmentation/{part}.txt"),  # PAPER SILENT on its evaluation
}
LABELLED = ("shapes", *DATA_SETS)  # for stage 3 and evaluation
UNLABELLED = (*LABELLED, "cityscapes_coarse", "imagenet21k")  # for stage 2
CLASSIFIED = ("shapes", "folder", "imagenet21k")  # for stage 1
SHAPES_COUNTS = {"encoder_train": 4000, "unlabelled": 4000, "train": 512, "val": 250}
PICTURES = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}


# ---------------------------------------- Sources: what a stage reads


class Source:
    """Pictures by number: len(source), source.name(i), source.read(i) -> {"image", "mask" or "label"}.

    rows: a list, or for millions an array: str would take gigabytes in every process. name_of, read_row: of
    one row. note: what was found.
    """

    def __init__(self, rows, name_of, read_row, note=""):
        self.rows, self.name_of, self.read_row, self.note = rows, name_of, read_row, note

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return f"{len(self)} images, {self.name(0)} to {self.name(len(self) - 1)}"

    def name(self, i):
        return self.name_of(self.rows[i])

    def read(self, i):
        return {key: WRAP[key](value) for key, value in self.read_row(self.rows[i]).items()}

    def subset(self, chosen):
        return Source([self.rows[i] for i in chosen], self.name_of, self.read_row, self.note)


WRAP = {"image": tv_tensors.Image, "mask": tv_tensors.Mask, "label": int}  # for torchvision's transforms
draw = cache(shapes.draw)


def toy(part):
    """Toy pictures; rows (part, index)."""
    rows = [(part, i) for i in range(SHAPES_COUNTS[part])]
    return Source(rows, "{0[0]}-{0[1]:05d}".format, read_toy, f"{len(rows)} toy pictures")


def read_toy(row):
    image, mask, label = draw(*row)
    sample = {"image": torch.from_numpy(image).permute(2, 0, 1)}
    if row[0] == "encoder_train":
        sample["label"] = label
    elif row[0] != "unlabelled":
        sample["mask"] = torch.from_numpy(mask)
    return sample


def file_name(row):  # a record (path below root as bytes, label)
    return os.fsdecode(row["path"])


def read_file(root, row):
    return {"image": read_image(os.path.join(root, file_name(row))), "label": row["label"]}


def member_name(tars, row):  # a record (number of the .tar, offset, size)
    return f"{os.path.basename(tars[row['tar']])}, byte {row['offset']}"


def read_member(tars, row):
    with open(tars[row["tar"]], "rb") as file:
        file.seek(row["offset"])
        image = read_image(BytesIO(file.read(row["size"])), member_name(tars, row))
    return {"image": image, "label": row["tar"]}


def pair_name(row):  # (image path, mask path), below root
    return row[0]


def read_pair(root, values, row):
    image_path, mask_path = (os.path.join(root, path) for path in row)
    image, mask = read_image(image_path), read_mask(mask_path, values)
    if image.shape[1:] != mask.shape:
        raise UserError(f"{mask_path}: {tuple(mask.shape)} (H, W), expected {tuple(image.shape[1:])} as "
                        f"{image_path}")
    return {"image": image, "mask": mask}


# ---------------------------------------- Finding files


def walk(root, folder):
    """Each folder from root/folder down: (its path below root, its files); hidden ones left out."""
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            entries = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        below = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:  # also for a link that leads round in a circle
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); expected a folder") from None
    yield folder, [entry for entry in entries if not entry.is_dir()]
    for name in below:
        yield from walk(root, os.path.join(folder, name))


def search(root, pattern):
    """Folder by folder: (paths below root that match the pattern, others and links that lead nowhere)."""
    if pattern.count("*") != 1:
        raise UserError(f"{pattern}: expected a pattern with one *, such as images/*.jpg")
    start, ending = pattern.split("*")
    for folder, entries in walk(root, os.path.dirname(start)):
        taken, others = [], []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            fits = path.endswith(ending) if ending else path.lower().endswith(PICTURES)
            dead = entry.is_symlink() and not os.path.exists(entry.path)
            (taken if fits and path.startswith(start) and not dead else others).append(path)
        yield taken, others


def find(root, pattern):
    """({what `*` stands for: path below root}, other paths)."""
    start, ending = (pattern + "*").split("*")[:2]
    found, left = {}, []
    for taken, others in search(root, pattern):
        # Beside pictures that match; links that lead nowhere always
        left += [path for path in others if taken or not ending or path.endswith(ending)]
        for path in taken:
            key = path[len(start):-len(ending)] if ending else os.path.splitext(path[len(start):])[0]
            key = unicodedata.normalize("NFC", key)  # "ü" may be one character or two
            if key in found:
                raise UserError(f"{os.path.join(root, path)} and {found[key]}: expected one file for both")
            found[key] = path
    return found, left


def select(list_file, found):
    """The keys of `found` that a text file selects, a line each: by the path of an image or what `*` stands
    for. The first word counts: published lists hold pairs."""
    by_name = {unicodedata.normalize("NFC", path): key for key, path in found.items()}
    by_name.update(zip(found, found))
    chosen = {}
    for number, line in enumerate(read_lines(list_file), start=1):
        words = line, line.split("\t")[0], line.split()[0]  # a name may hold spaces
        words = [unicodedata.normalize("NFC", word.lstrip("/")) for word in words]
        key = next((by_name[word] for word in words if word in by_name), None)
        if key is None or key in chosen:
            raise UserError(f"{list_file}, line {number}: {line!r} {'twice' if key else 'is no image'}; "
                            "expected paths below --root, or what * stands for in --images")
        chosen[key] = line
    return list(chosen)


CLASSES_TXT = ("expected a line for each of 2 to 255 classes, all `name` (line n is mask value n, from 0), "
               "all `value name` or all `R G B name`, each value from 0 to 255 and once")


def read_lines(path):
    try:
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        more = f"; {CLASSES_TXT}" if str(path).endswith("classes.txt") else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){more}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def folder_of(pattern):
    """The folder below which all matches of a pattern lie."""
    return os.path.dirname(pattern.split("{part}")[0].split("*")[0])


def home(args, places, folder):
    """--root, or the place below it where the set lies as it is distributed: which holds `folder`."""
    if args.root is None:
        raise UserError(f"--data {args.data}: which folder? pass --root DIR")
    found = [path for place in places for path in sorted(glob(os.path.join(escape(args.root), place)))
             if os.path.isdir(os.path.join(path, folder))]
    if len(found) != 1:
        raise UserError(f"--root {args.root}: " + (f"holds {', '.join(found)}; pass one of them" if found else
                        f"no folder {os.path.join(args.root, folder)}; see --root, --images and --masks"))
    return found[0]


# ---------------------------------------- Stages 1 and 2: pictures with a class, or without any label


def pretraining_images(args):
    """The source of stage 2, by --data, --root and --images; no labels are used."""
    if args.data == "shapes":
        return toy("unlabelled")
    if args.data == "imagenet21k":
        return classification_images(args)[0]
    row = DATA_SETS[args.data.removesuffix("_coarse")]
    pattern = args.images or row.images
    if args.data == "folder" and args.images is None:
        pattern = "images/*" if os.path.isdir(os.path.join(args.root or "", "images")) else "*"
    patterns = {pattern.replace("{part}", row.words[0]): None}
    if args.data == "cityscapes_coarse":  # Table 3: "fine & coarse"
        patterns[pattern.replace("{part}", "train_extra")] = None
    return listed(home(args, row.places, folder_of(pattern)), patterns)[0]


def classification_images(args):
    """(source, class names) of stage 1: class folders or ImageNet-21k's .tar files, in root or root/train."""
    if args.data == "shapes":
        return toy("encoder_train"), list(shapes.CLASSES[1:])
    root = home(args, ("",), "")
    if os.path.isdir(os.path.join(root, "train")):
        root = os.path.join(root, "train")
    tars = sorted(glob(os.path.join(escape(root), "*.tar")))
    if tars and args.data == "imagenet21k":
        names, rows = [Path(tar).stem for tar in tars], tar_members(tars)
        note = f"{len(rows)} pictures in {len(tars)} .tar files of {root}"
        source = Source(rows, partial(member_name, tars), partial(read_member, tars), note)
    else:
        source, names = listed(root, [args.images or "*"])
    if len(names) < 2 or any(name == "." or name.lower() in PARTS for name in names):
        raise UserError(f"{root}: its pictures lie in {', '.join(names[:8])}; expected a folder for each "
                        "of two or more classes, and no parts of a data set; pass --root with those")
    return source, names


def listed(root, patterns):
    """(all pictures that match, labelled by their folder right below the pattern's, the names of those)."""
    found, left, counts = [], [], Counter()  # found: folder by folder (its first part, the paths)
    for pattern in patterns:
        for taken, others in search(root, pattern):
            left += others
            if taken:
                below = os.path.relpath(taken[0], folder_of(pattern) or ".").split(os.sep)
                name = below[0] if len(below) > 1 else "."
                found.append((name, np.array([*map(os.fsencode, taken)])))
                counts[name] += len(taken)
    if not found:
        raise UserError(f"{root}: no pictures in it (looked for {' and '.join(patterns)})")
    number = {name: i for i, name in enumerate(sorted(counts))}
    paths = np.concatenate([paths for _, paths in found])
    rows = np.empty(len(paths), [("path", paths.dtype), ("label", np.int32)])
    rows["path"] = paths
    rows["label"] = np.repeat([number[name] for name, _ in found], [len(paths) for _, paths in found])
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(8))
    note = f"{len(rows)} pictures in {root} ({shown}{', ...' * (len(counts) > 8)})"
    if left:
        note += f"; left out {len(left)} other files or links that lead nowhere, such as {left[0]}"
    return Source(rows, file_name, partial(read_file, root), note), list(number)


def tar_members(tars):
    """The pictures in .tar files, mapped records (tar, offset, size): listed once, into torch.hub's cache."""
    known = repr([(os.path.basename(tar), os.path.getsize(tar)) for tar in tars]).encode()
    path = os.path.join(torch.hub.get_dir(), f"tars_{hashlib.sha256(known).hexdigest()[:16]}.npy")
    record = [("tar", "<i4"), ("offset", "<i8"), ("size", "<i8")]

    def list_one(number):
        try:
            with tarfile.open(tars[number], "r:") as tar:
                rows = [(number, member.offset_data, member.size) for member in tar if member.isreg() and
                        member.name.lower().endswith(PICTURES) and os.path.basename(member.name)[0] != "."]
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                    raise tarfile.ReadError("its end is missing")
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{tars[number]}: not a whole .tar file ({error}); download it again") from None
        return np.array(rows, record)

    if not os.path.exists(path):
        with ThreadPoolExecutor(16) as pool:
            rows = list(tqdm(pool.map(list_one, range(len(tars))), total=len(tars), unit=".tar", delay=5))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            np.save(file, np.concatenate(rows))
        os.replace(file.name, path)
    return np.load(path, mmap_mode="r")


# ---------------------------------------- Stage 3: pictures with masks


class Classes(NamedTuple):
    names: list
    colours: list  # (R, G, B)
    values: dict   # {mask value or (R, G, B): class index or IGNORE}


def classes_of(args):
    """The Classes of --data; of a folder by its classes.txt."""
    if args.data == "shapes":
        names = list(shapes.CLASSES)
        return Classes(names, palette(len(names)), {i: i for i in range(len(names))})
    if args.data == "folder":
        return own_classes(os.path.join(home(args, ("",), ""), "classes.txt"))
    row = DATA_SETS[args.data]
    values, ignored = row.values, (*row.ignored, IGNORE)
    if "labelTrainIds" in (args.masks or ""):  # of Cityscapes, made by users
        values, ignored = range(len(values)), (IGNORE,)
    lines = read_lines(Path(__file__).parent / "classes" / f"{args.data.removesuffix('_60')}.txt")
    lines = [line.split(maxsplit=3) for line in lines[-len(values):]]  # 59 classes are the last of 60
    return Classes([line[3] for line in lines], [tuple(map(int, line[:3])) for line in lines],
                   {**dict.fromkeys(ignored, IGNORE), **{value: k for k, value in enumerate(values)}})


def own_classes(path):
    """Classes of a text file whose lines are all `name` (line n is value n, from 0, and 255 is ignored), all
    `value name` or all `R G B name`. Lines with one name are one class; "ignore" is ignored."""
    lines = [line.split() for line in read_lines(path)]
    count = next(n for n in (3, 1, 0)
                 if all(len(words) > n and all(map(str.isdecimal, words[:n])) for words in lines))
    keys = [tuple(map(int, words[:count])) if count else (i,) for i, words in enumerate(lines)]
    named = [" ".join(words[count:]) for words in lines]
    names = [name for name in dict.fromkeys(named) if name != "ignore"]
    wrong = [name for name in named if name[0] in "#-+.0123456789"]  # `1: sky`, lines of two forms
    if wrong or len(set(keys)) < len(keys) or not 2 <= len(names) <= 255 or max(map(max, keys)) > 255:
        raise UserError(f"{path}: {wrong[0] if wrong else f'{len(names)} classes'}; {CLASSES_TXT}")
    colours = [keys[named.index(name)] for name in names] if count == 3 else palette(len(names))
    classes = [IGNORE if name == "ignore" else names.index(name) for name in named]
    values = dict(zip(keys if count == 3 else (key[0] for key in keys), classes))
    return Classes(names, colours, values if count else {IGNORE: IGNORE, **values})


def palette(count):
    """`count` colours (R, G, B): black for class 0, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return [(0, 0, 0), *(tuple(map(round, hue)) for hue in hues)][:count]


def labelled(args, part, classes):
    """The pairs of a part, train, val or test, by the data flags of finetune.py; None where there is none."""
    if args.data == "shapes":
        return toy(part) if part in SHAPES_COUNTS else None
    row = DATA_SETS[args.data]
    images, masks = args.images or row.images, args.masks or row.masks
    root, words = home(args, row.places, folder_of(masks)), {"train": row.words[0], "val": row.words[1]}
    words["test"] = "test"
    list_file = {"train": args.train_list, "val": args.val_list}.get(part)
    if list_file is None and row.lists:
        list_file = os.path.join(root, row.lists.replace("{part}", part))
    there = [p for p in words if os.path.isdir(os.path.join(
        root, os.path.dirname(images.replace("{part}", words[p]).split("*")[0])))]
    if list_file is None and (part not in there or part != "train" and "{part}" not in images):
        return None
    found, with_mask, left = {}, {}, []
    for p in [part] if list_file is None else sorted(there, key=lambda p: p == part):  # lists: of all parts
        matches, others = find(root, images.replace("{part}", words[p]))
        found, left = {**found, **matches}, left + others
        with_mask.update(find(root, masks.replace("{part}", words[p]))[0])
    keys = list(found) if list_file is None else select(list_file, found)
    alone = [found[key] for key in keys if key not in with_mask]
    if list_file is None:
        alone += [path for key, path in with_mask.items() if key not in found]
        left = set(left) - set(with_mask.values())  # of these, what may be an image
        alone += sorted(path for path in left if images[-1] == "*" or path.lower().endswith(PICTURES))
    if alone or not keys:
        raise UserError(f"{os.path.join(root, *alone[:1])}: {len(alone)} files without a partner; expected "
                        f"pairs {images} and {masks}, equal in place of *: mend that, pass --images and "
                        "--masks, or select images with --train-list and --val-list")
    note, official = f"{len(keys)} pairs", row.counts[part == "val"]
    if official not in (0, len(keys)):
        note += f" (the official set has {official})"
    rows = [(found[key], with_mask[key]) for key in keys]
    return Source(rows, pair_name, partial(read_pair, root, classes.values), note)


def training_and_validation(args, classes):
    """(train, val or None): what --train-list, --val-list, --val-fraction and --labels make of the data."""
    train, val = labelled(args, "train", classes), labelled(args, "val", classes)
    if train is None:
        raise UserError(f"{args.root}: no training images; expected images/train and masks/train, or "
                        "patterns in --images and --masks")
    if args.val_fraction is not None:
        ranked, count = ranking(train, "validation"), round(args.val_fraction * len(train))
        if val is not None or not 0 < count < len(train):
            problem = f"{count} of {len(train)} images" if val is None else "there is a validation set"
            raise UserError(f"--val-fraction {args.val_fraction}: {problem}; drop it, or pass another share")
        train, val = train.subset(sorted(ranked[count:])), train.subset(sorted(ranked[:count]))
    both = {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val or []))}
    if both:
        raise UserError(f"{min(both)}: both a training and a validation image; expected lists that differ")
    if args.labels is not None:
        if args.labels > len(train):
            raise UserError(f"--labels {args.labels}: there are {len(train)} labelled images")
        train = train.subset(sorted(ranking(train, args.seed)[:args.labels]))
    return train, val


def ranking(source, seed):
    """The indices of a source by a hash of seed and name: subsets of one seed are nested. PAPER SILENT on how
    they are drawn."""
    def key(i):
        return hashlib.sha256(f"{seed}/{source.name(i)}".encode("utf-8", "surrogateescape")).digest()
    return sorted(range(len(source)), key=key)


def survey(source, classes, crop_size):
    """Read all masks of own data: lines on the share of each class. UserError for a value that is not listed,
    for fewer than two classes, and for palettes of which each file has its own."""
    root, values = source.read_row.args

    def look(row):
        path = os.path.join(root, row[1])
        mask, picture, coloured = read_mask(path, values), Image.open(path), {}
        if picture.mode == "P" and not isinstance(next(iter(values)), tuple):
            colours = picture.getpalette()
            coloured = {k: tuple(colours[3 * k:3 * k + 3]) for _, k in picture.getcolors()}
        return path, np.bincount(mask.flatten(), minlength=256), max(mask.shape), coloured

    pixels, largest, first = np.zeros(256, np.int64), 0, {}  # first: {mask value: (its colour, the file)}
    with ThreadPoolExecutor(8) as pool:
        for path, counts, size, coloured in pool.map(look, source.rows):
            pixels, largest = pixels + counts, max(largest, size)
            for value, colour in coloured.items():
                if first.setdefault(value, (colour, path))[0] != colour:
                    raise UserError(f"{path}: value {value} is {colour} in its palette, {first[value][0]} in "
                                    f"{first[value][1]}; write `R G B name` lines to classes.txt")
    counts, width = pixels[[*range(len(classes.names)), IGNORE]], max(map(len, classes.names))
    if (counts[:-1] > 0).sum() < 2:
        raise UserError(f"{root}: the masks hold fewer than two of {', '.join(classes.names[:8])}; where "
                        "classes.txt has names alone, line n is value n and 255 is ignored")
    lines = [f"{name:{width}} {count / pixels.sum():8.2%} of the pixels"
             for name, count in zip([*classes.names, "ignored"], counts)]
    if largest < crop_size:
        lines.append(f"no picture is larger than {largest} pixels, the rest of a crop of {crop_size} is "
                     f"padding: pass --crop-size {largest}")
    return "\n".join(lines)
