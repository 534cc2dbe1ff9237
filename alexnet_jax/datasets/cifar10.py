"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32 x 32 pixels in 10 classes, from wherever they are.

One face over three sources that give identical arrays: a folder as the authors publish it, a copy prepared by
TensorFlow Datasets (TFDS), or a download that TFDS checks and prepares. Nothing here needs TensorFlow.
"""

import os
import pathlib
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request

from alexnet_jax.config import expanded
from alexnet_jax.datasets import cifar10_batches
from alexnet_jax.datasets.cifar10_batches import BINARY_FOLDER, CLASS_NAMES, PICKLE_FOLDER, RECORDS_PER_BATCH, URL
from alexnet_jax.datasets.dataset import Dataset, Split
from alexnet_jax.errors import AlexNetError, UsageError

_PREPARED = ("cifar10", "3.0.2")  # where TFDS keeps it under its data_dir
_PROBE_SECONDS = 8.0


def load(data_dir: pathlib.Path | None, *, url: str = URL, records_per_batch: int = RECORDS_PER_BATCH) -> Dataset:
    """Loads batches 1 to 4 as "train" (40,000), batch 5 as "validation" and the test batch as "test" (10,000 each).

    The split is the seed's; within each, the images have the published order.

    Args:
      data_dir: a folder that is or directly holds `cifar-10-batches-bin` or `cifar-10-batches-py`, else TFDS's data_dir
        (or the `cifar10/3.0.2` in it). If it holds none of them, the data set is downloaded and prepared in it.
        None: `data` in the working directory, then TFDS's default data_dir, where a download goes (for a user without a
        home directory: to `data`).
      url: the archive to download; TFDS must have its checksum registered.
      records_per_batch: images in each of the six published files.

    Raises:
      AlexNetError: the data is broken, or isn't there and can't be downloaded.
    """
    if data_dir is None:
        places = [pathlib.Path("data"), *_default_tfds_dir()]
    elif not os.path.isdir(data_dir):
        raise AlexNetError(f"{data_dir}: there is no such folder; give --data-dir an existing one")
    elif not os.access(data_dir, os.R_OK | os.X_OK):
        raise AlexNetError(f"{data_dir}: can't be read; check the rights of the folder")
    else:
        places = [data_dir]
    places = [pathlib.Path(os.path.abspath(place)) for place in places]  # whose last part is a name, not a dot

    for place in places:
        if folder := cifar10_batches.find(place):
            return _dataset(str(folder), *cifar10_batches.read(folder, records_per_batch))
        if root := _find_prepared(place):
            return _read_prepared(root, records_per_batch)

    _require_reachable(url, places)
    # Imported where it is needed, as it takes half a second.
    from alexnet_jax.datasets import cifar10_tfds

    cifar10_tfds.prepare(places[-1], url=url, records_per_batch=records_per_batch)
    return _read_prepared(places[-1], records_per_batch)


def _dataset(source: str, train: Split, test: Split) -> Dataset:
    validation = len(train) - len(test)  # where the fifth batch begins
    return Dataset(
        name="cifar10",
        source=source,
        class_names=CLASS_NAMES,
        splits={
            "train": Split(train.images[:validation], train.labels[:validation]),
            "validation": Split(train.images[validation:], train.labels[validation:]),
            "test": test,
        },
    )


def _default_tfds_dir() -> list[pathlib.Path]:
    """TFDS's default data_dir; none for a user without a home directory."""
    chosen = os.environ.get("TFDS_DATA_DIR")
    try:
        return [expanded(chosen or "~/tensorflow_datasets")]
    except UsageError as error:
        if chosen:
            raise UsageError(f"TFDS_DATA_DIR={error}") from error
        return []


def _find_prepared(place: pathlib.Path) -> pathlib.Path | None:
    """TFDS's data_dir, if `place` is one with the data set in it, or is the data set's own folder."""
    if os.path.isdir(place.joinpath(*_PREPARED)):
        return place
    return place.parents[1] if place.parts[-2:] == _PREPARED else None


def _read_prepared(root: pathlib.Path, records_per_batch: int) -> Dataset:
    from alexnet_jax.datasets import cifar10_tfds

    return _dataset(str(root.joinpath(*_PREPARED)), *cifar10_tfds.read(root, records_per_batch))


def _require_reachable(url: str, places: list[pathlib.Path]) -> None:
    """Asks for the archive's headers: with no network, TFDS would try for minutes.

    Raises:
      AlexNetError: no good answer within `_PROBE_SECONDS`.
    """
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()  # it is an open response too
            answers.put(str(error))
        except Exception as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            answers.put(str(reason) or type(error).__name__)
        else:
            answers.put("")

    # The timeout of a socket doesn't cover looking up the name, which can hang; a daemon thread can be left to that.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=_PROBE_SECONDS)
    except queue.Empty:
        failure = f"no answer in {_PROBE_SECONDS:g} s"
    if failure:
        looked, host = " or ".join(map(str, places)), urllib.parse.urlsplit(url).netloc
        raise AlexNetError(
            f"CIFAR-10 is not at {looked}, and {host} can't be reached ({failure}): "
            f"give --data-dir DIR with a folder that holds {PICKLE_FOLDER} or {BINARY_FOLDER}, "
            "or use the preset quickstart, which needs no data"
        )
