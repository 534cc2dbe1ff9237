"""CIFAR-10 as its authors publish it (https://www.cs.toronto.edu/~kriz/cifar.html): six batches, binary or pickled.

They are read from a folder or from an archive. An archive is read into memory: nothing is extracted, no link is
followed. The standard library parses the headers of a tar file (`tarfile.TarInfo.frombuf`), one block at a time; the
rest of `tarfile` is not used, as it follows links, builds sparse files and reads extended headers of any size.
"""

import contextlib
import dataclasses
import gzip
import os
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import numpy as np

from alexnet_jax.data import pickles
from alexnet_jax.data.dataset import Split
from alexnet_jax.errors import AlexNetError, reason, shown

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
RECORDS_PER_BATCH = 10_000
IMAGE_SHAPE = (32, 32, 3)

# Each layout has a file with these names. It may be missing, because the meaning of the labels is fixed.
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# In order of preference; those without .gz were decompressed.
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-10-binary.tar", "cifar-10-python.tar")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
WHICH_TO_USE = "use cifar-10-python.tar.gz or cifar-10-binary.tar.gz"

MAX_ARCHIVE_BYTES = 512 * 1024**2  # unpacked; the published archives have 184 and 186 million bytes
_MAX_MEMBERS = 10_000
_GLANCE_BYTES = 1024**2

_PIXEL_BYTES = 3 * 32 * 32  # a plane of red, one of green, one of blue, each row by row
_RECORD_BYTES = 1 + _PIXEL_BYTES  # the label first
_CIFAR_100_RECORD_BYTES = 2 + _PIXEL_BYTES

# A published batch has about 31 million bytes; rewritten by Python 3 in protocol 2, with pixels as UTF-8, it has 46
# million.
_MAX_PICKLE_BYTES = 64 * 1024**2


# Batches


@dataclasses.dataclass(frozen=True)
class Layout:
    """The file format of a batch.

    Attributes:
      folder: its published name.
      suffix: what follows the name of the batch in a file's name.
      check_size: takes a file's size in bytes and its number of records; ValueError says what is wrong.
      parse: takes a file's contents and its number of records; ValueError says what is wrong.
    """

    folder: str
    suffix: str
    check_size: Callable[[int, int], None]
    parse: Callable[[bytes, int], Split]


def _check_binary_size(size: int, records: int) -> None:
    if size == records * _CIFAR_100_RECORD_BYTES:
        raise ValueError(
            "it has records of 3,074 bytes, as CIFAR-100 has, instead of 3,073: did you mean --dataset cifar100?"
        )
    if size != records * _RECORD_BYTES:
        fault = "truncated" if size < records * _RECORD_BYTES else "too long"
        raise ValueError(f"{fault}: {size:,} bytes instead of {records * _RECORD_BYTES:,}")


def _parse_binary(data: bytes, records: int) -> Split:
    """Records of a label byte and 3,072 bytes of pixels in planes."""
    _check_binary_size(len(data), records)
    rows = np.frombuffer(data, np.uint8).reshape(records, _RECORD_BYTES)
    return to_split(rows[:, 1:], rows[:, 0])


def _check_pickle_size(size: int, records: int) -> None:
    if size > _MAX_PICKLE_BYTES:
        raise ValueError(f"too long: {size:,} bytes instead of at most {_MAX_PICKLE_BYTES:,}")


def _parse_pickle(data: bytes, records: int) -> Split:
    """A dict of an array b"data" uint8 [records, 3072], pixels in planes, and a list b"labels"."""
    try:
        content = pickles.loads(data)
    except Exception as error:  # a damaged file causes errors of many kinds
        raise ValueError(f"truncated, or no pickle of a CIFAR-10 batch ({reason(error)})") from error
    match content:
        case {b"fine_labels": _}:
            raise ValueError("it has CIFAR-100's labels: --dataset cifar100 reads them")
        case {b"data": pickles.PickledArray(values=np.ndarray() as pixels), b"labels": list(labels)}:
            pass
        case _:
            raise ValueError("not a dictionary with an array b'data' and a list b'labels'")
    if pixels.shape != (records, _PIXEL_BYTES) or pixels.dtype != np.uint8:
        raise ValueError(
            f"b'data' is {pixels.dtype} of shape {pixels.shape} instead of uint8 of {(records, _PIXEL_BYTES)}"
        )
    if len(labels) != records:
        raise ValueError(f"b'labels' has {len(labels):,} labels instead of {records:,}")
    for record, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"record {record} has a {type(label).__name__} as label")
    return to_split(pixels, np.array(labels))


