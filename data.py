"""Pictures and masks: how they are found, read, cropped, flipped, ordered and shared out.

    index   = ImageIndex.of_folder("photos")                           # millions of images, as one array
    source  = ImageFiles(index)                                        # datasets.py: len, name(i), read(i)
    samples = Samples(source, pretraining_transform(224), seed=0)      # samples[epoch, i]: a cropped sample
    loader  = load(samples, Batches(len(source), batch_size=512, steps=1000, seed=0))

Order, crop, flip and noise of a sample are functions of (seed, epoch, index) alone. So they are the same for
any number of loader workers and processes and after a restart, and there is no state to save.

Images travel in [0, 255], as uint8 (bands, H, W), or as float32 where their file has more than 8 bits. They
become float32 in [-1, 1] on the device (`to_pixels`). Masks are uint8 (H, W) class indices; 255 is ignored.
"""
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from torchvision.io import decode_image, decode_jpeg
from torchvision.transforms import v2
from tqdm import tqdm

from launch import InputError, SampleError, say
from run_folder import EXTENSIONS, SIGNALS, replacing

try:
    import resource
except ImportError:  # Windows
    resource = None

IGNORE = 255
PATIENCE = 600  # seconds for a micro-batch to be read
RANGES = {"uint8": (0, 255), "uint16": (0, 65535)}  # what becomes -1 and 1 without --pixel-range
ORIENTATION, BITS = ExifTags.Base.Orientation, ExifTags.Base.BitsPerSample
PHOTOMETRIC = ExifTags.Base.PhotometricInterpretation
PAGE = re.compile(r"(.*\.tiff?)#(\d+)", re.IGNORECASE | re.DOTALL)


def to_pixels(images):
    """uint8 or float32 (B, bands, H, W) in [0, 255] -> float32 in [-1, 1]: this project's one pixel range."""
    return (images.float() - 127.5) / 127.5


# ---------------------------------------- Reading one file


class UnreadableImage(SampleError):
    """A file that does not decode: an error where it has a mask, skipped and counted in pretraining."""


def split_page(name):
    """("stack.tif", 3) of "stack.tif#3", the fourth page of a TIFF; (name, 0) of any other name."""
    match = PAGE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


@dataclass(frozen=True)
class Pixels:
    """How pictures are read: with how many bands, and which values become -1 and 1 (None: see `scale`).

    huge: beyond Pillow's limit of 179 megapixels, which guards against broken files that claim a large size.
    """
    bands: int = 3
    range: tuple | None = None
    huge: bool = False


def read_image(source, name=None, pixels=Pixels()):
    """A picture as it is in its file: a tensor (bands, H, W) of the file's own type, upright by its EXIF tag.

    source: a path, with #PAGE for a page of a TIFF stack, or an open file and its name. A JPEG, PNG, WebP,
    BMP or TIFF; or an array (H, W) or (H, W, bands) in a .npy, which is mapped: only what is used of it is
    read. Grey is repeated for 3 bands, palettes and CMYK become RGB, alpha is dropped unless it is in a TIFF.
    Raises UnreadableImage, and SampleError for another number of bands and for what Pillow would drop.
    """
    name, bands = str(name or source), pixels.bands
    if pixels.huge:
        Image.MAX_IMAGE_PIXELS = None  # of this process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd EXIF tags
            is_array = name.lower().endswith(".npy")
            values = _read_array(source) if is_array else _read_picture(source, name, bands)
            if values.ndim not in (2, 3) or values.size == 0:
                raise SampleError(f"{name}: an array of shape {values.shape}, expected (H, W) or "
                                  "(H, W, bands)")
            image = torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)
    except SampleError:
        raise
    except Exception as error:  # broken bytes raise errors of all kinds in Pillow
        is_tiff = split_page(name)[0].lower().endswith((".tif", ".tiff"))
        more = "; if another program reads it, save its array (H, W, bands) as a .npy" if is_tiff else ""
        raise UnreadableImage(f"{name}: not a readable image ({_reason(error)}){more}") from None
    if len(image) == 1 and bands == 3:
        return image.expand(3, -1, -1)
    if len(image) != bands:
        raise SampleError(f"{name}: {len(image)} bands (H, W, bands: {', '.join(map(str, values.shape))}), "
                          f"expected {bands}, as --bands says (default: 3) or the checkpoint was made for")
    return image


