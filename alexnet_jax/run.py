"""A run's folder: its files, and `open_run`, which takes a finished run apart.

config.json      every setting and the versions, also those with which it was trained before it was resumed
dataset.json     name, class names, image shape, fingerprint of the data
statistics.npz   mean image and PCA basis of the training images
metrics.jsonl    one JSON object a line
train.lock       locked while a process trains here, whose number it holds
checkpoints/     one folder a step
plots/  eval/    pictures, results of eval.py
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import warnings
import zipfile
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

import alexnet_jax
from alexnet_jax import augment, models, optimizer, runtime, steps
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import (
    PositiveInt,
    TrainConfig,
    differing_settings,
    expanded,
    flag,
    flat_items,
    from_json,
    is_one_line,
    shown,
    to_json,
)
from alexnet_jax.errors import AlexNetError, UsageError, warn
from alexnet_jax.files import locked, read_bytes, to_bytes, write_atomically
from alexnet_jax.metrics import softmax

_MAX_BYTES = 16 * 1024**2  # of config.json, dataset.json, statistics.npz; the largest has some 12 kB
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    own = {"alexnet-jax": alexnet_jax.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def _one_line(text: str) -> str:
    if not is_one_line(text):
        raise ValueError("a text without control characters is needed")
    return text


def _distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(texts)) < len(texts):
        raise ValueError("names must differ")
    return texts


_Text = Annotated[str, pydantic.Field(min_length=1, max_length=10_000), pydantic.AfterValidator(_one_line)]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run remembers of its data set."""

    name: _Text
    source: _Text
    class_names: Annotated[tuple[_Text, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_distinct)]
    image_shape: Annotated[tuple[PositiveInt, ...], pydantic.Field(min_length=3, max_length=3)]
    counts: dict[Annotated[str, pydantic.Field(pattern="^(train|validation|test)$")], PositiveInt]
    fingerprint: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]  # SHA-256

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")


