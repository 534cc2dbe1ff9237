"""Which images make up each batch, and how a batch is laid out over devices."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """A global batch, split over D devices; the last one of a pass is padded with copies of its first example.

    Attributes:
      images: uint8 [D, B / D, H, W, C].
      labels: int32 [D, B / D].
      mask: bool [D, B / D], False for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in a pass; the last may be smaller, none is dropped."""
    return -(-num_examples // batch_size)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of the training images in an epoch: a function of (seed, epoch) alone, so no iterator needs saving."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def batches(
    images: np.ndarray, labels: np.ndarray, order: np.ndarray, batch_size: int, num_devices: int, first: int = 0
) -> Iterator[Batch]:
    """Yields the batches of one pass over `order`, beginning with batch number `first`.

    Args:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      order: int [M], indices into both.
      batch_size: examples in a global batch; a multiple of `num_devices`.
      num_devices: D.
      first: batches to skip, for resuming within an epoch.
    """
    for start in range(first * batch_size, len(order), batch_size):
        index = order[start : start + batch_size]
        padding = batch_size - len(index)
        mask = np.arange(batch_size) < len(index)
        index = np.concatenate([index, np.repeat(index[:1], padding)]) if padding else index
        yield Batch(
            *(array.reshape(num_devices, -1, *array.shape[1:]) for array in (images[index], labels[index], mask))
        )
