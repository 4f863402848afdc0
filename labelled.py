"""Pairs of image and mask for stage 3 and evaluation: which files, what their values mean, subsets."""
import dataclasses
import hashlib
import re
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision import tv_tensors

import shapes
from common import UserError, table
from data import IGNORE, image_size, read_image, read_mask
from datasets import DATA_SETS, Source, all_shapes, files_below, folder_of, form_of, home, left_out, plain


@dataclasses.dataclass
class Pairs(Source):
    """A row is (image, mask), paths below root; values: see read_mask."""
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
        if mask.shape != size:
            raise UserError(f"{path}: {tuple(mask.shape)} (H, W), expected its image's {tuple(size)}")
        return mask

    def look(self, i):
        """(path of the mask, its pixels by class, whether EXIF turns the image, {value: colour})."""
        image, path = (Path(self.root, path) for path in self.rows[i])
        size, is_turned = image_size(image)
        pixels = np.bincount(self.mask(i, size).flatten(), minlength=256)
        colours = {}
        with Image.open(path) as picture:
            if picture.mode == "P" and not isinstance(next(iter(self.values)), tuple):
                rgb = picture.getpalette("RGB")
                colours = {value: rgb[3 * value:3 * value + 3] for _, value in picture.getcolors()}
        return path, pixels, is_turned, colours


def training_and_validation(args, classes):
    """(train, val or None), with --labels of the training images."""
    sources = labelled(args, classes)
    train, val = sources.get("train"), sources.get("val")
    if not train:
        raise UserError(f"{args.root}: no training images; see --root, --images, --masks")
    both = {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val or []))}
    if both:
        raise UserError(f"{min(both)}: is a training and a validation image; put it in one list")
    if args.labels:
        if args.labels > len(train):
            raise UserError(f"--labels {args.labels}: there are {len(train)} labelled images")
        train = train.subset(sorted(ranking(train, args.seed)[:args.labels]))
    return train, val


def labelled(args, classes):
    """{"train": source, "val": source}, without empty ones. With --val-list alone the other images train."""
    train, val = (images_of(args, classes, part) for part in ("train", "val"))
    if train and args.val_fraction is not None:
        if val:
            raise UserError(f"--val-fraction {args.val_fraction}: there are validation images; drop it")
        count = round(args.val_fraction * len(train))
        if not 0 < count < len(train):
            raise UserError(f"--val-fraction {args.val_fraction}: {count} of {len(train)} images")
        ranked = ranking(train, "validation")
        val = train.subset(sorted(ranked[:count]))
        train = train.subset(sorted(ranked[count:]))
    elif train and args.val_list and not args.train_list:
        held_out = {*val.rows}
        train = train.subset([i for i, row in enumerate(train.rows) if row not in held_out])
    return {part: source for part, source in (("train", train), ("val", val)) if source}


def images_of(args, classes, part):
    """The Pairs of a part, train or val, or None. A list may name images of both parts; without a list a part
    has those of its folder. Patterns without {part} mean one folder, for training."""
    if args.data == "shapes":
        return all_shapes(args, part)
    row = DATA_SETS[args.data]
    images, masks = plain(args.images or row.images), plain(args.masks or row.masks)
    folders = [folder_of(pattern.replace("{part}", "*")) for pattern in (images, masks)]
    root = home(args, row.places, folders[1])
    list_file = args.train_list if part == "train" else args.val_list
    if list_file is None and row.lists:
        list_file = f"{root}/{row.lists}".replace("{part}", part)

    words = {"train": ""}
    if "{part}" in images:
        words = {"train": row.words[0], "val": row.words[1]}
    pairs, others = [], []
    if list_file:
        found = {name: find_pairs(root, images, masks, word)[0] for name, word in words.items()}
        pairs = select(list_file, root, found.get(part, []), sum(found.values(), []))
    elif part in words:
        pairs, others = find_pairs(root, images, masks, words[part])
    if not pairs:
        return None
    note = left_out(len(others), min(others, default=""))
    alone = [pair.image or pair.mask for pair in pairs if None in pair]
    if alone:
        raise UserError(f"{Path(root, alone[0])}: {len(alone)} without a partner{note}; expected {images}, "
                        f"{masks} with equal text for *; pass others, --train-list or --val-list")
    rows = [(pair.image, pair.mask) for pair in pairs]
    folders = [Path(root, folder) for folder in folders]
    return Pairs(rows, f"{len(rows)} pairs{note}", folders, root, classes.values)


