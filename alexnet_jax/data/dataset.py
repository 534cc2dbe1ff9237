"""The one face that every data set shows to the rest of the package."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set in memory.

    Attributes:
      name: the value of `--dataset` that gives it.
      source: where the pixels came from, for a person to read.
      class_names: the name of each label.
      splits: the parts by name; "train" and "test" always, "validation" unless it was merged into "train".
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

    def examples(self, split: str, indices: np.ndarray) -> Split:
        """Those of a split, in the order of `indices`."""
        return Split(self[split].images[indices], self[split].labels[indices])

    def sample(self, count: int) -> Split:
        """The first training images, at most `count`: to draw and to measure on."""
        train = self["train"]
        return Split(train.images[:count], train.labels[:count])

    def statistics(self) -> Statistics:
        """Mean image and PCA basis of the training images."""
        return Statistics.of(self["train"].images)

    def train_on_all(self) -> "Dataset":
        """Merges the validation images into the training images in that order; no validation is left."""
        parts = [self["train"], self["validation"]]
        merged = Split(
            images=np.concatenate([part.images for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )
        return dataclasses.replace(self, splits={"train": merged, "test": self["test"]})

    def fingerprint(self) -> str:
        """SHA-256 over every split's pixels and labels: tells whether a run goes on with the data it began with."""
        digest = hashlib.sha256()
        for name in SPLITS:
            if name in self.splits:
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(self.splits[name].images).data)
                digest.update(np.ascontiguousarray(self.splits[name].labels).data)
        return digest.hexdigest()
