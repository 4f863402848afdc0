"""The toy data: pictures of textured shapes, drawn by code.

A scene shows two to four objects of six classes, each with its own texture, outline and hue. These cues are
faint: 70 % of an object's colour is the background's, and the sensor is noisy. Distractors in the background
have the same outlines and all hues, but no texture.

Picture i of a part depends on (part, i) alone and is the same on every machine: NumPy's RandomState is
frozen, and the arithmetic is + - * / on float64, which IEEE 754 fixes to the bit.
"""
import numpy as np

SIZE = 64
CLASSES = ("background", "ash", "birch", "cedar", "elm", "fir", "oak")
Y, X = np.mgrid[:SIZE, :SIZE] + 0.0
PARTS = {"encoder_train": 0, "unlabelled": 2, "train": 3, "val": 4}  # name: its seed


def draw(part, index):
    """Picture `index` >= 0 of a part: (image (64, 64, 3) uint8, mask (64, 64) uint8, label).

    The mask holds indices into CLASSES. Pictures of encoder_train show one large object; the label is its
    class minus one. The other parts show scenes; the label is -1.
    """
    rng = np.random.RandomState([2022, PARTS[part], index])
    image = _background(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.randint(1, 4)):
        inside, _, _ = _outline(rng, kind=rng.randint(6), radius=rng.uniform(5, 11))
        image[inside] = _colour(rng, hue=rng.uniform())
    if part == "encoder_train":
        label = rng.randint(6)
        _object(rng, image, mask, label, radius=rng.uniform(14, 22))
    else:
        label = -1
        for _ in range(rng.randint(2, 5)):
            _object(rng, image, mask, rng.randint(6), radius=rng.uniform(11, 19))
    for _ in range(3):
        image += rng.uniform(-0.065, 0.065, image.shape)  # sensor noise, standard deviation 0.065
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), mask, label


def _object(rng, image, mask, k, radius):
    """Draw an object of class k, 0 to 5."""
    inside, y, x = _outline(rng, k, radius)
    texture = _texture(rng, k, y, x)
    hue = k / 6 + 0.12 * (rng.uniform() + rng.uniform() + rng.uniform() - 1.5)  # deviation 0.06
    surface = 0.7 * image + 0.3 * _colour(rng, hue) + texture[..., None] * rng.uniform(0.10, 0.18)
    image[inside] = surface[inside]
    mask[inside] = k + 1


def _background(rng):
    """Smooth noise at three scales, plus a gradient of light: (64, 64, 3), around 0.45."""
    image = np.full((SIZE, SIZE, 3), 0.45)
    for cells, amplitude in ((2, 0.15), (6, 0.10), (16, 0.06)):
        grid = rng.uniform(-amplitude, amplitude, (cells + 1, cells + 1, 3))
        at = np.arange(SIZE) * cells / SIZE
        low = at.astype(int)
        t = (at - low)[:, None]
        rows = grid[low] * (1 - t[:, None]) + grid[low + 1] * t[:, None]  # bilinear, first along y
        image += rows[:, low] * (1 - t) + rows[:, low + 1] * t  # then along x
    light = rng.uniform(-0.2, 0.2) * (Y / SIZE - 0.5) + rng.uniform(-0.2, 0.2) * (X / SIZE - 0.5)
    return image + light[..., None]


def _outline(rng, kind, radius):
    """A shape at a random place and angle: inside (64, 64) bool, and y and x from its centre."""
    centre = rng.uniform(0.6 * radius, SIZE - 0.6 * radius, 2)
    y, x = Y - centre[0], X - centre[1]
    t = rng.uniform(-0.4, 0.4)  # the tangent of half the angle: no sine needed
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius
    a, b = np.abs(u), np.abs(v)
    outlines = (u * u + v * v < 0.9,  # disc
                np.maximum(a, b) < 0.85,  # square
                (np.minimum(a, b) < 0.38) & (np.maximum(a, b) < 1),  # cross
                (v < 0.75) & (v > 1.9 * a - 1.05),  # triangle
                np.abs(u * u + v * v - 0.6) < 0.4,  # ring
                a + 0.55 * b < 0.75)  # tall diamond
    return outlines[kind], y, x


def _texture(rng, kind, y, x):
    """A pattern (64, 64) of +1 and -1, with a period of 4 to 6 pixels and a random phase."""
    period, (phase_y, phase_x) = rng.uniform(4, 6), rng.uniform(0, 1, 2)
    y, x = y / period + phase_y, x / period + phase_x
    d = (x + y) * 0.75
    y, x, d = y - np.floor(y), x - np.floor(x), d - np.floor(d)  # place in the period
    textures = (x < 0.5, y < 0.5, (x < 0.5) != (y < 0.5), d < 0.5,
                (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.11, (x < 0.3) | (y < 0.3))
    return np.where(textures[kind], 1.0, -1.0)


def _colour(rng, hue):
    """A colour (3,) in [0, 1] of this hue (1: full circle), with random saturation and brightness."""
    saturation, value = rng.uniform(0.3, 0.8), rng.uniform(0.35, 0.75)
    h = (hue - np.floor(hue)) * 6 + np.array([0, 4, 2])  # HSV: red, green and blue are shifted ramps
    ramp = np.clip(np.abs(h - 6 * np.floor(h / 6) - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * ramp)
