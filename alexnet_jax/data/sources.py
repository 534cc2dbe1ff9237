"""ImageNet as it is published: image folders, the official tar files, Tiny ImageNet, a copy prepared by TFDS."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple, NoReturn

from alexnet_jax.data.decode import MAX_BYTES, ImageError, decode
from alexnet_jax.data.image_files import files_in, is_loop, is_system_file
from alexnet_jax.data.imagenet_tfds import TfdsExample, find_prepared, open_splits
from alexnet_jax.data.labels import (
    ANNOTATIONS,
    DEVKIT,
    SOLUTION,
    GroundTruth,
    image_key,
    read_annotations,
    read_ground_truth,
)
from alexnet_jax.data.tar_members import refuse_compressed, tar_members
from alexnet_jax.errors import AlexNetError, reason, shown
from alexnet_jax.files import read_bytes

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VALIDATION_FOLDERS = ("val", "validation")
NO_CLASS = "it is not in the folder of a class"
MAX_NAMES = 10  # of files or folders in a line of output
_SPLIT = re.compile(r"(.*img_)?(train(ing)?|val|valid|validation)([^a-z].*)?", re.IGNORECASE)  # a folder or archive
_SPLIT_NAMES = frozenset(("train", "val", "valid", "validation", "test"))
_ARCHIVES = frozenset((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip"))
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # control codes, and bytes that are not UTF-8


class Example(NamedTuple):
    """An image in a file and its label.

    Attributes:
      name: for messages.
      label: class index; -1 while unknown.
      path: path of the file.
      offset: position of the image in the file, in bytes.
      length: length of the image in bytes. None: the whole file.
    """

    name: str
    label: int
    path: str
    offset: int = 0
    length: int | None = None

    def read(self) -> tuple[bytes, int]:
        """The encoded image and its label.

        Raises:
          OSError: the file can't be read.
        """
        if self.length is None:
            return read_bytes(pathlib.Path(self.path), MAX_BYTES), self.label
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length), self.label


class Source(NamedTuple):
    """A data set that was found.

    Attributes:
      kind: for messages.
      wnids: the classes, sorted; a label is an index in this list.
      words: names of the classes in words, as far as known.
      splits: examples of "train" and, if there are any, "validation", in order.
      skipped: files of each split that belong to no class, with the reason.
      notes: lines to print, about what was left out or is missing.
    """

    kind: str
    wnids: list[str]
    words: dict[str, str]
    splits: dict[str, Sequence[Example | TfdsExample]]
    skipped: dict[str, list[tuple[str, str]]]
    notes: list[str]


class _Found(NamedTuple):
    """A split: examples with labels, files without a class and the reasons, and notes, as in `Source`."""

    examples: list[Example]
    skipped: list[tuple[str, str]]
    notes: list[str]


def find(source: pathlib.Path, labels: pathlib.Path | None = None) -> Source:
    """Finds the images of a source and their labels; `labels` is as in PrepareConfig.

    All files except system files are treated as images; those that can't be decoded are skipped later. A folder is a
    class if a file in it, or in its subfolders, can be decoded. Labels follow from the name of the class folder or of
    the image, never from its position.

    Raises:
      AlexNetError: no known layout was found, or a validation image has no label.
    """
    if labels is not None and labels.is_file():
        if labels.name not in (SOLUTION, f"{DEVKIT}.tar.gz"):
            raise AlexNetError(f"--labels {labels}: must be a folder, {SOLUTION} or {DEVKIT}.tar.gz")
        labels = labels.parent
    labels = source if labels is None else labels
    for folder in (source, labels):
        if not folder.is_dir():
            raise AlexNetError(f"{folder}: there is no such folder")
    try:
        used: tuple[str, ...]
        if (source / TRAIN_TAR).exists():
            found, used = _find_tars(source, labels), (TRAIN_TAR, VALIDATION_TAR)
        elif (source / "train").is_dir():
            found, used = _find_folders(source, labels), ("train", *VALIDATION_FOLDERS)
        elif (prepared := find_prepared(source)) is not None:
            found, used = _find_tfds(prepared), ("TFDS's files",)
        else:
            raise AlexNetError(f"{source}: contains neither train/, nor {TRAIN_TAR}, nor TFDS's imagenet2012")
        return found._replace(notes=found.notes + _unused(source, found.wnids, used))
    except OSError as error:
        raise AlexNetError(f"{error.filename or source}: can't be read ({reason(error)})") from error


def _unused(source: pathlib.Path, wnids: Sequence[str], used: Sequence[str]) -> list[str]:
    """A note about folders and archives that seem to contain images of these classes and are not read."""
    read = [source / name for name in used if (source / name).exists()]
    names = []
    for path in sorted(source.iterdir()):
        if is_system_file(path.name) or not path.exists() or any(map(path.samefile, read)):
            continue
        is_split = _SPLIT.fullmatch(path.name) is not None
        if path.is_dir():
            folders = next(os.walk(path), ("", [], []))[1]  # none if it can't be listed
            is_split = is_split or not set(wnids).isdisjoint(folders)
        elif path.suffix.lower() not in _ARCHIVES:
            continue
        names += [path.name] * is_split
    return _note(f"not used, because only {', '.join(used)} are read:", names)


def _note(text: str, names: Sequence[str]) -> list[str]:
    """A line that ends with the first few names; none if there are no names."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return [f"{text} {', '.join(map(shown, names[:MAX_NAMES]))}{more}"] if names else []


