"""`shapes`: ten classes of textured shapes on cluttered backgrounds, drawn by NumPy from a seed in seconds.

The data set for trying everything out without a download. Only the outline tells the class: size, place, rotation,
colours, textures and clutter are drawn independently of it, so a linear classifier is lost where a convolutional
network is not.

Every block of `BLOCK` images has its own random stream: an image is a function of (seed, split, block), not of how much
is drawn at a time.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator, SeedSequence

from alexnet_jax.datasets.dataset import SPLITS, Dataset, Split

Array = np.ndarray
Distance = Callable[[Array, Array], Array]

SIZE = 32  # pixels
SHAPE_COLOURS = (110, 255)  # grey levels of each channel; the ranges overlap, `_colour_unlike` keeps the contrast
GROUND_COLOURS = (0, 130)
CLUTTER_COLOURS = (0, 200)
BLOCK = 100  # images; a multiple of the number of classes, and small enough for its planes to stay in the cache

_CENTRES = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)  # of the pixels, from the image's middle


def load(seed: int = 0, *, train: int = 10_000, validation: int = 1_000, test: int = 2_000) -> Dataset:
    """Draws the data set: uint8 [N, 32, 32, 3], classes balanced within one and in random order.

    The splits come from independent streams, and one does not change with the size of another. The whole blocks of
    `BLOCK` images of a split do not change with its own size either.

    Args:
      seed: at least 0.
      train: number of training images.
      validation: number of validation images.
      test: number of test images.

    Raises:
      ValueError: `seed` or a size is negative.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    return Dataset(
        name="shapes",
        source=f"drawn by alexnet_jax.datasets.shapes from seed {seed}",
        class_names=tuple(SHAPES),
        splits={name: _draw_split(seed, index, sizes[name]) for index, name in enumerate(SPLITS)},
    )


def _draw_split(seed: int, split: int, count: int) -> Split:
    labels = np.empty(count, np.int32)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for block, start in enumerate(range(0, count, BLOCK)):
        rng = np.random.default_rng(SeedSequence(seed, spawn_key=(split, block)))
        part = slice(start, start + BLOCK)
        labels[part] = rng.permutation(np.arange(len(labels[part])) % len(SHAPES))
        images[part] = _draw_images(rng, labels[part])
    return Split(images, labels)


def _draw_images(rng: Generator, labels: Array) -> Array:
    """Draws one image for each label: uint8 [N, 32, 32, 3]."""
    n = len(labels)
    colour = _uniform(rng, *SHAPE_COLOURS, n, 3, 1, 1)
    image = _draw_background(rng, colour)  # [N, 3, 32, 32]: planes, for the vector units; grey levels

    radius = _uniform(rng, 9, 13, n, 1, 1, 1)
    u, v = (axis / radius for axis in _random_frame(rng, n, reach=3))
    distance = np.empty_like(u)
    for label, shape in enumerate(SHAPES.values()):
        members = labels == label
        distance[members] = shape(u[members], v[members])
    fill = colour + _uniform(rng, 10, 35, n, 1, 1, 1) * _random_texture(rng, n)
    _paint(image, fill, coverage(distance * radius))

    image += _uniform(rng, 0, 8, n, 1, 1, 1) * rng.standard_normal(u.shape, np.float32)
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _draw_background(rng: Generator, avoid: Array) -> Array:
    """Draws a textured gradient with blobs, lines and scraps, in colours that stand out from `avoid` [N, 3, 1, 1]."""
    n = len(avoid)
    u, _ = _random_frame(rng, n, reach=0)
    image = np.repeat(_colour_unlike(rng, GROUND_COLOURS, avoid, 140), SIZE * SIZE, axis=2).reshape(n, 3, SIZE, SIZE)
    _paint(image, _colour_unlike(rng, GROUND_COLOURS, avoid, 140), np.clip(u / SIZE + np.float32(0.5), 0, 1))
    image += _uniform(rng, 0, 25, n, 1, 1, 1) * _random_texture(rng, n)
    u, v = _random_frame(rng, n, reach=SIZE / 2)  # a soft blob
    falloff = np.clip(1 - (u * u + v * v) / _uniform(rng, 4, 12, n, 1, 1, 1) ** 2, 0, 1)
    _paint(image, _colour_unlike(rng, CLUTTER_COLOURS, avoid, 110), falloff)
    for _ in range(2):  # lines across the whole image
        u, _ = _random_frame(rng, n, reach=SIZE / 2)
        opacity = coverage(abs(u) - _uniform(rng, 0, 1.2, n, 1, 1, 1))
        _paint(image, _colour_unlike(rng, CLUTTER_COLOURS, avoid, 110), opacity)
    for _ in range(3):  # scraps: small boxes with a corner cut off
        u, v = _random_frame(rng, n, reach=SIZE / 2)
        width, height, cut = (_uniform(rng, 0.5, 3, n, 1, 1, 1) for _ in range(3))
        corner = np.float32(0.7) * (u + v) - cut
        opacity = coverage(np.maximum(_box(u, v, width, height), corner))
        _paint(image, _colour_unlike(rng, CLUTTER_COLOURS, avoid, 110), opacity)
    return image


