"""Atomic writes that survive a power cut; locks; reading with a size limit."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import secrets
import stat
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import portalocker

from alexnet_jax.errors import AlexNetError, UsageError, reason, shown, warn

if TYPE_CHECKING:
    import numpy as np

WRITING_PATIENCE = 60.0  # seconds to wait for another process that is writing to the same folder


def sync(path: pathlib.Path) -> None:
    """Flushes a file's contents, or a folder's entries, to the disk (`fsync`)."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # Windows can't open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # SMB, some FUSE
            raise
    finally:
        os.close(descriptor)


def locked(path: pathlib.Path, otherwise: str, patience: float = 0.0, waiting: str = "") -> TextIO:
    """Locks a file, made if missing, and writes this process's ID into it; closing the returned file unlocks it.

    The system releases the lock when the process ends in any way, so no stale lock can remain. Some file systems have
    no locks (Lustre without `-o flock`, NFS with `nolock`, some FUSE): on these, a warning is printed and the file is
    not locked.

    If another process holds the lock, prints `waiting` on stderr and waits for up to `patience` seconds. `otherwise` is
    the end of the error message: "is training there; wait for it".

    Raises:
      AlexNetError: another process holds the lock, or the file can't be written.
    """
    deadline = time.monotonic() + patience
    try:
        file = path.open("a+", encoding="ascii", errors="replace")
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        while True:
            try:
                portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
                break
            except portalocker.AlreadyLocked:  # EAGAIN or EACCES
                if time.monotonic() >= deadline:
                    raise
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
                waiting = ""
            time.sleep(0.05)
    except portalocker.AlreadyLocked:
        with contextlib.closing(file):
            owner = _owner(file)
        raise AlexNetError(f"{path.parent}: {owner} {otherwise}") from None
    except (portalocker.LockException, OSError) as error:  # portalocker wraps the system's error
        warn(
            f"{path.parent}: its file system has no locks ({reason(error.__cause__ or error)}): make sure that no "
            "other process writes to this folder"
        )
    try:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # closing tries to write again
            file.close()
        raise _not_writable(path, error) from error
    return file


def _owner(file: TextIO) -> str:
    """The process that holds a lock file, for a message."""
    try:
        file.seek(0)
        number = file.read(100).strip()
    except OSError:  # on Windows a locked file can't be read
        number = ""
    return f"process {number}" if number.isdecimal() else "another process"


def _not_writable(path: pathlib.Path, error: OSError) -> AlexNetError:
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    hint = "; choose a folder that this user may write to" if denied else ""
    return AlexNetError(f"can't write {path}: {reason(error)}{hint}")


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically: after a crash it has its old contents or the new ones, never a part of them.

    Raises:
      AlexNetError: the file can't be written; it keeps its old contents.
    """
    # The name is unique: another process may write the same file at the same time.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # frees space on a full disk
        raise AlexNetError(f"can't write {path}: {reason(error)}") from error


def write_together(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files that belong together: sets that two processes write at the same time are never mixed.

    Args:
      folder: made if missing.
      contents: name and bytes of each file. Each is written atomically, in this order.

    Raises:
      AlexNetError: a file can't be written, or another process has been writing there for `WRITING_PATIENCE` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlexNetError(f"can't write {folder}: {reason(error)}") from error
    with locked(folder / ".alexnet_jax.lock", "is writing there; try again when it has finished", WRITING_PATIENCE):
        temporary = {f".{name[:50]}" for name in contents}
        with contextlib.suppress(OSError):
            for path in folder.iterdir():  # removes the temporary files of processes that were killed
                if (found := re.fullmatch(r"(\..+)\.[0-9a-f]{16}\.tmp", path.name)) and found[1] in temporary:
                    path.unlink()
        for name, data in contents.items():
            write_atomically(folder / name, data)


@contextlib.contextmanager
def plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path without wildcards, colons and backslashes that leads to the absolute path `folder` while the block runs.

    For libraries that glob or parse the whole path they are given. It is `folder` itself or a symbolic link to it in
    the temporary folder, which other programs may clear: don't store it.

    Raises:
      AlexNetError: no link can be made.
    """
    special = set("*?[") if os.name == "nt" else set("*?[:\\")
    if not special & set(str(folder)):
        yield folder
        return
    links = contextlib.ExitStack()
    try:
        temporary = links.enter_context(tempfile.TemporaryDirectory(prefix="alexnet_jax-", ignore_cleanup_errors=True))
        if special & set(temporary):
            raise OSError(f"the temporary folder {temporary} contains such characters as well: set TMPDIR")
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        links.close()
        raise AlexNetError(f"{folder}: choose a path without {' '.join(sorted(special))} ({reason(error)})") from error
    with links:
        yield link


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """The contents of a file.

    Raises:
      OSError: it can't be read, is not a regular file (reading a pipe would block) or has more than `limit` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if found.st_size > limit:
        raise OSError(f"it has {found.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def read_npz(path: pathlib.Path, limit: int) -> "dict[str, np.ndarray]":
    """The arrays of an .npz file of at most `limit` bytes, compressed or not. Pickled objects are refused.

    Raises:
      OSError: as `read_bytes`.
      ValueError: it is damaged, or has more than `limit` bytes when decompressed.
    """
    import numpy as np  # here, because `--help` should not wait for it

    data = io.BytesIO(read_bytes(path, limit))
    try:
        if sum(member.file_size for member in zipfile.ZipFile(data).infolist()) > limit:
            raise ValueError(f"it unpacks to more than {limit:,} bytes")
        with warnings.catch_warnings(), np.load(data, allow_pickle=False) as file:
            warnings.simplefilter("ignore")  # NumPy's about damaged headers
            arrays = dict(file)
        if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{other[0]} is not an array")  # NumPy returns the bytes of files that are not .npy
        return arrays
    except Exception as error:  # damaged archives raise errors of many kinds
        raise ValueError(reason(error)) from error


def npz_bytes(**arrays: "np.ndarray") -> bytes:
    """The contents of an .npz file with these arrays."""
    import numpy as np

    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]  # NumPy's annotation has `allow_pickle: bool` here
    return data.getvalue()


def to_bytes(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with a leading `~` or `~user` replaced by the home directory.

    Raises:
      UsageError: there is no such home directory.
    """
    try:
        return pathlib.Path(path).expanduser()
    except (RuntimeError, KeyError, ValueError):
        user = pathlib.Path(path).parts[0][1:]
        what = f"there is no user {user!r}" if user else "this user has no home directory"
        raise UsageError(f"{shown(path)}: {what}: give the full path") from None
