"""Scores of predictions: counts and means over examples, calibration, comparison of two networks."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.training.predict import cross_entropies, softmax


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int) -> int:
    """Number of examples, of logits [N, classes] and int labels [N], whose label is among the `k` largest logits.

    Equal logits count in favour of the label. With `k` >= classes, all are correct.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return int(((logits > own).sum(axis=1) < k).sum())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 [num_classes, num_classes]: row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Accuracy against confidence, in equally wide bins of the largest probability.

    Attributes:
      count: int [bins], number of examples.
      confidence: float [bins], their mean largest probability; NaN where there is no example.
      accuracy: float [bins], the share of them that are correct; NaN where there is no example.
      error: expected calibration error, the mean of |accuracy - confidence| over examples (Guo et al., 2017).
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Calibration:
    """Calibration of N > 0 predictions: `confidence` is the largest probability, float [N], `correct` is bool [N].

    A probability on the border of two bins belongs to the lower one, as in Guo et al.
    """
    largest = confidence.astype(np.float64)
    bin_of = np.clip(np.ceil(largest * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    mean_confidence, accuracy = (
        np.divide(np.bincount(bin_of, weights=x, minlength=bins), count, out=np.full(bins, np.nan), where=count > 0)
        for x in (largest, correct)
    )
    gaps = np.abs(accuracy - mean_confidence)[count > 0]
    return Calibration(count, mean_confidence, accuracy, float((gaps * count[count > 0]).sum() / len(correct)))


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Two networks on the same examples.

    Attributes:
      first_only: number of examples that only the first classifies correctly.
      second_only: number of examples that only the second classifies correctly.
      difference: accuracy of the second minus that of the first.
      interval: of the difference, 95%, from the normal approximation.
      p_value: p-value of McNemar's exact test: the probability that these examples split at least as unevenly if each
        is a fair coin toss.
    """

    first_only: int
    second_only: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> PairedTest:
    """Compares two networks by the examples that only one of them classifies correctly (McNemar, 1947).

    `first` and `second` are bool [N], whether each network is correct. If b examples are correct only in the first and
    c only in the second, the difference is (c - b) / N, its variance (b + c - (c - b)^2 / N) / N^2, and the p-value
    that of a two-sided binomial test of b in b + c.
    """
    import scipy.stats  # late, because importing it takes longer than most of eval.py

    b, c, n = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    difference = (c - b) / n
    half = 1.96 * math.sqrt(b + c - (c - b) ** 2 / n) / n
    p_value = float(scipy.stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    return PairedTest(b, c, difference, (difference - half, difference + half), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the i-th smallest of m p-values is multiplied by m - i + 1, and their order is kept."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy, for the sampling of `count` images, without variation between seeds."""
    import scipy.stats

    interval = scipy.stats.binomtest(correct, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def score(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Counts, means over N examples and means over classes, of float32 logits [N, classes] and int labels [N].

    Returns:
      JSON-ready: accuracy, top5_accuracy (the label is among the five largest logits), loss (mean cross entropy, nats),
      calibration_error (`Calibration.error`), count, correct, per_class (`class_scores`), confusion (row = true class),
      and macro: the means of precision, recall and F1 over the classes that have examples.
    """
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(class_names))
    correct, rows = int(matrix.trace()), class_scores(matrix, class_names)
    present = [row for row in rows if row["count"]]
    return {
        "accuracy": correct / len(labels),
        "top5_accuracy": top_k_correct(logits, labels, 5) / len(labels),
        "loss": float(cross_entropies(logits, labels).mean()),
        "calibration_error": calibration(softmax(logits).max(axis=1), logits.argmax(axis=1) == labels).error,
        "count": len(labels),
        "correct": correct,
        "macro": {
            name: sum(row[name] or 0.0 for row in present) / len(present) for name in ("precision", "recall", "f1")
        },
        "per_class": rows,
        "confusion": matrix.tolist(),
    }


def class_scores(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class of a confusion matrix (row = true class): its name, counts, precision, recall and F1.

        precision = correct / predicted,  recall = correct / count,  F1 = 2 correct / (count + predicted)

    where `count` examples are of the class (its support) and `predicted` are taken for it. A quotient whose denominator
    is 0 is None; a macro mean counts it as 0, as scikit-learn does.
    """

    def share(part: int, of: int) -> float | None:
        return part / of if of else None

    columns = (confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal())
    return [
        {
            "class": name,
            "count": count,
            "predicted": predicted,
            "correct": correct,
            "precision": share(correct, predicted),
            "recall": share(correct, count),
            "f1": share(2 * correct, count + predicted),
        }
        for name, count, predicted, correct in zip(class_names, *(column.tolist() for column in columns), strict=True)
    ]
