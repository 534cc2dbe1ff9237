"""A data set of the user's own images: a folder with a folder of images for each class.

Two layouts are read. `DIR/CLASS/...`: a part of the images is held out for validation. `DIR/train/CLASS/...` with
`val`, `valid` or `validation`, and/or `test`, beside it; if neither exists, a part is held out as well.
Images may be in subfolders of their class.
"""

import concurrent.futures
import hashlib
import math
import os
import pathlib
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import platformdirs
import tqdm

from alexnet_jax import runtime
from alexnet_jax.config.flags import flag
from alexnet_jax.data import decode, image_files, sources
from alexnet_jax.data.dataset import ArrayDataset, Dataset, Split
from alexnet_jax.data.imagenet_tfds import TfdsExample
from alexnet_jax.data.labels import ANNOTATIONS
from alexnet_jax.errors import AlexNetError, UsageError, is_one_line, reason, shown, warn
from alexnet_jax.files import locked, read_bytes

_SPLIT = re.compile(r"(.*[^a-z])?(train(ing)?|val(id|idation)?|test(ing)?)([^a-z].*)?", re.IGNORECASE)
FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
MOST_CLASSES = 1000
MOST_BYTES = 2 * 2**30  # of decoded images in memory
FEW = 10  # training images of a class below which a warning names it
IMBALANCE = 10  # ratio of the largest class to the smallest at which a warning names both
NAMED = 3  # files or classes that a message names


class Image(NamedTuple):
    """An image file.

    Attributes:
      path: of the file.
      label: class index.
      name: its class and its path within it.
    """

    path: pathlib.Path
    label: int
    name: str

    @property
    def position(self) -> float:
        """SHA-256 of the name, as a number in [0, 1)."""
        text = unicodedata.normalize("NFC", self.name)
        return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:6]) / 2**48


class Listing(NamedTuple):
    """The images of a folder, not yet decoded.

    Attributes:
      source: the folder, and what was held out, in words.
      classes: their names, sorted.
      images: of each split, in the order of their positions, which mixes the classes.
      validation_share: of the images that is held out; None if there are images for validation or testing.
    """

    source: str
    classes: list[str]
    images: dict[str, list[Image]]
    validation_share: float | None = None


def load(
    root: pathlib.Path | None,
    image_size: int,
    validation_share: float,
    scaling: str = "square",
    loader_workers: int = 0,
) -> Dataset:
    """Reads a folder of images: into memory, or, if they are more than `MOST_BYTES`, prepared once and then streamed.

    Each image is decoded as viewers show it (EXIF orientation, transparent parts white) and scaled. Files that can't be
    decoded are left out, with a warning that names the first.

    Args:
      root: the folder; or one that `prepare.prepare_folder` has written.
      image_size: side of the images in pixels.
      validation_share: as for `find`.
      scaling: a key of `decode.SCALINGS`.
      loader_workers: processes that decode images while they are streamed; 0: threads.

    Raises:
      UsageError: `root` is None, nothing would be held out, or prepared images have another size.
      AlexNetError: as `find`, or a class has no training images.
    """
    if root is None:
        raise UsageError("--dataset folder needs --data-dir: a folder that has a folder of images for each class")
    root = pathlib.Path(os.path.abspath(root))
    if (root / "dataset.json").is_file() and ((root / "prepare.lock").exists() or any(root.glob("*.array_record"))):
        return _open(root, image_size, scaling, validation_share, loader_workers)
    listing = find(root, validation_share)
    if sum(map(len, listing.images.values())) * image_size**2 * 3 > MOST_BYTES:
        labels = [image.label for image in listing.images["train"]]
        _report_classes(root, np.bincount(labels, minlength=len(listing.classes)), listing.classes)
        return _prepared(listing, image_size, scaling, loader_workers)
    splits = _read(listing.images, image_size, decode.SCALINGS[scaling])
    for split, read in splits.items():
        if not len(read):
            raise AlexNetError(
                f"{root}: no image for {split} that can be decoded: add images, or change --validation-share"
            )
    _report_classes(root, np.bincount(splits["train"].labels, minlength=len(listing.classes)), listing.classes)
    _report_copies(splits)
    return ArrayDataset("folder", listing.source, tuple(listing.classes), splits)


