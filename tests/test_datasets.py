"""datasets.py: every layout on disk as it is distributed, tiny but exact, checked pixel for pixel."""
import io
import os
import pickle
import re
import shutil
import unicodedata
from argparse import Namespace
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


def pascal_context(root):
    voc(root, 2010, "SegmentationClassContext", "SegmentationContext", range(60))


# By hand: what each value of a mask means, from the sets' own descriptions
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
             26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
CONTEXT_MASK = "VOCdevkit/VOC2010/SegmentationClassContext/2007_000032.png"
SETS = {  # its files, places of --root, a mask, what its values mean, numbers of classes, pairs and pictures
    "cityscapes": (cityscapes, [""], "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
                   lambda v: TRAIN_IDS.get(v, 255), 19, 4, 2, 4),
    "ade20k": (ade20k, ["", "ADEChallengeData2016"],
               "ADEChallengeData2016/annotations/training/ADE_train_00000000.png",
               lambda v: v - 1 if v else 255, 150, 3, 2, 3),
    "voc": (voc, ["", "VOCdevkit", "VOCdevkit/VOC2012"],
            "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png", lambda v: v, 21, 2, 1, 4),
    "pascal_context": (pascal_context, ["", "VOCdevkit", "VOCdevkit/VOC2010"], CONTEXT_MASK,
                       lambda v: v - 1 if v else 255, 59, 2, 1, 4),
    "pascal_context_60": (pascal_context, [""], CONTEXT_MASK, lambda v: v, 60, 2, 1, 4)}
@pytest.mark.parametrize("data, place", [(data, place) for data, row in SETS.items() for place in row[1]])
def test_a_named_set_is_read_pixel_for_pixel_wherever_root_points(data, place, tmp_path):
    make, _, mask, meaning, count, train, val, pictures = SETS[data]
    make(tmp_path)
    source = pairs(data, tmp_path / place)
    unlabelled = datasets.pretraining_images(flags(data, tmp_path / place))
    assert len(set(names(unlabelled))) == len(unlabelled) == pictures and "mask" not in unlabelled.read(0)
    assert (len(source), len(pairs(data, tmp_path / place, "val"))) == (train, val)
    wanted, sample = np.vectorize(meaning)(pixels(tmp_path / mask)), source.read(0)
    assert set(np.unique(wanted)) - {255} == set(range(count))  # every class is there
    image, = (path for path in tmp_path.rglob("*") if str(path).endswith(source.name(0)))
    assert np.array_equal(sample["mask"], wanted)
    assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(image))


@pytest.mark.parametrize("data, k, name, colour", [
    ("cityscapes", 18, "bicycle", (119, 11, 32)), ("voc", 20, "tvmonitor", (0, 64, 128)),
    ("ade20k", 149, "flag", (92, 0, 255)), ("pascal_context", 58, "wood", (192, 192, 64)),
    ("pascal_context", 0, "aeroplane", (128, 0, 0)), ("pascal_context_60", 0, "background", (0, 0, 0))])
def test_classes_and_colours_are_the_sets_own(data, k, name, colour):
    classes, count = datasets.classes_of(flags(data, "nowhere")), SETS[data][4]
    assert len(set(classes.names)) == len(classes.colours) == len(classes.names) == count
    assert (classes.names[k], tuple(classes.colours[k])) == (name, colour)


def test_train_ids_of_cityscapes_are_classes_as_they_are_and_coarse_is_more_pictures(tmp_path):
    cityscapes(tmp_path, "labelTrainIds", (*range(19), 255))
    source = pairs("cityscapes", tmp_path, masks="gtFine/{part}/*_gtFine_labelTrainIds.png")
    mask = tmp_path / SETS["cityscapes"][2].replace("labelIds", "labelTrainIds")
    assert len(source) == 4 and np.array_equal(source.read(0)["mask"], pixels(mask))
    assert len(datasets.pretraining_images(flags("cityscapes_coarse", tmp_path))) == 5