def _read_array(source):
    """An array of real numbers from a .npy file."""
    values = np.load(source, mmap_mode="r" if isinstance(source, (str, os.PathLike)) else None)
    if not isinstance(values, np.ndarray):
        raise ValueError("a .npz archive; save one array in it as a .npy")
    if values.dtype.kind not in "buif":
        raise ValueError(f"{values.dtype} values")
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _seek(image, page, name):
    """Go to a page of a TIFF. OSError where it is cut off, SampleError for pixels that Pillow changes."""
    image.seek(page)
    if image.format != "TIFF":
        return
    tags = image.tag_v2
    if tags.next == tags.offset:  # not known, so that of the page before is left there
        raise OSError("the file is cut off in this page")
    (bits, *_), (kind, *_) = tags.get(BITS, (1,)), tags.get(ExifTags.Base.SampleFormat, (1,))
    changed = ("signed 8-bit values" if (bits, kind) == (8, 2) else
               "16-bit values of which 0 is white" if bits == 16 and tags.get(PHOTOMETRIC) == 0 else
               "32-bit values beyond 31 bits" if (bits, kind) == (32, 1) and (np.array(image) < 0).any() else
               None)
    if changed:
        raise SampleError(f"{name}: a TIFF of {changed}, which Pillow would change; save its array as a .npy")


def _read_picture(source, name, bands):
    """What Pillow reads, as an array. Two kinds are decoded by torchvision: PNGs of 16-bit colours, of which
    Pillow keeps 8 bits; and plain JPEGs, to the same values in four fifths of the time."""
    path, page = split_page(name) if isinstance(source, (str, os.PathLike)) else (source, 0)
    with Image.open(path) as image:
        _seek(image, page, name)
        depths = image.tag_v2.get(BITS, (1,)) if image.format == "TIFF" else ()
        if depths and (len(depths) != len(image.getbands()) or len(depths) > 1 and max(depths) > 8):
            raise SampleError(f"{name}: a TIFF of {len(depths)} bands of {max(depths)} bits, of which Pillow "
                              "would drop a part; save its array (H, W, bands) as a .npy instead")
        if image.format == "JPEG" and image.mode in ("L", "RGB") and image.getexif().get(ORIENTATION, 1) == 1:
            with suppress(RuntimeError):  # broken: Pillow says how
                return decode_jpeg(_content(image)).permute(1, 2, 0).numpy()
        if image.format == "PNG" and image.mode in ("RGB", "RGBA") and "16" in str(image.tile[0][3]):
            values = decode_image(_content(image), apply_exif_orientation=True).numpy()
            has_alpha = len(values) in (2, 4) and len(values) != bands
            return (values[:-1] if has_alpha else values).transpose(1, 2, 0)
        image.load()
        kind, mode = image.format, image.mode
        ImageOps.exif_transpose(image, in_place=True)
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):
        return np.array(image).astype(np.uint16)
    if mode in ("I", "F"):
        return np.array(image)
    if "transparency" in image.info and mode == "P":
        image = image.convert("RGBA")
    target = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    if mode in ("LA", "RGBA", "CMYK") and (kind == "TIFF" or len(mode) == bands):
        target = mode  # the last band counts
    return np.array(image if image.mode == target else image.convert(target))


def _content(image):
    """The bytes of the file of an open Pillow image, which stays at its place there."""
    at = image.fp.tell()
    image.fp.seek(0)
    content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    image.fp.seek(at)
    return content


