"""shapes.py: the same pictures everywhere, and how much each cue tells."""

import hashlib

import numpy as np
import pytest

import datasets
import shapes


def test_unlabelled_pictures_carry_no_label():
    assert set(datasets.Shapes("unlabelled", 1).read(0)) == {"image"}
    assert set(datasets.Shapes("encoder_train", 1).read(0)) == {"image", "label"} and set(
        datasets.Shapes("val", 1).read(0)) == {"image", "mask"}


def test_a_shape_picture_is_the_same_on_every_machine():
    digest = hashlib.sha256(b"".join(array.tobytes() for part in shapes.PARTS for i in range(3)
                                     for array in shapes.draw(part, i)[:2]))
    assert digest.hexdigest() == DIGEST  # drawn with NumPy 1.26 and 2.x; no sine, no matrix product


DIGEST = "a18a0df344cee1574a7b84b2269a445115f20e693ab3dbed678a2bc5209df079"


def test_the_parts_of_shapes_never_overlap():
    pictures = {
        hashlib.sha256(shapes.draw(part, i)[0].tobytes()).digest()
        for part in shapes.PARTS
        for i in range(40)
    }
    assert len(pictures) == 40 * len(shapes.PARTS)


def test_a_scene_has_objects_and_an_encoder_picture_one_class():
    for i in range(20):
        image, mask, label = shapes.draw("train", i)
        assert (image.shape == (64, 64, 3) and mask.shape == (64, 64) and mask.max() <= 6 and 0 <
                (mask > 0).mean() < 0.9 and label == -1)
        _, mask, label = shapes.draw("encoder_train", i)
        assert set(np.unique(mask)) <= {0, label + 1} and (mask > 0).any()


def test_each_cue_is_as_reliable_as_the_header_says(monkeypatch):
    seen = {}

    def record(name, cue):
        draw = getattr(shapes, name)

        def recorded(rng, *arguments, **named):
            seen[name] = named.get(cue, arguments[0] if arguments else None)  # the last call is the object's
            return draw(rng, *arguments, **named)

        monkeypatch.setattr(shapes, name, recorded)

    record("_outline", "kind")
    record("_texture", "kind")
    record("_colour", "hue")
    count, outline, texture, hue = 2000, 0, 0, 0
    for i in range(count):
        _, _, label = shapes.draw("encoder_train", i)
        outline += seen["_outline"] == label
        texture += seen["_texture"] == label
        hue += round(seen["_colour"] * 6) % 6 == label
    # 2000 draws: the standard error is at most 0.011
    assert outline / count == pytest.approx(0.80 + 0.20 / 6, abs=0.03)
    assert texture / count == pytest.approx(0.90 + 0.10 / 6, abs=0.03)
    assert hue / count == pytest.approx(0.59, abs=0.04)  # |noise| < 1/12, standard deviation 0.1
