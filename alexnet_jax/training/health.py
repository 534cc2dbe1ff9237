"""Why does the loss not fall? Shares of dead units, and how far an update moves each layer."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def dead_shares(model: nn.Module, params: Mapping[str, Any], images: jax.Array) -> dict[str, float]:
    """Share of each hidden layer's units that are 0 after the ReLU for every one of `images`.

    A unit of a convolution is a channel: it is dead if it is 0 at every position of every image. No gradient flows
    through a dead unit.

    Args:
      model: calls its layers in order; the last one gives the logits and is left out.
      params: of the model.
      images: float32 [B, H, W, 3], the network's input; some hundred of them.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def alive(model: nn.Module, params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        is_layer = lambda module, method: len(module.path) == 1 and method == "__call__"  # noqa: E731
        _, found = model.apply({"params": params}, images, capture_intermediates=is_layer, mutable=["intermediates"])
        outputs = {name: found["intermediates"][name]["__call__"][0] for name in params}
        return {name: (x > 0).any(axis=tuple(range(x.ndim - 1))) for name, x in outputs.items()}

    shares = {name: 1 - float(np.mean(x)) for name, x in jax.device_get(alive(model, params, images)).items()}
    return {name: shares[name] for name in list(params)[:-1]}


def update_ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """|change| / |weights| of each layer's kernel (Euclidean norms); about 1e-3 where learning goes well."""
    return {
        name: float(np.linalg.norm(after[name]["kernel"] - layer["kernel"]) / np.linalg.norm(layer["kernel"]))
        for name, layer in before.items()
    }


def diagnosis(dead: Mapping[str, float], ratios: Mapping[str, float]) -> str:
    """Both measures and what they hint at, in one line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in dead.items())
    moves = ", ".join(f"{name} {ratio:.0e}" for name, ratio in ratios.items())
    if max(dead.values()) > 0.5:
        cause = "most units of a layer are dead: try a lower --learning-rate or another --initial-bias"
    elif max(ratios.values()) < 1e-5:
        cause = "the weights hardly move: try a higher --learning-rate"
    elif max(ratios.values()) > 1e-1:
        cause = "the weights jump about: try a lower --learning-rate"
    else:
        cause = "neither hints at a cause; are the labels right? Try --initial-bias 0 or another --learning-rate"
    return f"{cause} (dead units: {shares}; update-to-weight ratio: {moves})"