def scale(image, pixel_range=None):
    """What `read_image` returns, in [0, 255]: 8 bits as they are, else float32. Clipped to the range.

    pixel_range: (low, high), which become 0 and 255; None: 0 to 65535 for 16 bits. Raises ValueError for
    pixels that are not finite, or have no range.
    """
    if pixel_range is None and image.dtype == torch.uint8:
        return image
    kind = str(image.dtype).removeprefix("torch.")
    if pixel_range is None and kind not in RANGES:
        raise ValueError(f"{kind} pixels; which values are black and white? pass --pixel-range LOW HIGH")
    low, high = pixel_range or RANGES[kind]
    values = image.float()
    if not values.isfinite().all():
        raise ValueError("NaN or infinite pixels; replace them")
    return ((values - low) * (255 / (high - low))).clamp(0, 255)


def _reason(error):
    """What Pillow says, without the name of the file or of a buffer in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    if isinstance(error, Image.DecompressionBombError):
        return "over 179 megapixels, which a broken file may claim to have; if it has them, pass --huge"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def label_map(classes, ignore_255=True):
    """{mask value: class index, or IGNORE} as an array (256,); -1: may not occur."""
    table = np.full(256, -1, np.int16)
    if ignore_255:
        table[255] = IGNORE
    table[list(classes)] = list(classes.values())
    return table


def mask_values(path, colours=False):
    """The values of a mask (H, W), as they are in its file; or its colours, R * 65536 + G * 256 + B."""
    file, page = split_page(str(path))
    is_array = file.lower().endswith(".npy")
    try:
        if is_array:
            values = _read_array(file)
        else:
            with warnings.catch_warnings(), Image.open(file) as image:
                warnings.simplefilter("ignore")  # as in read_image
                _seek(image, page, path)
                depth = max(image.tag_v2.get(BITS, (1,))) if image.format == "TIFF" else 8
                depth = 16 if image.format == "PNG" and "16" in str(image.tile[0][3]) else depth
                image.load()
    except SampleError:
        raise
    except Exception as error:  # as in read_image
        raise SampleError(f"{path}: not a readable mask ({_reason(error)})") from None
    if is_array and not colours:
        if values.ndim != 2:
            raise SampleError(f"{path}: a mask of shape {values.shape}, expected (H, W)")
        if values.dtype.kind == "f":
            wrong = values[~((np.abs(values) < 60_000) & (values == np.rint(values)))]
            if wrong.size:
                raise SampleError(f"{path}: mask value {wrong[0]}, expected whole numbers")
            values = values.astype(np.int64)
        return values
    if is_array or colours and (depth > 8 or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA")):
        found = "an array" if is_array else f"{image.mode} of {depth} bits"
        raise SampleError(f"{path}: {found}, but classes.txt has colours; expected a picture of 8 bits, RGB, "
                          "palette or grey")
    if colours and image.mode in ("LA", "RGBA") and image.getextrema()[-1] != (255, 255):
        raise SampleError(f"{path}: a colour mask that is transparent in places; expected alpha 255 or none")
    if image.format == "JPEG":
        raise SampleError(f"{path}: mask is a JPEG, which changes values; expected a PNG of class indices")
    if colours:
        return np.asarray(image.convert("RGB")).astype(np.int64) @ [65536, 256, 1]
    if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise SampleError(f"{path}: mask is {image.mode}, expected an index image (palette or grey) whose "
                          "values are classes; or write the colours to classes.txt, as `R G B name`")
    return np.asarray(image)


def read_mask(path, labels):
    """A mask as class indices uint8 (H, W), 255 where ignored.

    labels: a label_map of an index image (palette or grey; its colours are not read); or {(R, G, B): class
    index, or IGNORE}. Raises SampleError for values that may not occur.
    """
    colours = isinstance(labels, dict)
    values = mask_values(path, colours)
    if colours:
        known = np.array(sorted(labels)) @ [65536, 256, 1]
        at = np.searchsorted(known, values).clip(max=len(known) - 1)
        mask = np.where(known[at] == values, np.array([labels[key] for key in sorted(labels)])[at], -1)
    elif values.dtype == np.uint8:
        mask = labels[values]
    else:
        mask = np.where((values >= 0) & (values <= 255), labels[values.astype(np.uint8)], -1)
    if (mask < 0).any():
        known = known if colours else np.flatnonzero(labels >= 0)
        wrong, right = values_text(values[mask < 0][:1], colours), values_text(known, colours)
        found = values_text(np.unique(values), colours)
        raise SampleError(f"{path}: mask {'colour' if colours else 'value'} {wrong}, expected {right}; the "
                          f"file holds {found}; correct the mask or, for your own data, classes.txt")
    return torch.from_numpy(mask.astype(np.uint8))


def values_text(values, colours=False):
    """Sorted mask values as text, "0 to 5, or 255"; colours as "(0, 0, 0), or (255, 0, 0)"."""
    if colours:
        runs = [f"({value >> 16}, {value >> 8 & 255}, {value & 255})" for value in values]
    else:
        groups = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        runs = [f"{group[0]} to {group[-1]}" if len(group) > 1 else str(group[0]) for group in groups]
    runs = [*runs[:10], "..."] if len(runs) > 10 else runs
    return ", or ".join(filter(None, [", ".join(runs[:-1]), runs[-1]]))


def digest_of_files(paths, parts=False, whole=False):
    """A digest of the files' sizes; parts: and of three blocks of 4 KiB of each; whole: and of all bytes.

    Names and times do not count, so a copy elsewhere has the same digest.
    """
    def digest_one(path):
        content, size = b"", os.path.getsize(path)
        if parts or whole:
            with open(path, "rb") as file:
                if whole:
                    content = file.read()
                else:
                    for start in (0, (size - 4096) // 2, size - 4096):
                        file.seek(max(0, start))
                        content += file.read(4096)
        return hashlib.blake2b(content, digest_size=8, key=str(size).encode()).digest()

    digest = hashlib.blake2b(digest_size=8)
    files = dict.fromkeys(split_page(path)[0] for path in paths)  # a stack once, not once a page
    with ThreadPoolExecutor(16) as pool:
        for one in pool.map(digest_one, files):
            digest.update(one)
    return digest.hexdigest()


# ---------------------------------------- Finding files, in folders or inside .tar files that stay unopened

INDEX_FOLDER = ".ddep_index"  # beside the data
WORTH_KEEPING = 100_000  # images; fewer are listed at every start
SYNSET = re.compile(r"n\d{8}(\.tar)?")


class ImageIndex:
    """The images of `root`: records (N,) of (name, offset, size), by container: folders or .tar files.

    ImageNet-21k holds 14 million images. As Python strings their names would take gigabytes in every process.
    Here an image is a record of about 40 bytes. A large listing is kept in a file that all processes of a
    machine map: a line of JSON (the containers), then the records. What has changed since is listed again.
    In a .tar an image is read by its offset, with one pread.

    containers: {path below root: [time of change in ns, size, number of images]}, in the records' order.
    """

    def __init__(self, root, containers, records, path=None):
        self.root, self.containers, self.records, self.path = root, list(containers), records, path
        self.ends = np.cumsum([count for _, _, count in containers.values()], dtype=np.int64)

    def __len__(self):
        return len(self.records)

    def container(self, i):
        """The number of the container of image i."""
        return np.searchsorted(self.ends, i, side="right")

    def name(self, i):
        """Image i's path relative to root; inside a .tar: the path of the .tar, then the member's name."""
        name = os.fsdecode(self.records["name"][i])
        return os.path.normpath(os.path.join(self.containers[self.container(i)], name))

    def open(self, i):
        """What PIL.Image.open takes: a path, or the bytes of a .tar's member as a file."""
        offset, size = int(self.records["offset"][i]), int(self.records["size"][i])
        if offset < 0:
            return os.path.join(self.root, self.name(i))
        file = os.open(os.path.join(self.root, self.containers[self.container(i)]), os.O_RDONLY)
        try:
            return io.BytesIO(os.pread(file, size, offset))
        finally:
            os.close(file)

    def fingerprint(self):
        """A digest of the containers' names and of the names, offsets and sizes in them."""
        digest = hashlib.blake2b(json.dumps([self.containers, self.ends.tolist()]).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.records))
        return digest.hexdigest()

    def __getstate__(self):  # loader workers that are not forked map the file too
        return {**self.__dict__, "records": None if self.path else self.records}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path:
            self.records = _read_index(self.path)[1]

    @classmethod
    def of_folder(cls, root, parts=(".",), cache=None):
        """Every image below the folders root/<part>; symbolic links are followed, hidden files left out."""
        return cls._listed(root, cache, "\0".join(parts), lambda: _folders_below(root, parts))

    @classmethod
    def of_synsets(cls, root, cache=None):
        """The images of every nXXXXXXXX.tar and every folder nXXXXXXXX in root, as ImageNet-21k has them."""
        synsets = sorted(entry.name for entry in os.scandir(root) if SYNSET.fullmatch(entry.name))
        twice = {f"{name}.tar" for name in synsets} & set(synsets)
        if twice:
            raise InputError(f"{root}: holds {min(twice)} and a folder of the same name, whose images would "
                             "count twice; keep one of the two there")
        return cls._listed(root, cache, "synsets", lambda: synsets, synsets)

    @classmethod
    def _listed(cls, root, cache, what, find_containers, containers=None):
        """The index from its file, or listed now and, if it is large or has a .tar in it, written there.

        containers: those that there must be, where finding them is cheap. Raises InputError where there is no
        image, for a broken .tar, and where an index of .tar files or in `cache` cannot be written.
        """
        key = "\0".join([os.path.realpath(root) if cache else "", what])
        file_name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        path = os.path.join(cache or os.path.join(root, INDEX_FOLDER), file_name)
        old, old_records = _read_index(path)
        unchanged = all(_stamp(root, name) == known[:2] for name, known in old.items())
        if old and unchanged and containers in (None, list(old)):
            return cls(root, old, old_records, path)
        starts = dict(zip(old, np.cumsum([0] + [count for _, _, count in old.values()])))

        def listing(name):
            stamp = _stamp(root, name)
            if name in old and old[name][:2] == stamp:
                return stamp, old_records[starts[name]:starts[name] + old[name][2]]
            list_one = _list_folder if os.path.isdir(os.path.join(root, name)) else _list_tar
            return stamp, list_one(root, name)

        names = find_containers()
        with ThreadPoolExecutor(16) as pool:  # on a network disk each listing takes its time
            listed = list(tqdm(pool.map(listing, names), total=len(names), unit="folder", delay=5,
                               desc="listing images", dynamic_ncols=True))
        if not sum(len(group) for _, group in listed):
            raise InputError(f"{root}: no images in this folder, expected {', '.join(EXTENSIONS)}")
        records = np.concatenate([group for _, group in listed])
        # As wide as the longest name, which may have gone: equal listings have equal fingerprints.
        records = records.astype(_record(int(np.char.str_len(records["name"]).max())))
        found = {name: [*stamp, len(group)] for name, (stamp, group) in zip(names, listed)}
        must_keep = bool(cache) or any(os.path.isfile(os.path.join(root, name)) for name in names)
        if not must_keep and len(records) < WORTH_KEEPING:
            return cls(root, found, records)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if "." in found:  # the index folder may just have been made in it
                found["."][:2] = _stamp(root, ".")
            beside = f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"  # other machines may list too
            with replacing(path, beside) as file:
                file.write(json.dumps({"dtype": records.dtype.descr, "containers": found}).encode() + b"\n")
                file.write(records.view(np.uint8))
        except OSError as error:
            if not must_keep:  # folders on a read-only disk: listed at every start
                return cls(root, found, records)
            older = "is older than the data and " if old else ""
            raise InputError(f"{path}: the index of the images {older}cannot be written ({error.strerror}); "
                             f"pass --cache with a folder for it") from None
        if old:
            say(f"{root}: changed since it was listed; listed again")
        return cls(root, *_read_index(path), path)


