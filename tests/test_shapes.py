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


DIGEST = "7eca004311558716ebdf08c0ec80c754aa7a0088227d3479fe7053131b99eaa5"


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
    count, hue = 1000, 0
    for i in range(count):
        _, _, label = shapes.draw("encoder_train", i)
        assert seen["_outline"] == seen["_texture"] == label
        hue += round(seen["_colour"] * 6) % 6 == label
    # |noise| < 1/12: of the sum s of three uniform draws, |s - 1.5| < 0.694; 1 - (1.5 - 0.694)^3 / 3 = 0.826.
    # 1000 draws: the standard error is 0.012
    assert hue / count == pytest.approx(0.826, abs=0.04)


def test_objects_are_faint_beside_what_lies_behind_and_noise(monkeypatch):
    """An object of one colour and no texture keeps seven tenths of the background; the noise deviates by 0.065."""
    pictures = []
    monkeypatch.setattr(shapes, "_texture", lambda rng, kind, y, x: np.zeros((64, 64)))
    for colour in (0.2, 0.8):
        monkeypatch.setattr(shapes, "_colour", lambda rng, hue, colour=colour: np.full(3, colour))
        pictures.append([shapes.draw("encoder_train", i) for i in range(20)])
    changes = [np.float64(b[0][b[1] > 0]).mean() - np.float64(a[0][b[1] > 0]).mean() for a, b in zip(*pictures)]
    # 0.3 of the 0.6 between the colours; where a distractor lies behind, another 0.7 of it
    assert 0.18 * 255 - 1 <= min(changes) < 0.19 * 255 and max(changes) < 0.6 * 255
    monkeypatch.setattr(shapes, "_background", lambda rng: np.full((64, 64, 3), 0.5))
    noise = np.stack([image[mask == 0][:50] for image, mask, _ in (shapes.draw("train", i) for i in range(40))])
    background = noise[np.abs(noise.mean((1, 2)) - 127.5) < 6]  # without a distractor
    assert (background / 255).std() == pytest.approx(0.065, rel=0.1)
