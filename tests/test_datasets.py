"""datasets.py: every layout on disk as it is distributed, tiny but exact, checked pixel for pixel."""
import io
import os
import re
import tarfile
import unicodedata
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from common import UserError
from conftest import imagenet21k, jpeg, write_image, write_mask, write_tar
from data import IGNORE, UnreadableImage


def flags(data, root, **more):
    usual = dict(images=None, masks=None, train_list=None, val_list=None, val_fraction=None, labels=None, seed=0)
    return Namespace(data=data, root=str(root), **{**usual, **{key: value and str(value) for key, value in more.items()}})


def pairs(data, root, part="train", **more):
    given = flags(data, root, **more)
    return datasets.labelled(given, part, datasets.classes_of(given))


def parts(root, data="folder", val_fraction=None, labels=None, seed=0, **more):
    """Names of the training and the validation images."""
    given = flags(data, root, **more)
    given.val_fraction, given.labels, given.seed = val_fraction, labels, seed
    return [names(source) for source in datasets.training_and_validation(given, datasets.classes_of(given))]


def names(source):
    return [source.name(i) for i in range(len(source or []))]


def pictures(root, **more):
    return datasets.pretraining_images(flags("folder", root, **more))


# ---------------------------------------- The named sets, each in its exact tree


def every_value(values, height=24, width=32, seed=0):
    """A mask (height, width) in which every one of `values` occurs."""
    mask = np.random.RandomState(seed).choice(list(values), height * width)
    mask[:len(values)] = list(values)
    return mask.reshape(height, width).astype(np.uint8)


