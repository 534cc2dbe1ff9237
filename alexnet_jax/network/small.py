"""The network of the original post, for 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.network.layers import bias_in_float32, dropout, max_pool
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.operations import Operation, apply_operations
from alexnet_jax.network.split_dense import dense_layer


class AlexNetSmall(nn.Module):
    """The original post's AlexNet for 32x32 images: 2,887,306 parameters for 10 classes.

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
    Keras and TensorFlow), biases start at `initial_bias`. LRN has the paper's numbers (size 5, alpha 1e-4 not divided,
    beta 0.75, k 2), as in the original post. Values other than the defaults are for experiments.

    Attributes:
      num_classes: number of logits.
      dropout_rate: probability that an output of fc1 or fc2 is dropped.
      initial_bias: initial value of every bias; 1 everywhere in the original post, in some layers in the paper.
      activation: applied after each hidden layer.
      lrn: "own", "divided" (alpha / size, the 2012 program) or "none".
      pool_window: side of the pooling windows, whose stride is 2: windows of 3 overlap.
      conv1_stride: stride of the first convolution; with 1, the maps are twice as wide and fc1 has four times the
        weights.
      dropout_after: "both" hidden dense layers or only "fc1".
      dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
      precision: of float32 products, "default" (TF32 on GPUs since Ampere) or "highest".
      convolution: `lax.conv_general_dilated` or a function with its signature.
      dense_axis: name of the device axis over which the dense layers are split (`split_dense`); None: not split.
    """

    num_classes: int = 10
    dropout_rate: float = 0.5
    initial_bias: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    lrn: str = "own"
    pool_window: int = 3
    conv1_stride: int = 2
    dropout_after: str = "both"
    dtype: DTypeLike = jnp.float32
    precision: str = "default"
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    dense_axis: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes unnormalized logits, float32 [B, num_classes].

        Args:
          images: float [B, H, W, 3], values in [0, 1] (or these minus the training mean).
          dropout_keys: [B, 2] PRNG keys, one per example and dropout layer: training. None: evaluation, no dropout.
        """
        conv, dense, after = self._parts()
        normalized: list[Operation] = ["activation", "pool"] if self.lrn == "none" else ["activation", "LRN", "pool"]
        x = images.astype(self.dtype)
        x = after("conv1", normalized, conv(48, (7, 7), self.conv1_stride, name="conv1")(x))
        x = after("conv2", normalized, conv(128, (5, 5), name="conv2")(x))
        x = after("conv3", ["activation"], conv(192, (3, 3), name="conv3")(x))
        x = after("conv4", ["activation"], conv(192, (3, 3), name="conv4")(x))
        x = after("conv5", ["activation"], conv(192, (3, 3), name="conv5")(x))
        x = x.reshape(x.shape[0], -1)
        for i, name in enumerate(("fc1", "fc2")):
            x = after(name, ["activation"], dense(512, name=name)(x))
            if dropout_keys is not None and self.dropout_after in ("both", name):
                x = dropout(x, self.dropout_rate, dropout_keys[:, i])
        return dense(self.num_classes, name="logits")(x).astype(jnp.float32)

    def _parts(self) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module], Callable[..., jax.Array]]:
        """Convolution, dense layer and operations after a layer, with this network's settings."""
        settings: dict[str, Any] = {
            "dtype": self.dtype,
            "precision": self.precision,
            "kernel_init": nn.initializers.he_normal(),
            "bias_init": nn.initializers.constant(self.initial_bias),
        }
        functions: dict[Operation, Callable[[jax.Array], jax.Array]] = {
            "activation": self.activation,
            "LRN": functools.partial(local_response_norm, divide_by_size=self.lrn == "divided"),
            "pool": functools.partial(max_pool, window=self.pool_window),
        }
        return (
            functools.partial(
                nn.Conv, conv_general_dilated=self.convolution, promote_dtype=bias_in_float32, **settings
            ),
            functools.partial(dense_layer(self.dense_axis), **settings),
            functools.partial(apply_operations, self, functions),
        )
