"""Evaluation of one run on a split."""

import io
import pathlib
from typing import Any

import numpy as np

from alexnet_jax import runtime, terminal
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.files import to_bytes, write_atomically, write_together
from alexnet_jax.inspection.task import Evaluation, evaluate_task, open_task, results_folder
from alexnet_jax.runs.log import Record, read_jsonl
from alexnet_jax.training.predict import softmax

MOST_CLASSES_PRINTED = 30


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluates a run on a split, prints a table, writes the results and, with --report, a page that shows them.

    Returns:
      The contents of `eval/<split>.json`.

    Raises:
      AlexNetError: the run or its data can't be read, the data is not the run's, or a file can't be written.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    task = open_task(config.run, config)
    records = read_jsonl(task.run.folder.metrics) if config.report else []
    folder = results_folder(task.run, config)
    evaluation = evaluate_task(task, config, devices)
    written = None
    try:
        if folder is not None:
            write_together(folder, _evaluation_files(evaluation))
            written = folder
    finally:
        print_results(evaluation.results, written)
    if config.report and folder is not None:
        from alexnet_jax.inspection import report  # late, because plotly takes long to import

        page = folder / f"report{_suffix(task.split)}.html"
        write_atomically(page, report.page(evaluation, records).encode())
        print(f"report in {page}")
    return evaluation.results


def _suffix(split: str) -> str:
    """Suffix of the names of a split's files; empty for the test images."""
    return "" if split == "test" else f"-{split}"


def _evaluation_files(evaluation: Evaluation) -> dict[str, bytes]:
    """Contents of an evaluation's files, by name; the results come last."""
    split, results = evaluation.task.split, evaluation.results
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions,
        probabilities=softmax(evaluation.logits),
        predicted=evaluation.logits.argmax(axis=1),
        labels=evaluation.labels,
    )
    predictions_file = {f"predictions{_suffix(split)}.npz": predictions.getvalue()}
    return predictions_file | draw(evaluation) | {f"{split}.json": to_bytes(results)}


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """PNGs of the confusion matrix and of conv1's kernels, by the names of their files."""
    from alexnet_jax import plots  # takes a second

    run, split, results = evaluation.task.run, evaluation.task.split, evaluation.results
    matrix = np.array(results["confusion"])
    title = f"{split}: {results['correct']:,} of {results['count']:,} correct ({results['accuracy']:.2%})"
    return {
        f"confusion{_suffix(split)}.png": plots.to_png(plots.confusion_matrix(matrix, run.class_names, title)),
        "kernels.png": plots.to_png(plots.kernels(run.params["conv1"]["kernel"])),
    }


def print_results(results: Record, folder: pathlib.Path | None) -> None:
    """Prints an evaluation, and the folder of its files."""
    rows = [row for row in results["per_class"] if row["count"]]
    if len(rows) > MOST_CLASSES_PRINTED:
        rows = sorted(rows, key=lambda row: -row["f1"])
        rows = rows[: MOST_CLASSES_PRINTED // 2] + rows[-MOST_CLASSES_PRINTED // 2 :]
        print(f"The {len(rows) // 2} best and the {len(rows) // 2} worst of {len(results['per_class'])} classes:")
    width = max(len(row["class"]) for row in rows)
    print(f"{'':>{width}}  precision   recall       F1   images")
    for row in rows:
        print(f"{row['class']:>{width}}{_percentages(row)}  {row['count']:>7,}  {terminal.bar(row['f1'], 30)}")
    print(f"{'mean':>{width}}{_percentages(results['macro'])}")
    print(f"\n{results['split']} accuracy: {results['accuracy']:.4f} ({results['correct']:,} of {results['count']:,})")
    print(f"top-5 accuracy: {results['top5_accuracy']:.4f}, mean cross entropy: {results['loss']:.4f}")
    print(f"step {results['step']:,}" + (f"; details and plots in {folder}" if folder is not None else ""))


def _percentages(scores: Record) -> str:
    """Precision, recall and F1 in columns; a dash for a precision of no predictions."""
    return "".join(
        f"{'-' if scores[name] is None else format(scores[name], '.2%'):>{column}}"
        for name, column in (("precision", 11), ("recall", 9), ("f1", 9))
    )