def _record(width):
    return np.dtype([("name", f"S{width}"), ("offset", "<i8"), ("size", "<i8")])


def _as_records(rows):
    """[(name, offset, size), ...] of one container as an array."""
    rows = [(os.fsencode(name), offset, size) for name, offset, size in rows]
    return np.array(rows, _record(max((len(name) for name, _, _ in rows), default=1)))


def _read_index(path):
    """(containers, records) of an index file, the records mapped; ({}, None) where it is missing or torn."""
    try:
        with open(path, "rb") as file:
            head = file.readline()
        known = json.loads(head)
        dtype = np.dtype([tuple(field) for field in known["dtype"]])
        count = sum(count for _, _, count in known["containers"].values())
        right = dtype == _record(dtype["name"].itemsize)
        if right and os.path.getsize(path) == len(head) + count * dtype.itemsize:
            return known["containers"], np.memmap(path, dtype, "r", offset=len(head), shape=(count,))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}, None


def _stamp(root, name):
    """[time of change, size] of a container: when they are the same, its content is taken to be the same."""
    try:
        state = os.stat(os.path.join(root, name))
    except OSError:
        return None
    return [state.st_mtime_ns, state.st_size]


def walk(top):
    """os.walk, through links too, each folder once; InputError for one that cannot be read."""
    def refuse(error):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions")

    seen = set()
    for folder, subfolders, files in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it
            subfolders.clear()
        else:
            seen.add(real)
            yield folder, subfolders, files


