"""Pictures, masks and labels: where they lie, how they are read, cropped, flipped, ordered and shared out.

    source   = pretraining_images("folder", "photos/")                      # len(source), source.read(i) -> one sample
    samples  = Samples(source, pretraining_transform(224), seed=0)          # samples[epoch, i] -> one cropped sample
    batches  = load(samples, Batches(len(source), batch_size=512, steps=1000, seed=0))

Order, crop, flip and noise of a sample are functions of (seed, epoch, index) and of nothing else. So they are the same for
any number of loader workers, for any number of processes at one global batch size, and after a restart; and there is no
generator or loader state to save.

Images travel as uint8 (3, H, W) and become float32 in [-1, 1] on the device (`to_pixels`). Masks are uint8 (H, W) class
indices, 255 = ignore.
"""
import hashlib
import os
import warnings
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

import shapes
from runtime import InputError

IGNORE = 255
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class SampleError(InputError):
    """A fault in one image or mask, which one process of many meets."""
    everywhere = False


class UnreadableImage(SampleError):
    """A file that does not decode: an error where it has a label, skipped and counted in pretraining."""


def to_pixels(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]: the one pixel range of this project (see noise.py)."""
    return (images.float() - 127.5) / 127.5


# ---------------------------------------------------------------------------------------------------------------------
# Reading one file


def read_image(path):
    """Any JPEG, PNG, WebP or BMP as RGB uint8 (3, H, W), turned upright by its EXIF tag. Alpha is dropped, 16-bit greys are
    scaled to 8. Raises UnreadableImage, whose line names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow warns of large pictures and odd EXIF tags
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableImage(f"{path}: not a readable image ({error})") from None
    if image.mode.startswith("I") or image.mode == "F":                   # 16-bit grey; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image, np.float64).clip(0, 65535) / 257).round().astype(np.uint8))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def read_mask(path, num_classes):
    """An index PNG (palette or grey) as uint8 (H, W): the indices, never the colours. Every value is below num_classes or 255.

    Raises SampleError for colours and for values out of range, naming the file and the value.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise SampleError(f"{path}: not a readable mask ({error})") from None
    if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise SampleError(f"{path}: mask is {image.mode}, expected an index image (palette or grey) whose pixel values are class "
                         f"indices 0 to {num_classes - 1}, or 255 to ignore; convert its colours to indices first")
    if image.format == "JPEG":
        raise SampleError(f"{path}: mask is a JPEG, whose compression changes values; expected a PNG of class indices")
    mask = np.asarray(image).astype(np.int64)
    wrong = mask[(mask < 0) | (mask >= num_classes) & (mask != IGNORE)]
    if wrong.size:
        raise SampleError(f"{path}: mask value {wrong[0]}, expected 0 to {num_classes - 1}, or 255 to ignore; "
                         f"correct the mask or the number of classes")
    return torch.from_numpy(mask.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Sources: len(source), source.name(i), source.read(i) -> {"image": ..., "mask": ..., "label": ...}


class ImageFiles:
    """Pictures without labels, or with one label each (stage 1)."""

    def __init__(self, root, paths, labels=None):
        self.root, self.paths, self.labels = str(root), paths, labels

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return self.paths[i]

    def read(self, i):
        sample = {"image": tv_tensors.Image(read_image(os.path.join(self.root, self.paths[i])))}
        return sample if self.labels is None else {**sample, "label": self.labels[i]}


class Pairs:
    """Pictures with masks: pairs is a list of (image path, mask path), num_classes the bound for mask values."""

    def __init__(self, root, pairs, num_classes):
        self.root, self.pairs, self.num_classes = str(root), pairs, num_classes

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    def line(self, i):
        """The pair as a line of a list file."""
        return "\t".join(self.pairs[i])

    def subset(self, indices):
        return Pairs(self.root, [self.pairs[i] for i in indices], self.num_classes)

    def read(self, i):
        image_path, mask_path = (os.path.join(self.root, path) for path in self.pairs[i])
        image, mask = read_image(image_path), read_mask(mask_path, self.num_classes)
        if image.shape[1:] != mask.shape:
            raise SampleError(f"{mask_path}: mask is {mask.shape[1]}x{mask.shape[0]}, its image {image_path} is "
                             f"{image.shape[2]}x{image.shape[1]} (upright); expected the same size")
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}


class Shapes:
    """`count` pictures of a part of the embedded data, drawn once and kept in memory (see shapes.py)."""

    def __init__(self, part, count=None, indices=None):
        self.part, self.indices, self.cache = part, range(count) if indices is None else indices, {}

    def __len__(self):
        return len(self.indices)

    def name(self, i):
        return f"{self.part}-{self.indices[i]:05d}"

    def line(self, i):
        return self.name(i)

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


# ---------------------------------------------------------------------------------------------------------------------
# The data sets, by name

DATA = ("shapes", "folder")
SHAPES_COUNTS = {"encoder_train": 4000, "encoder_val": 500, "unlabelled": 4000, "train": 512, "val": 250}


def pretraining_images(data, root):
    """Pictures for stage 2: no labels are read. folder: every image below root."""
    if data == "shapes":
        return Shapes("unlabelled", SHAPES_COUNTS["unlabelled"])
    return ImageFiles(root, list_images(root))


def classification_images(data, root):
    """(training source, validation source, class names) for stage 1.

    folder: root/train/<class>/ and root/val/<class>/; or root/<class>/, of which one image in a hundred (at least one, at most
    10,000) is held out for validation.
    """
    if data == "shapes":
        return (Shapes("encoder_train", SHAPES_COUNTS["encoder_train"]), Shapes("encoder_val", SHAPES_COUNTS["encoder_val"]),
                list(shapes.CLASSES[1:]))
    _require_folder(root)
    split = os.path.isdir(os.path.join(root, "train"))
    train_root = os.path.join(root, "train") if split else root
    names = sorted(entry.name for entry in os.scandir(train_root) if entry.is_dir())
    if len(names) < 2:
        raise InputError(f"{train_root}: {len(names)} class folders, expected two or more, each with the images of one class")
    paths, labels = _class_folders(train_root, names)
    if split and os.path.isdir(os.path.join(root, "val")):
        unknown = {entry.name for entry in os.scandir(os.path.join(root, "val")) if entry.is_dir()} - set(names)
        if unknown:
            raise InputError(f"{os.path.join(root, 'val', min(unknown))}: a class without a folder in {train_root}")
        val = ImageFiles(os.path.join(root, "val"), *_class_folders(os.path.join(root, "val"), names))
        return ImageFiles(train_root, paths, labels), val, names
    held_out = set(label_subset(paths, min(max(1, len(paths) // 100), 10_000), seed=0))
    train, val = ([i for i in range(len(paths)) if (i in held_out) == held] for held in (False, True))
    return (ImageFiles(train_root, [paths[i] for i in train], [labels[i] for i in train]),
            ImageFiles(train_root, [paths[i] for i in val], [labels[i] for i in val]), names)


def segmentation_pairs(data, root, part, num_classes=None, list_file=None):
    """(source of image and mask pairs, class names) of `part`, "train" or "val"; source None where that part does not exist.

    folder: root/images/<part>/ and root/masks/<part>/, matched by path without extension; or list_file, with one `image mask`
    per line, relative to root (or else to the file). Class names: root/classes.txt, one a line, else "class 0" and on.
    """
    if data == "shapes":
        return Shapes(part, SHAPES_COUNTS[part]), list(shapes.CLASSES)
    if root is not None or list_file is None:
        _require_folder(root)
    names = class_names(root, num_classes)
    if list_file is not None:
        base = root if root is not None else os.path.dirname(os.path.abspath(list_file))
        return Pairs(base, list_pairs(list_file, base), len(names)), names
    image_root, mask_root = os.path.join(root, "images", part), os.path.join(root, "masks", part)
    if not os.path.isdir(image_root):
        if part == "train":
            raise InputError(f"{root}: no folder images/train; expected images/train and masks/train "
                             f"(and images/val and masks/val), or --train-list FILE")
        return None, names
    images = {os.path.splitext(path)[0]: path for path in _unique_stems(image_root)}
    masks = {os.path.splitext(path)[0]: path for path in _unique_stems(mask_root)}
    for stem in images:
        if stem not in masks:
            raise InputError(f"{os.path.join(image_root, images[stem])}: no mask for this image; expected "
                             f"{os.path.join(mask_root, stem + '.png')}")
    for stem in masks:
        if stem not in images:
            raise InputError(f"{os.path.join(mask_root, masks[stem])}: no image for this mask in {image_root}")
    pairs = [(os.path.join("images", part, images[stem]), os.path.join("masks", part, masks[stem])) for stem in sorted(images)]
    return Pairs(root, pairs, len(names)), names


def class_names(root, num_classes=None):
    """The lines of root/classes.txt; without that file "class 0" to "class N-1". Both given: they must agree."""
    path = None if root is None else os.path.join(root, "classes.txt")
    if path is None or not os.path.isfile(path):
        if num_classes is None:
            raise InputError(f"{root or 'without --root'}: how many classes? pass --num-classes N, or write their names, one a line, to classes.txt")
        return [f"class {i}" for i in range(num_classes)]
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if num_classes not in (None, len(names)):
        raise InputError(f"{path}: {len(names)} names, but --num-classes is {num_classes}")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a class name stands there twice")
    if not 2 <= len(names) <= 255:
        raise InputError(f"{path}: {len(names)} names, expected 2 to 255")
    return names


def list_images(root):
    """Every image below root, relative to it, sorted; symbolic links are followed, hidden files left out."""
    _require_folder(root)
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                                                  # a link that points to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not found:
        raise InputError(f"{root}: no images in this folder; expected {', '.join(EXTENSIONS)} there or below")
    return sorted(found)


def list_pairs(list_file, base):
    """[(image, mask), ...] of a text file with one pair a line. Names may hold spaces: a tab separates, or else the space at
    which both halves are files that exist."""
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{list_file}: cannot be read ({error.strerror})") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words = line.strip().split("\t") if "\t" in line.strip() else line.strip().split(" ")
        splits = [(" ".join(words[:i]).strip(), " ".join(words[i:]).strip()) for i in range(1, len(words))]
        exist = [pair for pair in splits if all(os.path.isfile(os.path.join(base, path)) for path in pair)]
        if not exist:
            missing = [path for path in splits[0] if not os.path.isfile(os.path.join(base, path))] if len(splits) == 1 else None
            raise InputError(f"{list_file}, line {number}: " + (f"no such file: {os.path.join(base, missing[0])}" if missing else
                             f"expected `image mask`, two files below {base}, got {line.strip()!r}"))
        pairs.append(exist[0])
    if not pairs:
        raise InputError(f"{list_file}: no pairs; expected one `image mask` per line")
    return pairs


def _require_folder(root):
    if root is None:
        raise InputError("which folder? pass --root DIR")
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; pass --root with the folder of the data")


def _unique_stems(root):
    paths = list_images(root)
    for a, b in zip(paths, paths[1:]):
        if os.path.splitext(a)[0] == os.path.splitext(b)[0]:
            raise InputError(f"{root}: {a} and {b} differ in their extension alone; expected one file per image")
    return paths


def _class_folders(root, names):
    paths, labels = [], []
    for label, name in enumerate(names):
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            paths += [os.path.join(name, path) for path in list_images(folder)]
            labels += [label] * (len(paths) - len(labels))
    return paths, labels


# ---------------------------------------------------------------------------------------------------------------------
# Label subsets

# The counts that the paper gives and rounding (half to even) does not: 1/30 of Cityscapes is the published split of 100.
PAPER_COUNTS = {(2975, Fraction(1, 30)): 100}


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


# ---------------------------------------------------------------------------------------------------------------------
# Crops and flips: torchvision's transforms, which treat an image and its mask as one


def pretraining_transform(size, min_area=0.08):
    """Inception-style crop (6): of min_area to all of the picture, at an aspect of 3/4 to 4/3, scaled to size x size; flip."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(min_area, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def segmentation_transform(size, crop="random", min_area=0.08):
    """Training crop of image and mask to size x size, and left-right flip. Masks are taken nearest: no value is invented.

    PAPER SILENT on which: "random" (5.1 "random cropping ... to a fixed size"; smaller pictures are padded, with ignore in the
    mask) or "inception" (6).
    """
    if crop == "inception":
        return pretraining_transform(size, min_area)
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: IGNORE}
    return v2.Compose([v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])


