"""Checkpoints by Orbax: save, restore, check."""

import logging
import pathlib
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from alexnet_jax.errors import AlexNetError
from alexnet_jax.steps import TrainState

ACCURACY = "validation_accuracy"


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics[ACCURACY]


class Checkpoints:
    """The checkpoints of a run: the two newest, and the one with the best validation accuracy.

    A checkpoint holds the state as nested dicts of NumPy arrays, so it restores on any number of devices and without
    this package, and a small JSON object for what the loop must remember.
    """

    def __init__(self, folder: pathlib.Path, read_only: bool = False) -> None:
        # Orbax warns about the options' interplay at every start; its errors come as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
        # Saving is synchronous: 0.3 s for this network, and an asynchronous save can hang for good on a full disk.
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,  # without it Orbax does not write metrics; what is kept, the policy decides
            preservation_policy=AnyPreservationPolicy(
                [
                    LatestN(2),
                    BestN(n=1, get_metric_fn=_accuracy, keep_checkpoints_without_metrics=False),
                ]
            ),
            enable_async_checkpointing=False,
            create=not read_only,
            read_only=read_only,
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest validation accuracy (the earliest of equals); None if none was measured."""
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scores = [(_accuracy(found), -step) for step, found in metrics.items() if found]
        return -max(scores)[1] if scores else None

    def save(self, state: TrainState, memory: dict[str, Any], accuracy: float | None) -> None:
        """Saves a state under its step.

        Args:
          state: the train state.
          memory: JSON-ready; comes back from `restore` as it is.
          accuracy: validation accuracy of exactly this state, if known.
        """
        tree = jax.device_get(flax.serialization.to_state_dict(state))
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(tree), memory=ocp.args.JsonSave(memory))
        metrics = None if accuracy is None else {ACCURACY: accuracy}
        try:
            saved = self._manager.save(step, args=arguments, metrics=metrics)
        except Exception as error:  # Orbax and TensorStore raise bare Exceptions, too
            raise AlexNetError(f"{self._folder / str(step)}: can't be written ({_reason(error)})") from error
        if not saved:
            raise AlexNetError(f"{self._folder}: Orbax did not save step {step}; is a later step there?")

    def restore_tree(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state (nested dicts of NumPy arrays) and the memory saved at `step`.

        Raises:
          AlexNetError: if it can't be read.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), memory=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise AlexNetError(f"{self._folder / str(step)}: can't be read ({_reason(error)})") from error
        return restored["state"], restored["memory"]

    def restore(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores into the structure of `template`; every array must have its shape and dtype, nothing is cast."""
        tree, memory = self.restore_tree(step)
        check_like(tree, flax.serialization.to_state_dict(template), f"{self._folder / str(step)}")
        return flax.serialization.from_state_dict(template, tree), memory

    def close(self) -> None:
        """Ends all work on the folder."""
        self._manager.close()


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def check_like(tree: Any, template: Any, where: str) -> None:
    """Raises AlexNetError unless both trees have the same paths, shapes and dtypes."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, template)
    )
    if different := sorted(found.keys() ^ wanted.keys()):
        raise AlexNetError(f"{where}: the checkpoint is of another network or optimizer: {different[0]} differs")
    for path, leaf in wanted.items():
        have, want = (f"{np.dtype(a.dtype)}{list(np.shape(a))}" for a in (found[path], leaf))
        if have != want:
            raise AlexNetError(f"{where}: {path} is {have}, the network needs {want}")
