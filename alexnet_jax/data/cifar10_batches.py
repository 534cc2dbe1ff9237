"""CIFAR-10 in the two layouts that its authors publish (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from alexnet_jax.data import pickles
from alexnet_jax.data.dataset import Split
from alexnet_jax.errors import AlexNetError, shown

TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)

RECORDS_PER_BATCH = 10_000
IMAGE_SHAPE = (32, 32, 3)

# Each layout has a file with the names, but the labels never mean anything else: so that file need not be there.
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PIXEL_BYTES = 3 * 32 * 32  # a plane of red, one of green, one of blue, each row by row
RECORD_BYTES = 1 + _PIXEL_BYTES  # the label first
_CIFAR_100_RECORD_BYTES = 2 + _PIXEL_BYTES

# A published batch has about 31 million bytes; written again by Python 3 in protocol 2, pixels as UTF-8, 46 million.
_MAX_PICKLE_BYTES = 64 * 1024**2

_REMEDY = "extract the published archive again"
WHICH_TO_TAKE = "take cifar-10-python.tar.gz or cifar-10-binary.tar.gz"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the six batches are stored.

    Attributes:
      folder: its published name.
      suffix: of each file, after the name of the batch.
      check_size: from a file's size and its number of records; ValueError says what is wrong, before it is read.
      parse: from a file's content and its number of records to images and labels; ValueError says what is wrong.
    """

    folder: str
    suffix: str
    check_size: Callable[[int, int], None]
    parse: Callable[[bytes, int], Split]


def parse_binary(data: bytes, records: int) -> Split:
    """Parses `records` binary records: a label byte, then 3,072 bytes of pixels in planes.

    Raises:
      ValueError: the size or a label is wrong.
    """
    _check_binary_size(len(data), records)
    rows = np.frombuffer(data, np.uint8).reshape(records, RECORD_BYTES)
    return _split(rows[:, 1:], rows[:, 0])


def parse_pickle(data: bytes, records: int) -> Split:
    """Parses a pickled dictionary with `records` rows of pixels and as many labels; nothing in it is ever executed.

    Raises:
      ValueError: it is not such a dictionary, or a label is wrong.
    """
    try:
        content = pickles.loads(data)
    except Exception as error:
        reason = shown(str(error) or type(error).__name__, 200)  # the text can come from the file
        raise ValueError(f"truncated, or no pickle of a CIFAR-10 batch ({reason})") from error

    match content:
        case {b"fine_labels": _}:
            raise ValueError("it has CIFAR-100's labels, which can't be read")
        case {b"data": pickles.PickledArray(values=np.ndarray() as pixels), b"labels": list(labels)}:
            pass
        case _:
            raise ValueError("not a dictionary with an array b'data' and a list b'labels'")
    if pixels.shape != (records, _PIXEL_BYTES):
        raise ValueError(f"b'data' has shape {pixels.shape} instead of {(records, _PIXEL_BYTES)}")
    if len(labels) != records:
        raise ValueError(f"b'labels' has {len(labels):,} labels instead of {records:,}")
    for record, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"record {record} has a {type(label).__name__} as label")
    return _split(pixels, np.array(labels))


def _check_binary_size(size: int, records: int) -> None:
    if size == records * _CIFAR_100_RECORD_BYTES:
        raise ValueError("it has records of 3,074 bytes, as CIFAR-100 has, instead of 3,073")
    if size != records * RECORD_BYTES:
        fault = "truncated" if size < records * RECORD_BYTES else "too long"
        raise ValueError(f"{fault}: {size:,} bytes instead of {records * RECORD_BYTES:,}")


def _check_pickle_size(size: int, records: int) -> None:
    if size > _MAX_PICKLE_BYTES:
        raise ValueError(f"too long: {size:,} bytes instead of at most {_MAX_PICKLE_BYTES:,}")


