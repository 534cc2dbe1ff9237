"""Prepares images for training: `python -m alexnet_jax.data.prepare imagenet|folder --source DIR --out DIR`.

Every image becomes a square of 256x256 pixels (paper, section 2) in array_record shards. The exact mean image and PCA
basis of the training images are computed at the same time. A preparation that was killed can be resumed.

    OUT/train-00000-of-01282.array_record ..    records of `records.encode_record`
    OUT/statistics.npz                          mean image and PCA basis of the training images
    OUT/skipped.jsonl                           files that are not images, with the reason
    OUT/dataset.json                            description; written last, so it exists only if everything is complete
    OUT/.work/                                  results of finished shards; removed at the end
    OUT/prepare.lock                            locked while a process is writing
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tqdm

from alexnet_jax.config import cli
from alexnet_jax.config.types import Fraction, ImageSize, Path, PositiveInt
from alexnet_jax.data.shards import Shard, write_shard
from alexnet_jax.data.sources import Example, Source, find
from alexnet_jax.data.statistics import PcaBasis, Statistics
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, reason, shown, warn
from alexnet_jax.files import locked, to_bytes, write_atomically
from alexnet_jax.runtime import available_cores, require_array_record
from alexnet_jax.signals import StopSignals

RECORDS_PER_SHARD = 1000
NAMED = 3  # files left out of a folder that warnings name


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepare ImageNet for training: scale its images once, and compute their mean image and PCA basis.

    (For a folder of your own images: python -m alexnet_jax.data.prepare folder --help.)

    --source is a folder with one of: class folders in train/ and val/ (val/ may also be flat); Tiny ImageNet's files;
    the official tar files; TFDS's imagenet2012, prepared as array_record. The same command resumes a preparation that
    was stopped.
    """

    source: Path
    """Folder that contains ImageNet."""
    out: Path
    """Folder to write to: a new one, or one with a preparation that was stopped."""
    labels: Path | None = None
    """Labels of validation images that are not in class folders, and names of classes: the devkit
    (ILSVRC2012_devkit_t12, folder or .tar.gz), Kaggle's LOC_val_solution.csv, or a folder with one.
    Unset: --source."""
    workers: PositiveInt | None = None
    """Number of processes; does not change the result. Unset: the number of cores."""
    size: PositiveInt = 256
    """Side of the squares in pixels."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """`jpeg`: with quality 95. `raw`: the pixels, about 5 times the size and a quarter of the time to read."""


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """Prepare a folder of your own images, with a folder for each class, as train.py folder reads it."""

    source: Path
    """Folder with a folder of images for each class, or with train/ and val/ or test/ that have them."""
    out: Path
    """Folder to write to: a new one, or one with a preparation that was stopped."""
    validation_share: Fraction = 0.2
    """Share of the images held out for validation where there are no folders for validation and testing."""
    workers: PositiveInt | None = None
    """Number of processes; does not change the result. Unset: the number of cores."""
    size: ImageSize = 256
    """Side of the squares in pixels."""
    scaling: Literal["square", "torchvision", "caffe"] = "square"
    """How an image becomes square, as for train.py."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """`jpeg`: with quality 95. `raw`: the pixels, about 5 times the size and a quarter of the time to read."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
      out: the folder.
      size: side of the squares in pixels.
      store: "jpeg" or "raw".
      workers: number of processes; None: the number of cores.
      name: of the data set, "imagenet" or "folder".
      scaling: a key of `decode.SCALINGS`.
      as_seen: whether images are turned and made opaque as viewers show them; ImageNet's are not.
      validation_share: of the images that were held out; None: the source had images for validation or testing.
    """

    out: pathlib.Path
    size: int
    store: str
    workers: int | None = None
    name: str = "imagenet"
    scaling: str = "square"
    as_seen: bool = False
    validation_share: float | None = None


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepares ImageNet; returns the contents of dataset.json.

    Raises:
      UsageError: `out` contains something else, or a preparation with other settings.
      AlexNetError: the source can't be used, `out` can't be written, or array_record is not installed.
    """
    require_array_record()
    return write(find(config.source, config.labels), Output(config.out, config.size, config.store, config.workers))


