"""Images from a caller: checked, and predicted in parts."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def to_grey_levels(images: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Images [N, H, W, 3] of shape `image_shape`, uint8 or float in [0, 1], as grey levels 0..255, uint8 or float32.

    Raises:
      ValueError: the images have another shape, dtype or range.
    """
    if np.ma.is_masked(images):
        raise ValueError("images must not be masked: give every pixel a value")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != image_shape or not len(images):
        shape = ", ".join(map(str, image_shape))
        raise ValueError(f"images must be [N, {shape}] with N > 0, not {list(images.shape)}")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):  # includes ml_dtypes' bfloat16 and float8
        raise ValueError(f"images must be uint8 (0..255) or float (0..1), not {images.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        images = images.astype(np.float32)
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"float images must be in [0, 1], not [{images.min()}, {images.max()}]; grey levels 0..255 must be uint8"
        )
    return images * 255


def in_parts(compute: Callable[[np.ndarray], Any], images: np.ndarray, most: int = 500) -> np.ndarray:
    """`compute` applied to images [N, ...], N > 0, at most `most` at a time; the results are concatenated.

    The last part is padded with copies to the next power of two: `compute` compiles one program for each size.
    """
    parts = []
    for start in range(0, len(images), most):
        part = images[start : start + most]
        size = min(most, 1 << (len(part) - 1).bit_length())
        padded = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        parts.append(np.asarray(compute(padded))[: len(part)])
    return np.concatenate(parts)
