"""Images of the user's own, classified."""

import collections
import itertools
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from alexnet_jax import plots, runtime, terminal
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import decode, image_files
from alexnet_jax.distributed.devices import replicate, select_devices
from alexnet_jax.errors import AlexNetError, shown, warn
from alexnet_jax.files import read_bytes, to_bytes, write_together
from alexnet_jax.inspection.evaluate import _check_views, _results_folder
from alexnet_jax.inspection.run import open_run
from alexnet_jax.runs.folder import versions
from alexnet_jax.runs.log import Record
from alexnet_jax.training import predict
from alexnet_jax.training.predict import softmax

MOST_PICTURES_DRAWN = 60  # on the sheet; beyond, it is no longer looked at
MOST_NAMED = 3  # files that are skipped for the same reason
TOP = 5  # classes told of a picture


def predict_pictures(config: EvalConfig) -> list[dict[str, Any]]:
    """Classifies a person's pictures, prints the top 5 of each, writes `eval/images.json` and `.png`.

    Each is turned as its EXIF note says, laid on white where it is transparent, cut to its central square and scaled
    to the size of the run's images.

    Returns:
      One row a picture, as in the file.

    Raises:
      AlexNetError: pictures can't be read: after all others were done, and each was named.
    """
    runtime.cache_compilations(config.compilation_cache)
    devices = select_devices(config.num_devices)
    run = open_run(config.run, config.checkpoint)
    _check_views(run, config)
    folder = _results_folder(run, config)
    predict_step = predict.make_predict_step(run.model, run.preprocessing, devices, config.views)
    params = replicate(run.params, devices)
    paths, broken = _find_pictures(config.images or ())
    batch_size = min(config.batch_size, max(len(paths), 1))
    read = _read_pictures(paths, run.dataset.image_shape[0], broken)
    rows: list[dict[str, Any]] = []
    drawn: list[np.ndarray] = []
    with tqdm.tqdm(total=len(paths), unit=" pictures", leave=False, disable=None) as bar:
        while part := list(itertools.islice(read, batch_size)):
            images = np.stack([pixels for _, pixels in part])
            logits = predict.predict_logits(predict_step, params, images, batch_size, len(devices))
            for (path, pixels), probabilities in zip(part, softmax(logits), strict=True):
                best = np.argsort(-probabilities, kind="stable")[:TOP]
                top = [{"class": run.class_names[i], "probability": float(probabilities[i])} for i in best]
                rows.append({"file": str(path), "top": top})
                if len(drawn) < MOST_PICTURES_DRAWN:
                    drawn.append(pixels)
                bar.clear()
                print_prediction(rows[-1])
            bar.update(len(part))
    if rows and folder is not None:
        described = {"step": run.step, "views": config.views, "versions": versions(), "images": rows}
        names = [shown(pathlib.Path(row["file"]).name) for row in rows[: len(drawn)]]
        tops = [[(entry["class"], entry["probability"]) for entry in row["top"]] for row in rows[: len(drawn)]]
        sheet = plots.to_png(plots.predictions(np.stack(drawn), names, tops))
        write_together(folder, {"images.png": sheet, "images.json": to_bytes(described)})
        left = f" (the first {len(drawn)} of {len(rows):,})" if len(rows) > len(drawn) else ""
        print(f"sheet of pictures{left} in {folder / 'images.png'}, all predictions in {folder / 'images.json'}")
    if broken:
        of = f"{len(broken)} of {len(rows) + len(broken):,}"
        raise AlexNetError(f"{of} could not be read as a picture; the first is {shown(str(broken[0]), 300)}")
    return rows


def _find_pictures(paths: Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Files named, and in folders those that look like pictures, in order; and what can't be read, which is reported.

    Other files in the folders are counted; what systems leave there (`image_files.is_system_file`) is ignored.
    """
    found: list[pathlib.Path] = []
    broken: list[pathlib.Path] = []
    others: list[pathlib.Path] = []

    def unreadable(error: OSError) -> None:
        path = pathlib.Path(error.filename)
        warn(f"skipped {shown(str(path), 300)}: {error.strerror or error}")
        broken.append(path)

    for path in paths:
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                found.append(path)
                continue
        except OSError as error:
            unreadable(error)
            continue
        before = len(found) + len(broken)
        for file in image_files.files_in(path, unreadable):
            (found if image_files.looks_like_image(file) else others).append(file)
        if len(found) + len(broken) == before:
            unreadable(OSError(None, "there is no picture in this folder", str(path)))
    if others:
        names = ", ".join(shown(path.name) for path in others[:MOST_NAMED]) + ", ..." * (len(others) > MOST_NAMED)
        are = "other file is no picture" if len(others) == 1 else "other files are no pictures"
        warn(f"{len(others):,} {are} ({names})")
    return found, broken


def _read_pictures(
    paths: Sequence[pathlib.Path], size: int, broken: list[pathlib.Path]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Each picture as uint8 [size, size, 3]; reports those that can't be read, and adds them to `broken`."""
    reasons: collections.Counter[str] = collections.Counter()
    for path in paths:
        try:
            picture = decode.decode(read_bytes(path, decode.MAX_BYTES), as_seen=True)
        except (decode.ImageError, OSError) as error:
            reason = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
            reasons[reason] += 1
            if reasons[reason] <= MOST_NAMED:  # a phone's folder may hold hundreds of one kind
                warn(f"skipped {shown(str(path), 300)}: {reason}")
            broken.append(path)
            continue
        yield path, decode.central_square(picture, size)
    for reason, count in reasons.items():
        if count > MOST_NAMED:
            warn(f"skipped {count - MOST_NAMED:,} more: {reason}")


def print_prediction(row: Record) -> None:
    """Prints the most probable classes of a picture for a person."""
    width = max(len(entry["class"]) for entry in row["top"])
    print(shown(row["file"], 300))
    for entry in row["top"]:
        print(f"  {entry['class']:>{width}}  {entry['probability']:6.1%}  {terminal.bar(entry['probability'])}")