def find(root: pathlib.Path, validation_share: float) -> Listing:
    """Lists the images of a folder.

    Where there is neither a validation nor a test folder, an image is held out for validation if its position, a hash
    of its name, is below `validation_share`: whatever is added to the folder later, it stays on its side.

    Raises:
      UsageError: nothing would be held out.
      AlexNetError: the folder is not of one of the two layouts, has fewer than two classes or more than `MOST_CLASSES`,
        or two whose names differ only in case or form.
    """
    root = pathlib.Path(os.path.abspath(root))
    found = _find(root)
    classes = list(found["train"])
    _check_classes(root, classes)
    images = {
        split: sorted(
            (
                Image(path, classes.index(name), f"{name}/{path.relative_to(folder).as_posix()}")
                for name, (folder, paths) in of_split.items()
                for path in paths
            ),
            key=lambda image: (image.position, str(image.path)),
        )
        for split, of_split in found.items()
    }
    if len(images) > 1:
        return Listing(str(root), classes, images)
    if not validation_share:
        raise UsageError(f"--validation-share 0: {root} has no validation or test images, so some are needed")
    everything = images["train"]
    images = {
        "train": [image for image in everything if image.position >= validation_share],
        "validation": [image for image in everything if image.position < validation_share],
    }
    held_out = f"{root}, {validation_share:.0%} of the names held out for validation"
    return Listing(held_out, classes, images, validation_share)


def as_source(listing: Listing) -> sources.Source:
    """The listing as `prepare.write` takes it."""
    splits: dict[str, Sequence[sources.Example | TfdsExample]] = {
        split: [sources.Example(image.name, image.label, str(image.path)) for image in images]
        for split, images in listing.images.items()
    }
    return sources.Source(listing.source, listing.classes, {}, splits, {}, [])


def settings(listing: Listing, scaling: str) -> dict[str, Any]:
    """What `prepare.Output` says about images that are prepared as they are read here."""
    share = listing.validation_share
    return {"name": "folder", "scaling": scaling, "as_seen": True, "validation_share": share}


def _prepared(listing: Listing, image_size: int, scaling: str, loader_workers: int) -> Dataset:
    """The images from the user's cache, where they are prepared if they are not there, or not complete.

    The folder's name is a hash of the settings and of the files' names, sizes and times.
    """
    from alexnet_jax.data import prepare

    runtime.require_array_record()
    digest = hashlib.sha256(f"{listing.source}\0{image_size}\0{scaling}\0".encode(errors="surrogateescape"))
    for split, images in listing.images.items():
        for image in images:
            try:
                found = image.path.stat()
            except OSError:
                continue  # it can't be read either, and will be named
            text = f"{split}\0{image.label}\0{image.path}\0{found.st_size}\0{found.st_mtime_ns}\0"
            digest.update(text.encode(errors="surrogateescape"))
    out = platformdirs.user_cache_path("alexnet_jax") / "folders" / digest.hexdigest()[:16]
    share = listing.validation_share
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlexNetError(f"{out.parent}: can't be made ({reason(error)})") from error
    waiting = f"waiting for another process, which prepares the same images in {out}"
    with locked(out.with_name(f"{out.name}.lock"), "is preparing the same images", math.inf, waiting):
        if (out / "dataset.json").exists():
            try:
                dataset = _open(out, image_size, scaling, share, loader_workers)
                dataset.statistics()
                return dataset
            except UsageError:
                raise
            except AlexNetError as error:
                warn(f"{error}; this is done again now")
                shutil.rmtree(out)
        count = sum(map(len, listing.images.values()))
        print(f"{count:,} images don't fit into memory: they are scaled once, into {out}", flush=True)
        prepare.write(as_source(listing), prepare.Output(out, image_size, "jpeg", **settings(listing, scaling)))
        return _open(out, image_size, scaling, share, loader_workers)


