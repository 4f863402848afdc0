"""labelled.py: pairs by patterns and by lists, classes.txt, subsets, the look at the masks."""
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import flags, jpeg, names, pairs, pixels, touch, write_image, write_mask, write_pairs
from PIL import Image

import labelled
from common import UserError


def parts(root, **more):
    """Names of the training and the validation images."""
    given = flags("folder", root, **more)
    return [names(source) for source in labelled.training_and_validation(given, labelled.classes_of(given))]


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
    write_pairs(tmp_path, *files)
    source = pairs("folder", tmp_path, images=images, masks=masks)
    assert names(source) == files[::2]
    assert pairs("folder", tmp_path, "val", images=images, masks=masks) is None
    for i in range(2):
        sample = source.read(i)
        assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(tmp_path / files[2 * i]))
        assert np.array_equal(sample["mask"], pixels(tmp_path / files[2 * i + 1]))
    stem = str(Path(files[0]).with_suffix(""))
    write_image(tmp_path / f"{stem}.JPEG")  # a picture that no pattern takes, or a second one
    if images.endswith("*"):
        with pytest.raises(UserError, match=f"{stem}.JPEG"):
            pairs("folder", tmp_path, images=images, masks=masks)
    else:
        touch(tmp_path, *[f"{stem}.{i}.HEIC" for i in range(36)])
        note = pairs("folder", tmp_path, images=images, masks=masks).note
        assert re.search(rf"\b{37 + (images[0] == '*')}\b.*{re.escape(stem)}", note)  # classes.txt too


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


LISTED = [labelled.Pair(star, f"JPEGImages/{place}{star}.jpg", f"Labels/{place}{star}.png") for star, place in
          (("a/1", ""), ("a/2", ""), ("b/1", ""), ("b ö/3", ""), ("x", "train/"), ("x", "val/"))]
@pytest.mark.parametrize("text, chosen", [
    ("JPEGImages/a/1.jpg", [0]), ("./JPEGImages/a/1.jpg Labels/a/1.png", [0]), ("/JPEGImages/b/1.jpg", [2]),
    ("a/2", [1]), ("b ö/3 b ö/3", [3]), ("C:\\x y\\JPEGImages\\a\\1.jpg", [0]), ("b ö/3\n\na/2\n", [3, 1]),
    (r".\JPEGImages\b ö\3.jpg", [3]), ("/SegNet/set/JPEGImages/a/2.jpg /SegNet/set/Labels/a/2.png", [1]),
    ("\ufeffJPEGImages/b ö/3.jpg\tLabels/b ö/3.png\r\na/1\r\n", [3, 0]),
    ("JPEGImages/b o\u0308/3.jpg", [3]), ("b o\u0308/3", [3]), ("x\nJPEGImages/val/x.jpg", [4, 5])])
def test_a_line_names_an_image_by_its_path_below_any_folders_or_by_its_stars(text, chosen, tmp_path):
    (path := tmp_path / "list.txt").write_bytes(text.encode())
    assert labelled.select(path, tmp_path, LISTED[4:5], LISTED) == [LISTED[i] for i in chosen]


@pytest.mark.parametrize("text, line", [
    ("1", 1), ("1.jpg", 1), ("2", 1), ("3.jpg", 1), ("b/1.jpg", 1), ("a/2\nc/1", 2), ("a/2\n# a/1", 2),
    ("JPEGImages/c/1.jpg", 1), ("Labels/a/1.png", 1), ("a/1\na/2\na/1\n", 3), ("a/1\nJPEGImages/a/1.jpg", 2),
    ("\n \n", ""), ("a/1\na/2 a/1", 2), ("a/1,Labels/a/1.png", 1), ("a/1 1", 1),
    ("a/1\na/2".encode("utf-16"), 1), ("a/1".encode("utf-16-le"), 1), ("a/1".encode("utf-16-be"), 1)])
def test_a_line_that_names_no_image_or_one_again_is_refused_and_so_is_an_empty_list(text, line, tmp_path):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"list.txt\D*{line}"):
        labelled.select(tmp_path / "list.txt", tmp_path, [], LISTED)


