"""Several runs that differ in their seed, trained as one program: for small networks on large devices."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.checks import check_training
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.batches import Batches, batches, epoch_order, steps_per_epoch
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.inspection import scores
from alexnet_jax.network import build
from alexnet_jax.runs.log import Record
from alexnet_jax.training import optimizer, predict
from alexnet_jax.training.monitor import Stopwatch
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step, train_step
from alexnet_jax.training.whitening import conv1_kernel


def epoch_curve(records: Iterable[Record], examples: int, batch_size: int) -> list[dict[str, Any]]:
    """A run's epochs from its records of intervals.

    Args:
      records: all lines of a run's metrics.jsonl.
      examples: training images.
      batch_size: batch size of the run.

    Returns:
      For each epoch: `loss` (mean training loss, nats) and `accuracy` over its updates, `seconds` of training, without
        evaluation and saving, and `validation_accuracy` after it, None without validation.
    """
    per_epoch = steps_per_epoch(examples, batch_size)

    def seen(step: int) -> int:
        epochs, batch = divmod(step, per_epoch)
        return epochs * examples + min(batch * batch_size, examples)

    epochs: dict[int, dict[str, Any]] = {}
    before = 0
    for record in records:
        epoch = epochs.setdefault(
            record["epoch"], {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0, "validation_accuracy": None}
        )
        if record["split"] == "validation":
            epoch["validation_accuracy"] = record["accuracy"]
            continue
        count, before = seen(record["step"]) - before, seen(record["step"])
        epoch["loss"] += record["loss"] * count / examples
        epoch["accuracy"] += record["accuracy"] * count / examples
        epoch["seconds"] += count / record["images_per_second"]
    return [epochs[epoch] for epoch in sorted(epochs)]


def train(
    config: TrainConfig, dataset: ArrayDataset, seeds: Sequence[int], views: Sequence[int]
) -> list[dict[str, Any]]:
    """Trains `config` with all seeds at the same time on one device, and tests the results.

    Each run computes what `train.py` does with its seed, in its order and with its draws; only rounding differs.

    Returns:
      For each seed `curve`, as `epoch_curve` gives it (the seconds are those that all runs took together), and `test`:
      accuracy, loss and count by number of views.

    Raises:
      AlexNetError: a run's loss or gradient is not finite.
      UsageError: the configuration needs something that is not supported here.
    """
    if config.optimizer.plateau_patience or config.run.deterministic or config.schedule.accumulate > 1:
        raise UsageError("side by side: --plateau-patience, --deterministic and --accumulate are only for train.py")
    devices, split = runtime.devices()[:1], dataset["train"]
    check_training(
        config,
        image_shape=dataset.image_shape,
        has_validation="validation" in dataset.counts,
        source=dataset.source,
        num_devices=1,
        network_input=build.input_size(config.network),
        layers=build.layers(config.network),
    )
    per_epoch = steps_per_epoch(len(split), config.schedule.batch_size)
    preprocessing = preprocess.Preprocessing(config.augmentation, dataset.statistics(), per_epoch)
    model = build.from_config(config.network, len(dataset.class_names))
    update_rule, _ = optimizer.from_config(config.optimizer, per_epoch, config.schedule.epochs)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=update_rule,
        preprocess=preprocessing,
        label_smoothing=config.optimizer.label_smoothing,
    )
    call = compile_train_step(jax.vmap(step), devices, ArrayDataset.fetch)  # an axis of runs before everything
    predict_steps = {count: predict.make_predict_step(model, preprocessing, devices, count) for count in {1, *views}}

    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    shape = preprocessing.input_shape(dataset.image_shape)
    conv1 = conv1_kernel(config.network.conv1_init, model, preprocessing, dataset)
    states = [create_state(model, update_rule, shape, initial, conv1) for initial, _ in keys]
    state = replicate(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), devices)
    key = replicate(jnp.stack([run for _, run in keys]), devices)
    examples = replicate(Examples(split.images, split.labels), devices)

    def logits_of(run: int, split: str, count: int) -> np.ndarray:
        params = jax.tree.map(lambda leaf: leaf[run], optimizer.averaged(state.opt_state, state.params))
        return predict.predict_logits(
            predict_steps[count], params, dataset[split].images, config.run.eval_batch_size, num_devices=1
        )

    curves: list[list[dict[str, Any]]] = [[] for _ in seeds]
    watch = Stopwatch()
    for epoch in range(config.schedule.epochs):
        watch.restart()
        orders = [epoch_order(seed, epoch, len(split)) for seed in seeds]
        layouts = [batches(order, config.schedule.batch_size, 1) for order in orders]
        stacked = Batches(*(np.stack(arrays, axis=2) for arrays in zip(*layouts, strict=True)))
        state, metrics = call(state, examples, stacked, key)
        metrics = jax.device_get(metrics)
        seconds = watch.seconds()
        for run, curve in enumerate(curves):
            if not metrics.finite[:, run].all():
                raise AlexNetError(f"seed {seeds[run]}: loss or gradient is not finite in epoch {epoch + 1}")
            accuracy = None
            if "validation" in dataset.splits:
                predicted = logits_of(run, "validation", 1).argmax(axis=1)
                accuracy = float(np.mean(predicted == dataset["validation"].labels))
            curve.append(
                {
                    "loss": float(metrics.loss[:, run].sum(dtype=np.float64)) / len(split),
                    "accuracy": int(metrics.correct[:, run].sum()) / len(split),
                    "seconds": seconds,
                    "validation_accuracy": accuracy,
                }
            )
    outcomes = []
    for run, curve in enumerate(curves):
        test = {}
        for count in views:
            score = scores.score(logits_of(run, "test", count), dataset["test"].labels, dataset.class_names)
            test[str(count)] = {name: score[name] for name in ("accuracy", "loss", "count")}
        outcomes.append({"curve": curve, "test": test})
    return outcomes
