"""ImageNet, once: `python -m alexnet_jax.data.prepare imagenet --source DIR --out DIR`.

Every picture becomes a square of 256x256 (paper, section 2) in array_record shards; the training pictures' mean image
and PCA basis are measured on the way, exactly. A preparation that was killed is resumed where it stopped.

    OUT/train-00000-of-01282.array_record ..    records of `pictures.encode`
    OUT/statistics.npz                          mean image and PCA basis of the training pictures
    OUT/skipped.jsonl                           files that are no pictures, with the reason
    OUT/dataset.json                            what is there; written last: its presence says that all is
    OUT/.work/                                  what each finished shard contributed; removed at the end
    OUT/prepare.lock                            locked while a process works there
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import shutil
import signal
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import tqdm

from alexnet_jax.config import cli
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data import decode
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, shown
from alexnet_jax.files import locked, read_bytes, sync, to_bytes, write_atomically
from alexnet_jax.runtime import available_cores, require_array_record
from alexnet_jax.signals import StopSignals

RECORDS_PER_SHARD = 1000
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"  # the devkit's
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"  # Kaggle's
WORDS, ANNOTATIONS = "words.txt", "val_annotations.txt"  # Tiny ImageNet's
SPLITS = ("train", "validation")
IN_NO_CLASS = "it is in no folder of a class"
MOST_NAMED = 10  # files or folders in a line
_SPLIT = re.compile(r"(.*img_)?(train(ing)?|val|valid|validation)([^a-z].*)?", re.IGNORECASE)  # its folder or archive
_SPLIT_NAMES = frozenset(("train", "val", "valid", "validation", "test"))
_ARCHIVES = frozenset((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip"))
_COMPRESSED = re.compile(rb"\x1f\x8b|BZh.1AY&SY|\xfd7zXZ\0|PK\x03\x04|\x28\xb5\x2f\xfd")  # gz, bz2, xz, zip, zst
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # control codes, and bytes that are no UTF-8


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Prepare ImageNet for training.

    --source is a folder with one of: `train/<class>/*.JPEG` and `val/` (in class folders, or flat); Tiny ImageNet's
    files; the official tar files; TFDS's `imagenet2012`, prepared as array_record. The same command resumes a
    preparation that was stopped.
    """

    source: Path
    """Folder that holds ImageNet."""
    out: Path
    """Folder to write to: new, or of a preparation that was stopped."""
    labels: Path | None = None
    """The devkit (ILSVRC2012_devkit_t12, folder or .tar.gz), Kaggle's LOC_val_solution.csv, or a folder with one: the
    classes of validation pictures that are not in class folders, by the pictures' names, and what classes are called.
    Unset: --source."""
    workers: PositiveInt | None = None
    """Processes. Unset: as many as there are cores. Does not change the result."""
    size: PositiveInt = 256
    """Side of the squares."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """`jpeg`: quality 95; `raw`: the pixels, which takes some 5 times the room and a quarter of the time to read."""


class Picture(NamedTuple):
    """Where the bytes of a picture are.

    Attributes:
      name: to show.
      label: class index.
      path: of the file; of a tar; of a folder of TFDS.
      offset: in bytes; 0 for all of the file; of TFDS, which example.
      length: in bytes; -1 for TFDS.
    """

    name: str
    label: int
    path: str
    offset: int = 0
    length: int = 0


class Source(NamedTuple):
    """What was found.

    Attributes:
      kind: to show.
      wnids: name of each class, sorted: their order is the classes' order.
      words: what a class is called, where that is known.
      splits: pictures of "train" and, if there are any, "validation", in order.
      outside: files of each split that belong to no class, with the reason; they are listed as skipped.
      notes: lines to print: what was left out or is missing.
    """

    kind: str
    wnids: list[str]
    words: dict[str, str]
    splits: dict[str, list[Picture]]
    outside: dict[str, list[tuple[str, str]]]
    notes: list[str]


def find(source: pathlib.Path, labels: pathlib.Path | None = None) -> Source:
    """Lists the pictures of a source; `labels` is as in PrepareConfig.

    Every file counts, except what systems leave (`pictures.is_litter`): whether it is a picture shows when it is read.
    A folder is a class if a picture in it, or in its subfolders, can be read. Labels are found by the name of a class
    or of a picture, never by position.

    Raises:
      AlexNetError: it holds nothing known, or no label for a validation picture.
    """
    if labels is not None and labels.is_file():
        if labels.name not in (SOLUTION, f"{DEVKIT}.tar.gz"):
            raise AlexNetError(f"{labels}: --labels takes a folder, {SOLUTION} or {DEVKIT}.tar.gz")
        labels = labels.parent
    labels = source if labels is None else labels
    for place in (source, labels):
        if not place.is_dir():
            raise AlexNetError(f"{place}: there is no such folder")
    try:
        used: tuple[str, ...]
        if (source / TRAIN_TAR).exists():
            found, used = _find_tars(source, labels), (TRAIN_TAR, VALIDATION_TAR)
        elif (source / "train").is_dir():
            found, used = _find_folders(source, labels), ("train", "val", "validation")
        elif (folder := _tfds_folder(source)) is not None:
            found, used = _find_tfds(folder), ("TFDS's files",)
        else:
            raise AlexNetError(f"{source} holds neither train/, nor {TRAIN_TAR}, nor TFDS's imagenet2012")
        return found._replace(notes=found.notes + _unused(source, found.wnids, used))
    except OSError as error:
        raise AlexNetError(f"{error.filename or source}: can't be read ({error.strerror or error})") from error


def _unused(source: pathlib.Path, wnids: Sequence[str], used: Sequence[str]) -> list[str]:
    """A line about folders and archives that seem to hold images of these classes and are not read."""
    read = [source / name for name in used if (source / name).exists()]
    names = []
    for path in sorted(source.iterdir()):
        if decode.is_litter(path.name) or not path.exists() or any(map(path.samefile, read)):
            continue
        named = _SPLIT.fullmatch(path.name) is not None
        if path.is_dir():
            folders = next(os.walk(path), ("", [], []))[1]  # none if it can't be listed
            named = named or not set(wnids).isdisjoint(folders)
        elif path.suffix.lower() not in _ARCHIVES:
            continue
        names += [path.name] * named
    return _named(f"not used, as only {', '.join(used)} are read:", names)


def _find_folders(source: pathlib.Path, labels: pathlib.Path) -> Source:
    def stop(error: OSError) -> NoReturn:
        raise error

    def to_picture(path: pathlib.Path) -> Picture:
        return Picture(path.relative_to(source).as_posix(), -1, str(path))

    def listed(folder: pathlib.Path) -> tuple[dict[str, list[Picture]], list[Picture]]:
        """The files in each folder of a folder and below it, by its name; and the files beside these folders."""
        folders, beside = {}, []
        for path in sorted((p for p in folder.iterdir() if not decode.is_litter(p.name)), key=lambda p: p.name):
            if not path.is_dir():
                beside.append(to_picture(path))
            elif decode.is_loop(path):
                raise AlexNetError(f"{path}: links to a folder that holds it; remove the link")
            else:
                boxes = f"{path.name}_boxes.txt"  # Tiny ImageNet's
                folders[path.name] = [to_picture(f) for f in decode.files_in(path, stop) if f.name != boxes]
        return folders, beside

    folders, beside = listed(source / "train")
    if not folders:
        raise AlexNetError(f"{source / 'train'} has no folders of classes")
    for name, files in folders.items():
        if name.lower() in _SPLIT_NAMES and files and all(picture.name.count("/") > 2 for picture in files):
            raise AlexNetError(
                f"{source / 'train' / name}: it holds folders, no images, so it is no class: the class folders must be "
                f"in train/ and val/; is {source / 'train'} the --source?"
            )
    wnids, train, outside, notes = _classes(folders, source / "train")
    index = {wnid: label for label, wnid in enumerate(wnids)}
    splits, strays = {"train": train}, {"train": outside + [(picture.name, IN_NO_CLASS) for picture in beside]}
    found = [name for name in ("val", "validation") if (source / name).is_dir()]
    if len(found) > 1:
        raise AlexNetError(f"{source} holds both val/ and validation/: remove one, or move it away")
    truth = _ground_truth(labels)
    for name in found:
        folder = source / name
        folders, beside = listed(folder)
        notes += _named("no file in", [f"{name}/{key}" for key, files in folders.items() if not files])
        folders = {key: files for key, files in folders.items() if files}
        if (folder / ANNOTATIONS).exists():
            truth = truth._replace(labels=_annotations(folder / ANNOTATIONS), origin=ANNOTATIONS)
            files = [p for group in (*folders.values(), beside) for p in group if p.name != f"{name}/{ANNOTATIONS}"]
            splits["validation"] = _labelled(files, truth, index, folder, notes)
        elif folders:
            unknown = sorted(folders.keys() - index)
            if len(unknown) == len(folders):
                raise AlexNetError(
                    f"{folder / unknown[0]}: there is no such class in {source / 'train'}, or no picture of it"
                )
            notes += _left_out(folder, [key for key in unknown for _ in folders[key]])
            strays["validation"] = [(picture.name, IN_NO_CLASS) for picture in beside]
            splits["validation"] = [
                p._replace(label=index[key]) for key, files in folders.items() if key in index for p in files
            ]
        else:
            splits["validation"] = _labelled(beside, truth, index, folder, notes)
        for key in folders.keys() & index:
            for picture in folders[key]:
                if (wnid := truth.labels.get(_key(picture.name), key)) != key:
                    raise AlexNetError(
                        f"{source / picture.name}: it is in the folder of {key}, but {truth.origin} says {wnid}"
                    )
    deeper = {
        str(pathlib.PurePosixPath(p.name).parent) for files in splits.values() for p in files if p.name.count("/") > 2
    }
    deeper = {name for name in deeper if not re.fullmatch("[^/]+/[^/]+/images", name)}  # Tiny ImageNet's
    if len(wnids) == 1 and len(deeper) > 1:
        raise AlexNetError(f"{source / 'train' / wnids[0]}: the only class, with folders in it: move these to train/")
    notes += _named("files of subfolders belong to the class of the folder above:", sorted(deeper))
    return Source(
        "image folder", wnids, truth.words, {name: found for name, found in splits.items() if found}, strays, notes
    )


def _left_out(where: pathlib.Path, classes: Sequence[str]) -> list[str]:
    """A line about validation images of classes without training images; `classes` has the class of each."""
    text = f"{where.name}: left out {len(classes):,} images of {len(set(classes)):,} classes without training images:"
    return _named(text, sorted(set(classes)))


def _named(what: str, names: Sequence[str]) -> list[str]:
    """A line with the first few names, if there are any."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return [f"{what} {', '.join(map(shown, names[:MOST_NAMED]))}{more}"] if names else []