@pytest.mark.parametrize("data, spoil, named", [
    ("cityscapes", lambda root: (root / "gtFine").rename(root / "gt"), "gtFine"),
    ("cityscapes", lambda root: (root / SETS["cityscapes"][2]).unlink(), "aachen_000000_000019_left"),
    ("voc", lambda root: next(root.rglob("Segmentation/train.txt")).unlink(), "train.txt"),
    ("voc", lambda root: voc(root, 2007), "VOC2007.*VOC2012"),
    ("pascal_context", lambda root: (root / "VOCdevkit/VOC2010").rename(root / "VOCdevkit/VOC2012"),
     "SegmentationClassContext")])
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
    first = names(datasets.pretraining_images(flags("imagenet21k", tars)))
    assert names(datasets.pretraining_images(flags("imagenet21k", tars))) == first and len(opened) == 2
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


def test_a_loader_worker_that_is_not_forked_gets_the_path_of_the_list_alone(tars):
    write_tar(tars / "n00000003.tar", {f"{i}.JPEG": b"x" for i in range(500)})
    source = datasets.pretraining_images(flags("imagenet21k", tars))
    sent = pickle.dumps(source)
    assert len(source) == 505 and len(sent) < 2000 and names(pickle.loads(sent)) == names(source)


@pytest.mark.parametrize("place", ["", "train"])
def test_class_folders_are_labelled_by_their_names(place, tmp_path):
    for path in ("dog/1.jpg", "cat/1.png", "cat/deep/2.JPG", "dog/.hidden.jpg", "emu/3.webp"):
        write_image(tmp_path / place / path)
    (tmp_path / place / "cat" / "notes.txt").write_text("no picture")
    source, classes = datasets.classification_images(flags("folder", tmp_path))
    labels = {source.name(i): source.read(i)["label"] for i in range(len(source))}
    assert labels == {"cat/1.png": 0, "cat/deep/2.JPG": 0, "dog/1.jpg": 1, "emu/3.webp": 2}
    assert classes == ["cat", "dog", "emu"]


@pytest.mark.parametrize("paths", [["Train/cat/1.png", "Val/cat/1.png"], ["cat/1.png", "cat/2.png"],
                                   ["1.png", "2.png"], ["cat/1.png", "test/1.png"], ["cat/1.png", "1.png"]])
def test_splits_and_loose_pictures_are_not_taken_for_classes(paths, tmp_path):
    for path in paths:
        write_image(tmp_path / path)
    with pytest.raises(UserError, match=tmp_path.name):
        datasets.classification_images(flags("folder", tmp_path))


@pytest.mark.parametrize("folders, fine", [
    ("imagenet21k_train imagenet21k_val imagenet21k_small_classes", False), ("my-Train my-test", False),
    ("bullet_train trainer vale", True), ("bullet\\ train car".replace("\\ ", "~"), True)])
def test_two_classes_named_after_parts_are_refused_and_one_is_a_bullet_train(folders, fine, tmp_path):
    for folder in folders.split():
        write_image(tmp_path / folder.replace("~", " ") / "n1" / "0.jpg")
    if fine:
        assert len(datasets.classification_images(flags("imagenet21k", tmp_path))[1]) == len(folders.split())
    else:
        with pytest.raises(UserError, match=folders.split()[0]):
            datasets.classification_images(flags("imagenet21k", tmp_path))


def test_the_note_names_the_folders_that_hold_the_pictures_and_their_files(tmp_path):
    for path in ("train/images/0.png", "train/masks/0.png", "p/1.tif", "p/1_mask.tif"):
        write_image(tmp_path / path)
    note = pictures(tmp_path).note
    assert all(part in note for part in ("train/images 1", "train/masks 1", "p 2", "1_mask.tif"))


