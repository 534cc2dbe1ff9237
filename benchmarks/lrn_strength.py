"""How much does LRN normalize in a trained `AlexNetSmall`? `python benchmarks/lrn_strength.py RUN [--data-dir DIR]`.

Where the sum of squares is small beside k, LRN multiplies every activation by k^-0.75 and normalizes nothing.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import tyro

from alexnet_jax import open_run, runtime
from alexnet_jax.config import cli
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data import load
from alexnet_jax.errors import UsageError
from alexnet_jax.network.lrn import local_response_norm


@dataclasses.dataclass(frozen=True)
class Options:
    """Print the factors by which LRN multiplies the activations of a trained AlexNetSmall."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir."""
    data_dir: Path | None = None
    """Where the data is now, if it has moved since the training."""
    images: PositiveInt = 1000
    """Number of training images to measure."""


def factors(layer: jax.Array, divide_by_size: bool) -> np.ndarray:
    """LRN's output divided by its input, for every activation above 0 of [B, H, W, C]."""
    x = np.maximum(np.asarray(layer), 0)
    return np.asarray(local_response_norm(x, divide_by_size=divide_by_size))[x > 0] / x[x > 0]


def main(args: Sequence[str]) -> None:
    """Parses the flags, opens the run, prints percentiles."""
    options = cli.parse(Options, args, "lrn_strength.py")
    runtime.devices()
    run = open_run(options.run)
    if run.config.network.network != "small" or run.config.network.lrn == "none":
        raise UsageError(f"{options.run}: must be a run of --network small with LRN")
    data = dataclasses.replace(run.config.data, data_dir=options.data_dir or run.config.data.data_dir)
    images = run.preprocessing.evaluation(load(data).sample(options.images).images)
    _, found = run.model.apply({"params": run.params}, images, capture_intermediates=True)
    print(f"LRN's factor (k^-0.75 = {2**-0.75:.4f} where the sum of squares is 0):")
    for name in ("conv1", "conv2"):
        values = factors(found["intermediates"][name]["__call__"][0], run.config.network.lrn == "divided")
        least, percent, median = np.percentile(values, [0, 1, 50])
        print(f"after {name}: median {median:.4f}, 1st percentile {percent:.4f}, smallest {least:.4f}")


if __name__ == "__main__":
    cli.run(main)