def _classes(
    found: dict[str, list[Picture]], where: pathlib.Path
) -> tuple[list[str], list[Picture], list[tuple[str, str]], list[str]]:
    """Leaves out what holds no picture: as a class it would change the labels of all others.

    Args:
      found: the training files of each class.
      where: they are.

    Returns:
      The classes in order, their pictures with labels, the files of what is no class with reasons, and notes.
    """
    wnids: list[str] = []
    train: list[Picture] = []
    outside: list[tuple[str, str]] = []
    empty = []
    for wnid in sorted(found):
        if _UNPRINTABLE.search(wnid):
            raise AlexNetError(f"{where}: the name of class {shown(wnid)} can't be printed: rename it")
        reasons = []
        for picture in found[wnid]:
            try:
                decode.decode(_bytes_of(picture)[0])
                break
            except (decode.PictureError, OSError) as error:
                reasons.append((picture.name, str(error)))
        else:
            empty.append(wnid)
            outside += reasons
            continue
        train += [picture._replace(label=len(wnids)) for picture in found[wnid]]
        wnids.append(wnid)
    if not wnids:
        files = (
            f"none of its {len(outside):,} files is a picture ({': '.join(outside[0])})"
            if outside
            else "they hold no files"
        )
        raise AlexNetError(f"{where} has no classes with pictures: {shown(files, 300)}")
    return wnids, train, outside, _named("no class, as no picture was found:", [f"{where.name}/{w}" for w in empty])


