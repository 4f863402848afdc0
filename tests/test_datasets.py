"""datasets.py: every layout on disk as it is distributed, tiny but exact, checked pixel for pixel."""
import io
import os
import pickle
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import files
from common import UserError
from conftest import imagenet21k, jpeg, write_image, write_mask, write_tar
from data import UnreadableImage


def flags(data, root, **more):
    usual = dict.fromkeys(("images", "masks", "train_list", "val_list", "val_fraction", "labels"))
    return Namespace(**{**usual, "seed": 0, "data": data, "root": str(root), **more})


def pairs(data, root, part="train", **more):
    given = flags(data, root, **more)
    return datasets.labelled(given, datasets.classes_of(given), [part]).get(part)


def parts(root, **more):
    """Names of the training and the validation images."""
    given = flags("folder", root, **more)
    return [names(source) for source in datasets.training_and_validation(given, datasets.classes_of(given))]


def pictures(root, **more):
    return datasets.pretraining_images(flags("folder", root, **more))


def names(source):
    return [source.name(i) for i in range(len(source or []))]


def pixels(path, mode=None):
    image = Image.open(path)
    return np.array(image.convert(mode) if mode else image)


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
    classes, unlabelled = datasets.classes_of(given), datasets.pretraining_images(given)
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
    assert len(datasets.pretraining_images(flags("cityscapes_coarse", tmp_path))) == 5


@pytest.mark.parametrize("data, spoil, named", [
    ("voc", lambda root: next(root.rglob("Segmentation/train.txt")).unlink(), "train.txt"),
    ("voc", lambda root: voc(root, 2007), "VOC2007.*VOC2012"),
    ("cityscapes", lambda root: (root / "gtFine").rename(root / "gt"), "gtFine")])
def test_a_set_with_a_fault_is_refused_by_name(data, spoil, named, tmp_path):
    SETS[data][0](tmp_path)
    spoil(tmp_path)
    with pytest.raises((UserError, OSError), match=named):  # both are one line
        pairs(data, tmp_path)


@pytest.fixture
def tars(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return imagenet21k(tmp_path / "data")


def test_each_picture_of_a_tar_is_what_its_bytes_are(tars):
    source, classes = datasets.classification_images(flags("imagenet21k", tars))
    assert classes == ["n00000001", "n00000002"] and len(source) == 5
    for i, content in ((0, jpeg(1)), (1, jpeg(2, "L")), (2, jpeg(3, "CMYK")), (4, jpeg(5))):
        sample = source.read(i)
        assert sample["label"] == i // 3
        assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(io.BytesIO(content), "RGB"))
    with pytest.raises(UnreadableImage, match="n00000002.tar"):
        source.read(3)


def test_tars_are_listed_once_and_again_when_they_change(tars, monkeypatch):
    opened, plain = [], files.list_tars
    monkeypatch.setattr(files, "list_tars", lambda root, tars: opened.extend(tars) or plain(root, tars))
    first, again = (datasets.pretraining_images(flags("imagenet21k", tars)) for _ in range(2))
    assert len(opened) == 2 and len(set(names(first))) == 5 and names(first) == names(again)
    write_tar(tars / "n00000002.tar", {f"{i}.JPEG": b"x" for i in range(500)})
    more = datasets.pretraining_images(flags("imagenet21k", tars))
    sent = pickle.dumps(more)  # to a loader worker that is not forked: the path of the list
    assert len(more) == 503 and len(sent) < 2000 and names(pickle.loads(sent)) == names(more)
    (tars / "n00000002.tar").write_bytes(b"")
    with pytest.raises(UserError, match="n00000002.tar"):
        datasets.pretraining_images(flags("imagenet21k", tars))


@pytest.mark.parametrize("data, place", [("folder", ""), ("imagenet21k", "train")])
def test_class_folders_are_labelled_by_their_names(data, place, tmp_path):
    for path in ("trainer/1.jpg", "cat/1.png", "cat/deep/2.JPG", "trainer/.a.jpg", "bullet_train/3.webp"):
        write_image(tmp_path / place / path)
    (tmp_path / place / "cat" / "notes.txt").write_text("no picture")
    source, classes = datasets.classification_images(flags(data, tmp_path))
    labels = {source.name(i): source.read(i)["label"] for i in range(len(source))}
    assert labels == {"bullet_train/3.webp": 0, "cat/1.png": 1, "cat/deep/2.JPG": 1, "trainer/1.jpg": 2}
    assert classes == ["bullet_train", "cat", "trainer"]


