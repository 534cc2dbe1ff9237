"""The train state, the train step and the predict step; the only module that knows pmap."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import hybrid, processes, runtime
from alexnet_jax.augment import CENTRE, VIEWS, Preprocessing, View
from alexnet_jax.batches import Batches, batches
from alexnet_jax.errors import UsageError

AXIS = "batch"
MICRO_BATCHES = 8
PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """All that training changes, and all that a checkpoint must hold.

    Attributes:
      step: int32 scalar, updates made.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's state.
      finite: bool scalar. Once a loss, a gradient or a new parameter is Inf or NaN it is False, and from then on no
        update is taken: the rest stays as it was before that step.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    finite: jax.Array


class SplitState(NamedTuple):
    """A `TrainState` in two, for steps of hybrid parallelism: see `split`.

    Attributes:
      copied: what each device has whole; None in place of the rest.
      divided: kernels of dense layers and what the optimizer keeps for them, [D, rows, features], one part a device (D:
        those of this process); None in place of the rest.
    """

    copied: TrainState
    divided: TrainState


class Examples(NamedTuple):
    """What a step picks its batch from.

    A split of the data, whole, on every device, where it has room: then nothing waits for the host. Else each device's
    share of the next batches, with an axis of devices in front.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    images: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray


class StepMetrics(flax.struct.PyTreeNode):
    """Sums over the global batch of each of K steps, never means, so that they can be added up exactly.

    Attributes:
      loss: float32 [K], sums of cross entropies (nats).
      correct: int32 [K], examples whose largest logit is their label's.
      count: int32 [K], examples.
      finite: bool [K], whether the update was taken (see `TrainState`).
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array
    finite: jax.Array


def select_devices(num_devices: int | None, deterministic: bool = False) -> list[jax.Device]:
    """The first `num_devices` devices; None: all there are (one CPU, if `deterministic`). Of several processes, all.

    A CPU counts as one device, but JAX can split it into any number. That must be settled before JAX is first used in
    the process, so call this early. With it goes the number of threads, and that changes how XLA divides sums on a CPU:
    `deterministic` has 8 CPU devices and 8 threads made, however many are used and however many cores there are.

    Raises:
      UsageError: if there are fewer.
      AlexNetError: JAX can't use the devices that JAX_PLATFORMS names.
    """
    if deterministic:
        os.environ["NPROC"] = str(MICRO_BATCHES)  # XLA's own variable, in place of the number of cores
    alone = not jax.distributed.is_initialized()  # else it is settled
    if wanted := alone and (MICRO_BATCHES if deterministic else num_devices):
        # Fails if JAX is in use already: then what there is must do, and is checked next.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    devices = runtime.devices()
    if deterministic and num_devices is None and devices[0].platform == "cpu":
        num_devices = 1
    own = processes.local(devices)
    if num_devices is not None and num_devices > len(own):
        raise UsageError(f"--num-devices {num_devices}: JAX sees {len(own)} ({devices[0].platform})")
    if jax.process_count() > 1:
        fewest, *_, most = sorted(len(jax.local_devices(process)) for process in range(jax.process_count()))
        if fewest < most:
            raise UsageError(f"--distributed: one process has {fewest} devices, another {most}; all need as many")
        if num_devices is not None and num_devices < len(own):
            raise UsageError(f"--num-devices {num_devices}: with --distributed all {len(own)} of each process are used")
        return devices
    return devices[:num_devices]


def default_steps_per_call(devices: Sequence[jax.Device]) -> int:
    """Steps in one call of the train step: many on an accelerator, where a step takes less time than its launch."""
    return 1 if devices[0].platform == "cpu" else 25


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: Sequence[int], key: jax.Array
) -> TrainState:
    """Draws the initial parameters; `image_shape` is (H, W, C)."""
    params = jax.jit(model.init)(key, jnp.zeros((1, *image_shape)))["params"]
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), finite=jnp.bool_(True))


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts a tree on every device of this process, without a stacked device axis."""
    devices = processes.local(devices)
    # The mesh axis must bear pmap's axis name, or the step compiles a second time for its own output.
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def shared(tree: PyTree) -> PyTree:
    """Arrays that are the same in all processes, as what can be saved.

    With one process NumPy arrays. With several arrays over the devices of all, of which each process then saves a part.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())

    def share(x: jax.Array) -> jax.Array:
        copies = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)

    return jax.tree.map(share, replicate(tree, jax.devices()))


