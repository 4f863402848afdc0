"""data.py and shapes.py: reading, cropping, ordering, sharing out."""

import errno
import io
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from conftest import imagenet21k, jpeg, png16, tiff, write_image, write_mask, write_stack, write_tar
from PIL import Image, ImageOps
from torchvision import tv_tensors

import data
import datasets
from data import ImageIndex
from datasets import pretraining_images
from launch import InputError

THREE = data.label_map({0: 0, 1: 1, 2: 2})

# ------------------------------------------------------------------------------------------------ reading


def test_every_mode_of_picture_becomes_rgb(tmp_path):
    colours = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    rgb, grey = Image.fromarray(colours), Image.fromarray(colours[..., 0])
    rgb.save(tmp_path / "rgb.png")
    rgb.save(tmp_path / "rgb.bmp")
    rgb.save(tmp_path / "lossless.webp", lossless=True)
    rgb.convert("RGBA").save(tmp_path / "rgba.png")
    for name in ("rgb.png", "rgb.bmp", "lossless.webp", "rgba.png"):
        assert np.array_equal(data.read_image(tmp_path / name).permute(1, 2, 0), colours), name
    grey.save(tmp_path / "grey.png")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for name in ("grey.png", "grey16.png"):
        for channel in data.scale(data.read_image(tmp_path / name)):
            assert np.allclose(channel, colours[..., 0], atol=1e-4), name
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    assert data.read_image(tmp_path / "palette.png")[:, 1, 0].tolist() == [70, 80, 90]
    Image.new("CMYK", (4, 4),
              (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")  # no cyan, all magenta and yellow: red
    assert data.read_image(tmp_path / "cmyk.jpg")[:, 2, 2].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("kind, how", [
    ("RGB", dict(subsampling=0, quality=95)), ("RGB", dict(subsampling=1)), ("RGB", dict(subsampling=2, quality=10)),
    ("RGB", dict(progressive=True)), ("RGB", dict(keep_rgb=True)), ("L", {}), ("L", dict(progressive=True)),
    ("CMYK", {}), *[("RGB", dict(orientation=turn)) for turn in range(1, 9)]])
@pytest.mark.parametrize("size", [(64, 48), (37, 53), (1, 9)])
def test_a_jpeg_is_to_the_bit_what_pillow_makes_of_it(kind, how, size, tmp_path):
    random, how = np.random.RandomState(0), dict(how)
    picture = Image.fromarray(random.randint(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = how.pop("orientation", 1)
    picture.convert(kind).save(tmp_path / "a.jpg", exif=exif, **how)
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB")
    assert np.array_equal(data.read_image(tmp_path / "a.jpg").permute(1, 2, 0), wanted)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:-len(content) // 8])
    with pytest.raises(InputError, match="cut.jpg: not a readable image"):
        data.read_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("kind, pixel_range, wanted", [
    (np.uint8, None, [0, 100, 200]),
    (np.uint16, None, [0, 100 / 257, 200 / 257]),
    (np.uint16, (0, 200), [0, 127.5, 255]),
    (np.uint8, (100, 200), [0, 0, 255]),
    (np.int16, (-100, 300), [63.75, 127.5, 191.25]),
    (np.float32, (0, 400), [0, 63.75, 127.5]),
    (np.float64, (0, 400), [0, 63.75, 127.5]),
    (np.int32, (0, 400), [0, 63.75, 127.5])])
def test_a_pixel_range_becomes_0_to_255_in_every_type(kind, pixel_range, wanted, tmp_path):
    values = np.array([[[0], [100], [200]]]).astype(kind)
    np.save(tmp_path / "array.npy", values[..., 0])
    np.save(tmp_path / "foreign.npy", values.astype(values.dtype.newbyteorder(">")))
    files = ["array.npy", "foreign.npy"]
    if kind != np.float64:
        tiff(tmp_path / "picture.tif", values)
        files.append("picture.tif")
    for name in files:
        image = data.read_image(tmp_path / name, pixels=data.Pixels(bands=1))
        assert image.shape == (1, 1, 3)
        assert data.scale(image, pixel_range).flatten().tolist() == pytest.approx(wanted, abs=1e-4), name


def test_colours_of_16_bits_keep_all_bits(tmp_path):
    values = np.random.RandomState(0).randint(0, 65536, (5, 7, 4))
    for bands in (1, 2, 3, 4):
        png16(tmp_path / "a.png", values[..., :bands])
        image = data.read_image(tmp_path / "a.png", pixels=data.Pixels(bands=bands))
        assert np.array_equal(image.permute(1, 2, 0), values[..., :bands]), bands
    png16(tmp_path / "a.png", values)  # alpha of an ordinary PNG is dropped
    assert np.array_equal(data.read_image(tmp_path / "a.png").permute(1, 2, 0), values[..., :3])
    tiff(tmp_path / "a.tif", values[..., :3].astype(np.uint16))  # Pillow would keep 8 of the 16 bits
    with pytest.raises(InputError, match="a.tif: a TIFF of 3 bands of 16 bits, .* save its array"):
        data.read_image(tmp_path / "a.tif")


def test_any_number_of_bands_is_read_and_no_band_is_dropped(tmp_path):
    values = np.random.RandomState(0).randint(0, 256, (5, 7, 6), dtype=np.uint8)
    np.save(tmp_path / "six.npy", values)
    image = data.read_image(tmp_path / "six.npy", pixels=data.Pixels(bands=6))
    assert np.array_equal(image.permute(1, 2, 0), values)
    Image.fromarray(values[..., :4], "RGBA").save(tmp_path / "four.tif")
    Image.fromarray(values[..., :4], "RGBA").save(tmp_path / "four.png")
    for name in ("four.tif", "four.png"):
        image = data.read_image(tmp_path / name, pixels=data.Pixels(bands=4))
        assert np.array_equal(image.permute(1, 2, 0), values[..., :4])
    tiff(tmp_path / "five.tif", values[..., :5])
    write_image(tmp_path / "colour.jpg")
    for name, bands, message in (("six.npy", 3, r"6 bands \(H, W, bands: 5, 7, 6\), expected 3, as --bands says"), ("four.tif", 3, "4 bands"),
                                 ("colour.jpg", 1, "3 bands .*, expected 1"), ("colour.jpg", 4, "3 bands"),
                                 ("five.tif", 3, "a TIFF of 5 bands of 8 bits, .* as a .npy")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            data.read_image(tmp_path / name, pixels=data.Pixels(bands=bands))


def test_arrays_that_are_no_pictures_are_named(tmp_path):
    for name, values in (("flat", np.zeros(5)), ("deep", np.zeros((2, 3, 4, 5))), ("void", np.zeros((0, 4)))):
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(InputError, match=f"{name}.npy: an array of shape"):
            data.read_image(tmp_path / f"{name}.npy")
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object))
    np.save(tmp_path / "complex.npy", np.zeros((2, 2), complex))
    for name in ("objects", "complex"):
        with pytest.raises(data.UnreadableImage, match=f"{name}.npy: not a readable image"):
            data.read_image(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_named(fault, tmp_path):
    values = np.zeros((40, 40), np.float32)
    values[20, 20] = fault
    np.save(tmp_path / "a.npy", values)
    source = datasets.ImageFiles(ImageIndex.of_folder(str(tmp_path)), pixels=data.Pixels(1, (0, 1)))
    error = data.Samples(source, data.pretraining_transform(32, 1.0, (0, 1)), skip_unreadable=True)[0, 0]
    assert isinstance(error, InputError) and str(error) == "a.npy: NaN or infinite pixels; replace them"
    with pytest.raises(InputError, match="^a.npy: NaN or infinite pixels; replace them"):
        datasets.pretraining_images("folder", str(tmp_path), pixels=data.Pixels(1, (0, 1)))


def test_each_page_of_a_stack_is_a_picture(tmp_path):
    pages = np.random.RandomState(0).randint(0, 256, (3, 20, 30), dtype=np.uint8)
    write_stack(tmp_path / "stack.tif", pages)
    write_stack(tmp_path / "single.TIFF", pages[:1])
    source = pretraining_images("folder", str(tmp_path), pixels=data.Pixels(bands=1))
    assert [source.name(i) for i in range(4)] == ["single.TIFF", "stack.tif#0", "stack.tif#1", "stack.tif#2"]
    for i, page in ((0, 0), (1, 0), (2, 1), (3, 2)):
        assert np.array_equal(source.read(i)["image"][0], pages[page])
    write_stack(tmp_path / "mixed.tif", [pages[0], pages[1, :10]])
    with pytest.raises(InputError, match="mixed.tif: a stack whose pages differ in size, 30x20 and, at page 1, 30x10"):
        pretraining_images("folder", str(tmp_path), pixels=data.Pixels(bands=1))


def test_pictures_beyond_pillows_limit_are_read_where_the_user_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_image(tmp_path / "a.png")
    with pytest.raises(data.UnreadableImage, match="a.png: .* if it has them, pass --huge"):
        data.read_image(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png", pixels=data.Pixels(huge=True)).shape == (3, 40, 56)


@pytest.mark.parametrize("transform", [data.RandomCrop(64, (0, 9)), data.RandomResizedCrop(64, 1e-10, (0, 9))])
def test_a_crop_of_an_array_larger_than_memory_reads_the_crop_alone(transform, tmp_path):
    """100 GB of zeros, of which the disk holds none."""
    if isinstance(transform, data.RandomResizedCrop):
        transform.scale = (1e-6, 1e-6)
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint16, (100_000, 500_000))
    image = tv_tensors.Image(data.read_image(tmp_path / "a.npy"))
    assert image.shape == (3, 100_000, 500_000) and transform(image).shape == (3, 64, 64)


def test_pictures_of_8_and_16_bits_share_a_batch(tmp_path):
    values = np.random.RandomState(0).randint(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "8.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "16.png")
    samples = data.Samples(pretraining_images("folder", str(tmp_path)))
    batch, = data.load(samples, data.Each(2, batch_size=2))
    torch.testing.assert_close(batch["image"][0], batch["image"][1])


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)).save(tmp_path / "turned.png", exif=exif)
    assert data.read_image(tmp_path / "turned.png").shape == (3, 4, 2)


def test_an_unreadable_picture_is_named(tmp_path):
    write_image(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png"):
        with pytest.raises(data.UnreadableImage, match=f"{name}: not a readable image"):
            data.read_image(tmp_path / name)


def test_a_mask_is_its_indices_never_its_colours(tmp_path):
    indices = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    mask = Image.fromarray(indices)
    mask.putpalette(np.random.RandomState(0).randint(0, 256, 768).tolist())
    mask.save(tmp_path / "palette.png")
    Image.fromarray(indices).save(tmp_path / "grey.png")
    Image.fromarray(indices.astype(np.uint16)).save(tmp_path / "grey16.png")
    for name in ("palette.png", "grey.png", "grey16.png"):
        assert np.array_equal(data.read_mask(tmp_path / name, THREE), indices), name
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "binary.png")
    assert data.read_mask(tmp_path / "binary.png", THREE).tolist() == [[1, 0]]


def test_a_wrong_mask_is_named_with_its_value(tmp_path):
    write_mask(tmp_path / "high.png", [[0, 7]])
    with pytest.raises(InputError, match=r"high.png: mask value 7, expected 0 to 2, or 255"):
        data.read_mask(tmp_path / "high.png", THREE)
    write_image(tmp_path / "colours.png")
    with pytest.raises(InputError, match=r"colours.png: mask is RGB, expected an index image"):
        data.read_mask(tmp_path / "colours.png", THREE)


def test_colours_are_classes_where_they_are_said_to_be(tmp_path):
    labels = {(0, 0, 0): 0, (255, 0, 0): 1, (10, 20, 30): data.IGNORE}
    colours = np.array([[(0, 0, 0), (255, 0, 0)], [(10, 20, 30), (255, 0, 0)]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(colours).quantize(3).save(tmp_path / "palette.png")
    for name in ("a.png", "rgba.png", "palette.png"):
        assert data.read_mask(tmp_path / name, labels).tolist() == [[0, 1], [255, 1]], name
    colours[0, 0] = (1, 2, 3)
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: mask colour \(1, 2, 3\), expected \(0, 0, 0\), \(10, 20, 30\), or "
                                         r"\(255, 0, 0\); the file holds \(1, 2, 3\), \(10, 20, 30\), or "):
        data.read_mask(tmp_path / "a.png", labels)


def test_any_of_the_256_values_may_be_a_class(tmp_path):
    write_mask(tmp_path / "a.png", [[0, 255], [11, 128]])
    labels = data.label_map({0: 0, 255: 1, 128: 2, 11: data.IGNORE}, ignore_255=False)
    assert data.read_mask(tmp_path / "a.png", labels).tolist() == [[0, 1], [255, 2]]
    write_mask(tmp_path / "b.png", [[0, 7], [8, 200]])
    with pytest.raises(InputError, match="b.png: mask value 7, expected 0, 11, 128, or 255; the file holds 0, 7 to 8, or 200"):
        data.read_mask(tmp_path / "b.png", labels)


def test_masks_may_be_pages_of_a_stack_and_arrays(tmp_path):
    pages = np.random.RandomState(0).randint(0, 3, (2, 4, 5), dtype=np.uint8)
    write_stack(tmp_path / "a.tif", pages)
    np.save(tmp_path / "a.npy", pages[1].astype(np.int64))
    assert np.array_equal(data.read_mask(f"{tmp_path}/a.tif#1", THREE), pages[1])
    assert np.array_equal(data.read_mask(tmp_path / "a.npy", THREE), pages[1])


@pytest.mark.parametrize("values, message", [
    (np.array([[0.5, 1]]), r"mask value 0.5, expected whole numbers"),
    (np.array([[0.5, 1]], np.float16), r"mask value 0.5, expected whole numbers"),
    (np.array([[np.nan, 1]]), r"mask value nan, expected whole numbers"),
    (np.array([[1e300, 1]]), r"mask value 1e\+300, expected whole numbers"),
    (np.array([[2**63, 1]], np.uint64), r"mask value 9223372036854775808, expected 0 to 2"),
    (np.zeros(5, np.uint8), r"a mask of shape \(5,\), expected \(H, W\)"),
    (np.zeros((), np.uint8), r"a mask of shape \(\), expected \(H, W\)"),
    (np.zeros((4, 5, 3), np.uint8), r"a mask of shape \(4, 5, 3\), expected \(H, W\)")])
@pytest.mark.filterwarnings("error")
def test_an_array_that_is_no_mask_is_refused_with_its_true_value_or_shape(values, message, tmp_path):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match=f"a.npy: {message}"):
        data.read_mask(tmp_path / "a.npy", THREE)


def test_an_array_of_whole_floats_is_a_mask_and_upper_case_names_do(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0.0, 2.0]]))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert data.read_mask(tmp_path / "A.NPY", THREE).tolist() == [[0, 2]]
    assert data.read_image(tmp_path / "A.NPY").dtype == torch.float64
    with open(tmp_path / "z.npy", "wb") as file:
        np.savez(file, a=np.zeros((4, 5)))
    for read in (data.read_image, lambda path: data.read_mask(path, THREE)):
        with pytest.raises(InputError, match=r"z.npy: not a readable .* \(a .npz archive; save one array"):
            read(tmp_path / "z.npy")