@pytest.mark.parametrize("paths", [
    "Train/cat/1.png Val/cat/1.png", "cat/1.png cat/2.png", "1.png 2.png", "cat/1.png test/1.png",
    "cat/1.png 1.png", "my-Train/1.png my-test/1.png", "in21k_train/1.png in21k_val/1.png in21k_small/1.png"])
def test_splits_and_loose_pictures_are_not_taken_for_classes(paths, tmp_path):
    for path in paths.split():
        write_image(tmp_path / path)
    with pytest.raises(UserError, match=tmp_path.name):
        datasets.classification_images(flags("folder", tmp_path))


def test_a_list_of_validation_images_leaves_the_others_to_train_and_none_is_in_both_lists(folder, tmp_path):
    lists = {kind: tmp_path / f"{kind}.txt" for kind in ("train_list", "val_list")}
    lists["val_list"].write_text("images/train/a.jpg\ne\n")
    train, val = parts(folder, val_list=lists["val_list"])
    assert val == ["images/train/a.jpg", "images/val/e.jpg"]
    assert sorted(train) == ["images/train/b ö.png", "images/train/c.jpg", "images/train/sub/d.png"]
    lists["train_list"].write_text("a\nc")
    with pytest.raises(UserError, match=r"images/train/a\.jpg"):
        parts(folder, **lists)


def own(root, *paths):
    """Images and masks, in turn, at these paths, each pair of a size of its own."""
    for i, (image, mask) in enumerate(zip(paths[::2], paths[1::2])):
        write_image(root / image, 20 + i, 30, seed=i)
        write_mask(root / mask, every_value(range(2), 20 + i, 30))
    (root / "classes.txt").write_text("sky\nsea\n")
    return root


@pytest.mark.parametrize("images, masks, files", [
    ("imgs/*.jpg", "labels/*_mask.png", "imgs/b.jpg labels/b_mask.png imgs/1/a.jpg labels/1/a_mask.png"),
    (r"*\x.jpg", r".\*\label.png", "1/x.jpg 1/label.png 2/x.jpg 2/label.png"),
    ("images/{part}/*", "masks/{part}/*",
     "images/train/o\u0308.jpg masks/train/ö.png images/train/s/ö.png masks/train/s/o\u0308.png"),
    ("imgs/*", "masks/*", "imgs/a.JPG masks/a.bmp imgs/b.webp masks/b.PNG"),
    ("*/img/*_rgb.jpg", "*/gt/*_label.png",
     "a/b/img/1_rgb.jpg a/b/gt/1_label.png c/img/1_rgb.jpg c/gt/1_label.png"),
    ("*.png", "*_mask.png", "b/b(1).png b/b(1)_mask.png n/n(1).png n/n(1)_mask.png")])  # BUSI
def test_patterns_pair_what_is_equal_in_place_of_the_stars(images, masks, files, tmp_path):
    files = files.split()
    own(tmp_path, *files)
    source = pairs("folder", tmp_path, images=images, masks=masks)
    assert names(source) == files[::2]
    assert pairs("folder", tmp_path, "val", images=images, masks=masks) is None
    for i in range(2):
        sample = source.read(i)
        assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(tmp_path / files[2 * i]))
        assert np.array_equal(sample["mask"], pixels(tmp_path / files[2 * i + 1]))
    extra = str(Path(files[0]).with_suffix(".JPEG"))  # a picture that no pattern takes, or a second one
    write_image(tmp_path / extra)
    if images.endswith("*"):
        with pytest.raises(UserError, match=extra):
            pairs("folder", tmp_path, images=images, masks=masks)
    else:
        assert extra in pairs("folder", tmp_path, images=images, masks=masks).note


@pytest.mark.parametrize("spoil, named", [
    (lambda root: (root / "masks/train/c.png").unlink(), "images/train/c.jpg"),
    (lambda root: (root / "images/train/c.jpg").unlink(), "masks/train/c.png"),
    (lambda root: write_image(root / "images/train/new.gif"), "new.gif"),
    (lambda root: (root / "images/train/new.jfif").write_bytes(jpeg(1)), "new.jfif"),
    (lambda root: write_image(root / "images/train/c.png"), r"c\.(png|jpg).*c\.(png|jpg)"),
    (lambda root: (root / "images/train/dead.png").symlink_to("nowhere.png"), "dead.png"),
    (lambda root: (root / "masks/train/dead.png").symlink_to("nowhere.png") or
     write_image(root / "images/train/dead.png"), "dead.png"),
    (lambda root: (root / "images/train/circle").symlink_to("."), "circle"),
    (lambda root: write_mask(root / "masks/train/c.png", np.zeros((10, 20))), "masks/train/c.png"),
    (lambda root: (root / "images/train").rename(root / "images/Training"), "masks/train/a.png")])
