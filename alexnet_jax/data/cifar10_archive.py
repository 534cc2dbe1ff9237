"""CIFAR-10 in an archive as its authors publish it, read into memory: nothing is extracted, no link is followed.

The headers of the tar file are parsed by the standard library (`tarfile.TarInfo.frombuf`), one block at a time. The
rest of `tarfile` is not used: it follows links, builds sparse files and reads extended headers of any size.
"""

import contextlib
import gzip
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from alexnet_jax.data.cifar10_batches import (
    BATCHES,
    LAYOUTS,
    RECORDS_PER_BATCH,
    WHICH_TO_TAKE,
    join,
    other_version,
    what_it_is,
)
from alexnet_jax.data.dataset import Split
from alexnet_jax.errors import AlexNetError, shown

# Published names, in order of preference; the same without .gz was unpacked.
NAMES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-10-binary.tar", "cifar-10-python.tar")
SUFFIXES = (".tar.gz", ".tgz", ".tar")
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")

_MAX_BYTES = 512 * 1024**2  # unpacked; the published archives have 184 and 186 million bytes
_MAX_MEMBERS = 10_000
_GLANCE_BYTES = 1024**2

_WANTED = {f"{batch}{layout.suffix}": (layout, batch) for layout in LAYOUTS for batch in BATCHES}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_WITHOUT_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE),
)


def read(path: pathlib.Path, records: int = RECORDS_PER_BATCH) -> tuple[Split, Split]:
    """Reads a `.tar.gz` or `.tar` under any name; of several folders in it, the first that holds a batch.

    Returns:
      The published training images (5 batches) and test images (1 batch), in the published order.

    Raises:
      AlexNetError: it is damaged, incomplete, or no archive of CIFAR-10.
    """
    parts: dict[str, Split] = {}
    sizes: dict[str, int] = {}
    home = None
    try:
        with _unpacked(path, _MAX_BYTES) as stream:
            for member in stream.members():
                folder, _, name = member.name.rpartition("/")
                sizes |= dict.fromkeys(folder.split("/"), 0) | {name: member.size}
                if member.type not in _REGULAR or name not in _WANTED:
                    continue
                layout, batch = _WANTED[name]
                home = home or (folder, layout)
                if home != (folder, layout):
                    continue
                place = shown(member.name)
                if batch in parts:
                    raise ValueError(f"it holds {place} twice")
                try:
                    layout.check_size(member.size, records)
                    data = stream.read(member.size)
                    if len(data) < member.size:
                        raise EOFError
                    parts[batch] = layout.parse(data, records)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
            stream.drain()  # the checksum of gzip is at the end
        if not parts:
            raise ValueError(other_version(sizes) or "it is no archive of CIFAR-10: it holds no data_batch_1")
        if missing := [batch for batch in BATCHES if batch not in parts]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except EOFError as error:
        raise AlexNetError(f"{path}: truncated; delete it and download it again") from error
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        reason = shown(str(error) or type(error).__name__, 200)
        raise AlexNetError(f"{path}: damaged, or no tar archive ({reason}); {WHICH_TO_TAKE}") from error
    except ValueError as error:
        raise AlexNetError(f"{path}: {error}; {WHICH_TO_TAKE}") from error
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({error.strerror or error}); check the file") from error
    return join(parts)


def holds_cifar10(path: pathlib.Path) -> bool:
    """Whether an archive begins as one of CIFAR-10: for a file that is not named as one."""
    try:
        with _unpacked(path, _GLANCE_BYTES) as stream:
            return any(member.name.rpartition("/")[2] in _WANTED for member in stream.members())
    except (EOFError, OSError, ValueError, zlib.error, tarfile.TarError):
        return False


@contextlib.contextmanager
def _unpacked(path: pathlib.Path, limit: int) -> Iterator["_Stream"]:
    """The tar in a file.

    Raises:
      ValueError: the file is no archive; says what it is where that can be told.
      OSError: it can't be read.
    """
    if not os.path.isfile(path):
        raise OSError("it is no regular file")  # opening a pipe would wait for a writer
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield _Stream(unpacked, limit)
        elif _begins_a_tar(head):
            yield _Stream(file, limit)
        elif path.name in _WANTED:
            raise AlexNetError(f"{path}: this is one of six batches; give --data-dir its folder")
        else:
            version = other_version({path.name: os.path.getsize(path)})
            raise ValueError(what_it_is(head) or version or "this is neither a gzip nor a tar file")


def _begins_a_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


class _Stream:
    """A tar, read once from the beginning to the end.

    Args:
      file: the tar, unpacked.
      limit: bytes after which it is refused.
    """

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
        """Each member's header; its data can be read before the next one is asked for."""
        for _ in range(_MAX_MEMBERS):
            header = self.read(tarfile.BLOCKSIZE)
            if not header.strip(b"\0"):  # the mark of the end, or the end
                return
            if len(header) < tarfile.BLOCKSIZE:
                raise EOFError
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if member.size < 0 or member.type == tarfile.GNUTYPE_SPARSE:
                raise ValueError(f"{shown(member.name)} is a sparse file, or has no size")
            blocks = 0 if member.type in _WITHOUT_DATA else -(-member.size // tarfile.BLOCKSIZE)
            end = self._position + blocks * tarfile.BLOCKSIZE
            yield member
            while self._position < end:
                if not self.read(min(end - self._position, 1024**2)):
                    raise EOFError
        raise ValueError(f"it has more than {_MAX_MEMBERS:,} members")

    def drain(self) -> None:
        """Reads what comes after the last member."""
        while self.read(1024**2):
            pass
