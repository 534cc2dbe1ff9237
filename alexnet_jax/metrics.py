"""Exact reductions, and writers of metrics."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from alexnet_jax.errors import AlexNetError

Record = Mapping[str, Any]


@dataclasses.dataclass
class Totals:
    """Sums over examples; means are taken only when they are reported.

    Attributes:
      loss: sum of cross entropies (nats).
      correct: examples classified correctly.
      count: examples.
    """

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def add(self, loss: float, correct: int, count: int) -> None:
        """Adds a batch's sums."""
        self.loss += loss
        self.correct += correct
        self.count += count


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross entropy of each example in nats, float64 [N], from logits [N, classes] and int labels [N]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 [N, classes]; each row adds up to 1."""
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 [num_classes, num_classes]: row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def read_jsonl(path: pathlib.Path) -> list[Record]:
    """The records of a metrics.jsonl; a torn last line (a killed run) is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Writer(Protocol):
    """Where records of metrics go."""

    def write(self, record: Record) -> None:
        """Takes one record with `step`, `epoch`, `split` and numbers."""

    def close(self) -> None:
        """Writes out what is held back."""


class JsonlWriter:
    """Appends one JSON object a line, at once, so that a killed run loses none."""

    def __init__(self, path: pathlib.Path, last_step: int) -> None:
        """Keeps the records up to `last_step`, where the run goes on, and drops later ones: they will come again."""
        kept = [record for record in read_jsonl(path) if record["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        """Appends a record."""
        self._file.write(json.dumps(record) + "\n")

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
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        """Writes each number as a scalar."""
        for name, value in record.items():
            if name not in ("step", "split"):
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, record: Record) -> None:
        """Hands the record to each."""
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        """Closes each."""
        for writer in self._writers:
            writer.close()