class RunFolder:
    """Paths in a run's folder, and reading and writing of what describes the run."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.dataset = path / "dataset.json"
        self.statistics = path / "statistics.npz"
        self.metrics = path / "metrics.jsonl"
        self.lock = path / "train.lock"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.eval = path / "eval"

    def exists(self) -> bool:
        """Whether a run is there."""
        return self.config.exists()

    def claim(self) -> TextIO:
        """Makes the folder if there is none, and locks it for training; closing the returned file unlocks it.

        Raises:
          UsageError: the folder holds something else.
          AlexNetError: another process trains there, or the folder can't be written.
        """
        try:
            # The lock file comes first, so a folder with it is a run's, also if the first start was killed at once.
            if not self.exists() and not self.lock.exists() and self.path.exists() and any(self.path.iterdir()):
                raise UsageError(f"--workdir {self.path} is not empty and holds no run: choose another folder")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlexNetError(f"can't use --workdir {self.path}: {error.strerror or error}") from error
        return locked(self.lock, "is training there; wait for it, or choose another --workdir")

    def prepare(self, config: TrainConfig, info: DatasetInfo, statistics: augment.Statistics) -> None:
        """Describes a new run, or checks that the run there may go on with this configuration and data.

        Raises:
          UsageError: the run there has another setting.
          AlexNetError: the folder can't be written, or the data is not the run's.
        """
        if self.exists():
            old = self.read_config()
            if names := differing_settings(old, config):
                old_value, new_value = flat_items(old)[names[0]], flat_items(config)[names[0]]
                raise UsageError(
                    f"{self.path} holds a run with {flag(names[0])} {old_value}, not {new_value}: "
                    "go on with its settings or choose another --workdir"
                )
            if config.schedule.epochs < old.schedule.epochs:
                raise UsageError(
                    f"{self.path} holds a run of --epochs {old.schedule.epochs}: {config.schedule.epochs} is fewer; "
                    "epochs may only grow"
                )
            if self.read_dataset().fingerprint != info.fingerprint:
                raise AlexNetError(f"{self.path} was trained on other images than those from {info.source}")
        elif any(self.checkpoints.glob("[0-9]*")):
            raise AlexNetError(
                f"{self.config} is missing, but there are checkpoints: copy it back, or choose another --workdir"
            )
        else:
            write_atomically(self.dataset, to_bytes(dataclasses.asdict(info)))
        if not self.exists() or not self.statistics.exists():
            arrays = io.BytesIO()
            np.savez(arrays, mean_image=statistics.mean_image, **vars(statistics.basis))
            write_atomically(self.statistics, arrays.getvalue())
        # Last, for its presence says that a run is here.
        described = to_json(_with_absolute_data_dir(config, info)) | self._versions()
        write_atomically(self.config, to_bytes(described))

    def _versions(self) -> dict[str, Any]:
        """Versions of now and, of a run that is resumed, those of before; warns if they differ."""
        now = versions()
        described = self._read_json(self.config) if self.exists() else {}
        before, earlier = described.get("versions"), described.get("earlier_versions") or []
        if isinstance(before, dict) and before != now:
            changed = [f"{n} {shown(before.get(n))} -> {now[n]}" for n in now if before.get(n) != now[n]]
            warn(f"{self.path} resumes with other versions ({', '.join(changed)}): results may differ in the last bits")
            earlier = [*earlier, before]
        return {"versions": now} | ({"earlier_versions": earlier} if earlier else {})

    def read_config(self) -> TrainConfig:
        """The run's settings."""
        settings = self._read_json(self.config)
        for name in ("versions", "earlier_versions"):
            settings.pop(name, None)
        try:
            return from_json(settings)
        except UsageError as error:
            raise AlexNetError(f"{self.config}: {error}") from error

    def read_dataset(self) -> DatasetInfo:
        """What the run remembers of its data set."""
        try:
            return pydantic.TypeAdapter(DatasetInfo).validate_python(self._read_json(self.dataset))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = shown(" ".join(map(str, first["loc"])))
            reason = f"{where}: {shown(first['input'])}: {first['msg'].lower()}"
            raise AlexNetError(f"{self.dataset}: not what this program wrote ({reason})") from None

    def read_statistics(self) -> augment.Statistics:
        """Mean image and PCA basis of the run's training images."""
        # Name of the array: its shape (None: any), least and largest value.
        arrays = {
            "mean_image": (None, 0, 255),
            "mean": ((3,), 0, 255),
            "eigenvalues": ((3,), 0, 255**2 * 3),
            "eigenvectors": ((3, 3), -1.001, 1.001),
        }
        found = {}
        try:
            data = io.BytesIO(read_bytes(self.statistics, _MAX_BYTES))
            if sum(member.file_size for member in zipfile.ZipFile(data).infolist()) > _MAX_BYTES:
                raise ValueError("it unpacks to too much")
            with warnings.catch_warnings(), np.load(data, allow_pickle=False) as file:
                warnings.simplefilter("ignore")
                for name, (shape, low, high) in arrays.items():
                    found[name] = array = file[name]
                    if array.dtype not in (np.float32, np.float64) or shape not in (None, array.shape):
                        raise ValueError(f"{name} is {array.dtype} {array.shape}, floats {shape or ''} are needed")
                    if not ((array >= low) & (array <= high)).all():
                        raise ValueError(f"a value of {name} is not in {low} to {high}")
        except Exception as error:  # a damaged archive raises errors of many kinds
            raise AlexNetError(f"{self.statistics}: can't be read ({_reason(error)})") from error
        mean_image = found.pop("mean_image")
        return augment.Statistics(augment.PcaBasis(**found), mean_image)

    def _read_json(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            value = json.loads(read_bytes(path, _MAX_BYTES))
        except FileNotFoundError:
            raise AlexNetError(f"{self.path} is not a run: it has no {path.name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise AlexNetError(f"{path}: can't be read ({_reason(error)})") from error
        if not isinstance(value, dict):
            raise AlexNetError(f"{path}: a JSON object is needed")
        return value


def _with_absolute_data_dir(config: TrainConfig, info: DatasetInfo) -> TrainConfig:
    """The configuration with the place of the data as it can be found from every folder.

    Data in the default folder ./data is named, too; the other default places do not depend on the working directory.
    """
    place = config.data.data_dir
    if place is None and pathlib.Path(info.source).is_relative_to(os.path.abspath("data")):
        place = pathlib.Path(info.source)
    if place is None:
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_dir=pathlib.Path(os.path.abspath(place)))
    )


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(" ".join(text.split()) or type(error).__name__, 200)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained network, opened.

    Attributes:
      folder: the run's files.
      config: every setting of the training.
      dataset: the data set's name, class names, image shape and sizes.
      statistics: mean image and PCA basis of the training images.
      step: updates behind these parameters.
      params: nested dict of float32 NumPy arrays, `params["conv1"]["kernel"]` is [7, 7, 3, 48]; with --average-decay
        their moving average.
    """

    folder: RunFolder
    config: TrainConfig
    dataset: DatasetInfo
    statistics: augment.Statistics
    step: int
    params: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        # Without compiled programs, which can't be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.dataset.class_names

    @property
    def model(self) -> models.AlexNetSmall | models.AlexNet | models.ConvNet:
        """The Linen module that `params` belong to."""
        return models.from_config(self.config.network, len(self.class_names))

    @property
    def preprocessing(self) -> augment.Preprocessing:
        """What happens to pixels before the network."""
        return augment.from_config(self.config.augmentation, self.statistics, steps_per_epoch=1)

    def logits(self, images: Any) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes]; `images` as for `predict`."""
        predict_step, params = self._on_device
        grey = to_grey_levels(images, self.dataset.image_shape)
        return in_parts(lambda part: jax.device_get(predict_step(params, part[None]))[0], grey)

    def predict(self, images: Any) -> np.ndarray:
        """Class probabilities.

        Args:
          images: [N, H, W, 3] of the data set's H and W, RGB, an array of NumPy's or JAX's: uint8 grey levels, or
            float of any width (float64 to bfloat16 and float8) in [0, 1]. Any N; 500 are computed at once.

        Returns:
          float32 [N, classes].

        Raises:
          ValueError: for another shape, dtype or range.
        """
        return softmax(self.logits(images))

    def predict_class(self, images: Any) -> np.ndarray:
        """Most probable class, int64 [N]; `images` as for `predict`."""
        return self.logits(images).argmax(axis=1)

    @functools.cached_property
    def _on_device(self) -> tuple[Any, Any]:
        devices = runtime.devices()[:1]
        return steps.make_predict_step(self.model, self.preprocessing, devices), steps.replicate(self.params, devices)


