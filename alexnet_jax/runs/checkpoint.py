"""Checkpoints: written by Orbax, verified by a manifest of SHA-256 hashes, committed atomically.

    checkpoints/<step>/state/                the train state, by Orbax
    checkpoints/<step>/memory.json           what the loop must remember, and the validation accuracy
    checkpoints/<step>/manifest.json         the step, and size and SHA-256 of every other file
    checkpoints/set-aside/                   checkpoints that were found damaged, never deleted
    checkpoints/.saving-<step>/ .removing/   work under way when the process was killed; the next start clears it

Orbax's CheckpointManager is not used: it restores flipped bits silently, takes any folder with a number for a
checkpoint, and has no place for a manifest before the rename that makes a checkpoint count.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from alexnet_jax.distributed import devices, processes
from alexnet_jax.errors import AlexNetError, warn
from alexnet_jax.files import plain_path, read_bytes, sync, to_bytes

KEEP_NEWEST = 2
MANIFEST = "manifest.json"
MEMORY = "memory.json"
_MAX_JSON_BYTES = 16 * 1024**2

# TensorStore locks the files that it writes, and some file systems have no locks. Here no two processes write the same
# file, and Orbax has no public setting for it.
with contextlib.suppress(AttributeError):
    for _context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        _context["file_io_locking"] = {"mode": "none"}


class DamagedError(AlexNetError):
    """A checkpoint is not what was saved."""


class RemovedError(AlexNetError):
    """A checkpoint was removed while it was read: a training keeps only some."""


class Checkpoints:
    """The checkpoints of a run: the two newest, and the one with the best validation accuracy.

    A checkpoint holds the state as nested dicts of NumPy arrays, so it restores on any number of devices and without
    this package, and a small JSON object for what the loop must remember. Saving is synchronous (0.3 s for
    AlexNetSmall): an asynchronous save can hang for good on a full disk.
    """

    def __init__(self, folder: pathlib.Path, read_only: bool = False) -> None:
        """Opens `folder`; unless `read_only`, makes it and clears away what a killed save has left."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's errors come as exceptions
        self._folder, self._read_only = folder.absolute(), read_only
        self._removing = self._folder / ".removing"
        # Each process reads for itself: where one can't, the others don't wait for it.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        self._reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        self._writer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        if not read_only:
            try:
                self._folder.mkdir(exist_ok=True)
                for entry in self._folder.iterdir():
                    if re.fullmatch(r"\.saving(-[0-9]+)?|\.removing", entry.name):
                        (shutil.rmtree if entry.is_dir() and not entry.is_symlink() else os.unlink)(entry)
            except OSError as error:
                if self._folder.is_symlink() and not self._folder.exists():
                    raise _missing(self._folder) from None
                raise AlexNetError(f"{error.filename or self._folder}: can't be used ({error.strerror})") from error

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, rising. Whatever else is in the folder is ignored."""
        entries = self._folder.iterdir() if self._folder.is_dir() else ()
        # A link to a folder that is not there, not fetched or not mounted, counts: it must not be taken for none.
        names = [entry.name for entry in entries if entry.name.isdecimal() and (entry.is_dir() or entry.is_symlink())]
        return sorted(int(name) for name in names if name == str(int(name)))

    def best_step(self) -> int | None:
        """The step with the highest validation accuracy (the earliest of equals); None if none was measured.

        Raises:
          DamagedError: the accuracy of a checkpoint can't be read, so that it may be the best.
        """
        scores = [(accuracy, -step) for step in self.all_steps() if (accuracy := self._accuracy(step)) is not None]
        return -max(scores)[1] if scores else None

    def save(self, state: Any, memory: dict[str, Any], accuracy: float | None) -> None:
        """Saves a state under its step, then removes the checkpoints that need not be kept.

        Of several processes all must call it: each writes its share of the arrays, the first all else.

        Args:
          state: the train state.
          memory: JSON-ready; comes back from `restore` as it is.
          accuracy: validation accuracy of exactly this state, if known.

        Raises:
          AlexNetError: it can't be written; the checkpoints of before are as they were.
        """
        step = int(state.step)
        target = self._folder / str(step)
        if processes.on_main(lambda: self._is_saved(step)):
            return
        # A name for each step: machines that share a folder by NFS remember for a while what a name stood for.
        saving = self._folder / f".saving-{step}"
        tree = devices.shared(flax.serialization.to_state_dict(state))
        try:
            processes.on_main(lambda: self._prepare(saving, target))
            self._write_state(tree, saving, target)
            processes.on_main(lambda: self._commit(tree, memory, accuracy, saving, target))
        except AlexNetError:
            if processes.is_main():
                shutil.rmtree(saving, ignore_errors=True)
            raise
        processes.on_main(self._remove_old)

    def restore_newest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and memory of the newest checkpoint that is as it was saved; None if nothing was ever saved.

        Each newer one is named in a warning and, unless `read_only`, moved to `set-aside/`.

        Raises:
          AlexNetError: there are checkpoints, and none of them is intact (all stay where they are); or one can't be
            read.
        """
        damaged: dict[int, DamagedError] = {}
        while steps_left := [step for step in self.all_steps() if step not in damaged]:
            try:
                restored = self.restore_tree(steps_left[-1])
            except DamagedError as damage:
                damaged[steps_left[-1]] = damage
            except RemovedError:
                continue
            else:
                for step, found in damaged.items():
                    where = "skipped" if self._read_only else f"set aside as {self._move_aside(step)}"
                    warn(f"checkpoint of step {step:,} {where}: {found}")
                return restored
        if damaged or any(path.is_dir() for path in self.set_aside.glob("*")):
            reason = next(map(str, damaged.values()), f"all are in {self.set_aside}")
            raise AlexNetError(
                f"{self._folder}: no checkpoint is intact ({reason}): copy an intact one back, "
                "or train anew in another --workdir"
            )
        return None

    def restore_best(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and memory of the checkpoint with the highest validation accuracy; None if none was validated.

        Raises:
          DamagedError: it is not what was saved.
          AlexNetError: it can't be read.
        """
        while (best := self.best_step()) is not None:
            try:
                return self.restore_tree(best)
            except RemovedError:
                continue
        return None

    @property
    def set_aside(self) -> pathlib.Path:
        """Where damaged checkpoints are moved."""
        return self._folder / "set-aside"

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state (nested dicts of NumPy arrays) and the memory saved at `step`.

        Raises:
          DamagedError: it is not what was saved.
          RemovedError: it is no longer there.
          AlexNetError: it can't be read.
        """
        folder = self._folder / str(step)
        try:
            verify(folder, step)
            return self._read_state(folder), json.loads(read_bytes(folder / MEMORY, _MAX_JSON_BYTES))["memory"]
        except Exception as error:
            if not os.path.lexists(folder):
                raise RemovedError(f"{folder}: there is no such checkpoint; there are {self.all_steps()}") from error
            if isinstance(error, AlexNetError):
                raise
            raise AlexNetError(f"{folder}: can't be read ({_reason(error)})") from error

    def _read_state(self, folder: pathlib.Path) -> dict[str, Any]:
        """What Orbax wrote into a checkpoint's folder, as nested dicts of NumPy arrays."""
        with plain_path(self._folder) as parent:
            path = parent / folder.name / "state"
            metadata = self._reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree: dict[str, Any] = self._reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            return tree

    def to_state(self, tree: dict[str, Any], template: Any) -> Any:
        """A tree from `restore_tree` in the structure of `template`.

        Raises:
          AlexNetError: an array has another shape or dtype than the template's, nothing is cast; or there are others.
        """
        where = str(self._folder / str(tree.get("step")))
        check_like(tree, flax.serialization.to_state_dict(template), where)
        try:
            return flax.serialization.from_state_dict(template, tree)
        except ValueError as error:
            raise AlexNetError(f"{where}: not a state of this version's optimizer ({_reason(error)})") from error

    def close(self) -> None:
        """Ends all work on the folder."""
        self._reader.close()
        self._writer.close()

    def _is_saved(self, step: int) -> bool:
        """Whether the checkpoint is there and intact."""
        target = self._folder / str(step)
        if not os.path.lexists(target):
            return False
        try:
            verify(target, step)
        except DamagedError as damage:
            raise AlexNetError(f"{target} is in the way of a checkpoint ({damage}): move it") from damage
        return True

    def _prepare(self, saving: pathlib.Path, target: pathlib.Path) -> None:
        with _told(target):
            saving.mkdir()

    def _write_state(self, tree: dict[str, Any], saving: pathlib.Path, target: pathlib.Path) -> None:
        # Where a write fails, threads of Orbax and TensorStore print tracebacks beside the exception that tells it.
        with _told(target), contextlib.redirect_stderr(io.StringIO()), processes.limited(f"{target}: saving"):
            try:
                with plain_path(self._folder) as parent:  # Orbax's merge globs the whole path
                    self._writer.save(parent / saving.name / "state", args=ocp.args.StandardSave(tree))
            except Exception:
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tells of them again when the process ends
                time.sleep(0.5)  # for those threads
                raise

    def _commit(
        self,
        tree: dict[str, Any],
        memory: dict[str, Any],
        accuracy: float | None,
        saving: pathlib.Path,
        target: pathlib.Path,
    ) -> None:
        with _told(target):
            # Before the manifest says that it is right: what Orbax wrote is what it was given.
            saved = _leaves(self._read_state(saving))
            for name, leaf in _leaves(tree).items():
                if name not in saved or _contents(saved[name]) != _contents(leaf):
                    raise OSError(f"{name} can't be read back as it was written")
            (saving / MEMORY).write_bytes(to_bytes({"memory": memory, "validation_accuracy": accuracy}))
            files = {
                name: {"size": (saving / name).stat().st_size, "sha256": _sha256(saving / name)}
                for name in sorted(_files(saving))
            }
            (saving / MANIFEST).write_bytes(to_bytes({"step": int(target.name), "files": files}))
            for path in (*saving.rglob("*"), saving):
                sync(path)
            saving.rename(target)
            sync(self._folder)

    def _accuracy(self, step: int) -> float | None:
        folder = self._folder / str(step)
        try:
            accuracy = json.loads(read_bytes(folder / MEMORY, _MAX_JSON_BYTES))["validation_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not os.path.lexists(folder):
                return None  # removed meanwhile
            raise DamagedError(f"{folder / MEMORY} can't be read ({_reason(error)})") from error
        return accuracy if isinstance(accuracy, float) else None

    def _remove_old(self) -> None:
        try:
            keep = {*self.all_steps()[-KEEP_NEWEST:], self.best_step()}
        except DamagedError as damage:
            warn(f"no old checkpoint is removed: {damage}")
            return
        for step in self.all_steps():
            old = self._folder / str(step)
            if step in keep:
                continue
            try:
                if old.is_symlink():  # its contents are kept elsewhere, by git-annex or DVC
                    old.unlink()
                else:
                    # Half of a checkpoint must never bear its name.
                    old.rename(self._removing)
                    shutil.rmtree(self._removing)
            except OSError as error:
                warn(f"{old} is no longer needed and can't be removed ({error.strerror or error})")

    def _move_aside(self, step: int) -> pathlib.Path:
        folder = self.set_aside
        try:
            folder.mkdir(exist_ok=True)
            number = 1
            while (target := folder / (str(step) if number == 1 else f"{step}-{number}")).exists():
                number += 1
            return (self._folder / str(step)).rename(target)
        except OSError as error:
            raise AlexNetError(f"{self._folder / str(step)} is damaged and can't be moved ({error})") from error


@contextlib.contextmanager
def _told(target: pathlib.Path) -> Iterator[None]:
    """Turns what goes wrong with a save into one line."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions, too
        if processes.is_lost_link(error):
            raise
        raise AlexNetError(f"{target}: can't be written ({_reason(error)})") from error


def verify(folder: pathlib.Path, step: int) -> None:
    """Compares every file of a checkpoint that the manifest lists with its size and SHA-256 there; follows links.

    Other files are ignored: file systems, desktops and programs that synchronize folders leave some.

    Raises:
      DamagedError: saying which file is missing or changed.
      AlexNetError: a file can't be read, or is a link to a file that is not there.
    """
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST, _MAX_JSON_BYTES))
        saved_step, wanted = manifest["step"], {name: (f["size"], f["sha256"]) for name, f in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(folder if folder.is_symlink() and not folder.exists() else folder / MANIFEST) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{folder / MANIFEST} is damaged") from None
    except OSError as error:
        raise AlexNetError(f"{folder}: can't be read ({error.strerror or error})") from error
    if saved_step != step:
        raise DamagedError(f"{folder} was saved as step {saved_step}")
    if not any(name.startswith("state/") for name in wanted):
        raise DamagedError(f"{folder} was saved without a state")
    for name, (size, digest) in wanted.items():
        path = folder / name
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path} is not a regular file")
            if found.st_size != size:
                raise DamagedError(f"{path} has {found.st_size} bytes, {size} were saved")
            if _sha256(path) != digest:
                raise DamagedError(f"{path} is not what was saved (SHA-256 differs)")
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(path) from None
        except OSError as error:
            raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error


def _missing(path: pathlib.Path) -> AlexNetError:
    if path.is_symlink():
        return AlexNetError(f"{path} is a link to what is not there: fetch it first (git annex get, dvc pull, mount)")
    return DamagedError(f"{path} is missing")


def _files(folder: pathlib.Path) -> set[str]:
    """Names of all files below `folder`, with `/`."""
    found = set()
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = pathlib.Path(parent) / name
            if not name.startswith("."):
                found.add(path.relative_to(folder).as_posix())
    return found


def _raise(error: OSError) -> None:
    raise error


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """What the system says is wrong, else the first line of an error's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's notation
        return os.strerror(int(number[1]))
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _contents(leaf: Any) -> tuple[Any, ...]:
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def check_like(tree: Any, template: Any, where: str) -> None:
    """Raises AlexNetError unless both trees have the same paths, shapes and dtypes."""
    found, wanted = _leaves(tree), _leaves(template)
    if different := sorted(found.keys() ^ wanted.keys()):
        raise AlexNetError(f"{where}: the checkpoint is of another network or optimizer: {different[0]} differs")
    for path, leaf in wanted.items():
        have, want = (f"{np.dtype(a.dtype)}{list(np.shape(a))}" for a in (found[path], leaf))
        if have != want:
            raise AlexNetError(f"{where}: {path} is {have}, the network needs {want}")