def _open(
    folder: pathlib.Path, image_size: int, scaling: str, validation_share: float | None, loader_workers: int
) -> Dataset:
    """Opens prepared images; raises UsageError if they were prepared with other settings."""
    from alexnet_jax.data import streamed

    dataset = streamed.open_prepared(folder, loader_workers)
    description = dataset.description
    if dataset.name != "folder":
        raise UsageError(f"--dataset folder: {folder} contains prepared ImageNet: use --dataset imagenet")
    given = {"image_size": image_size, "scaling": scaling, "validation_share": validation_share}
    had = {"image_size": description["size"]} | {
        name: description.get(name) for name in ("scaling", "validation_share")
    }
    for name, value in given.items():
        if (before := had[name]) not in (None, value):
            raise UsageError(f"{flag(name)} {value}: {folder} was prepared with {before}; give {flag(name)} {before}")
    return dataset


_Classes = dict[str, tuple[pathlib.Path, list[pathlib.Path]]]  # by name, sorted: folder and images


def _find(root: pathlib.Path) -> dict[str, _Classes]:
    """The images of each split and class."""
    if not os.path.exists(root):
        raise AlexNetError(f"{root}: no such folder; name an existing one")
    if not os.path.isdir(root):
        raise AlexNetError(f"{root} is a file: name the folder that has a folder of images for each class")
    train = root / "train"
    inside = _classes(train) if train.is_dir() else {}
    if not inside:
        classes = _classes(root)
        if not classes:
            raise AlexNetError(
                f"{root} has no images in folders: make a folder for each class and put its images there"
            )
        if all(map(_SPLIT.fullmatch, classes)):
            raise AlexNetError(
                f"{root}: {shown(' and '.join(classes))} look like splits, not classes: name them train, val and test, "
                "each with a folder of images for each class"
            )
        return {"train": classes}
    if loose := _loose(train):
        raise AlexNetError(
            f"{train} has images beside folders of images ({shown(loose[0].name)}): is it a split or a class? Move "
            "them into their class's folder"
        )
    found = {"train": inside}
    for split in ("validation", "test"):
        folders = [folder for name in FOLDERS[split] if (folder := root / name).is_dir()]
        if len(folders) > 1:
            raise AlexNetError(f"{root} has {' and '.join(folder.name for folder in folders)}: keep one of them")
        if not folders:
            continue
        if (folders[0] / ANNOTATIONS).exists():
            raise AlexNetError(
                f"{folders[0]} has its labels in {ANNOTATIONS} (Tiny ImageNet): use python -m alexnet_jax.data.prepare "
                "imagenet, and --dataset imagenet"
            )
        classes = _classes(folders[0])
        if not classes:
            warn(f"{folders[0]}: not read, because it has no folder of images for each class")
        else:
            if unknown := [name for name in classes if name not in inside]:
                raise AlexNetError(f"{folders[0]}: class {shown(unknown[0])} has no folder in {train}")
            found[split] = classes
    others = sorted(path.name for path in _entries(root) if path.is_dir())
    if unused := [name for name in others if not any(name in names for names in FOLDERS.values())]:
        warn(f"{root}: not read, because there is a folder train: {shown(', '.join(unused), 200)}")
    return found


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a folder has, without system files, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if not image_files.is_system_file(path.name))
    except OSError as error:
        raise AlexNetError(f"{folder}: can't be read ({reason(error)})") from error


def _loose(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in _entries(folder) if path.is_file() and image_files.looks_like_image(path)]


def _classes(folder: pathlib.Path) -> _Classes:
    """The folders with images in a folder, by name."""

    def stop(error: OSError) -> None:
        raise AlexNetError(f"{error.filename}: can't be read ({reason(error)})") from error

    classes: _Classes = {}
    empty = []
    for path in _entries(folder):
        if path.is_dir() and not image_files.is_loop(path):
            if not is_one_line(path.name):
                raise AlexNetError(f"{folder}: the name {path.name!r} contains a control character: rename it")
            images = [file for file in image_files.files_in(path, stop) if image_files.looks_like_image(file)]
            if images:
                name = unicodedata.normalize("NFC", path.name)
                if name in classes:
                    raise AlexNetError(f"{folder} has two folders {shown(name)} in different Unicode forms: merge them")
                classes[name] = (path, images)
            else:
                empty.append(path.name)
    if classes and empty:
        warn(f"{folder}: {len(empty)} folder(s) without images are left out: {shown(', '.join(empty[:NAMED]), 200)}")
    if classes and (loose := _loose(folder)):
        warn(f"{folder}: {len(loose)} image(s) in no class's folder are left out: {shown(loose[0].name)}")
    return classes


