"""Exact reductions, and writers of metrics."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.training.predict import cross_entropies, softmax


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


def score(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Exact counts and means over examples.

    Args:
      logits: float32 [N, classes].
      labels: int [N].
      class_names: name of each class.

    Returns:
      JSON-ready: accuracy, top5_accuracy (the label is among the five largest logits), loss (mean cross entropy, nats),
      calibration_error (see `metrics.calibration`), count, correct, per_class, confusion (row = true class).
    """
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(class_names))
    correct, counts = matrix.diagonal(), matrix.sum(axis=1)
    return {
        "accuracy": int(correct.sum()) / len(labels),
        "top5_accuracy": int(top_k_correct(logits, labels, 5)) / len(labels),
        "loss": float(cross_entropies(logits, labels).mean()),
        "calibration_error": calibration(softmax(logits).max(axis=1), logits.argmax(axis=1) == labels).error,
        "count": len(labels),
        "correct": int(correct.sum()),
        "per_class": [
            {"class": name, "count": int(n), "correct": int(c), "accuracy": int(c) / int(n) if n else None}
            for name, n, c in zip(class_names, counts, correct, strict=True)
        ],
        "confusion": matrix.tolist(),
    }
