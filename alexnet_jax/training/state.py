"""The train state and the sums of a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import AXIS, replicate
from alexnet_jax.network.split_dense import is_split_kernel, join_kernel, split_kernel

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


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: Sequence[int], key: jax.Array
) -> TrainState:
    """Draws the initial parameters; `image_shape` is (H, W, C)."""
    params = jax.jit(model.init)(key, jnp.zeros((1, *image_shape)))["params"]
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), finite=jnp.bool_(True))


def split(state: TrainState, devices: Sequence[jax.Device]) -> SplitState:
    """Puts on each device its part of the dense layers, and a copy of all else."""
    own, rows = processes.local(devices), processes.local_rows(devices)
    copied, divided = _partition(state)
    parts = jax.tree.map(lambda leaf: split_kernel(np.asarray(leaf), len(devices))[rows], divided)
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
        return join_kernel(processes.gathered(np.asarray(parts)), like.shape[0])

    return _join(state.copied, jax.tree.map(together, state.divided, _partition(shapes)[1]))


def _partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """What is copied to each device and what is divided, each with None in place of the other."""
    copied, divided = (
        jax.tree_util.tree_map_with_path(lambda path, x, want=want: x if is_split_kernel(path) == want else None, tree)
        for want in (False, True)
    )
    return copied, divided


def _join(copied: PyTree, divided: PyTree) -> PyTree:
    """The inverse of `_partition`."""
    return jax.tree.map(lambda x, y: y if x is None else x, copied, divided, is_leaf=lambda x: x is None)


@dataclasses.dataclass
class Totals:
    """Sums over examples; means are taken only when they are reported.

    Attributes:
      loss: sum of cross entropies (nats).
      correct: examples classified correctly.
      count: examples.
    """

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def add(self, loss: float, correct: int, count: int) -> None:
        """Adds a batch's sums."""
        self.loss += loss
        self.correct += correct
        self.count += count