def write_int32(path):
    tiff(path.with_suffix(".tif"), np.zeros((2, 2, 1), np.int32))
    return path.with_suffix(".tif")


def write_array(path):
    np.save(path.with_suffix(".npy"), np.zeros((2, 2), np.int64))
    return path.with_suffix(".npy")


def write_mode(mode, suffix=".png"):
    def write(path):
        Image.new(mode, (2, 2)).save(path.with_suffix(suffix))
        return path.with_suffix(suffix)
    return write


def write_png16(path):
    png16(path.with_suffix(".png"), np.zeros((2, 2, 3), np.uint16))
    return path.with_suffix(".png")


@pytest.mark.parametrize("write", [write_int32, write_array, write_png16, write_mode("I;16"), write_mode("CMYK", ".tif"),
                                   write_mode("F", ".tif"), write_mode("RGBA"), write_mode("LA")])
def test_colour_masks_are_neither_converted_nor_clipped(write, tmp_path):
    path = write(tmp_path / "a")
    with pytest.raises(InputError, match=r"but classes.txt has colours; expected a picture of 8 bits|transparent in places"):
        data.read_mask(path, {(0, 0, 0): 0, (255, 0, 0): 1})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["in the entry", "before the entry"])
def test_a_stack_that_is_cut_off_has_one_page_more_than_are_readable_and_that_one_is_named(where, tmp_path):
    write_stack(tmp_path / "a.tif", np.random.RandomState(0).randint(0, 256, (4, 20, 30), dtype=np.uint8))
    with Image.open(tmp_path / "a.tif") as image:
        image.seek(2)
        entry = image.tag_v2.offset
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[:entry + (60 if where == "in the entry" else -5)])
    index = data.ImageIndex.of_folder(tmp_path)
    names = [index.name(i) for i in range(len(index))]
    assert names == ["a.tif#0", "a.tif#1", "a.tif#2"]
    assert data.read_image(f"{tmp_path}/a.tif#1").shape == (3, 20, 30)
    with pytest.raises(data.UnreadableImage, match="a.tif#2: not a readable image"):
        data.read_image(f"{tmp_path}/a.tif#2")
    with pytest.raises(InputError, match="a.tif#2: not a readable mask"):
        data.read_mask(f"{tmp_path}/a.tif#2", THREE)


