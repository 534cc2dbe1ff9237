"""Takes a trained network elsewhere: `python -m alexnet_jax.exchange.export RUN --format safetensors|stablehlo`.

`safetensors`: the weights, which any framework reads, with what describes them as metadata. It does not expire: this is
the form to archive.
`stablehlo`: the whole prediction with its weights as a function of JAX's that needs no code of ours, for any batch
size, on CPUs and GPUs: `jax.export.deserialize(bytearray(open(file, "rb").read())).call(images)`. `images` is uint8
[b, H, W, 3], RGB, grey levels 0..255; JAX refuses any other dtype. The result is float32 [b, classes], probabilities.
FILE.json says the same, and the classes' names. It expires: JAX promises to read such a file for six months.
"""

import dataclasses
import datetime
import hashlib
import json
import operator
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tyro

from alexnet_jax.config import cli
from alexnet_jax.config.checks import validate
from alexnet_jax.config.types import Path
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.files import expanded


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a trained network for use elsewhere."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir."""
    format: Literal["safetensors", "stablehlo"] = "safetensors"
    """`safetensors`: weights, also for an archive; `stablehlo`: a function from uint8 images (RGB, grey levels 0..255)
    to probabilities, with its weights, which JAX reads for six months."""
    out: Path | None = None
    """File to write. Unset: RUN/export/model.FORMAT."""
    checkpoint: str = "last"
    """`last`, `best` (highest validation accuracy) or a step."""


def to_safetensors(run: Any) -> bytes:
    """The weights of a `Run`: arrays `conv1/kernel` .., and the metadata that `load` needs, as JSON."""
    import safetensors.numpy

    from alexnet_jax.config.saved import to_json

    statistics = {name: array.tolist() for name, array in vars(run.statistics.basis).items()}
    metadata = {
        "config": json.dumps(to_json(run.config)),
        "dataset": json.dumps(dataclasses.asdict(run.dataset)),
        "pca_basis": json.dumps(statistics),
        "step": str(run.step),
    }
    arrays = _flat(run.params) | {"mean_image": run.statistics.mean_image}
    return safetensors.numpy.save(arrays, metadata | {"sha256": _sha256(arrays, metadata)})


def _flat(params: Any) -> dict[str, Any]:
    return {f"{layer}/{name}": array for layer, arrays in params.items() for name, array in arrays.items()}


def _sha256(arrays: dict[str, Any], metadata: dict[str, str]) -> str:
    """SHA-256 of all that a safetensors file holds, in an order that does not depend on the file's."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def to_stablehlo(run: Any) -> bytes:
    """A serialized function of a `Run`: RGB grey levels (0..255), uint8 [b, H, W, 3] -> probabilities [b, classes].

    Floats are refused by JAX when it is called, so images in [0, 1] are not taken for black ones. It says nothing of
    the classes' names; `save` writes them, and what else a caller needs to know, into a file beside it.
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    from alexnet_jax.network import build

    network = dataclasses.replace(run.config.network, convolution="direct")  # the same for all platforms
    model, preprocessing = build.from_config(network, len(run.class_names)), run.preprocessing

    def predict(images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": run.params}, preprocessing.evaluation(images))
        return jax.nn.softmax(logits)

    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *run.dataset.image_shape), jnp.uint8)
    return bytes(export.export(jax.jit(predict), platforms=("cpu", "cuda"))(images).serialize())


def save(config: ExportConfig) -> pathlib.Path:
    """Exports a run; returns the file.

    Raises:
      UsageError: the file is there already.
      AlexNetError: the run can't be read, or the file not written.
    """
    from alexnet_jax.files import to_bytes, write_atomically
    from alexnet_jax.inspection.run import open_run

    out = config.out or config.run / "export" / f"model.{config.format}"
    names = out.with_name(out.name + ".json")
    for path in (out, names):
        if path.exists():
            raise UsageError(f"--out {path} is there already: choose another file")
    run = open_run(config.run, config.checkpoint)
    data = to_stablehlo(run) if config.format == "stablehlo" else to_safetensors(run)
    if config.format == "stablehlo":
        write_atomically(names, to_bytes(_description(run, data)))
    write_atomically(out, data)
    return out


