"""The protocol that all data sets implement, and the data set that fits into memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data.batches import Batch, Batches, batches, epoch_order, steps_per_epoch
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import AlexNetError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their labels, row by row.

    Attributes:
      images: uint8 [N, H, W, C], grey levels 0..255, RGB.
      labels: int32 [N], class indices.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, H, W, C], not {self.images.dtype} {self.images.shape}")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int32 [N], not {self.labels.dtype} {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)


class Placement(NamedTuple):
    """The devices over which each batch is divided.

    Attributes:
      num_devices: D, in all processes together.
      rows: positions of this process's devices among them.
    """

    num_devices: int
    rows: slice


class Splits(Protocol):
    """What prediction needs of a data set."""

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of images in each split."""

    def batches(self, split: str, batch_size: int, placement: Placement) -> Iterator[Batch]:
        """One pass over a split in its own order.

        Yields:
          NumPy arrays [d, B / D, ...] for the d devices of this process.
        """


class Dataset(Splits, Protocol):
    """A labelled image data set.

    Its splits are "train" and at least one of "validation" and "test". Each data set chooses its own types `Resident`
    and `Call`. A compiled call of the train step gets both, and `fetch` makes a `Batch` of them, so that a data set in
    memory is sent to the devices once and a streamed one batch by batch.
    """

    @property
    def name(self) -> str:
        """The value of `--dataset`."""

    @property
    def source(self) -> str:
        """Where the images came from, in words."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of every image."""

    def statistics(self) -> Statistics:
        """Mean image and PCA basis of the training images."""

    def fingerprint(self) -> str:
        """SHA-256 that identifies the images and labels of all splits."""

    def examples(self, split: str, indices: np.ndarray) -> Split:
        """Examples of a split by index, at least one; all are held in memory."""

    def sample(self, count: int) -> Split:
        """At most `count` training examples, for plots and measurements."""

    def resident(self) -> Any:
        """Arrays that every device keeps during training."""

    def calls(
        self, seed: int, epoch: int, batch_size: int, placement: Placement, first: int, length: Callable[[int], int]
    ) -> Iterator[Any]:
        """Data for the remaining calls of the train step in an epoch, from batch `first` on.

        Args:
          seed: determines the order of the examples, together with `epoch`.
          epoch: from 0.
          batch_size: B, a multiple of D.
          placement: the devices.
          first: number of batches to skip.
          length: maps a batch to the number of steps of the call that begins there, at most the rest of the epoch.

        Yields:
          Trees of arrays [d, K, ...] for the d devices of this process and K steps, with a leaf `mask` [d, K, B / D].
        """

    def fetch(self, resident: Any, call: Any) -> Batch:
        """The batch of one device and one step: `call` without its first two axes. Runs inside the compiled call."""


class Examples(NamedTuple):
    """Examples on a device.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


def calls_by_index(
    number: int,
    seed: int,
    epoch: int,
    batch_size: int,
    placement: Placement,
    first: int,
    length: Callable[[int], int],
) -> Iterator[Batches]:
    """The `calls` of a data set whose `number` training examples are on the devices: the indices of each step's."""
    layout = batches(epoch_order(seed, epoch, number), batch_size, placement.num_devices)
    layout = layout.of_devices(placement.rows)
    while first < steps_per_epoch(number, batch_size):
        count = length(first)
        yield layout.part(first, count)
        first += count


def select(resident: Examples, call: Batches) -> Batch:
    """The examples with a call's indices."""
    images, labels = (jnp.take(array, call.indices, axis=0, mode="clip") for array in resident)
    return Batch(images, labels, call.mask)


def in_batches(images: Any, labels: Any, batch_size: int, placement: Placement) -> Iterator[Batch]:
    """The `batches` of a split in memory."""
    layout = batches(np.arange(len(labels)), batch_size, placement.num_devices).of_devices(placement.rows)
    for indices, mask in zip(layout.indices.swapaxes(0, 1), layout.mask.swapaxes(0, 1), strict=True):
        yield Batch(images[indices], labels[indices], mask)


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """A data set in memory. The training images are copied to every device, where each step selects its examples.

    Attributes:
      name: the value of `--dataset`.
      source: where the images came from, in words.
      class_names: the name of each label.
      splits: "train", "test" and, unless it was merged into "train", "validation".
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise AlexNetError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of every image."""
        return self["train"].images.shape[1:]

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of images in each split."""
        return {name: len(split) for name, split in self.splits.items()}

    def statistics(self) -> Statistics:
        """Mean image and PCA basis of the training images."""
        return Statistics.of(self["train"].images)

    def fingerprint(self) -> str:
        """SHA-256 over every split's pixels and labels."""
        digest = hashlib.sha256()
        for name in SPLITS:
            if name in self.splits:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(self.splits[name].images).data)
                digest.update(np.ascontiguousarray(self.splits[name].labels).data)
        return digest.hexdigest()

    def examples(self, split: str, indices: np.ndarray) -> Split:
        """Examples of a split by index."""
        return Split(self[split].images[indices], self[split].labels[indices])

    def sample(self, count: int) -> Split:
        """The first training examples, at most `count`."""
        return Split(self["train"].images[:count], self["train"].labels[:count])

    def resident(self) -> Examples:
        """The training examples."""
        return Examples(self["train"].images, self["train"].labels)

    def calls(
        self, seed: int, epoch: int, batch_size: int, placement: Placement, first: int, length: Callable[[int], int]
    ) -> Iterator[Batches]:
        """Indices of the examples of each step."""
        return calls_by_index(len(self["train"]), seed, epoch, batch_size, placement, first, length)

    @staticmethod
    def fetch(resident: Examples, call: Batches) -> Batch:
        """Selects the examples on the device."""
        return select(resident, call)

    def batches(self, split: str, batch_size: int, placement: Placement) -> Iterator[Batch]:
        """One pass over a split in its own order."""
        return in_batches(self[split].images, self[split].labels, batch_size, placement)

    def train_on_all(self) -> "ArrayDataset":
        """Appends the validation images to the training images; no validation split remains."""
        parts = [self["train"], self["validation"]]
        merged = Split(
            images=np.concatenate([part.images for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )
        return dataclasses.replace(self, splits={"train": merged, "test": self["test"]})
