"""Comparison of several runs on the same images."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from alexnet_jax import plots, runtime
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import AlexNetError
from alexnet_jax.files import to_bytes, write_together
from alexnet_jax.inspection.scores import holm, mcnemar
from alexnet_jax.inspection.task import Evaluation, Task, evaluate_task, open_task, results_folder
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import Record, read_jsonl


def compare(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluates several runs on the same images, prints a table, writes `eval/comparison.json` and `.png` of the first.

    Each run is tested against the first by McNemar's test on the images that only one of the two classifies correctly.
    With more than two runs the p-values are adjusted by Holm, so that they hold for all tests together.

    Returns:
      One row for each run, as in the file.

    Raises:
      AlexNetError: a run or its data can't be read, or their images differ.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    paths = [config.run, *config.others]
    tasks = _open_tasks(paths, config)
    records = [read_jsonl(task.run.folder.metrics) for task in tasks]
    folder = results_folder(tasks[0].run, config)
    evaluations = [evaluate_task(task, config, devices) for task in tqdm.tqdm(tasks, "runs", leave=False, disable=None)]
    names = shortest_names([task.run.folder.path for task in tasks])
    rows = _rows(paths, names, evaluations)
    written = None
    try:
        if folder is not None:
            steps_per_epoch = {name: task.run.steps_per_epoch for name, task in zip(names, tasks, strict=True)}
            curves = plots.compared_curves(dict(zip(names, records, strict=True)), steps_per_epoch)
            described = to_bytes({"runs": rows, "versions": versions()})
            write_together(folder, {"comparison.png": plots.to_png(curves), "comparison.json": described})
            written = folder
    finally:
        print_comparison(rows, written)
    return rows


def _open_tasks(paths: Sequence[pathlib.Path], config: EvalConfig) -> list[Task]:
    """Opens all runs, with the first one's copy of the images."""
    first = open_task(paths[0], config)
    tasks = [first]
    for path in paths[1:]:
        task = open_task(path, config)
        if not first.has_same_images(task):
            raise AlexNetError(f"{paths[0]} and {path} can't be compared: they have different images or classes")
        tasks.append(dataclasses.replace(task, dataset=first.dataset))
    return tasks


def _rows(
    paths: Sequence[pathlib.Path], names: Sequence[str], evaluations: Sequence[Evaluation]
) -> list[dict[str, Any]]:
    """The rows of comparison.json."""
    correct = [evaluation.logits.argmax(axis=1) == evaluation.labels for evaluation in evaluations]
    tests = [mcnemar(correct[0], other) for other in correct[1:]]
    adjusted = holm([test.p_value for test in tests])
    against_first = [dataclasses.asdict(test) | {"p_holm": p} for test, p in zip(tests, adjusted, strict=True)]
    copied = ("split", "views", "step", "count", "accuracy", "top5_accuracy", "loss", "calibration_error")
    return [
        {
            "run": str(path),
            "name": name,
            "preset": evaluation.task.run.config.preset,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(evaluation.task.run.params)),
            **{key: evaluation.results[key] for key in copied},
            "against_first": test,
        }
        for path, name, evaluation, test in zip(paths, names, evaluations, [None, *against_first], strict=True)
    ]


def shortest_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as are needed to distinguish them; a path that occurs twice gets numbers."""
    parts = [path.absolute().parts[1:] for path in paths]
    count = 1
    while len({part[-count:] for part in parts}) < len(set(parts)):
        count += 1
    names = ["/".join(part[-count:]) for part in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def print_comparison(rows: Sequence[Record], folder: pathlib.Path | None) -> None:
    """Prints a comparison, and the folder of its files."""
    width = max(len("run"), *(len(row["name"]) for row in rows))
    views = f", {rows[0]['views']} views" if rows[0]["views"] > 1 else ""
    print(f"{rows[0]['count']:,} {rows[0]['split']} images{views}; differences from the first run in points\n")
    print(
        f"{'run':<{width}}  accuracy  cross entropy  calibration error      step  "
        "difference (95% interval)  only correct       p"
    )
    for row in rows:
        line = (
            f"{row['name']:<{width}}  {row['accuracy']:8.2%}  {row['loss']:13.4f}  {row['calibration_error']:17.2%}  "
            f"{row['step']:8,}"
        )
        if test := row["against_first"]:
            low, high = (100 * bound for bound in test["interval"])
            difference = f"{100 * test['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            only = f"{test['second_only']:,} : {test['first_only']:,}"
            p_value = "<1e-4" if test["p_holm"] < 1e-4 else f"{test['p_holm']:.4f}"
            line += f"  {difference:>25}  {only:>12}  {p_value:>6}"
        print(line)
    print(
        "\nonly correct: images that only this run classifies correctly : only the first. p: McNemar's exact test"
        + (",\nadjusted by Holm for several runs (the intervals are not)" if len(rows) > 2 else "")
        + ". It compares these networks,\nnot their recipes: that takes several random seeds of each."
        + (f"\ndetails and curves in {folder}" if folder is not None else "")
    )
