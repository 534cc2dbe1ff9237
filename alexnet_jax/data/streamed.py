"""Prepared image data sets: shards on disk, streamed with Grain."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from alexnet_jax.data.batches import Batch, batches, epoch_order
from alexnet_jax.data.dataset import Placement, Split
from alexnet_jax.data.records import decode_record
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import AlexNetError, reason
from alexnet_jax.files import read_bytes
from alexnet_jax.runtime import require_array_record, require_shared_memory

THREADS = 8  # each decodes a batch
WORKER_BUFFER = 2  # further batches that a process keeps ready
_MAX_JSON_BYTES = 64 * 1024**2


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split.

    Attributes:
      paths: in order.
      counts: records in each.
    """

    paths: tuple[str, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)


class _Examples:
    """Pixels and labels of records in a given order, for Grain's random access; it is sent to worker processes."""

    def __init__(self, shards: Shards, order: np.ndarray, size: int) -> None:
        self._shards, self._order, self._size = shards, order, size

    @functools.cached_property
    def _records(self) -> Any:
        return grain.sources.ArrayRecordDataSource(list(self._shards.paths))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_records"}  # a worker opens its own

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> tuple[np.ndarray, np.int32]:
        index = int(self._order[place])
        try:
            pixels, label = decode_record(self._records[index], self._size)
        except Exception as error:  # array_record's reader raises its own kinds of error
            starts = np.cumsum((0, *self._shards.counts))
            path = pathlib.Path(self._shards.paths[int(np.searchsorted(starts, index, side="right")) - 1])
            raise AlexNetError(f"{path} is damaged: delete {path.parent} and prepare it again") from error
        return pixels, np.int32(label)


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """A prepared data set, read on demand.

    Attributes:
      folder: the folder written by `alexnet_jax.data.prepare`.
      description: its dataset.json.
      workers: processes that decode images; 0: threads of this process. Does not change the results.
    """

    folder: pathlib.Path
    description: Mapping[str, Any]
    workers: int = 0

    @property
    def name(self) -> str:
        """The value of `--dataset`."""
        return str(self.description.get("name", "imagenet"))

    @property
    def source(self) -> str:
        """Where the images came from, for display."""
        return f"{self.folder} ({self.description['source']}, stored as {self.description['store']})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""
        return tuple(self.description["classes"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of every image."""
        return (self.description["size"], self.description["size"], 3)

    @functools.cached_property
    def splits(self) -> Mapping[str, Shards]:
        """The splits by name: "train" and, if there was one, "validation"."""
        return {
            name: Shards(tuple(str(self.folder / f["name"]) for f in files), tuple(f["records"] for f in files))
            for name, files in self.description["shards"].items()
        }

    def __getitem__(self, split: str) -> Shards:
        if split not in self.splits:
            raise AlexNetError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of images in each split."""
        return {name: len(shards) for name, shards in self.splits.items()}

    def fingerprint(self) -> str:
        """SHA-256 over the shards' SHA-256."""
        return str(self.description["fingerprint"])

    def statistics(self) -> Statistics:
        """Mean image and PCA basis of the training images, measured when they were prepared.

        Raises:
          AlexNetError: they can't be read.
        """
        path = self.folder / "statistics.npz"
        try:
            statistics = Statistics.read(path)
        except (OSError, ValueError) as error:
            raise AlexNetError(f"{path}: can't be read ({reason(error)}): prepare it again") from error
        if statistics.mean_image.shape != self.image_shape:
            raise AlexNetError(f"{path}: its mean image is {statistics.mean_image.shape}, not {self.image_shape}")
        return statistics

    def examples(self, split: str, indices: np.ndarray) -> Split:
        """Examples of a split, in the order of `indices`: at least one, at most a few thousand (all are decoded)."""
        found = _Examples(self[split], indices, self.description["size"])
        images, labels = zip(*(found[place] for place in range(len(indices))), strict=True)
        return Split(np.stack(images), np.array(labels, np.int32))

    def sample(self, count: int) -> Split:
        """At most 64 training images, evenly spread over all: for plots and measurements."""
        number = len(self["train"])
        return self.examples("train", np.linspace(0, number - 1, min(count, 64, number)).astype(int))

    def verify(self) -> None:
        """Compares every shard with its SHA-256; reads all of them.

        Raises:
          AlexNetError: a shard is damaged; the message names the first.
        """
        for files in self.description["shards"].values():
            for file in files:
                with (self.folder / file["name"]).open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                        raise AlexNetError(f"{self.folder / file['name']} is damaged (SHA-256): prepare it again")

    def resident(self) -> None:
        """Nothing stays on the devices."""

    @staticmethod
    def fetch(resident: None, call: Batch) -> Batch:
        """The call's own examples."""
        return call

    def calls(
        self, seed: int, epoch: int, batch_size: int, placement: Placement, first: int, length: Callable[[int], int]
    ) -> Iterator[Batch]:
        """The images of each step; always one step in a call."""
        order = epoch_order(seed, epoch, len(self["train"]))
        for batch in self._stream("train", order, batch_size, placement, first):
            yield Batch(*(array[:, None] for array in batch))

    def batches(self, split: str, batch_size: int, placement: Placement) -> Iterator[Batch]:
        """One pass over a split in the order of its files."""
        return self._stream(split, np.arange(len(self[split])), batch_size, placement, 0)

    def _stream(
        self, split: str, order: np.ndarray, batch_size: int, placement: Placement, first: int
    ) -> Iterator[Batch]:
        """Images in a given order from batch `first` on, read and decoded before they are needed.

        Raises:
          AlexNetError: a record is damaged, or there is not enough shared memory for the worker processes.
        """
        layout = batches(order, batch_size, placement.num_devices).part(first, len(order)).of_devices(placement.rows)
        indices, masks = layout.indices.swapaxes(0, 1), layout.mask.swapaxes(0, 1)  # [K, d, B / D]
        if not len(indices):
            return
        examples = _Examples(self[split], indices.reshape(-1), self.description["size"])
        # Batches first, so that threads and processes take turns with whole batches.
        loader = (
            grain.MapDataset.source(examples)
            .batch(indices[0].size)
            .to_iter_dataset(grain.ReadOptions(THREADS, THREADS))
        )
        if self.workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # Grain reads its profiling flags
            ahead = min(self.workers * (THREADS + WORKER_BUFFER), len(indices))  # batches that wait to be used
            require_shared_memory(self.workers, ahead * indices[0].size * math.prod(self.image_shape))
            loader = loader.mp_prefetch(grain.MultiprocessingOptions(self.workers, WORKER_BUFFER))
        try:
            for (images, labels), mask in zip(loader, masks, strict=True):
                yield Batch(images.reshape(*mask.shape, *self.image_shape), labels.reshape(mask.shape), mask)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise AlexNetError(
                f"--loader-workers {self.workers}: a worker process was killed; memory or /dev/shm is too small: use "
                "fewer or --loader-workers 0, or enlarge /dev/shm (docker run --shm-size)"
            ) from error


def open_prepared(folder: pathlib.Path, loader_workers: int = 0) -> StreamedDataset:
    """Opens a folder written by `alexnet_jax.data.prepare`; checks the sizes of its files, not their contents.

    Raises:
      AlexNetError: it is missing, incomplete or changed, or array_record is not installed.
    """
    require_array_record()
    path = folder / "dataset.json"
    try:
        description = json.loads(read_bytes(path, _MAX_JSON_BYTES))
        files: Sequence[Mapping[str, Any]] = [f for group in description["shards"].values() for f in group]
        names = [(str(f["name"]), int(f["bytes"]), int(f["records"])) for f in files]
        complete = {"source", "size", "store", "classes", "fingerprint"} <= description.keys()
        if not complete or "train" not in description["shards"]:
            raise ValueError("an entry is missing")
    except FileNotFoundError:
        raise AlexNetError(
            f"{folder} contains no prepared images: python -m alexnet_jax.data.prepare imagenet --source DIR --out "
            f"{folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AlexNetError(f"{path}: damaged ({type(error).__name__}: {error}): prepare it again") from error
    for name, size, _ in names:
        shard = folder / name
        if not shard.is_file() or shard.stat().st_size != size:
            raise AlexNetError(f"{shard} is missing or its size has changed (from {size:,} bytes): prepare it again")
    return StreamedDataset(folder, description, loader_workers)
