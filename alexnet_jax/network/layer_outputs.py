"""Outputs of each layer of a network."""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_outputs(model: nn.Module, params: Mapping[str, Any], inputs: jax.Array) -> dict[str, jax.Array]:
    """Outputs of every layer and of each operation after it, by name, in the order of the computation.

    A layer has the name of its parameters ("conv1"); operations are the values that the model stores with `sow` ("conv1
    pool"). `inputs` are the network's, float32 [B, H, W, 3]; there is no dropout.
    """

    def is_layer(module: nn.Module, method: str) -> bool:
        return len(module.path) == 1 and method == "__call__"

    _, state = model.apply({"params": params}, inputs, capture_intermediates=is_layer, mutable=["intermediates"])
    kept = state["intermediates"]
    return {name: value["__call__"][0] if name in params else value[0] for name, value in kept.items()}


def layer_names(model: nn.Module, params: Mapping[str, Any], input_shape: Sequence[int]) -> list[str]:
    """The names of `layer_outputs`, for an input (H, W, C)."""
    names: list[str] = []
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    jax.eval_shape(lambda x: names.extend(layer_outputs(model, params, x)), inputs)
    return names


@functools.partial(jax.jit, static_argnames=("model", "names"))
def compiled_layer_outputs(
    model: nn.Module, params: Mapping[str, Any], inputs: jax.Array, names: tuple[str, ...] | None = None
) -> collections.OrderedDict[str, jax.Array]:
    """The `layer_outputs` with these names (None: all) as float32; compiled once for a model and a shape of inputs.

    Raises:
      KeyError: the network has no layer or operation with one of the names.
    """
    outputs = layer_outputs(model, params, inputs)
    for name in names or ():
        if name not in outputs:
            raise KeyError(f"there is no {name!r}: the layers and operations are {', '.join(outputs)}")
    # Ordered: JAX would sort the keys of a dict.
    return collections.OrderedDict((name, outputs[name].astype(jnp.float32)) for name in names or outputs)
