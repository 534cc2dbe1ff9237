"""The train step, and the compiled call that takes it on all devices."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.data.batches import Batch
from alexnet_jax.distributed.devices import AXIS
from alexnet_jax.training.gradients import StepSums, SumGradients, all_finite, at_once
from alexnet_jax.training.optimizer import is_bias
from alexnet_jax.training.state import REPLICATED, StateLayout, StepMetrics, TrainState, divide_frozen, fill_gaps

PyTree = Any
DRAWS = 8  # keys of an example in a step: two for dropout, six for augmentation

Step = Callable[..., tuple[TrainState, StepMetrics]]  # of (state, batch, key, weights=None)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    weights: PyTree = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocessing,
    label_smoothing: float = 0.0,
    sum_gradients: SumGradients = at_once,
    frozen: Collection[str] = (),
) -> tuple[TrainState, StepMetrics]:
    """Augments a batch, computes the gradient of its mean cross entropy, and updates.

    The mean is over the GLOBAL batch. Every random draw for an example is a function of (key, state.step, the example's
    position in the global batch), so a batch gets the same crops, noise and dropout masks on any number of devices. An
    update whose loss or gradient is not finite (`gradients.all_finite`) is not applied, nor is any after it.

    Args:
      state: the same on all devices.
      batch: the part of the global batch that this device has.
      key: the run's PRNG key.
      weights: the parameters in the dtypes in which the network computes with them; None: as in the state.
      model: applied to (images, dropout keys).
      optimizer: turns the mean gradient into an update.
      preprocess: from stored images to the network's input.
      label_smoothing: share of each label that is spread evenly over all classes. `StepMetrics.loss` is computed
        without it.
      sum_gradients: one of the functions in `gradients`.
      frozen: names of the layers that are not trained: no gradient is computed for them.
    """
    examples = batch.mask.shape[0]
    with jax.named_scope("keys"):
        position = lax.axis_index(AXIS) * examples + jnp.arange(examples)
        of_draw = functools.partial(jax.random.fold_in, jax.random.fold_in(key, state.step))
        keys = jax.vmap(jax.vmap(of_draw))(position[:, None] * DRAWS + jnp.arange(DRAWS)[None])  # [B, DRAWS]

    def loss_and_gradient(common: PyTree, batch: Batch, keys: jax.Array) -> tuple[PyTree, StepSums]:
        weights, step = common
        dropout_keys, augmentation_keys = keys[:, :2], keys[:, 2:]
        with jax.named_scope("augmentation"):
            images = preprocess.training(augmentation_keys, batch.images, step)

        trained, kept = divide_frozen(weights, frozen)

        def loss(trained: PyTree) -> tuple[jax.Array, StepSums]:
            logits: Any = model.apply({"params": kept | trained}, images, dropout_keys)
            labels = jax.nn.one_hot(batch.labels, logits.shape[-1])  # integer ones would need a scatter in the gradient
            losses = optax.softmax_cross_entropy(logits, labels) * batch.mask
            correct = (jnp.argmax(logits, axis=-1) == batch.labels) & batch.mask
            objective = losses
            if label_smoothing:
                objective = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing))
                objective *= batch.mask
            return objective.sum(), (losses.sum(), *(x.sum(dtype=jnp.int32) for x in (correct, batch.mask)))

        gradient, sums = jax.grad(loss, has_aux=True)(trained)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradient), sums

    common = (state.params if weights is None else weights, state.step)
    gradient, (loss, correct, count) = sum_gradients(loss_and_gradient, common, batch, keys)
    with jax.named_scope("finite"):
        finite = state.finite & all_finite(loss, gradient)
    with jax.named_scope("update"):
        mean = jax.tree.map(lambda x: x / count, gradient)
        trained, kept = divide_frozen(state.params, frozen)
        updates, opt_state = optimizer.update(mean, state.opt_state, trained)
        params = kept | optax.apply_updates(trained, updates)
        new = TrainState(state.step + 1, params, opt_state, finite)
        state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state.replace(finite=finite), new)
    return state, StepMetrics(loss, correct, count, finite)


def kernels_in(dtype: str, params: PyTree) -> PyTree:
    """The kernels in the dtype that a network computes in; None for what it takes from the state as it is."""

    def of(path: tuple[Any, ...], x: jax.Array) -> jax.Array | None:
        return None if is_bias(path) or x.dtype == dtype else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(of, params)


def compile_train_step(
    step: Step,
    devices: Sequence[jax.Device],
    fetch: Callable[[Any, Any], Batch],
    layout: StateLayout = REPLICATED,
    dtype: str = "float32",
) -> Callable[[Any, Any, Any, jax.Array], tuple[Any, StepMetrics]]:
    """Compiles `call(state, resident, call, key) -> (state, metrics)`, which takes K steps on all devices.

    `resident` and `call` are a data set's (see `Dataset`), from which `fetch` makes each step's batch; `call` has a
    leading axis of devices, then one of K steps. The metrics are [K]. `state` is donated, except on a CPU, where XLA
    would copy weights and moments before it overwrites them. `dtype` is the network's: if it is bfloat16, each update
    also writes the kernels in it, so that the next step of the call need not convert them.
    """

    def take_steps(state: Any, resident: Any, call: Any, key: jax.Array) -> tuple[Any, StepMetrics]:
        def take(carry: tuple[TrainState, PyTree], part: Any) -> tuple[tuple[TrainState, PyTree], StepMetrics]:
            state, kernels = carry
            state, metrics = step(state, fetch(resident, part), key, fill_gaps(kernels, state.params))
            return (state, kernels_in(dtype, state.params)), metrics

        state = layout.join(state)
        if len(call.mask) > 1:
            (state, _), metrics = lax.scan(take, (state, kernels_in(dtype, state.params)), call)
        else:  # no loop: inside one, XLA's convolutions are a hundred times slower on a CPU
            state, metrics = step(state, fetch(resident, jax.tree.map(lambda x: x[0], call)), key)
            metrics = jax.tree.map(lambda x: x[None], metrics)
        return layout.divide(state), metrics

    donated = () if devices[0].platform == "cpu" else (0,)
    # An output with axis None is that of the first device; psum and all_gather make it equal on all.
    return jax.pmap(
        take_steps,
        axis_name=AXIS,
        in_axes=(layout.axes, None, 0, None),
        out_axes=(layout.axes, None),
        donate_argnums=donated,
        devices=devices,
    )
