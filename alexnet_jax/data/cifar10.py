"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32 x 32 pixels in 10 classes, from wherever they are.

One face over sources that give identical arrays: the published archives, the folders in them, a copy prepared by
TensorFlow Datasets (TFDS), and a download of an archive. Nothing here needs TensorFlow.
"""

import itertools
import os
import pathlib

import numpy as np

from alexnet_jax.config.types import web_address
from alexnet_jax.data import cifar10_archive, cifar10_batches, cifar10_download
from alexnet_jax.data.cifar10_batches import BATCHES, CLASS_NAMES, LAYOUTS, RECORDS_PER_BATCH, WHICH_TO_TAKE
from alexnet_jax.data.dataset import ArrayDataset, Split
from alexnet_jax.errors import AlexNetError, UsageError, is_one_line, shown
from alexnet_jax.files import expanded

URL_VARIABLE = "ALEXNET_JAX_DATA_URL"

_PREPARED = ("cifar10", "3.0.2")  # where TFDS keeps it under its data_dir


def load(
    data_dir: pathlib.Path | None, *, url: str | None = None, records_per_batch: int = RECORDS_PER_BATCH
) -> ArrayDataset:
    """Loads batches 1 to 4 as "train" (40,000), batch 5 as "validation" and the test batch as "test" (10,000 each).

    The split is the original post's; within each, the images have the published order.

    Args:
      data_dir: an archive (`.tar.gz` or `.tar`, under any name) or a folder. In a folder this is looked for, and the
        first that is found is read: batches in the folder itself (binary ones, then pickles), in
        `cifar-10-batches-bin`, in `cifar-10-batches-py`; TFDS's `cifar10/3.0.2`; `cifar-10-binary.tar.gz`,
        `cifar-10-python.tar.gz`, the same two unpacked to `.tar`; other archives of CIFAR-10 by alphabet; batches one
        folder deeper, if only one folder has them.
        None: the folder `data` in the working directory, then TFDS's default data_dir, then an archive that was
        downloaded before to the user's cache directory, to which a download goes otherwise.
      url: a published archive to download. None: what the environment variable ALEXNET_JAX_DATA_URL names, else the
        authors' host.
      records_per_batch: images in each of the six published files.

    Raises:
      AlexNetError: the data is broken, is not CIFAR-10, or isn't there and can't be downloaded.
      UsageError: the environment variable holds no address.
    """
    if data_dir is not None:
        return _load_given(pathlib.Path(os.path.abspath(data_dir)), records_per_batch)

    places = [pathlib.Path(os.path.abspath(place)) for place in (pathlib.Path("data"), *_default_tfds_dir())]
    for place in places:
        if dataset := _load_folder(place, records_per_batch, given=False):
            return dataset
    archive = cifar10_download.cached()
    if archive is None:
        archive = cifar10_download.download(url or _url(), " or ".join(map(str, places)))
    return _dataset(str(archive), *cifar10_archive.read(archive, records_per_batch))


def _url() -> str:
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return cifar10_download.URL
    try:
        return web_address(url)
    except ValueError as error:
        raise UsageError(f"{URL_VARIABLE} {shown(url)}: {error}") from None


def _load_given(place: pathlib.Path, records: int) -> ArrayDataset:
    """Loads what --data-dir names.

    Raises:
      AlexNetError: it is not there, can't be read, is damaged or something else.
    """
    if not os.path.exists(place):
        raise AlexNetError(f"{place}: there is no such file or folder; give --data-dir an existing one")
    if not os.path.isdir(place):
        return _dataset(str(place), *cifar10_archive.read(place, records))
    if not os.access(place, os.R_OK | os.X_OK):
        raise AlexNetError(f"{place}: can't be read; check the rights of the folder")
    return _load_folder(place, records, given=True) or _refuse(place, records)


def _load_folder(place: pathlib.Path, records: int, given: bool) -> ArrayDataset | None:
    """Loads what a folder holds, if it holds CIFAR-10.

    Args:
      place: an absolute path.
      records: images in each batch.
      given: whether the user has named the folder. Else a copy of TFDS's that only TensorFlow reads is skipped.
    """
    if found := cifar10_batches.find(place):
        return _dataset(str(found[0]), *cifar10_batches.read(*found, records))
    if (root := _find_prepared(place)) and (given or any(root.joinpath(*_PREPARED).glob("*.array_record*"))):
        return _read_prepared(root, records)
    for path in _archives(place):
        if path.name in cifar10_archive.NAMES or cifar10_archive.holds_cifar10(path):
            return _dataset(str(path), *cifar10_archive.read(path, records))
    deeper = [found for path in _listed(place) if os.path.isdir(path) and (found := cifar10_batches.find(path))]
    if len(deeper) > 1:
        names = shown(", ".join(str(folder.relative_to(place)) for folder, _ in deeper), 300)
        raise AlexNetError(f"{place}: several folders in it hold batches of CIFAR-10 ({names}): give --data-dir one")
    return _dataset(str(deeper[0][0]), *cifar10_batches.read(*deeper[0], records)) if deeper else None


def _archives(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that are archives by their names, those with published names first."""
    names = cifar10_archive.NAMES
    paths = [folder / name for name in names] + [
        path
        for path in _listed(folder)
        if path.name not in names and path.name.lower().endswith(cifar10_archive.SUFFIXES)
    ]
    return [path for path in paths if os.path.isfile(path)]


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(path for path in folder.iterdir() if is_one_line(path.name))
    except OSError:
        return []  # not there, for one of the default places


