"""The example of docs/your-own-images.md: what beginning with trained weights is worth.

    python benchmarks/own_images.py --weights cifar10-best --data-dir DIR

writes two sets of 600 images, a folder for each class, and trains on each in three ways, with several seeds:

    photographs   cats and ships of CIFAR-10's test images, which the weights have not seen, of classes that they know
    textures      drawn by this script: stripes, checks, dots and waves, which are new to the weights.

Finished runs are lines of results/own-images-cpu.jsonl. The same command does those that are missing.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from ablation_report import estimate
from run import describe_device

from alexnet_jax.config import cli
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data import cifar10
from alexnet_jax.errors import AlexNetError
from alexnet_jax.exchange.pretrained import absolute_unless_shipped
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = 600  # of a set
WAYS = {
    "from scratch": (),
    "--init-from": ("--learning-rate", "0.003", "--epochs", "15"),
    "--init-from --freeze all-but-head": (
        *("--freeze", "all-but-head", "--crop-padding", "0", "--no-flip", "--dropout-rate", "0"),
        *("--learning-rate", "0.003", "--epochs", "15"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Train on two sets of 600 images, from scratch and beginning with the weights of a run."""

    weights: Path
    """Folder of a run of cifar10-best."""
    data_dir: Path | None = None
    """Folder with CIFAR-10, as for train.py."""
    work: Path = pathlib.Path("own-images")
    """Folder for the images and the runs."""
    out: Path = ROOT / "results" / "own-images-cpu.jsonl"
    """File of finished runs."""
    seeds: PositiveInt = 3
    """Runs in each way: seeds 0, 1, ..."""


def write_photographs(folder: pathlib.Path, data_dir: pathlib.Path | None) -> None:
    """Writes the first test images of two classes of CIFAR-10 as PNG files."""
    dataset = cifar10.load(data_dir)
    for name in ("cat", "ship"):
        (folder / name).mkdir(parents=True)
        label = dataset.class_names.index(name)
        for index in np.flatnonzero(dataset["test"].labels == label)[: IMAGES // 2]:
            PIL.Image.fromarray(dataset["test"].images[index]).save(folder / name / f"{index:05d}.png")


def write_textures(folder: pathlib.Path) -> None:
    """Draws textures of 32x32 pixels: of random size, direction and colours, with noise."""
    rng = np.random.default_rng(0)
    kinds: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "stripes": lambda u, v: np.sin(u),
        "checks": lambda u, v: np.sin(u) * np.sin(v),
        "dots": lambda u, v: np.cos(u) + np.cos(v) - 1,
        "waves": lambda u, v: np.sin(u + 1.5 * np.sin(v / 2)),
    }
    rows, columns = np.mgrid[0:32, 0:32]
    for name, function in kinds.items():
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES // len(kinds)):
            angle, length = rng.uniform(0, np.pi), rng.uniform(4, 10)
            u, v = (
                2 * np.pi / length * (columns * np.cos(a) + rows * np.sin(a)) + rng.uniform(0, 2 * np.pi)
                for a in (angle, angle + np.pi / 2)
            )
            share = 1 / (1 + np.exp(-4 * function(u, v)))[..., None]
            colours = rng.uniform(0, 255, (2, 3))
            pixels = share * colours[0] + (1 - share) * colours[1] + rng.normal(0, 40, (32, 32, 3))
            PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:03d}.png")


def train(options: Options, images: str, way: str, seed: int) -> dict[str, object]:
    """Trains once; returns the line for the results."""
    workdir = options.work / "runs" / f"{images} {way} {seed}".replace(" ", "-")
    flags = [*WAYS[way], "--seed", str(seed)]
    if way != "from scratch":
        flags += ["--init-from", str(absolute_unless_shipped(options.weights))]
    command = ["train.py", "folder", "--data-dir", str((options.work / images).absolute()), *flags]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command, "--workdir", str(workdir.absolute())], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise AlexNetError((done.stderr.strip().splitlines() or ["train.py failed"])[-1])
    seconds = time.monotonic() - began
    *_, last = (record for record in read_jsonl(workdir / "metrics.jsonl") if record["split"] == "validation")
    return {
        "images": images,
        "way": way,
        "seed": seed,
        "command": f"python train.py folder --data-dir {images} {' '.join([*WAYS[way], '--seed', str(seed)])}",
        "accuracy": last["accuracy"],
        "held_out": last["count"],
        "seconds": seconds,
        "device": describe_device(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Mean accuracy on the held-out images with its 95% interval over the seeds, and mean time of the whole command."""
    lines = ["| images | | accuracy, mean of seeds | seconds |", "| --- | --- | --- | --- |"]
    for images, way in itertools.product(("photographs", "textures"), WAYS):
        of_way = [row for row in rows if (row["images"], row["way"]) == (images, way)]
        if not of_way:
            continue
        accuracies = [100 * float(str(row["accuracy"])) for row in of_way]
        found = estimate(accuracies)
        text = f"{found.mean:.1f}%" + (f" ± {found.half:.1f}" if found.half is not None else "")
        seconds = statistics.mean(float(str(row["seconds"])) for row in of_way)
        lines.append(f"| {images} | {way} | {text} | {seconds:.0f} |")
    return "\n".join(lines)


def main(args: Sequence[str]) -> None:
    """Parses the flags, writes the images, does the missing runs, prints the table."""
    options = cli.parse(Options, args, "own_images.py")
    if not (options.work / "photographs").exists():
        write_photographs(options.work / "photographs", options.data_dir)
    if not (options.work / "textures").exists():
        write_textures(options.work / "textures")
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    finished = {(row["images"], row["way"], row["seed"]) for row in rows}
    for seed, images, way in itertools.product(range(options.seeds), ("photographs", "textures"), WAYS):
        if (images, way, seed) not in finished:
            rows.append(train(options, images, way, seed))
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    cli.run(main)
