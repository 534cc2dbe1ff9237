"""`shapes`: ten classes of textured shapes on cluttered backgrounds, drawn by NumPy in a few seconds.

This data set allows trying everything out without a download. Only the outline depends on the class: position, size,
rotation, colours, textures and clutter are drawn independently of it, and all outlines enclose the same area. A linear
classifier can't learn the classes, but a convolutional network can. Shapes are lighter than their background: with
contrast of either sign, AlexNetSmall spends its first epochs on a plateau at a loss of ln 10.

Every block of `BLOCK` images has its own random stream, and pixels are computed with correctly rounded operations only
(+ - * / sqrt, minimum, maximum, floor): an image is a function of (seed, split, block), independent of what else is
drawn and of the processor's vector width.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.random import Generator, SeedSequence

from alexnet_jax.data.dataset import SPLITS, ArrayDataset, Split
from alexnet_jax.runtime import available_cores

Array = np.ndarray

SIZE = 32  # pixels
BLOCK = 100  # images; their planes fit into the cache. A multiple of 10, so that complete blocks have balanced classes

# Grey levels of each channel. The ranges overlap for variety: `contrasting_colour` ensures the contrast.
SHAPE_LEVELS = (110, 255)
BACKGROUND_LEVELS = (0, 130)
CLUTTER_LEVELS = (0, 200)

_CENTRES = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2  # of the pixels, from the middle of the image


def load(seed: int = 0, *, train: int = 10_000, validation: int = 1_000, test: int = 2_000) -> ArrayDataset:
    """Draws the data set: uint8 [N, 32, 32, 3], in random order, with class counts that differ by at most one.

    Splits come from independent streams: the images of one do not depend on the size of another, and complete blocks of
    `BLOCK` images do not depend on the size of their own.

    Args:
      seed: at least 0.
      train: number of training images.
      validation: number of validation images.
      test: number of test images.

    Raises:
      ValueError: `seed` or a size is negative.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    return ArrayDataset(
        name="shapes",
        source=f"drawn by alexnet_jax.data.shapes from seed {seed}",
        class_names=tuple(SHAPES),
        splits={name: _draw_split(seed, index, sizes[name]) for index, name in enumerate(SPLITS)},
    )


def _draw_split(seed: int, split: int, count: int) -> Split:
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int32)

    def draw(block: int) -> None:
        rng = np.random.default_rng(SeedSequence(seed, spawn_key=(split, block)))
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        labels[part] = rng.permutation(np.arange(len(labels[part])) % len(SHAPES))
        images[part] = _draw_images(rng, labels[part])

    with ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(draw, range(math.ceil(count / BLOCK))))  # raises what they raise
    return Split(images, labels)


def _draw_images(rng: Generator, labels: Array) -> Array:
    """Draws one image for each label: uint8 [N, 32, 32, 3]."""
    n = len(labels)
    colour = _uniform(rng, *SHAPE_LEVELS, n, 3, 1, 1)
    image = _draw_background(rng, colour)

    scale = _uniform(rng, 9, 13, n, 1, 1, 1)  # pixels
    u, v = (axis / scale for axis in _random_frame(rng, n, reach=3))
    distance = np.empty_like(u)
    for label, shape in enumerate(SHAPES.values()):
        members = labels == label
        distance[members] = shape(u[members], v[members])
    fill = colour + _uniform(rng, 10, 35, n, 1, 1, 1) * _random_texture(rng, n)
    _paint(image, fill, coverage(distance * scale))

    image += _uniform(rng, 0, 8, n, 1, 1, 1) * rng.standard_normal(u.shape, np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _draw_background(rng: Generator, avoid: Array) -> Array:
    """Draws a textured gradient and clutter, in colours that contrast with `avoid` [N, 3, 1, 1].

    Returns:
      float32 [N, 3, 32, 32], grey levels; channels first, because NumPy is fast along long last axes.
    """
    n = len(avoid)
    u, _ = _random_frame(rng, n, reach=0)
    image = np.empty((n, 3, SIZE, SIZE), np.float32)
    image[:] = contrasting_colour(rng, BACKGROUND_LEVELS, avoid, 140)
    _paint(image, contrasting_colour(rng, BACKGROUND_LEVELS, avoid, 140), np.clip(u / SIZE + 0.5, 0, 1))
    image += _uniform(rng, 0, 25, n, 1, 1, 1) * _random_texture(rng, n)

    u, v = _random_frame(rng, n, reach=SIZE / 2)  # a soft blob
    falloff = np.clip(1 - (u * u + v * v) / _uniform(rng, 4, 12, n, 1, 1, 1) ** 2, 0, 1)
    _paint(image, contrasting_colour(rng, CLUTTER_LEVELS, avoid, 110), falloff)
    for _ in range(2):  # lines from edge to edge
        u, _ = _random_frame(rng, n, reach=SIZE / 2)
        opacity = coverage(abs(u) - _uniform(rng, 0, 1.2, n, 1, 1, 1))
        _paint(image, contrasting_colour(rng, CLUTTER_LEVELS, avoid, 110), opacity)
    for _ in range(3):  # scraps: small rectangles without one corner
        u, v = _random_frame(rng, n, reach=SIZE / 2)
        width, height, cut = (_uniform(rng, 0.5, 3, n, 1, 1, 1) for _ in range(3))
        opacity = coverage(np.maximum(_box(u, v, width, height), 0.7 * (u + v) - cut))
        _paint(image, contrasting_colour(rng, CLUTTER_LEVELS, avoid, 110), opacity)
    return image


def _paint(image: Array, colour: Array, opacity: Array) -> None:
    """Blends `colour` into `image` [N, 3, 32, 32] in place, with `opacity` [N, 1, 32, 32] in [0, 1]."""
    image += opacity * (colour - image)


def coverage(distance: Array) -> Array:
    """Share of a pixel inside an outline, from the signed distance of the pixel's centre (in pixels, inside negative).

    clip(1/2 - distance, 0, 1): exact for straight edges along the grid, close for other outlines.
    """
    return np.clip(0.5 - distance, 0, 1)


def _uniform(rng: Generator, low: float, high: float, *shape: int) -> Array:
    return rng.uniform(low, high, shape).astype(np.float32)


def contrasting_colour(rng: Generator, levels: tuple[float, float], avoid: Array, distance: float) -> Array:
    """Random RGB colours in `levels`, at least `distance` (Euclidean, grey levels) from `avoid` [N, 3, 1, 1]."""
    candidates = _uniform(rng, *levels, 16, *avoid.shape)
    distances = np.sqrt(((candidates - avoid) ** 2).sum(axis=2, keepdims=True))
    # The first that is far enough away, else the farthest.
    chosen = np.minimum(distances, distance).argmax(axis=0, keepdims=True)
    return np.take_along_axis(candidates, chosen, axis=0)[0]


def _random_frame(rng: Generator, n: int, reach: float) -> tuple[Array, Array]:
    """Randomly rotated pixel coordinates about a random origin, at most `reach` from the centre on each axis.

    Returns:
      u, v: float32 [N, 1, 32, 32], pixels.
    """
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1, 1))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x = _CENTRES - _uniform(rng, -reach, reach, n, 1, 1, 1)  # [N, 1, 1, 32]
    y = _CENTRES[:, None] - _uniform(rng, -reach, reach, n, 1, 1, 1)  # [N, 1, 32, 1]
    return cos * x + sin * y, cos * y - sin * x


