"""Turns weights of torchvision or Caffe into a run: `python -m alexnet_jax.exchange.convert FILE --out RUN`.

The run predicts, and is inspected, like one that was trained here: `python eval.py RUN --images photo.jpg`, `open_run`,
the notebook. Images get the preprocessing that the weights were trained with: scaled to 256 pixels as `--scaling`
says, the mean subtracted, the window in the centre.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
import tyro

from alexnet_jax.config import cli
from alexnet_jax.config.types import Path
from alexnet_jax.errors import AlexNetError, UsageError, command, is_one_line, reason, shown
from alexnet_jax.files import read_bytes

if TYPE_CHECKING:
    from alexnet_jax.exchange.weights import Weights

# JAX, and modules that need it, are imported in the functions: `--help` should not wait for them.

MOST_BYTES = 16 * 1024**2  # of a file of class names


GreyLevel = Annotated[float, pydantic.Field(ge=0, le=255)]


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Turn weights of torchvision's or Caffe's AlexNet into a run, for eval.py and open_run."""

    file: tyro.conf.Positional[Path]
    """A .safetensors, .pth, .caffemodel or .npy."""
    out: Path
    """Folder of the run; it must not exist."""
    dataset: Literal["folder", "imagenet"] = "folder"
    """What eval.py reads from its --data-dir: a folder of images for each class, or prepared ImageNet. Its class names
    must be those of --class-names."""
    variant: Literal["caffe", "caffenet"] | None = None
    """For a .npy, which does not tell them apart: Caffe's AlexNet or CaffeNet."""
    mean: tuple[GreyLevel, GreyLevel, GreyLevel] | None = None
    """Mean colour that the weights expect, R G B in grey levels. Unset: the file's, else ILSVRC-2012's."""
    class_names: Path | None = None
    """Text file with the name of each class on a line, in the order of the outputs. Unset: 0, 1, 2, ..."""


def convert(config: ConvertConfig) -> None:
    """Writes the run.

    Raises:
      UsageError: the folder exists already, or the class names are not those of as many outputs.
      AlexNetError: a file can't be read, or the folder can't be written.
    """
    import contextlib
    import tempfile

    import numpy as np

    from alexnet_jax.config.flags import replace
    from alexnet_jax.config.settings import DataConfig, TrainConfig
    from alexnet_jax.data.statistics import PcaBasis, Statistics
    from alexnet_jax.exchange import pretrained
    from alexnet_jax.exchange.weights import load_weights
    from alexnet_jax.runs.checkpoint import Checkpoints
    from alexnet_jax.runs.folder import DatasetInfo, RunFolder

    if config.out.exists():
        raise UsageError(f"--out {config.out} exists already: choose another folder")
    weights = pretrained.of_weights(_with_options(config, load_weights(config.file)), str(config.file))
    names = read_class_names(config.class_names, len(weights.params["logits"]["bias"]))
    size = weights.image_size
    settings = replace(
        TrainConfig(preset="converted"),
        **weights.settings,
        dataset=config.dataset,
        image_size=size if config.dataset == "folder" else DataConfig().image_size,
        crop_size=weights.crop_size,
        scaling=weights.scaling,
        init_from=config.file.absolute(),
        workdir=config.out.absolute(),
    )
    info = DatasetInfo(
        name=config.dataset,
        source=f"{config.file} (trained by another program)",
        class_names=names,
        image_shape=(size, size, 3),
        counts={},
        fingerprint=hashlib.sha256(config.file.read_bytes()).hexdigest(),
    )
    mean_image = np.ascontiguousarray(weights.mean_image, np.float32)
    mean = mean_image.mean(axis=(0, 1), dtype=np.float64)
    statistics = Statistics(PcaBasis(mean, np.zeros(3), np.eye(3)), mean_image)  # of colours, only the mean is known
    state = {"step": np.int32(0), "params": weights.params, "opt_state": {}}
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{config.out.name}-", dir=config.out.parent) as unfinished:
            folder = RunFolder(pathlib.Path(unfinished) / "run")
            with contextlib.closing(folder.claim()), contextlib.closing(Checkpoints(folder.checkpoints)) as checkpoints:
                folder.prepare(settings, info, statistics)
                checkpoints.save(state, {}, None)
            folder.path.rename(config.out)  # at once: there is never half a run
    except OSError as error:
        raise AlexNetError(f"--out {config.out}: can't be written ({reason(error)})") from error


def _with_options(config: ConvertConfig, weights: "Weights") -> "Weights":
    """The weights, with the variant and the mean that the user gives.

    Raises:
      UsageError: the file determines the variant, or does not and none is given.
    """
    import numpy as np

    from alexnet_jax.exchange import pretrained

    if pretrained.is_npy(config.file):
        if config.variant is None:
            raise UsageError(f"{config.file} does not tell Caffe's AlexNet from CaffeNet: give --variant")
        weights = dataclasses.replace(weights, variant=config.variant)
    elif config.variant not in (None, weights.variant):
        raise UsageError(f"--variant {config.variant}: {config.file} is {weights.variant}")
    return weights if config.mean is None else dataclasses.replace(weights, mean=np.array(config.mean))


def read_class_names(path: pathlib.Path | None, number: int) -> tuple[str, ...]:
    """The class names in a text file, one on a line, or 0, 1, 2, ..., if `path` is None.

    Raises:
      UsageError: there are not `number` different ones.
      AlexNetError: the file can't be read.
    """
    if path is None:
        from alexnet_jax.exchange.pretrained import numbered

        return numbered(number)
    try:
        names = tuple(line.strip() for line in read_bytes(path, MOST_BYTES).decode("utf-8-sig").splitlines())
    except (OSError, ValueError) as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    while names and not names[-1]:
        names = names[:-1]
    if len(names) != number:
        raise UsageError(f"--class-names {path} has {len(names):,} lines; the network has {number:,} outputs")
    for line, name in enumerate(names, start=1):
        if not name or not is_one_line(name):
            raise UsageError(f"--class-names {path}: line {line} is empty or has a control character")
        if names.index(name) != line - 1:
            raise UsageError(f"--class-names {path}: {shown(name)} is on lines {names.index(name) + 1} and {line}")
    return names


def main(args: Sequence[str]) -> None:
    """Parses the flags and converts."""
    config = cli.parse(ConvertConfig, args, "python -m alexnet_jax.exchange.convert")
    from alexnet_jax import runtime

    runtime.devices()  # before a file is read, so that an error of JAX is not reported as the file's
    convert(config)
    print(f"Converted. Next: {command('eval')} {config.out} --images FILE_OR_FOLDER")


if __name__ == "__main__":
    cli.run(main)