def split(state: TrainState, devices: Sequence[jax.Device]) -> SplitState:
    """Puts on each device its part of the dense layers, and a copy of all else."""
    own, rows = processes.local(devices), processes.local_rows(devices)
    copied, divided = _partition(state)
    parts = jax.tree.map(lambda leaf: hybrid.stacked(np.asarray(leaf), len(devices))[rows], divided)
    mesh = Mesh(np.array(own), (AXIS,))
    return SplitState(replicate(copied, devices), jax.device_put(parts, NamedSharding(mesh, PartitionSpec(AXIS))))


def whole(state: TrainState | SplitState, shapes: TrainState) -> TrainState:
    """The inverse of `split`, with NumPy arrays where something had to be put together; a `TrainState` as it is.

    Of several processes all must call it: each has parts.

    Args:
      state: of a train step.
      shapes: a `TrainState` of anything that has the shapes of the whole.
    """
    if isinstance(state, TrainState):
        return state

    def together(parts: jax.Array, like: jax.ShapeDtypeStruct) -> np.ndarray:
        return hybrid.unstacked(processes.gathered(np.asarray(parts)), like.shape[0])

    return _join(state.copied, jax.tree.map(together, state.divided, _partition(shapes)[1]))


def _partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """What is copied to each device and what is divided, each with None in place of the other."""
    copied, divided = (
        jax.tree_util.tree_map_with_path(lambda path, x, want=want: x if hybrid.is_split(path) == want else None, tree)
        for want in (False, True)
    )
    return copied, divided


def _join(copied: PyTree, divided: PyTree) -> PyTree:
    """The inverse of `_partition`."""
    return jax.tree.map(lambda x, y: y if x is None else x, copied, divided, is_leaf=lambda x: x is None)


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


def make_predict_step(
    model: nn.Module, preprocessing: Preprocessing, devices: Sequence[jax.Device], views: int = 1
) -> Callable[[PyTree, np.ndarray], jax.Array]:
    """Builds `step(params, images) -> logits`: [D, B / D, H, W, 3] in grey levels -> float32 [D, B / D, classes].

    With several `views` of each image (paper, section 4.1) these are logarithms of the views' mean probabilities, whose
    softmax is that mean.
    """

    def of_view(params: PyTree, images: jax.Array, view: View) -> jax.Array:
        return model.apply({"params": params}, preprocessing.evaluation(images, view))  # type: ignore[return-value]

    def predict_step(params: PyTree, images: jax.Array) -> jax.Array:
        if views == 1:
            return of_view(params, images, CENTRE)
        logits = jnp.stack([jax.nn.log_softmax(of_view(params, images, view)) for view in VIEWS[views]])
        return jax.nn.logsumexp(logits, axis=0) - jnp.log(views)

    return jax.pmap(predict_step, axis_name=AXIS, in_axes=(None, 0), devices=devices)


def predict_logits(
    predict_step: Callable[[PyTree, np.ndarray], jax.Array],
    params: PyTree,
    images: np.ndarray,
    batch_size: int,
    num_devices: int,
) -> np.ndarray:
    """Logits of every image once, in order, whatever the batch size and the number of devices.

    Args:
      predict_step: from `make_predict_step`.
      params: replicated over the devices.
      images: uint8 or float32 grey levels [N, H, W, 3], N > 0.
      batch_size: images a step; rounded up to a multiple of `num_devices`.
      num_devices: number of devices, D.

    Returns:
      float32 [N, classes].
    """
    batch_size = -(-batch_size // num_devices) * num_devices
    layout = batches(np.arange(len(images)), batch_size, num_devices)
    parts = [
        jax.device_get(predict_step(params, images[index])).reshape(batch_size, -1)[mask.ravel()]
        for index, mask in zip(layout.indices.swapaxes(0, 1), layout.mask.swapaxes(0, 1), strict=True)
    ]
    return np.concatenate(parts)