def test_a_list_of_validation_images_alone_leaves_the_others_to_train(folder, tmp_path):
    (tmp_path / "val.txt").write_text("images/train/a.jpg\ne\n")
    train, val = parts(folder, val_list=tmp_path / "val.txt")
    assert val == ["images/train/a.jpg", "images/val/e.jpg"]
    assert sorted(train) == ["images/train/b ö.png", "images/train/c.jpg", "images/train/sub/d.png"]


def own(root, *paths):
    """Images and masks, in turn, at these paths, each pair of a size of its own."""
    for i, (image, mask) in enumerate(zip(paths[::2], paths[1::2])):
        write_image(root / image, 20 + i, 30, seed=i)
        write_mask(root / mask, every_value(range(2), 20 + i, 30))
    (root / "classes.txt").write_text("sky\nsea\n")
    return root


@pytest.mark.parametrize("images, masks, files", [
    ("imgs/*.jpg", "labels/*_mask.png", "imgs/a.jpg labels/a_mask.png imgs/b.jpg labels/b_mask.png"),
    ("imgs/*.jpg", "labels/*_mask.png", "imgs/1/a.jpg labels/1/a_mask.png imgs/2/a.jpg labels/2/a_mask.png"),
    ("*/x.jpg", "*/label.png", "1/x.jpg 1/label.png 2/x.jpg 2/label.png"),
    ("images/{part}/*", "masks/{part}/*",
     "images/train/a.jpg masks/train/a.png images/train/s/ö.png masks/train/s/ö.png"),
    ("all/*.jpg", "all/*.jpg.png", "all/a.jpg all/a.jpg.png all/b.jpg all/b.jpg.png"),
    ("imgs/*", "masks/*", "imgs/a.JPG masks/a.bmp imgs/b.webp masks/b.PNG")])
def test_patterns_pair_what_is_equal_in_place_of_the_star(images, masks, files, tmp_path):
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
        source = pairs("folder", tmp_path, images=images, masks=masks)
        assert len(source) == 2 and extra in source.note


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
    (lambda root: (root / "images/train").rename(root / "images/Training"), "images/train")])
def test_a_folder_with_a_fault_is_refused_by_name(spoil, named, folder):
    spoil(folder)
    with pytest.raises((UserError, OSError), match=named):
        parts(folder)
        pairs("folder", folder).read(2)


def test_links_are_followed_and_what_is_hidden_never_matches(folder, tmp_path):
    before = names(pairs("folder", folder))
    for path in (".ipynb_checkpoints/a-checkpoint.png", "._a.png", "sub/.d.png"):
        write_image(folder / "images" / "train" / path)
    write_mask(folder / "masks" / "train" / "._c.png", np.zeros((4, 5)))
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        (folder / kind / "train").rename(tmp_path / f"{kind} elsewhere")
        (folder / kind / "train").symlink_to(tmp_path / f"{kind} elsewhere")
        (folder / kind / "val" / f"link.{ending}").symlink_to(folder / kind / "val" / f"e.{ending}")
    val = pairs("folder", folder, "val")
    assert names(pairs("folder", folder)) == before and len(pictures(folder)) == 7
    assert names(val)[2] == "images/val/link.jpg" and torch.equal(val.read(2)["mask"], val.read(0)["mask"])


@pytest.mark.parametrize("find", [pictures, parts])
def test_a_folder_that_cannot_be_read_is_refused_by_name(find, folder, monkeypatch):
    def scandir(path, plain=os.scandir):
        if str(path).rstrip("/").endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="s/train/sub"):  # which common.run says in one line
        find(folder)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_match(forms, tmp_path):
    image, mask = (unicodedata.normalize(form, "grün") for form in forms)
    own(tmp_path, f"imgs/{image}.jpg", f"masks/{mask}.png")
    (tmp_path / "list.txt").write_text(f"imgs/{mask}.jpg\n", "utf-8")
    for list_file in (None, tmp_path / "list.txt"):
        source = pairs("folder", tmp_path, images="imgs/*", masks="masks/*", train_list=list_file)
        assert names(source) == [f"imgs/{image}.jpg"] and source.read(0)["mask"].shape == (20, 30)


