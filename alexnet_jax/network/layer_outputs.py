"""What each layer of a network computes."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax


def layer_outputs(model: nn.Module, params: Mapping[str, Any], inputs: jax.Array) -> dict[str, jax.Array]:
    """Outputs of every layer and of each operation after it, by name, in the order of the computation.

    A layer has the name of its parameters, "conv1"; operations are what the model keeps with `sow`, "conv1 pool".
    `inputs` are the network's, float32 [B, H, W, 3]; there is no dropout.
    """

    def is_layer(module: nn.Module, method: str) -> bool:
        return len(module.path) == 1 and method == "__call__"

    _, state = model.apply({"params": params}, inputs, capture_intermediates=is_layer, mutable=["intermediates"])
    kept = state["intermediates"]
    return {name: value["__call__"][0] if name in params else value[0] for name, value in kept.items()}
