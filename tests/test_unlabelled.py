"""unlabelled.py: pictures in folders and in .tar files, their list on disk, classes by folder."""
import io
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
from conftest import flags, imagenet21k, jpeg, names, pixels, touch, write_image, write_tar

import unlabelled
from common import UserError
from data import UnreadableImage


def pictures(root, data="folder", **more):
    return unlabelled.pretraining_images(flags(data, root, **more))


def test_stage_2_takes_images_where_there_is_such_a_folder_and_else_everything(folder, tmp_path):
    assert len(pictures(folder)) == 7 and all(name.startswith("images/") for name in names(pictures(folder)))
    for path in ("a/1.jpg", "a/deep/2.png", "b/3.TIF", "4.bmp"):
        write_image(tmp_path / "mixed" / path)
    source = pictures(tmp_path / "mixed")
    assert sorted(names(source)) == ["4.bmp", "a/1.jpg", "a/deep/2.png", "b/3.TIF"]
    shown = ("a 1", "1.jpg", "a/deep 1", "b 1", "3.TIF")  # where they lie
    assert all(re.search(rf"\b{text}\b", source.note) for text in shown)
    assert names(pictures(tmp_path / "mixed", images="a/*.jpg")) == ["a/1.jpg"]
    for missing in (dict(images="a/*.wolf"), dict(images="wolf/*"), dict(root=None)):
        with pytest.raises(UserError, match="wolf|--root"):
            pictures(**{"root": tmp_path / "mixed", **missing})


@pytest.mark.parametrize("images, ending", [
    ("p/*.jpg", "JPG"), ("p/*.jpg", "png"), (None, "HEIC"), ("p/*", "heic"), (None, "txt")])
def test_what_is_left_out_is_counted_and_one_is_named(images, ending, tmp_path):
    touch(tmp_path, "p/a.jpg", "p/deep/b.jpg", *[f"p/deep/{i}.{ending}" for i in range(37)], "p/.hidden")
    source = pictures(tmp_path, images=images)
    assert names(source) == ["p/a.jpg", "p/deep/b.jpg"]
    assert re.search(rf"\b37\b.* p/deep/0\.{ending}", source.note.replace(str(tmp_path), ""))


@pytest.mark.parametrize("data, place", [("folder", ""), ("imagenet21k", "train")])
def test_class_folders_are_labelled_by_their_names_also_with_the_word_of_a_split(data, place, tmp_path):
    for path in ("trainer/1.jpg", "cat/1.png", "cat/deep/2.JPG", "trainer/.a.jpg", "in21k_train/3.webp",
                 "My-Test/4.png", "bullet train/5.jpg"):
        write_image(tmp_path / place / path)
    (tmp_path / place / "cat" / "notes.txt").write_text("no picture")
    source, classes = unlabelled.classification_images(flags(data, tmp_path))
    assert {source.name(i): source.read(i)["label"] for i in range(len(source))} == {
        "My-Test/4.png": 0, "bullet train/5.jpg": 1, "cat/1.png": 2, "cat/deep/2.JPG": 2,
        "in21k_train/3.webp": 3, "trainer/1.jpg": 4}
    assert classes == ["My-Test", "bullet train", "cat", "in21k_train", "trainer"]


@pytest.mark.parametrize("paths", [
    "Train/cat/1.png Val/cat/1.png", "cat/1.png cat/2.png", "1.png 2.png", "cat/1.png test/1.png",
    "cat/1.png 1.png", "cat/1.png VALIDATION/1.png", "Masks/a/1.png cat/1.png", "00000.tar 00001.tar",
    "shard-000.tar shard-001.tar", "n01.tar cats.tar", "n01.tar", "train2017/1.png val2017/1.png"])
def test_splits_loose_pictures_and_shards_are_pictures_and_not_taken_for_classes(paths, tmp_path):
    data = "imagenet21k" if "tar" in paths else "folder"
    for path in paths.split():
        if data == "folder":
            write_image(tmp_path / path)
        else:
            write_tar(tmp_path / path, {"1.jpg": jpeg(1), "1.txt": b"a cat"})
    with pytest.raises(UserError, match=tmp_path.name):
        unlabelled.classification_images(flags(data, tmp_path))
    assert len(pictures(tmp_path, data)) == len(paths.split())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_picture_of_a_tar_of_any_format_is_what_its_bytes_are(form, tmp_path):
    source, classes = unlabelled.classification_images(flags("imagenet21k", imagenet21k(tmp_path, form)))
    assert classes == ["n00000001", "n00000002"] and len(source) == 5
    for i, content in ((0, jpeg(1)), (1, jpeg(2, "L")), (2, jpeg(3, "CMYK")), (4, jpeg(5))):
        sample = source.read(i)
        assert sample["label"] == i // 3
        assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(io.BytesIO(content), "RGB"))
    with pytest.raises(UnreadableImage, match="n00000002.tar"):
        source.read(3)


def test_tars_are_listed_once_and_again_when_they_change_or_lie_elsewhere(tmp_path, monkeypatch):
    tars, opened, plain = imagenet21k(tmp_path / "tars"), [], unlabelled.list_tars
    monkeypatch.setattr(unlabelled, "list_tars", lambda root, tars: opened.append(root) or plain(root, tars))
    first, again = (pictures(tars, "imagenet21k") for _ in range(2))
    assert len(opened) == 1 and len(set(names(first))) == 5 and names(first) == names(again)
    pictures(shutil.copytree(tars, tmp_path / "copy"), "imagenet21k")  # with equal names, sizes and times
    assert opened[1:] == [str(tmp_path / "copy")]
    os.utime(tars / "n00000002.tar", ns=(0, 1))  # its size is the same
    pictures(tars, "imagenet21k")
    write_tar(tars / "n00000002.tar", {f"{i}.JPEG": b"x" for i in range(500)})
    more = pictures(tars, "imagenet21k")
    sent = pickle.dumps(more)  # to a loader worker that is not forked: the path of the list
    assert len(opened) == 4 and len(more) == 503
    assert len(sent) < 2000 and names(pickle.loads(sent)) == names(more)
    (tars / "n00000002.tar").write_bytes(b"")
    with pytest.raises(UserError, match="n00000002.tar"):
        pictures(tars, "imagenet21k")


@pytest.mark.parametrize("ending, spoil", [
    ("JPEG", lambda whole: whole[:700]), ("JPEG", lambda whole: whole[:2560]), ("JPEG", lambda whole: b""),
    ("JPEG", lambda whole: whole[:1536] + b"x" * 600), ("tar", lambda whole: whole)])
def test_a_tar_that_is_not_whole_or_holds_no_pictures_is_refused_by_name(ending, spoil, tmp_path):
    content = jpeg(1)[:900]  # a member of three blocks of 512
    write_tar(tmp_path / "n3.tar", {f"1.{ending}": content, f"2.{ending}": content})
    (tmp_path / "n3.tar").write_bytes(spoil((tmp_path / "n3.tar").read_bytes()))
    with pytest.raises(UserError, match="n3.tar"):
        unlabelled.tar_members(tmp_path / "n3.tar")


def test_a_list_is_made_by_the_first_process_anew_and_mapped_by_the_others(tmp_path, monkeypatch):
    touch(tmp_path, "x/1.png", "y/2.png")
    first = pictures(tmp_path).rows
    assert first["path"].tolist() == [b"x/1.png", b"y/2.png"] and first["label"].tolist() == [0, 1]
    touch(tmp_path, "y/3.png")
    for local_rank, count in (("1", 2), ("0", 3)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert len(pictures(tmp_path)) == count and isinstance(pictures(tmp_path).rows, np.memmap)