# Image folders


def _find_folders(source: pathlib.Path, labels: pathlib.Path) -> Source:
    folders, loose = _list_folders(source, source / "train")
    _refuse_splits(source / "train", folders)
    wnids, train = _keep_classes(folders, source / "train")
    truth = read_ground_truth(labels)
    splits, notes = {"train": train.examples}, train.notes
    skipped = {"train": train.skipped + [(example.name, NO_CLASS) for example in loose]}
    names = [name for name in VALIDATION_FOLDERS if (source / name).is_dir()]
    if len(names) > 1:
        raise AlexNetError(f"{source}: contains both val/ and validation/: remove or move one of them")
    for name in names:
        validation = _find_validation(source, source / name, wnids, truth)
        splits["validation"], skipped["validation"] = validation.examples, validation.skipped
        notes = notes + validation.notes
    notes = notes + _subfolders(source, wnids, [example for examples in splits.values() for example in examples])
    return Source("image folder", wnids, truth.words, {k: v for k, v in splits.items() if v}, skipped, notes)


def _list_folders(source: pathlib.Path, split: pathlib.Path) -> tuple[dict[str, list[Example]], list[Example]]:
    """The files below each subfolder of a split's folder, by the subfolder's name; and those beside the subfolders."""

    def stop(error: OSError) -> NoReturn:
        raise error

    def example(path: pathlib.Path) -> Example:
        return Example(path.relative_to(source).as_posix(), -1, str(path))

    folders, loose = {}, []
    for path in sorted((p for p in split.iterdir() if not is_system_file(p.name)), key=lambda p: p.name):
        if not path.is_dir():
            loose.append(example(path))
        elif is_loop(path):
            raise AlexNetError(f"{path}: a link to a folder that contains it: remove the link")
        else:
            boxes = f"{path.name}_boxes.txt"  # Tiny ImageNet's
            folders[path.name] = [example(file) for file in files_in(path, stop) if file.name != boxes]
    return folders, loose


def _refuse_splits(train: pathlib.Path, folders: Mapping[str, Sequence[Example]]) -> None:
    """Raises AlexNetError if `train` has no folders, or folders of splits instead of classes."""
    if not folders:
        raise AlexNetError(f"{train}: contains no folders of classes")
    for name, files in folders.items():
        if name.lower() in _SPLIT_NAMES and files and all(file.name.count("/") > 2 for file in files):
            raise AlexNetError(
                f"{train / name}: contains folders instead of images, so it is not a class: class folders must be "
                f"directly in train/ and val/; should --source be {train}?"
            )


