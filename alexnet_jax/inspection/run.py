"""An opened run: its settings, parameters and predictions."""

import contextlib
import dataclasses
import functools
import os
import re
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.config_json import to_json
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data import batches
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.errors import AlexNetError, UsageError, shown
from alexnet_jax.files import expanded
from alexnet_jax.inspection.inputs import in_parts, to_grey_levels
from alexnet_jax.network import build
from alexnet_jax.network.layer_outputs import compiled_layer_outputs
from alexnet_jax.runs import shipped
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.folder import DatasetInfo, RunFolder
from alexnet_jax.training import optimizer, predict

if TYPE_CHECKING:
    from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained network, opened with `open_run`.

    Attributes:
      folder: paths of the run's files.
      config: every setting of the training.
      dataset: the data set's name, class names, image shape, fingerprint and number of images in each split.
      statistics: mean image and PCA basis of the training images.
      step: updates made to these parameters.
      params: nested dict of float32 NumPy arrays: `params["conv1"]["kernel"]` of `AlexNetSmall` is [7, 7, 3, 48]. With
        --average-decay they are the moving average.
    """

    folder: RunFolder
    config: TrainConfig
    dataset: DatasetInfo
    statistics: Statistics
    step: int
    params: dict[str, Any]

    def __repr__(self) -> str:
        """In a line: without the arrays."""
        classes = len(self.class_names)
        return f"Run({str(self.folder.path)!r}, step {self.step:,}, {self.config.network.network}, {classes} classes)"

    def __getstate__(self) -> dict[str, Any]:
        # Without compiled programs, which can't be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.dataset.class_names

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the training images; 1 for converted weights, whose training is not known."""
        return batches.steps_per_epoch(self.dataset.counts.get("train", 1), self.config.schedule.batch_size)

    @property
    def model(self) -> nn.Module:
        """The Linen module to which `params` belong."""
        return build.from_config(self.config.network, len(self.class_names))

    @property
    def preprocessing(self) -> preprocess.Preprocessing:
        """Maps images in grey levels to the network's input."""
        return preprocess.Preprocessing(self.config.augmentation, self.statistics, self.steps_per_epoch)

    def nnx(self) -> "nnx.Module":
        """The network as an NNX module with a copy of `params`, for code that is written for `flax.nnx`.

        It maps the network's input, `run.preprocessing.evaluation(images)`, to logits, and has a dict of `nnx.Param`
        for each layer: `module.conv1["kernel"]`.
        """
        from flax import nnx  # takes a quarter of a second, which eval.py and predictions need not pay

        module = nnx.bridge.ToNNX(self.model)
        for name, layer in self.params.items():
            setattr(module, name, nnx.data({key: nnx.Param(jnp.asarray(value)) for key, value in layer.items()}))
        return module

    def logits(self, images: Any) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes]; `images` as for `predict`."""
        predict_step, params = self._on_device
        grey = to_grey_levels(images, self.dataset.image_shape)
        return in_parts(lambda part: jax.device_get(predict_step(params, part[None]))[0], grey)

    def predict(self, images: Any) -> np.ndarray:
        """Class probabilities, float32 [N, classes].

        `images` are [N, H, W, 3] of the data set's H and W, RGB, NumPy or JAX arrays: uint8 grey levels 0..255, or
        floats of any width (float64 to bfloat16 and float8) in [0, 1]. N is arbitrary; 500 are computed at once.

        Raises:
          ValueError: for another shape, dtype or range.
        """
        return predict.softmax(self.logits(images))

    def predict_class(self, images: Any) -> np.ndarray:
        """Most probable class, int64 [N]; `images` as for `predict`."""
        return self.logits(images).argmax(axis=1)

    def features(self, images: Any, layer: str) -> np.ndarray:
        """Output of a layer, "fc2", or of an operation after it, "fc2 activation": float32 [N, H, W, C] or [N, C].

        `images` are as for `predict`; `inspection.activations` returns several layers at once.

        Raises:
          ValueError: for another shape, dtype or range.
          KeyError: the network has no such layer; the message lists all.
        """
        model, params, prepare = self.model, self.params, self.preprocessing.evaluation
        grey = to_grey_levels(images, self.dataset.image_shape)
        return in_parts(lambda part: compiled_layer_outputs(model, params, prepare(part), (layer,))[layer], grey)

    @functools.cached_property
    def _on_device(self) -> tuple[Any, Any]:
        devices = runtime.devices()[:1]
        return predict.make_predict_step(self.model, self.preprocessing, devices), replicate(self.params, devices)


def open_run(path: str | os.PathLike[str], checkpoint: str | int = "last") -> Run:
    """Opens a run: `path` is its folder, the --workdir of its training.

    `open_run("cifar10-best")` opens the trained network that comes with the package, unless the working directory has a
    folder of that name. `checkpoint` is "last", "best" (highest validation accuracy) or a step.

    Raises:
      UsageError: `path` or `checkpoint` can't name a folder or a checkpoint.
      AlexNetError: the folder is not a run or has no such checkpoint, or a file can't be read.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError(f"open_run({shown(path)!r}): must be the path of a run's folder")
    step_or_name = isinstance(checkpoint, str | int | np.integer) and not isinstance(checkpoint, bool)
    if not step_or_name or not re.fullmatch("last|best|[0-9]{1,18}", str(checkpoint)):
        raise UsageError(f'checkpoint {shown(checkpoint)!r}: must be "last", "best" or a step (0 or more)')
    folder = RunFolder(shipped.located(expanded(path)))
    if not os.path.isdir(folder.path):
        if os.path.exists(folder.path):
            raise AlexNetError(
                f"{shown(folder.path, 300)} is a file, not a run's folder; eval.py takes images by --images"
            )
        names = ", ".join(shipped.names())
        raise AlexNetError(f"{shown(folder.path, 300)}: there is no such folder ({names} comes with the package)")
    parameters = shipped.read(folder) if shipped.is_shipped(folder) else None  # first: it checks the other files, too
    config = folder.read_config(to_json(TrainConfig()) if parameters else None)
    dataset, statistics = folder.read_dataset(), folder.read_statistics()
    if statistics.mean_image.shape != dataset.image_shape:
        raise AlexNetError(
            f"{folder.dataset} has images {dataset.image_shape}, but {folder.statistics} {statistics.mean_image.shape}"
        )
    if dataset.counts and "train" not in dataset.counts:
        raise AlexNetError(f"{folder.dataset}: counts has no number of training images")
    step, params = parameters or _restored(folder, str(checkpoint))
    if parameters and str(checkpoint) not in ("last", str(step)):
        raise AlexNetError(f"{folder.path.name} was shipped with one checkpoint, of step {step}: use last")
    outputs, classes = len(params["logits"]["bias"]), len(dataset.class_names)
    if outputs != classes:
        raise AlexNetError(f"{folder.dataset}: {classes} class names, but the network has {outputs} outputs")
    return Run(folder, config, dataset, statistics, step, params)


def _restored(folder: RunFolder, checkpoint: str) -> tuple[int, dict[str, Any]]:
    """The step and the parameters of "last", "best" or a step."""
    if folder.checkpoints.is_symlink() and not folder.checkpoints.is_dir():
        raise AlexNetError(f"{folder.checkpoints} is a broken link: fetch or mount its target first")
    restored = None
    if folder.checkpoints.is_dir():
        with contextlib.closing(Checkpoints(folder.checkpoints, read_only=True)) as checkpoints:
            if checkpoint == "best":
                restored = checkpoints.restore_best()
                if restored is None:
                    raise AlexNetError(f"{folder.path} was not validated, so it has no best checkpoint: use last")
            elif checkpoint == "last":
                restored = checkpoints.restore_newest()
            else:
                restored = checkpoints.restore_tree(int(checkpoint))
    if restored is None:
        raise AlexNetError(f"{folder.path} has no checkpoint yet: train it first")
    tree, _ = restored
    return int(tree["step"]), optimizer.averaged(tree["opt_state"], tree["params"])
