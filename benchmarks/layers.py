"""Measures where the time of our training step goes: each part alone (value and gradients), and the whole step.

`python benchmarks/layers.py [--batch-size N] [--out FILE.json]` prints a table. Parts take turns; medians of rounds.
With `--choices`, it times both implementations where the package must choose one.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import programs_jax
from jax import lax
from programs import BATCHES, Program, Spec

from alexnet_jax import runtime
from alexnet_jax.config import cli
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.network import layers, lrn
from alexnet_jax.network.convolution import convolution_by_patches, fast_convolution, winograd


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a network whose time is measured.

    Attributes:
      convolutions: name -> input [H, W, C], kernel [R, R, C, F], stride, padding.
      maps: inputs [H, W, C] of the poolings.
      normalized: inputs of LRN.
      padding: of the poolings.
      dense: name -> inputs, outputs.
    """

    convolutions: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], int, Any]]
    maps: tuple[tuple[int, ...], ...]
    normalized: tuple[tuple[int, ...], ...]
    padding: str
    dense: Mapping[str, tuple[int, int]]


NETWORKS = {
    "small": Layers(
        {
            "conv1": ((32, 32, 3), (7, 7, 3, 48), 2, "SAME"),
            "conv2": ((8, 8, 48), (5, 5, 48, 128), 1, "SAME"),
            "conv3": ((4, 4, 128), (3, 3, 128, 192), 1, "SAME"),
            "conv4": ((4, 4, 192), (3, 3, 192, 192), 1, "SAME"),
            "conv5": ((4, 4, 192), (3, 3, 192, 192), 1, "SAME"),
        },
        maps=((16, 16, 48), (8, 8, 128)),
        normalized=((16, 16, 48), (8, 8, 128)),
        padding="SAME",
        dense={"fc1": (3072, 512), "fc2": (512, 512), "logits": (512, 10)},
    ),
    "torchvision": Layers(
        {
            "conv1": ((224, 224, 3), (11, 11, 3, 64), 4, [(2, 2), (2, 2)]),
            "conv2": ((27, 27, 64), (5, 5, 64, 192), 1, "SAME"),
            "conv3": ((13, 13, 192), (3, 3, 192, 384), 1, "SAME"),
            "conv4": ((13, 13, 384), (3, 3, 384, 256), 1, "SAME"),
            "conv5": ((13, 13, 256), (3, 3, 256, 256), 1, "SAME"),
        },
        maps=((55, 55, 64), (27, 27, 192), (13, 13, 256)),
        normalized=(),
        padding="VALID",
        dense={"fc1": (9216, 4096), "fc2": (4096, 4096), "logits": (4096, 1000)},
    ),
}
# Those of the authors' networks for CIFAR-10, and of AlexNetSmall with stride 1 in conv1: larger maps, on which
# Winograd's transforms take an increasing share of the work.
WINOGRAD_OR_PATCHES = {
    "8x8, 32 to 64": ((8, 8, 32), (5, 5, 32, 64)),
    "12x12, 64 to 64": ((12, 12, 64), (5, 5, 64, 64)),
    "16x16, 48 to 128": ((16, 16, 48), (5, 5, 48, 128)),
    "16x16, 32 to 32": ((16, 16, 32), (5, 5, 32, 32)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time the parts of a training step on their own, and the whole step."""

    network: Literal["small", "torchvision"] = "small"
    """AlexNetSmall, or torchvision's AlexNet for ImageNet."""
    batch_size: PositiveInt = 128
    """Images per step."""
    rounds: PositiveInt = 7
    """Blocks of each part."""
    calls: PositiveInt = 10
    """Calls in a block."""
    choices: bool = False
    """Time convolutions by Winograd and by patches, and locally connected layers here and in Flax: not the step."""
    out: pathlib.Path | None = None
    """JSON file for the raw times."""


def draw(*shape: int) -> jax.Array:
    """Random numbers, float32."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def with_gradients(function: Callable[..., jax.Array], *operands: jax.Array, constant: int = 0) -> Callable[[], Any]:
    """Value, and gradients with respect to all but the first `constant` operands."""

    @jax.jit
    def both(cotangent: jax.Array, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, vjp = jax.vjp(functools.partial(function, *operands[:constant]), *operands[constant:])
        return value, vjp(cotangent)

    cotangent = draw(*jax.eval_shape(function, *operands).shape)
    return lambda: jax.block_until_ready(both(cotangent, *operands))


def choices(batch_size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Both implementations where there are two, and the GFLOP of the direct algorithm."""
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, (image, kernel) in WINOGRAD_OR_PATCHES.items():
        x, w = draw(batch_size, *image), draw(*kernel)
        work = 6e-9 * batch_size * image[0] ** 2 * math.prod(kernel)
        by_patches = functools.partial(convolution_by_patches, strides=(1, 1), pads=((2, 2), (2, 2)))
        found[f"5x5 on {name}, Winograd"] = (with_gradients(winograd, x, w), work)
        found[f"5x5 on {name}, patches"] = (with_gradients(by_patches, x, w), work)
    for features in (64, 32):
        x, kernels = draw(batch_size, 6, 6, 64), draw(6, 6, 3, 3, 64, features)
        flax_layer = nn.ConvLocal(features, (3, 3), padding="SAME", use_bias=False)
        work = 6e-9 * batch_size * kernels.size

        def by_flax(x: jax.Array, kernel: jax.Array, layer: nn.ConvLocal = flax_layer) -> jax.Array:
            return layer.apply({"params": {"kernel": kernel}}, x)  # type: ignore[return-value]

        found[f"local 3x3 on 6x6, 64 to {features}"] = (with_gradients(layers.locally_connected, x, kernels), work)
        flat = kernels.reshape(6, 6, -1, features)
        found[f"local 3x3 on 6x6, 64 to {features}, Flax"] = (with_gradients(by_flax, x, flat), work)
    return found


def parts(network: str, batch_size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Each part, and the GFLOP of its direct algorithm: value, gradient of the weights, gradient of the input."""
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    sizes = NETWORKS[network]
    for name, (image, kernel, stride, padding) in sizes.convolutions.items():
        x, w, first = draw(batch_size, *image), draw(*kernel), int(name == "conv1")  # images need no gradient
        for way, convolution in (("products", fast_convolution), ("direct", lax.conv_general_dilated)):
            convolve = functools.partial(
                convolution,
                window_strides=(stride, stride),
                padding=padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            outputs = math.prod(jax.eval_shape(convolve, x, w).shape)
            work = 2e-9 * outputs * math.prod(kernel[:3])
            found[f"{name}, {way}"] = (with_gradients(convolve, x, w, constant=first), work * (3 - first))
            found[f"{name}, {way}, value only"] = (value(convolve, x, w), work)
    for i, shape in enumerate(sizes.normalized, 1):
        found[f"LRN {i}"] = (with_gradients(lrn.local_response_norm, draw(batch_size, *shape)), 0.0)
    for i, shape in enumerate(sizes.maps, 1):
        pool = functools.partial(layers.max_pool, padding=sizes.padding)
        found[f"max pooling {i}"] = (with_gradients(pool, draw(batch_size, *shape)), 0.0)
    for name, (inputs, outputs) in sizes.dense.items():
        work = 6e-9 * batch_size * inputs * outputs
        found[name] = (with_gradients(jnp.matmul, draw(batch_size, inputs), draw(inputs, outputs)), work)
    return found


def value(function: Callable[..., jax.Array], *operands: jax.Array) -> Callable[[], Any]:
    """The value alone."""
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*operands))


def whole_step(network: str, batch_size: int, folder: pathlib.Path) -> Program:
    """The training step on random images."""
    rng, count = np.random.default_rng(0), BATCHES * batch_size
    images, labels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count, np.int32)
    np.savez(folder / "data.npz", images=images, labels=labels)
    spec = Spec("jax", "cpu", network=network, batch_size=batch_size, data=str(folder / "data.npz"))
    return programs_jax.train(spec)


def main(args: Sequence[str]) -> None:
    """Parses the flags, measures, prints a Markdown table."""
    options = cli.parse(Options, args, "layers.py")
    runtime.keep_freed_memory()
    runtime.devices()
    if options.choices:
        runs = choices(options.batch_size)
    else:
        with tempfile.TemporaryDirectory(prefix="alexnet_jax_layers_") as folder:
            step = whole_step(options.network, options.batch_size, pathlib.Path(folder))
        runs = parts(options.network, options.batch_size) | {"whole step": (lambda: step.run(1), 0.0)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (run, _) in runs.items():
            run()
            run()
            start = time.perf_counter()
            for _ in range(options.calls):
                run()
            times[name].append((time.perf_counter() - start) / options.calls * 1e3)
    print("| part | ms (smallest to largest) | GFLOP/s of the direct algorithm |\n| --- | --- | --- |")
    for name, (_, work) in runs.items():
        median = statistics.median(times[name])
        rate = f"{work / median * 1e3:.0f}" if work else ""
        print(f"| {name} | {median:.1f} ({min(times[name]):.1f} to {max(times[name]):.1f}) | {rate} |")
    if options.out:
        options.out.write_text(json.dumps({"milliseconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