def _folders_below(root, parts):
    found = []
    for part in parts:
        for folder, subfolders, files in walk(os.path.join(root, part)):
            subfolders[:] = sorted(name for name in subfolders if name != INDEX_FOLDER)
            if "args.json" in files:
                say(f"{os.path.normpath(folder)}: holds args.json, so these scripts wrote it; left out")
                subfolders.clear()
                continue
            found.append(os.path.relpath(folder, root))
    return found


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _list_folder(root, name):
    with os.scandir(os.path.join(root, name)) as entries:
        names = sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())
    return _as_records([(page, -1, 0) for file in names for page in _pages(os.path.join(root, name), file)])


def _pages(folder, name):
    """[name], or the pages of a TIFF stack, [name#0, name#1 ...], which must have one size."""
    if not name.lower().endswith((".tif", ".tiff")):
        return [name]
    path, sizes = os.path.normpath(os.path.join(folder, name)), []
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            while True:
                image.seek(len(sizes))
                if image.tag_v2.next == image.tag_v2.offset:
                    raise OSError("cut off")
                sizes.append(image.size)
    except EOFError:  # the end of the stack
        pass
    except Exception:  # as in read_image; the page is named when it is read
        sizes += sizes[:1]
    if len(set(sizes)) > 1:
        page = next(page for page, size in enumerate(sizes) if size != sizes[0])
        raise InputError(f"{path}: a stack whose pages differ in size, {sizes[0][0]}x{sizes[0][1]} and, at "
                         f"page {page}, {sizes[page][0]}x{sizes[page][1]}; save them as files of their own")
    return [name] if len(sizes) < 2 else [f"{name}#{page}" for page in range(len(sizes))]