def _refuse(place: pathlib.Path, records: int) -> ArrayDataset:
    """Says what a folder holds in place of CIFAR-10.

    Raises:
      AlexNetError: always, unless a file that seemed to be something else turns out to be CIFAR-10.
    """
    paths = _listed(place)
    if version := cifar10_batches.other_version({path.name: _size(path) for path in paths if os.path.exists(path)}):
        raise AlexNetError(f"{place}: {version}; {WHICH_TO_TAKE}")
    for path in paths:
        name = path.name.lower()
        if "cifar" not in name or not os.path.isfile(path):
            continue
        if name.endswith(cifar10_archive.UNFINISHED):
            raise AlexNetError(f"{path} is an unfinished download: finish it; {WHICH_TO_TAKE}")
        if name.endswith(cifar10_archive.SUFFIXES):
            return _dataset(str(path), *cifar10_archive.read(path, records))
    wanted = ", ".join([*(layout.folder for layout in LAYOUTS), "/".join(_PREPARED), *cifar10_archive.NAMES[:2]])
    similar = ", ".join(path.name for path in paths if "cifar" in path.name.lower())
    hint = f" (it has {shown(similar, 300)}, which is not read: unpack it if it is packed)" if similar else ""
    raise AlexNetError(
        f"{place}: there is no CIFAR-10 in it, neither data_batch_1 nor one of {wanted}{hint}; without --data-dir it "
        "is downloaded"
    )


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else 0


def _dataset(source: str, train: Split, test: Split) -> ArrayDataset:
    """Divides the published images into the three splits.

    Raises:
      AlexNetError: they have the full number, but are not those of CIFAR-10.
    """
    if len(test) == RECORDS_PER_BATCH and (fault := _fault(train, test)):
        raise AlexNetError(
            f"{source}: {fault}: the copy is damaged or is not CIFAR-10; download or extract the published archive "
            "again"
        )
    validation = len(train) - len(test)  # where the fifth batch begins
    return ArrayDataset(
        name="cifar10",
        source=source,
        class_names=CLASS_NAMES,
        splits={
            "train": Split(train.images[:validation], train.labels[:validation]),
            "validation": Split(train.images[validation:], train.labels[validation:]),
            "test": test,
        },
    )


def _fault(train: Split, test: Split) -> str | None:
    """What shows that these are not the published images: none is black, and each class has the same number.

    The pixels are not compared with the published ones: a copy that was compressed with loss is still CIFAR-10.
    """
    batches = [Split(*part) for part in zip(np.split(train.images, 5), np.split(train.labels, 5), strict=True)] + [test]
    for (a, first), (b, second) in itertools.combinations(zip(BATCHES, batches, strict=True), 2):
        if np.array_equal(first.labels, second.labels) and np.array_equal(first.images, second.images):
            return f"{b} is a copy of {a}"
    for part, split in (("the training batches have", train), ("the test batch has", test)):
        if black := np.count_nonzero(~split.images.any(axis=(1, 2, 3))):
            return f"{part} {black:,} image(s) with all pixels 0"
        expected = len(split) // len(CLASS_NAMES)
        for label, count in enumerate(np.bincount(split.labels, minlength=len(CLASS_NAMES))):
            if count != expected:
                return f"{part} {count:,} images of class {CLASS_NAMES[label]} instead of {expected:,}"
    return None


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
    for root in (place, *place.parents[:2]):
        folder = root.joinpath(*_PREPARED)
        if os.path.isdir(folder) and (place == root or folder.is_relative_to(place)):
            return root
    return None


def _read_prepared(root: pathlib.Path, records: int) -> ArrayDataset:
    folder = root.joinpath(*_PREPARED)
    try:
        # Imported where it is needed, as it takes half a second; array_record is not there for every system.
        from alexnet_jax.data import cifar10_tfds
    except ImportError as error:
        raise AlexNetError(
            f"{folder}: to read a copy of TensorFlow Datasets takes the packages tensorflow-datasets and array_record "
            f"({shown(str(error), 200)}); or give --data-dir another copy: {WHICH_TO_TAKE}"
        ) from error
    return _dataset(str(folder), *cifar10_tfds.read(root, records))
