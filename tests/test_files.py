"""files.py: patterns, lists and .tar files; pictures pixel for pixel are in test_datasets.py."""
import ntpath
import os
import tarfile

import numpy as np
import pytest

import files
from common import UserError
from conftest import jpeg, write_image, write_tar


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def pairs(root, images, masks):
    return {(pair.image, pair.mask) for pair in files.find_pairs(str(root), images, masks)[0]}


@pytest.mark.parametrize("images, masks, paths", [  # image, mask, in turn
    ("Train/*/images_png/*.png", "Train/*/masks_png/*.png",  # LoveDA
     "Train/Rural/images_png/0.png; Train/Rural/masks_png/0.png; Train/Urban/images_png/0.png; "
     "Train/Urban/masks_png/0.png"),
    ("*.png", "*_mask.png", "benign/benign (1).png; benign/benign (1)_mask.png"),  # BUSI
    ("patient/*", "patient/*_mask.tif", "patient/1.tif; patient/1_mask.tif"),  # LGG
    ("train/*.png", "trainannot/*.png", "train/0001TP_0.png; trainannot/0001TP_0.png"),  # CamVid
    ("*/img/*_rgb.jpg", "*/gt/*_label.png", "a/b/img/1_rgb.jpg; a/b/gt/1_label.png")])
def test_what_the_stars_stand_for_makes_a_pair_and_a_mask_is_no_image(images, masks, paths, tmp_path):
    paths = paths.split("; ")
    touch(tmp_path, *paths)
    assert pairs(tmp_path, images, masks) == {*zip(paths[::2], paths[1::2])}


def test_what_systems_hide_is_never_found(tmp_path):
    touch(tmp_path, "i/a.png", "i/.a.png", "i/@eaDir/a.png", "i/__MACOSX/a.png", "i/lost+found/b.png",
          "i/.git/c.png", "m/a.png")
    assert pairs(tmp_path, "i/*.png", "m/*.png") == {("i/a.png", "m/a.png")}


def test_on_a_system_that_joins_with_backslashes_the_same_files_are_found(tmp_path, monkeypatch):
    touch(tmp_path, "images/train/s/a.png", "masks/train/s/a.png")
    wanted = {("images/train/s/a.png", "masks/train/s/a.png")}
    plain = {name: getattr(os.path, name) for name in ("isdir", "exists")}
    scandir = os.scandir
    for name, function in plain.items():
        monkeypatch.setattr(os.path, name, lambda path, f=function: f(str(path).replace("\\", "/")))
    monkeypatch.setattr(os, "scandir", lambda path: scandir(str(path).replace("\\", "/")))
    monkeypatch.setattr(os.path, "join", ntpath.join)
    monkeypatch.setattr(os, "sep", "\\")
    assert pairs(tmp_path, "images/train/*", "masks/train/*") == wanted
    assert pairs(tmp_path, *map(files.plain, (r"images\train\*.png", r".\masks\train\*.png"))) == wanted


LISTED = [files.Pair(star, f"JPEGImages/{star}.jpg", f"Labels/{star}.png") for star in
          ("a/1", "a/2", "b/1", "b/3")]


@pytest.mark.parametrize("line, chosen", [
    ("JPEGImages/a/1.jpg", 0), ("./JPEGImages/a/1.jpg Labels/a/1.png", 0), ("/JPEGImages/b/1.jpg", 2),
    ("a/2", 1), ("2", 1), ("3.jpg", 3), ("b/1.jpg", 2), (r".\JPEGImages\b\3.jpg", 3),
    ("/SegNet/set/JPEGImages/a/2.jpg /SegNet/set/Labels/a/2.png", 1), ("1", None), ("1.jpg", None),
    ("c/1", None), ("JPEGImages/c/1.jpg", None)])
def test_a_line_names_an_image_by_its_path_its_stars_or_a_unique_ending(line, chosen, tmp_path):
    (tmp_path / "list.txt").write_text(line)
    if chosen is None:
        with pytest.raises(UserError, match="list.txt, line 1"):
            files.select(tmp_path / "list.txt", LISTED, [])
    else:
        assert files.select(tmp_path / "list.txt", LISTED, []) == [LISTED[chosen]]


def test_a_star_of_several_parts_is_the_parts_own_and_an_empty_list_is_said(tmp_path):
    both = [files.Pair("a", f"images/{part}/a.png", f"masks/{part}/a.png") for part in ("train", "val")]
    (tmp_path / "list.txt").write_text("a\n")
    for pair in both:
        assert files.select(tmp_path / "list.txt", both, [pair]) == [pair]
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(UserError, match="list.txt"):
        files.select(tmp_path / "list.txt", both, [])


def members_by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(entry.offset_data, entry.size) for entry in tar if entry.name.lower().endswith(".jpeg")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [["1.JPEG", "2.JPEG"], ["n/1.JPEG", "x" * 90 + "/" + "y" * 60 + ".JPEG", "z.JPEG"],
                                   ["1.JPEG", "readme.txt", "ü.JPEG"]])
def test_members_are_where_tarfile_finds_them_in_every_format(names, form, tmp_path):
    path = tmp_path / "n1.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            (tmp_path / "file").write_bytes(b"x" * (511 + i))
            tar.add(tmp_path / "file", name)
    assert list(map(tuple, files.tar_members(path).tolist())) == members_by_tarfile(path) and len(members_by_tarfile(path)) >= 2


def test_a_tar_without_pictures_is_refused_by_name(tmp_path):
    write_tar(tmp_path / "n1.tar", {"1.JPEG": jpeg(1)})
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", {"n1.tar": (tmp_path / "n1.tar").read_bytes()})
    with pytest.raises(UserError, match="ILSVRC2012_img_train.tar"):
        files.tar_members(tmp_path / "ILSVRC2012_img_train.tar")


def test_a_cache_that_cannot_be_written_is_said_before_the_listing(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    (tmp_path / "hub").write_text("no folder")
    monkeypatch.setattr(files.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(files, "list_folders", lambda *_: pytest.fail("listed"))
    with pytest.raises(OSError, match="hub"):
        files.list_pictures(str(tmp_path), ["*"])


def test_a_list_is_made_by_the_first_process_anew_and_mapped_by_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(files.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    touch(tmp_path, "d/x/1.png", "d/y/2.png")
    first = np.load(files.list_pictures(str(tmp_path / "d"), ["*"])[0])
    assert first["path"].tolist() == [b"x/1.png", b"y/2.png"] and first["label"].tolist() == [0, 1]
    touch(tmp_path, "d/y/3.png")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(np.load(files.list_pictures(str(tmp_path / "d"), ["*"])[0])) == 2
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert len(np.load(files.list_pictures(str(tmp_path / "d"), ["*"])[0])) == 3
