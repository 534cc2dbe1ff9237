"""The networks, as Flax Linen modules."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from alexnet_jax.config import NetworkConfig
from alexnet_jax.convolution import fast_convolution
from alexnet_jax.errors import AlexNetError
from alexnet_jax.hybrid import SplitDense
from alexnet_jax.layers import (
    average_pool,
    dropout,
    local_response_norm,
    local_response_norm_within_channel,
    locally_connected,
    max_pool,
)


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


def _dense(axis: str | None) -> Callable[..., nn.Module]:
    """`nn.Dense`, or its form that is split over an axis of devices."""
    return nn.Dense if axis is None else functools.partial(SplitDense, axis=axis)


def _kept(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """The value itself, kept under its name for whoever asks for `intermediates` (`inspection.activations`)."""
    module.sow("intermediates", name, x)
    return x


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


class LayerCount(NamedTuple):
    """The size of one layer for one image.

    Attributes:
      output: shape of what the convolution or the product gives, before pooling, without the batch.
      kernel: shape of the weights.
      parameters: weights and biases.
      multiply_accumulates: multiplications of an activation by a weight: the kernel's size times the places where it
        is applied. Biases, normalization and pooling do not count; what hangs into the padding does.
    """

    output: tuple[int, ...]
    kernel: tuple[int, ...]
    parameters: int
    multiply_accumulates: int


def count_layers(variant: str = "paper", num_classes: int = 1000) -> dict[str, LayerCount]:
    """Counts parameters and multiply-accumulates of each layer, from shapes alone: nothing is computed.

    >>> sum(layer.parameters for layer in count_layers("paper").values())
    60965224
    """
    network = AlexNet(variant, num_classes)
    size = architecture(variant).input_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    parameters = jax.eval_shape(network.init, jax.random.key(0), images)
    _, state = jax.eval_shape(functools.partial(network.apply, capture_intermediates=True), parameters, images)
    counts = {}
    for name in LAYERS:
        kernel, bias = parameters["params"][name]["kernel"], parameters["params"][name]["bias"]
        output = state["intermediates"][name]["__call__"][0].shape[1:]
        counts[name] = LayerCount(output, kernel.shape, kernel.size + bias.size, kernel.size * math.prod(output[:-1]))
    return counts


def tables() -> str:
    """The variants side by side and layer by layer, in Markdown: the end of docs/networks.md."""
    features = [_describe(name) for name in VARIANTS]
    side_by_side = [[row, *(column[row] for column in features)] for row in features[0]]
    parts = ["## The variants side by side", _markdown(["", *VARIANTS], side_by_side), "## Layer by layer"]
    for name in VARIANTS:
        counts = count_layers(name)
        rows = [
            [layer, _by(c.kernel), _by(c.output), f"{c.parameters:,}", f"{c.multiply_accumulates:,}"]
            for layer, c in counts.items()
        ]
        heading = ["layer", "kernel", "output", "parameters", "multiply-accumulates"]
        parts += [f"### {name}", _markdown(heading, rows)]
    return "\n\n".join(parts) + "\n"


def _describe(variant: str) -> dict[str, str]:
    """The rows of one variant in the table of all."""
    network, counts = VARIANTS[variant], count_layers(variant).values()
    operations = [", ".join(names) for names in network.operations]
    normalizes = any("LRN" in names for names in network.operations)
    gaussian = network.deviations is not None
    return {
        "source": network.source,
        "input": _by((network.input_size, network.input_size)),
        "zeros around it, before / after": " / ".join(map(str, network.conv1_padding)),
        "channels": "-".join(map(str, network.features)),
        "groups": "-".join(map(str, network.groups)),
        **{f"after {layer}": names for layer, names in zip(LAYERS, operations, strict=False)},
        "LRN: a": ("2e-5 = alpha / 5" if network.lrn_divide_by_size else "1e-4 = alpha") if normalizes else "none",
        "LRN: k": f"{network.lrn_k:g}" if normalizes else "none",
        "LRN: groups of channels": str(network.lrn_groups) if normalizes else "none",
        "first weights": ", ".join(f"{d:g}" for d in network.deviations or ()) or "uniform, 1 / sqrt(fan-in)",
        "first biases": ", ".join(f"{b:g}" for b in network.biases) if gaussian else "uniform, 1 / sqrt(fan-in)",
        "dropout on the inputs of": ", ".join(network.dropped),
        "parameters": f"{sum(c.parameters for c in counts):,}",
        "multiply-accumulates": f"{sum(c.multiply_accumulates for c in counts):,}",
    }


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *rows])


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


if __name__ == "__main__":
    print(tables(), end="")
