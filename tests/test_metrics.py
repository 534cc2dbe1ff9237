import errno
import json
import os
import signal
import time

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import log_loss, precision_recall_fscore_support, top_k_accuracy_score

from alexnet_jax.errors import AlexNetError
from alexnet_jax.inspection.scores import (
    accuracy_interval,
    calibration,
    confusion_matrix,
    mcnemar,
    score,
    top_k_correct,
)
from alexnet_jax.runs.log import JsonlWriter, TensorBoardWriter, read_jsonl
from alexnet_jax.training.predict import cross_entropies, softmax

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 5, (200, 10)).astype(np.float32)
LABELS = RNG.integers(0, 10, 200)


def test_cross_entropy_and_softmax_equal_sklearn():
    probabilities = softmax(LOGITS)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    wide = probabilities.astype(np.float64)
    expected = log_loss(LABELS, wide / wide.sum(axis=1, keepdims=True), labels=range(10), normalize=False)
    np.testing.assert_allclose(cross_entropies(LOGITS, LABELS).sum(), expected, rtol=1e-5)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32)
    np.testing.assert_allclose(cross_entropies(logits, np.array([1, 0])), [1e4, 1e4])
    np.testing.assert_allclose(softmax(logits), [[1, 0], [0, 1]])


def test_confusion_matrix_equals_sklearn():
    predicted = LOGITS.argmax(axis=1)
    np.testing.assert_array_equal(confusion_matrix(LABELS, predicted, 10), sklearn_confusion_matrix(LABELS, predicted))


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_top_k_equals_sklearn(k):
    expected = top_k_accuracy_score(LABELS, LOGITS, k=k, normalize=False) if k < 10 else 200
    assert top_k_correct(LOGITS, LABELS, k) == expected


