"""datasets.py and data.py: every layout on disk as it is distributed, tiny but exact, checked pixel for pixel."""

import argparse
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, imagenet21k, jpeg, tiff, write_image, write_mask, write_stack, write_tar
from PIL import Image

import datasets
from datasets import classification_images, pretraining_images, segmentation_pairs
from data import ImageIndex, Pixels
from launch import InputError
from run_folder import write_lines

PAPER_TINY = ["--encoder", "hybrid-small", "--workers", "0"]  # a named set on the smallest network


def listed(folder):
    index = ImageIndex.of_folder(str(folder))
    return [index.name(i) for i in range(len(index))]


# ------------------------------------------------------------------------------------------------ a user's folders


def test_a_folder_is_read_pair_by_pair(folder):
    source, names = datasets.segmentation_pairs("folder", str(folder), "train")
    assert names == ["sky", "sea", "sand"]
    assert [source.name(i) for i in range(len(source))] == [
        "images/train/a.jpg", "images/train/b ö.png", "images/train/c.jpg", "images/train/sub/d.png"
    ]
    for i in range(4):
        sample = source.read(i)
        assert sample["image"].shape == (3, 41 + i, 57 - i) and sample["mask"].shape == (41 + i, 57 - i)
        with Image.open(
                folder / "masks" / "train" / (source.name(i)[len("images/train/"):-4] + ".png")) as mask:
            assert np.array_equal(sample["mask"], np.asarray(mask))


def test_a_list_file_is_read_pair_by_pair_spaces_and_all(folder):
    lines = [
        "images/train/a.jpg masks/train/a.png", "images/train/b ö.png masks/train/b ö.png",
        "images/train/c.jpg\tmasks/train/c.png"
    ]
    (folder / "list.txt").write_text("\n".join(lines), encoding="utf-8")  # no final newline
    source, _ = datasets.segmentation_pairs("folder", str(folder), "train",
                                            list_file=str(folder / "list.txt"))
    assert source.pairs == [("images/train/a.jpg", "masks/train/a.png"),
                            ("images/train/b ö.png", "masks/train/b ö.png"),
                            ("images/train/c.jpg", "masks/train/c.png")]
    beside, _ = datasets.segmentation_pairs("folder", None, "train", num_classes=3,
                                            list_file=str(folder / "list.txt"))
    assert torch.equal(beside.read(1)["mask"], source.read(1)["mask"])
    assert [source.line(i) for i in range(3)
            ] == [line if "\t" in line else line.replace(" masks", "\tmasks") for line in lines]


def test_links_are_followed_and_a_circle_ends(folder):
    (folder / "images" / "train" / "circle").symlink_to(folder / "images" / "train")
    (folder / "linked").symlink_to(folder / "images" / "val")
    assert len(listed(folder / "images")) == 6
    assert listed(folder / "linked") == ["e.jpg", "f.png"]


@pytest.mark.parametrize(
    "spoil, message",
    [(lambda root: (root / "masks/train/c.png").unlink(),
      r"images/train/c.jpg: no mask for this image; expected .*masks/train/c.png"),
     (lambda root: (root / "images/train/c.jpg").unlink(), r"masks/train/c.png: no image for this mask"),
     (lambda root:
      (root / "images/train").rename(root / "images/training"), r"no folder images/train; expected"),
     (lambda root: write_image(root / "images/train/c.png"),
      r"c.jpg and c.png differ in their extension alone"),
     (lambda root: (root / "classes.txt").unlink(), r"how many classes\? pass --num-classes"),
     (lambda root:
      (root / "classes.txt").write_text("sky\nsky\n"), r"classes.txt: a class name occurs twice")])
