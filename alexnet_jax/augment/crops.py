"""Crops, flips and cutout: random in training, fixed views in testing."""

import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class View(NamedTuple):
    """A crop and flip of an image in testing.

    Attributes:
      row: position of the window, from 0 (top) to 1 (bottom).
      column: position of the window, from 0 (left) to 1 (right).
      flip: whether the window is mirrored left to right.
      shift: pixels by which the window is moved down and to the right, at most to the image's edge.
    """

    row: float
    column: float
    flip: bool
    shift: int = 0


CENTRE = View(0.5, 0.5, False)
_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS: Mapping[int, tuple[View, ...]] = types.MappingProxyType(
    {
        1: (CENTRE,),
        2: (CENTRE, View(0.5, 0.5, True)),
        6: tuple(View(0.5, 0.5, flip, shift) for shift in (0, -1, 1) for flip in (False, True)),
        10: tuple(View(*place, flip) for place in _PLACES for flip in (False, True)),  # paper, section 4.1
    }
)


def pad(images: jax.Array, padding: int, mode: str) -> jax.Array:
    """Adds `padding` pixels on every side of [B, H, W, C].

    Args:
      images: [B, H, W, C].
      padding: pixels.
      mode: "reflect" (mirrors the image at its edge pixel, which is not repeated) or "zero".
    """
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return jnp.pad(images, pads, mode="reflect" if mode == "reflect" else "constant")


def random_crop(keys: jax.Array, images: jax.Array, size: Sequence[int]) -> jax.Array:
    """Cuts a window out of each image at a uniformly random position (paper, section 4.1: 224 x 224 of 256 x 256).

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].
      size: height h and width w of the window, at most H and W.

    Returns:
      [B, h, w, C].
    """
    ends = np.subtract(images.shape[1:3], size) + 1

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, ends)
        return jax.lax.dynamic_slice(image, (row, column, 0), (*size, image.shape[-1]))

    return jax.vmap(crop)(keys, images)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of [B, H, W, C] left to right with probability 1/2 (paper, section 4.1)."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def alternating_flip(images: jax.Array, stored: jax.Array | np.ndarray, epoch: jax.Array) -> jax.Array:
    """Mirrors each image in every second epoch, so that two epochs show each image both ways (Jordan, airbench, 2024).

    An image is mirrored in odd epochs if the sum of its stored grey levels is even, else in even ones: no draw is
    needed, and the order of the images does not matter.

    Args:
      images: [B, h, w, C].
      stored: uint8 [B, H, W, C], the same images before any change.
      epoch: int32 scalar, from 0.
    """
    flip = (stored.sum(axis=(1, 2, 3), dtype=np.uint32) + epoch.astype(np.uint32)) % 2 == 1
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def cutout(keys: jax.Array, images: jax.Array, side: int, value: jax.Array | float) -> jax.Array:
    """Fills a square of each image with `value` (DeVries and Taylor, 2017).

    The square's centre is uniform over the image; what lies outside the image is cut off, so that on average a smaller
    part is hidden.

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].
      side: of the square, pixels.
      value: scalar or [1, 1, 1, C].
    """
    height, width = images.shape[1:3]

    def hidden(key: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, np.array([height, width])) - side // 2
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
        return (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)

    return jnp.where(jax.vmap(hidden)(keys)[..., None], value, images)


def view_crop(view: View, images: jax.Array, size: Sequence[int]) -> jax.Array:
    """Cuts the same view out of every image, [B, H, W, C] -> [B, *size, C], and mirrors it if `view.flip`."""
    last_row, last_column = np.subtract(images.shape[1:3], size)
    row = int(np.clip(round(view.row * last_row) + view.shift, 0, last_row))
    column = int(np.clip(round(view.column * last_column) + view.shift, 0, last_column))
    windows = images[:, row : row + size[0], column : column + size[1]]
    return windows[:, :, ::-1] if view.flip else windows
