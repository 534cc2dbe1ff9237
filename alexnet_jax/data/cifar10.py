"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32 x 32 pixels in 10 classes, and where to find it.

All sources give identical arrays: the published archives, the folders in them, a copy prepared by TensorFlow Datasets
(TFDS), and the download of an archive. None needs TensorFlow.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax.config.types import web_address
from alexnet_jax.data import cifar10_download, cifar10_files
from alexnet_jax.data.cifar10_files import ARCHIVES, BATCHES, CLASS_NAMES, RECORDS_PER_BATCH, WHICH_TO_USE
from alexnet_jax.data.dataset import ArrayDataset, Split
from alexnet_jax.errors import AlexNetError, UsageError, is_one_line, reason, shown
from alexnet_jax.files import expanded

URL_VARIABLE = "ALEXNET_JAX_DATA_URL"

_TFDS_FOLDER = pathlib.Path("cifar10", "3.0.2")  # in TFDS's data_dir
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")


def load(
    data_dir: pathlib.Path | None, *, url: str | None = None, records_per_batch: int = RECORDS_PER_BATCH
) -> ArrayDataset:
    """Loads the splits "train" (40,000 images), "validation" and "test" (10,000 each).

    These are batches 1 to 4, batch 5 and the test batch, as in the original post. Within each, the images are in the
    published order.

    Args:
      data_dir: an archive (`.tar.gz` or `.tar`, under any name) or a folder. The first of these in a folder is read:
        batches in the folder itself (binary ones, then pickles), in `cifar-10-batches-bin`, in `cifar-10-batches-py`;
        TFDS's `cifar10/3.0.2`; `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz`, or either decompressed to `.tar`;
        other archives of CIFAR-10 in alphabetical order; batches one folder deeper, if exactly one folder has them.
        None: the folder `data` in the working directory, then TFDS's default data_dir, then an archive downloaded
        earlier to the user's cache directory; otherwise it is downloaded there.
      url: a published archive to download. None: the address in the environment variable ALEXNET_JAX_DATA_URL, else the
        authors' host.
      records_per_batch: images in each of the six published files.

    Raises:
      AlexNetError: the data is damaged, is not CIFAR-10, or is missing and can't be downloaded.
      UsageError: the environment variable is not an address.
    """
    source = _default_source(url) if data_dir is None else _given_source(pathlib.Path(os.path.abspath(data_dir)))
    batches = source.read(records_per_batch)
    if records_per_batch == RECORDS_PER_BATCH and (fault := _fault(batches)):
        raise AlexNetError(
            f"{source.path}: {fault}: the copy is damaged or is not CIFAR-10; download or extract the published "
            "archive again"
        )
    *train, validation, test = batches
    images, labels = (np.concatenate([getattr(batch, name) for batch in train]) for name in ("images", "labels"))
    return ArrayDataset(
        name="cifar10",
        source=str(source.path),
        class_names=CLASS_NAMES,
        splits={"train": Split(images, labels), "validation": validation, "test": test},
    )


class _Source(NamedTuple):
    path: pathlib.Path
    read: Callable[[int], list[Split]]  # from records per batch to the six batches


def _default_source(url: str | None) -> _Source:
    places = [pathlib.Path(os.path.abspath(place)) for place in (pathlib.Path("data"), *default_tfds_folder())]
    for place in places:
        for source in _sources(place, given=False):
            return source
    archive = cifar10_download.cached()
    return _archive(archive or cifar10_download.download(url or _default_url(), " or ".join(map(str, places))))


def _given_source(place: pathlib.Path) -> _Source:
    """The source that --data-dir names."""
    if not os.path.exists(place):
        raise AlexNetError(f"{place}: no such file or folder; set --data-dir to an existing one")
    if not os.path.isdir(place):
        return _archive(place)
    if not os.access(place, os.R_OK | os.X_OK):
        raise AlexNetError(f"{place}: can't be read; check the permissions of the folder")
    for source in _sources(place, given=True):
        return source
    raise AlexNetError(f"{place}{_what_else(place)}")


def _sources(place: pathlib.Path, given: bool) -> Iterator[_Source]:
    """The sources that a folder contains, in order of preference.

    Args:
      place: an absolute path.
      given: whether the user named it. If not, a TFDS copy that only TensorFlow can read is skipped, and so is an
        archive that has only the name of CIFAR-10.
    """
    if found := cifar10_files.find_batches(place):
        yield _batches(*found)
    if (root := _tfds_root(place)) and (given or any((root / _TFDS_FOLDER).glob("*.array_record*"))):
        yield _Source(root / _TFDS_FOLDER, functools.partial(_read_tfds, root))
    paths = _listed(place)
    names = (*ARCHIVES, *(path.name for path in paths if path.name not in ARCHIVES))
    archives = [
        path
        for path in (place / name for name in names if name.lower().endswith(cifar10_files.ARCHIVE_SUFFIXES))
        if os.path.isfile(path)
    ]
    for path in archives:
        if path.name in ARCHIVES or cifar10_files.holds_cifar10(path):
            yield _archive(path)
    deeper = [found for path in paths if os.path.isdir(path) and (found := cifar10_files.find_batches(path))]
    if len(deeper) > 1:
        folders = shown(", ".join(str(folder.relative_to(place)) for folder, _ in deeper), 300)
        raise AlexNetError(
            f"{place}: several of its folders contain batches of CIFAR-10 ({folders}): give --data-dir one"
        )
    for found in deeper:
        yield _batches(*found)
    if given:  # reading it reports what is wrong
        yield from (_archive(path) for path in archives if "cifar" in path.name.lower())