@pytest.mark.parametrize("data", ["folder", "voc"])
@pytest.mark.parametrize("text, chosen", [
    ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/c.jpg /SegmentationClassAug/c.png\n", "a,c"),
    ("c\n\na", "c,a"), ("\ufeffJPEGImages/b ö.jpg\tSegmentationClassAug/b ö.png\r\n", "b ö")])
def test_a_published_list_selects_and_orders_the_images(data, text, chosen, tmp_path):
    own(tmp_path, *[path for x in ("a", "b ö", "c")
                    for path in (f"JPEGImages/{x}.jpg", f"SegmentationClassAug/{x}.png")])
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = pairs(data, tmp_path, images="JPEGImages/*.jpg", masks="SegmentationClassAug/*.png",
                   train_list=tmp_path / "list.txt")
    assert names(source) == [f"JPEGImages/{x}.jpg" for x in chosen.split(",")]
    assert source.read(0)["mask"].shape == (20 + "abc".index(chosen[0]), 30)


def test_a_published_list_of_cityscapes_selects_images_whatever_masks_it_names(tmp_path):
    cityscapes(tmp_path)
    stem = "train/ulm/ulm_000001_000019"
    (tmp_path / "list.txt").write_text(
        f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png")  # no final newline
    source = pairs("cityscapes", tmp_path, train_list=tmp_path / "list.txt")
    ids = pixels(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png")
    wanted = np.vectorize(SETS["cityscapes"][3])(ids)
    assert len(source) == 1 and np.array_equal(source.read(0)["mask"], wanted)


@pytest.mark.parametrize("train, val, named", [
    ("a\nc\na\n", "e", "line 3"), ("a\nimages/train/a.jpg\n", "e", "line 2"),
    ("a\nc", "e\na", r"images/train/a\.jpg"), ("a\nc\nwolf\n", "e", "line 3.*wolf"),
    ("masks/train/a.png", "e", "line 1")])
def test_a_list_with_a_fault_is_refused_with_its_line(train, val, named, folder, tmp_path):
    for name, text in (("train", train), ("val", val)):
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError, match=named):
        parts(folder, train_list=tmp_path / "train.txt", val_list=tmp_path / "val.txt")


def test_stage_2_takes_images_where_there_is_such_a_folder_and_else_everything(folder, tmp_path):
    assert len(pictures(folder)) == 6 and all(name.startswith("images/") for name in names(pictures(folder)))
    for path in ("a/1.jpg", "a/deep/2.png", "b/3.TIF", "4.bmp"):
        write_image(tmp_path / "mixed" / path)
    (tmp_path / "mixed" / "a" / "read.me").write_text("no picture")
    source = pictures(tmp_path / "mixed")
    assert sorted(names(source)) == ["4.bmp", "a/1.jpg", "a/deep/2.png", "b/3.TIF"]
    assert all(re.search(rf"\b{shown}\b", source.note) for shown in ("a 1", "a/deep 1", "b 1", "1 other files"))
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
    ("0 0 0 road\n255 0 10 red car\n1 2 3 ignore\n4 5 6 road", ["road", "red car"],
     {(0, 0, 0): 0, (255, 0, 10): 1, (1, 2, 3): 255, (4, 5, 6): 0})])