def test_a_folder_with_a_fault_is_refused_by_name(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        datasets.segmentation_pairs("folder", str(folder), "train")


def test_an_image_and_a_mask_of_different_size_are_named(folder):
    write_mask(folder / "masks/train/c.png", np.zeros((10, 20)))
    source, _ = datasets.segmentation_pairs("folder", str(folder), "train")
    with pytest.raises(InputError,
                       match=r"masks/train/c.png: mask is 20x10, its image .*images/train/c.jpg is 55x43"):
        source.read(2)


# ------------------------------------------------------------------------------------------------ a user's own classes and masks


@pytest.mark.parametrize("text, names, labels", [
    ("sky\nsea\n", ["sky", "sea"], {0: 0, 1: 1, 255: 255}),
    ("sky\nignore\nsea\n", ["sky", "sea"], {0: 0, 1: 255, 2: 1, 255: 255}),
    ("0 background\n255 cell\n", ["background", "cell"], {0: 0, 255: 1}),
    ("\n7 wall\n2 open window\n 11  ignore\n9 ignore\n", ["wall", "open window"], {7: 0, 2: 1, 11: 255, 9: 255}),
    ("0 0 0 road\n255 0 10 red car\n1 2 3 ignore", ["road", "red car"],
     {(0, 0, 0): 0, (255, 0, 10): 1, (1, 2, 3): 255})])
def test_classes_txt_says_which_values_or_colours_the_masks_use(text, names, labels, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found, meaning = datasets.own_classes(tmp_path)
    if not isinstance(meaning, dict):
        meaning = {value: k for value, k in enumerate(meaning.tolist()) if k >= 0}
    assert (found, meaning) == (names, labels)


@pytest.mark.parametrize("text, message", [
    ("sky\n1 sea\n", r"'sky' and '1 sea' are of two forms; expected `name` in all lines, or `value name`"),
    ("0 0 0 sky\n1 sea\n", "'0 0 0 sky' and '1 sea' are of two forms"),
    ("0 sky\n0 sea\n", "a mask value occurs twice, as in '0 sky'"),
    ("0 0 0 sky\n0 0 0 sea\n", "a mask value occurs twice, as in '0 0 0 sky'"),
    ("0 sky\n1 sky\n", "a class name occurs twice, as in '0 sky'"),
    ("0 sky\n256 sea\n", "'256 sea' has a mask value of 256, expected 0 to 255"),
    ("0,sky\n1,sea\n", "'0,sky', expected `name`, `value name` or `R G B name`"), ("0: sky\n1: sea\n", "'0: sky', expected"),
    ("0.0 sky\n1.0 sea\n", "'0.0 sky', expected"), ("-1 sky\n1 sea\n", "'-1 sky', expected"),
    ("1 2 sky\n", "'1 2 sky', expected"), ("1" * 5001 + " sky\n", "'1{40}', expected"),
    ("0 sky\n1 ignore\n", "1 names besides ignore, expected 2 to 255"), ("", "0 names besides ignore"),
    ("0 sky\n1 caf\xe9\n".encode("latin-1"), "cannot be read as UTF-8; save it as UTF-8 text"),
    ("sky\nsea\n".encode("utf-16"), "cannot be read as UTF-8; save it as UTF-8 text")])
def test_a_classes_txt_with_a_fault_is_refused(text, message, tmp_path):
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"classes.txt: {message}"):
        datasets.own_classes(tmp_path)


def microscopy(root, values=(0, 255), count=10):
    """Grey pictures with masks of two values, as published sets have them: one pixel in four is a cell."""
    for i in range(count):
        grey = np.random.RandomState(i).randint(0, 256, (40, 56), dtype=np.uint8)
        write_mask(root / "images" / "train" / f"{i}.png", grey)
        mask = np.full((40, 56), values[0])
        mask[:20, :28] = values[1]
        write_mask(root / "masks" / "train" / f"{i}.png", mask)
    return root


def test_masks_of_0_and_255_are_refused_until_classes_txt_says_what_they_are(tmp_path):
    microscopy(tmp_path)
    source, names = segmentation_pairs("folder", str(tmp_path), "train", num_classes=2)
    with pytest.raises(InputError, match=r"training masks hold fewer than two classes; their values are 0, or 255; "
                                         r"write to classes.txt .*, such as `0 background`, `255 object`"):
        datasets.survey_masks({"training": source}, names)
    (tmp_path / "classes.txt").write_text("0 background\n255 cell\n")
    source, names = segmentation_pairs("folder", str(tmp_path), "train", pixels=Pixels(bands=1))
    text, counts = datasets.survey_masks({"training": source}, names)
    assert counts["training"][0, :2].tolist() == [10 * 3 * 560, 10 * 560] and counts["training"][0].sum() == 22_400
    assert [line.split() for line in text.splitlines()] == [
        ["training", "masks", "pixels", "%", "images", "%"], ["background", "75.00", "100.00"],
        ["cell", "25.00", "100.00"], ["ignored", "0.00", "0.00"]]


def test_what_is_unusual_about_masks_and_pictures_is_said(tmp_path):
    microscopy(tmp_path, values=(11, 255), count=4)
    write_mask(tmp_path / "masks" / "train" / "0.png", np.full((40, 56), 3))
    write_mask(tmp_path / "images" / "train" / "0.png", np.full((40, 56), 9))
    (tmp_path / "classes.txt").write_text("3 background\n255 cell\n0 nucleus\n11 ignore\n")
    source, names = segmentation_pairs("folder", str(tmp_path), "train")
    text, counts = datasets.survey_masks({"training": source, "validation": source.subset([1])}, names)
    lines = text.splitlines()
    assert ["cell", "18.75", "75.00"] in [line.split() for line in lines]
    assert {"in no training mask: nucleus", "in no validation mask: background, nucleus",
            "most pixels of the training masks are ignored", "most pixels of the validation masks are ignored",
            "1 training images have one value throughout; they are kept"} <= set(lines)
    assert source.note == "1 of 4 pictures looked at have one value throughout, such as images/train/0.png; they are kept"


def test_a_narrow_range_of_pixels_is_said_with_the_flag_that_widens_it(tmp_path):
    twelve_bits = np.random.RandomState(0).randint(0, 4096, (40, 56)).astype(np.uint16)
    twelve_bits[0, :2] = 0, 4095
    Image.fromarray(twelve_bits).save(tmp_path / "a.png")
    source = pretraining_images("folder", str(tmp_path))
    assert source.note == ("the pixels of 1 pictures looked at lie between 0 and 4095, within a tenth of the range 0 to "
                           "65535; consider --pixel-range 0 4095")
    assert pretraining_images("folder", str(tmp_path), pixels=Pixels(range=(0, 4095))).note == ""
    assert "between 0 and 4095; what is outside --pixel-range 0 2000 is clipped" in pretraining_images(
        "folder", str(tmp_path), pixels=Pixels(range=(0, 2000))).note
    with pytest.raises(InputError, match="a.png: .* values from 0 to 4095, all outside --pixel-range 5000 6000"):
        pretraining_images("folder", str(tmp_path), pixels=Pixels(range=(5000, 6000)))


def test_masks_are_not_taken_for_pictures_to_pretrain_on(folder):
    with pytest.raises(InputError, match="holds images and masks; pass --root .*images"):
        pretraining_images("folder", str(folder))


def test_floats_without_a_range_are_refused_with_the_one_they_have(tmp_path):
    for i in range(3):
        tiff(tmp_path / f"{i}.tif", np.array([[[-1.5], [i]]], np.float32))
    with pytest.raises(InputError, match=r"0.tif: float32 pixels, from -1.5 to 2 in the first pictures; .* --pixel-range"):
        pretraining_images("folder", str(tmp_path))
    assert pretraining_images("folder", str(tmp_path), pixels=Pixels(range=(-2, 2))).note == ""


def test_stacks_are_paired_page_by_page(tmp_path):
    pages = np.random.RandomState(0).randint(0, 256, (3, 20, 30), dtype=np.uint8)
    write_stack(tmp_path / "images/train/a.tif", pages)
    write_stack(tmp_path / "masks/train/a.tiff", pages % 3)
    source, _ = segmentation_pairs("folder", str(tmp_path), "train", num_classes=3)
    assert len(source) == 3 and source.line(1) == "images/train/a.tif#1\tmasks/train/a.tiff#1"
    for i in range(3):
        assert np.array_equal(source.read(i)["mask"], pages[i] % 3)
    (tmp_path / "list.txt").write_text(source.line(2))
    listed, _ = segmentation_pairs("folder", str(tmp_path), "train", 3, str(tmp_path / "list.txt"))
    assert len(listed) == 1 and np.array_equal(listed.read(0)["mask"], pages[2] % 3)
    write_stack(tmp_path / "masks/train/a.tiff", pages[:2] % 3)
    with pytest.raises(InputError, match="masks/train/a: 2 pages, its image in images/train has 3; expected a page"):
        segmentation_pairs("folder", str(tmp_path), "train", num_classes=3)


def parts(root, **flags):
    usual = dict(data="folder", root=str(root), num_classes=3, train_list=None, val_list=None, val_fraction=None,
                 folds=None, fold=0)
    train, val, _ = datasets.labelled_parts(argparse.Namespace(**{**usual, **flags}), Pixels())
    return [train.name(i) for i in range(len(train))], [val.name(i) for i in range(len(val))]


def test_a_part_of_the_labelled_images_is_held_out_by_a_hash_of_their_paths(tmp_path):
    microscopy(tmp_path, values=(0, 1))
    train, val = parts(tmp_path, val_fraction=0.3)
    assert len(train) == 7 and len(val) == 3 and not set(train) & set(val)
    for kind in ("images", "masks"):
        (tmp_path / kind / "train" / "0.png").unlink()
    fewer, _ = parts(tmp_path, val_fraction=0.3)
    assert len(set(fewer) - set(train)) <= 1  # the others stay where they were
    folds = [parts(tmp_path, folds=4, fold=i) for i in range(4)]
    assert sorted(sum((val for _, val in folds), [])) == sorted(folds[0][0] + folds[0][1])
    assert all(len(train) + len(val) == 9 and not set(train) & set(val) for train, val in folds)
    for flags in (dict(val_fraction=0.01), dict(val_fraction=0.99), dict(folds=10, fold=9)):
        with pytest.raises(InputError, match="there are 9 labelled images, of which (0|9) would be held out"):
            parts(tmp_path, **flags)


def test_images_are_not_held_out_where_there_are_validation_images(folder):
    with pytest.raises(InputError, match="has validation images; .* drop the flag"):
        parts(folder, val_fraction=0.5)


def test_class_folders_are_labelled_by_their_names(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}.jpg")
    train, val, names = datasets.classification_images("folder", str(tmp_path))
    assert names == ["cat", "dog"] and len(train) == 6 and len(val) == 4
    assert [(val.name(i), val.read(i)["label"]) for i in range(4)] == [("cat/0.jpg", 0), ("cat/1.jpg", 0),
                                                                       ("dog/0.jpg", 1), ("dog/1.jpg", 1)]
    train, val, names = datasets.classification_images("folder", str(
        tmp_path / "train"))  # no val/: one image is held out
    assert len(train) == 5 and len(val) == 1 and val.name(0) not in [train.name(i) for i in range(5)]


# ------------------------------------------------------------------------------------------------ the named sets, each in its exact tree


def every_value(values, height=24, width=32, seed=0):
    """A mask (height, width) in which every one of `values` occurs."""
    mask = np.random.RandomState(seed).choice(list(values), height * width)
    mask[:len(values)] = list(values)
    return mask.reshape(height, width).astype(np.uint8)


def cityscapes(root, ending="labelIds", values=range(34)):
    for part, cities in (("train", ("aachen", "ulm")), ("val", ("lindau", ))):
        for city in cities:
            for i in range(2):
                stem = f"{part}/{city}/{city}_00000{i}_000019"
                write_image(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", 24, 32, seed=i)
                write_mask(root / "gtFine" / f"{stem}_gtFine_{ending}.png", every_value(values, seed=i))
                write_image(root / "gtFine" / f"{stem}_gtFine_color.png", 24,
                            32)  # also in the distributed folder
    write_image(root / "leftImg8bit" / "train_extra" / "bonn" / "bonn_000000_000002_leftImg8bit.png", 24, 32)
    return root


def ade20k(root):
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            write_image(root / "ADEChallengeData2016" / "images" / part / f"ADE_{part[:-3]}_{i:08d}.jpg", 24,
                        32, seed=i)
            write_mask(root / "ADEChallengeData2016" / "annotations" / part / f"ADE_{part[:-3]}_{i:08d}.png",
                       every_value(range(151), seed=i))
    return root


def voc(root, year=2012, masks="SegmentationClass", lists="Segmentation", values=(*range(21), 255)):
    base = root / "VOCdevkit" / f"VOC{year}"
    (base / "ImageSets" / lists).mkdir(parents=True)
    for part, names in (("train", ("2007_000032", "2007_000039")), ("val", ("2007_000033", ))):
        (base / "ImageSets" / lists / f"{part}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            write_image(base / "JPEGImages" / f"{name}.jpg", 24, 32, seed=i)
            (base / masks).mkdir(exist_ok=True)
            mask = Image.fromarray(every_value(values, seed=i))
            if masks == "SegmentationClass":
                mask.putpalette(datasets.class_colours("voc", 256).tobytes())
            mask.save(base / masks / f"{name}.png")
    write_image(base / "JPEGImages" / "2008_000001.jpg", 24, 32)  # one of those without a mask
    return root


def pascal_context(root):
    return voc(root, 2010, "SegmentationClassContext", "SegmentationContext", range(60))


# By hand: what each value of a mask means, from the sets' own descriptions
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18
}
MEANING = {
    "cityscapes": lambda v: CITYSCAPES_TRAIN_IDS.get(v, 255), "ade20k": lambda v: v - 1
    if v else 255, "voc": lambda v: v, "pascal_context": lambda v: v - 1 if v else 255
}
SETS = {"cityscapes": cityscapes, "ade20k": ade20k, "voc": voc, "pascal_context": pascal_context}
FIRST_MASK = {
    "cityscapes": "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    "ade20k": "ADEChallengeData2016/annotations/training/ADE_train_00000000.png",
    "voc": "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png",
    "pascal_context": "VOCdevkit/VOC2010/SegmentationClassContext/2007_000032.png"
}


@pytest.mark.parametrize("data, classes, train, val", [("cityscapes", 19, 4, 2), ("ade20k", 150, 3, 2),
                                                       ("voc", 21, 2, 1), ("pascal_context", 59, 2, 1)])
def test_a_named_set_is_read_pixel_for_pixel(tmp_path, data, classes, train, val):
    SETS[data](tmp_path)
    source, names = segmentation_pairs(data, str(tmp_path), "train")
    assert (len(names) == len(set(names)) == classes and len(source) == train
            and len(segmentation_pairs(data, str(tmp_path), "val")[0]) == val)
    values = np.asarray(Image.open(tmp_path / FIRST_MASK[data]))
    wanted = np.array([[MEANING[data](int(v)) for v in row] for row in values])
    sample = source.read(0)
    assert np.array_equal(sample["mask"], wanted) and sample["image"].shape == (3, 24, 32)
    assert set(np.unique(wanted)) - {255} == set(range(classes))  # the test saw every class
    assert datasets.class_colours(data, classes).shape == (classes, 3)


@pytest.mark.parametrize("data, landmarks", [
    ("cityscapes", {
        0: ("road", (128, 64, 128)), 10: ("sky", (70, 130, 180)), 11: ("person",
                                                                       (220, 20, 60)), 18: ("bicycle",
                                                                                            (119, 11, 32))
    }),
    ("voc", {
        0: ("background", (0, 0, 0)), 1: ("aeroplane", (128, 0, 0)), 15: ("person",
                                                                          (192, 128, 128)), 20: ("tvmonitor",
                                                                                                 (0, 64, 128))
    }),
    ("ade20k", {
        0: ("wall", (120, 120, 120)), 2: ("sky", (6, 230, 230)), 12: ("person",
                                                                      (150, 5, 61)), 149: ("flag",
                                                                                           (92, 0, 255))
    }),
    ("pascal_context", {0: ("aeroplane", (128, 0, 0)), 1: ("bag", (0, 128, 0)), 58: ("wood", (192, 192, 64))})
])
def test_classes_and_colours_are_the_sets_own(tmp_path, data, landmarks):
    SETS[data](tmp_path)
    _, names = segmentation_pairs(data, str(tmp_path), "train")
    colours = datasets.class_colours(data, len(names))
    assert {i: (names[i], tuple(colours[i].tolist())) for i in landmarks} == landmarks


def test_cityscapes_is_read_from_label_train_ids_too(tmp_path):
    cityscapes(tmp_path, "labelTrainIds", (*range(19), 255))
    source, _ = segmentation_pairs("cityscapes", str(tmp_path), "train")
    mask = tmp_path / FIRST_MASK["cityscapes"].replace("labelIds", "labelTrainIds")
    assert np.array_equal(source.read(0)["mask"], np.asarray(Image.open(mask)))


def test_pascal_context_keeps_its_background_for_60_classes(tmp_path):
    pascal_context(tmp_path)
    source, names = segmentation_pairs("pascal_context", str(tmp_path), "train", num_classes=60)
    assert names[0] == "background" and len(names) == 60
    assert np.array_equal(
        source.read(0)["mask"], np.asarray(Image.open(tmp_path / FIRST_MASK["pascal_context"])))


def test_another_number_of_images_than_the_official_one_is_said(tmp_path):
    cityscapes(tmp_path)
    assert (segmentation_pairs("cityscapes", str(tmp_path),
                               "train")[0].note == "cityscapes train: 4 images, the official set has 2975")
    assert "the official set has 22973" in pretraining_images("cityscapes", str(tmp_path), coarse=True).note


@pytest.mark.parametrize("data, kwargs, count", [("cityscapes", {}, 4), ("cityscapes", {"coarse": True}, 5),
                                                 ("ade20k", {}, 3), ("voc", {}, 4),
                                                 ("pascal_context", {}, 4)])
def test_the_images_of_a_set_are_pretraining_images(tmp_path, data, kwargs, count):
    SETS[data](tmp_path)
    source = pretraining_images(data, str(tmp_path), **kwargs)
    assert len(source) == count and set(source.read(count - 1)) == {"image"}


def test_a_published_list_names_the_pairs(tmp_path):
    cityscapes(tmp_path)
    stem = "train/ulm/ulm_000001_000019"
    path = tmp_path / "labeled.txt"
    path.write_text(
        f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png")  # no final newline
    source, _ = segmentation_pairs("cityscapes", str(tmp_path), "train", list_file=str(path))
    assert (source.pairs == [(f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png")]
            and "labelTrainIds" in source.note)
    voc(tmp_path)
    path.write_text("JPEGImages/2007_000039.jpg SegmentationClass/2007_000039.png\n")
    source, _ = segmentation_pairs("voc", str(tmp_path), "train", list_file=str(path))
    assert len(source) == 1 and 255 in source.read(0)["mask"]
    for line in ("/JPEGImages/2007_000039.jpg /SegmentationClass/2007_000039.png", "2007_000039"):  # DeepLab's, VOC's own
        path.write_text(f"{line}\n")
        listed, _ = segmentation_pairs("voc", str(tmp_path), "train", list_file=str(path))
        assert listed.pairs == source.pairs
    path.write_text("2007_999999\n")
    with pytest.raises(InputError, match="line 1: no such file: .*JPEGImages/2007_999999.jpg"):
        segmentation_pairs("voc", str(tmp_path), "train", list_file=str(path))


@pytest.mark.parametrize("data, spoil, message", [
    ("cityscapes", lambda root:
     (root / "gtFine").rename(root / "gt"), r"no folder gtFine/train in it; expected leftImg8bit/"),
    ("cityscapes", lambda root: (root / FIRST_MASK["cityscapes"]).unlink(),
     r"aachen_000000_000019_leftImg8bit.png: no mask for this image"),
    ("cityscapes", lambda root: [p.unlink() for p in (root / "leftImg8bit/train").rglob("*.png")],
     r"leftImg8bit/train: no files"),
    ("ade20k", lambda root:
     (root / FIRST_MASK["ade20k"]).unlink(), r"ADE_train_00000000.jpg: no mask for this image"),
    ("ade20k", lambda root:
     (root / "ADEChallengeData2016/annotations").rename(root / "x"), r"no folder annotations/training in it"),
    ("voc", lambda root: (root / FIRST_MASK["voc"]).unlink(),
     r"SegmentationClass/2007_000032.png: no such file, but .*train.txt names it"),
    ("voc", lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text(""),
     r"train.txt: no names in it"),
    ("voc", lambda root:
     (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink(), r"train.txt: cannot be read"),
    ("voc", lambda root: voc(root, 2007), r"holds VOC2007, VOC2012; pass one of them"),
    ("voc", lambda root:
     (root / "VOCdevkit").rename(root / "kit"), r"expected VOCdevkit/VOC20xx with JPEGImages"),
    ("pascal_context", lambda root: (root / "VOCdevkit/VOC2010").rename(root / "VOCdevkit/VOC2012"),
     r"found VOC2012, expected VOCdevkit/VOC2010"),
    ("pascal_context", lambda root: (root / "VOCdevkit/VOC2010/SegmentationClassContext").rename(root / "x"),
     r"no folder SegmentationClassContext in it; expected VOCdevkit/VOC2010")
])
def test_a_set_with_a_fault_is_refused_by_name(tmp_path, data, spoil, message):
    SETS[data](tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        segmentation_pairs(data, str(tmp_path), "train")


@pytest.mark.parametrize("data, mask, message",
                         [("cityscapes", np.full(
                             (24, 32), 34), r"labelIds.png: mask value 34, expected 0 to 33, or 255"),
                          ("ade20k", np.full((24, 32), 151), r"mask value 151, expected 0 to 150, or 255"),
                          ("voc", np.full((24, 32), 21), r"mask value 21, expected 0 to 20, or 255"),
                          ("pascal_context", np.full(
                              (24, 32), 60), r"mask value 60, expected 0 to 59, or 255"),
                          ("voc", np.zeros((24, 32, 3)), r"mask is RGB, expected an index image")])
def test_a_mask_outside_the_sets_labels_is_named_with_its_value(tmp_path, data, mask, message):
    SETS[data](tmp_path)
    write_mask(tmp_path / FIRST_MASK[data], mask)
    with pytest.raises(InputError, match=message):
        segmentation_pairs(data, str(tmp_path), "train")[0].read(0)


@pytest.mark.parametrize("data", ["cityscapes", "ade20k", "voc", "pascal_context"])
def test_a_named_set_goes_through_all_stages(tmp_path, script, data):
    SETS[data](tmp_path / "data")
    root = ["--data", data, "--root", tmp_path / "data", *PAPER_TINY]
    status, _, err = script("pretrain_decoder", *root, *TINY["pretrain_decoder"], "--encoder-weights",
                            "random", "--out", tmp_path / "ddep")
    assert status == 0, err
    status, out, err = script("finetune", *root, *TINY["finetune"], "--labels", 2, "--init",
                              tmp_path / "ddep" / "last.pt", "--out", tmp_path / "tuned")
    assert status == 0 and ("the official set has" in out) == (data != "voc"), err
    lines = (tmp_path / "tuned" / "labelled.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].count("\t") == 1
    status, _, err = script("finetune", *root,
                            *[flag for flag in TINY["finetune"] if flag not in ("--labels", "6")],
                            "--train-list", tmp_path / "tuned" / "labelled.txt", "--init",
                            tmp_path / "ddep" / "last.pt", "--out", tmp_path / "again")
    assert status == 0, err
    ours, again = (torch.load(tmp_path / run / "last.pt")["model"] for run in ("tuned", "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)  # the printed list gives the same run
    flags = ["--scales", 0.5, 1] if data != "cityscapes" else []
    status, out, err = script("evaluate", "--checkpoint", tmp_path / "tuned" / "best.pt", *flags, "--window",
                              32, "--workers", 0, "--save-predictions", tmp_path / "predictions")
    assert status == 0 and "mIoU" in out, err
    prediction = next((tmp_path / "predictions" / "index").rglob("*.png"))
    with Image.open(prediction) as image:
        first = {"cityscapes": [128, 64, 128], "ade20k": [120, 120, 120], "voc": [0, 0, 0], "pascal_context": [128, 0, 0]}
        assert image.size == (32, 24) and image.getpalette()[:3] == first[data]


@pytest.mark.parametrize(
    "data, encoder, wanted",
    [("cityscapes", "hybrid", dict(scales=[1.0], flip=True, window=1024)),
     ("pascal_context", "hybrid", dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=True, window=512)),
     ("ade20k", "hybrid", dict(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=True, window=512)),
     ("ade20k", "resnet50", dict(scales=[1.0], flip=True, window=512)),
     ("folder", "hybrid", dict(scales=[1.0], flip=True, window=512))])
def test_the_data_set_chooses_the_evaluation(tmp_path, data, encoder, wanted):
    import evaluate

    torch.save(
        dict(model={}, model_args=dict(encoder=encoder, width=1), class_names=["a"],
             args=dict(data=data, root="there", crop_size=512)), tmp_path / "best.pt")
    args, *_ = evaluate.parse_arguments(["--checkpoint", str(tmp_path / "best.pt")])
    assert ({key: getattr(args, key)
             for key in wanted} == wanted and args.data == data and args.root == "there")
    args, *_ = evaluate.parse_arguments(
        ["--checkpoint",
         str(tmp_path / "best.pt"), "--scales", "1", "2", "--no-flip", "--window", "7"])
    assert (args.scales, args.flip, args.window) == ([1.0, 2.0], False, 7)


def test_the_list_of_a_subset_is_printed(tmp_path, script):
    cityscapes(tmp_path)
    status, out, err = script("datasets", "--data", "cityscapes", "--root", tmp_path, "--labels", 3,
                              "--check")
    assert status == 0 and "4 images, the official set has 2975" in err and "3 of 4 pairs" in err
    lines = out.splitlines()
    assert len(lines) == 3 and all(
        os.path.isfile(tmp_path / path) for line in lines for path in line.split("\t"))
    assert set(
        script("datasets", "--data", "cityscapes", "--root", tmp_path, "--fraction",
               "1/2")[1].splitlines()) < set(lines)
    write_mask(tmp_path / lines[0].split("\t")[1], np.full((24, 32), 40))
    status, out, err = script("datasets", "--data", "cityscapes", "--root", tmp_path, "--check")
    assert status == 2 and "mask value 40" in err and out == ""


# ------------------------------------------------------------------------------------------------ ImageNet-21k, unopened


def test_synset_folders_and_tars_are_the_classes_of_stage_1(tmp_path):
    imagenet21k(tmp_path / "train")
    write_image(tmp_path / "train" / "n00000003" / "n00000003_1.JPEG")
    train, val, names = classification_images("imagenet21k", str(tmp_path))
    assert names == ["n00000001", "n00000002", "n00000003"] and len(train) == 5 and len(val) == 1
    assert [train.read(i)["label"] for i in (0, 1, 3, 4)] == [0, 0, 1, 2] and val.read(0)["label"] == 0
    assert {val.name(0)} & {train.name(i) for i in range(5)} == set()


def test_imagenet21k_goes_through_stages_1_and_2(tmp_path, script):
    imagenet21k(tmp_path / "data")
    root = ["--data", "imagenet21k", "--root", tmp_path / "data", *PAPER_TINY, "--cache", tmp_path / "cache"]
    status, out, err = script("pretrain_decoder", *root, *TINY["pretrain_decoder"], "--encoder-weights",
                              "random", "--out", tmp_path / "ddep")
    assert (status == 2 and "1 of 5 images are unreadable, more than 1 %" in err
            and "n00000002_9.JPEG: not a readable image" in out)
    (tmp_path / "data" / "n00000002.tar").unlink()
    write_tar(tmp_path / "data" / "n00000005.tar", {"n00000005_1.JPEG": jpeg(9)})
    for stage, flags in (("pretrain_encoder", []),
                         ("pretrain_decoder",
                          ["--encoder-weights", tmp_path / "pretrain_encoder" / "last.pt"])):
        status, _, err = script(stage, *root, *TINY[stage], *flags, "--out", tmp_path / stage)
        assert status == 0, err


# ------------------------------------------------------------------------------------------------ label subsets


@pytest.mark.parametrize("size, share, count", [(2975, "1/30", 100), (2975, "1/8", 372), (2975, "1/4", 744),
                                                (2975, "0.25", 744), (2975, "0.02", 60), (2975, "0.01", 30),
                                                (4998, "0.2", 1000), (4996, "0.2", 1000), (4996, "0.1", 500),
                                                (4996, "0.05", 250), (4996, "0.01", 50), (4998, "0.1", 500),
                                                (4998, "0.05", 250), (4998, "0.01", 50), (20210, "0.2", 4042),
                                                (20210, "0.1", 2021), (20210, "0.05", 1010),
                                                (20210, "0.01", 202)])
def test_a_share_of_a_data_set_is_the_papers_count(size, share, count):
    assert len(datasets.label_subset([str(i) for i in range(size)], Fraction(share), seed=0)) == count


def test_subsets_of_one_seed_are_nested_and_a_function_of_the_ids():
    ids = [f"image {i}" for i in range(500)]
    sizes = [1, 5, 50, 500]
    subsets = [set(datasets.label_subset(ids, n, seed=3)) for n in sizes]
    assert [len(s) for s in subsets] == sizes and all(a < b for a, b in zip(subsets, subsets[1:]))
    assert set(datasets.label_subset(ids, 50, seed=4)) != subsets[2]
    backwards = datasets.label_subset(ids[::-1], 50, seed=3)
    assert {ids[::-1][i] for i in backwards} == {ids[i] for i in subsets[2]}
    for count in (0, 501):
        with pytest.raises(InputError, match="expected 1 to 500"):
            datasets.label_subset(ids, count, seed=0)
    with pytest.raises(InputError, match="there are 500 labelled images, 1/3000 of them is 0"):
        datasets.label_subset(ids, Fraction(1, 3000), seed=0)


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "0.1e1", "1/0", ".", "1" * 5000])
def test_an_odd_share_is_refused_at_once(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a share of the images"):
        datasets.fraction(text)


def test_names_of_any_bytes_have_a_place_in_a_label_subset():
    assert len(datasets.label_subset(["a\udcff.png", "b.png", "c.png"], 2, seed=0)) == 2


def test_names_of_any_bytes_survive_a_list(tmp_path, script):
    odd = os.fsdecode("caf\u00e9".encode("latin-1"))
    for kind, write in (("images", write_image), ("masks", lambda path: write_mask(path, np.zeros((40, 56))))):
        for name in (odd, "b"):
            write(tmp_path / kind / "train" / f"{name}.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    with open(tmp_path / "list.txt", "wb") as file:
        status = subprocess.run([sys.executable, ROOT / "datasets.py", "--data", "folder", "--root", tmp_path], stdout=file,
                                env={**os.environ, "PYTHONIOENCODING": "ascii"}).returncode
    assert status == 0
    source, _ = segmentation_pairs("folder", str(tmp_path), "train")
    for text in (b"", b"\xef\xbb\xbf"):  # with a byte order mark too
        (tmp_path / "list.txt").write_bytes(text + (tmp_path / "list.txt").read_bytes())
        listed, _ = segmentation_pairs("folder", str(tmp_path), "train", list_file=str(tmp_path / "list.txt"))
        assert listed.pairs == source.pairs and listed.read(1)["mask"].shape == (40, 56)
    write_lines(tmp_path / "labelled.txt", [source.line(i) for i in range(2)])
    listed, _ = segmentation_pairs("folder", str(tmp_path), "train", list_file=str(tmp_path / "labelled.txt"))
    assert listed.pairs == source.pairs


def test_a_pipe_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(InputError, match="list.txt: cannot be read .not a file."):
        datasets.read_lines(tmp_path / "list.txt")


def test_a_circle_of_links_in_a_named_set_is_walked_once(tmp_path):
    root = cityscapes(tmp_path)
    before = len(segmentation_pairs("cityscapes", str(root), "train")[0])
    (root / "leftImg8bit/train/circle").symlink_to(root / "leftImg8bit/train")
    assert len(segmentation_pairs("cityscapes", str(root), "train")[0]) == before