def _batches(folder: pathlib.Path, layout: cifar10_files.Layout) -> _Source:
    return _Source(folder, functools.partial(cifar10_files.read_folder, folder, layout))


def _archive(path: pathlib.Path) -> _Source:
    return _Source(path, functools.partial(cifar10_files.read_archive, path))


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(path for path in folder.iterdir() if is_one_line(path.name))
    except OSError:
        return []  # one of the default places, which need not exist


def _what_else(place: pathlib.Path) -> str:
    """The end of a message, which says what a folder has instead of CIFAR-10."""
    paths = _listed(place)
    sizes = {path.name: path.stat().st_size if os.path.isfile(path) else 0 for path in paths if os.path.exists(path)}
    if version := cifar10_files.other_version(sizes):
        return f": {version}; {WHICH_TO_USE}"
    similar = [path.name for path in paths if "cifar" in path.name.lower()]
    for name in similar:
        if name.lower().endswith(_UNFINISHED) and os.path.isfile(place / name):
            return f"/{name} is an unfinished download: finish it; {WHICH_TO_USE}"
    names = ", ".join([*(layout.folder for layout in cifar10_files.LAYOUTS), _TFDS_FOLDER.as_posix(), *ARCHIVES[:2]])
    hint = f" (it has {shown(', '.join(similar), 300)}, which is not read: unpack it if it is packed)"
    return (
        f": contains no CIFAR-10, neither data_batch_1 nor one of {names}{hint if similar else ''}; without "
        "--data-dir it is downloaded"
    )


def _default_url() -> str:
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return cifar10_download.URL
    try:
        return web_address(url)
    except ValueError as error:
        raise UsageError(f"{URL_VARIABLE} {shown(url)}: {error}") from None


def default_tfds_folder() -> list[pathlib.Path]:
    """TFDS's default data_dir; nothing for a user without a home directory."""
    chosen = os.environ.get("TFDS_DATA_DIR")
    try:
        return [expanded(chosen or "~/tensorflow_datasets")]
    except UsageError as error:
        if chosen:
            raise UsageError(f"TFDS_DATA_DIR={error}") from error
        return []


def _tfds_root(place: pathlib.Path) -> pathlib.Path | None:
    """TFDS's data_dir, if `place` is one with CIFAR-10 in it, or is CIFAR-10's own folder."""
    for root in (place, *place.parents[:2]):
        folder = root / _TFDS_FOLDER
        if os.path.isdir(folder) and (place == root or folder.is_relative_to(place)):
            return root
    return None


def _read_tfds(root: pathlib.Path, records: int) -> list[Split]:
    try:
        # Imported here, as it takes half a second; array_record is not available on every system.
        from alexnet_jax.data import cifar10_tfds
    except ImportError as error:
        raise AlexNetError(
            f"{root / _TFDS_FOLDER}: a copy of TensorFlow Datasets needs the packages tensorflow-datasets and "
            f"array_record ({reason(error)}): install them, or set --data-dir to another copy: {WHICH_TO_USE}"
        ) from error
    return cifar10_tfds.read(root, records)


def _fault(batches: Sequence[Split]) -> str | None:
    """A sign that these are not the published images: none of those is black, and all classes are equally large.

    The pixels are not compared with the published ones: a copy with lossy compression is still CIFAR-10.
    """
    for (a, first), (b, second) in itertools.combinations(zip(BATCHES, batches, strict=True), 2):
        if np.array_equal(first.labels, second.labels) and np.array_equal(first.images, second.images):
            return f"{b} is a copy of {a}"
    for part, splits in (("the training batches have", batches[:5]), ("the test batch has", batches[5:])):
        if black := sum(np.count_nonzero(~split.images.any(axis=(1, 2, 3))) for split in splits):
            return f"{part} {black:,} image(s) with all pixels 0"
        labels = np.concatenate([split.labels for split in splits])
        expected = len(labels) // len(CLASS_NAMES)
        for name, count in zip(CLASS_NAMES, np.bincount(labels, minlength=len(CLASS_NAMES)), strict=True):
            if count != expected:
                return f"{part} {count:,} images of class {name} instead of {expected:,}"
    return None
