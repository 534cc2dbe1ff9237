"""Reads the weights that a training run begins with: of a run, of an exported network, of torchvision or Caffe."""

import os
import pathlib
from typing import Any

import numpy as np

from alexnet_jax.config.flags import flat_items
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.errors import AlexNetError, UsageError, reason
from alexnet_jax.exchange import export
from alexnet_jax.exchange.weights import Weights, load_weights
from alexnet_jax.files import expanded
from alexnet_jax.inspection.run import Run, open_run
from alexnet_jax.network import alexnet
from alexnet_jax.runs import shipped
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.training.initial import Pretrained

# The settings that decide what given weights compute.
COMPUTED = ("network", "activation", "lrn", "pool_window", "conv1_stride", "subtract_mean", "input_range")
# ... and all that `Pretrained.settings_for` can set.
ADOPTED = (
    *COMPUTED,
    *("initial_bias", "dropout_after", "dropout_rate"),
    *("image_size", "scaling", "crop_size", "crop_padding", "enlarge_to"),
)
IMAGE_SIZE = 256  # side of the images of ImageNet of which the networks see windows


def load(path: pathlib.Path) -> Pretrained:
    """Reads a run's folder, a shipped run, a .safetensors of `exchange.export`, or a file that `load_weights` reads.

    Raises:
      AlexNetError: it is something else, or damaged.
      UsageError: it is a .npy.
    """
    path = expanded(path)
    if shipped.located(path).is_dir():
        run = open_run(path)
        return of_run(run, f"{path} (step {run.step:,})")
    if not path.exists():
        raise AlexNetError(f"--init-from {path}: there is no such run or file")
    if (run_in_file := export.read_run(path)) is not None:
        return of_run(run_in_file, str(path))
    try:
        ambiguous = is_npy(path)
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    if ambiguous:
        raise UsageError(
            f"--init-from {path}: a .npy does not tell Caffe's AlexNet from CaffeNet: make a run of it with python -m "
            "alexnet_jax.exchange.convert"
        )
    return of_weights(load_weights(path), str(path))


def absolute_unless_shipped(path: pathlib.Path) -> pathlib.Path:
    """The path as config.json has it: absolute, unless it is the name of a shipped network."""
    return path if shipped.located(path) != path else pathlib.Path(os.path.abspath(path))


def numbered(number: int) -> tuple[str, ...]:
    """Class names in place of those that are not known: 0, 1, 2, ..."""
    return tuple(map(str, range(number)))


def settings_of_resumed_run(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The settings that a run in this folder adopted from its weights; None if there is none to resume.

    A run that is resumed has its weights in its checkpoints.
    """
    folder = RunFolder(workdir)
    if not folder.exists() or not any(folder.checkpoints.glob("[0-9]*")):
        return None
    settings = flat_items(folder.read_config())
    return {name: settings[name] for name in ADOPTED}


def of_run(run: Run, source: str) -> Pretrained:
    """The weights of a run."""
    settings, augmentation = flat_items(run.config), run.config.augmentation
    return Pretrained(
        source,
        {name: settings[name] for name in COMPUTED},
        augmentation.enlarge_to or run.dataset.image_shape[0],
        None if augmentation.enlarge_to else augmentation.crop_size,
        run.params,
        run.statistics.mean_image,
        run.config.data.scaling,
        None if run.class_names == numbered(len(run.class_names)) else run.class_names,
    )


def is_npy(path: pathlib.Path) -> bool:
    """Whether a file is a .npy, which does not tell Caffe's AlexNet from CaffeNet."""
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def of_weights(weights: Weights, source: str) -> Pretrained:
    """Weights of another program.

    Their input is (x - mean) / std. Ours is x - mean, divided by 255 if the input range is 1: the remaining factor, one
    for each channel, goes into conv1's kernels.
    """
    input_range = 255 if (weights.std == 1).all() else 1
    conv1 = weights.params["conv1"]
    factors = (255 / input_range / weights.std).astype(np.float32)
    settings = flat_items(TrainConfig()) | {
        "network": weights.variant,
        "subtract_mean": True,
        "input_range": input_range,
    }
    return Pretrained(
        source,
        {name: settings[name] for name in COMPUTED},
        IMAGE_SIZE,
        alexnet.architecture(weights.variant).input_size,
        weights.params | {"conv1": conv1 | {"kernel": conv1["kernel"] * factors[:, None]}},
        np.broadcast_to(weights.mean, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        "torchvision" if weights.variant == "torchvision" else "caffe",
        None,
    )
