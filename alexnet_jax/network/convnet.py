"""The authors' small networks for CIFAR-10 (cuda-convnet)."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.network.layers import average_pool, bias_in_float32, locally_connected, max_pool
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.lrn_within_channel import local_response_norm_within_channel
from alexnet_jax.network.operations import Operation, apply_operations


class HiddenLayer(NamedTuple):
    """A hidden layer of `ConvNet`.

    Attributes:
      name: "conv..." is a convolution, "local..." has a kernel for each position.
      size: side of the kernel; the map keeps its size.
      features: output channels.
      deviation: standard deviation of the initial weights.
      operations: what follows, in order.
    """

    name: str
    size: int
    features: int
    deviation: float
    operations: tuple[Operation, ...]


class Layers(NamedTuple):
    """A variant of `ConvNet`.

    Attributes:
      input_size: height and width of the images in pixels.
      hidden: the layers before the logits.
    """

    input_size: int
    hidden: tuple[HiddenLayer, ...]


CONVNETS: Mapping[str, Layers] = MappingProxyType(
    {
        "convnet-18pct": Layers(
            32,
            (
                HiddenLayer("conv1", 5, 32, 1e-4, ("pool", "activation", "LRN within")),
                HiddenLayer("conv2", 5, 32, 0.01, ("activation", "average pool", "LRN within")),
                HiddenLayer("conv3", 5, 64, 0.01, ("activation", "average pool")),
            ),
        ),
        "convnet-11pct": Layers(
            24,
            (
                HiddenLayer("conv1", 5, 64, 1e-4, ("activation", "pool", "LRN")),
                HiddenLayer("conv2", 5, 64, 0.01, ("activation", "LRN", "pool")),
                HiddenLayer("local3", 3, 64, 0.04, ("activation",)),
                HiddenLayer("local4", 3, 32, 0.04, ("activation",)),
            ),
        ),
    }
)


class ConvNet(nn.Module):
    """The authors' small networks for CIFAR-10, to which the paper's figure 1 and section 3.3 refer.

    - `"convnet-18pct"`: 18% test error without augmentation; three convolutions of 32-32-64 channels, 5x5, and the
      dense layer are its four layers with weights.
    - `"convnet-11pct"`: 11% from 24x24 crops; two convolutions of 64 channels, 5x5, and two locally connected layers
      of 64 and 32 channels, 3x3. With `lrn="none"` it is the 13% network.

    All pooling is 3x3 / 2 with "SAME" padding; the average counts only pixels of the map. Normalization: k 1, beta
    0.75; within channels over 3x3 pixels, alpha 5e-5 / 9; across 9 channels, alpha 1e-3 / 9. Biases start at 0.

    Source: cuda-convnet, example-layers (layers-18pct.cfg, layers-conv-local-11pct.cfg).

    Attributes:
      variant: a key of `CONVNETS`.
      num_classes: number of logits.
      activation: applied after each hidden layer.
      lrn: "own" or "none".
      dtype: dtype of the computation; parameters and logits stay float32.
      precision: of float32 products, "default" (TF32 on GPUs since Ampere) or "highest".
      convolution: `lax.conv_general_dilated` or a function with its signature.
    """

    variant: str
    num_classes: int = 10
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    lrn: str = "own"
    dtype: DTypeLike = jnp.float32
    precision: str = "default"
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes unnormalized logits, float32 [B, num_classes].

        Args:
          images: float [B, H, W, 3] in grey levels (0 to 255) minus the training mean.
          dropout_keys: not used: there is no dropout.
        """
        functions: dict[Operation, Callable[[jax.Array], jax.Array]] = {
            "activation": self.activation,
            "LRN": functools.partial(local_response_norm, size=9, alpha=1e-3, k=1.0, divide_by_size=True),
            "LRN within": functools.partial(local_response_norm_within_channel, size=3, alpha=5e-5),
            "pool": max_pool,
            "average pool": average_pool,
        }
        conv = functools.partial(nn.Conv, conv_general_dilated=self.convolution, promote_dtype=bias_in_float32)
        common: dict[str, Any] = {"dtype": self.dtype, "precision": self.precision}
        x = images.astype(self.dtype)
        for name, size, features, deviation, operations in CONVNETS[self.variant].hidden:
            layer = LocallyConnected if name.startswith("local") else conv
            initial = nn.initializers.normal(deviation)
            x = layer(features, (size, size), kernel_init=initial, name=name, **common)(x)
            chosen = [one for one in operations if self.lrn != "none" or not one.startswith("LRN")]
            x = apply_operations(self, functions, name, chosen, x)
        x = x.reshape(x.shape[0], -1)
        initial = nn.initializers.normal(0.01)
        logits = nn.Dense(
            self.num_classes, promote_dtype=bias_in_float32, kernel_init=initial, name="logits", **common
        )(x)
        return logits.astype(jnp.float32)


class LocallyConnected(nn.Module):
    """`locally_connected` as a layer, with a kernel and a bias for each position of the map; biases start at 0.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernels, equal and odd.
      dtype: dtype of the computation.
      precision: of float32 products.
      kernel_init: as in `flax.linen.Conv`.
    """

    features: int
    kernel_size: tuple[int, int]
    dtype: DTypeLike = jnp.float32
    precision: str = "default"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, features]."""
        places = x.shape[1:3]
        kernel = self.param("kernel", self.kernel_init, (*places, *self.kernel_size, x.shape[3], self.features))
        bias = self.param("bias", nn.initializers.zeros, (*places, self.features))
        return locally_connected(x.astype(self.dtype), kernel.astype(self.dtype), self.precision) + bias[None]
