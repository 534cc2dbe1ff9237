"""Damages a checkpoint in many systematic ways: `python -m tests.stress.corruption`.

Each bit of each byte of each file is flipped; each file is truncated, emptied, zeroed, deleted, replaced by another
step's and by a link. Whenever a file no longer has the saved contents, verification must notice.
"""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from alexnet_jax.runs.checkpoint import MANIFEST, Checkpoints, DamagedError, verify
from alexnet_jax.training.state import TrainState
from tests.stress import results_file


def make_state(step: int) -> TrainState:
    """As small as can be; each step's arrays differ."""
    kernel = jnp.arange(6.0).reshape(2, 3) + step
    return TrainState(jnp.int32(step), {"dense": {"kernel": kernel}}, {"trace": -kernel}, jnp.bool_(True))


def save_two(folder: pathlib.Path) -> None:
    """Saves steps 1 and 2."""
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(make_state(step), {"step": step}, accuracy=None)
    checkpoints.close()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files of a checkpoint, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: pathlib.Path, other: pathlib.Path) -> None:
    """Loses its end."""
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: pathlib.Path, other: pathlib.Path) -> None:
    """Loses all."""
    path.write_bytes(b"")


def zero(path: pathlib.Path, other: pathlib.Path) -> None:
    """Keeps its size."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: pathlib.Path, other: pathlib.Path) -> None:
    """Is gone."""
    path.unlink()


def swap(path: pathlib.Path, other: pathlib.Path) -> None:
    """Is another step's."""
    shutil.copy(other, path)


def link(path: pathlib.Path, other: pathlib.Path) -> None:
    """Points to another step's."""
    path.unlink()
    path.symlink_to(other)


DAMAGES: Sequence[Callable[[pathlib.Path, pathlib.Path], None]] = (truncate, empty, zero, delete, swap, link)


def is_found(folder: pathlib.Path, step: int) -> bool:
    """Whether verification says that the checkpoint is damaged."""
    try:
        verify(folder, step)
    except DamagedError:
        return True
    return False


@contextlib.contextmanager
def restored(path: pathlib.Path) -> Iterator[bytes]:
    """A file's contents, which are written back at the end."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def flip(folder: pathlib.Path, step: int, bits: Callable[[int], Sequence[int]]) -> tuple[int, list[str]]:
    """Flips bits of every byte, one at a time; returns how many, and those that were not found.

    A flipped bit in the manifest's white space may leave its meaning as it was: then nothing is damaged.

    Args:
      folder: of the checkpoint.
      step: that it was saved as.
      bits: which bits (0..7) of the byte at a place.
    """
    flipped, missed = 0, []
    for path in files(folder):
        with restored(path) as content, path.open("r+b", buffering=0) as file:
            for place in range(len(content)):
                for bit in bits(place):
                    changed = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
                    file.seek(0)
                    file.write(changed)  # without truncating, which costs much more
                    if path.name == MANIFEST and _means_the_same(changed, content):
                        continue
                    flipped += 1
                    if not is_found(folder, step):
                        missed.append(f"bit {bit} of byte {place} of {path.name}")
    return flipped, missed


def damage_each_file(folder: pathlib.Path, step: int, other: pathlib.Path) -> tuple[int, list[str]]:
    """Does each of DAMAGES to each file; returns how many, and those that were not found.

    Args:
      folder: of the checkpoint.
      step: that it was saved as.
      other: folder of another step's checkpoint. A file that is the same there, or is not there, is left alone.
    """
    done, missed = 0, []
    for path in files(folder):
        counterpart = other / path.relative_to(folder)
        for damage in DAMAGES:
            with restored(path) as content:
                if damage in (swap, link) and (not counterpart.exists() or counterpart.read_bytes() == content):
                    continue
                damage(path, counterpart)
                done += 1
                if not is_found(folder, step):
                    missed.append(f"{damage.__name__} {path.name}")
    return done, missed


def _means_the_same(changed: bytes, content: bytes) -> bool:
    try:
        return bool(json.loads(changed) == json.loads(content))
    except ValueError:
        return False


def main() -> None:
    """Goes through all of it, writes the figures."""
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "checkpoints"
        save_two(folder)
        flips, missed_flips = flip(folder / "2", 2, lambda place: range(8))
        damages, missed_damages = damage_each_file(folder / "2", 2, folder / "1")
        names = files(folder / "2")
        figures = {
            "files": len(names),
            "bytes": sum(path.stat().st_size for path in names),
            "flipped_bits": flips,
            "damaged_files": damages,
            "not_found": missed_flips + missed_damages,
        }
    results_file.write("corruption", "python -m tests.stress.corruption", figures)
    if figures["not_found"]:
        raise SystemExit("a damage was not found")


if __name__ == "__main__":
    main()