@pytest.mark.parametrize("images, masks, files, taken, refused", [  # of PaddleSeg, VOC, KITTI, CamVid, others
    ("images/*.jpg", "labels/*.png", "images/x.jpg|labels/x.png|images/y.jpg|labels/y.png|v2/images/x.jpg",
     "images/x.jpg labels/x.png|/images/x.jpg ROOT/labels/x.png|ROOT/images/x.jpg",
     "images/x.jpg labels_v2/x.png|labels/x.png images/x.jpg|ROOT/v2/images/x.jpg|v2/images/x.jpg"),
    ("JPEGImages/*.jpg", "SegmentationClass/*.png", "JPEGImages/0.jpg|SegmentationClass/0.png",
     "/JPEGImages/0.jpg /SegmentationClass/0.png|0", "/JPEGImages/0.jpg /SegmentationClassAug/0.png|0 1"),
    ("image_2/um_*.png", "gt/um_road_*.png", "image_2/um_00.png|gt/um_road_00.png|gt/um_lane_00.png",
     "training/image_2/um_00.png training/gt/um_road_00.png|00", "image_2/um_00.png gt/um_lane_00.png"),
    ("train/*.png", "trainannot/*.png", "train/a.png|trainannot/a.png|train/b.png|trainannot/b.png",
     "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png|../train/a.png a|train/a.png",
     "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/b.png|train/a.png testannot/a.png"),
    ("images/*.png", "masks/*.png", "images/scan 1.png|masks/scan 1.png|images/scan.png|masks/scan.png",
     "scan 1|images/scan 1.png masks/scan 1.png|scan 1 scan 1|/a b/images/scan 1.png\tmasks/scan 1.png",
     "scan 9|images/scan 9.png|scan 1 9|images/scan.png masks/scan 1.png|images/scan 1.png masks/scan.png"),
    ("*.png", "gt/*.png", "a.png|gt/a.png|b.png|gt/b.png|gt_v2/a.png", "a.png gt/a.png|/x/a.png gt/a.png|a",
     "a.png gt_v2/a.png|a.png gt_v2/b.png|a.png b.png|a.png gt/b.png|/x/a.png /y/gt_v2/b.png")])
def test_a_second_name_is_that_of_the_mask_or_refused(images, masks, files, taken, refused, tmp_path):
    files, path = files.split("|"), tmp_path / "list.txt"
    touch(tmp_path, *files)
    found, _ = labelled.find_pairs(tmp_path, images, masks, "")
    for line in taken.replace("ROOT", str(tmp_path)).split("|"):
        path.write_text(line)
        assert [pair[1:] for pair in labelled.select(path, tmp_path, [], found)] == [(files[0], files[1])]
    for line in refused.replace("ROOT", str(tmp_path)).split("|"):
        path.write_text(line)
        with pytest.raises(UserError, match="list.txt, line 1"):
            labelled.select(path, tmp_path, [], found)


def test_a_list_of_validation_images_leaves_the_others_to_train_and_none_is_in_both_lists(folder, tmp_path):
    lists = {kind: tmp_path / f"{kind}.txt" for kind in ("train_list", "val_list")}
    lists["val_list"].write_text("images/train/a.jpg\ne\n")
    train, val = parts(folder, val_list=lists["val_list"])
    assert val == ["images/train/a.jpg", "images/val/e.jpg"]
    assert sorted(train) == ["images/train/b ö.png", "images/train/c.jpg", "images/train/sub/d.png"]
    lists["train_list"].write_text("a\nc")
    with pytest.raises(UserError, match=r"images/train/a\.jpg"):
        parts(folder, **lists)


@pytest.mark.parametrize("text, classes, values", [
    ("sky\nsea\n", ["sky", "sea"], {0: 0, 1: 1, 255: 255}),
    ("sky\nignore\nopen sea\n", ["sky", "open sea"], {0: 0, 1: 255, 2: 1, 255: 255}),
    ("sky\nsea\nsky\n", ["sky", "sea"], {0: 0, 1: 1, 2: 0, 255: 255}),
    ("0\tbackground\n255\tcell l2", ["background", "cell l2"], {0: 0, 255: 1}),
    ("7 wall\n2 open window\n 11  ignore\n9 wall\n", ["wall", "open window"], {7: 0, 2: 1, 11: 255, 9: 0}),
    ("\ufeffForêt\r\n天空\r\nsky/cloud\r\ntree (dense)\r\nman-made\r\n\r\n",
     ["Forêt", "天空", "sky/cloud", "tree (dense)", "man-made"], {255: 255, 0: 0, 1: 1, 2: 2, 3: 3, 4: 4}),
    ("7 0 0 0 road\n9 255 0 10 red car\n0 0 0 0 Ignore", ["road", "red car"], {7: 0, 9: 1, 0: 255}),
    ("0 0 0 road\n255 0 10 red car\n1 2 3 ignore\n4 5 6 road", ["road", "red car"],
     {(0, 0, 0): 0, (255, 0, 10): 1, (1, 2, 3): 255, (4, 5, 6): 0})])