def prepare_folder(config: FolderConfig) -> dict[str, Any]:
    """The same for a folder of the user's own images.

    Raises:
      UsageError: as `prepare`, or nothing would be held out.
      AlexNetError: as `prepare`, or the folder does not have the classes that `image_folder.load` asks for.
    """
    require_array_record()
    from alexnet_jax.data import image_folder

    listing = image_folder.find(config.source, config.validation_share)
    own = image_folder.settings(listing, config.scaling)
    output = Output(config.out, config.size, config.store, config.workers, **own)
    return write(image_folder.as_source(listing), output)


def write(source: Source, output: Output) -> dict[str, Any]:
    """Writes the images of a source; returns the contents of dataset.json.

    Raises:
      UsageError: the folder contains something else, or a preparation with other settings.
      AlexNetError: it can't be written.
    """
    out, lock = output.out, output.out / "prepare.lock"
    for note in source.notes:
        print(note)
    if "validation" not in source.splits:
        print("no validation images were found")
    try:
        if out.exists() and any(out.iterdir()) and not lock.exists():
            raise UsageError(f"--out {out} is not empty: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with locked(lock, "is preparing images there; wait for it, or choose another --out"):
            _begin(source, output)
            shards = plan_shards(source, output)
            write_missing([shard for split in shards.values() for shard in split], output.workers)
            return _finish(source, shards, output)
    except (OSError, ValueError) as error:
        raise AlexNetError(f"{out}: the preparation can't continue ({reason(error)})") from error


def _begin(source: Source, output: Output) -> None:
    """Writes .work/plan.json, or compares it with that of the preparation to resume."""
    digest = hashlib.sha256(repr(source.wnids).encode())
    for split, examples in source.splits.items():
        digest.update(split.encode())
        for example in examples:
            digest.update(repr(example).encode())
    settings = {name: getattr(output, name) for name in ("size", "store", "name", "scaling")}
    plan = settings | {"images": digest.hexdigest()}
    path = output.out / ".work" / "plan.json"
    if (output.out / "dataset.json").exists():
        raise UsageError(f"--out {output.out} is already prepared: choose another folder")
    if path.exists() and json.loads(path.read_bytes()) != plan:
        raise UsageError(
            f"--out {output.out} contains a stopped preparation with other settings or images: delete it, or choose "
            "another folder"
        )
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, to_bytes(plan))


def plan_shards(source: Source, output: Output) -> dict[str, list[Shard]]:
    """Divides each split into shards of `RECORDS_PER_SHARD` examples."""
    shards: dict[str, list[Shard]] = {}
    for split, examples in source.splits.items():
        parts = [examples[i : i + RECORDS_PER_SHARD] for i in range(0, len(examples), RECORDS_PER_SHARD)]
        shards[split] = [
            Shard(
                output.out / f"{split}-{number:05d}-of-{len(parts):05d}.array_record",
                part,
                output.size,
                output.store,
                output.scaling,
                output.as_seen,
            )
            for number, part in enumerate(parts)
        ]
    return shards