def _list_tar(root, name):
    path, rows = os.path.join(root, name), []
    try:
        if not os.path.isfile(path):  # a link that leads nowhere, a pipe
            raise OSError("no such file")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # tarfile would keep them all
                if member.isreg() and _is_image(member.name):
                    rows.append((member.name, member.offset_data, member.size))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no end of archive at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a whole .tar file ({error}); download it again") from None
    return _as_records(rows)


# ---------------------------------------- Crops and flips: torchvision's transforms, of image and mask as one


class Scale(v2.Transform):
    """`scale` as a transform."""

    def __init__(self, pixel_range=None):
        super().__init__()
        self.pixel_range = pixel_range

    def transform(self, inpt, params):
        return tv_tensors.Image(scale(inpt, self.pixel_range)) if isinstance(inpt, tv_tensors.Image) else inpt


class RandomCrop(v2.RandomCrop):
    """v2.RandomCrop that scales pixels when they are cut out: of a mapped .npy the rest is never read."""

    def __init__(self, size, pixel_range):
        super().__init__(size, pad_if_needed=True, fill={tv_tensors.Image: 127, tv_tensors.Mask: IGNORE})
        self.scale = Scale(pixel_range)

    def transform(self, inpt, params):
        if params["needs_pad"]:  # smaller than the crop
            return super().transform(self.scale(inpt), params)
        return self.scale(super().transform(inpt, params))


