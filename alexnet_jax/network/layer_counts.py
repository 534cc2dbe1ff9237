"""Parameters and multiplications of each layer, and the tables of docs/networks.md."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.network.alexnet import LAYERS, VARIANTS, AlexNet, architecture


class LayerCount(NamedTuple):
    """The size of one layer for one image.

    Attributes:
      output: shape of what the convolution or the product gives, before pooling, without the batch.
      kernel: shape of the weights.
      parameters: weights and biases.
      multiply_accumulates: multiplications of an activation by a weight: the kernel's size times the places where it
        is applied. Biases, normalization and pooling do not count; what hangs into the padding does.
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


def tables() -> str:
    """The variants side by side and layer by layer, in Markdown: the end of docs/networks.md."""
    features = [_describe(name) for name in VARIANTS]
    side_by_side = [[row, *(column[row] for column in features)] for row in features[0]]
    parts = ["## The variants side by side", _markdown(["", *VARIANTS], side_by_side), "## Layer by layer"]
    for name in VARIANTS:
        counts = count_layers(name)
        rows = [
            [layer, _by(c.kernel), _by(c.output), f"{c.parameters:,}", f"{c.multiply_accumulates:,}"]
            for layer, c in counts.items()
        ]
        heading = ["layer", "kernel", "output", "parameters", "multiply-accumulates"]
        parts += [f"### {name}", _markdown(heading, rows)]
    return "\n\n".join(parts) + "\n"


def _describe(variant: str) -> dict[str, str]:
    """The rows of one variant in the table of all."""
    network, counts = VARIANTS[variant], count_layers(variant).values()
    operations = [", ".join(names) for names in network.operations]
    normalizes = any("LRN" in names for names in network.operations)
    gaussian = network.deviations is not None
    return {
        "source": network.source,
        "input": _by((network.input_size, network.input_size)),
        "zeros around it, before / after": " / ".join(map(str, network.conv1_padding)),
        "channels": "-".join(map(str, network.features)),
        "groups": "-".join(map(str, network.groups)),
        **{f"after {layer}": names for layer, names in zip(LAYERS, operations, strict=False)},
        "LRN: a": ("2e-5 = alpha / 5" if network.lrn_divide_by_size else "1e-4 = alpha") if normalizes else "none",
        "LRN: k": f"{network.lrn_k:g}" if normalizes else "none",
        "LRN: groups of channels": str(network.lrn_groups) if normalizes else "none",
        "first weights": ", ".join(f"{d:g}" for d in network.deviations or ()) or "uniform, 1 / sqrt(fan-in)",
        "first biases": ", ".join(f"{b:g}" for b in network.biases) if gaussian else "uniform, 1 / sqrt(fan-in)",
        "dropout on the inputs of": ", ".join(network.dropped),
        "parameters": f"{sum(c.parameters for c in counts):,}",
        "multiply-accumulates": f"{sum(c.multiply_accumulates for c in counts):,}",
    }


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *rows])


if __name__ == "__main__":
    print(tables(), end="")