def _find_tars(source: pathlib.Path, labels: pathlib.Path) -> Source:
    def refuse_compressed(file: io.BufferedReader, start: int, what: str) -> None:
        file.seek(start)
        if _COMPRESSED.match(file.read(10)):
            raise AlexNetError(f"{what} is compressed: unpack it")

    def files(path: pathlib.Path, file: io.BufferedReader, start: int, end: int) -> list[tarfile.TarInfo]:
        """The files of a tar in bytes [start, end) of a file; its members' offsets are from that file's beginning."""
        refuse_compressed(file, start, f"{path}: it")
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
        # tarfile takes a damaged member's place, and a cut between two members, for the end.
        blocks = -(-members[-1].size // tarfile.BLOCKSIZE) if members else 0
        mark = members[-1].offset_data + blocks * tarfile.BLOCKSIZE if members else start
        file.seek(mark)
        if file.read(2 * tarfile.BLOCKSIZE) != tarfile.NUL * 2 * tarfile.BLOCKSIZE or file.tell() > end:
            after = f"after {shown(members[-1].name)}" if members else "at its beginning"
            raise AlexNetError(f"{path}: the tar is damaged or was cut off {after}")
        found: dict[str, tarfile.TarInfo] = {}
        for member in members:
            if member.isdir() or any(map(decode.is_litter, pathlib.PurePosixPath(member.name).parts)):
                continue
            if not member.isreg() or member.issparse():
                raise AlexNetError(f"{path}: {shown(member.name)} in it is no plain file, but a link or the like")
            if found.setdefault(member.name, member) is not member:
                raise AlexNetError(f"{path}: {shown(member.name)} is in it twice")
        return [found[name] for name in sorted(found)]

    def to_picture(path: pathlib.Path, name: str, member: tarfile.TarInfo) -> Picture:
        return Picture(name, -1, str(path), member.offset_data, member.size)

    path = source / TRAIN_TAR
    classes: dict[str, list[Picture]] = {}
    try:
        with path.open("rb") as file:
            for tar in files(path, file, 0, path.stat().st_size):
                refuse_compressed(file, tar.offset_data, f"{path}: {shown(tar.name)} in it")
                wnid = pathlib.PurePosixPath(tar.name).stem
                if not re.fullmatch(r"(.*/)?n[0-9]+\.tar", tar.name):
                    raise AlexNetError(f"{path}: {shown(tar.name)} in it is not named like a class: n01440764.tar")
                if wnid in classes:
                    raise AlexNetError(f"{path}: {wnid}.tar is in it twice")
                inner = files(path, file, tar.offset_data, tar.offset_data + tar.size)
                classes[wnid] = [to_picture(path, f"{wnid}/{member.name}", member) for member in inner]
        wnids, train, outside, notes = _classes(classes, path)
        truth, splits = _ground_truth(labels), {"train": train}
        path = source / VALIDATION_TAR
        if path.exists():
            with path.open("rb") as file:
                found = [to_picture(path, m.name, m) for m in files(path, file, 0, path.stat().st_size)]
            index = {wnid: label for label, wnid in enumerate(wnids)}
            splits["validation"] = _labelled(found, truth, index, path, notes)
    except tarfile.TarError as error:
        raise AlexNetError(f"{path}: can't be read ({error})") from error
    return Source("official tar files", wnids, truth.words, splits, {"train": outside}, notes)


def _tfds_folder(source: pathlib.Path) -> pathlib.Path | None:
    """`source`, or the newest version below it, or below `imagenet2012` in it."""
    found = [
        path.parent for place in ("", "*/", "imagenet2012/*/") for path in source.glob(f"{place}dataset_info.json")
    ]
    return max(found, key=lambda folder: [int(n) for n in re.findall("[0-9]+", folder.name)], default=None)


def _find_tfds(source: pathlib.Path) -> Source:
    builder = _tfds_builder(str(source))
    if builder.info.file_format.value != "array_record":
        raise AlexNetError(f"{source}: prepared as {builder.info.file_format.value}, not as array_record")
    wnids = sorted(_tfds_names(builder))
    splits = {}
    for name in SPLITS:
        if name in builder.info.splits:
            examples = _tfds_examples(str(source), name)
            # The label is part of the example: it is read with the picture.
            splits[name] = [Picture(f"{name}/{i}", -1, f"{source}/{name}", i, -1) for i in range(len(examples))]
    if not splits.get("train"):
        raise AlexNetError(f"{source}: has no training examples")
    return Source("TFDS imagenet2012", wnids, {}, splits, {}, [])


class Truth(NamedTuple):
    """What is known of the classes and the validation pictures beside the pictures.

    Attributes:
      words: what each class is called.
      labels: class of each validation picture by its name (`_key`).
      origin: what says so.
    """

    words: dict[str, str]
    labels: dict[str, str]
    origin: str


def _key(name: str) -> str:
    """What names a picture: the last part of its path, without the suffix of a picture."""
    path = pathlib.PurePosixPath(name)
    return path.stem if path.suffix.lower() in decode.SUFFIXES else path.name


def _ground_truth(source: pathlib.Path) -> Truth:
    """From the devkit (folder or tar.gz), Kaggle's files or Tiny ImageNet's words, if they are there."""
    words: dict[str, str] = {}
    labels: dict[str, str] = {}
    origins = []
    path = source  # that is being read
    try:
        for name, separator in ((WORDS, "\t"), (MAPPING, " ")):
            path = source / name
            if path.exists():
                lines = path.read_text("utf-8-sig").splitlines()
                words |= {wnid: text for wnid, _, text in (line.partition(separator) for line in lines)}
        path = source / SOLUTION
        if path.exists():
            origins.append(SOLUTION)
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                if not {"ImageId", "PredictionString"} <= set(columns := reader.fieldnames or ()):
                    first = shown(",".join(columns))
                    raise AlexNetError(f"{path}: its first line must be ImageId,PredictionString, not {first}")
                for row in reader:
                    wnids = set((row["PredictionString"] or "").split()[::5])  # of every box: class and 4 numbers
                    if len(wnids) != 1 or not row["ImageId"]:
                        raise AlexNetError(f"{path}: line {reader.line_num} names {len(wnids)} classes, not one")
                    _add(labels, row["ImageId"], wnids.pop(), path)
        path = source / DEVKIT
        if files := _devkit_files(source):
            import scipy.io

            origins.append("the devkit")
            folder, meta, text = files
            path = folder / META
            classes: dict[int, str] = {}
            for synset in np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]):
                if int(synset["num_children"]) == 0:  # the others are groups of classes
                    number, wnid = int(synset["ILSVRC2012_ID"]), str(synset["WNID"])
                    if number in classes or wnid in classes.values():
                        raise AlexNetError(f"{source}: the devkit's meta.mat has class {number} or {wnid} twice")
                    classes[number], words[wnid] = wnid, str(synset["words"])
            path = folder / GROUND_TRUTH
            # Line n is about picture n; the devkit numbers classes in an order of its own.
            for place, line in enumerate(text.decode("ascii").rstrip().splitlines(), 1):
                number = int(line) if line.strip().isdecimal() else -1
                if number not in classes:
                    raise AlexNetError(
                        f"{source}: line {place} of the devkit's truth is no class of its meta.mat: {shown(line)}"
                    )
                _add(labels, f"ILSVRC2012_val_{place:08d}", classes[number], path)
    except AlexNetError:
        raise
    except Exception as error:  # SciPy's reader raises errors of many kinds
        reason = shown(f"{type(error).__name__}: {error}", 200)
        raise AlexNetError(f"{path}: the validation labels can't be read ({reason})") from error
    return Truth(words, labels, " and ".join(origins))