class RandomResizedCrop(v2.RandomResizedCrop):
    """v2.RandomResizedCrop that scales pixels between cutting out and resizing."""

    def __init__(self, size, min_area, pixel_range):
        super().__init__(size, scale=(min_area, 1.0), antialias=True)
        self.to_scale = Scale(pixel_range)

    def transform(self, inpt, params):
        cut = self.to_scale(v2.functional.crop(inpt, **params))
        return super().transform(cut, {**params, "top": 0, "left": 0})


def pretraining_transform(size, min_area=0.08, pixel_range=None):
    """Inception-style crop (6) of min_area to all of the picture, aspect ratio 3/4 to 4/3, and flip."""
    return v2.Compose([RandomResizedCrop(size, min_area, pixel_range), v2.RandomHorizontalFlip()])


def segmentation_transform(size, crop="random", min_area=0.08, pixel_range=None):
    """Training crop of image and mask to size x size, and flip. Masks are scaled without mixing values.

    PAPER SILENT on which crop: "random" (5.1: "random cropping ... to a fixed size"; smaller pictures are
    padded, with ignore in the mask) or "inception" (6).
    """
    if crop == "inception":
        return pretraining_transform(size, min_area, pixel_range)
    return v2.Compose([RandomCrop(size, pixel_range), v2.RandomHorizontalFlip()])


def centre_crop(size, pixel_range=None):
    """The middle of the picture, for measuring a classifier."""
    return v2.Compose([Scale(pixel_range), v2.Resize(size, antialias=True), v2.CenterCrop(size)])


# ---------------------------------------- Samples, their order, their batches