def test_classes_txt_says_which_values_or_colours_the_masks_use(text, classes, values, tmp_path):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    found = labelled.classes_of(flags("folder", tmp_path))
    assert (found.names, found.values) == (classes, values)
    assert len(set(map(tuple, found.colours))) == len(classes)
    assert "0 0 0 road" not in text or list(map(tuple, found.colours)) == [(0, 0, 0), (255, 0, 10)]


LINES = (  # of class N, in other forms
    "N: sky~sky: N~-N sky~N.0 sky~N,sky~sky:N,0,0~sky = N~sky N~N sky 0 0 0~0 N sky~N = 'sky'~  - sky~N. sky~"
    "* sky~<item>sky</item>~sky (N,0,0)~sky #00000N~sky [N]~sky = N,~sky 0x0N~sky;N~sky|N~sky\tN~sky\0~'sky'~"
    "sky\tblue~sky\u200b~1 1 25N sky~30N sky~0 sky~0 0 0 sky~5 0 0 N sky~\n \nsky").split("~")
@pytest.mark.parametrize("text", [
    *[f"{line.replace('N', '6')}\n{line.replace('N', '7').replace('sky', 'sea')}\n" for line in LINES],
    "sky\n1 sea\n", "0 0 0 sky\n1 sea\n", "sky\n", "0 sky\n1 sky\n", "0 sky\n1 ignore\n", "", None,
    "sky\n\nsea\n", "\nsky\nsea\n", "id,name\n0,sky\n", "[names]\nsky\nsea\n", '["sky", "sea"]',
    '{\n"sky",\n"sea"\n}\n', "names:\n  - sky\n", "names:\n  sky\n  sea\n", "# names\nsky\n",
    "__ignore__\nsky\nsea\n", "{\\rtf1\\ansi\n\\f0 sky\\\nsea}\n", "forêt\nmer\n".encode("latin-1"),
    *[f"{n}sky\n{n}sea".encode(f"utf-16{end}") for n in ("", "0 ", "9 0 0 ") for end in ("", "-le", "-be")]])
def test_a_classes_txt_with_a_fault_or_of_another_form_is_refused_by_name(text, tmp_path):
    if text is not None:
        (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((UserError, OSError), match="classes.txt") as caught:
        labelled.classes_of(flags("folder", tmp_path))
    assert "\n" not in str(caught.value)


def test_labels_are_nested_and_the_validation_images_the_same_for_all_seeds(tmp_path, folder):
    write_pairs(tmp_path, *[path for i in range(20) for path in (f"imgs/{i}.png", f"masks/{i}.png")])

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
    classes = labelled.classes_of(given)
    return labelled.survey(labelled.labelled(given, classes), classes)


def test_a_survey_has_the_share_of_each_class_and_refuses_masks_of_fewer_than_two(tmp_path):
    for classes in ("background\ncell\n", "0 ignore\n255 cell\n1 nucleus\n"):
        with pytest.raises(UserError, match="classes.txt"):
            survey(cells(tmp_path, classes))
    cells(tmp_path, "0 background\n255 cell\n7 nucleus\n9 ignore\n")
    write_mask(tmp_path / "masks" / "train" / "0.png", np.full((40, 56), 9))
    assert [line.split() for line in survey(tmp_path).splitlines()[1:]] == [
        ["background", "50.00%"], ["cell", "16.67%"], ["nucleus", "0.00%"], ["ignored", "33.33%"]]


def test_a_survey_remarks_on_pictures_that_exif_turns(tmp_path):
    cells(tmp_path, "0 background\n255 cell\n", ("train", "val"))
    assert len(survey(tmp_path).splitlines()) == 1 + 2 + 1
    for name, tag in (("train/0", 3), ("train/1", 1), ("val/2", 2)):
        exif, path = Image.Exif(), tmp_path / "images" / f"{name}.png"
        exif[0x0112] = tag
        Image.fromarray(pixels(path)).save(path, exif=exif)
    assert survey(tmp_path).splitlines()[1 + 3].startswith("2 ")


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
    assert [line.split()[1] for line in survey(tmp_path).splitlines()[1:]] == ["75.00%", "25.00%", "0.00%"]