def _annotations(path: pathlib.Path) -> dict[str, str]:
    """Classes of Tiny ImageNet's validation pictures: lines of a file's name, a class and a box, with tabs between."""
    labels: dict[str, str] = {}
    try:
        for place, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
            fields = line.split("\t")
            if line.strip() and len(fields) < 2:
                raise AlexNetError(f"{path}: line {place} names no class: {shown(line)}")
            if line.strip():
                _add(labels, fields[0], fields[1].strip(), path)
    except ValueError as error:
        raise AlexNetError(f"{path}: can't be read ({error})") from error
    return labels


def _add(labels: dict[str, str], name: str, wnid: str, path: pathlib.Path) -> None:
    key = _key(name.strip())
    if labels.setdefault(key, wnid) != wnid:
        raise AlexNetError(
            f"{path}: the class of {shown(key)} is {shown(wnid)} here and {shown(labels[key])} elsewhere"
        )


def _devkit_files(source: pathlib.Path) -> tuple[pathlib.Path, bytes, bytes] | None:
    """Where the devkit is, its meta.mat and its truth; `source` is its folder, its folder `data`, or holds it."""
    names = (META, GROUND_TRUTH)
    for folder in (source / DEVKIT / "data", source / DEVKIT, source / "data", source):
        if any((folder / name).exists() for name in names):
            meta, text = ((folder / name).read_bytes() for name in names)
            return folder, meta, text
    archive = source / f"{DEVKIT}.tar.gz"
    if archive.exists():
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(names) else None
                    if file is not None:
                        found[member.name.rsplit("/", 1)[-1]] = file.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise AlexNetError(f"{archive}: can't be read ({shown(' '.join(str(error).split()), 200)})") from error
        if missing := set(names) - set(found):
            raise AlexNetError(f"{archive}: there is no {min(missing)} in it")
        return archive, found[META], found[GROUND_TRUTH]
    return None


