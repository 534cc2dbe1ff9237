"""Trained networks that come with the package, as small run folders: `open_run("cifar10-best")`.

The folder `pretrained/<name>` has config.json, dataset.json, statistics.npz and metrics.jsonl, like any run's, and in
place of checkpoints:

    weights.safetensors     the parameters in float16, as arrays `conv1/kernel`, `conv1/bias`, ...
    manifest.json           the step, and size and SHA-256 of the other files
    README.md               the model card
"""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import alexnet_jax
from alexnet_jax.errors import AlexNetError, reason
from alexnet_jax.files import read_bytes, to_bytes, write_atomically
from alexnet_jax.runs.checkpoint import MANIFEST, DamagedError, describe_files, verify_files
from alexnet_jax.runs.folder import RunFolder

FOLDER = pathlib.Path(alexnet_jax.__file__).absolute().with_name("pretrained")
WEIGHTS = "weights.safetensors"
_MAX_BYTES = 16 * 1024**2


def names() -> tuple[str, ...]:
    """The networks that come with the package."""
    return tuple(sorted(path.name for path in FOLDER.glob("*") if path.is_dir()))


def located(path: pathlib.Path) -> pathlib.Path:
    """The folder of a run: `path` or, if there is no such folder, that of the shipped network of this name."""
    return FOLDER / path if str(path) in names() and not path.is_dir() else path


def is_shipped(folder: RunFolder) -> bool:
    """Whether a run's folder is part of the package, where nothing is written."""
    return folder.path.resolve().parent == FOLDER.resolve()


def write(folder: RunFolder, step: int, params: dict[str, Any]) -> None:
    """Adds the parameters and the manifest to a folder that has the files which describe the run."""
    arrays = {name: np.asarray(array, np.float16) for name, array in flatten_dict(params, sep="/").items()}
    write_atomically(folder.path / WEIGHTS, safetensors.numpy.save(arrays))
    paths = [folder.config, folder.dataset, folder.statistics, folder.metrics, folder.path / WEIGHTS]
    manifest = {"step": step, "files": describe_files(folder.path, paths)}
    write_atomically(folder.path / MANIFEST, to_bytes(manifest))


def read(folder: RunFolder) -> tuple[int, dict[str, Any]]:
    """The step and the parameters, as float32, of a shipped network.

    Raises:
      AlexNetError: a file differs from what was shipped, or can't be read.
    """
    again = "install alexnet_jax again"
    try:
        manifest = json.loads(read_bytes(folder.path / MANIFEST, _MAX_BYTES))
        step, files = int(manifest["step"]), manifest["files"]
        verify_files(folder.path, files)
        arrays = safetensors.numpy.load(read_bytes(folder.path / WEIGHTS, _MAX_BYTES))
    except DamagedError as damage:
        raise AlexNetError(f"{damage}: {again}") from damage
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlexNetError(f"{folder.path / MANIFEST}: can't be read ({reason(error)}): {again}") from error
    # The file has them in any order; a checkpoint's are sorted.
    return step, unflatten_dict({name: np.float32(arrays[name]) for name in sorted(arrays)}, sep="/")
