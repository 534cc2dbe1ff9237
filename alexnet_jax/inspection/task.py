"""A run on a split of its data set: opened and checked before anything is computed, then predicted and scored."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alexnet_jax.config.checks import check_views
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import load
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.errors import AlexNetError, shown, warn
from alexnet_jax.inspection.run import Run, open_run
from alexnet_jax.inspection.scores import score
from alexnet_jax.runs import shipped
from alexnet_jax.runs.folder import versions
from alexnet_jax.training.predict import make_predict_step, predict_split

COMPARED_AT_ONCE = 1000  # images


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A run and the split that it is evaluated on."""

    run: Run
    dataset: Dataset
    split: str

    def has_same_images(self, other: "Task") -> bool:
        """Whether both splits have the same classes, and the same images and labels in the same order."""
        count = self.dataset.counts[self.split]
        if self.split != other.split or count != other.dataset.counts[other.split]:
            return False
        if self.run.class_names != other.run.class_names or self.dataset.image_shape != other.dataset.image_shape:
            return False
        if self.run.dataset.fingerprint == other.run.dataset.fingerprint:
            return True
        # These fingerprints cover all splits. With --train-on all, only the other splits equal those of the data set
        # without it.
        for start in range(0, count, COMPARED_AT_ONCE):
            indices = np.arange(start, min(start + COMPARED_AT_ONCE, count))
            one, two = (task.dataset.examples(task.split, indices) for task in (self, other))
            if not (np.array_equal(one.labels, two.labels) and np.array_equal(one.images, two.images)):
                return False
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A run's predictions for every image of a split.

    Attributes:
      task: the run and the split.
      logits: float32 [N, classes]; with several views, logarithms of their mean probabilities.
      labels: int [N].
      results: contents of `eval/<split>.json`.
    """

    task: Task
    logits: np.ndarray
    labels: np.ndarray
    results: dict[str, Any]


def open_task(path: pathlib.Path, config: EvalConfig) -> Task:
    """Opens a run and its data set.

    Raises:
      AlexNetError: one can't be read, or the data is not that of the run.
      UsageError: the flags don't suit the run.
    """
    run = open_run(path, config.checkpoint)
    check_views(config.views, run.config.augmentation, path)
    dataset = _load_data(run, config)
    run = _matched(run, dataset)
    split = config.split or ("test" if "test" in dataset.counts else "validation")
    if split not in dataset.counts:
        raise AlexNetError(f"{dataset.source} has no split {split!r}; it has {', '.join(dataset.counts)}")
    return Task(run, dataset, split)


def _matched(run: Run, dataset: Dataset) -> Run:
    """The run, whose data this is; the outputs of converted weights are put into the order of the data's classes.

    A shipped network is evaluated on any copy of its data set.

    Raises:
      AlexNetError: it is other data or, for converted weights, has other classes or images of another size.
    """
    path = run.folder.path
    fingerprint = dataset.fingerprint()
    is_own = fingerprint == run.dataset.fingerprint
    if shipped.is_shipped(run.folder):
        if not is_own:
            warn(f"{path.name} was trained on {run.dataset.source}, not on the images from {dataset.source}")
    elif run.dataset.counts:
        if not is_own:
            raise AlexNetError(
                f"{path} was not trained on the images from {dataset.source}: set --data-dir to those, without images "
                "that were added later, or classify with --images"
            )
        return run
    theirs, ours = dataset.class_names, run.class_names
    if different := sorted(set(theirs) ^ set(ours)):
        where = dataset.source if different[0] in theirs else path
        raise AlexNetError(
            f"{path} has other classes than {dataset.source}: {shown(different[0])} is only in {where}; convert names "
            "the outputs with --class-names"
        )
    if dataset.image_shape != run.dataset.image_shape:
        raise AlexNetError(
            f"{dataset.source} has images of {dataset.image_shape[0]} pixels; {run.dataset.image_shape[0]} are needed"
        )
    order = [ours.index(name) for name in theirs]
    head = {name: array[..., order] for name, array in run.params["logits"].items()}
    described = dataclasses.replace(run.dataset, class_names=theirs, fingerprint=fingerprint, source=dataset.source)
    return dataclasses.replace(run, params={**run.params, "logits": head}, dataset=described)


def _load_data(run: Run, config: EvalConfig) -> Dataset:
    """The run's data, from --data-dir or from where it was during training."""
    if config.data_dir is not None:
        return load(dataclasses.replace(run.config.data, data_dir=config.data_dir))
    try:
        return load(run.config.data)
    except AlexNetError as error:
        if (folder := run.config.data.data_dir) is None:
            raise
        lost = f"{run.folder.path}: the run's data was in {folder} ({error})"
        raise AlexNetError(f"{lost}: where is it now? Give --data-dir") from error


def evaluate_task(task: Task, config: EvalConfig, devices: Sequence[jax.Device]) -> Evaluation:
    """Predicts every image of the split once, and scores the predictions."""
    run, dataset, split = task.run, task.dataset, task.split
    predict_step = make_predict_step(run.model, run.preprocessing, devices, config.views)
    params = replicate(run.params, devices)
    logits, labels = predict_split(predict_step, params, dataset, split, config.batch_size, devices)
    results = score(logits, labels, run.class_names) | {
        "split": split,
        "views": config.views,
        "step": run.step,
        "checkpoint": config.checkpoint,
        "dataset": dataset.name,
        "source": dataset.source,
        "versions": versions(),
    }
    return Evaluation(task, logits, labels, results)


def results_folder(run: Run, config: EvalConfig) -> pathlib.Path | None:
    """The folder for results; None, if it would be part of the package or, after a warning, can't be written.

    Raises:
      AlexNetError: it is None, and a report was requested.
    """
    if config.out is not None:
        return config.out
    remedy = "give another folder with --out"
    if shipped.is_shipped(run.folder):
        if config.report:
            raise AlexNetError(f"{run.folder.path.name} is part of alexnet_jax: {remedy}")
        return None
    existing = next(folder for folder in (run.folder.eval, run.folder.path) if folder.exists())
    if os.access(existing, os.W_OK | os.X_OK):
        return run.folder.eval
    if config.report:
        raise AlexNetError(f"{existing} can't be written: {remedy}")
    warn(f"{existing} can't be written, so the results are only printed: to keep them, {remedy}")
    return None
