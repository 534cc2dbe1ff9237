"""Checks and conversions of arrays that are drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def unit_images(images: ArrayLike) -> np.ndarray:
    """Images [N, H, W, 3], uint8 grey levels 0..255 or float in [0, 1], as float in [0, 1].

    Raises:
      ValueError: the images have another shape, dtype or range.
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) == 0:
        raise ValueError(f"images must be [N, H, W, 3], not {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return pixels / 255.0
    rounding = 1e-3  # far below one grey level
    if pixels.dtype.kind != "f" or not (pixels.min() >= -rounding and pixels.max() <= 1 + rounding):
        raise ValueError(f"images must be uint8 or float in [0, 1], not {pixels.dtype} up to {pixels.max()}")
    return np.clip(pixels, 0, 1)


def nan_unless_finite(values: ArrayLike | Sequence[Any]) -> np.ndarray:
    """The values as float, with NaN for infinities and None, so that there is one kind of gap to draw."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)
