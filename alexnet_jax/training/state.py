"""The train state, the metrics of a step, and the layout of a state over devices."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
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
    """All that training changes, and all that a checkpoint holds.

    Attributes:
      step: int32 scalar, updates made.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's state.
      finite: bool scalar. False once a loss or an examined gradient (`gradients.all_finite`) was Inf or NaN; from then
        on, no update is applied, and the rest stays as it was before that step. A parameter that overflows in the
        update itself is found in the next step's loss, and never saved.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    finite: jax.Array


class StepMetrics(flax.struct.PyTreeNode):
    """Sums over the global batch, never means, so that they can be added up exactly.

    Attributes:
      loss: float32, sum of cross entropies (nats).
      correct: int32, examples whose largest logit is their label's.
      count: int32, examples.
      finite: bool, whether the update was applied (see `TrainState`).
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array
    finite: jax.Array


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    key: jax.Array,
    begin: Callable[[PyTree], PyTree] = lambda params: params,
    frozen: Collection[str] = (),
) -> TrainState:
    """Draws the initial parameters.

    Args:
      model: the network.
      optimizer: creates its state for those that are trained.
      image_shape: (H, W, C).
      key: for the draws.
      begin: replaces some of them.
      frozen: names of the layers that are not trained.
    """
    params = begin(jax.jit(model.init)(key, jnp.zeros((1, *image_shape)))["params"])
    trained, _ = divide_frozen(params, frozen)
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=jax.jit(optimizer.init)(trained), finite=jnp.bool_(True)
    )


def divide_frozen(params: PyTree, frozen: Collection[str]) -> tuple[PyTree, PyTree]:
    """The parameters of the layers that are trained, and those of the `frozen` ones."""
    trained, kept = (
        {layer: arrays for layer, arrays in params.items() if (layer in frozen) == want} for want in (False, True)
    )
    return trained, kept


class SplitState(NamedTuple):
    """A `TrainState` in two, for hybrid parallelism.

    Attributes:
      copied: the leaves that every device has completely; None in place of the others.
      divided: kernels of dense layers and the optimizer's state for them, [D, rows, features], one part per device (D:
        devices of this process); None in place of the others.
    """

    copied: TrainState
    divided: TrainState


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """How a train state is laid out over devices: `REPLICATED` or `SPLIT_DENSE`.

    Attributes:
      axes: the device axis of each leaf, for `jax.pmap`.
      join: used inside a step; turns a device's part into the `TrainState` that the step computes with.
      divide: the inverse of `join`.
      put: places a complete state on the devices of this process.
      gather: the inverse of `put`, given a `TrainState` of the complete shapes. All processes must call it.
    """

    axes: Any
    join: Callable[[Any], TrainState]
    divide: Callable[[TrainState], Any]
    put: Callable[[TrainState, Sequence[jax.Device]], Any]
    gather: Callable[[Any, TrainState], TrainState]


def divide_dense(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves that each device has completely and those divided over devices, each with None for the others."""
    copied, divided = (
        jax.tree_util.tree_map_with_path(lambda path, x, want=want: x if is_split_kernel(path) == want else None, tree)
        for want in (False, True)
    )
    return copied, divided


def fill_gaps(tree: PyTree, other: PyTree) -> PyTree:
    """A tree with another's leaves where it has None; the inverse of `divide_dense`."""
    return jax.tree.map(lambda x, y: y if x is None else x, tree, other, is_leaf=lambda x: x is None)


def _put_split(state: TrainState, devices: Sequence[jax.Device]) -> SplitState:
    own, rows = processes.local(devices), processes.local_rows(devices)
    copied, divided = divide_dense(state)
    parts = jax.tree.map(lambda leaf: split_kernel(np.asarray(leaf), len(devices))[rows], divided)
    sharding = NamedSharding(Mesh(np.array(own), (AXIS,)), PartitionSpec(AXIS))
    return SplitState(replicate(copied, devices), jax.device_put(parts, sharding))


def _gather_split(state: SplitState, shapes: TrainState) -> TrainState:
    def gather(parts: jax.Array, like: jax.ShapeDtypeStruct) -> np.ndarray:
        return join_kernel(processes.gathered(np.asarray(parts)), like.shape[0])

    return fill_gaps(state.copied, jax.tree.map(gather, state.divided, divide_dense(shapes)[1]))


REPLICATED = StateLayout(
    axes=None,
    join=lambda state: state,
    divide=lambda state: state,
    put=replicate,
    gather=lambda state, shapes: state,
)
SPLIT_DENSE = StateLayout(
    axes=SplitState(copied=None, divided=0),  # type: ignore[arg-type]
    join=lambda state: fill_gaps(*state),
    divide=lambda state: SplitState(*divide_dense(state)),
    put=_put_split,
    gather=_gather_split,
)
