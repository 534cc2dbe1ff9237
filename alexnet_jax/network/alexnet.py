"""AlexNet for ImageNet, in the variants that are known by that name."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.errors import AlexNetError
from alexnet_jax.network.layers import bias_in_float32, dropout, max_pool
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.lrn_within_channel import local_response_norm_within_channel
from alexnet_jax.network.operations import Operation, apply_operations
from alexnet_jax.network.split_dense import dense_layer

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "logits")
KERNEL_SIDES = (11, 5, 3, 3, 3)
SMALLEST_INPUT = 67  # with smaller images, the third pooling of some variants has no window


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The numbers by which one AlexNet differs from another. Tuples have an entry per layer, in the order of `LAYERS`.

    Attributes:
      source: where the numbers come from.
      input_size: height and width of the images in pixels; other sizes change the shape of fc1's kernel.
      conv1_padding: rows and columns of zeros before and after the image. The other convolutions keep the map's size.
      features: output channels of each convolution.
      groups: `feature_group_count` of each convolution; the two towers if it is 2.
      operations: what follows each convolution, in order; "activation" is the ReLU.
      lrn_k: k of the normalization across channels. Its size 5, alpha 1e-4 and beta 0.75 are the same in all variants.
      lrn_divide_by_size: whether alpha is divided by 5.
      lrn_groups: groups of channels that are normalized separately.
      deviations: standard deviation of each layer's initial weights, N(0, deviation). None: PyTorch's default, weights
        and biases uniform within +- 1 / sqrt(fan-in).
      biases: initial value of each layer's biases; unused where `deviations` is None.
      dropped: the two dense layers whose inputs have dropout.
    """

    source: str
    input_size: int
    conv1_padding: tuple[int, int]
    features: tuple[int, ...]
    groups: tuple[int, ...]
    operations: tuple[tuple[Operation, ...], ...]
    lrn_k: float = 2.0
    lrn_divide_by_size: bool = False
    lrn_groups: int = 1
    deviations: tuple[float, ...] | None = (0.01,) * 8
    biases: tuple[float, ...] = (0, 1, 0, 1, 1, 1, 1, 0)
    dropped: tuple[str, str] = ("fc2", "logits")


_PAPER = Architecture(
    source="paper, sections 3 and 5",
    input_size=227,
    conv1_padding=(0, 0),
    features=(96, 256, 384, 384, 256),
    groups=(1, 2, 1, 2, 2),
    operations=(
        ("activation", "LRN", "pool"),
        ("activation", "LRN", "pool"),
        ("activation",),
        ("activation",),
        ("activation", "pool"),
    ),
)
_PROGRAM = dataclasses.replace(
    _PAPER,
    source="authors' 2012 program, run 145",
    input_size=224,
    conv1_padding=(0, 3),
    operations=(("LRN", "pool", "activation"), ("activation", "LRN", "LRN within", "pool"), *_PAPER.operations[2:]),
    lrn_divide_by_size=True,
    lrn_groups=2,
    deviations=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
)

