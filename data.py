"""Read, crop and flip one sample; the order of samples.

A source has len(source), source.name(i) and source.read(i), a dictionary of "image" (tv_tensors.Image) and
perhaps "mask" (tv_tensors.Mask) or "label" (int).

Order, crop, flip and noise of a sample depend on (seed, epoch, index) alone: workers, processes and restarts
change nothing.

Images are uint8 (3, H, W) until `to_pixels`. Masks are uint8 (H, W) class indices; 255 is ignored.
"""
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from common import UserError

Image.MAX_IMAGE_PIXELS = None  # large pictures are no attack here
IGNORE = 255
ORDER, CROP, NOISE = 0, 1, 2


def to_pixels(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1], channels last."""
    return ((images.float() - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)


# ---- Files


class UnreadableImage(UserError):
    """A file that does not decode."""


def open_picture(file, name):
    """The decoded PIL image. UserError unless it is one page of 8 bits a channel."""
    try:
        picture = Image.open(file)
        bits = bits_of(picture)
        pages = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # MPO: a phone's JPEG
        picture.load()
    except Exception as error:  # Pillow raises errors of all kinds
        raise UnreadableImage(f"{name}: unreadable ({error})") from None
    modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
    if bits > 8 or pages > 1 or picture.mode not in modes:
        raise UserError(f"{name}: {pages} page(s), mode {picture.mode}, {bits} bits, expected one of 8 bits "
                        "a channel; save np.uint8(255 * (x - low) / (high - low))")
    return picture


def bits_of(picture):
    """Bits a channel in the file: Pillow keeps 8 of 16."""
    if picture.format == "TIFF":
        return np.max(picture.tag_v2.get(258, 1))
    stored = picture.tile[0][3] if picture.tile else ""  # Pillow's name, such as "RGB;16B"
    if picture.format == "PPM" and isinstance(stored, tuple):
        return stored[1].bit_length()  # of the largest value
    return 16 if ";16B" in str(stored) else 8


def read_image(file, name=None):
    """RGB uint8 (3, H, W), upright by its EXIF tag, without alpha."""
    picture = open_picture(file, name or file)
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # a broken EXIF block
        pass
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def image_size(path):
    """((H, W) of read_image(path), whether EXIF turns it), without decoding."""
    with Image.open(path) as picture:
        try:
            turn = picture.getexif().get(0x0112, 1)
        except Exception:  # a broken EXIF block raises all kinds
            turn = 1
        size = picture.size if turn in range(5, 9) else picture.size[::-1]
        return size, turn in range(2, 9)


def read_mask(path, values):
    """A mask as class indices, uint8 (H, W).

    values: {value: class index or IGNORE}; all are colours (R, G, B), or all are 0 to 255.
    """
    picture, colours = open_picture(path, path), isinstance(next(iter(values)), tuple)
    if picture.format == "TIFF" and picture.tag_v2.get(262) == 0:
        raise UserError(f"{path}: stores white as zero (TIFF tag 262), which Pillow inverts; save it as PNG")
    if picture.format == "JPEG" or not (colours or picture.mode in ("1", "L", "P")):
        raise UserError(f"{path}: a {picture.format} of mode {picture.mode}, expected a PNG of 8-bit indices "
                        "or, for lines `R G B name` in classes.txt, of colours")
    if colours:
        found = np.array(picture.convert("RGB"))
        codes, mask = found @ np.array([65536, 256, 1]), np.full(found.shape[:2], -1, np.int16)
        for (r, g, b), k in values.items():
            mask[codes == 65536 * r + 256 * g + b] = k
    else:
        found, class_of = np.array(picture).astype(np.uint8), np.full(256, -1, np.int16)
        class_of[list(values)] = list(values.values())
        mask = class_of[found]
    if mask.min() < 0:
        wrong = found[mask < 0][0].tolist()
        raise UserError(f"{path}: mask value {wrong}, expected one of {[*values]}; see classes.txt")
    return torch.from_numpy(mask.astype(np.uint8))


# ---- Crops and flips


def pretraining_transform(size, min_area=0.08):
    """Inception-style crop (§6), min_area to all of the image, sides 3/4 to 4/3; flip."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(min_area, 1.0), antialias=True),
                       v2.RandomHorizontalFlip()])


def segmentation_transform(size, min_area=None):
    """Crop image and mask to size x size and flip them.

    PAPER SILENT on which crop. min_area None: a window ("random cropping ... to a fixed size", 5.1), smaller
    pictures padded (masks: IGNORE). Else: inception-style (§6).
    """
    if min_area is not None:
        return pretraining_transform(size, min_area)
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: IGNORE}
    return v2.Compose([v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])


# ---- Samples


def sample_seed(seed, epoch, index, purpose):
    """A 63-bit seed. purpose: ORDER, CROP (and flip) or NOISE."""
    state = np.random.SeedSequence((seed, epoch, index, purpose)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class Samples(Dataset):
    """samples[epoch, index] -> what source.read(index) returns, cropped and flipped, and its "noise_seed".

    replace: put the next picture in place of one that does not decode, and say so on stderr.
    """

    def __init__(self, source, transform, seed=0, replace=False):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __getitem__(self, key):
        epoch, index = key
        sample = self.read(index)
        # torch.manual_seed would also seed GPUs
        torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index, CROP))
        return {**self.transform(sample), "noise_seed": sample_seed(self.seed, epoch, index, NOISE)}

    def read(self, index):
        if not self.replace:
            return self.source.read(index)
        for i in range(index, index + 100):
            try:
                return self.source.read(i % len(self.source))
            except UnreadableImage as error:
                print(f"{error}; the next takes its place", file=sys.stderr)
        raise UserError(f"{self.source.name(index)} and the 99 pictures after it cannot be read")


class Order(Sampler):
    """Yield micro-batches, lists of keys (epoch, index), for the steps from `start` to `steps`.

    A run is one sequence of samples, epoch after epoch, each in its own order. A step takes the next
    batch_size, process `rank` of `world` its share of them, in `parts` about equal ones of up to micro_batch.
    """

    def __init__(self, count, batch_size, micro_batch, steps, seed=0, start=0, rank=0, world=1):
        self.count, self.batch_size, self.seed, self.steps = count, batch_size, seed, range(start, steps)
        self.rank, self.share = rank, batch_size // world
        self.parts = -(-self.share // micro_batch)

    def __iter__(self):
        order_epoch = -1
        for step in self.steps:
            keys, first = [], step * self.batch_size + self.rank * self.share
            for n in range(first, first + self.share):
                epoch, position = divmod(n, self.count)
                if epoch != order_epoch:
                    order_epoch, order = epoch, np.arange(self.count, dtype=np.int32)
                    np.random.default_rng(sample_seed(self.seed, epoch, 0, ORDER)).shuffle(order)
                keys.append((epoch, int(order[position])))
            for part in np.array_split(range(self.share), self.parts):
                yield [keys[i] for i in part]