def _split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    """Checks the labels and turns planes [N, 3072] into images [N, 32, 32, 3]."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASS_NAMES)))
    if len(wrong):
        raise ValueError(f"record {wrong[0]} has label {labels[wrong[0]]} instead of 0 to 9")
    planes = pixels.reshape(-1, 3, 32, 32)
    return Split(images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels=labels.astype(np.int32))


BINARY = Layout("cifar-10-batches-bin", ".bin", _check_binary_size, parse_binary)
PICKLES = Layout("cifar-10-batches-py", "", _check_pickle_size, parse_pickle)
LAYOUTS = (BINARY, PICKLES)  # in order of preference: in the binary one there is nothing to interpret


def find(place: pathlib.Path) -> tuple[pathlib.Path, Layout] | None:
    """The folder of batches that `place` is, under any name, or that it holds under a published name.

    A folder with a published name counts even if it holds no batch: reading it then says what is missing.
    """
    folders = [place, *(place / layout.folder for layout in LAYOUTS)]
    for folder in folders:
        for layout in LAYOUTS:
            if any(os.path.lexists(folder / f"{batch}{layout.suffix}") for batch in BATCHES):
                return folder, layout
    for folder in folders:
        for layout in LAYOUTS:
            if folder.name == layout.folder and os.path.isdir(folder):
                return folder, layout
    return None


def read(folder: pathlib.Path, layout: Layout, records: int = RECORDS_PER_BATCH) -> tuple[Split, Split]:
    """Reads a folder that `find` found.

    Returns:
      The published training images (5 batches) and test images (1 batch), in the published order.

    Raises:
      AlexNetError: a file is missing, can't be read or isn't what was published.
    """
    parts = {}
    for batch in BATCHES:
        path = folder / f"{batch}{layout.suffix}"
        try:
            parts[batch] = _read_batch(path, layout, records)
        except ValueError as error:
            raise AlexNetError(f"{path}: {error}; {_REMEDY}") from error
        except FileNotFoundError as error:
            raise AlexNetError(f"{path}: missing; {_REMEDY}") from error
        except OSError as error:
            reason = error.strerror or error
            raise AlexNetError(f"{path}: can't be read ({reason}); check the file and its rights") from error
    return join(parts)


def join(parts: Mapping[str, Split]) -> tuple[Split, Split]:
    """The training images of five batches in one, and the test images."""
    train = [parts[batch] for batch in TRAIN_BATCHES]
    images = np.concatenate([part.images for part in train])
    return Split(images, np.concatenate([part.labels for part in train])), parts[TEST_BATCH]


def other_version(sizes: Mapping[str, int]) -> str | None:
    """What a folder or an archive holds in place of batches, where that is a known mistake.

    Args:
      sizes: in bytes, of each file in it, by its name without folders; 0 for a folder.
    """
    if (
        any(name.lower().startswith("cifar-100") for name in sizes)
        or len({"train", "test", "meta"} & {name for name, size in sizes.items() if size}) >= 2
        or any(size % _CIFAR_100_RECORD_BYTES == 0 for name in ("train.bin", "test.bin") if (size := sizes.get(name)))
    ):
        return "this is CIFAR-100, which can't be read yet"
    if "cifar-10-batches-mat" in sizes or any(f"{batch}.mat" in sizes for batch in BATCHES):
        return "this is the MATLAB version of CIFAR-10, which can't be read"
    return None


def what_it_is(head: bytes) -> str | None:
    """What a file is by its first bytes, where that is a known mistake."""
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "this is a pointer of Git LFS, not the file itself (`git lfs pull` gets it)"
    if head.startswith(b"PK"):
        return "this is a zip file"
    return None


def _read_batch(path: pathlib.Path, layout: Layout, records: int) -> Split:
    if path.is_fifo():
        raise OSError("it is a pipe")  # opening it would wait for a writer
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        if head and (other := what_it_is(head)):
            raise ValueError(other)
        layout.check_size(size, records)
        return layout.parse(head + file.read(size - len(head)), records)
