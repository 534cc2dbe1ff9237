"""Checkpoints: written by Orbax, verified by a manifest of SHA-256 hashes, committed atomically.

    checkpoints/<step>/state/                the state, by Orbax
    checkpoints/<step>/memory.json           JSON for the training loop to resume, and the validation accuracy
    checkpoints/<step>/manifest.json         the step, and size and SHA-256 of every other file
    checkpoints/set-aside/                   damaged checkpoints, moved here and never deleted
    checkpoints/.saving-<step>/ .removing/   unfinished work of a process that was killed; the next start deletes it

Orbax's CheckpointManager is not used: it restores flipped bits silently, treats any folder whose name is a number as a
checkpoint, and can't write a manifest before the rename that commits a checkpoint.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from alexnet_jax.distributed import devices, processes
from alexnet_jax.errors import AlexNetError, reason, warn
from alexnet_jax.files import plain_path, read_bytes, sync, to_bytes

KEEP_NEWEST = 2
MANIFEST = "manifest.json"
MEMORY = "memory.json"
_MAX_JSON_BYTES = 16 * 1024**2

Tree = dict[str, Any]  # nested dicts of arrays

# TensorStore locks the files that it writes, and some file systems have no locks. No two processes write the same file
# here, and Orbax has no public setting for it.
with contextlib.suppress(AttributeError):
    for _context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        _context["file_io_locking"] = {"mode": "none"}


class DamagedError(AlexNetError):
    """A checkpoint differs from what was saved."""


class RemovedError(AlexNetError):
    """A checkpoint was removed while it was being read: a training run keeps only some of them."""


class Checkpoints:
    """The checkpoints of a run: the two newest, and the one with the best validation accuracy.

    A checkpoint holds a state as nested dicts of NumPy arrays, so it restores on any number of devices and without this
    package, and a small JSON object, `memory`. Saving is synchronous (0.3 s for AlexNetSmall): an asynchronous save can
    hang forever on a full disk.
    """

    def __init__(self, folder: pathlib.Path, read_only: bool = False) -> None:
        """Opens `folder`; unless `read_only`, creates it and deletes the remains of killed saves."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the errors that it raises
        self._folder, self._read_only = folder.absolute(), read_only
        self._set_aside, self._removing = self._folder / "set-aside", self._folder / ".removing"
        # Each process reads on its own, so that none waits for one that can't.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        self._reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        self._writer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        if read_only:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            for entry in self._folder.iterdir():
                if re.fullmatch(r"\.saving(-[0-9]+)?|\.removing", entry.name):
                    (shutil.rmtree if entry.is_dir() and not entry.is_symlink() else os.unlink)(entry)
        except OSError as error:
            if self._folder.is_symlink() and not self._folder.exists():
                raise _missing(self._folder) from None
            raise AlexNetError(f"{error.filename or self._folder}: can't be used ({reason(error)})") from error

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending. Anything else in the folder is ignored."""
        entries = self._folder.iterdir() if self._folder.is_dir() else ()
        # A broken link (to a disk that is not mounted) counts: the checkpoint must not be considered missing.
        names = [entry.name for entry in entries if entry.name.isdecimal() and (entry.is_dir() or entry.is_symlink())]
        return sorted(int(name) for name in names if name == str(int(name)))

    def best_step(self) -> int | None:
        """The step with the highest validation accuracy (the earliest of equals); None if none was measured.

        Raises:
          DamagedError: the accuracy of a checkpoint, which may be the best, can't be read.
        """
        scores = [(accuracy, -step) for step in self.all_steps() if (accuracy := self._accuracy(step)) is not None]
        return -max(scores)[1] if scores else None

    def save(self, state: Any, memory: dict[str, Any], accuracy: float | None) -> None:
        """Saves a state under its `step`, then removes the checkpoints that are no longer needed.

        All processes must call it: each writes its share of the arrays, process 0 everything else.

        Args:
          state: a pytree with an entry `step`, of types that Flax serializes.
          memory: JSON-ready; `restore_tree` returns it.
          accuracy: validation accuracy of this state, if known.

        Raises:
          AlexNetError: it can't be written; the earlier checkpoints are unchanged.
        """
        tree = flax.serialization.to_state_dict(state)
        step = int(tree["step"])
        target = self._folder / str(step)
        # The name is different for each step, because NFS clients cache for a while what a name refers to.
        saving = self._folder / f".saving-{step}"
        if processes.on_main(lambda: _is_saved(target, step)):
            return
        tree = devices.shared(tree)
        described = {"memory": memory, "validation_accuracy": accuracy}

        def begin() -> None:
            with _one_line_errors(target):
                saving.mkdir()

        try:
            processes.on_main(begin)
            self._write_state(tree, saving, target)
            processes.on_main(lambda: self._commit(tree, described, saving, target))
        except AlexNetError:
            if processes.is_main():
                shutil.rmtree(saving, ignore_errors=True)
            raise
        processes.on_main(self._remove_old)

    def restore_newest(self) -> tuple[Tree, dict[str, Any]] | None:
        """State and memory of the newest intact checkpoint; None if nothing was ever saved.

        A warning names each newer checkpoint, which is damaged; unless `read_only`, these are moved to `set-aside/`.

        Raises:
          AlexNetError: no checkpoint is intact (then none is moved), or one can't be read.
        """
        damaged: dict[int, DamagedError] = {}
        while steps := [step for step in self.all_steps() if step not in damaged]:
            try:
                restored = self.restore_tree(steps[-1])
            except DamagedError as error:
                damaged[steps[-1]] = error
            except RemovedError:
                continue
            else:
                for step, damage in damaged.items():
                    done = "skipped" if self._read_only else f"moved to {self._move_aside(step)}"
                    warn(f"checkpoint of step {step:,} {done}: {damage}")
                return restored
        if damaged or any(path.is_dir() for path in self._set_aside.glob("*")):
            why = next(map(str, damaged.values()), f"all are in {self._set_aside}")
            raise AlexNetError(
                f"{self._folder}: no checkpoint is intact ({why}): copy an intact one back, or train from scratch in "
                "another --workdir"
            )
        return None

    def restore_best(self) -> tuple[Tree, dict[str, Any]] | None:
        """State and memory of the checkpoint with the highest validation accuracy; None if none was measured.

        Raises:
          DamagedError: it differs from what was saved.
          AlexNetError: it can't be read.
        """
        while (best := self.best_step()) is not None:
            with contextlib.suppress(RemovedError):
                return self.restore_tree(best)
        return None

    def restore_tree(self, step: int) -> tuple[Tree, dict[str, Any]]:
        """State (nested dicts of NumPy arrays) and memory of the checkpoint of `step`.

        Raises:
          DamagedError: it differs from what was saved.
          RemovedError: it does not exist, or no longer exists.
          AlexNetError: it can't be read.
        """
        folder = self._folder / str(step)
        try:
            verify(folder, step)
            return self._read_state(folder), _read_json(folder / MEMORY)["memory"]
        except Exception as error:
            if not os.path.lexists(folder):
                raise RemovedError(
                    f"{folder}: there is no such checkpoint; the steps are {self.all_steps()}"
                ) from error
            if isinstance(error, AlexNetError):
                raise
            raise AlexNetError(f"{folder}: can't be read ({_cause(error)})") from error

    def to_state(self, tree: Tree, template: Any) -> Any:
        """A restored tree, in the structure of the pytree `template`. No array is cast.

        Raises:
          AlexNetError: the trees differ in the names, shapes or dtypes of their arrays.
        """
        where = str(self._folder / str(tree.get("step")))
        found, wanted = _leaves(tree), _leaves(flax.serialization.to_state_dict(template))
        if different := sorted(found.keys() ^ wanted.keys()):
            raise AlexNetError(f"{where}: the checkpoint is of another network or optimizer: {different[0]} differs")
        for path, leaf in wanted.items():
            have, want = (f"{np.dtype(a.dtype)}{list(np.shape(a))}" for a in (found[path], leaf))
            if have != want:
                raise AlexNetError(f"{where}: {path} is {have}, but the network needs {want}")
        try:
            return flax.serialization.from_state_dict(template, tree)
        except ValueError as error:
            raise AlexNetError(f"{where}: not a state of this version's optimizer ({reason(error)})") from error

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._reader.close()
        self._writer.close()

    def _read_state(self, folder: pathlib.Path) -> Tree:
        """The tree that Orbax wrote below `folder`, as nested dicts of NumPy arrays."""
        with plain_path(self._folder) as parent:
            path = parent / folder.name / "state"
            metadata = self._reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree: Tree = self._reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            return tree

    def _write_state(self, tree: Tree, saving: pathlib.Path, target: pathlib.Path) -> None:
        """Writes the arrays; all processes must call it."""
        # When a write fails, threads of Orbax and TensorStore print tracebacks in addition to the exception that is
        # raised.
        with (
            _one_line_errors(target),
            contextlib.redirect_stderr(io.StringIO()),
            processes.limited(f"{target}: saving"),
        ):
            try:
                with plain_path(self._folder) as parent:  # Orbax globs the whole path when it merges
                    self._writer.save(parent / saving.name / "state", args=ocp.args.StandardSave(tree))
            except Exception:
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # repeats the errors when the process exits
                time.sleep(0.5)  # wait until the threads have printed
                raise

    def _commit(self, tree: Tree, described: dict[str, Any], saving: pathlib.Path, target: pathlib.Path) -> None:
        """Checks the arrays, adds `memory.json` and the manifest, flushes all to the disk, renames the folder."""
        with _one_line_errors(target):
            saved = _leaves(self._read_state(saving))
            for name, leaf in _leaves(tree).items():
                if name not in saved or _contents(saved[name]) != _contents(leaf):
                    raise OSError(f"{name} can't be read back as it was written")
            (saving / MEMORY).write_bytes(to_bytes(described))
            paths = _paths(saving)
            files = describe_files(saving, [path for path in paths if path.is_file()])
            (saving / MANIFEST).write_bytes(to_bytes({"step": int(target.name), "files": files}))
            for path in (*paths, saving / MANIFEST, saving):
                sync(path)
            saving.rename(target)
            sync(self._folder)

    def _accuracy(self, step: int) -> float | None:
        """The validation accuracy of a checkpoint; None if it was not measured or the checkpoint is gone."""
        folder = self._folder / str(step)
        try:
            verify_files(folder, {MEMORY: _manifest(folder, step)[MEMORY]})
            accuracy = _read_json(folder / MEMORY)["validation_accuracy"]
        except (AlexNetError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if not os.path.lexists(folder):
                return None
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{folder / MEMORY} can't be read ({reason(error)})") from error
        return accuracy if isinstance(accuracy, float) else None

    def _remove_old(self) -> None:
        try:
            keep = {*self.all_steps()[-KEEP_NEWEST:], self.best_step()}
        except DamagedError as damage:
            warn(f"no old checkpoint is removed: {damage}")
            return
        failed: list[tuple[pathlib.Path, OSError]] = []
        for step in sorted(set(self.all_steps()) - keep):
            old = self._folder / str(step)
            try:
                if old.is_symlink():  # git-annex and DVC keep the contents elsewhere
                    old.unlink()
                else:
                    # Renamed first: an incomplete checkpoint must never have its name.
                    old.rename(self._removing)
                    shutil.rmtree(self._removing)
            except OSError as error:
                failed.append((old, error))
        if failed:
            names = ", ".join(str(old) for old, _ in failed)
            warn(f"no longer needed, but can't be removed: {names} ({reason(failed[0][1])})")

    def _move_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint to `set-aside/`, under a new name if its own is taken; returns the new path."""
        try:
            self._set_aside.mkdir(exist_ok=True)
            names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
            free = next(name for name in names if not (self._set_aside / name).exists())
            return (self._folder / str(step)).rename(self._set_aside / free)
        except OSError as error:
            raise AlexNetError(f"{self._folder / str(step)} is damaged and can't be moved ({reason(error)})") from error