def test_a_folder_with_a_fault_is_refused_by_name(spoil, named, folder):
    spoil(folder)
    with pytest.raises((UserError, OSError), match=named):
        parts(folder)
        pairs("folder", folder).read(2)


def test_links_are_followed(folder, tmp_path):
    before = names(pairs("folder", folder))
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (folder / kind / "train").rename(tmp_path / f"{kind} elsewhere")
        (folder / kind / "train").symlink_to(tmp_path / f"{kind} elsewhere")
        (folder / kind / "val" / f"link.{ending}").symlink_to(folder / kind / "val" / f"e.{ending}")
    val = pairs("folder", folder, "val")
    assert names(pairs("folder", folder)) == before and len(pictures(folder)) == 7
    assert names(val)[2] == "images/val/link.jpg" and torch.equal(val.read(2)["mask"], val.read(0)["mask"])


def test_a_folder_that_cannot_be_read_is_refused_by_name(folder, monkeypatch):
    def scandir(path, plain=os.scandir):
        if str(path).rstrip("/").endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for find in (pictures, parts):
        with pytest.raises(OSError, match="s/train/sub"):  # which common.run says in one line
            find(folder)


def test_a_list_replaces_that_of_a_named_set(tmp_path):
    voc(tmp_path)
    (tmp_path / "list.txt").write_text("/JPEGImages/2007_000033.jpg /SegmentationClassAug/2007_000033.png\n")
    assert names(pairs("voc", tmp_path, train_list=tmp_path / "list.txt")) == ["JPEGImages/2007_000033.jpg"]


def test_stage_2_takes_images_where_there_is_such_a_folder_and_else_everything(folder, tmp_path):
    assert len(pictures(folder)) == 6 and all(name.startswith("images/") for name in names(pictures(folder)))
    for path in ("a/1.jpg", "a/deep/2.png", "b/3.TIF", "4.bmp"):
        write_image(tmp_path / "mixed" / path)
    (tmp_path / "mixed" / "a" / "read.me").write_text("no picture")
    source = pictures(tmp_path / "mixed")
    assert sorted(names(source)) == ["4.bmp", "a/1.jpg", "a/deep/2.png", "b/3.TIF"]
    shown = ("a 1", "1.jpg", "a/deep 1", "b 1", "3.TIF")  # where they lie
    assert all(re.search(rf"\b{text}\b", source.note) for text in shown)
    assert names(pictures(tmp_path / "mixed", images="a/*.jpg")) == ["a/1.jpg"]
    for missing in (dict(images="a/*.wolf"), dict(images="wolf/*"), dict(root=None)):
        with pytest.raises(UserError, match="wolf|--root"):
            datasets.pretraining_images(flags("folder", **{"root": tmp_path / "mixed", **missing}))


@pytest.mark.parametrize("text, classes, values", [
    ("sky\nsea\n", ["sky", "sea"], {0: 0, 1: 1, 255: 255}),
    ("sky\nignore\nopen sea\n", ["sky", "open sea"], {0: 0, 1: 255, 2: 1, 255: 255}),
    ("sky\nsea\nsky\n", ["sky", "sea"], {0: 0, 1: 1, 2: 0, 255: 255}),
    ("0 background\n255 cell", ["background", "cell"], {0: 0, 255: 1}),
    ("\n7 wall\n2 open window\n 11  ignore\n9 wall\n", ["wall", "open window"], {7: 0, 2: 1, 11: 255, 9: 0}),
    ("7 0 0 0 road\n9 255 0 10 red car\n0 0 0 0 ignore", ["road", "red car"], {7: 0, 9: 1, 0: 255}),
    ("0 0 0 road\n255 0 10 red car\n1 2 3 ignore\n4 5 6 road", ["road", "red car"],
     {(0, 0, 0): 0, (255, 0, 10): 1, (1, 2, 3): 255, (4, 5, 6): 0})])