VARIANTS: Mapping[str, Architecture] = MappingProxyType(
    {
        "paper": _PAPER,
        "2012": _PROGRAM,
        "one-column": dataclasses.replace(
            _PROGRAM,
            source="cuda-convnet2, layers-imagenet-1gpu.cfg",
            features=(64, 192, 384, 256, 256),
            groups=(1, 1, 1, 1, 1),
            operations=(_PROGRAM.operations[0], *_PAPER.operations[1:]),
            lrn_groups=1,
            biases=(0, 1, 0, 1, 1, 1, 1, -7),
        ),
        "torchvision": dataclasses.replace(
            _PAPER,
            source="torchvision, alexnet",
            input_size=224,
            conv1_padding=(2, 2),
            features=(64, 192, 384, 256, 256),
            groups=(1, 1, 1, 1, 1),
            operations=(("activation", "pool"), ("activation", "pool"), *_PAPER.operations[2:]),
            deviations=None,
            dropped=("fc1", "fc2"),
        ),
        "caffe": dataclasses.replace(
            _PAPER,
            source="Caffe, bvlc_alexnet",
            lrn_k=1.0,
            lrn_divide_by_size=True,
            deviations=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
            biases=(0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
        ),
        "caffenet": dataclasses.replace(
            _PAPER,
            source="Caffe, bvlc_reference_caffenet",
            operations=(("activation", "pool", "LRN"), ("activation", "pool", "LRN"), *_PAPER.operations[2:]),
            lrn_k=1.0,
            lrn_divide_by_size=True,
            deviations=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
        ),
    }
)


class AlexNet(nn.Module):
    """AlexNet for ImageNet, in six variants that differ in the numbers of `VARIANTS`; docs/networks.md compares them.

    All have five convolutions, 11x11 / 4, 5x5 and three of 3x3, with 3x3 / 2 max pooling after the first, second and
    fifth, and two hidden dense layers of 4096; images of their `input_size` give a 6 x 6 x 256 map before these.

    - `"paper"`: exactly the paper's text, 60,965,224 parameters. The text's 224x224 images are 227x227 here: with an
      11x11 kernel, stride 4 and no padding only these give the 55x55 map that its neuron counts require.
    - `"2012"`: the program that the authors ran, with 40.7% / 18.2% error. The program computes 1 + ceil((size - 11) /
      4) outputs, so its 224x224 images give 55x55 too: the last row and column of windows extend 3 pixels past the
      edge, into zeros. The same rule for pooling needs no padding at 55, 27 and 13. Each tower normalizes its own
      channels.
    - `"one-column"`: Krizhevsky's network for one GPU (2014), 64-192-384-256-256 channels, 61,100,840 parameters.
    - `"torchvision"`: one-column's shape without normalization.
    - `"caffe"`: the paper's shape with Caffe's normalization and initial values.
    - `"caffenet"`: Caffe's reference network, which pools before it normalizes. Only this order and the initial biases
      differ from `"caffe"`, so the weights of one can be loaded into the other, but give different results.

    Kernels are [height, width, input channels / groups, output channels]; the map is flattened in the order H, W, C.
    The programs of 2012, Caffe and torchvision flatten C, H, W: reorder fc1's rows to use their weights.

    Attributes:
      variant: a key of `VARIANTS`.
      num_classes: number of logits.
      dropout_rate: probability that an input of a `dropped` layer is dropped; 0.5 in the paper.
      dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
      precision: of float32 products, "default" (TF32 on GPUs since Ampere) or "highest".
      convolution: `lax.conv_general_dilated` or a function with its signature.
      dense_axis: name of the device axis over which the dense layers are split (`split_dense`); None: not split.
    """

    variant: str = "paper"
    num_classes: int = 1000
    dropout_rate: float = 0.5
    dtype: DTypeLike = jnp.float32
    precision: str = "default"
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    dense_axis: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes unnormalized logits, float32 [B, num_classes].

        Args:
          images: float [B, H, W, 3] in grey levels (0 to 255) minus the training mean: the initial weights and alpha
            are meant for this scale. H and W are the variant's `input_size`.
          dropout_keys: [B, 2] PRNG keys, one per example and dropout layer: training. None: evaluation, no dropout.

        Raises:
          AlexNetError: the variant does not exist, or the images are smaller than 67x67 pixels.
          flax.errors.ScopeParamShapeError: the images do not have the size that the parameters were made for.
        """
        network = architecture(self.variant)
        _check_size(images.shape, network.input_size)
        after = functools.partial(apply_operations, self, _functions(network))
        x = images.astype(self.dtype)
        for i, name in enumerate(LAYERS[:5]):
            x = after(name, network.operations[i], self._convolution(network, i, x.shape[-1])(x))
        x = x.reshape(x.shape[0], -1)
        for name, features in zip(LAYERS[5:], (4096, 4096, self.num_classes), strict=True):
            if dropout_keys is not None and name in network.dropped:
                x = dropout(x, self.dropout_rate, dropout_keys[:, network.dropped.index(name)])
            dense = functools.partial(dense_layer(self.dense_axis), **_initializers(network, name, x.shape[1]))
            x = dense(features, dtype=self.dtype, precision=self.precision, name=name)(x)
            x = after(name, ["activation"] if name != "logits" else [], x)
        return x.astype(jnp.float32)

    def _convolution(self, network: Architecture, i: int, channels: int) -> nn.Conv:
        side, groups = KERNEL_SIDES[i], network.groups[i]
        return nn.Conv(
            network.features[i],
            (side, side),
            strides=4 if i == 0 else 1,
            padding=[network.conv1_padding] * 2 if i == 0 else "SAME",
            feature_group_count=groups,
            dtype=self.dtype,
            precision=self.precision,
            promote_dtype=bias_in_float32,
            conv_general_dilated=self.convolution,
            name=LAYERS[i],
            **_initializers(network, LAYERS[i], side**2 * channels // groups),
        )


def architecture(variant: str) -> Architecture:
    """The variant of that name; raises AlexNetError if there is none."""
    if variant not in VARIANTS:
        raise AlexNetError(f"there is no AlexNet variant {variant!r}; choose from {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def _check_size(shape: tuple[int, ...], input_size: int) -> None:
    if min(shape[1:3]) < SMALLEST_INPUT:
        raise AlexNetError(
            f"AlexNet needs images of at least {SMALLEST_INPUT}x{SMALLEST_INPUT} pixels "
            f"(made for {input_size}x{input_size}), not {shape[1]}x{shape[2]}"
        )


def _functions(network: Architecture) -> dict[Operation, Callable[[jax.Array], jax.Array]]:
    """The operations of a variant, on maps [B, H, W, C]."""

    def normalize(x: jax.Array) -> jax.Array:
        towers = x.reshape(*x.shape[:-1], network.lrn_groups, -1)
        towers = local_response_norm(towers, k=network.lrn_k, divide_by_size=network.lrn_divide_by_size)
        return towers.reshape(x.shape)

    return {
        "activation": nn.relu,
        "LRN": normalize,
        "LRN within": local_response_norm_within_channel,
        "pool": functools.partial(max_pool, padding="VALID"),
    }


def _initializers(network: Architecture, layer: str, fan_in: int) -> dict[str, Any]:
    """Initial values of a layer's kernel and bias, as arguments of Flax's layers."""
    if network.deviations is None:
        bound = 1 / math.sqrt(fan_in)

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return {"kernel_init": uniform, "bias_init": uniform}
    i = LAYERS.index(layer)
    return {
        "kernel_init": nn.initializers.normal(network.deviations[i]),
        "bias_init": nn.initializers.constant(network.biases[i]),
    }
