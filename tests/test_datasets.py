"""datasets.py: the named sets as they are distributed, tiny but exact; how files are found."""
import ntpath
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import flags, names, pairs, pixels, touch, write_image, write_mask

import datasets
from common import UserError
from labelled import classes_of, find_pairs
from unlabelled import pretraining_images


def every_value(values, height=24, width=32, seed=0):
    """A mask (height, width) in which every one of `values` occurs."""
    mask = np.random.RandomState(seed).choice(list(values), height * width)
    mask[:len(values)] = list(values)
    return mask.reshape(height, width).astype(np.uint8)


def cityscapes(root, ending="labelIds", values=range(34)):
    for part, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",))):
        for stem in (f"{part}/{city}/{city}_00000{i}_000019" for city in cities for i in range(2)):
            seed = len(stem) + int(stem[-8])
            write_image(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", 24, 32, seed)
            write_mask(root / "gtFine" / f"{stem}_gtFine_{ending}.png", every_value(values, seed=seed))
            write_image(root / "gtFine" / f"{stem}_gtFine_color.png", 24, 32)  # lies there, too
    write_image(root / "leftImg8bit" / "train_extra" / "bonn" / "bonn_000000_000002_leftImg8bit.png", 24, 32)


def ade20k(root):
    base = root / "ADEChallengeData2016"
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            stem = f"{part}/ADE_{part[:-3]}_{i:08d}"
            write_image(base / "images" / f"{stem}.jpg", 24, 32, seed=i)
            write_mask(base / "annotations" / f"{stem}.png", every_value(range(151), seed=i))


def voc(root, year=2012, masks="SegmentationClass", lists="Segmentation", values=(*range(21), 255)):
    base = root / "VOCdevkit" / f"VOC{year}"
    (base / "ImageSets" / lists).mkdir(parents=True)
    for part, stems in (("train", ("2007_000032", "2007_000039")), ("val", ("2007_000033",))):
        (base / "ImageSets" / lists / f"{part}.txt").write_text("\n".join(stems))
        for i, stem in enumerate(stems):
            write_image(base / "JPEGImages" / f"{stem}.jpg", 24, 32, seed=i)
            write_mask(base / masks / f"{stem}.png", every_value(values, seed=i))
    write_image(base / "JPEGImages" / "2008_000001.jpg", 24, 32)  # one of those without a mask


# By hand: what each value of a mask means, from the sets' own descriptions
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
             26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
CONTEXT = (partial(voc, year=2010, masks="SegmentationClassContext", lists="SegmentationContext",
                   values=range(60)),
           ["", "VOCdevkit", "VOCdevkit/VOC2010"],
           "VOCdevkit/VOC2010/SegmentationClassContext/2007_000032.png")
SETS = {  # its files, places of --root, a mask, what its values mean, a value that the official files do not
    # hold, numbers of classes, pairs and pictures, the last class and its colour
    "cityscapes": (cityscapes, [""], "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
                   lambda v: TRAIN_IDS.get(v, 255), 255, (19, 4, 2, 4), ("bicycle", (119, 11, 32))),
    "ade20k": (ade20k, ["", "ADEChallengeData2016"],
               "ADEChallengeData2016/annotations/training/ADE_train_00000000.png",
               lambda v: v - 1 if v else 255, 255, (150, 3, 2, 3), ("flag", (92, 0, 255))),
    "voc": (voc, ["", "VOCdevkit", "VOCdevkit/VOC2012"],
            "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png",
            lambda v: v, 21, (21, 2, 1, 4), ("tvmonitor", (0, 64, 128))),
    "pascal_context": (*CONTEXT, lambda v: v - 1 if v else 255, 255, (59, 2, 1, 4), ("wood", (192, 192, 64))),
    "pascal_context_60": (*CONTEXT, lambda v: v, 255, (60, 2, 1, 4), ("wood", (192, 192, 64)))}
@pytest.mark.parametrize("data, place", [(data, place) for data, row in SETS.items() for place in row[1]])
def test_a_named_set_is_read_pixel_for_pixel_wherever_root_points(data, place, tmp_path):
    make, _, mask, meaning, wrong, counts, last = SETS[data]
    make(tmp_path)
    given = flags(data, tmp_path / place)
    classes, unlabelled = classes_of(given), pretraining_images(given)
    source, val = (pairs(data, tmp_path / place, part) for part in ("train", "val"))
    assert (len({*classes.names}), len(source), len(val), len({*names(unlabelled)})) == counts
    assert (classes.names[-1], tuple(classes.colours[-1])) == last and len(classes.colours) == counts[0]
    values, sample = pixels(tmp_path / mask), source.read(0)
    wanted = np.vectorize(meaning)(values)
    assert set(np.unique(wanted)) - {255} == set(range(counts[0]))  # every class is there
    image, = (path for path in tmp_path.rglob("*") if str(path).endswith(source.name(0)))
    assert np.array_equal(sample["mask"], wanted) and "mask" not in unlabelled.read(0)
    assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(image))
    values[0, 0] = wrong
    write_mask(tmp_path / mask, values)
    with pytest.raises(UserError, match=Path(mask).name):
        source.read(0)