def test_classes_txt_says_which_values_or_colours_the_masks_use(text, classes, values, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found = datasets.classes_of(flags("folder", tmp_path))
    assert (found.names, found.values) == (classes, values)
    assert len(set(map(tuple, found.colours))) == len(classes)
    assert "0 0 0 road" not in text or list(map(tuple, found.colours)) == [(0, 0, 0), (255, 0, 10)]


@pytest.mark.parametrize("text", [
    "0: sky\n1: sea\n", "sky\n1 sea\n", "0 0 0 sky\n1 sea\n", "0 sky\n300 sea\n", "0 0 0 sky\n0 0 256 sea\n",
    "0 sky\n0 sea\n", "0 0 0 sky\n0 0 0 sea\n", "sky\n", "0 sky\n1 sky\n", "0 sky\n1 ignore\n", "",
    "-1 sky\n1 sea\n", "0.0 sky\n1.0 sea\n", "0,sky\n1,sea\n", None])
def test_a_classes_txt_with_a_fault_is_refused_by_name(text, tmp_path):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises((UserError, OSError), match="classes.txt"):
        datasets.classes_of(flags("folder", tmp_path))


def test_labels_are_nested_and_the_validation_images_the_same_for_all_seeds(tmp_path, folder):
    own(tmp_path, *[path for i in range(20) for path in (f"imgs/{i}.png", f"masks/{i}.png")])

    def drawn(**more):
        return parts(tmp_path, images="imgs/*.png", masks="masks/*.png", **more)

    chosen = [set(drawn(labels=n, seed=3)[0]) for n in (1, 5, 12, 20)]
    assert [len(subset) for subset in chosen] == [1, 5, 12, 20]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3] and set(drawn(labels=12, seed=4)[0]) != chosen[2]
    (tmp_path / "list.txt").write_text("\n".join(sorted(chosen[3])[::-1]))  # whatever order they have
    assert set(drawn(labels=5, seed=3, train_list=tmp_path / "list.txt")[0]) == chosen[1]
    train, val = drawn(val_fraction=0.25)
    assert (len(train), len(val)) == (15, 5) and set(train) | set(val) == chosen[3]
    fewer, again = drawn(val_fraction=0.25, labels=4, seed=9)
    assert again == val and len(fewer) == 4 and set(fewer) < set(train)
    for wrong in (dict(labels=21), dict(val_fraction=0.01), dict(val_fraction=0.99)):
        with pytest.raises(UserError):
            drawn(**wrong)
    with pytest.raises(UserError):  # it has validation images
        parts(folder, val_fraction=0.5)


def cells(root, classes, parts=("train",)):
    """Masks of 0 and 255; one pixel in four is 255."""
    for part, i in ((part, i) for part in parts for i in range(3)):
        write_image(root / "images" / part / f"{i}.png")
        write_mask(root / "masks" / part / f"{i}.png", np.pad(np.full((20, 28), 255), ((0, 20), (0, 28))))
    (root / "classes.txt").write_text(classes)
    return root


def survey(root):
    given = flags("folder", root)
    classes = datasets.classes_of(given)
    return datasets.survey(datasets.labelled(given, classes), classes)


def shares(root):
    """{class: percent of the pixels in train}."""
    return {words[0]: float(words[1].strip("%")) for words in map(str.split, survey(root).splitlines()[1:])}


def test_a_survey_has_the_share_of_each_class(tmp_path):
    cells(tmp_path, "0 background\n255 cell\n7 nucleus\n9 ignore\n")
    write_mask(tmp_path / "masks" / "train" / "0.png", np.full((40, 56), 9))
    wanted = {"background": 50, "cell": 100 / 6, "nucleus": 0, "ignored": 100 / 3}
    assert shares(tmp_path) == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize("classes", ["background\ncell\n", "0 ignore\n255 cell\n1 nucleus\n"])
def test_masks_of_fewer_than_two_classes_are_refused(classes, tmp_path):
    with pytest.raises(UserError, match="classes.txt"):
        survey(cells(tmp_path, classes))


def in_colour(path, red):
    """Give a mask a palette in which value 0 has this colour."""
    picture = Image.fromarray(pixels(path))
    picture.putpalette([red] + [0] * 767)
    picture.save(path)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("spoil", [
    lambda path: write_mask(path, np.full((40, 56), 7)), lambda path: write_mask(path, np.zeros((56, 40))),
    lambda path: in_colour(path, 9)])
def test_a_wrong_value_size_or_colour_in_one_mask_of_either_part_is_seen(part, spoil, tmp_path):
    cells(tmp_path, "0 background\n255 cell\n", ("train", "val"))
    for path in (tmp_path / "masks").rglob("*.png"):
        in_colour(path, 8)
    assert [line.split()[1:] for line in survey(tmp_path).splitlines()[1:]] == [
        ["75.00%", "75.00%"], ["25.00%", "25.00%"], ["0.00%", "0.00%"]]
    spoil(tmp_path / "masks" / part / "2.png")
    with pytest.raises(UserError, match=f"masks/{part}/2.png"):
        survey(tmp_path)


def test_palettes_that_differ_are_no_fault_where_their_colours_are_read(tmp_path):
    cells(tmp_path, "8 0 0 background\n9 0 0 background\n0 0 0 cell\n")
    for i in range(3):
        in_colour(tmp_path / "masks" / "train" / f"{i}.png", 8 + i % 2)
    assert shares(tmp_path) == {"background": 75, "cell": 25, "ignored": 0}
