"""CIFAR-10 through TensorFlow Datasets: downloaded, prepared and read back without TensorFlow.

The official builder reads what is written here, but needs TensorFlow to write it (to extract the archive and to code
PNG). This one has its name, version and features, and leaves those two things to `tarfile` and Pillow. It writes
array_record files, the format that TFDS can read without TensorFlow.
"""

import contextlib
import io
import itertools
import os
import pathlib
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from alexnet_jax.config import shown
from alexnet_jax.datasets.cifar10_batches import (
    BINARY_FOLDER,
    CLASS_NAMES,
    IMAGE_SHAPE,
    RECORD_BYTES,
    RECORDS_PER_BATCH,
    TEST_BATCH,
    TRAIN_BATCHES,
    URL,
    parse_binary,
)
from alexnet_jax.datasets.dataset import Split
from alexnet_jax.errors import AlexNetError
from alexnet_jax.runtime import require_array_record

# TFDS retries 10 times with doubling pauses, 204 s in all; 3 times take 1.2 s.
_DOWNLOAD_RETRIES = 3

_MAX_JSON_BYTES = 16 * 1024**2  # TFDS writes some 3 kB


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # a keyword of TFDS's
    """TFDS's `cifar10` 3.0.2, prepared without TensorFlow.

    Args:
      data_dir: TFDS's data_dir; the data set lies in `cifar10/3.0.2` under it.
      url: the archive; TFDS must have its checksum registered.
      records_per_batch: images in each of its six files.
    """

    VERSION = tfds.core.Version("3.0.2")

    def __init__(self, *, data_dir: pathlib.Path, url: str = URL, records_per_batch: int = RECORDS_PER_BATCH):
        self._url = url
        self._records_per_batch = records_per_batch
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        # Not inherited: importing the official builder imports a hundred others, and what each of them needs.
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=IMAGE_SHAPE),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="60,000 colour images of 32 x 32 pixels in 10 classes: 50,000 to train on, 10,000 to test on.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        archive = dl_manager.download(self._url)
        batches = _read_archive(os.fspath(archive), self._records_per_batch)
        return {
            "train": self._generate_examples("train", [batches[name] for name in TRAIN_BATCHES]),
            "test": self._generate_examples("test", [batches[TEST_BATCH]]),
        }

    def _generate_examples(self, split: str, batches: list[Split]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the official builder's keys and ids: TFDS shuffles by the key, the id keeps the published order."""
        images = itertools.chain.from_iterable(batch.images for batch in batches)
        labels = itertools.chain.from_iterable(batch.labels for batch in batches)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # TFDS codes an image of Pillow as PNG with Pillow, but an array with TensorFlow.
            yield index, {"id": _example_id(split, index), "image": PIL.Image.fromarray(image), "label": int(label)}


def prepare(root: pathlib.Path, *, url: str = URL, records_per_batch: int = RECORDS_PER_BATCH) -> None:
    """Downloads the archive, checks it and writes `root/cifar10/3.0.2`.

    TFDS writes to a temporary folder and renames it when all is there. The archive (170 MB) isn't kept.

    Raises:
      AlexNetError: the archive can't be had or isn't the published one, or `root` can't be written.
    """
    require_array_record()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            # A folder of our own, as TFDS leaves an archive with a wrong checksum behind.
            tempfile.TemporaryDirectory(prefix="cifar10-download-", dir=root) as download_dir,
            tfds.core.utils.temporary_assignment(downloader, "MAX_RETRIES", _DOWNLOAD_RETRIES),
            contextlib.redirect_stdout(sys.stderr),  # TFDS reports its progress there in any case
        ):
            builder = Cifar10(data_dir=root, url=url, records_per_batch=records_per_batch)
            builder.download_and_prepare(
                download_dir=download_dir,
                download_config=tfds.download.DownloadConfig(force_checksums_validation=True, try_download_gcs=False),
                file_format="array_record",
            )
    except NonMatchingChecksumError as error:
        expected_and_got = " ".join(str(error).split("\n")[1:3])
        raise AlexNetError(
            f"{url}: the download isn't the published archive ({expected_and_got}); nothing of it was kept: start again"
        ) from error
    except Exception as error:
        if os.path.isdir(_directory(root)):
            return  # another process, started at the same time, was first
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AlexNetError(
            f"{url} could not be downloaded and prepared in {root} ({reason}); nothing of it was kept: start again"
        ) from error