def _labelled(
    files: list[Picture], truth: Truth, index: dict[str, int], where: pathlib.Path, notes: list[str]
) -> list[Picture]:
    """Validation pictures with their labels, by their names.

    Args:
      files: that are in no class folders.
      truth: the class of each name.
      index: label of each class.
      where: the files are.
      notes: gets a line if not every picture is there, and one if some are of classes that `index` does not have.
    """
    if files and not truth.labels:
        raise AlexNetError(f"{where}: no labels for its pictures: --labels needs a folder with {DEVKIT} or {SOLUTION}")
    found: dict[str, Picture] = {}
    for picture in files:
        key = _key(picture.name)
        if key not in truth.labels:
            expected = f"{shown(min(truth.labels))} to {shown(max(truth.labels))}"
            raise AlexNetError(
                f"{where}: {truth.origin} has no class for {shown(pathlib.PurePosixPath(picture.name).name)}, "
                f"only for {expected}: remove the file, or give it its name"
            )
        if key in found:
            raise AlexNetError(
                f"{where}: {shown(found[key].name)} and {shown(picture.name)} have one label: remove one"
            )
        wnid = truth.labels[key]
        found[key] = picture._replace(label=index.get(wnid, -1))
    if files and len(found) < len(truth.labels):
        notes.append(f"{where.name}: {len(found):,} of the {len(truth.labels):,} pictures that {truth.origin} labels")
    known = [picture for picture in found.values() if picture.label >= 0]
    unknown = [key for key, picture in found.items() if picture.label < 0]
    if unknown and not known:
        raise AlexNetError(
            f"{where}: {shown(found[unknown[0]].name)} is of class {shown(truth.labels[unknown[0]])}, which has no "
            "training image, and so are all others"
        )
    notes += _left_out(where, [truth.labels[key] for key in unknown])
    return known


