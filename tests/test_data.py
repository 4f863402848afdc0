"""data.py: reading, crops, the order of samples."""
import runpy
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

import data
import datasets
from common import UserError
from conftest import ROOT, jpeg, write_image, write_mask
from unlabelled import picture_list

COLOURS = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
GREYS = COLOURS[..., :1].repeat(3, 2)
RGB, GREY = Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0])
PALETTE = Image.fromarray(COLOURS[..., 0] % 3)
PALETTE.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])


@pytest.mark.parametrize("name, picture, wanted", [
    ("a.png", RGB, COLOURS), ("a.bmp", RGB, COLOURS), ("a.png", GREY, GREYS), ("a.tif", GREY, GREYS),
    ("a.png", Image.merge("RGBA", (*RGB.split(), GREY)), COLOURS),
    ("a.png", Image.merge("LA", (GREY, GREY)), GREYS),
    ("a.png", Image.fromarray(COLOURS[..., 0] > 127), 255 * (GREYS > 127)),
    ("a.jpg", Image.new("CMYK", (7, 5), (0, 255, 255, 0)), np.full((5, 7, 3), (255, 0, 0))),  # red
    ("a.png", PALETTE, np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[COLOURS[..., 0] % 3])])
def test_every_8_bit_picture_becomes_rgb(name, picture, wanted, tmp_path):
    picture.save(tmp_path / name)
    image = data.read_image(tmp_path / name)
    assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), wanted)


@pytest.mark.parametrize("tag, upright", [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1]),
    (5, lambda x: x.swapaxes(0, 1)), (6, lambda x: np.rot90(x, -1)), (9, lambda x: x),
    (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)), (8, lambda x: np.rot90(x))])
def test_pictures_are_turned_upright(tag, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = tag
    RGB.save(tmp_path / "a.jpg", exif=exif)
    wanted = upright(np.array(Image.open(tmp_path / "a.jpg")))  # Pillow itself does not turn it
    assert np.array_equal(data.read_image(tmp_path / "a.jpg").permute(1, 2, 0), wanted)
    assert data.image_size(tmp_path / "a.jpg") == (wanted.shape[:2], tag in range(2, 9))


def png16(path, kind, channels):
    """A PNG of 16 bits a channel, which Pillow reads and cannot write."""
    rows = b"".join(b"\0" + bytes(4 * 2 * channels) for _ in range(4))
    head = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
        for t, d in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))))


@pytest.mark.parametrize("write, broken", [
    *[(lambda p, form=form, kind=kind: Image.fromarray(np.zeros((4, 5), kind)).save(p, form), False)
      for form, kind in (("PNG", "u2"), ("TIFF", "u2"), ("TIFF", "f4"), ("TIFF", "i4"))],
    (lambda p: png16(p, 2, 3), False), (lambda p: png16(p, 6, 4), False), (lambda p: png16(p, 4, 2), False),
    (lambda p: p.write_bytes(b"P6 4 4 4095\n" + bytes(96)), False),
    (lambda p: GREY.save(p, "TIFF", save_all=True, append_images=[GREY]), False),
    (lambda p: RGB.save(p, "GIF", save_all=True, append_images=[GREY.convert("RGB")]), False),
    *[(lambda p, bad=bad: p.write_bytes(bad), True) for bad in (b"", b"no picture", jpeg(1)[:300])]])
def test_more_than_8_bits_and_several_pages_are_refused_and_no_broken_picture_which_is_replaced(
        write, broken, tmp_path):
    write(tmp_path / "a.png")
    for read in (data.read_image, lambda path: data.read_mask(path, {(0, 0, 0): 0, (1, 1, 1): 1})):
        with pytest.raises(UserError, match="a.png") as caught:
            read(tmp_path / "a.png")
        assert isinstance(caught.value, data.UnreadableImage) == broken, caught.value


def test_neither_a_broken_exif_block_nor_more_pixels_than_pillow_allows_end_a_run(tmp_path, monkeypatch):
    broken = ROOT / "tests" / "broken_exif.jpg"
    with pytest.raises(Exception), Image.open(broken) as picture:
        ImageOps.exif_transpose(picture)
    assert data.image_size(broken) == (data.read_image(broken).shape[1:], True) == ((24, 16), True)
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # twice as many are an error of Pillow's
    fresh = runpy.run_path(data.__file__)
    assert fresh["image_size"](tmp_path / "a.png") == ((5, 7), False)
    assert np.array_equal(fresh["read_image"](tmp_path / "a.png").permute(1, 2, 0), COLOURS)