def sample_seed(seed, epoch, index, purpose):
    """A 63-bit seed for one purpose: 0 order, 1 crop and flip, 2 noise."""
    state = np.random.SeedSequence((seed, epoch, index, purpose)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextmanager
def seeded(seed):
    """torch's CPU generator starts from `seed` inside, and is as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Samples(Dataset):
    """samples[epoch, index] -> {"image", "mask" or "label" where there is one, "noise_seed", "index"}.

    skip_unreadable: an image that does not decode is replaced by the next that does, and reported in
    "unreadable": [(index, message), ...].
    """

    def __init__(self, source, transform=Scale(), seed=0, skip_unreadable=False):
        self.source, self.transform = source, transform
        self.seed, self.skip_unreadable = seed, skip_unreadable

    def __getitem__(self, key):
        epoch, index = key
        try:
            sample, unreadable = self._read(index)
        except InputError as error:  # returned, for the Loader to raise: a worker's exception loses its type
            return error
        try:
            with seeded(sample_seed(self.seed, epoch, index, purpose=1)):
                sample = self.transform(sample)
        except ValueError as error:  # of `scale`
            return SampleError(f"{self.source.name(index)}: {error}")
        for key, value in sample.items():
            if isinstance(value, torch.Tensor):
                sample[key] = value.as_subclass(torch.Tensor)
        noise_seed = sample_seed(self.seed, epoch, index, purpose=2)
        return {**sample, "index": index, "noise_seed": noise_seed, "unreadable": unreadable}

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
    """For each step from `start` to `steps`: this process's share of the global batch, (epoch, index) keys.

    The samples of a run are one endless sequence, epoch after epoch, each in its own order. Step s takes
    batch_size of them from s * batch_size on: a batch may reach into the next epoch, so every batch is full.
    micro_batch: a share comes in `parts` of at most so many keys, so that no more images are loaded at once.
    """

    def __init__(self, count, batch_size, steps, seed=0, start=0, rank=0, world=1, micro_batch=None):
        self.count, self.batch_size, self.steps, self.seed, self.start = count, batch_size, steps, seed, start
        self.rank, self.share = rank, batch_size // world
        self.micro_batch = micro_batch or self.share
        self.parts = -(-self.share // self.micro_batch)

    def __len__(self):
        return (self.steps - self.start) * self.parts

    def __iter__(self):
        order_epoch, order = -1, None
        for step in range(self.start, self.steps):
            keys = []
            first = step * self.batch_size + self.rank * self.share
            for n in range(first, first + self.share):
                if len(keys) == self.micro_batch:
                    yield keys
                    keys = []
                epoch, position = divmod(n, self.count)
                if epoch != order_epoch:
                    order_epoch, order = epoch, np.arange(self.count, dtype=np.int32)
                    np.random.default_rng(sample_seed(self.seed, epoch, 0, purpose=0)).shuffle(order)
                keys.append((epoch, int(order[position])))
            yield keys


class Each(Sampler):
    """Every sample once, dealt out to the processes; rounds: the largest number of batches of a process."""

    def __init__(self, count, rank=0, world=1, batch_size=1):
        self.indices, self.batch_size = range(rank, count, world), batch_size
        self.rounds = -(-len(range(0, count, world)) // batch_size)

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first:first + self.batch_size]]


class Loader(DataLoader):
    """A DataLoader that raises the InputError which a batch holds in place of a sample.

    keep_unreadable: an UnreadableImage is yielded instead, in place of its batch.
    Raises SampleError, with names, where a batch does not come within PATIENCE seconds.
    """
    keep_unreadable = False

    def __iter__(self):
        try:
            batches = super().__iter__()
        except OSError as error:
            raise InputError(f"a loader worker cannot start ({error.strerror}); lower --workers, or raise the "
                             "limit that `ulimit -a` shows") from None
        try:
            for number in range(len(self)):
                with self._patience(number):
                    batch = next(batches)
                kept = self.keep_unreadable and isinstance(batch, UnreadableImage)
                if isinstance(batch, InputError) and not kept:
                    raise batch
                yield batch
        finally:
            del batches  # ends its workers, which the traceback of an error would keep, and its process with them

    @contextmanager
    def _patience(self, number):
        """Raises SampleError if the block, in which batch `number` comes, does not end in time."""
        def give_up(*_):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch has an error of its own for killed workers
            for worker in multiprocessing.active_children():  # one that waits for a disk would never end
                worker.kill()
            keys = next(itertools.islice(self.batch_sampler, number, None))
            names = [self.dataset.source.name(index) for _, index in keys]
            raise SampleError(f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {len(names)} images "
                              f"did not come within {PATIENCE:g} s; look at the disk and at these files, or "
                              "lower --workers")

        if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def load(samples, batches, workers=0, pin_memory=False):
    """A Loader of `samples` in `batches` (Batches or Each)."""
    if workers and resource is not None:
        needed, (soft, hard) = 64 + 8 * workers, resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= hard < needed:  # -1: no limit
            raise InputError(f"--workers {workers} may need {needed} open files, the limit is {hard}; raise it "
                             f"(`ulimit -n {needed}`) or lower --workers")
        if 0 <= soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return Loader(samples, batch_sampler=batches, num_workers=workers, collate_fn=_collate,
                  pin_memory=pin_memory, worker_init_fn=_ignore_signals)


def in_rounds(loader, between):
    """The batches of a loader over Each; between() is called before each, equally often on all processes."""
    batches = iter(loader)
    for _ in range(loader.batch_sampler.rounds):
        between()
        batch = next(batches, None)
        if batch is not None:  # else other processes have one more
            yield batch


def _ignore_signals(worker):
    """A signal that stops a run reaches its loader workers too; they go on until the run is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(items):
    for item in items:
        if isinstance(item, InputError):
            return item
    unreadable = [report for item in items for report in item.pop("unreadable")]
    if len({item["image"].dtype for item in items}) > 1:  # pictures of 8 and of 16 bits
        items = [{**item, "image": item["image"].float()} for item in items]
    return {**default_collate(items), "unreadable": unreadable}
