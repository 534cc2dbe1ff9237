"""ImageNet as `alexnet_jax.data.prepare` leaves it: shards on disk, streamed with Grain."""

import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import absl.flags
import grain
import numpy as np

from alexnet_jax.data import decode
from alexnet_jax.data.batches import batches, epoch_order
from alexnet_jax.data.dataset import Split
from alexnet_jax.data.statistics import PcaBasis, Statistics
from alexnet_jax.errors import AlexNetError
from alexnet_jax.files import read_bytes
from alexnet_jax.runtime import require_array_record, require_shared_memory

THREADS = 8  # that decode a batch each
WORKER_BUFFER = 2  # batches that a process has ready besides
_MAX_JSON_BYTES = 64 * 1024**2
_MAX_STATISTICS_BYTES = 64 * 1024**2


class StreamedBatch(NamedTuple):
    """A batch, or a process's share of it, laid out over its devices.

    Attributes:
      images: uint8 [D, B / D, S, S, 3].
      labels: int32 [D, B / D].
      mask: bool [D, B / D], False for padding.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


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
    """Pixels and labels of records in a given order, for Grain's random access; goes to worker processes."""

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
            pixels, label = decode.read(self._records[index], self._size)
        except Exception as error:  # the reader of array_record has errors of its own
            starts = np.cumsum((0, *self._shards.counts))
            path = self._shards.paths[int(np.searchsorted(starts, index, side="right")) - 1]
            raise AlexNetError(f"{path} is damaged: prepare it again") from error
        return pixels, np.int32(label)


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """A prepared data set, read as it is needed.

    Attributes:
      folder: that `alexnet_jax.data.prepare` has written.
      description: its dataset.json.
    """

    folder: pathlib.Path
    description: Mapping[str, Any]
    name: str = "imagenet"

    @property
    def source(self) -> str:
        """Where the images came from, to show."""
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
        """The parts by name: "train" and, if it was there, "validation"."""
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
            data = io.BytesIO(read_bytes(path, _MAX_STATISTICS_BYTES))
            if sum(member.file_size for member in zipfile.ZipFile(data).infolist()) > _MAX_STATISTICS_BYTES:
                raise ValueError("it unpacks to too much")
            with np.load(data, allow_pickle=False) as file:
                basis = PcaBasis(**{field.name: file[field.name] for field in dataclasses.fields(PcaBasis)})
                statistics = Statistics(basis, file["mean_image"])
        except Exception as error:  # a damaged archive raises errors of many kinds
            raise AlexNetError(f"{path}: can't be read; prepare it again") from error
        if statistics.mean_image.shape != self.image_shape:
            raise AlexNetError(f"{path}: its mean image is {statistics.mean_image.shape}, not {self.image_shape}")
        return statistics

    def examples(self, split: str, indices: np.ndarray) -> Split:
        """Those of a split, in the order of `indices`, at least one; some thousand at most, as all are decoded."""
        found = _Examples(self[split], indices, self.description["size"])
        images, labels = zip(*(found[place] for place in range(len(indices))), strict=True)
        return Split(np.stack(images), np.array(labels, np.int32))

    def sample(self, count: int) -> Split:
        """Training images spread over all of them, at most 64: to draw and to measure on."""
        number = len(self["train"])
        return self.examples("train", np.linspace(0, number - 1, min(count, 64, number)).astype(int))

    def verify(self) -> None:
        """Compares every shard with its SHA-256; reads all of them.

        Raises:
          AlexNetError: naming the first that is not what was written.
        """
        for files in self.description["shards"].values():
            for file in files:
                with (self.folder / file["name"]).open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                        raise AlexNetError(f"{self.folder / file['name']} is damaged (SHA-256): prepare it again")

    def stream(
        self,
        split: str,
        seed: int,
        epoch: int | None,
        batch_size: int,
        num_devices: int,
        first_batch: int = 0,
        share: tuple[int, int] = (0, 1),
        workers: int = 0,
    ) -> Iterator[StreamedBatch]:
        """One pass over a split, from a batch on.

        The order is `epoch_order(seed, epoch, N)`, a function of these alone, so a stream resumes at any batch without
        a saved state. The last batch is padded as by `batches.batches`.

        Args:
          split: its name.
          seed: of the run; decides the order.
          epoch: decides it too; None is the order of the files.
          batch_size: B of the GLOBAL batch, a multiple of `num_devices` times the number of processes.
          num_devices: D, of this process.
          first_batch: how many batches to leave out.
          share: (i, n): this is process i of n, and gets the i-th part of each batch.
          workers: processes that decode; 0: threads of this one. Changes nothing in what comes out.

        Raises:
          AlexNetError: a record is damaged, or there is not enough shared memory for `workers`.
        """
        shards = self[split]
        order = np.arange(len(shards)) if epoch is None else epoch_order(seed, epoch, len(shards))
        process, processes = share
        layout = batches(order, batch_size, num_devices * processes).part(first_batch, len(order))
        rows = slice(process * num_devices, (process + 1) * num_devices)
        indices, masks = layout.indices[rows].swapaxes(0, 1), layout.mask[rows].swapaxes(0, 1)  # [K, D, B / D]
        if not len(indices):
            return
        examples = _Examples(shards, indices.reshape(-1), self.description["size"])
        # Batches first: threads and processes then take whole ones in turn.
        loader = (
            grain.MapDataset.source(examples)
            .batch(indices[0].size)
            .to_iter_dataset(grain.ReadOptions(THREADS, THREADS))
        )
        if workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # Grain asks them about profiling
            ahead = min(workers * (THREADS + WORKER_BUFFER), len(indices))  # batches that are made before their use
            require_shared_memory(workers, ahead * indices[0].size * math.prod(self.image_shape))
            loader = loader.mp_prefetch(grain.MultiprocessingOptions(workers, WORKER_BUFFER))
        try:
            for (images, labels), mask in zip(loader, masks, strict=True):
                yield StreamedBatch(images.reshape(*mask.shape, *self.image_shape), labels.reshape(mask.shape), mask)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise AlexNetError(
                f"--loader-workers {workers}: a process was killed, as memory or /dev/shm is too small: use fewer or "
                "--loader-workers 0, or enlarge /dev/shm (docker run --shm-size)"
            ) from error


def open_prepared(folder: pathlib.Path) -> ImageNet:
    """Opens what `alexnet_jax.data.prepare` has written; sizes of files are checked, `ImageNet.verify` reads them.

    Raises:
      AlexNetError: it is not there, not whole, or not what was written; or array_record is not installed.
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
            f"{folder} holds no prepared ImageNet: python -m alexnet_jax.data.prepare imagenet --source DIR "
            f"--out {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AlexNetError(f"{path}: not what was written ({type(error).__name__}: {error})") from error
    for name, size, _ in names:
        shard = folder / name
        if not shard.is_file() or shard.stat().st_size != size:
            raise AlexNetError(f"{shard} is missing or not as long as it was ({size:,} bytes): prepare it again")
    return ImageNet(folder, description)
