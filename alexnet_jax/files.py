"""Files written atomically, even across a power cut; locks; reading with a limit."""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import portalocker

from alexnet_jax.errors import AlexNetError, UsageError, shown, warn

WRITING_PATIENCE = 60.0  # seconds to wait for another process that writes files to the same folder


def sync(path: pathlib.Path) -> None:
    """Has the disk store a file's contents, or a folder's entries, before it returns."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # Windows opens no folders
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
    """Locks a file and writes this process's number into it; closing what is returned unlocks it.

    The lock ends with the process however that ends, so nothing stale can stay behind. Some file systems have no locks
    (Lustre without `-o flock`, NFS with `nolock`, some FUSE): there one line warns, and the file is not locked.

    Args:
      path: the file; made if it is not there.
      otherwise: end of the message if another process holds the lock.
      patience: seconds to wait for that process.
      waiting: printed on stderr before the wait, if not empty.

    Raises:
      AlexNetError: another process holds it, or it can't be written.
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
      AlexNetError: a file can't be written, or another process has been writing there for `WRITING_PATIENCE` seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlexNetError(f"can't write {folder}: {error.strerror or error}") from error
    with locked(folder / ".alexnet_jax.lock", "is writing there; try again when it has finished", WRITING_PATIENCE):
        temporary = {f".{name[:50]}" for name in contents}
        with contextlib.suppress(OSError):
            for path in folder.iterdir():  # what a process that was killed has left
                if (found := re.fullmatch(r"(\..+)\.[0-9a-f]{16}\.tmp", path.name)) and found[1] in temporary:
                    path.unlink()
        for name, data in contents.items():
            write_atomically(folder / name, data)


@contextlib.contextmanager
def plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to `folder` without wildcards, `gs:` or backslashes: itself, or a symbolic link while the block runs.

    For libraries that match, or parse, the whole path that they are given. The link is in the temporary folder, which
    other programs clear: it is not for keeping.

    Args:
      folder: an absolute path.

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
            raise OSError(f"the temporary folder {temporary} has such characters, too: set TMPDIR")
        link = pathlib.Path(temporary) / "folder"
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        links.close()
        reason = error.strerror or error
        raise AlexNetError(f"{folder}: choose a path without {' '.join(sorted(special))} ({reason})") from error
    with links:
        yield link


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


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with the home directory in place of a leading `~` or `~user`.

    Raises:
      UsageError: that is not known.
    """
    try:
        return pathlib.Path(path).expanduser()
    except (RuntimeError, KeyError, ValueError):
        user = pathlib.Path(path).parts[0][1:]
        what = f"there is no user {user!r}" if user else "this user has no home directory"
        raise UsageError(f"{shown(path)}: {what}: give the full path") from None
