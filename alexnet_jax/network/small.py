"""The original post's network."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.network.layers import _kept, dropout, max_pool
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.split_dense import _dense


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
    divided, beta 0.75, k 2), which is what the seed runs. Attributes other than the defaults are for experiments.

    Attributes:
      num_classes: number of logits.
      dropout_rate: probability that an output of fc1 and of fc2 is dropped.
      initial_bias: start value of every bias; the seed has 1 throughout, the paper in some layers.
      activation: after each hidden layer.
      lrn: "paper", "divided" (alpha / size, the 2012 program) or "none".
      pool_window: side of the pooling windows, which lie 2 apart: 3 overlap.
      conv1_stride: of the first convolution; with 1 the maps are twice as wide and fc1 has four times the weights.
      dropout_after: names of the dense layers that dropout follows.
      dtype: dtype of the computation, float32 or bfloat16; parameters, logits and the loss stay float32.
      convolution: how convolutions are computed, `lax.conv_general_dilated` or a function with its signature.
      dense_axis: name of the axis of devices that the dense layers are split over (`hybrid.SplitDense`); None: whole.
    """

    num_classes: int = 10
    dropout_rate: float = 0.5
    initial_bias: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    lrn: str = "paper"
    pool_window: int = 3
    conv1_stride: int = 2
    dropout_after: tuple[str, ...] = ("fc1", "fc2")
    dtype: DTypeLike = jnp.float32
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    dense_axis: str | None = None

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
        dense = functools.partial(
            _dense(self.dense_axis), dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init
        )
        layer_keys = None if dropout_keys is None else jax.vmap(jax.random.split)(dropout_keys)

        x = images.astype(self.dtype)
        x = self._activate("conv1", conv(48, (7, 7), strides=self.conv1_stride, name="conv1")(x))
        x = self._normalize_and_pool("conv1", x)
        x = self._activate("conv2", conv(128, (5, 5), name="conv2")(x))
        x = self._normalize_and_pool("conv2", x)
        for name in ("conv3", "conv4", "conv5"):
            x = self._activate(name, conv(192, (3, 3), name=name)(x))
        x = x.reshape(x.shape[0], -1)
        for i, name in enumerate(("fc1", "fc2")):
            x = self._activate(name, dense(512, name=name)(x))
            if layer_keys is not None and name in self.dropout_after:
                x = dropout(x, self.dropout_rate, layer_keys[:, i])
        logits = dense(self.num_classes, name="logits")(x)
        return logits.astype(jnp.float32)

    def _activate(self, layer: str, x: jax.Array) -> jax.Array:
        return _kept(self, f"{layer} activation", self.activation(x))

    def _normalize_and_pool(self, layer: str, x: jax.Array) -> jax.Array:
        if self.lrn != "none":
            x = _kept(self, f"{layer} LRN", local_response_norm(x, divide_by_size=self.lrn == "divided"))
        return _kept(self, f"{layer} pool", max_pool(x, self.pool_window))