def centre_crop(size):
    """The whole picture's middle, for measuring a classifier."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


# ---------------------------------------------------------------------------------------------------------------------
# Order and batches


def sample_seed(seed, epoch, index, purpose):
    """A 63-bit seed that is a function of its four arguments; purpose: 0 for order, 1 for crop and flip, 2 for noise."""
    return int(np.random.SeedSequence((seed, epoch, index, purpose)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed):
    """torch's CPU generator starts from `seed` inside, and is as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Samples(Dataset):
    """samples[epoch, index] -> {"image", "mask" or "label" where the source has them, "noise_seed", "index"}.

    skip_unreadable: an image that does not decode is replaced by the next one that does, and reported in "unreadable".
    """

    def __init__(self, source, transform=None, seed=0, skip_unreadable=False):
        self.source, self.transform, self.seed, self.skip_unreadable = source, transform, seed, skip_unreadable

    def __getitem__(self, key):
        epoch, index = key
        try:
            sample, unreadable = self._read(index)
        except InputError as error:                                       # travels in the batch: a worker cannot raise it whole
            return error
        if self.transform is not None:
            with seeded(sample_seed(self.seed, epoch, index, purpose=1)):
                sample = self.transform(sample)
        sample = {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        return {**sample, "index": index, "noise_seed": sample_seed(self.seed, epoch, index, purpose=2), "unreadable": unreadable}

    def _read(self, index):
        unreadable = []
        for i in range(len(self.source)):
            at = (index + i) % len(self.source)
            try:
                return self.source.read(at), unreadable
            except UnreadableImage as error:
                if not self.skip_unreadable or len(unreadable) == 100:
                    raise
                unreadable.append((at, str(error)))
        raise UnreadableImage(f"{unreadable[0][1]}; and no other image is readable")


class Batches(Sampler):
    """For each step from `start` to `steps`: this process's share of the global batch, as a list of (epoch, index).

    The samples of a run are one endless sequence, epoch after epoch, each in an order of its own; step s takes the
    batch_size samples from s * batch_size on. A batch may reach over the end of an epoch, so every batch is full.
    """

    def __init__(self, count, batch_size, steps, seed=0, start=0, rank=0, world=1):
        self.count, self.batch_size, self.steps, self.seed, self.start = count, batch_size, steps, seed, start
        self.rank, self.share = rank, batch_size // world

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        order_epoch, order = -1, None
        for step in range(self.start, self.steps):
            keys = []
            first = step * self.batch_size + self.rank * self.share
            for n in range(first, first + self.share):
                epoch, position = divmod(n, self.count)
                if epoch != order_epoch:
                    rng = np.random.default_rng(sample_seed(self.seed, epoch, 0, purpose=0))
                    order_epoch, order = epoch, rng.permutation(self.count)
                keys.append((epoch, int(order[position])))
            yield keys


class Each(Sampler):
    """Every sample once, dealt out to the processes: none is padded, none counted twice. One at a time where sizes differ."""

    def __init__(self, count, rank=0, world=1, batch_size=1):
        self.indices, self.batch_size = range(rank, count, world), batch_size

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first:first + self.batch_size]]


def load(samples, batches, workers=0, pin_memory=False):
    """A DataLoader over `batches` (Batches or Each); iterate over it with `raise_errors`."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory,
                      prefetch_factor=2 if workers else None)


def raise_errors(loader):
    """The batches of `load`, until one holds an InputError, which is raised."""
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _collate(items):
    for item in items:
        if isinstance(item, InputError):
            return item
    unreadable = [entry for item in items for entry in item.pop("unreadable")]
    return {**default_collate(items), "unreadable": unreadable}