def read(root: pathlib.Path, records_per_batch: int = RECORDS_PER_BATCH) -> tuple[Split, Split]:
    """Reads `root/cifar10/3.0.2`, which `prepare` or the official builder wrote.

    Returns:
      The published training images (5 batches) and test images (1 batch), in the published order.

    Raises:
      AlexNetError: it is damaged, incomplete or in a format that only TensorFlow reads.
    """
    require_array_record()
    directory = _directory(root)
    try:
        if not os.path.exists(directory / "dataset_info.json"):
            raise FileNotFoundError("it has no dataset_info.json")
        for path in directory.iterdir():
            if path.is_fifo():  # reading it would wait for a writer
                raise OSError(f"{path.name} is a pipe")
            if path.suffix == ".json" and path.stat().st_size > _MAX_JSON_BYTES:
                raise OSError(f"{path.name} is too long")
        builder = Cifar10(data_dir=root)
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD in formats:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # Pillow: a huge image; NumPy: NaN as a whole number
                warnings.simplefilter("ignore", UserWarning)  # Pillow: an animation that is none
                train = _read_split(builder, "train", len(TRAIN_BATCHES) * records_per_batch)
                return train, _read_split(builder, "test", records_per_batch)
    except Exception as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 300)
        raise AlexNetError(
            f"{directory}: damaged or incomplete ({reason}); delete this folder, and it is prepared again"
        ) from error
    names = ", ".join(sorted(file_format.value for file_format in formats)) or "no known format"
    raise AlexNetError(
        f"{directory}: prepared as {names} instead of array_record, the format that needs no TensorFlow; "
        "give another --data-dir"
    )


def _read_split(builder: Cifar10, split: str, size: int) -> Split:
    examples = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    if len(examples) != size:
        raise ValueError(f"{split} has {len(examples):,} images instead of {size:,}")
    images = np.empty((size, *IMAGE_SHAPE), np.uint8)
    labels = np.empty(size, np.int32)
    rows = {_example_id(split, index).encode(): index for index in range(size)}
    for example in examples:
        row = rows.pop(example["id"], None)  # so that no id counts twice, and none is missing in the end
        if row is None:
            raise ValueError(f"the id {example['id']!r} in {split} is repeated or unknown")
        with PIL.Image.open(io.BytesIO(example["image"]), formats=["PNG"]) as image:
            if image.mode != "RGB" or image.size != (32, 32):
                raise ValueError(f"{example['id']!r} is {image.mode} of {image.size} pixels instead of RGB of 32 x 32")
            images[row] = np.asarray(image)
        if not 0 <= example["label"] < len(CLASS_NAMES):
            raise ValueError(f"{example['id']!r} has label {example['label']}")
        labels[row] = example["label"]
    return Split(images=images, labels=labels)


def _directory(root: pathlib.Path) -> pathlib.Path:
    return root / Cifar10.name / str(Cifar10.VERSION)


def _example_id(split: str, index: int) -> str:
    return f"{split}_{index:05d}"


def _read_archive(path: str, records_per_batch: int) -> dict[str, Split]:
    """The six batches by name, in one pass over the archive; no other member is opened, none is written to disk."""
    members = {f"{BINARY_FOLDER}/{name}.bin": name for name in (*TRAIN_BATCHES, TEST_BATCH)}
    batches = {}
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            if member.name in members and (file := archive.extractfile(member)):
                data = file.read(records_per_batch * RECORD_BYTES + 1)
                batches[members[member.name]] = parse_binary(data, records_per_batch, member.name)
    if missing := sorted(set(members.values()) - set(batches)):
        raise ValueError(f"the archive lacks {', '.join(missing)}")
    return batches