def to_grey_levels(images: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Images [N, H, W, 3] of shape `image_shape`, uint8 or float in [0, 1], as grey levels 0..255, uint8 or float32.

    Raises:
      ValueError: for another shape, dtype or range.
    """
    if np.ma.is_masked(images):
        raise ValueError("images must not be masked: give every pixel a value")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != image_shape or not len(images):
        shape = ", ".join(map(str, image_shape))
        raise ValueError(f"images must be [N, {shape}] with N > 0, not {list(images.shape)}")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):  # also ml_dtypes' bfloat16 and float8
        raise ValueError(f"images must be uint8 (0..255) or float (0..1), not {images.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        images = images.astype(np.float32)
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"float images must be in [0, 1], not [{images.min()}, {images.max()}]; grey levels 0..255 must be uint8"
        )
    return images * 255


def in_parts(compute: Callable[[np.ndarray], Any], images: np.ndarray, most: int = 500) -> np.ndarray:
    """What `compute` makes of images [N, ...], N > 0: float32 [N, ...].

    It gets `most` images at once, and of the last ones the next power of two, filled up with copies: it compiles a
    program for each size that it meets.
    """
    parts = []
    for start in range(0, len(images), most):
        part = images[start : start + most]
        size = min(most, 1 << (len(part) - 1).bit_length())
        padded = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        parts.append(np.asarray(compute(padded))[: len(part)])
    return np.concatenate(parts)


def open_run(path: str | os.PathLike[str], checkpoint: str | int = "last") -> Run:
    """Opens the folder of a run.

    Args:
      path: the run's folder, the `--workdir` of its training.
      checkpoint: "last", "best" (highest validation accuracy) or a step.

    Raises:
      UsageError: if `path` or `checkpoint` can't name a folder or a checkpoint.
      AlexNetError: if the folder is no run, has no such checkpoint, or a file can't be read.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError(f"open_run({shown(path)!r}): the path of a run's folder is needed")
    step_or_name = isinstance(checkpoint, str | int | np.integer) and not isinstance(checkpoint, bool)
    if not step_or_name or not re.fullmatch("last|best|[0-9]{1,18}", str(checkpoint)):
        raise UsageError(f'checkpoint {shown(checkpoint)!r}: "last", "best" or a step (0 or more) is needed')
    folder = RunFolder(expanded(path))
    if not os.path.isdir(folder.path):
        raise AlexNetError(f"{shown(folder.path, 300)}: there is no such folder")
    config, dataset, statistics = folder.read_config(), folder.read_dataset(), folder.read_statistics()
    if statistics.mean_image.shape != dataset.image_shape:
        raise AlexNetError(
            f"{folder.dataset} has images {dataset.image_shape}, {folder.statistics} {statistics.mean_image.shape}"
        )
    if not folder.checkpoints.is_dir():
        if folder.checkpoints.is_symlink():
            raise AlexNetError(f"{folder.checkpoints} is a link to what is not there: fetch or mount it first")
        raise AlexNetError(f"{folder.path} has no checkpoint yet: train it first")
    with contextlib.closing(Checkpoints(folder.checkpoints, read_only=True)) as checkpoints:
        if checkpoint == "last":
            if (restored := checkpoints.restore_newest()) is None:
                raise AlexNetError(f"{folder.path} has no checkpoint yet: train it first")
        elif checkpoint == "best":
            if (restored := checkpoints.restore_best()) is None:
                raise AlexNetError(f"{folder.path} was not validated, so none of its checkpoints is best; use last")
        else:
            restored = checkpoints.restore_tree(int(checkpoint))
    tree, _ = restored
    outputs, classes = len(tree["params"]["logits"]["bias"]), len(dataset.class_names)
    if outputs != classes:
        raise AlexNetError(f"{folder.dataset}: {classes} class names, but the network has {outputs} outputs")
    params = optimizer.averaged(tree["opt_state"], tree["params"])
    return Run(folder, config, dataset, statistics, int(tree["step"]), params)
