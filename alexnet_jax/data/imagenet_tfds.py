"""ImageNet as TensorFlow Datasets (TFDS) has prepared it in array_record files, read without TensorFlow."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alexnet_jax.data.decode import ImageError
from alexnet_jax.errors import AlexNetError, reason, shown
from alexnet_jax.files import read_bytes

MAX_JSON_BYTES = 16 * 1024**2  # TFDS writes some kB


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """A split of a prepared data set; each process opens it when it reads the first example."""

    folder: str
    name: str

    @functools.cached_property
    def examples(self) -> Sequence[Mapping[str, Any]]:
        """TFDS's examples, with the image still encoded."""
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}
        examples: Sequence[Mapping[str, Any]] = _open(self.folder).as_data_source(self.name, decoders=decoders)
        return examples

    @functools.cached_property
    def labels(self) -> list[int]:
        """For each of TFDS's labels, the index of its class in the sorted class names."""
        names = _class_names(_open(self.folder))
        index = {name: label for label, name in enumerate(sorted(names))}
        return [index[name] for name in names]

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder, "name": self.name}


class TfdsExample(NamedTuple):
    """An example of a split; its label is stored with the image."""

    name: str
    split: TfdsSplit
    row: int

    def read(self) -> tuple[bytes, int]:
        """The encoded image and its label.

        Raises:
          ImageError: it has no label.
        """
        example = self.split.examples[self.row]
        label = int(example["label"])
        if not 0 <= label < len(self.split.labels):
            raise ImageError(f"it has no label: {label}")
        return bytes(example["image"]), self.split.labels[label]


def find_prepared(source: pathlib.Path) -> pathlib.Path | None:
    """`source`, or the newest version below it, or below `imagenet2012` in it."""
    found = [
        path.parent for place in ("", "*/", "imagenet2012/*/") for path in source.glob(f"{place}dataset_info.json")
    ]
    return max(found, key=lambda folder: [int(n) for n in re.findall("[0-9]+", folder.name)], default=None)


def open_splits(folder: pathlib.Path) -> tuple[list[str], dict[str, TfdsSplit]]:
    """The sorted class names and the splits "train" and "validation" of a prepared data set.

    Raises:
      AlexNetError: TFDS can't read it, or it has no labelled images in array_record files.
    """
    builder = _open(str(folder))
    if (file_format := builder.info.file_format.value) != "array_record":
        raise AlexNetError(f"{folder}: prepared as {file_format} instead of array_record")
    names = sorted(_class_names(builder))
    return names, {n: TfdsSplit(str(folder), n) for n in ("train", "validation") if n in builder.info.splits}


def _open(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        _refuse_foreign_features(pathlib.Path(folder))
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds
        raise AlexNetError(f"{folder}: TFDS can't read it ({reason(error)})") from error


def _refuse_foreign_features(folder: pathlib.Path) -> None:
    """TFDS imports the classes that features.json names: allows only its own.

    Raises:
      ValueError: the file can't be read, is no JSON, or names another class.
    """

    def own(entry: dict[str, Any]) -> dict[str, Any]:
        for key in ("pythonClassName", "python_class_name", "type"):
            if key in entry and not str(entry[key]).startswith("tensorflow_datasets."):
                raise ValueError(f"features.json names {shown(entry[key])}, which is not TFDS's")
        return entry

    try:
        data = read_bytes(folder / "features.json", MAX_JSON_BYTES)
    except OSError as error:
        raise ValueError(f"features.json: {reason(error)}") from error
    json.loads(data, object_hook=own)


def _class_names(builder: Any) -> list[str]:
    """The class of each of TFDS's labels."""
    names = getattr(dict(builder.info.features).get("label"), "names", None)
    if not names or "image" not in builder.info.features:
        raise AlexNetError(f"{builder.data_dir}: its examples have no image and label with class names")
    return list(names)
