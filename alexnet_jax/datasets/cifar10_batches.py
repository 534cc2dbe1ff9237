"""CIFAR-10 in the two layouts that its authors publish (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from alexnet_jax.config import shown
from alexnet_jax.datasets import cifar10_pickle
from alexnet_jax.datasets.dataset import Split
from alexnet_jax.errors import AlexNetError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # TFDS registers its size and SHA-256
BINARY_FOLDER = "cifar-10-batches-bin"
PICKLE_FOLDER = "cifar-10-batches-py"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"

RECORDS_PER_BATCH = 10_000
IMAGE_SHAPE = (32, 32, 3)

# Each layout has a file with the names, but the labels never mean anything else: so that file need not be there.
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PIXEL_BYTES = 3 * 32 * 32  # a plane of red, one of green, one of blue, each row by row
RECORD_BYTES = 1 + _PIXEL_BYTES  # the label first

# A published batch has about 31 million bytes; written again by Python 3 in protocol 2, pixels as UTF-8, 46 million.
_MAX_PICKLE_BYTES = 64 * 1024**2

_REMEDY = "extract the published archive again"


def find(place: pathlib.Path) -> pathlib.Path | None:
    """The folder of published batches that `place` is or directly holds, the binary one first; None without one."""
    for folder in _READERS:
        if place.name == folder:
            return place
        if os.path.isdir(place / folder):
            return place / folder
    return None


def read(folder: pathlib.Path, records_per_batch: int = RECORDS_PER_BATCH) -> tuple[Split, Split]:
    """Reads a folder that `find` found.

    Returns:
      The published training images (5 batches) and test images (1 batch), in the published order.

    Raises:
      AlexNetError: a file is missing, can't be read or isn't what was published.
    """
    read_batch = _READERS[folder.name]
    parts = [read_batch(folder, batch, records_per_batch) for batch in TRAIN_BATCHES]
    train = Split(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )
    return train, read_batch(folder, TEST_BATCH, records_per_batch)


def parse_binary(data: bytes, records: int, file: str) -> Split:
    """Takes apart `records` binary records: a label byte, then 3,072 bytes of pixels in planes.

    Raises:
      AlexNetError: the size or a label is wrong; the message names `file`.
    """
    if len(data) != records * RECORD_BYTES:
        fault = "truncated" if len(data) < records * RECORD_BYTES else "too long"
        raise AlexNetError(f"{file}: {fault}: {len(data):,} bytes instead of {records * RECORD_BYTES:,}; {_REMEDY}")
    rows = np.frombuffer(data, np.uint8).reshape(records, RECORD_BYTES)
    return _split(rows[:, 1:], rows[:, 0], file)


def _read_binary(folder: pathlib.Path, batch: str, records: int) -> Split:
    path = folder / f"{batch}.bin"
    return parse_binary(_read_file(path, records * RECORD_BYTES), records, str(path))


def _read_pickle(folder: pathlib.Path, batch: str, records: int) -> Split:
    path = folder / batch
    data = _read_file(path, _MAX_PICKLE_BYTES)
    try:
        content = cifar10_pickle.loads(data)
    except Exception as error:
        reason = shown(str(error) or type(error).__name__, 200)  # the text can come from the file
        raise AlexNetError(f"{path}: truncated, or no pickle of a CIFAR-10 batch ({reason}); {_REMEDY}") from error

    match content:
        case {b"data": cifar10_pickle.PickledArray(values=np.ndarray() as pixels), b"labels": list(labels)}:
            pass
        case _:
            raise AlexNetError(f"{path}: not a dictionary with an array b'data' and a list b'labels'; {_REMEDY}")
    if pixels.shape != (records, _PIXEL_BYTES):
        raise AlexNetError(f"{path}: b'data' has shape {pixels.shape} instead of {(records, _PIXEL_BYTES)}; {_REMEDY}")
    if len(labels) != records:
        raise AlexNetError(f"{path}: b'labels' has {len(labels):,} labels instead of {records:,}; {_REMEDY}")
    for record, label in enumerate(labels):
        if type(label) is not int:
            raise AlexNetError(f"{path}: record {record} has a {type(label).__name__} as label; {_REMEDY}")
    return _split(pixels, np.array(labels), str(path))


_READERS: dict[str, Callable[[pathlib.Path, str, int], Split]] = {
    BINARY_FOLDER: _read_binary,  # preferred: nothing to interpret
    PICKLE_FOLDER: _read_pickle,
}


def _read_file(path: pathlib.Path, limit: int) -> bytes:
    try:
        if path.is_fifo():
            raise OSError("it is a pipe")  # opening it would wait for a writer
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise AlexNetError(f"{path}: too long: {size:,} bytes instead of at most {limit:,}; {_REMEDY}")
            return file.read(limit)
    except FileNotFoundError as error:
        raise AlexNetError(f"{path}: missing; {_REMEDY}") from error
    except OSError as error:
        raise AlexNetError(
            f"{path}: can't be read ({error.strerror or error}); check the file and its rights"
        ) from error


def _split(pixels: np.ndarray, labels: np.ndarray, file: str) -> Split:
    """Checks the labels and turns planes [N, 3072] into images [N, 32, 32, 3]."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASS_NAMES)))
    if len(wrong):
        raise AlexNetError(f"{file}: record {wrong[0]} has label {labels[wrong[0]]} instead of 0 to 9; {_REMEDY}")
    planes = pixels.reshape(-1, 3, 32, 32)
    return Split(images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels=labels.astype(np.int32))
