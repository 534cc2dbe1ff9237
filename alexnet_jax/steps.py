"""The train state, the train step and the predict step; the only module that knows pmap."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.augment import Preprocessing
from alexnet_jax.batches import Batch, batches
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


class StepMetrics(flax.struct.PyTreeNode):
    """Sums over a global batch, never means, so that they can be added up exactly.

    Attributes:
      loss: float32, sum of cross entropies (nats).
      correct: int32, examples whose largest logit is their label's.
      count: int32, examples.
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
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, StepMetrics]]:
    """Builds the data-parallel training step.

    `step(state, batch, key) -> (state, metrics)`: augments the batch, computes the mean cross entropy over the examples
    of the GLOBAL batch and its gradient, and updates. `state` (replicated) is donated. `key` is the run's: every random
    draw for an example follows from it, from `state.step` and from the example's place in the global batch, so the same
    batch gives the same crops, noise and dropout masks on any number of devices.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepMetrics]:
        per_device = batch.labels.shape[0]
        place = lax.axis_index(AXIS) * per_device + jnp.arange(per_device)
        step_key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(place)
        augment_keys, dropout_keys = jax.vmap(jax.random.split)(keys).T
        images = preprocessing.training(augment_keys, batch.images, state.step)
        # The devices' local losses are scaled so that their mean is the mean over the batch, padding left out.
        weights = batch.mask / lax.pmean(batch.mask.sum(dtype=jnp.float32), AXIS)

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits: jax.Array = model.apply({"params": params}, images, dropout_keys)  # type: ignore[assignment]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return jnp.sum(losses * weights), (losses, logits)

        gradients, (losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        gradients = lax.pmean(gradients, AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        correct = (jnp.argmax(logits, axis=-1) == batch.labels) & batch.mask
        metrics = StepMetrics(
            loss=jnp.sum(losses * batch.mask),
            correct=correct.sum(dtype=jnp.int32),
            count=batch.mask.sum(dtype=jnp.int32),
        )
        state = TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        return state, lax.psum(metrics, AXIS)

    # out_axes=None returns the first device's value: everything returned is equal on all devices, by pmean and psum.
    return jax.pmap(
        train_step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=devices
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
    order = np.arange(len(images))
    parts = [
        jax.device_get(predict_step(params, batch.images)).reshape(batch_size, -1)[batch.mask.ravel()]
        for batch in batches(images, np.zeros(len(images), np.int32), order, batch_size, num_devices)
    ]
    return np.concatenate(parts)
