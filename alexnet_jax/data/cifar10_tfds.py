"""CIFAR-10 as prepared by TensorFlow Datasets (TFDS), read without TensorFlow.

This needs a copy in array_record files, as `tfds build --file_format array_record` writes it.
"""

import io
import os
import pathlib
import warnings

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # noqa: F401  # TFDS imports it late, and would report a failure as damaged data

from alexnet_jax.data.cifar10_files import CLASS_NAMES, IMAGE_SHAPE, RECORDS_PER_BATCH
from alexnet_jax.data.dataset import Split
from alexnet_jax.data.imagenet_tfds import MAX_JSON_BYTES
from alexnet_jax.errors import AlexNetError, reason
from alexnet_jax.runtime import require_array_record


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # a keyword of TFDS's
    """TFDS's `cifar10` 3.0.2, read-only.

    `tfds.builder_from_directory` is not used, because it takes the features from a file beside the data, which can name
    any class to import. The official builder is not used, because importing it imports a hundred others, with
    everything they need.
    """

    VERSION = tfds.core.Version("3.0.2")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=IMAGE_SHAPE),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager: object) -> None:
        raise NotImplementedError

    def _generate_examples(self) -> None:
        raise NotImplementedError


def read(root: pathlib.Path, records: int = RECORDS_PER_BATCH) -> list[Split]:
    """Reads `root/cifar10/3.0.2`: five training batches and the test batch, in the published order.

    Args:
      root: TFDS's data_dir.
      records: images in each batch.

    Raises:
      AlexNetError: it is damaged, incomplete or in a format that only TensorFlow reads.
    """
    require_array_record()
    folder = root / Cifar10.name / str(Cifar10.VERSION)
    try:
        if not os.path.exists(folder / "dataset_info.json"):
            raise FileNotFoundError("it has no dataset_info.json")
        for path in folder.iterdir():
            if path.is_fifo():  # reading it would wait for a writer
                raise OSError(f"{path.name} is a pipe")
            if path.suffix == ".json" and path.stat().st_size > MAX_JSON_BYTES:
                raise OSError(f"{path.name} is too long")
        builder = Cifar10(data_dir=root)
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD in formats:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # Pillow: a huge image; NumPy: NaN as a whole number
                warnings.simplefilter("ignore", UserWarning)  # Pillow: a malformed animation
                train = _read_split(builder, "train", 5 * records)
                test = _read_split(builder, "test", records)
            ends = range(records, 6 * records, records)
            return [Split(train.images[end - records : end], train.labels[end - records : end]) for end in ends] + [
                test
            ]
    except Exception as error:  # a damaged copy causes errors of many kinds
        raise AlexNetError(
            f"{folder}: damaged or incomplete ({reason(error, 300)}); delete this folder, or give another --data-dir"
        ) from error
    names = ", ".join(sorted(file_format.value for file_format in formats)) or "no known format"
    raise AlexNetError(
        f"{folder}: prepared as {names} instead of array_record, the format that needs no TensorFlow; give another "
        "--data-dir"
    )


def _read_split(builder: Cifar10, split: str, size: int) -> Split:
    examples = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    if len(examples) != size:
        raise ValueError(f"{split} has {len(examples):,} images instead of {size:,}")
    images = np.empty((size, *IMAGE_SHAPE), np.uint8)
    labels = np.empty(size, np.int32)
    rows = {f"{split}_{index:05d}".encode(): index for index in range(size)}  # TFDS shuffles the examples
    for example in examples:
        row = rows.pop(example["id"], None)  # so that no id counts twice and a missing one is noticed
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
