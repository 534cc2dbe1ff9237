"""The networks, as Flax Linen modules."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.config import NetworkConfig
from alexnet_jax.convolution import fast_convolution
from alexnet_jax.layers import dropout, local_response_norm, max_pool


class AlexNetSmall(nn.Module):
    """The seed's AlexNet for 32x32 images: 2,887,306 parameters for 10 classes.

        layer            output (32x32 input)   parameters
        conv1  7x7 / 2      16 x 16 x 48             7,104    ReLU, LRN, 3x3 / 2 max pooling -> 8 x 8
        conv2  5x5           8 x 8 x 128           153,728    ReLU, LRN, 3x3 / 2 max pooling -> 4 x 4
        conv3  3x3           4 x 4 x 192           221,376    ReLU
        conv4  3x3           4 x 4 x 192           331,968    ReLU
        conv5  3x3           4 x 4 x 192           331,968    ReLU
        fc1                          512         1,573,376    ReLU, dropout
        fc2                          512           262,656    ReLU, dropout
        logits                        10             5,130

    Convolutions and pooling are padded "SAME". Kernels are drawn He-normal (truncated at two standard deviations, as in
    Keras and TensorFlow), biases start at `initial_bias`. LRN follows the paper's print (size 5, alpha 1e-4 not
    divided, beta 0.75, k 2), which is what the seed runs.

    Attributes:
      num_classes: number of logits.
      dropout_rate: probability that an output of fc1 and of fc2 is dropped.
      initial_bias: start value of every bias; the seed has 1 throughout, the paper in some layers.
      dtype: dtype of the computation, float32 or bfloat16; parameters, logits and the loss stay float32.
      convolution: how convolutions are computed, `lax.conv_general_dilated` or a function with its signature.
    """

    num_classes: int = 10
    dropout_rate: float = 0.5
    initial_bias: float = 1.0
    dtype: DTypeLike = jnp.float32
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes logits.

        Args:
          images: float [B, H, W, 3], values in [0, 1] (or that less the training mean).
          dropout_keys: [B] PRNG keys, one an example: training. None: evaluation, no dropout.

        Returns:
          float32 [B, num_classes], not normalized.
        """
        kernel_init, bias_init = nn.initializers.he_normal(), nn.initializers.constant(self.initial_bias)
        conv = functools.partial(nn.Conv, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init)
        conv = functools.partial(conv, conv_general_dilated=self.convolution)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init)
        layer_keys = None if dropout_keys is None else jax.vmap(jax.random.split)(dropout_keys)

        x = images.astype(self.dtype)
        x = nn.relu(conv(48, (7, 7), strides=2, name="conv1")(x))
        x = max_pool(local_response_norm(x))
        x = nn.relu(conv(128, (5, 5), name="conv2")(x))
        x = max_pool(local_response_norm(x))
        for name in ("conv3", "conv4", "conv5"):
            x = nn.relu(conv(192, (3, 3), name=name)(x))
        x = x.reshape(x.shape[0], -1)
        for i, name in enumerate(("fc1", "fc2")):
            x = nn.relu(dense(512, name=name)(x))
            if layer_keys is not None:
                x = dropout(x, self.dropout_rate, layer_keys[:, i])
        logits = dense(self.num_classes, name="logits")(x)
        return logits.astype(jnp.float32)


def from_config(config: NetworkConfig, num_classes: int) -> AlexNetSmall:
    """The network that a configuration describes."""
    fast = config.convolution == "products" or (config.convolution == "auto" and jax.default_backend() == "cpu")
    return AlexNetSmall(
        num_classes,
        config.dropout_rate,
        config.initial_bias,
        jnp.dtype(config.dtype),
        fast_convolution if fast else lax.conv_general_dilated,
    )
