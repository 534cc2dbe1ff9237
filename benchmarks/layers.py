"""Where the time of our training step goes: each part alone, value and gradients, beside the whole step.

`python benchmarks/layers.py [--batch-size N] [--out FILE.json]` prints a table. Parts take turns; medians of rounds.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from programs import BATCHES, Program, Spec

from alexnet_jax import cli, runtime
from alexnet_jax.config import PositiveInt, validate

# name -> input [H, W, C], kernel [R, R, C, F], stride
CONVOLUTIONS = {
    "conv1": ((32, 32, 3), (7, 7, 3, 48), 2),
    "conv2": ((8, 8, 48), (5, 5, 48, 128), 1),
    "conv3": ((4, 4, 128), (3, 3, 128, 192), 1),
    "conv4": ((4, 4, 192), (3, 3, 192, 192), 1),
    "conv5": ((4, 4, 192), (3, 3, 192, 192), 1),
}
DENSE = {"fc1": (3072, 512), "fc2": (512, 512), "logits": (512, 10)}
MAPS = {"1": (16, 16, 48), "2": (8, 8, 128)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time the parts of AlexNetSmall's training step, and the step."""

    batch_size: PositiveInt = 128
    """Images a step."""
    rounds: PositiveInt = 7
    """Blocks of each part."""
    calls: PositiveInt = 10
    """Calls in a block."""
    out: pathlib.Path | None = None
    """JSON file for the raw times."""


def parts(batch_size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Each part, and the GFLOP of its direct algorithm: value, gradient of the weights, gradient of the input."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from alexnet_jax import layers
    from alexnet_jax.convolution import fast_convolution

    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def with_gradients(
        function: Callable[..., jax.Array], *operands: jax.Array, constant: int = 0
    ) -> Callable[[], Any]:
        """Value and gradients but for the first `constant` operands."""

        @jax.jit
        def both(cotangent: jax.Array, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            value, vjp = jax.vjp(functools.partial(function, *operands[:constant]), *operands[constant:])
            return value, vjp(cotangent)

        cotangent = draw(*jax.eval_shape(function, *operands).shape)
        return lambda: jax.block_until_ready(both(cotangent, *operands))

    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, (image, kernel, stride) in CONVOLUTIONS.items():
        x, w, first = draw(batch_size, *image), draw(*kernel), int(name == "conv1")  # images need no gradient
        work = 2e-9 * batch_size * (image[0] // stride) ** 2 * math.prod(kernel) * (3 - first)
        for way, convolution in (("products", fast_convolution), ("direct", lax.conv_general_dilated)):
            convolve = functools.partial(
                convolution, window_strides=(stride, stride), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            found[f"{name}, {way}"] = (with_gradients(convolve, x, w, constant=first), work)
    for name, shape in MAPS.items():
        x = draw(batch_size, *shape)
        found[f"LRN {name}"] = (with_gradients(layers.local_response_norm, x), 0.0)
        found[f"max pooling {name}"] = (with_gradients(layers.max_pool, x), 0.0)
    for name, (inputs, outputs) in DENSE.items():
        work = 6e-9 * batch_size * inputs * outputs
        found[name] = (with_gradients(jnp.matmul, draw(batch_size, inputs), draw(inputs, outputs)), work)
    return found


def whole_step(batch_size: int, folder: pathlib.Path) -> Program:
    """The training step on random images."""
    import programs_jax

    rng, count = np.random.default_rng(0), BATCHES * batch_size
    images, labels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count, np.int32)
    np.savez(folder / "data.npz", images=images, labels=labels)
    return programs_jax.train(Spec("jax", "cpu", batch_size=batch_size, data=str(folder / "data.npz")))


def main(args: Sequence[str]) -> None:
    """Parses the flags, measures, prints a Markdown table."""
    options = validate(cli.parse(Options, args, "layers.py", Options.__doc__ or ""))
    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="alexnet_jax_layers_") as folder:
        step = whole_step(options.batch_size, pathlib.Path(folder))
    runs = parts(options.batch_size) | {"whole step": (lambda: step.run(1), 0.0)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (run, _) in runs.items():
            run()
            run()
            start = time.perf_counter()
            for _ in range(options.calls):
                run()
            times[name].append((time.perf_counter() - start) / options.calls * 1e3)
    print("| part | ms (least to largest) | GFLOP/s of the direct algorithm |\n| --- | --- | --- |")
    for name, (_, work) in runs.items():
        median = statistics.median(times[name])
        rate = f"{work / median * 1e3:.0f}" if work else ""
        print(f"| {name} | {median:.1f} ({min(times[name]):.1f} to {max(times[name]):.1f}) | {rate} |")
    if options.out:
        options.out.write_text(json.dumps({"milliseconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
