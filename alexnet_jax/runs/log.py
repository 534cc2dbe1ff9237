"""metrics.jsonl and TensorBoard."""

import json
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alexnet_jax.errors import AlexNetError, shown
from alexnet_jax.files import read_bytes, write_atomically

_MAX_BYTES = 256 * 1024**2  # of metrics.jsonl: over a million lines

Record = Mapping[str, Any]


def read_jsonl(path: pathlib.Path) -> list[Record]:
    """The records of a metrics.jsonl; a torn last line (a killed run) is left out, a missing file has none.

    Raises:
      AlexNetError: it can't be read, or another line is no record.
    """
    try:
        lines = read_bytes(path, _MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(_record(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # nothing ends it
                break
            raise AlexNetError(f"{path}: line {number} is no record ({shown(str(error))}): remove it") from error
    return records


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("a JSON object is needed")
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        raise ValueError("step must be a whole number")
    if record.get("split") not in ("train", "validation"):
        raise ValueError("split must be train or validation")
    numbers = {name: value for name, value in record.items() if name != "split"}
    if record["split"] == "validation":
        numbers.setdefault("accuracy", None)  # a run that goes on looks for the best
    for name, value in numbers.items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
            raise ValueError(f"{shown(name)} must be a number")
    if "accuracy" in numbers and not 0 <= numbers["accuracy"] <= 1:
        raise ValueError("accuracy must be in [0, 1]")
    return record


class Writer(Protocol):
    """Where records of metrics go."""

    def write(self, record: Record) -> None:
        """Takes one record with `step`, `epoch`, `split` and numbers."""

    def flush(self) -> None:
        """Writes out what is held back."""

    def close(self) -> None:
        """Ends the writing."""


class JsonlWriter:
    """Appends one JSON object a line, at once, so that a killed run loses none."""

    def __init__(self, path: pathlib.Path, last_step: int) -> None:
        """Keeps the records up to `last_step`, where the run goes on, and drops later ones: they will come again."""
        kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Appends a record.

        Raises:
          AlexNetError: the disk takes it not, or not whole.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError("No space left on device")
        except OSError as error:
            raise AlexNetError(f"can't write {self._path}: {error.strerror or error}") from error

    def flush(self) -> None:
        """Has the disk store what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Scalars as TensorBoard event files; `loss` of split `train` becomes `train/loss`."""

    def __init__(self, folder: pathlib.Path, last_step: int) -> None:
        """Hides events after `last_step` that an interrupted run wrote."""
        try:
            import tensorboardX
        except ImportError:
            raise AlexNetError("--tensorboard needs the extra: pip install -e '.[tensorboard]'") from None
        _date_back(folder)
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        """Writes each number as a scalar."""
        for name, value in record.items():
            if name not in ("step", "split"):
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def flush(self) -> None:
        """Writes out what is held back."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def _date_back(folder: pathlib.Path) -> None:
    """Renames event files so that a new one comes after them, even if the clock was set back.

    TensorBoard reads them in the order of their names, `events.out.tfevents.SECONDS.HOST`.
    """
    found = [re.fullmatch(r"events\.out\.tfevents\.([0-9]{10})\.(.+)", path.name) for path in folder.glob("events.*")]
    files = sorted((int(name[1]), name[2], name[0]) for name in found if name)
    now = int(time.time())
    if files and files[-1][0] >= now:
        before = min(files[0][0], now) - len(files)  # so that no new name is an old one
        for place, (_, rest, name) in enumerate(files):
            (folder / name).rename(folder / f"events.out.tfevents.{before + place}.{rest}")


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, record: Record) -> None:
        """Hands the record to each."""
        for writer in self._writers:
            writer.write(record)

    def flush(self) -> None:
        """Flushes each."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes each."""
        for writer in self._writers:
            writer.close()