def _keep_classes(found: Mapping[str, list[Example]], where: pathlib.Path) -> tuple[list[str], _Found]:
    """Sorts the classes and labels their training files; `where` is the folder or tar that contains them.

    Folders without an image are left out: as classes, they would change the labels of all others.
    """
    wnids: list[str] = []
    train = _Found([], [], [])
    empty = []
    for wnid in sorted(found):
        if _UNPRINTABLE.search(wnid):
            raise AlexNetError(f"{where}: the name of class {shown(wnid)} can't be printed: rename it")
        reasons = _undecodable(found[wnid])
        if len(reasons) == len(found[wnid]):
            empty.append(f"{where.name}/{wnid}")
            train.skipped.extend(reasons)
        else:
            train.examples.extend(example._replace(label=len(wnids)) for example in found[wnid])
            wnids.append(wnid)
    if not wnids:
        files = "they contain no files"
        if train.skipped:
            first = ": ".join(train.skipped[0])
            files = f"none of the {len(train.skipped):,} files is an image ({first})"
        raise AlexNetError(f"{where}: has no classes with images: {shown(files, 300)}")
    train.notes.extend(_note("not a class, because it contains no image:", empty))
    return wnids, train


def _undecodable(files: Sequence[Example]) -> list[tuple[str, str]]:
    """The files before the first that can be decoded, with the reasons."""
    reasons = []
    for file in files:
        try:
            decode(file.read()[0])
        except (ImageError, OSError) as error:
            reasons.append((file.name, reason(error)))
        else:
            break
    return reasons


def _find_validation(source: pathlib.Path, folder: pathlib.Path, wnids: Sequence[str], truth: GroundTruth) -> _Found:
    """Labels validation images by Tiny ImageNet's annotations, by their class folders, or by the ground truth."""
    folders, loose = _list_folders(source, folder)
    notes = _note("no files in", [f"{folder.name}/{name}" for name, files in folders.items() if not files])
    folders = {name: files for name, files in folders.items() if files}
    if (folder / ANNOTATIONS).exists():
        truth = truth._replace(labels=read_annotations(folder / ANNOTATIONS), origin=ANNOTATIONS)
        files = [file for group in (*folders.values(), loose) for file in group]
        files = [file for file in files if file.path != str(folder / ANNOTATIONS)]
        found = _label_by_name(files, truth, wnids, folder)
    elif folders:
        found = _label_by_folder(folders, loose, wnids, folder)
    else:
        found = _label_by_name(loose, truth, wnids, folder)
    for wnid in set(folders) & set(wnids):
        for file in folders[wnid]:
            if (other := truth.labels.get(image_key(file.name), wnid)) != wnid:
                raise AlexNetError(
                    f"{source / file.name}: in the folder of {wnid}, but its class in {truth.origin} is {other}"
                )
    return found._replace(notes=notes + found.notes)


def _label_by_folder(
    folders: Mapping[str, list[Example]], loose: Sequence[Example], wnids: Sequence[str], where: pathlib.Path
) -> _Found:
    index = {wnid: label for label, wnid in enumerate(wnids)}
    unknown = sorted(folders.keys() - index)
    if len(unknown) == len(folders):
        raise AlexNetError(f"{where / unknown[0]}: neither this nor any other folder is a class with training images")
    examples = [file._replace(label=index[key]) for key in folders if key in index for file in folders[key]]
    notes = _left_out(where, [key for key in unknown for _ in folders[key]])
    return _Found(examples, [(file.name, NO_CLASS) for file in loose], notes)


def _label_by_name(files: Sequence[Example], truth: GroundTruth, wnids: Sequence[str], where: pathlib.Path) -> _Found:
    """Labels images that are in no class folder; those of classes that are not in `wnids` are left out."""
    if files and not truth.labels:
        raise AlexNetError(f"{where}: its images have no labels: --labels must be a folder with {DEVKIT} or {SOLUTION}")
    found: dict[str, Example] = {}
    for file in files:
        key = image_key(file.name)
        if key not in truth.labels:
            first, last = shown(min(truth.labels)), shown(max(truth.labels))
            raise AlexNetError(
                f"{where}: {truth.origin} has no class for {shown(pathlib.PurePosixPath(file.name).name)}, "
                f"only for {first} to {last}: remove or rename the file"
            )
        if found.setdefault(key, file) is not file:
            raise AlexNetError(
                f"{where}: {shown(found[key].name)} and {shown(file.name)} have the same label: remove one"
            )
    index = {wnid: label for label, wnid in enumerate(wnids)}
    examples = [file._replace(label=index[wnid]) for key, file in found.items() if (wnid := truth.labels[key]) in index]
    unknown = [key for key in found if truth.labels[key] not in index]
    if unknown and not examples:
        raise AlexNetError(
            f"{where}: {shown(found[unknown[0]].name)} is of class {shown(truth.labels[unknown[0]])}, which has no "
            "training images; nor do the classes of the others"
        )
    notes = []
    if files and len(found) < len(truth.labels):
        notes = [f"{where.name}: {len(found):,} of the {len(truth.labels):,} images that {truth.origin} labels"]
    return _Found(examples, [], notes + _left_out(where, [truth.labels[key] for key in unknown]))