def verify(folder: pathlib.Path, step: int) -> None:
    """Compares size and SHA-256 of every file of a checkpoint with its manifest; follows links.

    Files that are not in the manifest are ignored: file systems, desktops and synchronization programs add some.

    Raises:
      DamagedError: a file is missing or changed, or the checkpoint is of another step.
      AlexNetError: a file can't be read, or is a broken link.
    """
    verify_files(folder, _manifest(folder, step))


def _manifest(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """What a checkpoint's manifest says of its files; raises as `verify`."""
    try:
        manifest = _read_json(folder / MANIFEST)
        saved_step, files = manifest["step"], manifest["files"]
        has_state = any(name.startswith("state/") for name in files)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(folder if folder.is_symlink() and not folder.exists() else folder / MANIFEST) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{folder / MANIFEST} is damaged") from None
    except OSError as error:
        raise AlexNetError(f"{folder}: can't be read ({reason(error)})") from error
    if saved_step != step:
        raise DamagedError(f"{folder} was saved as step {saved_step}")
    if not has_state:
        raise DamagedError(f"{folder} was saved without a state")
    described: dict[str, Any] = files
    return described


def describe_files(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> dict[str, Any]:
    """Size and SHA-256 of files below `folder`, by their path from there."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }


def verify_files(folder: pathlib.Path, files: Any) -> None:
    """Compares files with the sizes and hashes of `describe_files`, read from a manifest.

    Raises:
      DamagedError: a file is missing or changed, or `files` is something else.
      AlexNetError: a file can't be read, or is a broken link.
    """
    try:
        wanted = {name: (file["size"], file["sha256"]) for name, file in files.items()}
    except (KeyError, TypeError, AttributeError):
        raise DamagedError(f"{folder / MANIFEST} is damaged") from None
    for name, (size, digest) in wanted.items():
        path = folder / name
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path} is not a regular file")
            if found.st_size != size:
                raise DamagedError(f"{path} has {found.st_size} bytes, but {size} were saved")
            if _sha256(path) != digest:
                raise DamagedError(f"{path} is not what was saved (SHA-256 differs)")
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(path) from None
        except OSError as error:
            raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error


def _is_saved(folder: pathlib.Path, step: int) -> bool:
    """Whether there is an intact checkpoint of `step`."""
    if not os.path.lexists(folder):
        return False
    try:
        verify(folder, step)
    except DamagedError as damage:
        raise AlexNetError(f"{folder} is in the way of a checkpoint ({damage}): move it") from damage
    return True


def _missing(path: pathlib.Path) -> AlexNetError:
    if path.is_symlink():
        return AlexNetError(
            f"{path} is a broken link: fetch or mount its target first (git annex get, dvc pull, mount)"
        )
    return DamagedError(f"{path} is missing")


@contextlib.contextmanager
def _one_line_errors(target: pathlib.Path) -> Iterator[None]:
    """Turns any error of a save into a one-line AlexNetError."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions as well
        if processes.is_lost_link(error):
            raise
        raise AlexNetError(f"{target}: can't be written ({_cause(error)})") from error


def _cause(error: Exception) -> str:
    """The reason for an error: the system's text if TensorStore quotes a system error number."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else reason(error)


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(read_bytes(path, _MAX_JSON_BYTES))


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files and folders below `folder`, except hidden ones (NFS keeps deleted files as `.nfs...`)."""

    def fail(error: OSError) -> None:  # `rglob` would ignore it
        raise error

    walk = os.walk(folder, onerror=fail)
    found = [pathlib.Path(parent) / name for parent, folders, names in walk for name in (*folders, *names)]
    return sorted(path for path in found if not path.name.startswith("."))


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _contents(leaf: Any) -> tuple[Any, ...]:
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()
