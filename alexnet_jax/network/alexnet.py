"""The networks, as Flax Linen modules."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.errors import AlexNetError
from alexnet_jax.network.layers import _kept, dropout, max_pool
from alexnet_jax.network.lrn import local_response_norm, local_response_norm_within_channel
from alexnet_jax.network.split_dense import _dense

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "logits")
KERNEL_SIDES = (11, 5, 3, 3, 3)
SMALLEST_INPUT = 67  # below it, some variant's third pooling has no window

Operation = Literal["ReLU", "LRN", "LRN within", "pool"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one AlexNet from another. Tuples go by layer, in the order of `LAYERS`.

    Attributes:
      source: where the numbers come from.
      input_size: height and width of the images in pixels; other sizes change the shape of fc1's kernel.
      conv1_padding: rows and columns of zeros before and after the image. The other convolutions keep the map's size.
      features: channels that each convolution makes.
      groups: groups of channels in each convolution that see each other; the towers where it is 2.
      operations: what follows each convolution, in order.
      lrn_k: k of the normalization across channels. Its size 5, alpha 1e-4 and beta 0.75 are the same in all variants.
      lrn_divide_by_size: whether that alpha is divided by 5.
      lrn_groups: groups of channels over whose borders that normalization does not look.
      deviations: standard deviation of each layer's first weights, N(0, deviation). None: PyTorch's default, weights
        and biases uniform within +- 1 / sqrt(weights of one output).
      biases: start value of each layer's biases; unused where `deviations` is None.
      dropped: the two dense layers whose inputs are dropped out.
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
    operations=(("ReLU", "LRN", "pool"), ("ReLU", "LRN", "pool"), ("ReLU",), ("ReLU",), ("ReLU", "pool")),
)
_PROGRAM = dataclasses.replace(
    _PAPER,
    source="authors' 2012 program, run 145",
    input_size=224,
    conv1_padding=(0, 3),
    operations=(("LRN", "pool", "ReLU"), ("ReLU", "LRN", "LRN within", "pool"), *_PAPER.operations[2:]),
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
            operations=(("ReLU", "pool"), ("ReLU", "pool"), *_PAPER.operations[2:]),
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
            operations=(("ReLU", "pool", "LRN"), ("ReLU", "pool", "LRN"), *_PAPER.operations[2:]),
            lrn_k=1.0,
            lrn_divide_by_size=True,
            deviations=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
        ),
    }
)


class AlexNet(nn.Module):
    """AlexNet for ImageNet, in six variants that differ in what `VARIANTS` says; docs/networks.md compares them.

    All have five convolutions, 11x11 / 4, 5x5 and three of 3x3, 3x3 / 2 max pooling after the first, the second and the
    fifth, two hidden dense layers of 4096, and make a 6 x 6 x 256 map before these from images of their `input_size`.

    - `"paper"`: the paper's text to the letter, 60,965,224 parameters. The text's 224x224 images are 227x227 here: with
      an 11x11 kernel, stride 4 and no padding only these give the 55x55 map that its neuron counts ask for.
    - `"2012"`: what the authors ran, and got 40.7% / 18.2% with. The program counts 1 + ceil((size - 11) / 4) outputs,
      so its 224x224 images give 55x55 too: the last row and column of windows hang 3 pixels over the edge, into
      zeros. The same rule for pooling needs no padding at 55, 27 and 13. Each tower normalizes its own channels.
    - `"one-column"`: the same author's network for one GPU (2014), 64-192-384-256-256 channels, 61,100,840 parameters.
    - `"torchvision"`: that with no normalization.
    - `"caffe"`: the paper's shape with Caffe's normalization and first values.
    - `"caffenet"`: Caffe's reference network, which pools before it normalizes. Only its order and its first biases
      differ from `"caffe"`, so the arrays of one load into the other, and give other answers.

    Kernels are [height, width, input channels / groups, output channels]; the map is flattened in the order H, W, C.
    The programs of 2012, Caffe and torchvision flatten C, H, W: reorder fc1's rows to take over their weights.

    Attributes:
      variant: a key of `VARIANTS`.
      num_classes: number of logits.
      dropout_rate: probability that an input of a `dropped` layer is dropped; the paper has 0.5.
      dtype: dtype of the computation, float32 or bfloat16; parameters and logits stay float32.
      convolution: how convolutions are computed, `lax.conv_general_dilated` or a function with its signature.
      dense_axis: name of the axis of devices that the dense layers are split over (`hybrid.SplitDense`); None: whole.
    """

    variant: str = "paper"
    num_classes: int = 1000
    dropout_rate: float = 0.5
    dtype: DTypeLike = jnp.float32
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    dense_axis: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes logits.

        Args:
          images: float [B, H, W, 3] in grey levels (0 to 255) less the training mean: the first weights and alpha are
            made for this scale. H and W are the variant's `input_size`.
          dropout_keys: [B] PRNG keys, one an example: training. None: evaluation, no dropout.

        Returns:
          float32 [B, num_classes], not normalized.

        Raises:
          AlexNetError: for a variant that does not exist, or images of less than 67x67 pixels.
          flax.errors.ScopeParamShapeError: for images of another size than the one the parameters were made for.
        """
        network = architecture(self.variant)
        if min(images.shape[1:3]) < SMALLEST_INPUT:
            raise AlexNetError(
                f"AlexNet needs images of at least {SMALLEST_INPUT}x{SMALLEST_INPUT} pixels "
                f"(made for {network.input_size}x{network.input_size}), not {images.shape[1]}x{images.shape[2]}"
            )
        x = images.astype(self.dtype)
        for i, operations in enumerate(network.operations):
            x = self._convolve(network, i, x)
            for operation in operations:
                x = _kept(self, f"{LAYERS[i]} {operation}", _operate(network, operation, x))
        x = x.reshape(x.shape[0], -1)
        layer_keys = None if dropout_keys is None else jax.vmap(jax.random.split)(dropout_keys)
        for name, features in zip(LAYERS[5:], (4096, 4096, self.num_classes), strict=True):
            if layer_keys is not None and name in network.dropped:
                x = dropout(x, self.dropout_rate, layer_keys[:, network.dropped.index(name)])
            kernel_init, bias_init = _initializers(network, name, x.shape[1])
            dense = functools.partial(_dense(self.dense_axis), dtype=self.dtype, name=name)
            x = dense(features, kernel_init=kernel_init, bias_init=bias_init)(x)
            x = _kept(self, f"{name} ReLU", nn.relu(x)) if name != "logits" else x
        return x.astype(jnp.float32)

    def _convolve(self, network: Architecture, i: int, x: jax.Array) -> jax.Array:
        side, groups = KERNEL_SIDES[i], network.groups[i]
        kernel_init, bias_init = _initializers(network, LAYERS[i], side**2 * x.shape[-1] // groups)
        return nn.Conv(
            network.features[i],
            (side, side),
            strides=4 if i == 0 else 1,
            padding=[network.conv1_padding] * 2 if i == 0 else "SAME",
            feature_group_count=groups,
            dtype=self.dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            conv_general_dilated=self.convolution,
            name=LAYERS[i],
        )(x)


def architecture(variant: str) -> Architecture:
    """The variant of that name; raises AlexNetError where there is none."""
    if variant not in VARIANTS:
        raise AlexNetError(f"there is no AlexNet variant {variant!r}; choose from {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def _operate(network: Architecture, operation: Operation, x: jax.Array) -> jax.Array:
    """Applies one of the operations after a convolution to a map [B, H, W, C]."""
    match operation:
        case "ReLU":
            return nn.relu(x)
        case "pool":
            return max_pool(x, padding="VALID")
        case "LRN within":
            return local_response_norm_within_channel(x)
        case "LRN":
            towers = x.reshape(*x.shape[:-1], network.lrn_groups, -1)
            towers = local_response_norm(towers, k=network.lrn_k, divide_by_size=network.lrn_divide_by_size)
            return towers.reshape(x.shape)


def _initializers(
    network: Architecture, layer: str, fan_in: int
) -> tuple[nn.initializers.Initializer, nn.initializers.Initializer]:
    """How the kernel and the bias of a layer begin."""
    if network.deviations is None:
        bound = 1 / math.sqrt(fan_in)

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return uniform, uniform
    i = LAYERS.index(layer)
    return nn.initializers.normal(network.deviations[i]), nn.initializers.constant(network.biases[i])