@pytest.mark.parametrize("values, message", [
    (np.full((2, 2, 1), -1, np.int8), "signed 8-bit values"),
    (np.full((2, 2, 1), 2**31 + 5, np.uint32), "32-bit values beyond 31 bits"),
    (np.full((2, 2, 1), 7, np.uint16), "16-bit values of which 0 is white")])
def test_tiffs_that_pillow_changes_are_refused(values, message, tmp_path):
    tiff(tmp_path / "a.tif", values)
    if values.dtype == np.uint16:  # PhotometricInterpretation 1 becomes 0
        content = (tmp_path / "a.tif").read_bytes()
        tag = np.array([262, 3], "<u2").tobytes() + np.array([1], "<u4").tobytes()
        assert content.count(tag + b"\1\0") == 1
        (tmp_path / "a.tif").write_bytes(content.replace(tag + b"\1\0", tag + b"\0\0"))
    for read in (data.read_image, lambda path: data.read_mask(path, THREE)):
        with pytest.raises(InputError, match=f"a.tif: a TIFF of {message}, which Pillow would change; save its array"):
            read(tmp_path / "a.tif")


# ------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("crop, size", [("random", 24), ("random", 64), ("inception", 24), ("inception", 64)])
def test_a_crop_moves_image_and_mask_together_and_invents_no_value(crop, size):
    mask = (torch.from_numpy(np.random.RandomState(0).choice([0, 3, 7, 255],
                                                             (4, 5)).astype(np.uint8)).repeat_interleave(
                                                                 40, 0).repeat_interleave(40, 1))
    source = {"image": tv_tensors.Image(mask.expand(3, -1, -1).clone()), "mask": tv_tensors.Mask(mask)}
    transform = data.segmentation_transform(size, crop)
    for seed in range(8):
        with data.seeded(seed):
            out = transform(source)
        assert out["image"].shape == (3, size, size) and out["mask"].shape == (size, size)
        assert set(out["mask"].unique().tolist()) <= {0, 3, 7, 255}
        if crop == "random":
            assert torch.equal(out["image"][0], out["mask"])  # pixel for pixel
        else:  # away from the edges, where bilinear mixes
            assert (out["image"][0] == out["mask"]).float().mean() > 0.4


