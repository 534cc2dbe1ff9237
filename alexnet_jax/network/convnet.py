"""The authors' small networks for CIFAR-10."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.network.layers import _kept, average_pool, locally_connected, max_pool
from alexnet_jax.network.lrn import local_response_norm, local_response_norm_within_channel


class ConvNetLayer(NamedTuple):
    """A hidden layer of `ConvNet`.

    Attributes:
      name: "conv..." shares its kernel over the map, "local..." has one for each place.
      size: side of the kernel; the map keeps its size.
      features: channels that it makes.
      deviation: standard deviation of the first weights.
      operations: what follows, in order.
    """

    name: str
    size: int
    features: int
    deviation: float
    operations: tuple[str, ...]


class FourLayers(NamedTuple):
    """A variant of `ConvNet`.

    Attributes:
      input_size: side of the images that it takes.
      hidden: the layers before the logits.
    """

    input_size: int
    hidden: tuple[ConvNetLayer, ...]


CONVNETS: Mapping[str, FourLayers] = MappingProxyType(
    {
        "convnet-18pct": FourLayers(
            32,
            (
                ConvNetLayer("conv1", 5, 32, 1e-4, ("max pool", "activation", "LRN within")),
                ConvNetLayer("conv2", 5, 32, 0.01, ("activation", "average pool", "LRN within")),
                ConvNetLayer("conv3", 5, 64, 0.01, ("activation", "average pool")),
            ),
        ),
        "convnet-11pct": FourLayers(
            24,
            (
                ConvNetLayer("conv1", 5, 64, 1e-4, ("activation", "max pool", "LRN")),
                ConvNetLayer("conv2", 5, 64, 0.01, ("activation", "LRN", "max pool")),
                ConvNetLayer("local3", 3, 64, 0.04, ("activation",)),
                ConvNetLayer("local4", 3, 32, 0.04, ("activation",)),
            ),
        ),
    }
)


class LocallyConnected(nn.Module):
    """A layer of `locally_connected` with a kernel and a bias for each place of the map.

    Attributes:
      features: channels that it makes.
      size: side of the kernels, odd.
      deviation: standard deviation of the first weights; biases begin with 0.
      dtype: dtype of the computation.
    """

    features: int
    size: int
    deviation: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, features]."""
        places, window = x.shape[1:3], (self.size, self.size)
        kernel = self.param(
            "kernel", nn.initializers.normal(self.deviation), (*places, *window, x.shape[3], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (*places, self.features))
        return locally_connected(x.astype(self.dtype), kernel.astype(self.dtype)) + bias[None].astype(self.dtype)


class ConvNet(nn.Module):
    """The authors' small networks for CIFAR-10, which the paper's figure 1 and section 3.3 speak of.

    - `"convnet-18pct"`: 18% test error without augmentation; 32-32-64 channels, 5x5, pooling 3x3 / 2. Its three
      convolutions and the dense layer are four layers with weights.
    - `"convnet-11pct"`: 11% from 24x24 crops; two convolutions of 64 channels, 5x5, and two locally connected layers
      of 64 and 32 channels, 3x3, which have a kernel and a bias for each place of the map. Without `normalize` it is
      the 13% network.

    All pooling is 3x3 / 2 with "SAME" padding; the average counts only pixels of the map. Normalization: k 1, beta
    0.75; within channels over 3x3 pixels, alpha 5e-5 / 9; across 9 channels, alpha 1e-3 / 9. Biases begin with 0.

    Source: cuda-convnet, example-layers (layers-18pct.cfg, layers-conv-local-11pct.cfg).

    Attributes:
      variant: a key of `CONVNETS`.
      num_classes: number of logits.
      normalize: whether there is local response normalization.
      activation: after each hidden layer.
      dtype: dtype of the computation; parameters and logits stay float32.
      convolution: how convolutions are computed, `lax.conv_general_dilated` or a function with its signature.
    """

    variant: str
    num_classes: int = 10
    normalize: bool = True
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes logits, float32 [B, num_classes].

        Args:
          images: float [B, H, W, 3] in grey levels (0 to 255) less the training mean.
          dropout_keys: not used: there is no dropout.
        """
        x = images.astype(self.dtype)
        for layer in CONVNETS[self.variant].hidden:
            if layer.name.startswith("local"):
                x = LocallyConnected(layer.features, layer.size, layer.deviation, self.dtype, name=layer.name)(x)
            else:
                x = nn.Conv(
                    layer.features,
                    (layer.size, layer.size),
                    dtype=self.dtype,
                    kernel_init=nn.initializers.normal(layer.deviation),
                    conv_general_dilated=self.convolution,
                    name=layer.name,
                )(x)
            for operation in layer.operations:
                if self.normalize or not operation.startswith("LRN"):
                    x = _kept(self, f"{layer.name} {operation}", self._operate(operation, x))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01), name="logits")(
            x.reshape(x.shape[0], -1)
        )
        return logits.astype(jnp.float32)

    def _operate(self, operation: str, x: jax.Array) -> jax.Array:
        match operation:
            case "activation":
                return self.activation(x)
            case "max pool":
                return max_pool(x)
            case "average pool":
                return average_pool(x)
            case "LRN within":
                return local_response_norm_within_channel(x, size=3, alpha=5e-5)
            case _:
                return local_response_norm(x, size=9, alpha=1e-3, k=1.0, divide_by_size=True)
