"""A run's folder: what lies where, and `open_run`, which takes a finished run apart.

config.json      every setting and the versions
dataset.json     name, class names, image shape, fingerprint of the data
statistics.npz   mean image and PCA basis of the training images
metrics.jsonl    one JSON object a line
checkpoints/     one folder a step
plots/  eval/    pictures, results of eval.py
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import zipfile
from typing import Any

import jax
import numpy as np

import alexnet_jax
from alexnet_jax import augment, models, steps
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import TrainConfig, differing_settings, flag, flat_items, from_json, to_json
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.metrics import softmax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    own = {"alexnet-jax": alexnet_jax.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
      AlexNetError: naming the file, if the folder can't be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise AlexNetError(f"can't write {path}: {error.strerror or error}") from error


def to_bytes(value: Any) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run remembers of its data set."""

    name: str
    source: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    counts: dict[str, int]
    fingerprint: str


class RunFolder:
    """Paths in a run's folder, and reading and writing of what describes the run."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.dataset = path / "dataset.json"
        self.statistics = path / "statistics.npz"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.eval = path / "eval"

    def exists(self) -> bool:
        """Whether a run is there."""
        return self.config.exists()

    def prepare(self, config: TrainConfig, info: DatasetInfo, statistics: augment.Statistics) -> None:
        """Makes a new run's folder, or checks that the run there may go on with this configuration and data.

        Raises:
          UsageError: the run there has another setting, or the folder holds something else.
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
        else:
            try:
                occupied = self.path.exists() and any(self.path.iterdir())
            except OSError as error:
                raise AlexNetError(f"can't use --workdir {self.path}: {error.strerror or error}") from error
            if occupied:
                raise UsageError(f"--workdir {self.path} is not empty and holds no run: choose another folder")
            write_atomically(self.dataset, to_bytes(dataclasses.asdict(info)))
            self._write_statistics(statistics)
        # Last, for its presence says that a run is here.
        write_atomically(self.config, to_bytes(to_json(config) | {"versions": versions()}))

    def read_config(self) -> TrainConfig:
        """The run's settings."""
        settings = self._read_json(self.config)
        settings.pop("versions", None)
        try:
            return from_json(settings)
        except UsageError as error:
            raise AlexNetError(f"{self.config}: {error}") from error

    def read_dataset(self) -> DatasetInfo:
        """What the run remembers of its data set."""
        value = self._read_json(self.dataset)
        try:
            return DatasetInfo(**value | {k: tuple(value[k]) for k in ("class_names", "image_shape")})
        except (TypeError, KeyError) as error:
            raise AlexNetError(f"{self.dataset}: not what this program wrote ({error})") from error

    def read_statistics(self) -> augment.Statistics:
        """Mean image and PCA basis of the run's training images."""
        try:
            with np.load(self.statistics, allow_pickle=False) as arrays:
                basis = augment.PcaBasis(arrays["mean"], arrays["eigenvalues"], arrays["eigenvectors"])
                return augment.Statistics(basis, arrays["mean_image"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise AlexNetError(f"{self.statistics}: can't be read ({error})") from error

    def _write_statistics(self, statistics: augment.Statistics) -> None:
        temporary = self.statistics.with_suffix(".tmp.npz")
        try:
            np.savez(temporary, mean_image=statistics.mean_image, **vars(statistics.basis))
            temporary.replace(self.statistics)
        except OSError as error:
            raise AlexNetError(f"can't write {self.statistics}: {error.strerror or error}") from error

    def _read_json(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise AlexNetError(f"{self.path} is not a run: it has no {path.name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise AlexNetError(f"{path}: can't be read ({error})") from error
        if not isinstance(value, dict):
            raise AlexNetError(f"{path}: a JSON object is needed")
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained network, opened.

    Attributes:
      folder: the run's files.
      config: every setting of the training.
      dataset: the data set's name, class names, image shape and sizes.
      statistics: mean image and PCA basis of the training images.
      step: updates behind these parameters.
      params: nested dict of float32 NumPy arrays, `params["conv1"]["kernel"]` is [7, 7, 3, 48].
    """

    folder: RunFolder
    config: TrainConfig
    dataset: DatasetInfo
    statistics: augment.Statistics
    step: int
    params: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.dataset.class_names

    @property
    def model(self) -> models.AlexNetSmall:
        """The Linen module that `params` belong to."""
        return models.from_config(self.config.network, len(self.class_names))

    @property
    def preprocessing(self) -> augment.Preprocessing:
        """What happens to pixels before the network."""
        return augment.from_config(self.config.augmentation, self.statistics, steps_per_epoch=1)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes]; `images` as for `predict`."""
        predict_step, params = self._on_device
        return steps.predict_logits(predict_step, params, self._to_grey_levels(images), batch_size=500, num_devices=1)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities.

        Args:
          images: [N, H, W, 3] of the data set's H and W, RGB: uint8 grey levels, or float in [0, 1].

        Returns:
          float32 [N, classes].

        Raises:
          ValueError: for another shape, dtype or range.
        """
        return softmax(self.logits(images))

    def predict_class(self, images: np.ndarray) -> np.ndarray:
        """Most probable class, int64 [N]; `images` as for `predict`."""
        return self.logits(images).argmax(axis=1)

    @functools.cached_property
    def _on_device(self) -> tuple[Any, Any]:
        devices = jax.devices()[:1]
        return steps.make_predict_step(self.model, self.preprocessing, devices), steps.replicate(self.params, devices)

    def _to_grey_levels(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.dataset.image_shape or not len(images):
            shape = ", ".join(map(str, self.dataset.image_shape))
            raise ValueError(f"images must be [N, {shape}] with N > 0, not {list(images.shape)}")
        if images.dtype == np.uint8:
            return images
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images must be uint8 (0..255) or float (0..1), not {images.dtype}")
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"float images must lie in [0, 1], not [{images.min()}, {images.max()}]")
        return images.astype(np.float32) * 255


def open_run(path: str | os.PathLike[str], checkpoint: str | int = "last") -> Run:
    """Opens the folder of a run.

    Args:
      path: the run's folder, the `--workdir` of its training.
      checkpoint: "last", "best" (highest validation accuracy) or a step.

    Raises:
      AlexNetError: if the folder is no run, has no such checkpoint, or a file can't be read.
    """
    folder = RunFolder(pathlib.Path(path))
    if not folder.path.is_dir():
        raise AlexNetError(f"{folder.path}: there is no such folder")
    config, dataset, statistics = folder.read_config(), folder.read_dataset(), folder.read_statistics()
    if not folder.checkpoints.is_dir():
        raise AlexNetError(f"{folder.path} has no checkpoint yet: train it first")
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    steps_there = checkpoints.all_steps()
    if not steps_there:
        raise AlexNetError(f"{folder.path} has no checkpoint yet: train it first")
    if checkpoint == "last":
        step = steps_there[-1]
    elif checkpoint == "best":
        best = checkpoints.best_step()
        if best is None:
            raise AlexNetError(f"{folder.path} was not validated, so none of its checkpoints is best; use last")
        step = best
    else:
        step = int(checkpoint)
        if step not in steps_there:
            raise AlexNetError(f"{folder.path} has no checkpoint of step {step}; it has {steps_there}")
    tree, _ = checkpoints.restore_tree(step)
    checkpoints.close()
    return Run(folder, config, dataset, statistics, step, tree["params"])