def test_a_picture_smaller_than_the_crop_is_padded_with_ignore():
    source = {
        "image": tv_tensors.Image(torch.zeros(3, 10, 8, dtype=torch.uint8)),
        "mask": tv_tensors.Mask(torch.ones(10, 8, dtype=torch.uint8))
    }
    out = data.segmentation_transform(16, "random")(source)
    assert (out["mask"] == 1).sum() == 80 and (out["mask"] == 255).sum() == 16 * 16 - 80
    assert ((out["image"][0] == 0) == (out["mask"] == 1)).all()


def test_pixels_are_in_minus_one_to_one():
    assert data.to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# ------------------------------------------------------------------------------------------------ order


def keys(**kwargs):
    return list(data.Batches(**kwargs))


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own():
    flat = [key for batch in keys(count=10, batch_size=4, steps=5) for key in batch]
    assert [epoch for epoch, _ in flat] == [0] * 10 + [1] * 10
    first, second = [i for _, i in flat[:10]], [i for _, i in flat[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert keys(count=10, batch_size=4, steps=5, seed=1) != keys(count=10, batch_size=4, steps=5)


def test_a_batch_may_be_larger_than_the_data_set():
    assert sorted(keys(count=3, batch_size=8, steps=1)[0])[:6] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1),
                                                                   (1, 2)]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_processes_share_one_global_batch(world):
    parts = [keys(count=37, batch_size=8, steps=9, rank=rank, world=world) for rank in range(world)]
    assert [sum((part[step] for part in parts), [])
            for step in range(9)] == keys(count=37, batch_size=8, steps=9)