def test_jsonl_drops_what_comes_again_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, last_step=0)
    for step in (10, 20, 30):
        writer.write({"step": step, "split": "train", "loss": 1.0})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 40, "sp')
    assert [r["step"] for r in read_jsonl(path)] == [10, 20, 30]
    writer = JsonlWriter(path, last_step=20)
    writer.write({"step": 30, "split": "train", "loss": 2.0})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_a_record_that_has_no_room_on_the_disk_is_an_error(tmp_path):
    """A limit on the size of files simulates a full disk."""
    resource = pytest.importorskip("resource")
    path, record = tmp_path / "metrics.jsonl", {"step": 8, "split": "train", "loss": 1.0}
    writer, before = JsonlWriter(path, last_step=0), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.write(record)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        for problem in ("No space left", "File too large"):  # a part of the line fits, then nothing
            with pytest.raises(AlexNetError, match=f"can't write .*metrics.jsonl: {problem}"):
                writer.write(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        writer.close()
    assert read_jsonl(path) == [record]


def test_a_flush_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = JsonlWriter(tmp_path / "metrics.jsonl", last_step=0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(AlexNetError, match=r"can't write .*metrics.jsonl: No space left"):
            writer.flush()
    writer.close()


def test_tensorboard_events_can_be_read_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path, last_step=0)
    writer.write({"step": 7, "epoch": 0, "split": "validation", "accuracy": 0.5, "loss": 1.25})
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = events.Scalars("validation/loss")
    assert (scalar.step, scalar.value) == (7, 1.25)


@pytest.mark.parametrize("back", [0, 86_400])
def test_tensorboard_points_after_a_resume_survive_a_clock_set_back(tmp_path, monkeypatch, back):
    """TensorBoard reads event files in the order of their names, which begin with the time."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps, last_step, clock in [((1, 2, 3), 0, 2e9), ((3, 4), 2, 2e9 - back), ((5, 6), 4, 2e9 - 2 * back)]:
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        writer = TensorBoardWriter(tmp_path, last_step)
        for step in steps:
            writer.write({"step": step, "epoch": 0, "split": "train", "loss": float(step + last_step)})
        writer.close()
        monkeypatch.undo()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    points = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0), (5, 9.0), (6, 10.0)]


def test_no_tensorboard_file_is_overwritten(tmp_path):
    pytest.importorskip("tensorboardX")
    now = int(time.time())
    for stamp in (1_000_000_000, now - 4, now - 3, now + 40):
        (tmp_path / f"events.out.tfevents.{stamp}.host").write_text(str(stamp))
    (tmp_path / "events.out.tfevents.desktop.ini").write_text("not ours")
    TensorBoardWriter(tmp_path, last_step=0).close()
    *files, _ = sorted(path for path in tmp_path.glob("*.host"))
    assert [int(path.read_text()) for path in (*files, _)] == [1_000_000_000, now - 4, now - 3, now + 40]
    assert (tmp_path / "events.out.tfevents.desktop.ini").read_text() == "not ours"


def test_calibration_by_hand():
    confidence, right = np.array([0.9, 0.8, 0.6, 0.55]), np.array([True, False, False, True])
    found = calibration(confidence, right, bins=2)
    assert found.count.tolist() == [0, 4]
    assert np.isnan(found.accuracy[0])
    assert found.accuracy[1] == 0.5
    assert found.confidence[1] == pytest.approx(0.7125)
    assert found.error == pytest.approx(0.2125)
    found = calibration(confidence, right, bins=4)  # borders at 0.5, 0.75
    assert found.count.tolist() == [0, 0, 2, 2]
    assert found.error == pytest.approx((2 * abs(0.5 - 0.575) + 2 * abs(0.5 - 0.85)) / 4)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    probabilities = softmax(LOGITS)
    labels = np.array(
        [np.random.default_rng(i).choice(10, p=p / p.sum()) for i, p in enumerate(probabilities.astype(float))]
    )
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    assert calibration(confidence, right).error < 0.1
    assert calibration(confidence, ~right).error > 0.5


def test_mcnemar_by_hand():
    first, second = np.array([1] * 10 + [0] * 3 + [1, 0], bool), np.array([0] * 10 + [1] * 3 + [1, 0], bool)
    test = mcnemar(first, second)
    assert (test.first_only, test.second_only) == (10, 3)
    assert test.difference == pytest.approx(-7 / 15)
    # Both tails of 13 fair coins with at most 3 heads: 2 (1 + 13 + 78 + 286) / 2^13.
    assert test.p_value == pytest.approx(2 * 378 / 8192)
    half = 1.96 * (13 - 49 / 15) ** 0.5 / 15
    assert test.interval == pytest.approx((-7 / 15 - half, -7 / 15 + half))
    assert mcnemar(first, first).p_value == 1
    assert mcnemar(first, first).interval == (0, 0)


def test_wilsons_interval_by_hand():
    p, n, z = 0.8, 100, 1.959964
    middle, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z * (p * (1 - p) / n + (z / 2 / n) ** 2) ** 0.5 / (1 + z**2 / n)
    assert accuracy_interval(80, 100) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert accuracy_interval(0, 10)[0] == 0


def test_class_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 5], 200)  # none of class 4
    logits = rng.normal(size=(200, 6)) + 2 * np.eye(6)[labels] - 9 * np.eye(6)[3]  # and class 3 is never predicted
    result = score(logits, labels, "abcdef")
    rows = result["per_class"]
    expected = precision_recall_fscore_support(labels, logits.argmax(axis=1), labels=range(6), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "count"), expected, strict=True):
        np.testing.assert_allclose([row[name] or 0 for row in rows], values)
    assert rows[3]["precision"] is None
    assert rows[4]["recall"] is None
    macro = precision_recall_fscore_support(
        labels, logits.argmax(axis=1), labels=[0, 1, 2, 3, 5], average="macro", zero_division=0
    )
    np.testing.assert_allclose(list(result["macro"].values()), macro[:3])
