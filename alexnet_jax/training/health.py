"""Diagnosis of a training run whose loss does not fall: dead units, and the size of each layer's updates."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from alexnet_jax.network.layer_outputs import layer_outputs


def dead_shares(model: nn.Module, params: Mapping[str, Any], images: jax.Array) -> dict[str, float]:
    """Share of each hidden layer's units that are 0 after the ReLU for every one of `images`.

    A unit of a convolution is a channel: it is dead if it is 0 at every position of every image. No gradient flows
    through a dead unit. `images` are the network's input, float32 [B, H, W, 3], a few hundred of them; the last layer
    of `params`, which computes the logits, is excluded.
    """
    alive = jax.device_get(_alive(model, params, images))
    return {name: 1 - float(np.mean(alive[name])) for name in list(params)[:-1]}


@functools.partial(jax.jit, static_argnames="model")
def _alive(model: nn.Module, params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
    outputs = layer_outputs(model, params, images)
    return {name: (outputs[name] > 0).any(axis=tuple(range(outputs[name].ndim - 1))) for name in params}


def update_ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """|change| / |weights| of each layer's kernel (Euclidean norms); about 1e-3 when training goes well."""
    return {
        name: float(np.linalg.norm(after[name]["kernel"] - layer["kernel"]) / np.linalg.norm(layer["kernel"]))
        for name, layer in before.items()
    }


def diagnosis(dead: Mapping[str, float], ratios: Mapping[str, float]) -> str:
    """The likely cause and both measures, in one line."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in dead.items())
    moves = ", ".join(f"{name} {ratio:.0e}" for name, ratio in ratios.items())
    if max(dead.values()) > 0.5:
        cause = "most units of a layer are dead: try a lower --learning-rate or another --initial-bias"
    elif max(ratios.values()) < 1e-5:
        cause = "the weights hardly move: try a higher --learning-rate"
    elif max(ratios.values()) > 1e-1:
        cause = "the weights change too much in one update: try a lower --learning-rate"
    else:
        cause = "neither suggests a cause: check the labels, or try --initial-bias 0 or another --learning-rate"
    return f"{cause} (dead units: {shares}; update-to-weight ratio: {moves})"
