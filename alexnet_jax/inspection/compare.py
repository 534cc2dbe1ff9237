"""Several runs on the same images."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from alexnet_jax import plots, runtime
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import batches
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import AlexNetError
from alexnet_jax.files import to_bytes, write_together
from alexnet_jax.inspection.evaluate import _answered, _opened, _results_folder
from alexnet_jax.inspection.evaluation import Question
from alexnet_jax.inspection.scores import mcnemar
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import Record, read_jsonl


def compare(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluates several runs on the same images, prints a table, writes `eval/comparison.json` and `.png` of the first.

    Each run is tested against the first by McNemar's test on the images that only one of the two has right. With more
    than two runs the p-values are Holm's, which hold for all of them together.

    Returns:
      One row a run, as in the file.

    Raises:
      AlexNetError: a run or its data can't be read, or they were not asked about the same images.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    paths = [config.run, *config.others]
    questions: list[Question] = []
    for path in paths:
        question = _opened(path, config)
        first = (questions or [question])[0]
        if not first.has_same_images(question):
            raise AlexNetError(f"{paths[0]} and {path} can't be compared: they have other images or classes")
        questions.append(dataclasses.replace(question, dataset=first.dataset))  # one copy of the images will do
    histories = [read_jsonl(question.run.folder.metrics) for question in questions]
    folder = _results_folder(questions[0].run, config)
    evaluations = [
        _answered(question, config, devices)
        for question in tqdm.tqdm(questions, desc="runs", leave=False, disable=None)
    ]
    names = _shortest_names(paths)
    right = [evaluation.logits.argmax(axis=1) == evaluation.labels for evaluation in evaluations]
    tests = [mcnemar(right[0], other) for other in right[1:]]
    adjusted = iter(_holm([test.p_value for test in tests]))
    rows = []
    for path, name, evaluation, test in zip(paths, names, evaluations, [None, *tests], strict=True):
        rows.append(
            {
                "run": str(path),
                "name": name,
                "preset": evaluation.run.config.preset,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(evaluation.run.params)),
                **{key: evaluation.results[key] for key in ("split", "views", "step", "count", "accuracy")},
                **{key: evaluation.results[key] for key in ("top5_accuracy", "loss", "calibration_error")},
                "against_first": None if test is None else dataclasses.asdict(test) | {"p_holm": next(adjusted)},
            }
        )
    records = dict(zip(names, histories, strict=True))
    steps_per_epoch = {
        name: batches.steps_per_epoch(e.run.dataset.counts["train"], e.run.config.schedule.batch_size)
        for name, e in zip(names, evaluations, strict=True)
    }
    written = None
    try:
        if folder is not None:
            curves = plots.to_png(plots.compared_curves(records, steps_per_epoch))
            described = to_bytes({"runs": rows, "versions": versions()})
            write_together(folder, {"comparison.png": curves, "comparison.json": described})
            written = folder
    finally:
        print_comparison(rows, written)
    return rows


def _shortest_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart; a path that stands there twice gets numbers."""
    parts = [path.absolute().parts[1:] for path in paths]
    count = 1
    while len({part[-count:] for part in parts}) < len(set(parts)):
        count += 1
    names = ["/".join(part[-count:]) for part in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the i-th smallest of m is multiplied by m - i + 1, and none falls below a smaller one."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def print_comparison(rows: Sequence[Record], folder: pathlib.Path | None) -> None:
    """Prints a comparison."""
    width = max(len("run"), *(len(row["name"]) for row in rows))
    views = f", {rows[0]['views']} views" if rows[0]["views"] > 1 else ""
    print(f"{rows[0]['count']:,} {rows[0]['split']} images{views}; differences from the first run in points\n")
    print(
        f"{'run':<{width}}  accuracy  cross entropy  calibration error      step  "
        "difference (95% interval)   right alone       p"
    )
    for row in rows:
        line = (
            f"{row['name']:<{width}}  {row['accuracy']:8.2%}  {row['loss']:13.4f}  {row['calibration_error']:17.2%}  "
            f"{row['step']:8,}"
        )
        if test := row["against_first"]:
            low, high = (100 * bound for bound in test["interval"])
            difference = f"{100 * test['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            alone = f"{test['second_only']:,} : {test['first_only']:,}"
            p_value = "<1e-4" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.4f}"
            line += f"  {difference:>25}  {alone:>12}  {p_value:>6}"
        print(line)
    print(
        "\nright alone: images that only this run has right : only the first. p: McNemar's exact test on these"
        + (",\nadjusted by Holm for several runs (the intervals are not)" if len(rows) > 2 else "")
        + ". It says whether these networks\ndiffer; whether their recipes do, only several seeds can say."
        + (f"\ndetails and curves in {folder}" if folder is not None else "")
    )