def cityscapes(root, ending="labelIds", values=range(34)):
    for part, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",))):
        for city in cities:
            for i in range(2):
                stem = f"{part}/{city}/{city}_00000{i}_000019"
                write_image(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", 24, 32, seed=i)
                write_mask(root / "gtFine" / f"{stem}_gtFine_{ending}.png", every_value(values, seed=i))
                write_image(root / "gtFine" / f"{stem}_gtFine_color.png", 24, 32)  # lies there, too
                (root / "gtFine" / f"{stem}_gtFine_polygons.json").write_text("{}")
    write_image(root / "leftImg8bit" / "train_extra" / "bonn" / "bonn_000000_000002_leftImg8bit.png", 24, 32)


def ade20k(root):
    base = root / "ADEChallengeData2016"
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            write_image(base / "images" / part / f"ADE_{part[:-3]}_{i:08d}.jpg", 24, 32, seed=i)
            write_mask(base / "annotations" / part / f"ADE_{part[:-3]}_{i:08d}.png", every_value(range(151), seed=i))


def voc(root, year=2012, masks="SegmentationClass", lists="Segmentation", values=(*range(21), 255)):
    base = root / "VOCdevkit" / f"VOC{year}"
    (base / "ImageSets" / lists).mkdir(parents=True)
    for part, stems in (("train", ("2007_000032", "2007_000039")), ("val", ("2007_000033",))):
        (base / "ImageSets" / lists / f"{part}.txt").write_text("\n".join(stems))
        for i, stem in enumerate(stems):
            write_image(base / "JPEGImages" / f"{stem}.jpg", 24, 32, seed=i)
            write_mask(base / masks / f"{stem}.png", every_value(values, seed=i))
    write_image(base / "JPEGImages" / "2008_000001.jpg", 24, 32)  # one of those without a mask


def pascal_context(root):
    voc(root, 2010, "SegmentationClassContext", "SegmentationContext", range(60))


# By hand: what each value of a mask means, from the sets' own descriptions
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
             27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SETS = {  # its files, places of --root, a mask, what its values mean, numbers of classes and pairs
    "cityscapes": (cityscapes, [""], "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
                   lambda v: TRAIN_IDS.get(v, 255), 19, 4, 2),
    "ade20k": (ade20k, ["", "ADEChallengeData2016"],
               "ADEChallengeData2016/annotations/training/ADE_train_00000000.png", lambda v: (v or 256) - 1, 150, 3, 2),
    "voc": (voc, ["", "VOCdevkit", "VOCdevkit/VOC2012"], "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png",
            lambda v: v, 21, 2, 1),
    "pascal_context": (pascal_context, ["", "VOCdevkit", "VOCdevkit/VOC2010"],
                       "VOCdevkit/VOC2010/SegmentationClassContext/2007_000032.png", lambda v: (v or 256) - 1, 59, 2, 1),
    "pascal_context_60": (pascal_context, [""], "VOCdevkit/VOC2010/SegmentationClassContext/2007_000032.png",
                          lambda v: v, 60, 2, 1)}
WORDS = {"cityscapes": {0: ("road", (128, 64, 128)), 10: ("sky", (70, 130, 180)), 18: ("bicycle", (119, 11, 32))},
         "voc": {0: ("background", (0, 0, 0)), 1: ("aeroplane", (128, 0, 0)), 20: ("tvmonitor", (0, 64, 128))},
         "ade20k": {0: ("wall", (120, 120, 120)), 12: ("person", (150, 5, 61)), 149: ("flag", (92, 0, 255))},
         "pascal_context": {0: ("aeroplane", (128, 0, 0)), 58: ("wood", (192, 192, 64))},
         "pascal_context_60": {0: ("background", (0, 0, 0)), 1: ("aeroplane", (128, 0, 0))}}


@pytest.mark.parametrize("data, place", [(data, place) for data, row in SETS.items() for place in row[1]])
def test_a_named_set_is_read_pixel_for_pixel_wherever_root_points(data, place, tmp_path):
    make, _, mask, meaning, count, train, val = SETS[data]
    make(tmp_path)
    source = pairs(data, tmp_path / place)
    assert (len(source), len(pairs(data, tmp_path / place, "val"))) == (train, val)
    wanted = np.vectorize(meaning)(np.array(Image.open(tmp_path / mask)))
    assert set(np.unique(wanted)) - {255} == set(range(count))  # every class is there
    sample = source.read(0)
    assert np.array_equal(sample["mask"], wanted)
    image, = (path for path in tmp_path.rglob("*") if str(path).endswith(source.name(0)))
    assert np.array_equal(sample["image"].permute(1, 2, 0), np.array(Image.open(image)))


@pytest.mark.parametrize("data", SETS)
def test_classes_and_colours_are_the_sets_own(data):
    classes, count = datasets.classes_of(flags(data, "nowhere")), SETS[data][4]
    assert len(set(classes.names)) == len(classes.colours) == len(classes.names) == count
    assert {i: (classes.names[i], tuple(classes.colours[i])) for i in WORDS[data]} == WORDS[data]


@pytest.mark.parametrize("data, wrong", [("cityscapes", 34), ("ade20k", 151), ("voc", 21), ("pascal_context", 60)])
def test_a_value_outside_the_set_is_named(data, wrong, tmp_path):
    make, _, mask, *_ = SETS[data]
    make(tmp_path)
    write_mask(tmp_path / mask, np.full((24, 32), wrong))
    with pytest.raises(UserError, match=rf"{Path(mask).name}.*\b{wrong}\b"):
        pairs(data, tmp_path).read(0)


def test_train_ids_of_cityscapes_are_classes_as_they_are(tmp_path):
    cityscapes(tmp_path, "labelTrainIds", (*range(19), 255))
    source = pairs("cityscapes", tmp_path, masks="gtFine/{part}/*_gtFine_labelTrainIds.png")
    mask = tmp_path / SETS["cityscapes"][2].replace("labelIds", "labelTrainIds")
    assert len(source) == 4 and np.array_equal(source.read(0)["mask"], np.array(Image.open(mask)))


@pytest.mark.parametrize("data, count", [("cityscapes", 4), ("cityscapes_coarse", 5), ("ade20k", 3), ("voc", 4),
                                         ("pascal_context", 4)])
def test_the_images_of_a_set_are_pretraining_images(data, count, tmp_path):
    SETS[data.removesuffix("_coarse")][0](tmp_path)
    source = datasets.pretraining_images(flags(data, tmp_path))
    assert len(set(names(source))) == len(source) == count and "mask" not in source.read(count - 1)


@pytest.mark.parametrize("data, spoil, named", [
    ("cityscapes", lambda root: (root / "gtFine").rename(root / "gt"), "gtFine"),
    ("cityscapes", lambda root: (root / SETS["cityscapes"][2]).unlink(), "aachen_000000_000019_leftImg8bit.png"),
    ("ade20k", lambda root: (root / SETS["ade20k"][2]).unlink(), "ADE_train_00000000.jpg"),
    ("voc", lambda root: (root / SETS["voc"][2]).unlink(), "2007_000032.jpg"),
    ("voc", lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink(), "train.txt"),
    ("voc", lambda root: voc(root, 2007), "VOC2007.*VOC2012"),
    ("pascal_context", lambda root: (root / "VOCdevkit/VOC2010").rename(root / "VOCdevkit/VOC2012"),
     "SegmentationClassContext")])
def test_a_set_with_a_fault_is_refused_by_name(data, spoil, named, tmp_path):
    SETS[data][0](tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=named):
        pairs(data, tmp_path)


# ---------------------------------------- ImageNet-21k, unopened, and class folders


@pytest.fixture
def tars(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return imagenet21k(tmp_path / "data")


def test_each_picture_of_a_tar_is_what_its_bytes_are(tars):
    source, classes = datasets.classification_images(flags("imagenet21k", tars))
    assert classes == ["n00000001", "n00000002"] and len(source) == 5
    assert len(datasets.pretraining_images(flags("imagenet21k", tars))) == 5
    for i, (label, how) in enumerate([(0, (1,)), (0, (2, "L")), (0, (3, "CMYK")), (1, None), (1, (5,))]):
        if how is None:
            with pytest.raises(UnreadableImage, match="n00000002.tar"):
                source.read(i)
            continue
        wanted = np.array(Image.open(io.BytesIO(jpeg(*how))).convert("RGB"))
        sample = source.read(i)
        assert sample["label"] == label and np.array_equal(sample["image"].permute(1, 2, 0), wanted)


def test_tars_are_listed_once_and_again_when_they_change(tars, monkeypatch):
    opened, plain = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *args: opened.append(Path(path).name) or plain(path, *args))
    first = names(datasets.pretraining_images(flags("imagenet21k", tars)))
    assert len(opened) == 2 and names(datasets.pretraining_images(flags("imagenet21k", tars))) == first
    assert len(opened) == 2
    write_tar(tars / "n00000002.tar", {f"n00000002_{i}.JPEG": jpeg(i) for i in range(40)})
    assert len(datasets.pretraining_images(flags("imagenet21k", tars))) == 43


@pytest.mark.parametrize("spoil", [lambda whole: whole[:700], lambda whole: whole[:2560], lambda whole: b"",
                                   lambda whole: whole[:1536] + b"x" * 600])
def test_a_tar_that_is_not_whole_is_refused_by_name(spoil, tars):
    content = jpeg(1)[:900]  # a member of three blocks of 512
    write_tar(tars / "n00000003.tar", {"n00000003_1.JPEG": content, "n00000003_2.JPEG": content})
    (tars / "n00000003.tar").write_bytes(spoil((tars / "n00000003.tar").read_bytes()))
    with pytest.raises(UserError, match="n00000003.tar"):
        datasets.pretraining_images(flags("imagenet21k", tars))


@pytest.mark.parametrize("place", ["", "train"])
def test_class_folders_are_labelled_by_their_names(place, tmp_path):
    for path in ("dog/1.jpg", "cat/1.png", "cat/deep/2.JPG", "dog/.hidden.jpg", "emu/3.webp"):
        write_image(tmp_path / place / path, seed=len(path))
    (tmp_path / place / "cat" / "notes.txt").write_text("no picture")
    source, classes = datasets.classification_images(flags("folder", tmp_path))
    assert classes == ["cat", "dog", "emu"] and len(source) == 4
    labels = {source.name(i): source.read(i)["label"] for i in range(4)}
    assert labels == {"cat/1.png": 0, "cat/deep/2.JPG": 0, "dog/1.jpg": 1, "emu/3.webp": 2}


@pytest.mark.parametrize("paths", [["Train/cat/1.png", "Val/cat/1.png"], ["cat/1.png", "cat/2.png"],
                                   ["1.png", "2.png"], ["cat/1.png", "test/1.png"], ["cat/1.png", "1.png"]])
def test_splits_and_loose_pictures_are_not_taken_for_classes(paths, tmp_path):
    for path in paths:
        write_image(tmp_path / path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        datasets.classification_images(flags("folder", tmp_path))


# ---------------------------------------- Own folders: patterns


def own(root, *paths, classes="sky\nsea\n"):
    """Files at these paths: a mask where the path says so, else an image."""
    for i, path in enumerate(paths):
        if re.search("mask|label|Class|jpg.png", path):
            write_mask(root / path, every_value(range(2), 20 + i // 2, 30))
        else:
            write_image(root / path, 20 + i // 2, 30, seed=i)
    (root / "classes.txt").write_text(classes)
    return root


def test_a_folder_is_read_pair_by_pair(folder):
    for part, wanted in (("train", ["a.jpg", "b ö.png", "c.jpg", "sub/d.png"]), ("val", ["e.jpg", "f.png"])):
        source = pairs("folder", folder, part)
        assert names(source) == [f"images/{part}/{name}" for name in wanted]
        for i in range(len(source)):
            mask = folder / "masks" / part / f"{os.path.splitext(wanted[i])[0]}.png"
            assert np.array_equal(source.read(i)["mask"], np.array(Image.open(mask)))
    assert pairs("folder", folder, "test") is None


@pytest.mark.parametrize("images, masks, files", [
    ("imgs/*.jpg", "labels/*_mask.png", ["imgs/a.jpg", "labels/a_mask.png", "imgs/b.jpg", "labels/b_mask.png"]),
    ("imgs/*.jpg", "labels/*_mask.png", ["imgs/1/a.jpg", "labels/1/a_mask.png", "imgs/2/a.jpg", "labels/2/a_mask.png"]),
    ("*/x.jpg", "*/label.png", ["1/x.jpg", "1/label.png", "2/x.jpg", "2/label.png"]),
    ("all/*.jpg", "all/*.jpg.png", ["all/a.jpg", "all/a.jpg.png", "all/b.jpg", "all/b.jpg.png"]),
    ("*", "labels/*", None),
    ("imgs/*", "masks/*", ["imgs/a.JPG", "masks/a.bmp", "imgs/b.webp", "masks/b.PNG"])])
def test_patterns_pair_what_is_equal_in_place_of_the_star(images, masks, files, tmp_path):
    if files is None:
        pytest.skip("a * at the root would take the masks, too")
    own(tmp_path, *files)
    source = pairs("folder", tmp_path, images=images, masks=masks)
    assert names(source) == sorted(files[::2])
    for i, (image, mask) in enumerate(sorted(zip(files[::2], files[1::2]))):
        sample = source.read(i)
        assert np.array_equal(sample["mask"], np.array(Image.open(tmp_path / mask)))
        assert np.array_equal(sample["image"].permute(1, 2, 0), np.array(Image.open(tmp_path / image)))
    assert pairs("folder", tmp_path, "val", images=images, masks=masks) is None


def test_an_image_and_a_mask_of_different_size_are_named(folder):
    write_mask(folder / "masks/train/c.png", np.zeros((10, 20)))
    with pytest.raises(UserError, match="masks/train/c.png"):
        pairs("folder", folder).read(2)


@pytest.mark.parametrize("spoil, named", [
    (lambda root: (root / "masks/train/c.png").unlink(), "images/train/c.jpg"),
    (lambda root: (root / "images/train/c.jpg").unlink(), "masks/train/c.png"),
    (lambda root: write_image(root / "images/train/new.gif"), "new.gif"),
    (lambda root: (root / "images/train/new.jfif").write_bytes(jpeg(1)), "new.jfif"),
    (lambda root: write_image(root / "images/train/c.png"), r"c\.(png|jpg).*c\.(png|jpg)"),
    (lambda root: (root / "images/train/dead.png").symlink_to("nowhere.png"), "dead.png"),
    (lambda root: ((root / "masks/train/c.png").unlink(), (root / "masks/train/c.png").symlink_to("nowhere")), "c.jpg"),
    (lambda root: (root / "images/train").rename(root / "images/Training"), "images/train")])
def test_a_folder_with_a_fault_is_refused_by_name(spoil, named, folder):
    spoil(folder)
    with pytest.raises(UserError, match=named):
        parts(folder)


@pytest.mark.parametrize("extra", ["imgs/c.png", "imgs/c.JPG", "imgs/c.jpeg"])
def test_a_picture_that_no_pattern_takes_is_refused_by_name(extra, tmp_path):
    own(tmp_path, "imgs/a.jpg", "labels/a_mask.png", "imgs/b.jpg", "labels/b_mask.png")
    write_image(tmp_path / extra)
    with pytest.raises(UserError, match=extra):
        pairs("folder", tmp_path, images="imgs/*.jpg", masks="labels/*_mask.png")


def test_hidden_files_and_folders_never_match(folder):
    before = names(pairs("folder", folder))
    for path in (".ipynb_checkpoints/a-checkpoint.png", "._a.png", "sub/.d.png"):
        write_image(folder / "images" / "train" / path)
    write_mask(folder / "masks" / "train" / "._c.png", np.zeros((4, 5)))
    assert names(pairs("folder", folder)) == before
    assert len(pictures(folder)) == 6


def test_links_are_followed(folder, tmp_path):
    for kind in ("images", "masks"):
        (folder / kind / "train").rename(tmp_path / f"{kind} elsewhere")
        (folder / kind / "train").symlink_to(tmp_path / f"{kind} elsewhere")
    (folder / "images/val/linked.jpg").symlink_to(folder / "images/val/e.jpg")
    (folder / "masks/val/linked.png").symlink_to(folder / "masks/val/e.png")
    assert len(pairs("folder", folder)) == 4
    val = pairs("folder", folder, "val")
    assert names(val)[-1] == "images/val/linked.jpg" and torch.equal(val.read(2)["mask"], val.read(0)["mask"])


def test_a_folder_that_cannot_be_read_is_refused_by_name(folder, monkeypatch):
    plain = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for find in (lambda: pairs("folder", folder), lambda: pictures(folder)):
        with pytest.raises(UserError, match="images/train/sub"):
            find()


@pytest.mark.parametrize("image, mask", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_match(image, mask, tmp_path):
    image, mask = (unicodedata.normalize(form, "grün") for form in (image, mask))
    own(tmp_path, f"imgs/{image}.jpg", f"masks/{mask}.png")
    assert image != mask
    source = pairs("folder", tmp_path, images="imgs/*", masks="masks/*")
    assert names(source) == [f"imgs/{image}.jpg"] and source.read(0)["mask"].shape == (20, 30)
    (tmp_path / "list.txt").write_text(f"{mask}\n", "utf-8")
    assert len(pairs("folder", tmp_path, images="imgs/*", masks="masks/*", train_list=tmp_path / "list.txt")) == 1


# ---------------------------------------- Lists


@pytest.mark.parametrize("text, chosen", [
    ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/c.jpg /SegmentationClassAug/c.png\n", "ac"),
    ("c\n\na", "ca"), ("JPEGImages/b.jpg\tSegmentationClassAug/b.png\r\n", "b"), ("\ufeffb\n", "b")])
def test_a_published_list_selects_and_orders_the_images(text, chosen, tmp_path):
    own(tmp_path, *[f"{kind}/{name}" for x in "abc" for kind, name in (
        ("JPEGImages", f"{x}.jpg"), ("SegmentationClassAug", f"{x}.png"))])
    (tmp_path / "trainaug.txt").write_bytes(text.encode())
    for data in ("folder", "voc"):
        source = pairs(data, tmp_path, images="JPEGImages/*.jpg", masks="SegmentationClassAug/*.png",
                       train_list=tmp_path / "trainaug.txt")
        assert names(source) == [f"JPEGImages/{x}.jpg" for x in chosen] and source.read(0)["mask"].shape[1] == 30


def test_a_published_list_of_cityscapes_selects_images_whatever_masks_it_names(tmp_path):
    cityscapes(tmp_path / "data")
    stem = "train/ulm/ulm_000001_000019"
    line = f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png"
    (tmp_path / "list.txt").write_text(line)  # no final newline
    source = pairs("cityscapes", tmp_path / "data", train_list=tmp_path / "list.txt")
    ids = np.array(Image.open(tmp_path / "data" / "gtFine" / f"{stem}_gtFine_labelIds.png"))
    assert len(source) == 1 and np.array_equal(source.read(0)["mask"], np.vectorize(SETS["cityscapes"][3])(ids))


def test_lists_may_name_files_with_spaces_and_share_one_folder(folder, tmp_path):
    (tmp_path / "train.txt").write_text("images/train/b ö.png\nsub/d", "utf-8")
    (tmp_path / "val.txt").write_text("images/train/a.jpg\nimages/val/f.png\n")  # from both parts
    train, val = parts(folder, train_list=tmp_path / "train.txt", val_list=tmp_path / "val.txt")
    assert train == ["images/train/b ö.png", "images/train/sub/d.png"]
    assert val == ["images/train/a.jpg", "images/val/f.png"]


@pytest.mark.parametrize("train, val, named", [
    ("a\nc\na\n", "e", "line 3"), ("a\nimages/train/a.jpg\n", "e", "line 2"), ("a\nc", "e\na", r"images/train/a\.jpg"),
    ("a\n\nwolf\n", "e", r"line \d.*wolf"), ("", "e", ""), ("masks/train/a.png", "e", "line 1"), (None, "e", "train.txt")])
def test_a_list_with_a_fault_is_refused_with_its_line(train, val, named, folder, tmp_path):
    for name, text in (("train", train), ("val", val)):
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError, match=named):
        parts(folder, train_list=tmp_path / "train.txt", val_list=tmp_path / "val.txt")


# ---------------------------------------- Stage 2


def test_stage_2_takes_images_where_there_is_such_a_folder_and_else_everything(folder, tmp_path):
    assert all(name.startswith("images/") for name in names(pictures(folder))) and len(pictures(folder)) == 6
    for path in ("a/1.jpg", "a/deep/2.png", "b/3.TIF", "4.bmp"):
        write_image(tmp_path / "mixed" / path)
    (tmp_path / "mixed" / "a" / "read.me").write_text("no picture")
    (tmp_path / "mixed" / "b" / "dead.jpg").symlink_to("nowhere")
    source = pictures(tmp_path / "mixed")
    assert sorted(names(source)) == ["4.bmp", "a/1.jpg", "a/deep/2.png", "b/3.TIF"]
    assert re.search(r"\ba 2\b", source.note) and re.search(r"\bb 1\b", source.note)
    assert re.search(r"\b2 other files\b", source.note)
    assert sorted(names(pictures(tmp_path / "mixed", images="a/*.jpg"))) == ["a/1.jpg"]
    with pytest.raises(UserError, match="wolf"):
        pictures(tmp_path / "mixed", images="a/*.wolf")


@pytest.mark.parametrize("find", [pictures, pairs])
def test_a_root_that_is_missing_or_not_there_is_refused(find, tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    for call in (lambda: datasets.pretraining_images(Namespace(data="folder", root=None, images=None)),
                 lambda: pictures(tmp_path / "nowhere"), lambda: pairs("folder", tmp_path)):
        with pytest.raises(UserError):
            call()


# ---------------------------------------- classes.txt


@pytest.mark.parametrize("text, classes, values", [
    ("sky\nsea\n", ["sky", "sea"], {0: 0, 1: 1, 255: 255}),
    ("sky\nignore\nopen sea\n", ["sky", "open sea"], {0: 0, 1: 255, 2: 1, 255: 255}),
    ("sky\nsea\nsky\n", ["sky", "sea"], {0: 0, 1: 1, 2: 0, 255: 255}),
    ("0 background\n255 cell", ["background", "cell"], {0: 0, 255: 1}),
    ("\n7 wall\n2 open window\n 11  ignore\n9 wall\n", ["wall", "open window"], {7: 0, 2: 1, 11: 255, 9: 0}),
    ("0 0 0 road\n255 0 10 red car\n1 2 3 ignore\n4 5 6 road", ["road", "red car"],
     {(0, 0, 0): 0, (255, 0, 10): 1, (1, 2, 3): 255, (4, 5, 6): 0})])
def test_classes_txt_says_which_values_or_colours_the_masks_use(text, classes, values, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found = datasets.classes_of(flags("folder", tmp_path))
    assert (found.names, found.values) == (classes, values) and len(set(map(tuple, found.colours))) == len(classes)
    if (0, 0, 0) in values:
        assert [tuple(colour) for colour in found.colours] == [(0, 0, 0), (255, 0, 10)]


@pytest.mark.parametrize("text", [
    "0: sky\n1: sea\n", "sky\n1 sea\n", "0 0 0 sky\n1 sea\n", "0 sky\n300 sea\n", "0 0 0 sky\n0 0 256 sea\n",
    "0 sky\n0 sea\n", "0 0 0 sky\n0 0 0 sea\n", "sky\n", "0 sky\n1 sky\n", "0 sky\n1 ignore\n", "", "-1 sky\n1 sea\n",
    "0.0 sky\n1.0 sea\n", "0,sky\n1,sea\n", None])
def test_a_classes_txt_with_a_fault_is_refused_by_name(text, tmp_path):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match="classes.txt"):
        datasets.classes_of(flags("folder", tmp_path))


# ---------------------------------------- Parts and label subsets


def test_subsets_of_one_seed_are_nested_and_a_function_of_the_names():
    ids = [f"image {i}" for i in range(200)]
    order = [ids[i] for i in datasets.ranking(datasets.Source(ids, str, None), 3)]
    backwards = [ids[::-1][i] for i in datasets.ranking(datasets.Source(ids[::-1], str, None), 3)]
    other = [ids[i] for i in datasets.ranking(datasets.Source(ids, str, None), 4)]
    assert sorted(order) == sorted(ids) and order == backwards and set(order[:50]) != set(other[:50])


@pytest.fixture
def twenty(tmp_path):
    return own(tmp_path, *[path for i in range(20) for path in (f"imgs/{i}.png", f"masks/{i}.png")])


def test_labels_and_val_fraction_draw_by_name(twenty):
    def drawn(**more):
        return parts(twenty, images="imgs/*.png", masks="masks/*.png", **more)

    chosen = [set(drawn(labels=n, seed=3)[0]) for n in (1, 5, 12, 20)]
    assert [len(subset) for subset in chosen] == [1, 5, 12, 20] and chosen[0] < chosen[1] < chosen[2] < chosen[3]
    assert set(drawn(labels=12, seed=4)[0]) != chosen[2]
    train, val = drawn(val_fraction=0.25)
    assert (len(train), len(val)) == (15, 5) and set(train) | set(val) == chosen[3]
    assert drawn(val_fraction=0.25, seed=9) == [train, val]
    fewer = drawn(val_fraction=0.25, labels=4, seed=9)
    assert fewer[1] == val and len(fewer[0]) == 4 and set(fewer[0]) < set(train)
    for wrong in (dict(labels=21), dict(val_fraction=0.01), dict(val_fraction=0.99), dict(val_fraction=0.25, labels=16)):
        with pytest.raises(UserError):
            drawn(**wrong)


def test_images_are_not_held_out_where_there_are_validation_images(folder):
    with pytest.raises(UserError):
        parts(folder, val_fraction=0.5)


# ---------------------------------------- The survey of own masks


def cells(root, classes, values=(0, 255), count=3):
    """Masks of two values; one pixel in four has the second."""
    for i in range(count):
        write_image(root / "images" / "train" / f"{i}.png", 40, 56, seed=i)
        mask = np.full((40, 56), values[0])
        mask[:20, :28] = values[1]
        write_mask(root / "masks" / "train" / f"{i}.png", mask)
    (root / "classes.txt").write_text(classes)
    return root


def survey(root, crop_size=32):
    classes = datasets.classes_of(flags("folder", root))
    return datasets.survey(pairs("folder", root), classes, crop_size)


def shares(root):
    """{class: percent of the pixels}."""
    return {words[0]: float(words[1].strip("%")) for words in map(str.split, survey(root).splitlines())}


def test_a_survey_has_the_share_of_each_class_and_of_ignored_pixels(tmp_path):
    cells(tmp_path, "0 background\n255 cell\n7 nucleus\n9 ignore\n")
    write_mask(tmp_path / "masks" / "train" / "0.png", np.full((40, 56), 9))
    assert shares(tmp_path) == pytest.approx({"background": 50, "cell": 100 / 6, "nucleus": 0, "ignored": 100 / 3}, abs=0.006)


@pytest.mark.parametrize("classes, named", [
    ("0 background\n3 cell\n", r"masks/train/\d.png.*\b255\b"), ("background\ncell\n", "classes.txt"),
    ("0 ignore\n255 cell\n1 nucleus\n", "classes.txt")])
def test_unlisted_values_and_fewer_than_two_classes_are_refused(classes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        survey(cells(tmp_path, classes))


def test_palettes_of_which_each_file_has_its_own_are_refused_and_read_as_colours(tmp_path):
    cells(tmp_path, "sky\nsea\nsand\n", count=2)
    for i, second in enumerate([(0, 0, 200), (0, 200, 0)]):  # value 0 or 1, by what else is in the file
        colours = np.full((40, 56, 3), (200, 0, 0), np.uint8)
        colours[:10] = second
        Image.fromarray(colours).quantize().save(tmp_path / "masks" / "train" / f"{i}.png")
    with pytest.raises(UserError, match=r"masks/train/\d.png"):
        survey(tmp_path)
    (tmp_path / "classes.txt").write_text("200 0 0 sky\n0 0 200 sea\n0 200 0 sand\n")
    assert shares(tmp_path) == {"sky": 75, "sea": 12.5, "sand": 12.5, "ignored": 0}
    assert [pairs("folder", tmp_path).read(i)["mask"][:, 0].unique().tolist() for i in (0, 1)] == [[0, 1], [0, 2]]


def test_crops_larger_than_all_pictures_are_said_with_the_size_to_pass(tmp_path):
    cells(tmp_path, "0 background\n255 cell\n")
    assert re.search(r"--crop-size 56\b", survey(tmp_path, 64)) and "--crop-size" not in survey(tmp_path, 56)
