"""Files that are there whole or not at all, also after a power cut."""

import contextlib
import errno
import json
import os
import pathlib
import stat
from typing import Any, TextIO

import portalocker

from alexnet_jax.errors import AlexNetError, warn


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

    The lock ends with the process however that ends, so nothing stale can stay behind. Some file systems have no locks
    (Lustre without `-o flock`, NFS with `nolock`, some FUSE): there one line warns, and the file is not locked.

    Args:
      path: the file; made if it is not there.
      otherwise: end of the message if another process holds the lock.

    Raises:
      AlexNetError: another process holds it, or it can't be written.
    """
    try:
        file = path.open("a+", encoding="ascii", errors="replace")
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:  # EAGAIN or EACCES
        with contextlib.closing(file):
            owner = _owner(file)
        raise AlexNetError(f"{path.parent}: {owner} {otherwise}") from None
    except (portalocker.LockException, OSError) as error:  # portalocker wraps the system's error
        cause = error.__cause__ or error
        reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
        warn(
            f"{path.parent}: its file system has no locks ({reason}): make sure that no other process writes to this "
            "folder"
        )
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # it tries to write again
            file.close()
        raise _not_writable(path, error) from error
    return file


def _owner(file: TextIO) -> str:
    """The process that holds a lock file, for a message."""
    try:
        file.seek(0)
        number = file.read(100).strip()
    except OSError:  # Windows keeps others from reading what is locked
        number = ""
    return f"process {number}" if number.isdecimal() else "another process"


def _not_writable(path: pathlib.Path, error: OSError) -> AlexNetError:
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    hint = "; choose a folder that this user may write to" if denied else ""
    return AlexNetError(f"can't write {path}: {error.strerror or error}{hint}")


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
