"""Checkpoints: written by Orbax, proved by a manifest of SHA-256 hashes, there whole or not at all.

    checkpoints/<step>/state/                the train state, by Orbax
    checkpoints/<step>/memory.json           what the loop must remember, and the validation accuracy
    checkpoints/<step>/manifest.json         the step, and size and SHA-256 of every other file
    checkpoints/set-aside/                   checkpoints that were found damaged, for a person to look at
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
import time
from collections.abc import Iterator
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from alexnet_jax import processes, steps
from alexnet_jax.errors import AlexNetError, warn
from alexnet_jax.files import sync, to_bytes
from alexnet_jax.steps import TrainState

KEEP_NEWEST = 2
MANIFEST = "manifest.json"
MEMORY = "memory.json"


class DamagedError(AlexNetError):
    """A checkpoint is not what was saved."""


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
                for leftover in (*self._folder.glob(".saving*"), *self._folder.glob(".removing")):
                    shutil.rmtree(leftover)
            except OSError as error:
                raise AlexNetError(f"{self._folder}: can't be used ({error.strerror or error})") from error

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, rising. Whatever else lies in the folder is left alone."""
        entries = self._folder.iterdir() if self._folder.is_dir() else ()
        names = [entry.name for entry in entries if entry.name.isdecimal() and entry.is_dir()]
        return sorted(int(name) for name in names if name == str(int(name)))

    def best_step(self) -> int | None:
        """The step with the highest validation accuracy (the earliest of equals); None if none was measured."""
        scores = [(accuracy, -step) for step in self.all_steps() if (accuracy := self._accuracy(step)) is not None]
        return -max(scores)[1] if scores else None

    def save(self, state: TrainState, memory: dict[str, Any], accuracy: float | None) -> None:
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
        if processes.on_main(target.exists):
            return
        # A name for each step: machines that share a folder by NFS remember for a while what a name stood for.
        saving = self._folder / f".saving-{step}"
        tree = steps.shared(flax.serialization.to_state_dict(state))
        try:
            processes.on_main(lambda: self._prepare(saving, target))
            self._write_state(tree, saving, target)
            processes.on_main(lambda: self._commit(step, memory, accuracy, saving, target))
        except AlexNetError:
            if processes.is_main():
                shutil.rmtree(saving, ignore_errors=True)
            raise
        processes.on_main(self._remove_old)

    def restore_newest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and memory of the newest checkpoint that is as it was saved; None if there is none.

        Each newer one is named in a warning and, unless `read_only`, moved to `set-aside/`.

        Raises:
          AlexNetError: if the folder, or an intact checkpoint, can't be read.
        """
        for step in reversed(self.all_steps()):
            try:
                return self.restore_tree(step)
            except DamagedError as damage:
                where = "passed over"
                if not self._read_only:
                    where = f"set aside as {self._move_aside(step)}"
                warn(f"checkpoint of step {step:,} {where}: {damage}")
        return None

    @property
    def set_aside(self) -> pathlib.Path:
        """Where damaged checkpoints are moved."""
        return self._folder / "set-aside"

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state (nested dicts of NumPy arrays) and the memory saved at `step`.

        Raises:
          DamagedError: it is not what was saved.
          AlexNetError: it can't be read.
        """
        folder = self._folder / str(step)
        verify(folder, step)
        try:
            metadata = self._reader.metadata(folder / "state").item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree = self._reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            return tree, json.loads((folder / MEMORY).read_bytes())["memory"]
        except Exception as error:
            raise AlexNetError(f"{folder}: can't be read ({_reason(error)})") from error

    def to_state(self, tree: dict[str, Any], template: TrainState) -> TrainState:
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

    def _prepare(self, saving: pathlib.Path, target: pathlib.Path) -> None:
        with _told(target):
            saving.mkdir()

    def _write_state(self, tree: dict[str, Any], saving: pathlib.Path, target: pathlib.Path) -> None:
        # Where a write fails, threads of Orbax and TensorStore print tracebacks beside the exception that tells it.
        with _told(target), contextlib.redirect_stderr(io.StringIO()), processes.limited(f"{target}: saving"):
            try:
                self._writer.save(saving / "state", args=ocp.args.StandardSave(tree))
            except Exception:
                logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tells of them again when the process ends
                time.sleep(0.5)  # for those threads
                raise

    def _commit(
        self, step: int, memory: dict[str, Any], accuracy: float | None, saving: pathlib.Path, target: pathlib.Path
    ) -> None:
        with _told(target):
            (saving / MEMORY).write_bytes(to_bytes({"memory": memory, "validation_accuracy": accuracy}))
            files = {
                name: {"size": (saving / name).stat().st_size, "sha256": _sha256(saving / name)}
                for name in sorted(_files(saving))
            }
            (saving / MANIFEST).write_bytes(to_bytes({"step": step, "files": files}))
            for path in (*saving.rglob("*"), saving):
                sync(path)
            saving.rename(target)
            sync(self._folder)

    def _accuracy(self, step: int) -> float | None:
        try:
            accuracy = json.loads((self._folder / str(step) / MEMORY).read_bytes())["validation_accuracy"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # damaged: whoever restores it will say so
        return accuracy if isinstance(accuracy, float) else None

    def _remove_old(self) -> None:
        keep = {*self.all_steps()[-KEEP_NEWEST:], self.best_step()}
        for step in self.all_steps():
            if step not in keep:
                # Half of a checkpoint must never bear its name.
                (self._folder / str(step)).rename(self._removing)
                shutil.rmtree(self._removing)

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
    """Compares every file of a checkpoint with its manifest.

    Names that begin with a dot are no part of it: file systems and desktops leave such files.

    Raises:
      DamagedError: saying which file is missing, added or changed.
      AlexNetError: a file can't be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        saved_step, wanted = manifest["step"], {name: (f["size"], f["sha256"]) for name, f in manifest["files"].items()}
        found = _files(folder) - {MANIFEST}
    except FileNotFoundError:
        raise DamagedError(f"{folder} has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{folder / MANIFEST} is damaged") from None
    except OSError as error:
        raise AlexNetError(f"{folder}: can't be read ({error.strerror or error})") from error
    if saved_step != step:
        raise DamagedError(f"{folder} was saved as step {saved_step}")
    if missing := sorted(wanted.keys() - found):
        raise DamagedError(f"{folder / missing[0]} is missing")
    if added := sorted(found - wanted.keys()):
        raise DamagedError(f"{folder / added[0]} does not belong to it")
    for name, (size, digest) in wanted.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                raise DamagedError(f"{path} has {path.stat().st_size} bytes, {size} were saved")
            if _sha256(path) != digest:
                raise DamagedError(f"{path} is not what was saved (SHA-256 differs)")
        except OSError as error:
            raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error


def _files(folder: pathlib.Path) -> set[str]:
    """Names of all files below `folder`, with `/`; links are no files."""
    found = set()
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = pathlib.Path(parent) / name
            if not name.startswith(".") and not path.is_symlink():
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


def check_like(tree: Any, template: Any, where: str) -> None:
    """Raises AlexNetError unless both trees have the same paths, shapes and dtypes."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, template)
    )
    if different := sorted(found.keys() ^ wanted.keys()):
        raise AlexNetError(f"{where}: the checkpoint is of another network or optimizer: {different[0]} differs")
    for path, leaf in wanted.items():
        have, want = (f"{np.dtype(a.dtype)}{list(np.shape(a))}" for a in (found[path], leaf))
        if have != want:
            raise AlexNetError(f"{where}: {path} is {have}, the network needs {want}")
