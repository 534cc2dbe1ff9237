"""Batches: which examples each contains, in which order, and how they are divided over devices.

Shape letters: `D` devices, `K` batches, `B` examples in a global batch, over all devices.
"""

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """The examples of a batch, or one device's part of them.

    Attributes:
      images: uint8 [..., H, W, 3], grey levels 0..255, RGB.
      labels: int32 [...], class indices.
      mask: bool [...], False for padding.
    """

    images: Any
    labels: Any
    mask: Any


class Batches(NamedTuple):
    """K global batches, each divided over D devices; the last is padded with copies of its first example.

    Attributes:
      indices: int32 [D, K, B / D], indices of the examples.
      mask: bool [D, K, B / D], False for padding.
    """

    indices: np.ndarray
    mask: np.ndarray

    def part(self, first: int, count: int = 1) -> "Batches":
        """The batches [first, first + count)."""
        return Batches(self.indices[:, first : first + count], self.mask[:, first : first + count])

    def of_devices(self, rows: slice) -> "Batches":
        """The parts of some of the devices."""
        return Batches(self.indices[rows], self.mask[rows])


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch; the last may be smaller, none is dropped."""
    return -(-num_examples // batch_size)


def updates_before(epoch: int, per_epoch: int) -> int:
    """Updates before an epoch begins; at most the largest int32, which no run reaches."""
    return min(epoch * per_epoch, 2**31 - 1)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of the training images in an epoch, a function of (seed, epoch): no iterator needs to be saved."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def batches(order: np.ndarray, batch_size: int, num_devices: int) -> Batches:
    """Divides one pass over `order` into batches.

    Args:
      order: int [N], N > 0, indices of examples.
      batch_size: B; a multiple of `num_devices`.
      num_devices: D.
    """
    count = steps_per_epoch(len(order), batch_size)
    padding = count * batch_size - len(order)
    index = np.concatenate([order, np.repeat(order[(count - 1) * batch_size], padding)]).astype(np.int32)
    mask = np.arange(len(index)) < len(order)
    return Batches(*(a.reshape(count, num_devices, -1).swapaxes(0, 1) for a in (index, mask)))