def _paint(image: Array, colour: Array, opacity: Array) -> None:
    """Blends `colour` into `image` [N, 3, 32, 32], in place, by `opacity` [N, 1, 32, 32] in [0, 1]."""
    image += opacity * (colour - image)


def coverage(distance: Array) -> Array:
    """Share of a pixel that lies inside an outline, for the signed distance of its centre in pixels (inside: negative).

    clip(1/2 - distance, 0, 1): exact where the outline is straight and upright, and the usual one-pixel anti-aliasing
    elsewhere.
    """
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _uniform(rng: Generator, low: float, high: float, *shape: int) -> Array:
    return rng.uniform(low, high, shape).astype(np.float32)


def _colour_unlike(rng: Generator, levels: tuple[float, float], avoid: Array, distance: float) -> Array:
    """Random RGB colours at least `distance` grey levels (Euclidean) from `avoid`: float32 [N, 3, 1, 1]."""
    candidates = _uniform(rng, *levels, 16, *avoid.shape)
    distances = np.sqrt(((candidates - avoid) ** 2).sum(axis=2, keepdims=True))  # [16, N, 1, 1, 1]
    # The first that is far enough, or the farthest of those that are not.
    best = np.minimum(distances, np.float32(distance)).argmax(axis=0, keepdims=True)
    return np.take_along_axis(candidates, best, axis=0)[0]


def _random_frame(rng: Generator, n: int, reach: float) -> tuple[Array, Array]:
    """Pixel coordinates about random centres, at most `reach` from the image's on each axis, in a random rotation.

    Returns:
      u, v: float32 [N, 1, 32, 32], pixels.
    """
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1, 1))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x = _CENTRES - _uniform(rng, -reach, reach, n, 1, 1, 1)  # [N, 1, 1, 32]
    y = _CENTRES[:, None] - _uniform(rng, -reach, reach, n, 1, 1, 1)  # [N, 1, 32, 1]
    return cos * x + sin * y, cos * y - sin * x


def _random_texture(rng: Generator, n: int) -> Array:
    """Plain, stripes, checks, dots or noise, each as often: float32 [N, 1, 32, 32] in [-1, 1]."""
    period = _uniform(rng, 3, 8, n, 1, 1, 1)
    across, along = (_wave(axis / period) for axis in _random_frame(rng, n, reach=SIZE / 2))
    noise = 2 * rng.random((n, 1, SIZE, SIZE), np.float32) - 1
    kind = rng.integers(5, size=(n, 1, 1, 1))
    patterns = [across, across * along, np.minimum(across, along), noise]
    return np.select([kind == index for index in range(len(patterns))], patterns, np.float32(0))


def _wave(phase: Array) -> Array:
    """Square wave of period 1 with softened edges, in [-1, 1]."""
    triangle = 4 * abs(phase - np.floor(phase) - np.float32(0.5)) - 1
    return np.clip(2 * triangle, -1, 1)


# Signed distances from the outlines, negative inside. The shapes have about the same area, 1.5, so that size does not
# tell the class, and reach 0.7 to 1.2 from the origin.


def _disk(u: Array, v: Array, radius: float) -> Array:
    return np.sqrt(u * u + v * v) - radius


def _box(u: Array, v: Array, width: Array | float, height: Array | float) -> Array:
    """A rectangle of the given half-sizes; outside its corners the Chebyshev distance."""
    return np.maximum(abs(u) - width, abs(v) - height)


def _lines(u: Array, v: Array, sides: int, apothem: float) -> list[Array]:
    """Distances from the sides of a regular polygon, each side prolonged to a line."""
    angles = 2 * np.pi * np.arange(sides) / sides
    return [np.float32(np.cos(a)) * u + np.float32(np.sin(a)) * v - np.float32(apothem) for a in angles]


def _star(u: Array, v: Array) -> Array:
    """The pentagram: inside at least four of its five lines."""
    farthest = second = np.full_like(u, -np.inf)
    for line in _lines(u, v, 5, 0.355):
        farthest, second = np.maximum(farthest, line), np.maximum(second, np.minimum(farthest, line))
    return second


def _triangle(u: Array, v: Array) -> Array:
    return np.max(_lines(u, v, 3, 0.535), axis=0)


def _bow_tie(u: Array, v: Array) -> Array:
    """Two triangles that touch at the origin: between two lines through it, and no farther out than 0.93."""
    return np.maximum(abs(u) - 0.93, 0.75 * abs(v) - 0.65 * abs(u))


SHAPES: dict[str, Distance] = {
    "disk": lambda u, v: _disk(u, v, 0.69),
    "ring": lambda u, v: abs(_disk(u, v, 0.68)) - np.float32(0.18),
    "square": lambda u, v: _box(u, v, 0.61, 0.61),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.88, 0.25), _box(u, v, 0.25, 0.88)),
    "crescent": lambda u, v: np.maximum(_disk(u, v, 1), -_disk(u - np.float32(0.5), v, 0.8)),
    "half-disk": lambda u, v: np.maximum(_disk(u - np.float32(0.4), v, 0.98), u - np.float32(0.4)),
    "bars": lambda u, v: _box(abs(u) - np.float32(0.5), v, 0.22, 0.85),
    "bow tie": _bow_tie,
}
