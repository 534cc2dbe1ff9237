"""Labels of ImageNet's validation images: the devkit, Kaggle's files, Tiny ImageNet's."""

import contextlib
import csv
import io
import pathlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_jax.data.image_files import SUFFIXES
from alexnet_jax.errors import AlexNetError, shown

DEVKIT = "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"  # in the devkit
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
WORDS, ANNOTATIONS = "words.txt", "val_annotations.txt"  # Tiny ImageNet's


class GroundTruth(NamedTuple):
    """Known labels.

    Attributes:
      words: the name of each class in words, by its ID: "tench, Tinca tinca".
      labels: class of each validation image, by `image_key`.
      origin: where `labels` come from, for messages.
    """

    words: dict[str, str]
    labels: dict[str, str]
    origin: str


def image_key(name: str) -> str:
    """The key of an image: the last part of its path, without the suffix of an image file."""
    path = pathlib.PurePosixPath(name)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def read_ground_truth(folder: pathlib.Path) -> GroundTruth:
    """Reads those of the devkit (folder or .tar.gz), Kaggle's files and Tiny ImageNet's words that a folder has.

    Raises:
      AlexNetError: one of them can't be read, or they contradict each other.
    """
    words = _read_words(folder / WORDS, "\t") | _read_words(folder / MAPPING, " ")
    labels: dict[str, str] = {}
    origins = []
    solution = folder / SOLUTION
    if solution.exists():
        origins.append(SOLUTION)
        with _reading(solution):
            _add(labels, _read_solution(solution), solution)
    if devkit := _find_devkit(folder):
        origins.append("the devkit")
        with _reading(devkit.path / META):
            classes, descriptions = _read_meta(devkit)
        with _reading(devkit.path / GROUND_TRUTH):
            _add(labels, _read_devkit_labels(devkit, classes), devkit.path / GROUND_TRUTH)
        words |= descriptions
    return GroundTruth(words, labels, " and ".join(origins))


def read_annotations(path: pathlib.Path) -> dict[str, str]:
    """Classes of Tiny ImageNet's validation images by `image_key`; a line has file name, class and box, tab-separated.

    Raises:
      AlexNetError: it can't be read, or has two classes for an image.
    """
    labels: dict[str, str] = {}
    with _reading(path):
        for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
            name, _, rest = line.partition("\t")
            if line.strip() and not rest:
                raise AlexNetError(f"{path}: line {number} has no class: {shown(line)}")
            if line.strip():
                _add(labels, [(name, rest.split("\t")[0].strip())], path)
    return labels


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns an error of the block into one line that names the file."""
    try:
        yield
    except AlexNetError:
        raise
    except Exception as error:  # SciPy's reader raises errors of many kinds
        raise AlexNetError(f"{path}: can't be read ({shown(f'{type(error).__name__}: {error}', 200)})") from error


def _add(labels: dict[str, str], found: Iterable[tuple[str, str]], path: pathlib.Path) -> None:
    """Adds pairs of an image's name and its class; `path` is the file they come from."""
    for name, wnid in found:
        key = image_key(name.strip())
        if labels.setdefault(key, wnid) != wnid:
            raise AlexNetError(
                f"{path}: the class of {shown(key)} is {shown(wnid)} here and {shown(labels[key])} elsewhere"
            )


def _read_words(path: pathlib.Path, separator: str) -> dict[str, str]:
    """The names of classes, from lines of a class ID and its name; {} if there is no such file."""
    with _reading(path):
        lines = path.read_text("utf-8-sig").splitlines() if path.exists() else []
    return {wnid: text for wnid, _, text in (line.partition(separator) for line in lines)}


def _read_solution(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        if not {"ImageId", "PredictionString"} <= set(columns):
            first = shown(",".join(columns))
            raise AlexNetError(f"{path}: the first line must be ImageId,PredictionString, not {first}")
        for row in reader:
            wnids = set((row["PredictionString"] or "").split()[::5])  # each box: its class and 4 numbers
            if len(wnids) != 1 or not row["ImageId"]:
                raise AlexNetError(f"{path}: line {reader.line_num} has {len(wnids)} classes instead of one")
            yield row["ImageId"], wnids.pop()


class _Devkit(NamedTuple):
    """Contents of the devkit's files, and the folder or archive that they come from."""

    path: pathlib.Path
    meta: bytes
    ground_truth: bytes


def _find_devkit(source: pathlib.Path) -> _Devkit | None:
    """Finds the devkit if `source` is its folder or its folder `data`, or contains its folder or its archive."""
    names = (META, GROUND_TRUTH)
    for folder in (source / DEVKIT / "data", source / DEVKIT, source / "data", source):
        if any((folder / name).exists() for name in names):
            contents = []
            for name in names:
                with _reading(folder / name):
                    contents.append((folder / name).read_bytes())
            return _Devkit(folder, *contents)
    archive = source / f"{DEVKIT}.tar.gz"
    if not archive.exists():
        return None
    found: dict[str, bytes] = {}
    with _reading(archive), tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(names) else None
            if file is not None:
                found[member.name.rsplit("/", 1)[-1]] = file.read()
    if missing := set(names) - set(found):
        raise AlexNetError(f"{archive} does not contain {min(missing)}")
    return _Devkit(archive, found[META], found[GROUND_TRUTH])


def _read_meta(devkit: _Devkit) -> tuple[dict[int, str], dict[str, str]]:
    """The devkit's number of each class (not in the order of the IDs), and the name of each class."""
    import scipy.io

    classes: dict[int, str] = {}
    words: dict[str, str] = {}
    for synset in np.atleast_1d(scipy.io.loadmat(io.BytesIO(devkit.meta), squeeze_me=True)["synsets"]):
        if int(synset["num_children"]) == 0:  # the others are groups of classes
            number, wnid = int(synset["ILSVRC2012_ID"]), str(synset["WNID"])
            if number in classes or wnid in words:
                raise AlexNetError(f"{devkit.path / META}: contains class {number} or {wnid} twice")
            classes[number], words[wnid] = wnid, str(synset["words"])
    return classes, words


def _read_devkit_labels(devkit: _Devkit, classes: dict[int, str]) -> Iterator[tuple[str, str]]:
    """The classes of the images; line n has the number of image n's class."""
    for place, line in enumerate(devkit.ground_truth.decode("ascii").rstrip().splitlines(), 1):
        number = int(line) if line.strip().isdecimal() else -1
        if number not in classes:
            path = devkit.path / GROUND_TRUTH
            raise AlexNetError(f"{path}: line {place} is not the number of a class in {META}: {shown(line)}")
        yield f"ILSVRC2012_val_{place:08d}", classes[number]
