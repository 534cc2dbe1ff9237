"""Networks from settings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.config.settings import NetworkConfig
from alexnet_jax.network.alexnet import VARIANTS, AlexNet, architecture
from alexnet_jax.network.convnet import CONVNETS, ConvNet
from alexnet_jax.network.convolution import fast_convolution
from alexnet_jax.network.small import AlexNetSmall


def from_config(config: NetworkConfig, num_classes: int) -> AlexNetSmall | AlexNet | ConvNet:
    """The network that a configuration describes."""
    fast = config.convolution == "products" or (config.convolution == "auto" and jax.default_backend() == "cpu")
    dtype = jnp.dtype(config.dtype)
    convolution = fast_convolution if fast else lax.conv_general_dilated
    activation = {"relu": nn.relu, "tanh": nn.tanh}[config.activation]
    if config.network == "small":
        return AlexNetSmall(
            num_classes=num_classes,
            dropout_rate=config.dropout_rate,
            initial_bias=1.0 if config.initial_bias is None else config.initial_bias,
            activation=activation,
            lrn="paper" if config.lrn == "own" else config.lrn,
            pool_window=config.pool_window,
            conv1_stride=config.conv1_stride,
            dropout_after=("fc1", "fc2") if config.dropout_after == "both" else (config.dropout_after,),
            dtype=dtype,
            convolution=convolution,
        )
    if config.network in CONVNETS:
        return ConvNet(config.network, num_classes, config.lrn != "none", activation, dtype, convolution)
    return AlexNet(config.network, num_classes, config.dropout_rate, dtype, convolution)


def input_size(config: NetworkConfig) -> int | None:
    """Side of the images that a network takes; None: it adapts to any."""
    if config.network in CONVNETS:
        return CONVNETS[config.network].input_size
    return architecture(config.network).input_size if config.network in VARIANTS else None
