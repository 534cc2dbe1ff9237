"""Builds networks by name from settings: `NETWORKS` has a row for each.

For a new network, write its module, add its name to `NetworkConfig.network`, and its row here. The docstring of
`alexnet_jax.network` lists the requirements on the module.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.config.settings import NetworkConfig
from alexnet_jax.network.alexnet import VARIANTS, AlexNet
from alexnet_jax.network.convnet import CONVNETS, ConvNet
from alexnet_jax.network.convolution import fast_convolution
from alexnet_jax.network.small import AlexNetSmall

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType({"relu": nn.relu, "tanh": jnp.tanh})


def from_config(config: NetworkConfig, num_classes: int) -> nn.Module:
    """The network that a configuration describes."""
    fast = config.convolution == "products" or (config.convolution == "auto" and jax.default_backend() == "cpu")
    return NETWORKS[config.network].create(
        config,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        precision=config.matmul_precision,
        convolution=fast_convolution if fast else lax.conv_general_dilated,
    )


def input_size(config: NetworkConfig) -> int | None:
    """Height and width of the images that a network takes; None: any."""
    return NETWORKS[config.network].input_size


def layers(config: NetworkConfig) -> tuple[str, ...]:
    """Names of a network's layers, first to last."""
    side = input_size(config) or 32
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(from_config(config, num_classes=10).init, jax.random.key(0), images)
    return tuple(variables["params"])


class Network(NamedTuple):
    """A row of `NETWORKS`.

    Attributes:
      create: builds the module from the settings and the attributes that all networks have.
      input_size: height and width of the images in pixels; None: any.
    """

    create: Callable[..., nn.Module]
    input_size: int | None


def _small(config: NetworkConfig, **common: Any) -> nn.Module:
    initial_bias: dict[str, Any] = {} if config.initial_bias is None else {"initial_bias": config.initial_bias}
    return AlexNetSmall(
        dropout_rate=config.dropout_rate,
        activation=ACTIVATIONS[config.activation],
        lrn=config.lrn,
        pool_window=config.pool_window,
        conv1_stride=config.conv1_stride,
        dropout_after=config.dropout_after,
        **initial_bias,
        **common,
    )


def _alexnet(config: NetworkConfig, **common: Any) -> nn.Module:
    return AlexNet(config.network, dropout_rate=config.dropout_rate, **common)


def _convnet(config: NetworkConfig, **common: Any) -> nn.Module:
    return ConvNet(config.network, activation=ACTIVATIONS[config.activation], lrn=config.lrn, **common)


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "small": Network(_small, None),
        **{name: Network(_alexnet, variant.input_size) for name, variant in VARIANTS.items()},
        **{name: Network(_convnet, variant.input_size) for name, variant in CONVNETS.items()},
    }
)