def _left_out(where: pathlib.Path, classes: Sequence[str]) -> list[str]:
    """A note about validation images of classes without training images; `classes` has the class of each image."""
    text = f"{where.name}: left out {len(classes):,} images of {len(set(classes)):,} classes without training images:"
    return _note(text, sorted(set(classes)))


def _subfolders(source: pathlib.Path, wnids: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """A note about subfolders of class folders.

    Raises:
      AlexNetError: there is one class, whose subfolders seem to be the classes.
    """
    parents = {str(pathlib.PurePosixPath(e.name).parent) for e in examples if e.name.count("/") > 2}
    parents = {name for name in parents if not re.fullmatch("[^/]+/[^/]+/images", name)}  # Tiny ImageNet's
    if len(wnids) == 1 and len(parents) > 1:
        raise AlexNetError(f"{source / 'train' / wnids[0]}: the only class, and it has subfolders: move them to train/")
    return _note("images in subfolders belong to the class of the folder above:", sorted(parents))


# The official tar files


def _find_tars(source: pathlib.Path, labels: pathlib.Path) -> Source:
    path = source / TRAIN_TAR
    with path.open("rb") as file:
        wnids, train = _keep_classes(_class_tars(file, path), path)
    truth, notes = read_ground_truth(labels), train.notes
    splits: dict[str, Sequence[Example | TfdsExample]] = {"train": train.examples}
    path = source / VALIDATION_TAR
    if path.exists():
        with path.open("rb") as file:
            members = tar_members(file, path, 0, path.stat().st_size)
        files = [Example(m.name, -1, str(path), m.offset_data, m.size) for m in members]
        validation = _label_by_name(files, truth, wnids, path)
        splits["validation"], notes = validation.examples, notes + validation.notes
    return Source("official tar files", wnids, truth.words, splits, {"train": train.skipped}, notes)


def _class_tars(file: BinaryIO, path: pathlib.Path) -> dict[str, list[Example]]:
    """The images of each class in the training tar, which contains a tar for each class."""
    classes: dict[str, list[Example]] = {}
    for tar in tar_members(file, path, 0, path.stat().st_size):
        wnid = pathlib.PurePosixPath(tar.name).stem
        refuse_compressed(file, tar.offset_data, f"{path}: {shown(tar.name)} in it")
        if not re.fullmatch(r"(.*/)?n[0-9]+\.tar", tar.name):
            raise AlexNetError(f"{path}: {shown(tar.name)} in it is not named like a class: n01440764.tar")
        if wnid in classes:
            raise AlexNetError(f"{path}: contains {wnid}.tar twice")
        classes[wnid] = [
            Example(f"{wnid}/{member.name}", -1, str(path), member.offset_data, member.size)
            for member in tar_members(file, path, tar.offset_data, tar.offset_data + tar.size)
        ]
    return classes


def _find_tfds(folder: pathlib.Path) -> Source:
    wnids, found = open_splits(folder)
    splits: dict[str, Sequence[Example | TfdsExample]] = {
        name: [TfdsExample(f"{name}/{row}", split, row) for row in range(len(split.examples))]
        for name, split in found.items()
    }
    if not splits.get("train"):
        raise AlexNetError(f"{folder}: has no training examples")
    return Source("TFDS imagenet2012", wnids, {}, splits, {}, [])
