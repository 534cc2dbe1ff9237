"""Files that are there whole or not at all, also after a power cut."""

import contextlib
import json
import os
import pathlib
import stat
from typing import Any, TextIO

import portalocker

from alexnet_jax.errors import AlexNetError


def sync(path: pathlib.Path) -> None:
    """Has the disk store a file's contents, or a folder's entries, before it returns."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: pathlib.Path, otherwise: str) -> TextIO:
    """Locks a file and writes this process's number into it; closing what is returned unlocks it.

    The lock ends with the process however that ends, so nothing stale can stay behind.

    Args:
      path: the file; made if it is not there.
      otherwise: end of the message if another process holds the lock.

    Raises:
      AlexNetError: another process holds it, or it can't be written.
    """
    try:
        file = path.open("a+")
    except OSError as error:
        raise AlexNetError(f"can't write {path}: {error.strerror or error}") from error
    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except portalocker.LockException:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise AlexNetError(f"{path.parent}: process {owner} {otherwise}") from None
    except OSError as error:
        file.close()
        raise AlexNetError(f"can't write {path}: {error.strerror or error}") from error
    return file


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
      AlexNetError: naming the file, if the folder can't be written. What was there before is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk it takes room
        raise AlexNetError(f"can't write {path}: {error.strerror or error}") from error


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """The contents of a file.

    Raises:
      OSError: it can't be read, is no regular file (a pipe would wait for a writer) or has more than `limit` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    if found.st_size > limit:
        raise OSError(f"it has {found.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def to_bytes(value: Any) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()
