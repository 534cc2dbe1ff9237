"""Metrics of a run: metrics.jsonl and TensorBoard."""

import contextlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from alexnet_jax.errors import AlexNetError, reason, shown
from alexnet_jax.files import read_bytes, write_atomically

_MAX_BYTES = 256 * 1024**2  # of metrics.jsonl: over a million lines

Record = Mapping[str, Any]


def read_jsonl(path: pathlib.Path) -> list[Record]:
    """The records of a metrics.jsonl, without an incomplete last line (of a killed run); none if the file is missing.

    Raises:
      AlexNetError: it can't be read, or another line is not a record.
    """
    try:
        lines = read_bytes(path, _MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records.append(_record(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline ends it
                break
            raise AlexNetError(f"{path}: line {number} is not a record ({reason(error)}): remove it") from error
    return records


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it must be a JSON object")
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        raise ValueError("step must be a whole number")
    if record.get("split") not in ("train", "validation"):
        raise ValueError("split must be train or validation")
    numbers = {name: value for name, value in record.items() if name != "split"}
    if record["split"] == "validation":
        numbers.setdefault("accuracy", None)  # required: a resumed run looks for the best accuracy
    for name, value in numbers.items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
            raise ValueError(f"{shown(name)} must be a number")
    if "accuracy" in numbers and not 0 <= numbers["accuracy"] <= 1:
        raise ValueError("accuracy must be in [0, 1]")
    return record


class JsonlWriter:
    """Appends records to metrics.jsonl, one JSON object per line, unbuffered, so that a killed run loses none."""

    def __init__(self, path: pathlib.Path, last_step: int) -> None:
        """Drops the records after `last_step`, the step that the run resumes from: they will be written again."""
        kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._path = path
        with self._naming():
            self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Appends a record: `step`, `epoch`, `split` and numbers.

        Raises:
          AlexNetError: the line could not be written completely.
        """
        line = (json.dumps(record) + "\n").encode()
        with self._naming():
            if self._file.write(line) < len(line):
                raise OSError("No space left on device")

    def flush(self) -> None:
        """Flushes the records to the disk (`fsync`)."""
        with self._naming():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with self._naming():
            self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AlexNetError(f"can't write {self._path}: {reason(error)}") from error


class TensorBoardWriter:
    """Writes records as TensorBoard scalars; `loss` of split `train` becomes `train/loss`."""

    def __init__(self, folder: pathlib.Path, last_step: int) -> None:
        """Hides the events after `last_step`, the step that the run resumes from."""
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
        """Writes buffered events."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def _date_back(folder: pathlib.Path) -> None:
    """Renames event files so that a new one sorts after them, even if the clock was set back.

    TensorBoard reads them in the order of their names, `events.out.tfevents.SECONDS.HOST`.
    """
    found = [re.fullmatch(r"events\.out\.tfevents\.([0-9]{10})\.(.+)", path.name) for path in folder.glob("events.*")]
    files = sorted((int(name[1]), name[2], name[0]) for name in found if name)
    now = int(time.time())
    if files and files[-1][0] >= now:
        before = min(files[0][0], now) - len(files)  # so that no new name equals an old one
        for place, (_, rest, name) in enumerate(files):
            (folder / name).rename(folder / f"events.out.tfevents.{before + place}.{rest}")
