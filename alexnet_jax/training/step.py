"""The train state, the train step and the predict step; the only module that knows pmap."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.data.batches import Batches
from alexnet_jax.distributed.devices import AXIS, MICRO_BATCHES
from alexnet_jax.errors import UsageError
from alexnet_jax.training.state import Examples, PyTree, SplitState, StepMetrics, TrainState, _join, _partition


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    devices: Sequence[jax.Device],
    deterministic: bool = False,
    accumulate: int = 1,
    streams: bool = False,
    label_smoothing: float = 0.0,
    runs: bool = False,
    split_dense: bool = False,
) -> Callable[[PyTree, Examples, Batches, jax.Array], tuple[PyTree, StepMetrics]]:
    """Builds the data-parallel training step.

    `step(state, examples, batches, key) -> (state, metrics)` takes as many steps as there are `batches`. Each augments
    its batch, computes the mean cross entropy over the examples of the GLOBAL batch and its gradient, and updates.
    `state`, `examples` and `key` are replicated, `state` is donated. `key` is the run's: every random draw for an
    example follows from it, from `state.step` and from the example's place in the global batch, so the same batch gives
    the same crops, noise and dropout masks on any number of devices.

    An update from a loss or gradient that is Inf or NaN, or that makes a parameter so, is not taken, and none
    after it: see `TrainState.finite`.

    Sums over a batch depend in their last bits on how it is divided. With `deterministic` it is always divided into the
    same 8 micro-batches, whose gradients are gathered and added in the same order on 1, 2, 4 or 8 devices: then these
    compute the same bits. That takes memory for 8 gradients on each device.

    Args:
      model: applied to (images, dropout keys).
      optimizer: makes updates of the mean gradient.
      preprocessing: from stored images to the network's input.
      devices: that the batch is spread over.
      deterministic: see above.
      accumulate: parts in which a device works off its share, one after another, adding up gradients.
      streams: whether `examples` are each device's share of these batches, not the whole split.
      label_smoothing: share of a label that is spread evenly over all classes, for the gradient; `StepMetrics.loss` is
        of the plain labels.
      runs: whether several runs are trained side by side, each as it would be alone: `state`, `key` and what is
        returned have an axis of runs in front, `batches` have it behind that of devices. For small networks on large
        devices.
      split_dense: hybrid parallelism: the dense layers of `AlexNet` or `AlexNetSmall` are divided over the devices
        (`hybrid.SplitDense`), all else is as above. The state is a `SplitState`, taken and returned. `optimizer` must
        treat each element of a kernel by itself. Not with `deterministic` or `runs`.

    Raises:
      UsageError: for a number of devices that `deterministic` can't run on.
      ValueError: for `split_dense` with `deterministic` or `runs`.
    """
    if split_dense:
        if deterministic or runs:
            raise ValueError("split_dense goes with neither deterministic nor runs")
        model = model.clone(dense_axis=AXIS)
    if deterministic and MICRO_BATCHES % len(devices):
        raise UsageError(f"--deterministic runs on 1, 2, 4 or 8 devices, not on {len(devices)}")

    def loss_and_gradient(
        state: TrainState, examples: Examples, batch: Batches, place: jax.Array, count: jax.Array, key: jax.Array
    ) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        """Gradient of this part's share in the batch's mean loss; sum of its losses; how many it has right."""
        raw, labels = (jnp.take(array, batch.indices, axis=0, mode="clip") for array in examples)
        step_key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(place)
        augment_keys, dropout_keys = jax.vmap(jax.random.split)(keys).T
        images = preprocessing.training(augment_keys, raw, state.step)

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits: jax.Array = model.apply({"params": params}, images, dropout_keys)  # type: ignore[assignment]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * batch.mask
            objectives = losses
            if label_smoothing:
                uniform = (jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)) * batch.mask
                objectives = (1 - label_smoothing) * losses + label_smoothing * uniform
            correct = (jnp.argmax(logits, axis=-1) == labels) & batch.mask
            return jnp.sum(objectives) / count, (jnp.sum(losses), correct.sum(dtype=jnp.int32))

        return jax.grad(loss_fn, has_aux=True)(state.params)

    def in_micro_batches(
        state: TrainState, examples: Examples, batch: Batches, place: jax.Array, count: jax.Array, key: jax.Array
    ) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        """The same of the whole batch, as a sum whose order the number of devices does not change."""
        number = MICRO_BATCHES // len(devices)
        parts = []
        for indices, mask, places in zip(*(jnp.split(x, number) for x in (*batch, place)), strict=True):
            # The barriers keep the compiler from merging parts: each is compiled as it is where it stands alone.
            inputs = lax.optimization_barrier((state, examples, Batches(indices, mask), places, count, key))
            parts.append(lax.optimization_barrier(loss_and_gradient(*inputs)))
        gathered = lax.all_gather(jax.tree.map(lambda *x: jnp.stack(x), *parts), AXIS, tiled=True)
        total = jax.tree.map(lambda x: functools.reduce(jnp.add, list(x)), lax.optimization_barrier(gathered))
        return lax.optimization_barrier(total)

    def accumulated(
        state: TrainState, examples: Examples, batch: Batches, place: jax.Array, count: jax.Array, key: jax.Array
    ) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        """The same of this device's share, part by part."""
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1), (batch, place))

        def add(total: PyTree, part: tuple[Batches, jax.Array]) -> tuple[PyTree, None]:
            # The barriers keep a part from beginning before the one before is added.
            total, part = lax.optimization_barrier((total, part))
            sums = loss_and_gradient(state, examples, *part, count, key)
            return lax.optimization_barrier(jax.tree.map(jnp.add, total, sums)), None

        shapes = jax.eval_shape(loss_and_gradient, state, examples, batch, place, count, key)
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        if devices[0].platform != "cpu":
            return lax.scan(add, total, parts)[0]
        for index in range(accumulate):  # a CPU is slow in loops, as below
            total, _ = add(total, jax.tree.map(lambda x, index=index: x[index], parts))
        return total

    def added_up(sums: PyTree) -> PyTree:
        """Sums over all devices; the gradient of what is divided is one already."""
        if not split_dense:
            return lax.psum(sums, AXIS)
        copied, divided = _partition(sums)
        return _join(lax.psum(copied, AXIS), divided)

    def train_step(
        state: TrainState, examples: Examples, batch: Batches, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        per_device = batch.mask.shape[0]
        place = lax.axis_index(AXIS) * per_device + jnp.arange(per_device)
        count = lax.psum(batch.mask.sum(dtype=jnp.int32), AXIS)
        if deterministic:
            gradients, (loss, correct) = in_micro_batches(state, examples, batch, place, count, key)
        else:
            share = accumulated if accumulate > 1 else loss_and_gradient
            gradients, (loss, correct) = added_up(share(state, examples, batch, place, count, key))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = state.finite
        for leaf in jax.tree.leaves((loss, gradients, params)):
            finite &= jnp.isfinite(leaf).all()
        if split_dense:  # each device has seen its part
            finite = lax.pmin(finite.astype(jnp.int32), AXIS) == 1
        new = TrainState(state.step + 1, params, opt_state, finite)
        state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state.replace(finite=finite), new)
        return state, StepMetrics(loss, correct, count, finite)

    def train_steps(
        state: TrainState, examples: Examples, batches: Batches, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        if len(batches.indices) > 1:
            return lax.scan(lambda state, batch: train_step(state, examples, batch, key), state, batches)
        # Not in a loop: there XLA runs convolutions on a CPU a hundred times slower.
        state, metrics = train_step(state, examples, jax.tree.map(lambda x: x[0], batches), key)
        return state, jax.tree.map(lambda x: x[None], metrics)

    def split_steps(
        state: SplitState, examples: Examples, batches: Batches, key: jax.Array
    ) -> tuple[SplitState, StepMetrics]:
        new, metrics = train_steps(_join(*state), examples, batches, key)
        return SplitState(*_partition(new)), metrics

    if split_dense:
        axes = SplitState(copied=None, divided=0)  # type: ignore[arg-type]
        return jax.pmap(
            split_steps,
            axis_name=AXIS,
            in_axes=(axes, 0 if streams else None, 0, None),
            out_axes=(axes, None),
            donate_argnums=0,
            devices=devices,
        )

    # out_axes=None returns the first device's value: psum and all_gather make everything returned equal on all devices.
    return jax.pmap(
        jax.vmap(train_steps, in_axes=(0, None, 0, 0)) if runs else train_steps,
        axis_name=AXIS,
        in_axes=(None, 0 if streams else None, 0, None),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )
