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
import os
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.errors import AlexNetError, UsageError, shown
from alexnet_jax.files import expanded
from alexnet_jax.network import build
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.folder import DatasetInfo, RunFolder
from alexnet_jax.training import optimizer, predict
from alexnet_jax.training.predict import softmax


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
    statistics: Statistics
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
    def model(self) -> nn.Module:
        """The Linen module that `params` belong to."""
        return build.from_config(self.config.network, len(self.class_names))

    @property
    def preprocessing(self) -> preprocess.Preprocessing:
        """What happens to pixels before the network."""
        return preprocess.Preprocessing(self.config.augmentation, self.statistics, steps_per_epoch=1)

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
        return predict.make_predict_step(self.model, self.preprocessing, devices), replicate(self.params, devices)


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
