"""Dense layers split over the devices of a data-parallel step: hybrid parallelism.

Convolutions have few weights and many activations, dense layers the reverse: 58.6 of the 61 million parameters of
AlexNet are in its dense layers. Krizhevsky (One weird trick for parallelizing convolutional neural networks, 2014,
arXiv:1404.5997) therefore splits the examples for the former and the weights for the latter.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.network.layers import bias_in_float32

LAYERS = ("fc1", "fc2", "logits")


def dense_layer(axis: str | None) -> Callable[..., nn.Module]:
    """`flax.linen.Dense`, or its variant that is split over a device axis; both add the bias in float32."""
    if axis is None:
        return functools.partial(nn.Dense, promote_dtype=bias_in_float32)
    return functools.partial(SplitDense, axis=axis)


class SplitDense(nn.Module):
    """`flax.linen.Dense`, with the rows of its kernel split over devices; to be called under `jax.pmap`.

        y = sum over devices d of x[:, rows of d] @ kernel[rows of d] + bias

    Each of D devices has b examples, B = D b in all. An all-to-all gives each device its columns of all examples, [B, F
    / D]. Their product with the device's rows of the kernel is its part of the sum for all examples, [B, features]; a
    reduce-scatter adds up the parts and gives each device its own examples again, [b, features]. The operations that
    follow (bias, activation, dropout) are the same as without the split. In the backward pass, an all-gather takes the
    place of the reduce-scatter, and another all-to-all that of the first. The gradient of a device's rows is already
    that of the whole batch, so no sum over devices is needed.

    A device sends (D - 1) / D * B * (F / D + features) numbers forward and as many backward. With a kernel split by
    outputs (gather x, multiply, gather or exchange y), F would replace F / D and, in the last layer, features / D would
    replace features: for AlexNet's layers together that is more, 1.5 times as much on 8 devices.

    If D does not divide F, the last device's rows are padded with zeros, whose gradient is zero.

    Attributes:
      features: number of outputs.
      axis: name of the device axis.
      dtype: dtype of the computation; parameters are float32.
      precision: as in `flax.linen.Dense`.
      kernel_init: as in `flax.linen.Dense`.
      bias_init: as in `flax.linen.Dense`.
    """

    features: int
    axis: str
    dtype: DTypeLike = jnp.float32
    precision: str = "default"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, F] -> [b, features]; parameters: `kernel` [ceil(F / D), features], `bias` [features]."""
        devices = lax.axis_size(self.axis)
        rows = -(-x.shape[1] // devices)
        kernel = self.param("kernel", self.kernel_init, (rows, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel, bias = bias_in_float32(x, kernel, bias, dtype=self.dtype)
        x = jnp.pad(x, [(0, 0), (0, rows * devices - x.shape[1])])
        columns = lax.all_to_all(x, self.axis, split_axis=1, concat_axis=0, tiled=True)  # [B, rows]
        parts = jnp.matmul(columns, kernel, precision=self.precision)  # [B, features]
        return lax.psum_scatter(parts, self.axis, scatter_dimension=0, tiled=True) + bias[None]


def is_split_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a path in a tree of parameters, or in an optimizer's state, is that of a kernel that is split."""
    layer, name = [getattr(key, "key", None) for key in (None, None, *path)[-2:]]
    return layer in LAYERS and name == "kernel"


def split_kernel(kernel: np.ndarray, devices: int) -> np.ndarray:
    """Each device's rows, padded with zeros: [F, features] -> [D, ceil(F / D), features]."""
    rows = -(-len(kernel) // devices)
    return np.pad(kernel, [(0, rows * devices - len(kernel)), (0, 0)]).reshape(devices, rows, -1)


def join_kernel(parts: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of `split_kernel`: [D, ceil(F / D), features] -> [F, features], with F = `rows`."""
    return parts.reshape(-1, parts.shape[-1])[:rows]
