"""Parameters and multiply-accumulates of each layer of AlexNet."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.network.alexnet import LAYERS, AlexNet, architecture


class LayerCount(NamedTuple):
    """The size of one layer for one image.

    Attributes:
      output: shape of the output of the convolution or product, before pooling, without the batch.
      kernel: shape of the weights.
      parameters: weights and biases.
      multiply_accumulates: multiplications of an activation by a weight: the kernel's size times the number of
        positions where it is applied, padding included. Biases, normalization and pooling are not counted.
    """

    output: tuple[int, ...]
    kernel: tuple[int, ...]
    parameters: int
    multiply_accumulates: int


def count_layers(variant: str = "paper", num_classes: int = 1000) -> dict[str, LayerCount]:
    """Counts parameters and multiply-accumulates of each layer, from shapes alone: nothing is computed.

    >>> sum(layer.parameters for layer in count_layers("paper").values())
    60965224
    """
    network = AlexNet(variant, num_classes)
    size = architecture(variant).input_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    parameters = jax.eval_shape(network.init, jax.random.key(0), images)
    _, state = jax.eval_shape(functools.partial(network.apply, capture_intermediates=True), parameters, images)
    counts = {}
    for name in LAYERS:
        kernel, bias = parameters["params"][name]["kernel"], parameters["params"][name]["bias"]
        output = state["intermediates"][name]["__call__"][0].shape[1:]
        counts[name] = LayerCount(output, kernel.shape, kernel.size + bias.size, kernel.size * math.prod(output[:-1]))
    return counts
