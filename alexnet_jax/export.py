"""Takes a trained network elsewhere: `python -m alexnet_jax.export RUN --format safetensors|stablehlo`.

`safetensors`: the weights, which any framework reads, with what describes them as metadata.
`stablehlo`: the whole prediction with its weights as a function of JAX's that needs no code of ours, for any batch
size, on CPUs and GPUs: `jax.export.deserialize(open(file, "rb").read()).call(images)`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tyro

from alexnet_jax import cli
from alexnet_jax.config import Path, expanded, validate
from alexnet_jax.errors import AlexNetError, UsageError


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a trained network for use elsewhere."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir."""
    format: Literal["safetensors", "stablehlo"] = "safetensors"
    """`safetensors`: weights; `stablehlo`: a function from images to probabilities, with its weights."""
    out: Path | None = None
    """File to write. Unset: RUN/export/model.FORMAT."""
    checkpoint: str = "last"
    """`last`, `best` (highest validation accuracy) or a step."""


def to_safetensors(run: Any) -> bytes:
    """The weights of a `Run`: arrays `conv1/kernel` .., and the metadata that `load` needs, as JSON."""
    import safetensors.numpy

    from alexnet_jax.config import to_json

    statistics = {name: array.tolist() for name, array in vars(run.statistics.basis).items()}
    metadata = {
        "config": json.dumps(to_json(run.config)),
        "dataset": json.dumps(dataclasses.asdict(run.dataset)),
        "pca_basis": json.dumps(statistics),
        "step": str(run.step),
    }
    arrays = {f"{layer}/{name}": array for layer, arrays in run.params.items() for name, array in arrays.items()}
    return safetensors.numpy.save(arrays | {"mean_image": run.statistics.mean_image}, metadata)


def to_stablehlo(run: Any) -> bytes:
    """A serialized function of a `Run`: grey levels (0..255), float32 [b, H, W, 3] -> probabilities [b, classes].

    It says nothing of the classes' names; `save` writes them into a file beside it.
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    from alexnet_jax import models

    network = dataclasses.replace(run.config.network, convolution="direct")  # the same for all platforms
    model, preprocessing = models.from_config(network, len(run.class_names)), run.preprocessing

    def predict(images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": run.params}, preprocessing.evaluation(images))
        return jax.nn.softmax(logits)

    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *run.dataset.image_shape), jnp.float32)
    return bytes(export.export(jax.jit(predict), platforms=("cpu", "cuda"))(images).serialize())


def save(config: ExportConfig) -> pathlib.Path:
    """Exports a run; returns the file.

    Raises:
      UsageError: the file is there already.
      AlexNetError: the run can't be read, or the file not written.
    """
    from alexnet_jax.files import to_bytes, write_atomically
    from alexnet_jax.run import open_run

    out = config.out or config.run / "export" / f"model.{config.format}"
    names = out.with_name(out.name + ".json")
    for path in (out, names):
        if path.exists():
            raise UsageError(f"--out {path} is there already: choose another file")
    run = open_run(config.run, config.checkpoint)
    if config.format == "stablehlo":
        write_atomically(names, to_bytes({"class_names": run.class_names, "image_shape": run.dataset.image_shape}))
    write_atomically(out, to_stablehlo(run) if config.format == "stablehlo" else to_safetensors(run))
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A network that was exported.

    Attributes:
      class_names: name of each class.
      image_shape: (H, W, 3) of the images it takes.
      predict: class probabilities, float32 [N, classes], of images as `Run.predict` takes them.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    predict: Callable[[Any], Any]


def load(path: str | os.PathLike[str]) -> Exported:
    """Opens a file that `save` has written; its contents tell the format.

    Raises:
      AlexNetError: it can't be read, or is something else.
    """
    path = expanded(path)
    try:
        data = path.read_bytes()
        if data[8:9] == b"{":
            return _load_safetensors(data)
        return _load_stablehlo(data, path.with_name(path.name + ".json").read_bytes())
    except AlexNetError:
        raise
    except Exception as error:  # a damaged file makes errors of many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise AlexNetError(f"{path}: not what alexnet_jax.export writes ({reason})") from error


def _load_safetensors(data: bytes) -> Exported:
    import numpy as np
    import pydantic
    import safetensors.numpy

    from alexnet_jax.augment import PcaBasis, Statistics
    from alexnet_jax.config import from_json
    from alexnet_jax.run import DatasetInfo, Run, RunFolder

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header["__metadata__"]
    arrays = safetensors.numpy.load(data)
    basis = PcaBasis(**{name: np.array(value) for name, value in json.loads(metadata["pca_basis"]).items()})
    params: dict[str, dict[str, Any]] = {}
    mean_image = arrays.pop("mean_image")
    for name, array in arrays.items():
        layer, kind = name.split("/")
        params.setdefault(layer, {})[kind] = array
    dataset = pydantic.TypeAdapter(DatasetInfo).validate_python(json.loads(metadata["dataset"]))
    config = from_json(json.loads(metadata["config"]))
    run = Run(RunFolder(config.workdir), config, dataset, Statistics(basis, mean_image), int(metadata["step"]), params)
    return Exported(dataset.class_names, dataset.image_shape, run.predict)


def _load_stablehlo(data: bytes, description: bytes) -> Exported:
    import numpy as np
    from jax import export

    from alexnet_jax.run import to_grey_levels

    described = json.loads(description)
    names, shape = tuple(described["class_names"]), tuple(described["image_shape"])
    function = export.deserialize(bytearray(data))

    def predict(images: Any) -> Any:
        return np.asarray(function.call(to_grey_levels(images, shape).astype(np.float32)))

    return Exported(names, shape, predict)


def main(args: Sequence[str]) -> None:
    """Parses the flags, exports."""
    config = validate(cli.parse(ExportConfig, args, "export", ExportConfig.__doc__ or ""))
    cli.check_checkpoint(config.checkpoint)
    from alexnet_jax import runtime

    runtime.devices()  # before a checkpoint is read: an error there is not the checkpoint's
    print(f"{save(config)}: use it with alexnet_jax.export.load")


if __name__ == "__main__":
    cli.run(main)