INDICES = np.array([[0, 1, 2], [200, 2, 0]], np.uint8)
COLOURED = Image.fromarray(INDICES)
COLOURED.putpalette(np.random.RandomState(0).randint(0, 256, 768).tolist())
ROADS = Image.fromarray(np.array([[(0, 0, 0), (255, 0, 0)], [(10, 20, 30), (255, 0, 0)]], np.uint8))
BY_INDEX = {0: 2, 1: 1, 2: 0, 200: data.IGNORE, 255: 1}
BY_COLOUR = {(255, 0, 0): 1, (0, 0, 0): 0, (10, 20, 30): data.IGNORE, (0, 0, 255): 2}


@pytest.mark.parametrize("picture, values, wanted", [
    (Image.fromarray(INDICES), BY_INDEX, [[2, 1, 0], [255, 0, 2]]),
    (COLOURED, BY_INDEX, [[2, 1, 0], [255, 0, 2]]),  # its colours are not read
    (Image.fromarray(np.array([[True, False]])), {0: 5, 1: 6}, [[6, 5]]),
    (ROADS, BY_COLOUR, [[0, 1], [255, 1]]), (ROADS.convert("RGBA"), BY_COLOUR, [[0, 1], [255, 1]]),
    (ROADS.quantize(3), BY_COLOUR, [[0, 1], [255, 1]])])
def test_a_mask_holds_indices_or_where_they_are_listed_colours(picture, values, wanted, tmp_path):
    picture.save(tmp_path / "a.png")
    found = data.read_mask(tmp_path / "a.png", values)
    assert found.dtype == torch.uint8 and found.tolist() == wanted


@pytest.mark.parametrize("name, mask, values, wrong", [
    ("a.png", [[0, 7]], {0: 0, 1: 1, 255: 255}, r"\b7\b"), ("a.png", [[0, 255]], {0: 0, 1: 1}, r"\b255\b"),
    ("a.png", [[[0, 0, 0], [0, 3, 201]]], {(0, 0, 0): 0, (9, 9, 9): 1}, "0, 3, 201"),
    ("a.png", [[[0, 0, 0], [255, 255, 254]]], {(0, 0, 0): 0, (9, 9, 9): 1}, "255, 255, 254"),
    ("a.png", np.zeros((4, 5, 3)), {0: 0, 1: 1}, ""), ("a.jpg", np.zeros((4, 5)), {0: 0, 1: 1}, ""),
    ("a.jpg", np.zeros((4, 5, 3)), {(0, 0, 0): 0, (1, 1, 1): 1}, "")])
def test_other_values_and_jpegs_are_no_mask_and_are_named(name, mask, values, wrong, tmp_path):
    write_mask(tmp_path / name, mask)
    with pytest.raises(UserError, match=f"{name}.*{wrong}"):
        data.read_mask(tmp_path / name, values)


@pytest.mark.parametrize("high, mode, values", [
    (255, "L", {0: 0, 255: 1}), (1, "L", {0: 0, 1: 1, 254: 0, 255: 1}), (255, "1", {0: 0, 1: 1}),
    (255, "L", {(0, 0, 0): 0, (255, 255, 255): 1})])
def test_a_tiff_that_stores_white_as_zero_is_no_mask(high, mode, values, tmp_path):
    for photometric in (1, 0):
        mask = Image.fromarray(np.array([[0, high]], np.uint8)).convert(mode)
        mask.save(tmp_path / f"{photometric}.tif", tiffinfo={262: photometric})
    assert data.read_mask(tmp_path / "1.tif", values).tolist() == [[0, 1]]
    with pytest.raises(UserError, match="0.tif"):
        data.read_mask(tmp_path / "0.tif", values)