def _description(run: Any, function: bytes) -> dict[str, Any]:
    """What a caller of the exported function needs to know, and what tells a damaged file from an expired one."""
    from alexnet_jax.runs.folder import versions

    shape = list(run.dataset.image_shape)
    return {
        "class_names": run.class_names,
        "image_shape": shape,
        "input": {
            "dtype": "uint8",
            "shape": ["b", *shape],
            "scale": "grey levels 0..255",
            "layout": "NHWC",
            "channels": "RGB",
        },
        "output": {
            "dtype": "float32",
            "shape": ["b", len(run.class_names)],
            "meaning": "class probabilities, in the order of class_names",
        },
        "jax": versions()["jax"],
        "exported": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "expires": "JAX promises to read this file for six months; the safetensors format does not expire",
        "sha256": hashlib.sha256(function).hexdigest(),
        "class_names_sha256": _sha256_of_names(run.class_names),
    }


def _sha256_of_names(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A network that was exported.

    Attributes:
      class_names: name of each class.
      image_shape: (H, W, 3) of the images it takes.
      predict: class probabilities, float32 [N, classes], of images as `Run.predict` takes them. A stablehlo file takes
        uint8: float images in [0, 1] are rounded to its 256 grey levels.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    predict: Callable[[Any], Any]


def load(path: str | os.PathLike[str]) -> Exported:
    """Opens a file that `save` has written; its contents tell the format.

    Raises:
      AlexNetError: it can't be read, has expired, or is something else.
    """
    from alexnet_jax.exchange.weights import refuse_other_files

    path = expanded(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        refuse_other_files(data)
        if data[8:9] == b"{":
            return _load_safetensors(data)
        return _load_stablehlo(path, data)
    except AlexNetError:
        raise
    except Exception as error:  # a damaged file makes errors of many kinds
        raise AlexNetError(f"{path}: not what alexnet_jax.exchange.export writes ({_reason(error)})") from error


def _load_safetensors(data: bytes) -> Exported:
    import numpy as np
    import pydantic
    import safetensors.numpy

    from alexnet_jax.config.saved import from_json
    from alexnet_jax.data.statistics import PcaBasis, Statistics
    from alexnet_jax.inspection.run import Run
    from alexnet_jax.runs.folder import DatasetInfo, RunFolder

    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if "config" not in metadata:
        raise ValueError(
            "it does not describe its network; alexnet_jax.exchange.weights.load_weights reads torchvision's"
        )
    arrays = safetensors.numpy.load(data)
    digest = metadata.pop("sha256", None)  # older files have none
    if digest not in (None, _sha256(arrays, metadata)):
        raise ValueError("it is damaged or was changed: its SHA-256 differs; export the run again")
    basis = {name: np.array(value) for name, value in json.loads(metadata["pca_basis"]).items()}
    dataset = pydantic.TypeAdapter(DatasetInfo).validate_python(json.loads(metadata["dataset"]))
    config = from_json(json.loads(metadata["config"]))
    statistics = Statistics(PcaBasis(**basis), arrays.pop("mean_image", np.empty(0)))
    params: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        layer, _, kind = name.partition("/")
        params.setdefault(layer, {})[kind] = array
    run = Run(RunFolder(config.workdir), config, dataset, statistics, int(metadata["step"]), params)
    _check_arrays(run, arrays)
    return Exported(dataset.class_names, dataset.image_shape, run.predict)


def _check_arrays(run: Any, found: dict[str, Any]) -> None:
    """Raises ValueError unless the arrays are finite floats of the shapes that the network, classes and images need."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def check(name: str, array: Any, shape: tuple[int, ...]) -> None:
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, floats {list(shape)} are needed")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds Inf or NaN")

    image_shape, model, evaluation = run.dataset.image_shape, run.model, run.preprocessing.evaluation
    check("mean_image", run.statistics.mean_image, image_shape)
    for name, array in vars(run.statistics.basis).items():
        check(f"pca_basis {name}", array, (3, 3) if name == "eigenvectors" else (3,))
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    variables = jax.eval_shape(lambda key, images: model.init(key, evaluation(images)), jax.random.key(0), images)
    wanted = _flat(variables["params"])
    if different := sorted(found.keys() ^ wanted.keys()):
        name = different[0]
        raise ValueError(f"{name} is missing" if name in wanted else f"it has {name}, which would not be used")
    for name, array in wanted.items():
        check(name, found[name], array.shape)


def _load_stablehlo(path: pathlib.Path, data: bytes) -> Exported:
    import jax
    import numpy as np
    from jax import export

    from alexnet_jax.inspection.inputs import in_parts, to_grey_levels

    try:
        described = json.loads(path.with_name(path.name + ".json").read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}.json, which describes it, can't be read: {error.strerror or error}") from error
    names, shape = tuple(described["class_names"]), tuple(described["image_shape"])
    intact = described.get("sha256") == hashlib.sha256(data).hexdigest()
    try:
        function = export.deserialize(bytearray(data))
        (images,), (probabilities,) = function.in_avals, function.out_avals
        # Lowered here, so that load reports a file that this JAX cannot read, not the first predict.
        jax.jit(function.call).lower(jax.ShapeDtypeStruct((1, *shape), images.dtype))
    except Exception as error:
        raise AlexNetError(f"{path}: {_unreadable(error, described, intact)}") from error
    if not intact and "sha256" in described:
        raise ValueError(f"{path.name}.json is of another file, or this one is damaged: its SHA-256 differs")
    if described.get("class_names_sha256", _sha256_of_names(names)) != _sha256_of_names(names):
        raise ValueError(f"class_names in {path.name}.json are not those that were exported: their SHA-256 differs")
    if len(names) != probabilities.shape[-1]:
        raise ValueError(
            f"{path.name}.json has {len(names)} class_names, the function {probabilities.shape[-1]} outputs"
        )
    whole_levels = np.issubdtype(images.dtype, np.integer)  # older exports take float32

    def predict(images_: Any) -> Any:
        grey = to_grey_levels(images_, shape)
        return in_parts(
            lambda part: function.call((np.rint(part) if whole_levels else part).astype(images.dtype)), grey
        )

    return Exported(names, shape, predict)


def _unreadable(error: Exception, described: dict[str, Any], intact: bool) -> str:
    """Why JAX can't read a function: its age, if that can be told."""
    import jax

    wrote, here = described.get("jax"), jax.__version__
    older, newer = (wrote and order(_version(wrote), _version(here)) for order in (operator.lt, operator.gt))
    if "compatibility window" in str(error) or (intact and older):
        state = "it has expired"
    else:
        state = (
            "it is from a newer JAX" if intact and newer else "not what alexnet_jax.exchange.export writes, or expired"
        )
    by = f"written by JAX {wrote} on {described.get('exported')}, " if wrote else ""
    return (
        f"{state} ({by}can't be read by JAX {here}: {_reason(error)}). JAX promises to read such files for six months: "
        "export the run again; to archive a network use --format safetensors"
    )


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", text)]


def _reason(error: Exception) -> str:
    from alexnet_jax.errors import shown

    return shown(" ".join(str(error).split()) or type(error).__name__, 200)


def main(args: Sequence[str]) -> None:
    """Parses the flags, exports."""
    config = validate(cli.parse(ExportConfig, args, "export", ExportConfig.__doc__ or ""))
    cli.check_checkpoint(config.checkpoint)
    from alexnet_jax import runtime

    runtime.devices()  # before a checkpoint is read: an error there is not the checkpoint's
    out = save(config)
    print(f"{out}: use it with alexnet_jax.exchange.export.load")
    if config.format == "stablehlo":
        print(
            f"It takes uint8 RGB images [b, H, W, 3], grey levels 0..255 ({out.name}.json). It expires: JAX promises "
            "to read it for six months; to archive the network use --format safetensors"
        )


if __name__ == "__main__":
    cli.run(main)
