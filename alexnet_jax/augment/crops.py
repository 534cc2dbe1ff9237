"""Random crops and flips, and the views of testing."""

import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Images = jax.Array | np.ndarray


def random_crop(keys: jax.Array, images: jax.Array, padding: int, mode: str) -> jax.Array:
    """Pads each image by `padding` pixels on all sides and cuts its own size back out at a uniformly random place.

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].
      padding: pixels; each offset is uniform on 0..2 * padding.
      mode: "reflect" (mirrors the image at its edge pixel, which is not repeated) or "zero".

    Returns:
      [B, H, W, C].
    """
    height, width, channels = images.shape[1:]
    padded = _pad(images, padding, mode)

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (row, column, 0), (height, width, channels))

    return jax.vmap(crop)(keys, padded)


def _pad(images: jax.Array, padding: int, mode: str) -> jax.Array:
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return jnp.pad(images, pads, mode="reflect" if mode == "reflect" else "constant")


def random_window(keys: jax.Array, images: Images, mean_image: np.ndarray | None, size: int) -> jax.Array:
    """Cuts a window of `size` x `size` out of each image at a uniformly random place (paper, section 4.1).

    Args:
      keys: [B] PRNG keys.
      images: uint8 or float [B, H, W, 3], grey levels; H and W at least `size`.
      mean_image: float32 [H, W, 3]; the window's own part of it is subtracted. None: nothing is.
      size: side of the window, 224 of 256 in the paper.

    Returns:
      float32 [B, size, size, 3], grey levels.
    """
    height, width, channels = images.shape[1:]

    def window(key: jax.Array, image: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, np.array([height - size, width - size]) + 1)

        def cut(x: Images) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, column, 0), (size, size, channels)).astype(jnp.float32)

        return cut(image) if mean_image is None else cut(image) - cut(mean_image)

    return jax.vmap(window)(keys, jnp.asarray(images))


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2 (paper, section 4.1).

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].

    Returns:
      [B, H, W, C].
    """
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


class View(NamedTuple):
    """A way to look at an image when testing.

    Attributes:
      row: where the window lies, from 0 (top) to 1 (bottom).
      column: the same from left to right.
      flip: whether it is mirrored left to right.
    """

    row: float
    column: float
    flip: bool


CENTRE = View(0.5, 0.5, False)
_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS: Mapping[int, tuple[View, ...]] = types.MappingProxyType(
    {
        1: (CENTRE,),
        2: (CENTRE, View(0.5, 0.5, True)),
        10: tuple(View(*place, flip) for place in _PLACES for flip in (False, True)),  # paper, section 4.1
    }
)