def to_split(pixels: np.ndarray, labels: np.ndarray, num_classes: int = len(CLASS_NAMES)) -> Split:
    """Checks labels [N]; turns planes [N, 3072] into images [N, 32, 32, 3].

    Raises:
      ValueError: a label is not that of a class.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        label = shown(str(labels[wrong[0]]))
        raise ValueError(f"record {wrong[0]} has label {label} instead of 0 to {num_classes - 1}")
    planes = pixels.reshape(-1, 3, 32, 32)
    return Split(images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels=labels.astype(np.int32))


BINARY = Layout("cifar-10-batches-bin", ".bin", _check_binary_size, _parse_binary)
PICKLES = Layout("cifar-10-batches-py", "", _check_pickle_size, _parse_pickle)
LAYOUTS = (BINARY, PICKLES)  # in order of preference: the binary one leaves nothing to interpret

_FILES = {f"{batch}{layout.suffix}": (layout, batch) for layout in LAYOUTS for batch in BATCHES}


# Folders


def find_batches(place: pathlib.Path) -> tuple[pathlib.Path, Layout] | None:
    """The folder with the batches: `place` itself, whatever its name, or a folder in it with a published name.

    A folder with a published name counts even if it has no batch: reading it then reports what is missing.
    """
    folders = [(folder, layout) for folder in (place, *(place / each.folder for each in LAYOUTS)) for layout in LAYOUTS]
    for folder, layout in folders:
        if any(os.path.lexists(folder / f"{batch}{layout.suffix}") for batch in BATCHES):
            return folder, layout
    for folder, layout in folders:
        if folder.name == layout.folder and os.path.isdir(folder):
            return folder, layout
    return None


def read_folder(folder: pathlib.Path, layout: Layout, records: int) -> list[Split]:
    """Reads the six batches, in the order of `BATCHES`.

    Raises:
      AlexNetError: a file is missing, can't be read or isn't as published.
    """
    parts = []
    for batch in BATCHES:
        path = folder / f"{batch}{layout.suffix}"
        try:
            parts.append(_read_file(path, layout, records))
        except ValueError as error:
            raise AlexNetError(f"{path}: {error}; extract the published archive again") from error
        except FileNotFoundError as error:
            raise AlexNetError(f"{path}: missing; extract the published archive again") from error
        except OSError as error:
            raise AlexNetError(
                f"{path}: can't be read ({reason(error)}); check the file and its permissions"
            ) from error
    return parts


def _read_file(path: pathlib.Path, layout: Layout, records: int) -> Split:
    if path.is_fifo():
        raise OSError("it is a pipe")  # opening it would wait for a writer
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        if head and (other := other_kind(head)):
            raise ValueError(other)
        layout.check_size(size, records)
        return layout.parse(head + file.read(size - len(head)), records)


# Archives


def read_archive(path: pathlib.Path, records: int) -> list[Split]:
    """Reads a `.tar.gz` or `.tar` of any name; if it has several folders, the first that contains a batch.

    Returns:
      The six batches, in the order of `BATCHES`.

    Raises:
      AlexNetError: it is damaged, incomplete, or not an archive of CIFAR-10.
    """
    with archive_errors(path, WHICH_TO_USE):
        try:
            with open_tar(path, MAX_ARCHIVE_BYTES) as tar:
                parts = _read_members(tar, records)
                tar.drain()  # the checksum of gzip is at the end
        except NotAnArchiveError as error:
            if path.name in _FILES:
                raise AlexNetError(f"{path}: this is one of six batches; set --data-dir to its folder") from error
            version = other_version({path.name: os.path.getsize(path)})
            raise ValueError(error.kind or version or str(error)) from error
    return [parts[batch] for batch in BATCHES]


@contextlib.contextmanager
def archive_errors(path: pathlib.Path, which_to_take: str) -> Iterator[None]:
    """Turns the errors of reading an archive into an AlexNetError that says which file to take instead."""
    try:
        yield
    except EOFError as error:
        raise AlexNetError(f"{path}: truncated; delete it and download it again") from error
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise AlexNetError(f"{path}: damaged, or not a tar archive ({reason(error)}); {which_to_take}") from error
    except ValueError as error:
        raise AlexNetError(f"{path}: {error}; {which_to_take}") from error
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)}); check the file") from error


class NotAnArchiveError(ValueError):
    """A file is neither a gzip nor a tar file; `kind` says what it is instead, if that is known."""

    def __init__(self, kind: str | None) -> None:
        super().__init__(kind or "this is neither a gzip nor a tar file")
        self.kind = kind


def holds_cifar10(path: pathlib.Path) -> bool:
    """Whether the first MB of an archive contains a batch of CIFAR-10."""
    try:
        with open_tar(path, _GLANCE_BYTES) as tar:
            return any(member.name.rpartition("/")[2] in _FILES for member in tar.members())
    except (EOFError, OSError, ValueError, zlib.error, tarfile.TarError, AlexNetError):
        return False


def _read_members(tar: "Tar", records: int) -> dict[str, Split]:
    parts: dict[str, Split] = {}
    sizes: dict[str, int] = {}
    home = None
    for member in tar.members():
        folder, _, name = member.name.rpartition("/")
        sizes |= dict.fromkeys(folder.split("/"), 0) | {name: member.size}
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name not in _FILES:
            continue
        layout, batch = _FILES[name]
        home = home or (folder, layout)
        if home != (folder, layout):
            continue
        if batch in parts:
            raise ValueError(f"it contains {shown(member.name)} twice")
        try:
            layout.check_size(member.size, records)
            data = tar.read(member.size)
            if len(data) < member.size:
                raise EOFError
            parts[batch] = layout.parse(data, records)
        except ValueError as error:
            raise ValueError(f"{shown(member.name)}: {error}") from error
    if not parts:
        raise ValueError(other_version(sizes) or "it is not an archive of CIFAR-10: it contains no data_batch_1")
    if missing := [batch for batch in BATCHES if batch not in parts]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return parts


@contextlib.contextmanager
def open_tar(path: pathlib.Path, limit: int) -> Iterator["Tar"]:
    """Opens an archive, of which at most `limit` decompressed bytes are read.

    Raises:
      NotAnArchiveError: it is something else.
    """
    if not os.path.isfile(path):
        raise OSError("it is not a regular file")  # opening a pipe would wait for a writer
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield Tar(unpacked, limit)
        elif _is_tar_header(head):
            yield Tar(file, limit)
        else:
            raise NotAnArchiveError(other_kind(head))


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


class Tar:
    """A decompressed tar file, read once from beginning to end, and refused after `limit` bytes."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, limit: int) -> None:
        self._file, self._limit, self._position = file, limit, 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        data = self._file.read(size)
        self._position += len(data)
        if self._position > self._limit:
            raise ValueError(f"it unpacks to more than {self._limit:,} bytes")
        return data

    def members(self) -> Iterator[tarfile.TarInfo]:
        """The header of each member; its data can be read before the next header is requested."""
        links_and_devices = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        for _ in range(_MAX_MEMBERS):
            header = self.read(tarfile.BLOCKSIZE)
            if not header.strip(b"\0"):  # the mark of the end, or the end
                return
            if len(header) < tarfile.BLOCKSIZE:
                raise EOFError
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if member.size < 0 or member.type == tarfile.GNUTYPE_SPARSE:
                raise ValueError(f"{shown(member.name)} is a sparse file, or has no size")
            has_data = member.type not in (*links_and_devices, tarfile.DIRTYPE)  # whatever its size
            blocks = -(-member.size // tarfile.BLOCKSIZE) if has_data else 0
            end = self._position + blocks * tarfile.BLOCKSIZE
            yield member
            while self._position < end:
                if not self.read(min(end - self._position, 1024**2)):
                    raise EOFError
        raise ValueError(f"it has more than {_MAX_MEMBERS:,} members")

    def drain(self) -> None:
        """Reads the bytes after the last member."""
        while self.read(1024**2):
            pass


# Other files


def other_version(sizes: Mapping[str, int]) -> str | None:
    """Which other data set a folder or an archive contains, if choosing it is a known mistake.

    Args:
      sizes: file name without folders -> bytes; folder name -> 0.
    """
    if (
        any(name.lower().startswith("cifar-100") for name in sizes)
        or len({"train", "test", "meta"} & {name for name, size in sizes.items() if size}) >= 2
        or any(size % _CIFAR_100_RECORD_BYTES == 0 for name in ("train.bin", "test.bin") if (size := sizes.get(name)))
    ):
        return "this is CIFAR-100, which --dataset cifar100 reads"
    if "cifar-10-batches-mat" in sizes or any(f"{batch}.mat" in sizes for batch in BATCHES):
        return "this is the MATLAB version of CIFAR-10, which is not supported"
    return None


def other_kind(head: bytes) -> str | None:
    """Which kind of file begins with `head`, if choosing it is a known mistake."""
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.startswith(b"PK"):
        return "this is a zip file"
    return None
