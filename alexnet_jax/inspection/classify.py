"""Classification of the user's own image files."""

import collections
import itertools
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from alexnet_jax import plots, runtime, terminal
from alexnet_jax.config.checks import check_views
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import decode, image_files
from alexnet_jax.distributed.devices import replicate, select_devices
from alexnet_jax.errors import AlexNetError, reason, shown, warn
from alexnet_jax.files import read_bytes, to_bytes, write_together
from alexnet_jax.inspection.run import open_run
from alexnet_jax.inspection.task import results_folder
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import Record
from alexnet_jax.training.predict import make_predict_step, predict_logits, softmax

MOST_DRAWN = 60  # images on the sheet; with more, it would be too large to look at
MOST_NAMED = 3  # files skipped for the same reason that are named
TOP = 5  # classes reported for an image


def classify_images(config: EvalConfig) -> list[dict[str, Any]]:
    """Classifies image files, prints the top 5 of each, writes `eval/images.json` and `.png`.

    Each image is rotated according to its EXIF orientation, drawn on white where it is transparent, and scaled to the
    size of the run's images as those were (--scaling).

    Returns:
      One row for each image, as in the file.

    Raises:
      AlexNetError: some files can't be read; raised after these have been named and all others classified.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    run = open_run(config.run, config.checkpoint)
    check_views(config.views, run.config.augmentation, config.run)
    folder = results_folder(run, config)
    predict_step = make_predict_step(run.model, run.preprocessing, devices, config.views)
    params = replicate(run.params, devices)
    paths, broken = find_images(config.images or ())
    batch_size = min(config.batch_size, max(len(paths), 1))
    images = read_images(paths, run.dataset.image_shape[0], broken, run.config.data.scaling)
    rows: list[dict[str, Any]] = []
    drawn: list[np.ndarray] = []
    with tqdm.tqdm(total=len(paths), unit=" images", leave=False, disable=None) as bar:
        while batch := list(itertools.islice(images, batch_size)):
            pixels = np.stack([image for _, image in batch])
            logits = predict_logits(predict_step, params, pixels, batch_size, len(devices))
            drawn += list(pixels[: MOST_DRAWN - len(drawn)])
            for (path, _), probabilities in zip(batch, softmax(logits), strict=True):
                best = np.argsort(-probabilities, kind="stable")[:TOP]
                top = [{"class": run.class_names[i], "probability": float(probabilities[i])} for i in best]
                rows.append({"file": str(path), "top": top})
                bar.clear()
                print_prediction(rows[-1])
            bar.update(len(batch))
    if rows and folder is not None:
        described = {"step": run.step, "views": config.views, "versions": versions(), "images": rows}
        write_together(folder, {"images.png": _sheet(rows, drawn), "images.json": to_bytes(described)})
        of = f" (the first {len(drawn)} of {len(rows):,} images)" if len(rows) > len(drawn) else ""
        print(f"sheet{of} in {folder / 'images.png'}, all predictions in {folder / 'images.json'}")
    refuse_broken(broken, len(rows))
    return rows


def refuse_broken(broken: Sequence[pathlib.Path], read: int) -> None:
    """Raises AlexNetError if there are files that could not be read, beside `read` others."""
    if broken:
        count = f"{len(broken)} of {read + len(broken):,}"
        raise AlexNetError(f"{count} could not be read as an image; the first is {shown(str(broken[0]), 300)}")


def find_images(paths: Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The files among `paths`, and those in folders that look like images, in order; and the paths that can't be read.

    A warning names each of the latter and counts the folders' other files. System files are ignored.
    """
    found: list[pathlib.Path] = []
    broken: list[pathlib.Path] = []
    others: list[pathlib.Path] = []

    def skip(error: OSError) -> None:
        path = pathlib.Path(error.filename)
        warn(f"skipped {shown(str(path), 300)}: {reason(error)}")
        broken.append(path)

    for path in paths:
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                found.append(path)
                continue
        except OSError as error:
            skip(error)
            continue
        before = len(found) + len(broken)
        for file in image_files.files_in(path, skip):
            (found if image_files.looks_like_image(file) else others).append(file)
        if len(found) + len(broken) == before:
            skip(OSError(None, "there is no image in this folder", str(path)))
    if others:
        names = ", ".join(shown(path.name) for path in others[:MOST_NAMED]) + ", ..." * (len(others) > MOST_NAMED)
        are = "other file is not an image" if len(others) == 1 else "other files are not images"
        warn(f"{len(others):,} {are} ({names})")
    return found, broken


def read_images(
    paths: Sequence[pathlib.Path], size: int, broken: list[pathlib.Path], scaling: str = "square"
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Each file's image as uint8 [size, size, 3]; those that can't be read are reported and appended to `broken`.

    `scaling` is a key of `decode.SCALINGS`.
    """
    reasons: collections.Counter[str] = collections.Counter()
    to_square = decode.SCALINGS[scaling]
    for path in paths:
        try:
            pixels = to_square(decode.decode(read_bytes(path, decode.MAX_BYTES), as_seen=True), size)
        except (decode.ImageError, OSError) as error:
            why = reason(error)
            reasons[why] += 1
            if reasons[why] <= MOST_NAMED:  # a phone's folder may contain hundreds of one kind
                warn(f"skipped {shown(str(path), 300)}: {why}")
            broken.append(path)
            continue
        yield path, pixels
    for why, count in reasons.items():
        if count > MOST_NAMED:
            warn(f"skipped {count - MOST_NAMED:,} more: {why}")


def _sheet(rows: Sequence[Record], drawn: Sequence[np.ndarray]) -> bytes:
    """A PNG of the first images and their predictions."""
    names = [shown(pathlib.Path(row["file"]).name) for row in rows[: len(drawn)]]
    tops = [[(entry["class"], entry["probability"]) for entry in row["top"]] for row in rows[: len(drawn)]]
    return plots.to_png(plots.predictions(np.stack(drawn), names, tops))


def print_prediction(row: Record) -> None:
    """Prints the most probable classes of an image."""
    width = max(len(entry["class"]) for entry in row["top"])
    print(shown(row["file"], 300))
    for entry in row["top"]:
        print(f"  {entry['class']:>{width}}  {entry['probability']:6.1%}  {terminal.bar(entry['probability'])}")