def test_classes_txt_says_which_values_or_colours_the_masks_use(text, classes, values, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    found = datasets.classes_of(flags("folder", tmp_path))
    assert (found.names, found.values) == (classes, values)
    assert len(set(map(tuple, found.colours))) == len(classes)
    assert (0, 0, 0) not in values or list(map(tuple, found.colours)) == [(0, 0, 0), (255, 0, 10)]


@pytest.mark.parametrize("text", [
    "0: sky\n1: sea\n", "sky\n1 sea\n", "0 0 0 sky\n1 sea\n", "0 sky\n300 sea\n", "0 0 0 sky\n0 0 256 sea\n",
    "0 sky\n0 sea\n", "0 0 0 sky\n0 0 0 sea\n", "sky\n", "0 sky\n1 sky\n", "0 sky\n1 ignore\n", "",
    "-1 sky\n1 sea\n", "0.0 sky\n1.0 sea\n", "0,sky\n1,sea\n", None])
def test_a_classes_txt_with_a_fault_is_refused_by_name(text, tmp_path):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match="classes.txt"):
        datasets.classes_of(flags("folder", tmp_path))


class Numbers(datasets.Source):
    def name(self, i):
        return str(self.rows[i])


def test_the_draw_of_labels_is_a_function_of_seed_and_names_whatever_order_they_have():
    orders = [[ids[i] for i in datasets.ranking(Numbers(ids, ""), seed)]
              for ids, seed in ((range(200), 3), (range(200)[::-1], 3), (range(200), 4))]
    assert sorted(orders[0]) == [*range(200)] and orders[0] == orders[1] and orders[0] != orders[2]


def test_labels_are_nested_and_the_validation_images_the_same_for_all_seeds(tmp_path, folder):
    own(tmp_path, *[path for i in range(20) for path in (f"imgs/{i}.png", f"masks/{i}.png")])

    def drawn(**more):
        return parts(tmp_path, images="imgs/*.png", masks="masks/*.png", **more)

    chosen = [set(drawn(labels=n, seed=3)[0]) for n in (1, 5, 12, 20)]
    assert [len(subset) for subset in chosen] == [1, 5, 12, 20]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3] and set(drawn(labels=12, seed=4)[0]) != chosen[2]
    train, val = drawn(val_fraction=0.25)
    assert (len(train), len(val)) == (15, 5) and set(train) | set(val) == chosen[3]
    fewer, again = drawn(val_fraction=0.25, labels=4, seed=9)
    assert again == val and len(fewer) == 4 and set(fewer) < set(train)
    for wrong in (dict(labels=21), dict(val_fraction=0.01), dict(val_fraction=0.99)):
        with pytest.raises(UserError):
            drawn(**wrong)
    with pytest.raises(UserError):  # it has validation images
        parts(folder, val_fraction=0.5)


def cells(root, classes, count=3):
    """Masks of 0 and 255; one pixel in four is 255."""
    for i in range(count):
        write_image(root / "images" / "train" / f"{i}.png")
        write_mask(root / "masks" / "train" / f"{i}.png", np.pad(np.full((20, 28), 255), ((0, 20), (0, 28))))
    (root / "classes.txt").write_text(classes)
    return root


def survey(root, crop_size=16, data="folder", **more):
    given = flags(data, root, **more)
    classes = datasets.classes_of(given)
    return datasets.survey(datasets.labelled(given, classes), classes, crop_size)


def shares(root):
    """{class: percent of the pixels in train}."""
    return {words[0]: float(words[1].strip("%")) for words in map(str.split, survey(root).splitlines()[1:])}


def test_a_survey_has_the_share_of_each_class_and_the_size_of_crops_that_are_too_large(tmp_path):
    cells(tmp_path, "0 background\n255 cell\n7 nucleus\n9 ignore\n")
    write_mask(tmp_path / "masks" / "train" / "0.png", np.full((40, 56), 9))
    wanted = {"background": 50, "cell": 100 / 6, "nucleus": 0, "ignored": 100 / 3}
    assert shares(tmp_path) == pytest.approx(wanted, abs=0.006)
    assert re.search(r"--crop-size 56\b", survey(tmp_path, 64)) and "--crop-size" not in survey(tmp_path, 56)


@pytest.mark.parametrize("classes, named", [
    ("0 background\n3 cell\n", r"masks/train/\d.png.*\b255\b"), ("background\ncell\n", "classes.txt"),
    ("0 ignore\n255 cell\n1 nucleus\n", "classes.txt")])