def places(height, width):
    """An image whose pixels say where they are, (y, x, 0), and its mask, (y + 3 x) % 250."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, 0 * x]).byte()
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(((y + 3 * x) % 250).byte())}


def crops(transform, source):
    for seed in range(12):
        torch.manual_seed(seed)
        yield transform(source)


def test_a_window_moves_and_flips_image_and_mask_together():
    seen = []
    for out in crops(data.segmentation_transform(24), places(50, 90)):
        (y, x, _), mask = out["image"].long(), out["mask"].long()
        assert mask.shape == (24, 24) and torch.equal(mask, (y + 3 * x) % 250)
        assert (y.diff(dim=0) == 1).all() and (y.diff(dim=1) == 0).all() and (x.diff(dim=1).abs() == 1).all()
        seen.append((x.diff(dim=1).unique().item(), y.min().item(), x.min().item()))
    flips, tops, lefts = map(set, zip(*seen))
    assert flips == {1, -1} and len(tops) > 6 and len(lefts) > 6 and max(lefts) > 26


@pytest.mark.parametrize("height, width", [(10, 8), (40, 8), (10, 40)])
def test_a_smaller_picture_is_padded_with_ignore(height, width):
    for out in crops(data.segmentation_transform(16), places(height, width)):
        (y, x, blue), mask = out["image"].long(), out["mask"].long()
        inside = blue == 0
        assert inside.sum() == min(height, 16) * min(width, 16) and torch.equal(mask == 255, ~inside)
        assert torch.equal(mask[inside], ((y + 3 * x) % 250)[inside])


@pytest.mark.parametrize("size", [24, 96])
def test_an_inception_crop_keeps_image_and_mask_aligned_and_mixes_no_values(size):
    source = places(60, 80)
    source["mask"] = tv_tensors.Mask(source["image"][1] * 3)  # multiples of 3: a mean would mostly be none
    flips = set()
    for out in crops(data.segmentation_transform(size, 0.3), source):
        x, mask = out["image"][1].double(), out["mask"].double()
        assert x.shape == mask.shape == (size, size) and (mask % 3 == 0).all()
        assert (x - mask / 3).abs().max() <= 2  # bilinear and nearest differ by a source pixel or two
        flips.add((x[:, -1] > x[:, 0]).all().item())
    assert flips == {True, False}


def order(count=37, batch_size=8, micro_batch=99, steps=9, **more):
    return list(data.Order(count, batch_size, micro_batch, steps, **more))


@pytest.mark.parametrize("count, batch_size", [(10, 4), (3, 8), (7, 7), (1, 4)])
def test_each_epoch_shows_every_image_once_and_every_batch_is_full(count, batch_size):
    batches = order(count, batch_size, steps=3 * count)
    assert [len(batch) for batch in batches] == [batch_size] * 3 * count
    keys = sum(batches, [])
    assert all(sorted(keys[epoch * count:(epoch + 1) * count]) == [(epoch, i) for i in range(count)]
               for epoch in range(3 * batch_size))


@pytest.mark.parametrize("world, start, most", [
    (1, 5, 99), (1, 9, 7), (1, 0, 23), (2, 0, 1), (2, 8, 12), (4, 0, 4), (4, 1, 5)])
def test_processes_share_one_batch_in_few_equal_parts_and_a_restart_continues_it(world, start, most):
    shares, parts = [], int(np.ceil(24 / world / most))
    for rank in range(world):
        batches = order(batch_size=24, micro_batch=most, rank=rank, world=world, start=start)
        sizes = [len(batch) for batch in batches]
        assert len(batches) == (9 - start) * parts
        assert max(sizes, default=0) <= most and max(sizes, default=0) - min(sizes, default=0) <= 1
        shares.append([sum(batches[i:i + parts], []) for i in range(0, len(batches), parts)])
    assert [sum(share, []) for share in zip(*shares)] == order(batch_size=24)[start:]


def test_a_sample_depends_on_seed_epoch_and_index_alone(few):
    def samples(seed):
        source = datasets.Shapes([("train", i) for i in range(512)], "", ())
        return data.Samples(source, data.segmentation_transform(32), seed)

    wanted = samples(5)[2, 7]
    again = samples(5)
    torch.manual_seed(123)
    for sample in (again[2, 7], samples(5)[2, 7]):
        assert [*sample] == [*wanted] and all(np.array_equal(sample[key], wanted[key]) for key in wanted)
    for other in (again[3, 7], samples(6)[2, 7]):
        assert not any(np.array_equal(other[key], wanted[key]) for key in ("image", "noise_seed"))
    seeds = {int(again[epoch, i]["noise_seed"]) for epoch in range(3) for i in range(12)}
    assert len(seeds) == 36 and all(0 <= seed < 2 ** 63 for seed in seeds)


@pytest.mark.parametrize("broken, index, shown", [([1], 1, 2), ([1, 2], 1, 3), ([3], 3, 0), ([1], 0, 0)])
def test_an_undecodable_picture_is_replaced_by_the_next_and_named_or_an_error(
        broken, index, shown, tmp_path, capsys):
    def photos(broken):
        for i in range(4):
            write_image(tmp_path / f"{i}.png", 32, 32, seed=i)
        for i in broken:
            (tmp_path / f"{i}.png").write_text("broken")
        return picture_list(str(tmp_path), ["*"])

    samples = data.Samples(photos(broken), torch.nn.Identity(), replace=True)
    assert torch.equal(samples[0, index]["image"], data.read_image(tmp_path / f"{shown}.png"))
    err = capsys.readouterr().err
    assert all((f"{i}.png" in err) == (index != shown) for i in broken)
    samples.replace = False
    with pytest.raises(data.UnreadableImage, match=f"{broken[0]}.png"):
        samples[0, broken[0]]
    with pytest.raises(UserError, match="2.png"):  # nothing decodes
        data.Samples(photos(range(4)), torch.nn.Identity(), replace=True)[0, 2]
