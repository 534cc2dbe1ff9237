"""What eval.py does: a run on a split, several runs side by side, a run on a person's own pictures."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alexnet_jax import plots, runtime, terminal
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import load
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.distributed.devices import replicate, select_devices
from alexnet_jax.errors import AlexNetError, UsageError, warn
from alexnet_jax.files import to_bytes, write_atomically, write_together
from alexnet_jax.inspection.evaluation import Evaluation, Question
from alexnet_jax.inspection.run import Run, open_run
from alexnet_jax.inspection.scores import score
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import Record, read_jsonl
from alexnet_jax.training import predict
from alexnet_jax.training.predict import predict_split, softmax

MOST_CLASSES_PRINTED = 30


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluates a run on a split, prints a table, writes the results to `out`, and with `report` a page of them.

    Returns:
      What `eval/<split>.json` holds.

    Raises:
      AlexNetError: the run or its data can't be read, or the data is not the run's.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    question = _opened(config.run, config)
    run, name = question.run, question.split
    records = read_jsonl(run.folder.metrics) if config.report else []
    folder = _results_folder(run, config)
    evaluation = _answered(question, config, devices)
    results = evaluation.results
    written = None
    try:
        if folder is not None:
            write_together(folder, _evaluation_files(evaluation))
            written = folder
    finally:
        print_results(results, written)
    if config.report and folder is not None:
        from alexnet_jax.inspection import report  # not before: plotly takes long to import

        page = folder / f"report{_suffix(name)}.html"
        write_atomically(page, report.page(evaluation, records).encode())
        print(f"report in {page}")
    return results


def _results_folder(run: Run, config: EvalConfig) -> pathlib.Path | None:
    """The folder for results; None, with a warning, where the run's folder can't be written.

    Raises:
      AlexNetError: the same, and a report is wanted.
    """
    if config.out is not None:
        return config.out
    existing = next(place for place in (run.folder.eval, run.folder.path) if place.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        return run.folder.eval
    remedy = "give another folder with --out"
    if config.report:
        raise AlexNetError(f"{existing} can't be written: {remedy}")
    warn(f"{existing} can't be written, so the results are only printed: to keep them, {remedy}")
    return None


def _suffix(split: str) -> str:
    """What the names of a split's files end with: nothing for the test images."""
    return "" if split == "test" else f"-{split}"


def _evaluation_files(evaluation: Evaluation) -> dict[str, bytes]:
    """Contents of the files of an evaluation by name; the results come last."""
    run, results, suffix = evaluation.run, evaluation.results, _suffix(evaluation.split)
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions,
        probabilities=softmax(evaluation.logits),
        predicted=evaluation.logits.argmax(axis=1),
        labels=evaluation.labels,
    )
    matrix = np.array(results["confusion"])
    title = f"{evaluation.split}: {results['correct']:,} of {results['count']:,} correct ({results['accuracy']:.2%})"
    return {
        f"predictions{suffix}.npz": predictions.getvalue(),
        f"confusion{suffix}.png": plots.to_png(plots.confusion_matrix(matrix, run.class_names, title)),
        "kernels.png": plots.to_png(plots.kernels(run.params["conv1"]["kernel"])),
        f"{evaluation.split}.json": to_bytes(results),
    }


def _opened(path: pathlib.Path, config: EvalConfig) -> Question:
    """Opens a run and its data, and checks that they go with the flags."""
    run = open_run(path, config.checkpoint)
    _check_views(run, config)
    dataset = _load_data(run, config)
    if dataset.fingerprint() != run.dataset.fingerprint:
        raise AlexNetError(f"{path} was trained on other images than those from {dataset.source}")
    name = config.split or ("test" if "test" in dataset.counts else "validation")
    return Question(run, dataset, name)


def _load_data(run: Run, config: EvalConfig) -> Dataset:
    """The run's data from --data-dir, or from where it was in training."""
    place = run.config.data.data_dir
    if config.data_dir is not None:
        return load(dataclasses.replace(run.config.data, data_dir=config.data_dir))
    try:
        return load(run.config.data)
    except AlexNetError as error:
        if place is None:
            raise
        lost = f"{run.folder.path}: the run's data was in {place} ({error})"
        raise AlexNetError(f"{lost}: where is it now? Give --data-dir") from error


def _answered(question: Question, config: EvalConfig, devices: Sequence[jax.Device]) -> Evaluation:
    """Predicts and scores."""
    run, dataset, name = question.run, question.dataset, question.split
    logits, labels = predict_split(
        predict.make_predict_step(run.model, run.preprocessing, devices, config.views),
        replicate(run.params, devices),
        dataset,
        name,
        config.batch_size,
        devices,
    )
    results = score(logits, labels, run.class_names) | {
        "split": name,
        "views": config.views,
        "step": run.step,
        "checkpoint": config.checkpoint,
        "dataset": dataset.name,
        "source": dataset.source,
        "versions": versions(),
    }
    return Evaluation(run, dataset, name, logits, labels, results)


def _check_views(run: Run, config: EvalConfig) -> None:
    augmentation = run.config.augmentation
    if config.views == 10 and not (augmentation.crop_size or augmentation.crop_padding):
        raise UsageError(f"--views 10: {run.folder.path} was trained without crops; 2 adds the mirrored images")


def print_results(results: Record, folder: pathlib.Path | None) -> None:
    """Prints an evaluation."""
    rows = [row for row in results["per_class"] if row["count"]]
    if len(rows) > MOST_CLASSES_PRINTED:
        rows = sorted(rows, key=lambda row: -row["accuracy"])
        rows = rows[: MOST_CLASSES_PRINTED // 2] + rows[-MOST_CLASSES_PRINTED // 2 :]
        print(f"The {len(rows) // 2} best and the {len(rows) // 2} worst of {len(results['per_class'])} classes:")
    width = max(len(row["class"]) for row in rows)
    for row in rows:
        accuracy = row["accuracy"] or 0.0
        print(f"{row['class']:>{width}}  {accuracy:7.2%}  {terminal.bar(accuracy)}")
    print(f"\n{results['split']} accuracy: {results['accuracy']:.4f} ({results['correct']:,} of {results['count']:,})")
    print(f"top-5 accuracy: {results['top5_accuracy']:.4f}, mean cross entropy: {results['loss']:.4f}")
    print(f"step {results['step']:,}" + (f"; details and pictures in {folder}" if folder is not None else ""))