# ---- Pairs


class Pair(NamedTuple):
    star: str   # the text for the `*`
    image: str  # path below the root, or None
    mask: str   # the same


def find_pairs(root, images, masks, word):
    """([Pair, ...], other files beside the images). word: what stands for {part}."""
    mask_of, _ = matches(root, masks.replace("{part}", word).replace("//", "/"))
    image_of, others = matches(root, images.replace("{part}", word), without={*mask_of.values()})
    return [Pair(star, image_of.get(star), mask_of.get(star)) for star in {**image_of, **mask_of}], others


def matches(root, pattern, without=()):
    """({text for the `*`: path}, other files in the folder)."""
    start, form = folder_of(pattern), form_of(pattern)
    found, others = {}, []
    if not Path(root, start).is_dir():
        return found, others
    for folder, names in files_below(root, start):
        for path in (folder + name for name in names if folder + name not in without):
            match = form.fullmatch(plain(path))
            if match is None:
                others.append(path)
                continue
            star = "/".join(match.groups())
            if star in found:
                raise UserError(f"{root}/{path} and {found[star]} match {pattern}; delete one")
            found[star] = path
    return found, others


def select(list_file, root, own, pairs):
    """The pairs that a text file lists, in its order.

    A line names an image by its path (after any other folders) or by its text for `*`; if both parts have
    this text, the pair in `own` is taken. The mask may follow after a space or tab, named in either way.
    """
    pairs = [pair for pair in pairs if pair.image]
    by_path = {plain(pair.image): pair for pair in pairs}
    by_star = {pair.star: pair for pair in [*pairs, *own] if pair.image}
    chosen = {}  # {pair: None}, a set in order
    lines = Path(list_file).read_text("utf-8-sig", "surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        line = plain(line.strip())
        if not line:
            continue
        pair, image, mask = parts_of(line, by_path, by_star)
        problem = None
        if pair is None:
            problem = "names no image"
        elif mask and mask != pair.star and plain(pair.mask or "") not in ends_of(mask):
            problem = f"names another mask than --masks, {pair.mask}"
        elif is_another(image, root, pair.image) or is_another(mask, root, pair.mask):
            problem = "is no file of --images or --masks"
        elif pair in chosen:
            problem = "is there again"
        if problem:
            raise UserError(f"{list_file}, line {number}: {line!r} {problem}; expected each image once, by "
                            "path or text for *, alone or with its mask")
        chosen[pair] = None
    if not chosen:
        raise UserError(f"{list_file}: empty; expected one image per line")
    return list(chosen)


def parts_of(line, by_path, by_star):
    """(the pair whose image a line names or None, this name, the text after it). Names may hold spaces."""
    ends = [gap.start() for gap in re.finditer(r"\s+|$", line)]
    for end in reversed(ends):  # the longest name
        pair = by_path.get(line[:end]) or by_star.get(line[:end])
        if pair:
            return pair, line[:end], line[end:].strip()
    for end in ends:  # the shortest after other folders
        for path in ends_of(line[:end]):
            if path in by_path:
                return by_path[path], line[:end], line[end:].strip()
    return None, line, ""


def is_another(file, root, path):
    """Whether `file`, absolute or below the root, is there and is not root/path."""
    file = Path(root, file)
    return file.is_file() and not file.samefile(Path(root, path))


def ends_of(path):
    """a/b/c -> [a/b/c, b/c, c]."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


# ---- Classes


class Classes(NamedTuple):
    names: list
    colours: list  # (R, G, B)
    values: dict  # {mask value or (R, G, B): class index or IGNORE}


def palette(count):
    """`count` colours (R, G, B): black, then hues a golden section apart."""
    hues = [hsv_to_rgb(i * 0.618034 % 1, 0.8, (235, 175)[i // 7 % 2]) for i in range(1, count)]
    return [(0, 0, 0), *(tuple(map(round, hue)) for hue in hues)]


def classes_of(args):
    """The Classes of --data."""
    if args.data == "shapes":
        names = [*shapes.CLASSES]
        return Classes(names, palette(len(names)), {i: i for i in range(len(names))})
    if args.data == "folder":
        return read_classes(f"{home(args)}/classes.txt")
    name = args.data
    if name == "cityscapes" and re.search("train_?id", args.masks or "", re.IGNORECASE):
        name = "cityscapes_train_ids"
    return read_classes(Path(__file__).parent / "classes" / f"{name}.txt")


FORM = ("2 to 255 classes in UTF-8, all lines `name` (line n is value n, from 0), `value name`, `R G B name` "
        "or `value R G B name`; values to 255, each once; words that begin with letters")
# Refuses `sky 1`, `sky (0 0 0)` and signs of YAML, JSON or CSV
NAME = re.compile(r"""(?!.*[ (]\W*\d)[^\W\d_][^!"#$%*,:;<=>?@\[\\\]^`{|}~]*""")


def read_classes(path):
    """The Classes of a text file (see README.md); lines of other forms are refused."""
    names, colours, values = [], [], {}
    try:
        lines = Path(path).read_text("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}; expected {FORM}") from None
    for i, line in enumerate(lines):
        numbers = tuple(map(int, takewhile(str.isdecimal, line.split())))
        name = "".join(line.split(maxsplit=len(numbers))[len(numbers):]).strip()
        key = i
        if numbers:
            key = numbers if len(numbers) == 3 else numbers[0]
        if i == 0:
            form = len(numbers)
            if form == 0:
                values[IGNORE] = IGNORE
        if (len(numbers) != form or form not in (0, 1, 3, 4) or max(numbers, default=0) > 255 or key in values
                or not NAME.fullmatch(name) or not name.isprintable()):
            raise UserError(f"{path}, line {i + 1}: {line!r}; expected {FORM}")
        if name.lower() == "ignore":
            values[key] = IGNORE
            continue
        if name not in names:
            names.append(name)
            colours.append(numbers[-3:])
        values[key] = names.index(name)
    if not 2 <= len(names) <= 255:
        raise UserError(f"{path}: {len(names)} classes; expected {FORM}")
    return Classes(names, colours if form >= 3 else palette(len(names)), values)


# ---- Subsets and survey


def ranking(source, seed):
    """Indices of a source, sorted by a hash of seed and name: smaller subsets lie in larger ones.

    PAPER SILENT on how subsets of the labels are drawn.
    """
    def key(i):
        return hashlib.sha256(f"{seed}/{source.name(i)}".encode("utf-8", "surrogateescape")).digest()
    return sorted(range(len(source)), key=key)


def survey(parts, classes):
    """A table of the share of each class in up to 500 masks of each part.

    UserError for unknown values, another size than the image's, a value of two colours (a palette may be its
    file's own), fewer than two classes.
    """
    shares, seen, turned = {}, {}, 0  # seen: {mask value: (its colour, the file)}
    for part, source in parts.items():
        pixels, some = np.zeros(256), np.unique(np.linspace(0, len(source) - 1, 500).astype(int))
        with ThreadPoolExecutor(8) as pool:
            for path, counts, is_turned, colours in pool.map(source.look, some):
                pixels += counts
                turned += is_turned
                for value, colour in colours.items():
                    first, where = seen.setdefault(value, (colour, path))
                    if colour != first:
                        raise UserError(f"{path}: value {value} is {colour} in its palette, but {first} in "
                                        f"{where}; write `R G B name` in classes.txt")
        shares[part] = pixels[[*range(len(classes.names)), IGNORE]] / pixels.sum()
    if (shares["train"][:-1] > 0).sum() < 2:
        raise UserError(f"{parts['train'].root}: the training masks looked at hold fewer than two of "
                        f"{classes.names[:8]}; in a classes.txt of names line n, from 0, is value n")
    rows = [(name, *[f"{share[k]:.2%}" for share in shares.values()])
            for k, name in enumerate([*classes.names, "ignored"])]
    text = table([("of the pixels", *shares), *rows])
    if turned:
        text += f"\n{turned} of the images looked at are turned upright by EXIF, masks never"
    return text
