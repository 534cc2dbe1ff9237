"""Exact reductions, and writers of metrics."""

import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from alexnet_jax.config import shown
from alexnet_jax.errors import AlexNetError
from alexnet_jax.files import read_bytes, write_atomically

_MAX_BYTES = 256 * 1024**2  # of metrics.jsonl: over a million lines

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


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int) -> int:
    """How many examples have fewer than `k` classes with a larger logit than their label's.

    Args:
      logits: float [N, classes].
      labels: int [N].
      k: 1 or more; from the number of classes on, all are right.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return int(((logits > own).sum(axis=1) < k).sum())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 [num_classes, num_classes]: row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """How often a network is right when it says how sure it is.

    Attributes:
      count: int [bins], examples whose largest probability falls into each of equally wide bins of [0, 1].
      confidence: float [bins], their mean largest probability; NaN where there is none.
      accuracy: float [bins], the share of them that is right; NaN where there is none.
      error: expected calibration error, the mean of |accuracy - confidence| over examples (Guo et al., 2017).
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> Calibration:
    """Sorts examples by their largest probability and asks how many are right in each bin.

    Args:
      confidence: float [N], the largest probability of each of N > 0 examples.
      right: bool [N], whether its class is the label.
      bins: equally wide; a probability on a border counts to the lower bin, as in the source.
    """
    largest = confidence.astype(np.float64)
    bin_of = np.clip(np.ceil(largest * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    told, accuracy = (
        np.divide(np.bincount(bin_of, weights=x, minlength=bins), count, out=np.full(bins, np.nan), where=count > 0)
        for x in (largest, right)
    )
    gaps = np.abs(accuracy - told)[count > 0]
    return Calibration(count, told, accuracy, float((gaps * count[count > 0]).sum() / len(right)))


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Two networks on the same examples.

    Attributes:
      first_only: examples that only the first has right.
      second_only: examples that only the second has right.
      difference: accuracy of the second less that of the first.
      interval: of the difference, 95%, from the normal approximation.
      p_value: McNemar's exact test: how probable so uneven a split of these examples is if each is a fair coin.
    """

    first_only: int
    second_only: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> PairedTest:
    """Compares two networks by the examples that only one of them has right (McNemar, 1947).

    With b and c such examples of N: difference = (c - b) / N, its variance (b + c - (c - b)^2 / N) / N^2, and the
    p-value is the two-sided binomial one of b in b + c.

    Args:
      first: bool [N], whether the first network has each example right.
      second: bool [N], the same of the second.
    """
    import scipy.stats  # not before: it takes longer to import than most of eval.py

    b, c, n = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    difference = (c - b) / n
    half = 1.96 * math.sqrt(b + c - (c - b) ** 2 / n) / n
    p_value = float(scipy.stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    return PairedTest(b, c, difference, (difference - half, difference + half), p_value)


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """95% interval (Wilson's) of an accuracy as that of a draw of `count` images; it knows nothing of seeds."""
    import scipy.stats

    interval = scipy.stats.binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


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
