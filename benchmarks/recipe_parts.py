"""Measures what each part of a recipe costs: the training step without it, against the whole step.

`taskset -c 0 python benchmarks/recipe_parts.py [--preset cifar10-best] [--out FILE.json]` prints a table for one core.
The steps take turns; the table has medians of rounds.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from report import markdown
from run import describe_device

from alexnet_jax.config import cli
from alexnet_jax.config.flags import replace
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data import shapes
from alexnet_jax.data.dataset import ArrayDataset, Placement
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import UsageError
from alexnet_jax.runs.folder import versions
from alexnet_jax.training.trainer import Trainer

# What takes the place of each part. Muon's costs come on top of those of plain momentum.
PARTS: dict[str, dict[str, Any]] = {
    "Muon's orthogonalization": {"optimizer": "sgd"},
    "crops and flips": {"crop_padding": 0, "flip": False, "flip_schedule": "random"},
    "cutout": {"cutout": 0},
    "colour noise": {"pca": "none"},
    "moving average of the weights": {"average_decay": 0.0},
    "label smoothing": {"label_smoothing": 0.0},
    "dropout": {"dropout_rate": 0.0},
    "LRN": {"lrn": "none"},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time a preset's training step, and the same without each of its parts."""

    preset: str = "cifar10-best"
    """Name of the preset."""
    rounds: PositiveInt = 7
    """Blocks of each step."""
    steps: PositiveInt = 2
    """Steps in a block."""
    out: Path | None = None
    """JSON file for the raw seconds."""


def block(config: TrainConfig, dataset: ArrayDataset) -> Callable[[int], None]:
    """A function that takes some training steps, and waits for them."""
    trainer = Trainer(config, dataset, select_devices(1))
    calls = itertools.chain.from_iterable(
        trainer.calls(epoch, Placement(1, slice(0, 1)), 0, lambda batch: 1) for epoch in itertools.count()
    )

    def take(steps: int) -> None:
        for call in itertools.islice(calls, steps):
            metrics = trainer.call(call)
        jax.block_until_ready(metrics)

    take(2)  # compiles
    return take


def main(args: Sequence[str]) -> None:
    """Parses the flags, measures, prints the table."""
    options = cli.parse(Options, args, "recipe_parts.py")
    if options.preset not in PRESETS:
        raise UsageError(f"--preset {options.preset}: the presets are {', '.join(PRESETS)}")
    whole = replace(PRESETS[options.preset].config, train_on="train")
    dataset = shapes.load(train=10 * whole.schedule.batch_size, validation=0, test=10)
    configs = {"whole step": whole} | {f"without {name}": replace(whole, **change) for name, change in PARTS.items()}
    configs = {name: config for name, config in configs.items() if name == "whole step" or config != whole}
    blocks = {name: block(config, dataset) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(options.rounds):
        for name, take in blocks.items():
            began = time.perf_counter()
            take(options.steps)
            seconds[name].append((time.perf_counter() - began) / options.steps)
    base = np.array(seconds["whole step"])
    rows = [
        (name, f"{1000 * statistics.median(of_part):,.0f}", f"{np.median(1 - np.array(of_part) / base):.1%}")
        for name, of_part in seconds.items()
    ]
    print(markdown([options.preset, "ms a step", "less than the whole step by"], rows))
    if options.out:
        result = {
            "preset": options.preset,
            "batch_size": whole.schedule.batch_size,
            "device": describe_device(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds_a_step": seconds,
        }
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