def test_micro_batches_are_the_batch_in_order_and_no_more_is_loaded_at_once():
    whole = keys(count=37, batch_size=14, steps=3, world=2, rank=1)
    parts = keys(count=37, batch_size=14, steps=3, world=2, rank=1, micro_batch=3)
    assert [len(part) for part in parts] == [3, 3, 1] * 3
    assert [sum(parts[i:i + 3], []) for i in (0, 3, 6)] == whole
    assert len(data.Batches(37, 14, 3, world=2, micro_batch=3)) == 9


def test_a_restart_continues_the_order():
    assert keys(count=37, batch_size=8, steps=9, start=4) == keys(count=37, batch_size=8, steps=9)[4:]


def test_every_image_is_evaluated_once_on_any_number_of_processes():
    for world in (1, 2, 3, 8):
        dealt = [
            i for rank in range(world) for batch in data.Each(7, rank, world, batch_size=2) for _, i in batch
        ]
        assert sorted(dealt) == list(range(7))


def test_samples_are_the_same_for_0_and_2_workers_and_after_a_restart():
    source = datasets.Shapes("unlabelled", 12)
    samples = data.Samples(source, data.pretraining_transform(32, 0.3), seed=5)

    def run(workers, start=0):
        return list(data.load(samples, data.Batches(12, 5, 6, seed=5, start=start), workers))

    torch.manual_seed(1)
    plain = run(0)
    for workers, start in ((2, 0), (0, 3)):
        for ours, theirs in zip(run(workers, start), plain[start:], strict=True):
            assert torch.equal(ours["image"], theirs["image"]) and torch.equal(
                ours["noise_seed"], theirs["noise_seed"])
    assert (len({seed
                 for batch in plain
                 for seed in batch["noise_seed"].tolist()}) == 30)  # none shared between epochs


