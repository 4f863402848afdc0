"""files.py: hidden names, lists, .tar files, the index of pictures; patterns are in test_datasets.py."""
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


def test_what_systems_hide_is_never_found(tmp_path):
    touch(tmp_path, "i/a.png", "i/.a.png", "i/@eaDir/a.png", "i/__MACOSX/a.png", "i/lost+found/b.png",
          "i/.git/c.png", "m/a.png", "m/._d.png")
    assert pairs(tmp_path, "i/*.png", "m/*.png") == {("i/a.png", "m/a.png")}


def test_a_system_that_joins_with_backslashes_finds_the_same_files(tmp_path, monkeypatch):
    touch(tmp_path, "images/s/a.png", "masks/s/a.png")
    monkeypatch.setattr(os.path, "join", ntpath.join)
    monkeypatch.setattr(os, "sep", "\\")
    found = pairs(tmp_path, *map(files.plain, (r"images\*.png", r".\masks\*")))
    assert found == {("images/s/a.png", "masks/s/a.png")}


LISTED = [files.Pair(star, f"JPEGImages/{star}.jpg", f"Labels/{star}.png") for star in
          ("a/1", "a/2", "b/1", "b ö/3")]


@pytest.mark.parametrize("text, chosen", [
    ("JPEGImages/a/1.jpg", [0]), ("./JPEGImages/a/1.jpg Labels/a/1.png", [0]), ("/JPEGImages/b/1.jpg", [2]),
    ("a/2", [1]), ("2", [1]), ("3.jpg", [3]), ("b/1.jpg", [2]), (r".\JPEGImages\b ö\3.jpg", [3]),
    ("/SegNet/set/JPEGImages/a/2.jpg /SegNet/set/Labels/a/2.png", [1]), ("b ö/3\n\na/2\n", [3, 1]),
    ("\ufeffJPEGImages/b ö/3.jpg\tLabels/b ö/3.png\r\na/1\r\n", [3, 0]),
    ("JPEGImages/b o\u0308/3.jpg", [3]), ("b o\u0308/3", [3])])
def test_a_line_names_an_image_by_its_path_its_stars_or_a_unique_ending(text, chosen, tmp_path):
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert files.select(tmp_path / "list.txt", LISTED, []) == [LISTED[i] for i in chosen]


@pytest.mark.parametrize("text, line", [
    ("1", 1), ("1.jpg", 1), ("a/2\nc/1", 2), ("JPEGImages/c/1.jpg", 1), ("Labels/a/1.png", 1),
    ("a/1\na/2\na/1\n", 3), ("a/1\nJPEGImages/a/1.jpg", 2), ("\n \n", "")])
def test_a_line_that_names_no_image_or_one_again_is_refused_and_so_is_an_empty_list(text, line, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=rf"list.txt\D*{line}"):
        files.select(tmp_path / "list.txt", LISTED, [])


def test_a_star_of_several_parts_is_the_parts_own(tmp_path):
    both = [files.Pair("a", f"images/{part}/a.png", f"masks/{part}/a.png") for part in ("train", "val")]
    (tmp_path / "list.txt").write_text("a\n")
    for pair in both:
        assert files.select(tmp_path / "list.txt", both, [pair]) == [pair]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", [["1.JPEG", "2.JPEG"], ["1.JPEG", "readme.txt", "ü.JPEG"],
                                   ["n/1.JPEG", "x" * 90 + "/" + "y" * 60 + ".JPEG", "z.JPEG"]])
def test_members_are_where_tarfile_finds_them_in_every_format(names, form, tmp_path):
    with tarfile.open(tmp_path / "n1.tar", "w", format=form) as tar:
        for i, name in enumerate(names):
            (tmp_path / "file").write_bytes(b"x" * (511 + i))
            tar.add(tmp_path / "file", name)
    with tarfile.open(tmp_path / "n1.tar") as tar:
        wanted = [[entry.offset_data, entry.size] for entry in tar if entry.name.endswith(".JPEG")]
    assert files.tar_members(tmp_path / "n1.tar").tolist() == wanted and len(wanted) >= 2


@pytest.mark.parametrize("ending, spoil", [
    ("JPEG", lambda whole: whole[:700]), ("JPEG", lambda whole: whole[:2560]), ("JPEG", lambda whole: b""),
    ("JPEG", lambda whole: whole[:1536] + b"x" * 600), ("tar", lambda whole: whole)])
def test_a_tar_that_is_not_whole_or_holds_no_pictures_is_refused_by_name(ending, spoil, tmp_path):
    content = jpeg(1)[:900]  # a member of three blocks of 512
    write_tar(tmp_path / "n3.tar", {f"1.{ending}": content, f"2.{ending}": content})
    (tmp_path / "n3.tar").write_bytes(spoil((tmp_path / "n3.tar").read_bytes()))
    with pytest.raises(UserError, match="n3.tar"):
        files.tar_members(tmp_path / "n3.tar")


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
    for local_rank, count in (("1", 2), ("0", 3)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert len(np.load(files.list_pictures(str(tmp_path / "d"), ["*"])[0])) == count
