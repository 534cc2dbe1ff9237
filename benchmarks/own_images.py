"""Writes the images of the example in docs/your-own-images.md: `python benchmarks/own_images.py --data-dir DIR`."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image

from alexnet_jax.config import cli
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data import cifar10
from alexnet_jax.errors import AlexNetError


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the first training images of some classes of CIFAR-10 as PNG files, a folder for each class."""

    data_dir: Path | None = None
    """Folder with CIFAR-10, as for train.py."""
    out: Path = pathlib.Path("pictures")
    """Folder to write, which must not exist."""
    classes: tuple[str, ...] = ("cat", "dog", "ship")
    """Names of the classes."""
    count: PositiveInt = 300
    """Images of each class."""


def main(args: Sequence[str]) -> None:
    """Parses the flags, writes the files."""
    options = cli.parse(Options, args, "own_images.py")
    dataset = cifar10.load(options.data_dir)
    if options.out.exists():
        raise AlexNetError(f"{options.out} exists already: remove it, or give --out another folder")
    for name in options.classes:
        if name not in dataset.class_names:
            raise AlexNetError(f"--classes {name}: the classes are {', '.join(dataset.class_names)}")
    for name in options.classes:
        folder = options.out / name
        folder.mkdir(parents=True)
        labels = dataset["train"].labels
        for index in np.flatnonzero(labels == dataset.class_names.index(name))[: options.count]:
            PIL.Image.fromarray(dataset["train"].images[index]).save(folder / f"{index:05d}.png")


if __name__ == "__main__":
    cli.run(main)