def test_train_ids_of_cityscapes_are_classes_as_they_are_and_coarse_is_more_pictures(tmp_path):
    cityscapes(tmp_path, "labelTrainIds", (*range(19), 255))
    source = pairs("cityscapes", tmp_path, masks="gtFine/{part}/*_gtFine_labelTrainIds.png")
    mask = tmp_path / SETS["cityscapes"][2].replace("labelIds", "labelTrainIds")
    assert len(source) == 4 and np.array_equal(source.read(0)["mask"], pixels(mask))
    assert len(pretraining_images(flags("cityscapes_coarse", tmp_path))) == 5


@pytest.mark.parametrize("data, spoil, named", [
    ("voc", lambda root: next(root.rglob("Segmentation/train.txt")).unlink(), "train.txt"),
    ("voc", lambda root: voc(root, 2007), "VOC2007.*VOC2012"),
    ("cityscapes", lambda root: (root / "gtFine").rename(root / "gt"), "gtFine")])
def test_a_set_with_a_fault_is_refused_by_name(data, spoil, named, tmp_path):
    SETS[data][0](tmp_path)
    spoil(tmp_path)
    with pytest.raises((UserError, OSError), match=named):  # both are one line
        pairs(data, tmp_path)


def test_a_list_replaces_that_of_a_named_set_and_its_masks_are_meant(tmp_path):
    voc(tmp_path)
    (tmp_path / "list.txt").write_text("/JPEGImages/2007_000033.jpg /SegmentationClassAug/2007_000033.png\n")
    with pytest.raises(UserError, match="SegmentationClassAug"):
        pairs("voc", tmp_path, train_list=tmp_path / "list.txt")
    masks = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    masks.rename(f"{masks}Aug")
    source = pairs("voc", tmp_path, masks="SegmentationClassAug/*.png", train_list=tmp_path / "list.txt")
    assert source.rows == [("JPEGImages/2007_000033.jpg", "SegmentationClassAug/2007_000033.png")]


def test_links_are_followed(folder, tmp_path):
    before = names(pairs("folder", folder))
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (folder / kind / "train").rename(tmp_path / f"{kind} elsewhere")
        (folder / kind / "train").symlink_to(tmp_path / f"{kind} elsewhere")
        (folder / kind / "val" / f"link.{ending}").symlink_to(folder / kind / "val" / f"e.{ending}")
    val = pairs("folder", folder, "val")
    assert names(pairs("folder", folder)) == before and len(pretraining_images(flags("folder", folder))) == 8
    assert names(val)[3] == "images/val/link.jpg" and np.array_equal(val.read(3)["mask"], val.read(0)["mask"])


def test_every_system_finds_the_same_files_and_never_those_that_systems_hide(tmp_path, monkeypatch):
    touch(tmp_path, "i/s/a.png", "i/.a.png", "i/@eaDir/a.png", "i/__MACOSX/a.png", "i/lost+found/b.png",
          "i/.git/c.png", "m/s/a.png", "m/._d.png")
    for join, sep in ((os.path.join, "/"), (ntpath.join, "\\")):
        monkeypatch.setattr(os.path, "join", join)
        monkeypatch.setattr(os, "sep", sep)
        found, others = find_pairs(tmp_path, datasets.plain(r"i\*.png"), datasets.plain(r".\m\*"), "")
        assert found == [("s/a", "i/s/a.png", "m/s/a.png")] and others == []