def _random_texture(rng: Generator, n: int) -> Array:
    """Stripes, checks, dots, noise or nothing, equally often: float32 [N, 1, 32, 32] in [-1, 1]."""
    period = _uniform(rng, 3, 8, n, 1, 1, 1)
    across, along = (_wave(axis / period) for axis in _random_frame(rng, n, reach=SIZE / 2))
    noise = 2 * rng.random((n, 1, SIZE, SIZE), np.float32) - 1
    kind = rng.integers(5, size=(n, 1, 1, 1))
    patterns = [across, across * along, np.minimum(across, along), noise]
    return np.select([kind == index for index in range(len(patterns))], patterns, np.float32(0))


def _wave(phase: Array) -> Array:
    """Square wave of period 1 with sloping edges, in [-1, 1]."""
    triangle = 4 * abs(phase - np.floor(phase) - 0.5) - 1
    return np.clip(2 * triangle, -1, 1)


# Signed distances from outlines about the origin, negative inside, float32 like u and v. They are exact near straight
# edges. Outside corners they are too small, but only at distances where no pixel is affected.


def _disk(u: Array, v: Array, radius: float) -> Array:
    return np.sqrt(u * u + v * v) - radius


def _box(u: Array, v: Array, width: Array | float, height: Array | float) -> Array:
    """The rectangle |u| <= width, |v| <= height."""
    return np.maximum(abs(u) - width, abs(v) - height)


def _polygon_lines(u: Array, v: Array, sides: int, apothem: float) -> Array:
    """Distances from the lines through the sides of a regular polygon: [sides, ...]."""
    angles = [2 * np.pi * side / sides for side in range(sides)]
    return np.stack([np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v - apothem for angle in angles])


def _triangle(u: Array, v: Array) -> Array:
    return _polygon_lines(u, v, 3, 0.535).max(axis=0)


def _star(u: Array, v: Array) -> Array:
    """The pentagram: points inside at least four of the five lines of a pentagon."""
    return np.sort(_polygon_lines(u, v, 5, 0.355), axis=0)[3]


def _bow_tie(u: Array, v: Array) -> Array:
    """Two triangles that touch at the origin."""
    return np.maximum(abs(u) - 0.93, 0.75 * abs(v) - 0.65 * abs(u))


# Each encloses an area of 1.5 times its squared scale, so mean brightness does not depend on the class.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disk": lambda u, v: _disk(u, v, 0.69),
    "ring": lambda u, v: abs(_disk(u, v, 0.68)) - 0.18,
    "square": lambda u, v: _box(u, v, 0.61, 0.61),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.88, 0.25), _box(u, v, 0.25, 0.88)),
    "crescent": lambda u, v: np.maximum(_disk(u, v, 1), -_disk(u - 0.5, v, 0.8)),
    "half-disk": lambda u, v: np.maximum(_disk(u - 0.4, v, 0.98), u - 0.4),
    "bars": lambda u, v: _box(abs(u) - 0.5, v, 0.22, 0.85),
    "bow tie": _bow_tie,
}