def _check_classes(root: pathlib.Path, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise AlexNetError(f"{root} has images of one class, {shown(classes[0])}: at least two are needed")
    if len(classes) > MOST_CLASSES:
        raise AlexNetError(f"{root} has {len(classes):,} classes; at most {MOST_CLASSES:,} are possible")
    folded: dict[str, str] = {}
    for name in classes:
        other = folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise AlexNetError(
                f"{root}: {shown(other)} and {shown(name)} differ only in case or form: one class or two?"
            )


def _read(
    images: Mapping[str, Sequence[Image]], size: int, to_square: Callable[[PIL.Image.Image, int], np.ndarray]
) -> dict[str, Split]:
    """Decodes all images."""
    broken: list[tuple[pathlib.Path, str]] = []

    def pixels(image: Image) -> np.ndarray | None:
        try:
            data = read_bytes(image.path, decode.MAX_BYTES)
            return to_square(decode.decode(data, as_seen=True), size)
        except (OSError, ValueError, decode.ImageError) as error:
            if not image_files.is_of_the_file(error):
                raise AlexNetError(
                    f"{image.path}: can't be read now ({reason(error)}): repeat the command once it can"
                ) from error
            broken.append((image.path, reason(error)))
            return None

    total = sum(map(len, images.values()))
    splits = {}
    with (
        concurrent.futures.ThreadPoolExecutor(runtime.available_cores()) as pool,
        tqdm.tqdm(total=total, unit=" images", desc="decoding", leave=False, delay=1, disable=None) as bar,
    ):
        for split, ordered in images.items():
            kept, labels = [], []
            for image, found in zip(ordered, pool.map(pixels, ordered), strict=True):
                bar.update()
                if found is not None:
                    kept.append(found)
                    labels.append(image.label)
            stacked = np.stack(kept) if kept else np.zeros((0, size, size, 3), np.uint8)
            splits[split] = Split(stacked, np.array(labels, np.int32))
    for path, why in sorted(broken)[:NAMED]:
        warn(f"{path}: left out: {why}")
    if len(broken) > NAMED:
        warn(f"{len(broken) - NAMED:,} more files are left out")
    return splits


def _report_classes(root: pathlib.Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Refuses classes without training images; warns of few and of imbalance."""
    by_count = sorted(zip(counts.tolist(), classes, strict=True))
    if not by_count[0][0]:
        raise AlexNetError(f"{root}: class {shown(by_count[0][1])} has no image to train on: add some or remove it")
    few = [f"{shown(name)} {count}" for count, name in by_count if count < FEW]
    if few:
        warn(f"{len(few)} class(es) with fewer than {FEW} images to train on: {', '.join(few[:NAMED])}")
    if by_count[-1][0] >= IMBALANCE * by_count[0][0]:
        (least, smallest), (most, largest) = by_count[0], by_count[-1]
        warn(f"the classes are unequal: {most:,} images of {shown(largest)}, {least:,} of {shown(smallest)}")


def _report_copies(splits: Mapping[str, Split]) -> None:
    """Warns of images that are in two splits."""
    seen = set(_digests(splits["train"]))
    for split in splits.keys() - {"train"}:
        if copies := sum(digest in seen for digest in _digests(splits[split])):
            warn(f"{copies:,} of the {len(splits[split]):,} images for {split} are also among those to train on")


def _digests(split: Split) -> Iterator[bytes]:
    return (hashlib.sha256(image.tobytes()).digest() for image in split.images)