def test_unlisted_values_and_fewer_than_two_classes_are_refused(classes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        survey(cells(tmp_path, classes))


@pytest.mark.parametrize("data, make, spoil, more", [  # what others' scripts make of the official masks
    ("ade20k", ade20k, lambda mask: np.where(mask == 0, 255, mask.astype(int) - 1), {}),
    ("pascal_context", pascal_context, lambda mask: np.where(mask == 0, 255, mask.astype(int) - 1), {}),
    ("cityscapes", cityscapes, lambda mask: np.vectorize(lambda v: TRAIN_IDS.get(v, 255))(mask), {}),
    ("voc", voc, lambda mask: np.where(mask == 20, 21, mask), {})])
@pytest.mark.parametrize("part", ["train", "val"])
def test_values_that_the_official_files_do_not_hold_are_refused_in_both_parts(
        data, make, spoil, more, part, tmp_path):
    make(tmp_path)
    assert len(survey(tmp_path, 16, data).splitlines()) == SETS[data][4] + 2
    source = pairs(data, tmp_path, part)
    path = Path(source.root) / source.rows[0][1]
    write_mask(path, spoil(pixels(path)))
    with pytest.raises(UserError, match=path.name):
        survey(tmp_path, 16, data)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("spoil", [lambda path: write_mask(path, np.full((40, 56), 7)),
                                   lambda path: write_mask(path, np.zeros((56, 40)))])
def test_a_wrong_value_or_size_in_one_mask_of_either_part_is_seen(part, spoil, tmp_path):
    cells(tmp_path, "0 background\n255 cell\n")
    for kind in ("images", "masks"):
        shutil.copytree(tmp_path / kind / "train", tmp_path / kind / "val")
    assert [line.split()[1:] for line in survey(tmp_path).splitlines()[1:]] == [
        ["75.00%", "75.00%"], ["25.00%", "25.00%"], ["0.00%", "0.00%"]]
    spoil(tmp_path / "masks" / part / "1.png")
    with pytest.raises(UserError, match=f"masks/{part}/1.png"):
        survey(tmp_path)


def test_a_survey_reads_500_masks_of_a_part_the_first_and_the_last_too(tmp_path, monkeypatch):
    seen, rows = [], [(f"{i}.png", f"{i}.png") for i in range(1200)]
    write_mask(tmp_path / "m.png", [[0, 1]])
    monkeypatch.setattr(datasets, "image_size", lambda path: (1, 2))
    monkeypatch.setattr(datasets.Pairs, "mask", lambda self, i, size: seen.append(i) or torch.tensor([[0, 1]]))
    monkeypatch.setattr(datasets.Image, "open", lambda path: Image.new("L", (1, 1)))
    classes = datasets.Classes(["a", "b"], [], {0: 0, 1: 1})
    datasets.survey({"train": datasets.Pairs(rows, "", str(tmp_path), classes.values)}, classes, 1)
    assert len(seen) == len(set(seen)) == 500 and {0, 1199} < set(seen) and max(np.diff(sorted(seen))) <= 3


def test_a_palette_that_changes_between_the_parts_is_refused(tmp_path):
    cells(tmp_path, "sky\nsea\n", count=1)
    for kind in ("images", "masks"):
        shutil.copytree(tmp_path / kind / "train", tmp_path / kind / "val")
    for part, red in (("train", 9), ("val", 8)):
        mask = Image.fromarray(np.arange(40 * 56, dtype=np.uint8).reshape(40, 56) % 2)
        mask.putpalette([red, 0, 0, 0, 0, 9])
        mask.save(tmp_path / "masks" / part / "0.png")
    with pytest.raises(UserError, match="masks/val/0.png"):
        survey(tmp_path)


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
    assert [pairs("folder", tmp_path).read(i)["mask"].unique().tolist() for i in (0, 1)] == [[0, 1], [0, 2]]