def write_missing(shards: Sequence[Shard], workers: int | None = None) -> None:
    """Writes the shards that are not finished, in several processes, with a progress bar.

    Raises:
      StoppedError: a signal came; the shards that had been started are finished.
      AlexNetError: a process was killed.
    """
    missing = [shard for shard in shards if not shard.is_finished()]
    total, left = (sum(len(shard.examples) for shard in group) for group in (shards, missing))
    processes = min(workers or available_cores(), max(len(missing), 1))
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin_worker)
    bar = tqdm.tqdm(total=total, initial=total - left, unit=" images", disable=None, smoothing=0.05)
    with StopSignals() as signals, bar, pool:
        running = {pool.submit(write_shard, shard): shard for shard in missing}
        try:
            while signals.received is None and running:
                finished, _ = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    future.result()  # raises the worker's error
                    bar.update(len(running.pop(future).examples))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise AlexNetError(
                "a worker process was killed, perhaps for lack of memory: the same command resumes; use fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    if signals.received is not None:
        raise StoppedError(signals.received, "stopped; the same command resumes")


def begin_worker() -> None:
    """Leaves a terminal's signals to the parent process, and ends this process when the parent ends for any reason."""
    for name in ("SIGINT", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(source: Source, shards: Mapping[str, Sequence[Shard]], output: Output) -> dict[str, Any]:
    """Writes the files that describe the data set, dataset.json last, and prints a summary."""
    results = {split: [shard.result() for shard in group] for split, group in shards.items()}
    counts = {split: sum(result.records for result in group) for split, group in results.items()}
    pairs = [(split, pair) for split, group in results.items() for result in group for pair in result.skipped]
    pairs += [(split, pair) for split, group in source.skipped.items() for pair in group]
    skipped = [{"split": split, "file": file, "reason": reason} for split, (file, reason) in pairs]
    for split, count in counts.items():
        if not count:
            raise AlexNetError(f"{source.kind}: none of the files of its split {split} is an image")
    if output.name == "folder":
        left_out = {entry["file"] for entry in skipped if entry["split"] == "train"}
        examples = [example for example in source.splits["train"] if isinstance(example, Example)]
        kept = {example.label for example in examples if example.name not in left_out}
        if missing := [name for label, name in enumerate(source.wnids) if label not in kept]:
            raise AlexNetError(
                f"{source.kind}: class {shown(missing[0])} has no image to train on: add some or remove it"
            )
    statistics = _measure(shards["train"], counts["train"])
    files = {
        split: [
            {"name": shard.path.name, "records": result.records, "bytes": result.bytes, "sha256": result.sha256}
            for shard, result in zip(shards[split], group, strict=True)
        ]
        for split, group in results.items()
    }
    hashes = "".join(result.sha256 for group in results.values() for result in group)
    description = {
        "name": output.name,
        "source": source.kind,
        "size": output.size,
        "store": output.store,
        "scaling": output.scaling,
        "validation_share": output.validation_share,
        "classes": [f"{source.words[w]} ({w})" if w in source.words else w for w in source.wnids],
        "counts": counts,
        "skipped": len(skipped),
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
        "shards": files,
    }
    out = output.out
    write_atomically(out / "statistics.npz", statistics.to_bytes())
    lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
    write_atomically(out / "skipped.jsonl", lines.encode())
    write_atomically(out / "dataset.json", to_bytes(description))
    shutil.rmtree(out / ".work")
    _print_summary(out, counts, statistics.basis, skipped, output.name)
    return description


def _measure(shards: Sequence[Shard], count: int) -> Statistics:
    """Mean image and PCA basis of the `count` images in shards."""
    total, products = shards[0].sums()
    for shard in shards[1:]:  # one at a time: all of ImageNet's sums take 2 GB
        shard_total, shard_products = shard.sums()
        total += shard_total
        products += shard_products
    return Statistics.from_sums(count, total, products)


def _print_summary(
    out: pathlib.Path, counts: Mapping[str, int], basis: PcaBasis, skipped: Sequence[Mapping[str, str]], name: str
) -> None:
    end = "" if counts.get("validation") else "; no validation images"
    print(f"{out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()) + f" images{end}")
    colour, deviations = (", ".join(f"{v:.2f}" for v in values) for values in (basis.mean, np.sqrt(basis.eigenvalues)))
    print(f"mean colour {colour}; PCA standard deviations {deviations} grey levels")
    for entry in skipped[:NAMED] if name == "folder" else ():
        warn(f"{entry['file']}: left out: {entry['reason']}")
    if skipped:
        print(f"skipped {len(skipped):,} files; the reasons are in {out / 'skipped.jsonl'}")


def main(args: Sequence[str]) -> None:
    """Parses the flags and prepares a data set."""
    command = "python -m alexnet_jax.data.prepare"
    if args and args[0] in ("-h", "--help", "--help-all"):
        args = ["imagenet", args[0]]
    match args:
        case ["imagenet", *flags]:
            prepare(cli.parse(PrepareConfig, flags, f"{command} imagenet"))
        case ["folder", *flags]:
            prepare_folder(cli.parse(FolderConfig, flags, f"{command} folder"))
        case _:
            raise UsageError(f"the name of the data set is missing: {command} imagenet, or {command} folder")


if __name__ == "__main__":
    # Not from __main__: worker processes import what they are sent from the module under its own name.
    from alexnet_jax.data import prepare as module

    cli.run(module.main)
