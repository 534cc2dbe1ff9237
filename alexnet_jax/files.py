"""Files written atomically, even across a power cut; locks; reading with a limit."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Mapping
from typing import Any, TextIO

import portalocker

from alexnet_jax.errors import AlexNetError

WRITING_TIMEOUT = 60.0  # seconds to wait for another process that writes files to the same folder


class LockedError(AlexNetError):
    """Another process holds a lock."""


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
        raise LockedError(f"{path.parent}: process {owner} {otherwise}") from None
    except OSError as error:
        file.close()
        raise AlexNetError(f"can't write {path}: {error.strerror or error}") from error
    return file


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically: after a crash it has its old contents or the new ones, never a part of them.

    Raises:
      AlexNetError: the file can't be written; its old contents are still there.
    """
    # A name of its own: another process may write the same file at the same time.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
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


def write_together(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files that belong together, each atomically: what two processes write at the same time is never mixed.

    Args:
      folder: made if it does not exist.
      contents: of each file by its name; the last one is written last.

    Raises:
      AlexNetError: a file can't be written, or another process has been writing there for `WRITING_TIMEOUT` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlexNetError(f"can't write {folder}: {error.strerror or error}") from error
    with _locked_in_turn(folder / ".lock", "is writing there; try again when it has finished"):
        with contextlib.suppress(OSError):
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed
                leftover.unlink()
        for name, data in contents.items():
            write_atomically(folder / name, data)


def _locked_in_turn(path: pathlib.Path, otherwise: str) -> TextIO:
    deadline = time.monotonic() + WRITING_TIMEOUT
    while True:
        try:
            return locked(path, otherwise)
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def plain_path(folder: pathlib.Path, user: object) -> pathlib.Path:
    """A path to `folder` without wildcards, `gs:` or backslashes: itself, or a symbolic link to it.

    For libraries that match, or parse, the whole path that they are given.

    Args:
      folder: an absolute path.
      user: the link is removed with this object, or when the process ends.

    Raises:
      AlexNetError: no link can be made.
    """
    special = set("*?[") if os.name == "nt" else set("*?[:\\")
    if not special & set(str(folder)):
        return folder
    try:
        temporary = tempfile.mkdtemp(prefix="alexnet_jax-")
        weakref.finalize(user, shutil.rmtree, temporary, ignore_errors=True)
        if special & set(temporary):
            raise OSError(f"the temporary folder {temporary} has such characters, too: set TMPDIR")
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        reason = error.strerror or error
        raise AlexNetError(f"{folder}: choose a path without {' '.join(sorted(special))} ({reason})") from error
    return link


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