class Stuck(datasets.Shapes):
    """Its picture 5 never comes."""

    def read(self, i):
        return super().read(i) if i != 5 else time.sleep(1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_do_not_come_are_named(workers, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 2)
    loader = data.load(data.Samples(Stuck("unlabelled", 6)), data.Each(6, batch_size=3), workers)
    with pytest.raises(InputError, match=r"unlabelled-00003, unlabelled-00004, unlabelled-00005: 3 images did not come "):
        list(loader)
    assert not multiprocessing.active_children() and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_workers_that_cannot_start_are_said(monkeypatch):
    def refuse(self):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    loader = data.load(data.Samples(datasets.Shapes("unlabelled", 6)), data.Each(6), workers=2)
    with pytest.raises(InputError, match="a loader worker cannot start .Resource temporarily unavailable.; lower --w"):
        list(loader)


def test_reading_samples_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    data.Samples(datasets.Shapes("train", 1), data.segmentation_transform(32), seed=0)[0, 0]
    assert torch.equal(torch.rand(3), wanted)


def test_an_unreadable_picture_is_replaced_by_the_next_and_reported(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", 32, 32, seed=i)
    (tmp_path / "1.png").write_text("broken")
    source = datasets.pretraining_images("folder", str(tmp_path))
    sample = data.Samples(source, seed=0, skip_unreadable=True)[0, 1]
    assert (torch.equal(sample["image"], data.read_image(tmp_path / "2.png"))
            and sample["unreadable"][0][0] == 1)
    assert isinstance(data.Samples(source, seed=0)[0, 1], data.UnreadableImage)
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("broken")
    assert isinstance(data.Samples(source, seed=0, skip_unreadable=True)[0, 0], data.UnreadableImage)


def test_an_error_in_a_worker_arrives_as_it_is(tmp_path):
    write_image(tmp_path / "0.png", 32, 32)
    (tmp_path / "1.png").write_text("broken")
    samples = data.Samples(datasets.pretraining_images("folder", str(tmp_path)))
    with pytest.raises(InputError, match=r"^.*1.png: not a readable image .*$"):
        list(data.load(samples, data.Each(2), workers=1))


# ------------------------------------------------------------------------------------------------ shapes

# ----- listings


def test_a_tar_is_read_unopened_member_by_member(tmp_path):
    imagenet21k(tmp_path)
    source = pretraining_images("imagenet21k", str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == [
        "n00000001.tar/n00000001_1.JPEG", "n00000001.tar/n00000001_2.JPEG",
        f"n00000001.tar/n00000001_{'x' * 120}.JPEG", "n00000002.tar/n00000002_9.JPEG",
        "n00000002.tar/n00000002_10.JPEG"
    ]
    for i, (seed, mode) in ((0, (1, "RGB")), (1, (2, "L")), (2, (3, "CMYK")), (4, (5, "RGB"))):
        wanted = np.asarray(Image.open(io.BytesIO(jpeg(seed, mode))).convert("RGB"))
        assert np.array_equal(source.read(i)["image"].permute(1, 2, 0), wanted)
    with pytest.raises(InputError, match="n00000002.tar/n00000002_9.JPEG: not a readable image"):
        source.read(3)
    assert source.note.startswith("imagenet21k: 2 synsets")
    assert not any(isinstance(value, list) and len(value) > 2
                   for value in vars(source.index).values())  # nothing in Python per image


def test_an_index_is_used_again_until_a_tar_changes(tmp_path, monkeypatch, capsys):
    imagenet21k(tmp_path)
    first = ImageIndex.of_synsets(str(tmp_path))
    scanned = []
    scan = data._list_tar
    monkeypatch.setattr(data, "_list_tar", lambda root, name: scanned.append(name) or scan(root, name))
    assert ImageIndex.of_synsets(str(tmp_path)).fingerprint() == first.fingerprint() and scanned == []
    write_tar(tmp_path / "n00000002.tar", {"n00000002_10.JPEG": jpeg(6)})
    os.utime(tmp_path / "n00000002.tar", (10**9, 10**9))  # even an older one is another one
    changed = ImageIndex.of_synsets(str(tmp_path))
    assert (scanned == ["n00000002.tar"] and len(changed) == 4
            and "changed since it was listed" in capsys.readouterr().out)
    write_tar(tmp_path / "n00000004.tar", {"n00000004_1.JPEG": jpeg(7)})
    assert len(ImageIndex.of_synsets(str(tmp_path))) == 5 and scanned[1:] == ["n00000004.tar"]


def test_the_fingerprint_tells_data_apart_and_not_their_history(tmp_path):
    for name in ("cat/1.jpg", "dog/1.jpg"):
        write_image(tmp_path / name)

    def fingerprint():
        return ImageIndex.of_folder(str(tmp_path),
                                    cache=str(tmp_path.parent / f"{tmp_path.name} cache")).fingerprint()

    before = fingerprint()
    write_image(tmp_path / "cat" / "a much longer name.jpg")
    assert fingerprint() != before
    (tmp_path / "cat" / "a much longer name.jpg").unlink()
    assert fingerprint() == before
    (tmp_path / "dog").rename(tmp_path / "wolf")  # the same names in another folder
    assert fingerprint() != before


def test_an_index_that_cannot_be_written_asks_for_a_cache(tmp_path, monkeypatch):
    imagenet21k(tmp_path)
    (tmp_path / data.INDEX_FOLDER).write_text("in the way")  # as a read-only disk would be
    with pytest.raises(InputError, match="the index of the images cannot be written .* pass --cache"):
        pretraining_images("imagenet21k", str(tmp_path))
    source = pretraining_images("imagenet21k", str(tmp_path), cache=str(tmp_path / "cache"))
    assert len(source) == 5 and len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "n00000002.tar").unlink()
    monkeypatch.setattr(data, "replacing", lambda *args: open("/nowhere/at/all", "wb"))
    with pytest.raises(InputError, match="is older than the data and cannot be written"):
        pretraining_images("imagenet21k", str(tmp_path), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:700]), r"n00000001.tar: not a whole .tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[:2560]),
         r"n00000001.tar: not a whole .tar file"),  # at a member's end
        (lambda path: path.write_bytes(path.read_bytes()[:1536] + b"x" * 600),
         r"n00000001.tar: not a whole .tar file"),
        (lambda path: path.write_bytes(b""), r"n00000001.tar: not a whole .tar file"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(2000)), r"n00000001.tar: not a whole .tar file"),
        (lambda path: write_image(path.parent / "n00000001" / "1.JPEG"),
         r"holds n00000001.tar and a folder of the same name"),
        (lambda path: path.rename(path.parent / "other.tar"),
         r"no ImageNet-21k in this folder; expected nXXXXXXXX.tar")
    ])
