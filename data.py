"""Pictures and masks: how they are read, cropped, flipped, ordered and shared out.

    source   = pretraining_images("folder", "photos/")                      # datasets.py: len(source), source.read(i) -> one sample
    samples  = Samples(source, pretraining_transform(224), seed=0)          # samples[epoch, i] -> one cropped sample
    batches  = load(samples, Batches(len(source), batch_size=512, steps=1000, seed=0))

Order, crop, flip and noise of a sample are functions of (seed, epoch, index) and of nothing else. So they are the same for
any number of loader workers, for any number of processes at one global batch size, and after a restart; and there is no
generator or loader state to save.

Images travel as uint8 (3, H, W) and become float32 in [-1, 1] on the device (`to_pixels`). Masks are uint8 (H, W) class
indices, 255 = ignore.
"""
import signal
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from runtime import InputError

IGNORE = 255


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


def read_image(source, name=None):
    """Any JPEG, PNG, WebP or BMP (a path, or an open file and its name) as RGB uint8 (3, H, W), turned upright by its EXIF tag.
    Alpha is dropped, 16-bit greys are scaled to 8, of an animation the first picture is taken. Raises UnreadableImage, whose line
    names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow warns of large pictures and odd EXIF tags
            with Image.open(source) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":           # 16-bit grey; Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image, np.float64).clip(0, 65535) / 257).round().astype(np.uint8))
            if "transparency" in image.info and image.mode == "P":
                image = image.convert("RGBA")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:                                            # Pillow's decoders meet broken bytes with all kinds of errors
        raise UnreadableImage(f"{name or source}: not a readable image ({_reason(error)})") from None


def _reason(error):
    """What Pillow says, without the name of the file or of a buffer in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def label_map(classes):
    """What the values of a mask stand for: {value: class index, or IGNORE} as (256,) int16, -1 for values that may not occur.
    255 is always IGNORE."""
    table = np.full(256, -1, np.int16)
    table[list(classes)] = list(classes.values())
    table[IGNORE] = IGNORE
    return table


def read_mask(path, labels):
    """An index PNG (palette or grey) as class indices uint8 (H, W), by a label_map: read are the indices, never the colours.

    Raises SampleError for colours and for values that may not occur, naming the file and the value.
    """
    expected = f"0 to {np.flatnonzero(labels[:IGNORE] >= 0).max()}, or {IGNORE} to ignore"
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:                                            # as in read_image
        raise SampleError(f"{path}: not a readable mask ({_reason(error)})") from None
    if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise SampleError(f"{path}: mask is {image.mode}, expected an index image (palette or grey) whose pixel values are class "
                          f"indices {expected}; convert its colours to indices first")
    if image.format == "JPEG":
        raise SampleError(f"{path}: mask is a JPEG, whose compression changes values; expected a PNG of class indices")
    values = np.asarray(image).astype(np.int64)
    mask = np.where((values >= 0) & (values <= 255), labels[values.clip(0, 255)], -1)
    if (mask < 0).any():
        raise SampleError(f"{path}: mask value {values[mask < 0][0]}, expected {expected}; correct the mask or, for your own data, the "
                          f"number of classes")
    return torch.from_numpy(mask.astype(np.uint8))


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
                    order_epoch, order = epoch, np.arange(self.count, dtype=np.int32)
                    np.random.default_rng(sample_seed(self.seed, epoch, 0, purpose=0)).shuffle(order)
                keys.append((epoch, int(order[position])))
            yield keys


class Each(Sampler):
    """Every sample once, dealt out to the processes: none is padded, none counted twice. One at a time where sizes differ.

    rounds: the number of batches of the process that has most.
    """

    def __init__(self, count, rank=0, world=1, batch_size=1):
        self.indices, self.batch_size = range(rank, count, world), batch_size
        self.rounds = -(-len(range(0, count, world)) // batch_size)

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first:first + self.batch_size]]


def load(samples, batches, workers=0, pin_memory=False):
    """A DataLoader over `batches` (Batches or Each); iterate over it with `raise_errors`."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory,
                      prefetch_factor=2 if workers else None, worker_init_fn=_leave_signals_to_the_main_process)


def _leave_signals_to_the_main_process(worker):
    """A signal that stops a run reaches its loader workers too; they go on until the main process has saved."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def raise_errors(loader):
    """The batches of `load`, until one holds an InputError, which is raised."""
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def in_rounds(loader, between):
    """The batches of a loader over Each, errors raised; between() is called before each, equally often on all processes."""
    batches = raise_errors(loader)
    for _ in range(loader.batch_sampler.rounds):
        between()
        batch = next(batches, None)
        if batch is not None:                                             # else others have one more
            yield batch


def _collate(items):
    for item in items:
        if isinstance(item, InputError):
            return item
    unreadable = [entry for item in items for entry in item.pop("unreadable")]
    return {**default_collate(items), "unreadable": unreadable}
