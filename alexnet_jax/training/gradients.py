"""Sums of gradients over a batch: three ways to compute the same sum, with the same signature.

Each calls `loss_and_gradient(common, batch, keys) -> (gradient, (loss, correct, count))`, which returns sums over the
examples that it is given, on parts of this device's examples, and adds up the results of all devices. `common` is all
that the parts share, such as the parameters. They run inside a transformation that binds the axis `AXIS` (`jax.pmap`,
`jax.shard_map`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.data.batches import Batch
from alexnet_jax.distributed.devices import AXIS, MICRO_BATCHES
from alexnet_jax.training.optimizer import is_bias
from alexnet_jax.training.state import divide_dense, fill_gaps

PyTree = Any
StepSums = tuple[jax.Array, jax.Array, jax.Array]
Sums = tuple[PyTree, StepSums]
LossAndGradient = Callable[[PyTree, Batch, jax.Array], Sums]
SumGradients = Callable[[LossAndGradient, PyTree, Batch, jax.Array], Sums]


def add_up(sums: Sums) -> Sums:
    """Adds up the values of all devices.

    The gradients of dense kernels are most of the bytes, and the backward pass computes them first. The barrier lets
    all other sums wait for theirs, so that a GPU sends these while it computes the gradients of the convolutions.
    """
    if lax.axis_size(AXIS) == 1:
        return sums
    leaves, tree = jax.tree.flatten(sums)
    dense = [lax.psum(leaf, AXIS) for leaf in leaves if leaf.ndim == 2]
    others = [leaf for leaf in leaves if leaf.ndim != 2]
    dense, others = lax.optimization_barrier((dense[::-1], others))  # the last layer's first
    parts = {True: iter(dense[::-1]), False: iter(lax.psum(others, AXIS))}
    return jax.tree.unflatten(tree, [next(parts[leaf.ndim == 2]) for leaf in leaves])


def add_up_copied(sums: Sums) -> Sums:
    """The same for hybrid parallelism: the gradient of a device's rows of a dense layer is already a sum over all."""
    copied, divided = divide_dense(sums)
    return fill_gaps(add_up(copied), divided)


def at_once(
    loss_and_gradient: LossAndGradient,
    common: PyTree,
    batch: Batch,
    keys: jax.Array,
    add_up: Callable[[Sums], Sums] = add_up,
) -> Sums:
    """One pass over this device's examples."""
    return add_up(loss_and_gradient(common, batch, keys))


def in_parts(
    loss_and_gradient: LossAndGradient,
    common: PyTree,
    batch: Batch,
    keys: jax.Array,
    number: int,
    unroll: bool,
    add_up: Callable[[Sums], Sums] = add_up,
) -> Sums:
    """Parts of this device's examples, one after another: less memory, and the same sum except for rounding.

    `number` parts must divide the examples. With `unroll`, the compiled program has no loop; loops are slow on a CPU.
    """
    parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), (batch, keys))

    def add(total: Sums, part: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        # The barriers prevent a part from starting before the previous one has been added.
        total, part = lax.optimization_barrier((total, part))
        return lax.optimization_barrier(jax.tree.map(jnp.add, total, loss_and_gradient(common, *part))), None

    shapes = jax.eval_shape(loss_and_gradient, common, *jax.tree.map(lambda x: x[0], parts))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if not unroll:
        return add_up(lax.scan(add, total, parts)[0])
    for index in range(number):
        total, _ = add(total, jax.tree.map(lambda x, index=index: x[index], parts))
    return add_up(total)


def in_fixed_order(loss_and_gradient: LossAndGradient, common: PyTree, batch: Batch, keys: jax.Array) -> Sums:
    """The same bits on 1, 2, 4 and 8 devices.

    Sums over a batch depend in their last bits on how it is divided. Here it is always divided into the same 8
    micro-batches, whose gradients are gathered and added in the same order; that needs memory for 8 gradients on each
    device.
    """
    number = MICRO_BATCHES // lax.axis_size(AXIS)
    sums = []
    for index in range(number):
        part = jax.tree.map(lambda x, index=index: x.reshape(number, -1, *x.shape[1:])[index], (batch, keys))
        # The barriers prevent the compiler from merging parts: each is compiled as it would be on its own. So whatever
        # `loss_and_gradient` computes with must be among its arguments, where they are.
        sums.append(lax.optimization_barrier(loss_and_gradient(*lax.optimization_barrier((common, *part)))))
    gathered = lax.all_gather(jax.tree.map(lambda *x: jnp.stack(x), *sums), AXIS, tiled=True)
    total = jax.tree.map(lambda x: functools.reduce(jnp.add, list(x)), lax.optimization_barrier(gathered))
    return lax.optimization_barrier(total)


def all_finite(loss: jax.Array, gradient: PyTree) -> jax.Array:
    """Whether a loss and its gradient contain neither Inf nor NaN: bool scalar.

    Of a layer, only the gradient of its bias is examined; of one without a bias, everything. If the gradient of a
    layer's output contains Inf or NaN, so does that of its bias; if the layer's input does, so does the loss. What
    remains is a sum of finite products that overflows; the next step's loss shows it.
    """
    leaves = jax.tree.leaves_with_path(gradient)
    with_bias = {path[:-1] for path, _ in leaves if is_bias(path)}
    examined = [leaf.ravel() for path, leaf in leaves if is_bias(path) or path[:-1] not in with_bias]
    return jnp.isfinite(loss) & jnp.isfinite(jnp.concatenate(examined)).all()