def _tfds_builder(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds
        raise AlexNetError(f"{folder}: TFDS can't read it ({shown(str(error).splitlines()[0], 200)})") from error


def _tfds_names(builder: Any) -> list[str]:
    """The class of each label."""
    names = getattr(dict(builder.info.features).get("label"), "names", None)
    if not names or "image" not in builder.info.features:
        raise AlexNetError(f"{builder.data_dir}: its examples have no image and label with the names of classes")
    return list(names)


def _tfds_examples(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder = _tfds_builder(folder)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


class Shard(NamedTuple):
    """A shard to be written.

    Attributes:
      name: of its file.
      pictures: that go into it.
      size, store: as in PrepareConfig.
      measured: whether sums of pixels are needed.
    """

    name: str
    pictures: Sequence[Picture]
    size: int
    store: str
    measured: bool


def write_shard(out: str, shard: Shard) -> None:
    """Writes a shard, then what it contributes to `.work/`: that this file is there says that the shard is whole."""
    from array_record.python import array_record_module

    folder = pathlib.Path(out)
    temporary = folder / ".work" / f"{shard.name}.tmp"
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # JPEG does not shrink
    total = np.zeros((shard.size, shard.size, 3), np.int64)
    products, count, skipped = np.zeros((3, 3), np.int64), 0, []
    for picture in shard.pictures:
        try:
            data, label = _bytes_of(picture)
            pixels = decode.central_square(decode.decode(data), shard.size)
        except (decode.PictureError, OSError) as error:
            skipped.append({"file": picture.name, "reason": str(error)})
        else:
            record = decode.encode(pixels, label, picture.name, shard.store)
            writer.write(record)
            if shard.measured:
                # Of the pixels that training will see.
                stored = decode.read(record, shard.size)[0].astype(np.int64)
                total += stored
                rows = stored.reshape(-1, 3).astype(np.float64)  # whole numbers: exact up to 2^53
                products += (rows.T @ rows).astype(np.int64)
            count += 1
        if _progress is not None:
            with _progress.get_lock():
                _progress.value += 1
    writer.close()
    sync(temporary)
    contents = temporary.read_bytes()
    summary = {
        "name": shard.name,
        "records": count,
        "bytes": len(contents),
        "sha256": hashlib.sha256(contents).hexdigest(),
        "skipped": skipped,
    }
    temporary.replace(folder / shard.name)
    sync(folder)
    sums = io.BytesIO()
    np.savez(sums, total=total, products=products, summary=json.dumps(summary))
    write_atomically(folder / ".work" / f"{shard.name}.npz", sums.getvalue())


def _bytes_of(picture: Picture) -> tuple[bytes, int]:
    if picture.length < 0:
        if picture.path not in _tfds_sources:
            folder, split = picture.path.rsplit("/", 1)
            names = _tfds_names(_tfds_builder(folder))
            _tfds_sources[picture.path] = _tfds_examples(folder, split), names, sorted(names)
        examples, names, wnids = _tfds_sources[picture.path]
        example = examples[picture.offset]
        label = int(example["label"])
        if not 0 <= label < len(names):
            raise decode.PictureError(f"it has no label: {label}")
        return bytes(example["image"]), wnids.index(names[label])
    if not picture.offset:
        return read_bytes(pathlib.Path(picture.path), decode.MAX_BYTES), picture.label
    with open(picture.path, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.length), picture.label


# Of a worker process.
_progress: Any = None
_tfds_sources: dict[str, tuple[Any, list[str], list[str]]] = {}


def _begin_worker(progress: Any) -> None:
    """Counts pictures in `progress`; leaves a terminal's signals to the parent, and ends when that does, in any way."""
    global _progress
    _progress = progress
    for name in ("SIGINT", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Does all of it; returns what dataset.json holds.

    Raises:
      UsageError: `out` holds something else, or a preparation of something else.
      AlexNetError: the source can't be used, or `out` not be written; or array_record is not installed.
    """
    require_array_record()
    out = config.out
    source = find(config.source, config.labels)
    for note in source.notes:
        print(note)
    if "validation" not in source.splits:
        print("no validation images were found")
    work, lock = out / ".work", out / "prepare.lock"
    plan = {
        "size": config.size,
        "store": config.store,
        "pictures": hashlib.sha256(json.dumps([source.wnids, source.splits]).encode()).hexdigest(),
    }
    try:
        if out.exists() and any(out.iterdir()) and not lock.exists():
            raise UsageError(f"--out {out} is not empty: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with locked(lock, "prepares pictures there; wait for it, or choose another --out"):
            if (out / "dataset.json").exists():
                raise UsageError(f"--out {out} is prepared already; choose another folder")
            work.mkdir(exist_ok=True)
            if (work / "plan.json").exists() and json.loads((work / "plan.json").read_bytes()) != plan:
                raise UsageError(f"--out {out} holds a stopped preparation with other settings or pictures: delete it")
            write_atomically(work / "plan.json", to_bytes(plan))
            shards = {split: list(_shards(split, found, config)) for split, found in source.splits.items()}
            stopped = _write_shards([shard for group in shards.values() for shard in group], config)
            if stopped is not None:
                raise StoppedError(stopped, "stopped; the same command resumes")
            return _finish(source, shards, config)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise AlexNetError(f"{out}: the preparation can't go on ({reason})") from error


def _shards(split: str, found: Sequence[Picture], config: PrepareConfig) -> Iterator[Shard]:
    count = -(-len(found) // RECORDS_PER_SHARD)
    for number in range(count):
        part = found[number * RECORDS_PER_SHARD : (number + 1) * RECORDS_PER_SHARD]
        name = f"{split}-{number:05d}-of-{count:05d}.array_record"
        yield Shard(name, part, config.size, config.store, measured=split == "train")


def _write_shards(shards: Sequence[Shard], config: PrepareConfig) -> int | None:
    """Writes those that are missing, in as many processes as wanted, with a bar.

    Returns:
      The number of the signal that ended it, after the shards that were begun; None if all are written.
    """
    out = config.out
    missing = [shard for shard in shards if not _is_finished(out, shard)]
    there = sum(len(s.pictures) for s in shards) - sum(len(s.pictures) for s in missing)
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    workers = min(config.workers or available_cores(), max(len(missing), 1))
    bar = tqdm.tqdm(
        total=there + sum(len(s.pictures) for s in missing), initial=there, unit=" images", disable=None, smoothing=0.05
    )
    with (
        StopSignals() as signals,
        bar,
        concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (progress,)) as pool,
    ):
        futures = [pool.submit(write_shard, str(out), shard) for shard in missing]
        try:
            running = set(futures)
            while signals.received is None and running:
                done, running = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
                bar.update(there + progress.value - bar.n)
                for future in done:
                    future.result()  # raises what ended it
        except concurrent.futures.process.BrokenProcessPool as error:
            raise AlexNetError(f"{out}: a worker was killed (is memory short?); the same command resumes") from error
        finally:
            for future in futures:
                future.cancel()
    return signals.received


def _is_finished(out: pathlib.Path, shard: Shard) -> bool:
    try:
        length = _summary(out / ".work" / f"{shard.name}.npz")["bytes"]
        return bool((out / shard.name).stat().st_size == length)
    except Exception:  # it is not there, or a damaged archive, which raises errors of many kinds
        return False


def _summary(contribution: pathlib.Path) -> dict[str, Any]:
    with np.load(contribution) as arrays:
        summary: dict[str, Any] = json.loads(str(arrays["summary"]))
    return summary


def _finish(source: Source, shards: dict[str, list[Shard]], config: PrepareConfig) -> dict[str, Any]:
    """Adds up what the shards contribute, writes what describes the whole."""
    from alexnet_jax.data.statistics import basis_from_sums

    out, work = config.out, config.out / ".work"
    total = np.zeros((config.size, config.size, 3), np.int64)
    products = np.zeros((3, 3), np.int64)
    summaries: dict[str, list[dict[str, Any]]] = {}
    for split, group in shards.items():
        summaries[split] = []
        for shard in group:
            contribution = work / f"{shard.name}.npz"
            summaries[split].append(_summary(contribution))
            with np.load(contribution) as sums:
                total += sums["total"]
                products += sums["products"]
    counts = {split: sum(s["records"] for s in group) for split, group in summaries.items()}
    skipped = [{"split": split} | entry for split, group in summaries.items() for s in group for entry in s["skipped"]]
    skipped += [{"split": s, "file": file, "reason": why} for s, group in source.outside.items() for file, why in group]
    if not counts["train"]:
        raise AlexNetError(f"{config.source}: none of its {len(skipped):,} training files is a picture")
    basis = basis_from_sums(counts["train"] * config.size**2, total.sum(axis=(0, 1)), products)
    arrays = io.BytesIO()
    np.savez(arrays, mean_image=(total / counts["train"]).astype(np.float32), **vars(basis))
    write_atomically(out / "statistics.npz", arrays.getvalue())
    write_atomically(out / "skipped.jsonl", "".join(json.dumps(entry) + "\n" for entry in skipped).encode())
    files = {
        split: [{key: s[key] for key in ("name", "records", "bytes", "sha256")} for s in group]
        for split, group in summaries.items()
    }
    hashes = "".join(s["sha256"] for group in files.values() for s in group)
    description = {
        "name": "imagenet",
        "source": source.kind,
        "size": config.size,
        "store": config.store,
        "classes": [f"{source.words[w]} ({w})" if w in source.words else w for w in source.wnids],
        "counts": counts,
        "skipped": len(skipped),
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
        "shards": files,
    }
    write_atomically(out / "dataset.json", to_bytes(description))
    shutil.rmtree(work)
    end = "" if counts.get("validation") else "; no validation images"
    print(f"{out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()) + f" images{end}")
    deviations = ", ".join(f"{value:.2f}" for value in np.sqrt(basis.eigenvalues))
    print(f"mean colour {', '.join(f'{v:.2f}' for v in basis.mean)}; PCA standard deviations {deviations} grey levels")
    if skipped:
        print(f"{len(skipped):,} files were skipped: {out / 'skipped.jsonl'} says which and why")
    return description


def main(args: Sequence[str]) -> None:
    """Parses the flags, prepares."""
    if not args or args[0] != "imagenet":
        if args and args[0] in ("-h", "--help"):
            cli.parse(PrepareConfig, ["--help"], "prepare imagenet")
        raise UsageError("which data set? python -m alexnet_jax.data.prepare imagenet --help")
    config = cli.parse(PrepareConfig, args[1:], "prepare imagenet")
    prepare(config)


if __name__ == "__main__":
    # Not as __main__: worker processes must find what they are sent by the module's own name.
    from alexnet_jax.data import prepare as module

    cli.run(module.main)
