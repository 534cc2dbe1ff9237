"""Which examples make up each batch, and how a batch is laid out over devices."""

from typing import NamedTuple

import numpy as np


class Batches(NamedTuple):
    """K global batches of B examples, each split over D devices; the last is padded with copies of its first example.

    Attributes:
      indices: int32 [D, K, B / D], which examples.
      mask: bool [D, K, B / D], False for padding.
    """

    indices: np.ndarray
    mask: np.ndarray

    def part(self, first: int, count: int = 1) -> "Batches":
        """The batches [first, first + count)."""
        return Batches(self.indices[:, first : first + count], self.mask[:, first : first + count])

    def of_devices(self, rows: slice) -> "Batches":
        """The shares of some of the devices."""
        return Batches(self.indices[rows], self.mask[rows])


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in a pass; the last may be smaller, none is dropped."""
    return -(-num_examples // batch_size)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of the training images in an epoch: a function of (seed, epoch) alone, so no iterator needs saving."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def batches(order: np.ndarray, batch_size: int, num_devices: int) -> Batches:
    """Lays out one pass over `order`.

    Args:
      order: int [N], N > 0, indices of examples.
      batch_size: B, examples in a global batch; a multiple of `num_devices`.
      num_devices: D.
    """
    count = steps_per_epoch(len(order), batch_size)
    padding = count * batch_size - len(order)
    index = np.concatenate([order, np.repeat(order[(count - 1) * batch_size], padding)]).astype(np.int32)
    mask = np.arange(len(index)) < len(order)
    return Batches(*(a.reshape(count, num_devices, -1).swapaxes(0, 1) for a in (index, mask)))