def test_a_broken_tar_is_named(tmp_path, spoil, message):
    content = jpeg(1)[:900]
    write_tar(tmp_path / "n00000001.tar", {"n00000001_1.JPEG": content, "n00000001_2.JPEG": content})
    spoil(tmp_path / "n00000001.tar")
    with pytest.raises(InputError, match=message):
        pretraining_images("imagenet21k", str(tmp_path))


def test_what_the_scripts_wrote_is_not_listed_and_neither_is_a_pipe(tmp_path, capsys):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "runs" / "mine" / "panel_start.png")
    write_image(tmp_path / "runs" / "mine" / "deeper" / "picture.png")
    (tmp_path / "runs" / "mine" / "args.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = pretraining_images("folder", str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == ["a.jpg"]
    assert "runs/mine: holds args.json, so these scripts wrote it; left out" in capsys.readouterr().out


def test_a_large_listing_is_kept_and_mapped_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORTH_KEEPING", 3)
    for name in ("a/1.jpg", "a/2.png", "b/c/3.jpg", "4.jpg"):
        write_image(tmp_path / name)
    source = pretraining_images("folder", str(tmp_path))
    again = pretraining_images("folder", str(tmp_path))
    assert isinstance(again.index.records, np.memmap)
    names = [again.name(i) for i in range(4)]
    assert names == ["4.jpg", "a/1.jpg", "a/2.png", "b/c/3.jpg"] == [source.name(i) for i in range(4)]
    assert len(pickle.dumps(again)) < 2000 and torch.equal(
        pickle.loads(pickle.dumps(again)).read(3)["image"],
        source.read(3)["image"])
    monkeypatch.setattr(data, "INDEX_FOLDER", "a/1.jpg")  # where nothing can be written: listed, not kept
    assert not isinstance(pretraining_images("folder", str(tmp_path)).index.records, np.memmap)
    monkeypatch.setattr(data, "INDEX_FOLDER", ".ddep_index")
    write_image(tmp_path / "b" / "c" / "5.jpg")  # a new image, found by its folder's time of change
    assert len(pretraining_images("folder", str(tmp_path))) == 5
    with open(next((tmp_path / data.INDEX_FOLDER).iterdir()), "r+b") as file:
        file.truncate(200)  # a torn index is no index
    assert len(pretraining_images("folder", str(tmp_path))) == 5


def test_a_digest_of_files_reads_a_stack_once_and_tells_bytes_apart(tmp_path, monkeypatch):
    write_stack(tmp_path / "a.tif", np.zeros((5, 20, 30), np.uint8))
    pages = [f"{tmp_path}/a.tif#{page}" for page in range(5)]
    opened = []
    monkeypatch.setattr("builtins.open", lambda *args, plain=open: opened.append(args) or plain(*args))
    before = data.digest_of_files(pages, whole=True)
    assert len(opened) == 1
    write_stack(tmp_path / "a.tif", np.ones((5, 20, 30), np.uint8))  # of the same size
    assert data.digest_of_files(pages, whole=True) != before


def test_few_file_descriptors_are_said_before_a_worker_starts(monkeypatch):
    raised = []
    monkeypatch.setattr(data.resource, "getrlimit", lambda kind: (16, 90))
    monkeypatch.setattr(data.resource, "setrlimit", lambda kind, limits: raised.append(limits))
    samples = data.Samples(datasets.Shapes("train", 4))
    data.load(samples, data.Each(4), workers=2)
    assert raised == [(80, 90)]
    with pytest.raises(InputError, match=r"--workers 4 may need 96 open files, the limit is 90; raise it \(`ulimit -n 96`"):
        data.load(samples, data.Each(4), workers=4)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_called_tar_and_is_no_file_is_named(kind, tmp_path):
    path = tmp_path / "n00000003.tar"
    path.symlink_to("nowhere") if kind == "link" else os.mkfifo(path)
    with pytest.raises(InputError, match="n00000003.tar: not a whole .tar file .no such file."):
        data.ImageIndex.of_synsets(tmp_path)


@pytest.mark.parametrize("head", [
    b"[]", b'{"dtype": [["x", "<i8"]], "containers": {}}', b'{"dtype": [["name", "S4"]], "containers": []}',
    b'{"dtype": [["name", "S4"], ["offset", "<i8"], ["size", "<i8"]], "containers": {"a": 5}}'])
def test_an_index_of_another_structure_is_made_anew(head, tmp_path):
    (tmp_path / "index").write_bytes(head + b"\n")
    assert data._read_index(tmp_path / "index") == ({}, None)
