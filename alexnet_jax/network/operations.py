"""The operations after a layer: their names in a network's table, and how they are applied."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax

Operation = Literal["activation", "LRN", "LRN within", "pool", "average pool"]
"""Activation function, LRN across channels and within a channel, max pooling, average pooling."""


def apply_operations(
    network: nn.Module,
    functions: Mapping[Operation, Callable[[jax.Array], jax.Array]],
    layer: str,
    operations: Sequence[Operation],
    x: jax.Array,
) -> jax.Array:
    """Applies `operations` in order to the output of a layer, and rounds the result of each to the network's dtype.

    Each result is stored (`sow`) in `intermediates` under "LAYER OPERATION" ("conv1 LRN", for example), where
    `inspection.activations` finds it.

    Args:
      network: the module that stores the results; has an attribute `dtype`.
      functions: the function of each operation in this network.
      layer: name of the layer.
      operations: their names, in order.
      x: the layer's output.
    """
    for operation in operations:
        x = functions[operation](x).astype(network.dtype)
        network.sow("intermediates", f"{layer} {operation}", x)
    return x
