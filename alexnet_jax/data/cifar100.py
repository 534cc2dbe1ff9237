"""CIFAR-100 (Krizhevsky 2009): 60,000 photographs of 32 x 32 pixels in 100 classes, from the published files.

The binary and the pickled version give identical arrays. The labels are the fine ones; the 20 superclasses are not
read.
"""

import os
import pathlib
import tarfile
from collections.abc import Mapping

import numpy as np

from alexnet_jax.data import pickles
from alexnet_jax.data.cifar10_files import MAX_ARCHIVE_BYTES, archive_errors, open_tar, other_kind, to_split
from alexnet_jax.data.dataset import ArrayDataset, Split
from alexnet_jax.errors import AlexNetError, UsageError, reason, shown
from alexnet_jax.files import read_bytes

RECORDS: Mapping[str, int] = {"train": 50_000, "test": 10_000}
VALIDATION_SHARE = 5  # the last fifth of the training images validates, as in CIFAR-10
SUFFIXES = {"cifar-100-binary": ".bin", "cifar-100-python": ""}  # by published folder, in order of preference
ARCHIVES = tuple(f"{folder}.tar{gz}" for gz in (".gz", "") for folder in SUFFIXES)
WHICH_TO_USE = "use cifar-100-python.tar.gz or cifar-100-binary.tar.gz"
_RECORD_BYTES = 2 + 3 * 32 * 32  # superclass, class, pixels in planes
_MAX_BYTES = 320 * 1024**2  # of a file; the pickles have 155 MB, rewritten by Python 3 some 230

# fmt: off
CLASS_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
# fmt: on


def load(data_dir: pathlib.Path | None, records: Mapping[str, int] = RECORDS) -> ArrayDataset:
    """Loads the splits "train" (40,000 images), "validation" (the last 10,000 training images) and "test" (10,000).

    Args:
      data_dir: an archive (`.tar.gz` or `.tar`, under any name), or a folder that has one with its published name, or
        the files `train.bin` and `test.bin` or `train` and `test`, or their published folder.
      records: images in the two published files.

    Raises:
      UsageError: `data_dir` is None.
      AlexNetError: the data is damaged, or is not CIFAR-100.
    """
    if data_dir is None:
        raise UsageError(f"--dataset cifar100 needs --data-dir: {WHICH_TO_USE}")
    place = pathlib.Path(os.path.abspath(data_dir))
    source, found = _read(place, records)
    for name, split in found.items():
        each = records[name] // len(CLASS_NAMES)
        if (np.bincount(split.labels, minlength=len(CLASS_NAMES)) != each).any():
            raise AlexNetError(f"{source}: {name} does not have {each} images of each class: {WHICH_TO_USE}")
    train, held_out = found["train"], records["train"] // VALIDATION_SHARE
    return ArrayDataset(
        name="cifar100",
        source=str(source),
        class_names=CLASS_NAMES,
        splits={
            "train": Split(train.images[:-held_out], train.labels[:-held_out]),
            "validation": Split(train.images[-held_out:], train.labels[-held_out:]),
            "test": found["test"],
        },
    )


def _read(place: pathlib.Path, records: Mapping[str, int]) -> tuple[pathlib.Path, dict[str, Split]]:
    """The two splits, and the file or folder they are from."""
    if not place.exists():
        raise AlexNetError(f"{place}: no such file or folder; set --data-dir to an existing one")
    if not place.is_dir():
        return place, _read_archive(place, records)
    for folder in (place, *(place / name for name in SUFFIXES)):
        for suffix in SUFFIXES.values():
            if (folder / f"train{suffix}").is_file():
                return folder, {name: _read_file(folder / f"{name}{suffix}", records[name]) for name in records}
    for name in ARCHIVES:
        if (place / name).is_file():
            return place / name, _read_archive(place / name, records)
    raise AlexNetError(f"{place}: contains no CIFAR-100, neither train.bin, nor train, nor {' or '.join(ARCHIVES[:2])}")


def _read_file(path: pathlib.Path, records: int) -> Split:
    try:
        return _parse(path.name, read_bytes(path, _MAX_BYTES), records)
    except ValueError as error:
        raise AlexNetError(f"{path}: {error}; extract the published archive again") from error
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)}); extract the published archive again") from error


def _read_archive(path: pathlib.Path, records: Mapping[str, int]) -> dict[str, Split]:
    found: dict[str, Split] = {}
    with archive_errors(path, WHICH_TO_USE), open_tar(path, MAX_ARCHIVE_BYTES) as tar:
        for member in tar.members():
            name = member.name.rpartition("/")[2]
            split = name.removesuffix(".bin")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or split not in records or split in found:
                continue
            data = tar.read(member.size)
            if len(data) < member.size:
                raise EOFError
            found[split] = _parse(name, data, records[split])
        tar.drain()  # the checksum of gzip is at the end
    if missing := [name for name in records if name not in found]:
        raise AlexNetError(f"{path}: it lacks {' and '.join(missing)}; {WHICH_TO_USE}")
    return {name: found[name] for name in records}


def _parse(name: str, data: bytes, records: int) -> Split:
    """The images in a file's contents.

    Raises:
      ValueError: they are not as published.
    """
    if other := other_kind(data[:512]):
        raise ValueError(other)
    return _parse_binary(data, records) if name.endswith(".bin") else _parse_pickle(data, records)


def _parse_binary(data: bytes, records: int) -> Split:
    if len(data) != records * _RECORD_BYTES:
        raise ValueError(f"it has {len(data):,} bytes instead of {records * _RECORD_BYTES:,}")
    rows = np.frombuffer(data, np.uint8).reshape(records, _RECORD_BYTES)
    return to_split(rows[:, 2:], rows[:, 1], len(CLASS_NAMES))


def _parse_pickle(data: bytes, records: int) -> Split:
    try:
        content = pickles.loads(data)
    except Exception as error:  # a damaged file causes errors of many kinds
        raise ValueError(f"truncated, or no pickle of CIFAR-100 ({reason(error)})") from error
    match content:
        case {b"data": pickles.PickledArray(values=np.ndarray() as pixels), b"fine_labels": list(labels)}:
            pass
        case _:
            raise ValueError("not a dictionary with an array b'data' and a list b'fine_labels'")
    if pixels.shape != (records, _RECORD_BYTES - 2) or pixels.dtype != np.uint8 or len(labels) != records:
        raise ValueError(
            f"it has {pixels.dtype} {pixels.shape} and {len(labels):,} labels instead of {records:,} images"
        )
    for record, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"record {record} has {shown(type(label).__name__)} as label")
    return to_split(pixels, np.array(labels), len(CLASS_NAMES))
