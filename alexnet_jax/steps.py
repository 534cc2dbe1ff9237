"""The train state, the train step and the predict step; the only module that knows pmap."""

import contextlib
import functools
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

from alexnet_jax.augment import Preprocessing
from alexnet_jax.batches import Batches, batches
from alexnet_jax.errors import UsageError

AXIS = "batch"
PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """All that training changes, and all that a checkpoint must hold.

    Attributes:
      step: int32 scalar, updates made.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree


class Examples(NamedTuple):
    """A split of the data, whole, on every device: a step picks its batch there, and nothing waits for the host.

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
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


def select_devices(num_devices: int | None) -> list[jax.Device]:
    """The first `num_devices` devices; None: all there are.

    A CPU counts as one device, but JAX can split it into any number. That must be settled before JAX is first used in
    the process, so call this early.

    Raises:
      UsageError: if there are fewer.
    """
    if num_devices is not None:
        # Fails if JAX is in use already: then what there is must do, and is checked next.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", num_devices)
    devices = jax.devices()
    if num_devices is not None and num_devices > len(devices):
        raise UsageError(f"--num-devices {num_devices}: JAX sees {len(devices)} ({devices[0].platform})")
    return devices[:num_devices]


def default_steps_per_call(devices: Sequence[jax.Device]) -> int:
    """Steps in one call of the train step: many on an accelerator, where a step takes less time than its launch."""
    return 1 if devices[0].platform == "cpu" else 25


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: Sequence[int], key: jax.Array
) -> TrainState:
    """Draws the initial parameters; `image_shape` is (H, W, C)."""
    params = jax.jit(model.init)(key, jnp.zeros((1, *image_shape)))["params"]
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts a tree on every device, without a stacked device axis."""
    # The mesh axis must bear pmap's axis name, or the step compiles a second time for its own output.
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    devices: Sequence[jax.Device],
) -> Callable[[TrainState, Examples, Batches, jax.Array], tuple[TrainState, StepMetrics]]:
    """Builds the data-parallel training step.

    `step(state, examples, batches, key) -> (state, metrics)` takes as many steps as there are `batches`. Each augments
    its batch, computes the mean cross entropy over the examples of the GLOBAL batch and its gradient, and updates.
    `state`, `examples` and `key` are replicated, `state` is donated. `key` is the run's: every random draw for an
    example follows from it, from `state.step` and from the example's place in the global batch, so the same batch gives
    the same crops, noise and dropout masks on any number of devices.
    """

    def train_step(
        state: TrainState, examples: Examples, batch: Batches, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        raw, labels = (jnp.take(array, batch.indices, axis=0, mode="clip") for array in examples)
        per_device = labels.shape[0]
        place = lax.axis_index(AXIS) * per_device + jnp.arange(per_device)
        step_key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(place)
        augment_keys, dropout_keys = jax.vmap(jax.random.split)(keys).T
        images = preprocessing.training(augment_keys, raw, state.step)
        # The devices' local losses are scaled so that their mean is the mean over the batch, padding left out.
        weights = batch.mask / lax.pmean(batch.mask.sum(dtype=jnp.float32), AXIS)

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits: jax.Array = model.apply({"params": params}, images, dropout_keys)  # type: ignore[assignment]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.sum(losses * weights), (losses, logits)

        gradients, (losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        gradients = lax.pmean(gradients, AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        correct = (jnp.argmax(logits, axis=-1) == labels) & batch.mask
        metrics = StepMetrics(
            loss=jnp.sum(losses * batch.mask),
            correct=correct.sum(dtype=jnp.int32),
            count=batch.mask.sum(dtype=jnp.int32),
        )
        state = TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        return state, lax.psum(metrics, AXIS)

    def train_steps(
        state: TrainState, examples: Examples, batches: Batches, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        if len(batches.indices) > 1:
            return lax.scan(lambda state, batch: train_step(state, examples, batch, key), state, batches)
        # Not in a loop: there XLA runs convolutions on a CPU a hundred times slower.
        state, metrics = train_step(state, examples, jax.tree.map(lambda x: x[0], batches), key)
        return state, jax.tree.map(lambda x: x[None], metrics)

    # out_axes=None returns the first device's value: everything returned is equal on all devices, by pmean and psum.
    return jax.pmap(
        train_steps, axis_name=AXIS, in_axes=(None, None, 0, None), out_axes=None, donate_argnums=0, devices=devices
    )


def make_predict_step(
    model: nn.Module, preprocessing: Preprocessing, devices: Sequence[jax.Device]
) -> Callable[[PyTree, np.ndarray], jax.Array]:
    """Builds `step(params, images) -> logits`: [D, B / D, H, W, 3] in grey levels -> float32 [D, B / D, classes]."""

    def predict_step(params: PyTree, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, preprocessing.evaluation(images))  # type: ignore[return-value]

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
      num_devices: D.

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
