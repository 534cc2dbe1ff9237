"""Exports a trained network: `python -m alexnet_jax.exchange.export RUN --format safetensors|stablehlo`.

`safetensors`: the weights, which any framework can read, with a description of the network as metadata. This format
does not expire: use it to archive a network.
`stablehlo`: the whole prediction, weights included, as a JAX function that needs no code of this package, for any batch
size, on CPUs and GPUs: `jax.export.deserialize(bytearray(open(file, "rb").read())).call(images)`. `images` is uint8 [b,
H, W, 3], RGB, grey levels 0..255; JAX refuses any other dtype. The result is float32 [b, classes], probabilities.
FILE.json describes this and names the classes. The file expires: JAX promises to read it for six months.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import tyro

from alexnet_jax.config import cli
from alexnet_jax.config.types import Checkpoint, Path
from alexnet_jax.errors import AlexNetError, UsageError, reason
from alexnet_jax.files import expanded, to_bytes, write_atomically

if TYPE_CHECKING:
    from alexnet_jax.inspection.run import Run

MOST_METADATA = 16 * 1024**2  # bytes

# JAX, and modules that need it, are imported in the functions: `--help` should not wait for them.


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Export a trained network for use elsewhere."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir, or cifar10-best."""
    format: Literal["safetensors", "stablehlo"] = "safetensors"
    """`safetensors`: weights, suitable for archiving; `stablehlo`: a function from uint8 images (RGB, grey levels
    0..255) to probabilities, weights included, which JAX can read for six months."""
    out: Path | None = None
    """File to write. Unset: RUN/export/model.FORMAT."""
    checkpoint: Checkpoint = "last"
    """`last`, `best` (highest validation accuracy) or a step."""


def save(config: ExportConfig) -> pathlib.Path:
    """Exports a run; returns the file.

    Raises:
      UsageError: the file exists already.
      AlexNetError: the run can't be read, or the file can't be written.
    """
    from alexnet_jax.inspection.run import open_run
    from alexnet_jax.runs import shipped
    from alexnet_jax.runs.folder import RunFolder

    if config.out is None and shipped.is_shipped(RunFolder(shipped.located(config.run))):
        raise UsageError(f"{config.run} is part of alexnet_jax: give the file to write with --out")
    out = config.out or config.run / "export" / f"model.{config.format}"
    for path in (out, description_path(out)):
        if path.exists():
            raise UsageError(f"--out {path} exists already: choose another file")
    run = open_run(config.run, config.checkpoint)
    if config.format == "safetensors":
        data = to_safetensors(run)
    else:
        data = to_stablehlo(run)
        write_atomically(description_path(out), to_bytes(_description(run, data)))
    write_atomically(out, data)
    return out


def description_path(function: pathlib.Path) -> pathlib.Path:
    """The JSON file beside an exported function."""
    return function.with_name(function.name + ".json")


def to_safetensors(run: "Run") -> bytes:
    """The weights of a run: arrays `conv1/kernel` .., `mean_image`, and the metadata that `load` needs, as JSON."""
    import safetensors.numpy
    from flax.traverse_util import flatten_dict

    from alexnet_jax.config.config_json import to_json

    basis = {name: array.tolist() for name, array in vars(run.statistics.basis).items()}
    metadata = {
        "config": json.dumps(to_json(run.config)),
        "dataset": json.dumps(dataclasses.asdict(run.dataset)),
        "pca_basis": json.dumps(basis),
        "step": str(run.step),
    }
    arrays = flatten_dict(run.params, sep="/") | {"mean_image": run.statistics.mean_image}
    return safetensors.numpy.save(arrays, metadata | {"sha256": _sha256_of_arrays(arrays, metadata)})


def to_stablehlo(run: "Run") -> bytes:
    """A serialized function of a run: images, uint8 [b, H, W, 3], RGB, 0..255 -> probabilities, float32 [b, classes].

    JAX refuses to call it with floats, so images in [0, 1] are not mistaken for black ones.
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    from alexnet_jax.network import build

    network = dataclasses.replace(run.config.network, convolution="direct")  # runs on all platforms
    model, preprocessing = build.from_config(network, len(run.class_names)), run.preprocessing

    def predict(images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": run.params}, preprocessing.evaluation(images))
        return jax.nn.softmax(logits)

    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *run.dataset.image_shape), jnp.uint8)
    return bytes(export.export(jax.jit(predict), platforms=("cpu", "cuda"))(images).serialize())


def _description(run: "Run", function: bytes) -> dict[str, Any]:
    """Facts for callers of the exported function, and hashes that distinguish a damaged file from an expired one."""
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


def _sha256_of_arrays(arrays: dict[str, Any], metadata: dict[str, str]) -> str:
    """SHA-256 of everything in a safetensors file, independent of the order of its entries."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sha256_of_names(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """An exported network.

    Attributes:
      class_names: name of each class.
      image_shape: (H, W, 3) of the images that it takes.
      predict: class probabilities, float32 [N, classes], of images as `Run.predict` takes them. A stablehlo file rounds
        float images in [0, 1] to 256 grey levels.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    predict: Callable[[Any], Any]


def load(path: str | os.PathLike[str]) -> Exported:
    """Opens a file that `save` has written, in either format.

    Raises:
      AlexNetError: it can't be read, has expired, or is something else.
    """
    from alexnet_jax.exchange.weights import refuse_other_files

    path = expanded(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    try:
        refuse_other_files(data)
        return _load_safetensors(data) if data[8:9] == b"{" else _load_stablehlo(path, data)
    except AlexNetError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise AlexNetError(f"{path}: can't be loaded as an exported network ({reason(error)})") from error


def read_run(path: pathlib.Path) -> "Run | None":
    """The run in a safetensors file that `save` has written; None if the file is something else.

    Its folder has no files.

    Raises:
      AlexNetError: the file can't be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= MOST_METADATA or b'"config"' not in file.read(size):
                return None
        return _run_of(path.read_bytes())
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise AlexNetError(f"{path}: can't be loaded as an exported network ({reason(error)})") from error


def _load_safetensors(data: bytes) -> Exported:
    run = _run_of(data)
    return Exported(run.dataset.class_names, run.dataset.image_shape, run.predict)


def _run_of(data: bytes) -> "Run":
    import numpy as np
    import pydantic
    import safetensors.numpy
    from flax.traverse_util import unflatten_dict

    from alexnet_jax.config.config_json import from_json
    from alexnet_jax.data.statistics import PcaBasis, Statistics
    from alexnet_jax.inspection.run import Run
    from alexnet_jax.runs.folder import DatasetInfo, RunFolder

    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if "config" not in metadata:
        raise ValueError(
            "it does not describe its network; alexnet_jax.exchange.weights.load_weights reads torchvision's"
        )
    arrays = safetensors.numpy.load(data)
    if metadata.pop("sha256", None) != _sha256_of_arrays(arrays, metadata):
        raise ValueError("it is damaged or was changed: its SHA-256 differs; export the run again")
    basis = {name: np.array(value) for name, value in json.loads(metadata["pca_basis"]).items()}
    dataset = pydantic.TypeAdapter(DatasetInfo).validate_python(json.loads(metadata["dataset"]))
    config = from_json(json.loads(metadata["config"]))
    statistics = Statistics(PcaBasis(**basis), arrays.pop("mean_image", np.empty(0)))
    # The file has them in any order; a checkpoint's are sorted.
    params = unflatten_dict({name: arrays[name] for name in sorted(arrays)}, sep="/")
    run = Run(RunFolder(config.workdir), config, dataset, statistics, int(metadata["step"]), params)
    _check_arrays(run, arrays)
    return run


def _check_arrays(run: "Run", found: dict[str, Any]) -> None:
    """Raises ValueError unless the arrays are finite floats of the shapes that the network, classes and images need."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax.traverse_util import flatten_dict

    def check(name: str, array: Any, shape: tuple[int, ...]) -> None:
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, but must be floats {list(shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains Inf or NaN")

    image_shape, model, evaluation = run.dataset.image_shape, run.model, run.preprocessing.evaluation
    check("mean_image", run.statistics.mean_image, image_shape)
    for name, array in vars(run.statistics.basis).items():
        check(f"pca_basis {name}", array, (3, 3) if name == "eigenvectors" else (3,))
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    variables = jax.eval_shape(lambda key, images: model.init(key, evaluation(images)), jax.random.key(0), images)
    wanted = flatten_dict(variables["params"], sep="/")
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

    description = description_path(path)
    try:
        described = json.loads(description.read_bytes())
        names, shape = tuple(described["class_names"]), tuple(described["image_shape"])
        digests = described["sha256"], described["class_names_sha256"]
        wrote, exported = described["jax"], described["exported"]
    except OSError as error:
        raise ValueError(f"{description.name}, which describes it, can't be read: {reason(error)}") from error
    except KeyError as error:
        raise ValueError(f"{description.name}, which describes it, has no {error}") from error
    if digests[0] != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"its SHA-256 differs from that in {description.name}: it is damaged or belongs to another export"
        )
    if digests[1] != _sha256_of_names(names):
        raise ValueError(f"class_names in {description.name} are not those that were exported: their SHA-256 differs")
    try:
        function = export.deserialize(bytearray(data))
        # Lowered here, so that for a file that this JAX can't read, `load` fails rather than the first `predict`.
        jax.jit(function.call).lower(jax.ShapeDtypeStruct((1, *shape), np.uint8))
    except Exception as error:
        if "compatibility window" in str(error) or _numbers(wrote) < _numbers(jax.__version__):
            state = "it has expired"
        else:
            state = "it is from a newer JAX" if _numbers(wrote) > _numbers(jax.__version__) else "it can't be read"
        raise AlexNetError(
            f"{path}: {state} (written by JAX {wrote} on {exported}; JAX {jax.__version__} says: {reason(error)}). JAX "
            "promises to read such files for six months: export the run again; to archive a network use --format "
            "safetensors"
        ) from error

    def predict(images: Any) -> Any:
        return in_parts(lambda part: function.call(np.rint(part).astype(np.uint8)), to_grey_levels(images, shape))

    return Exported(names, shape, predict)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", version)]


def main(args: Sequence[str]) -> None:
    """Parses the flags and exports."""
    config = cli.parse(ExportConfig, args, "python -m alexnet_jax.exchange.export")
    from alexnet_jax import runtime

    runtime.devices()  # before the checkpoint is read, so that an error of JAX is not reported as the checkpoint's
    out = save(config)
    print(f"{out}: open it with alexnet_jax.exchange.export.load")
    if config.format == "stablehlo":
        print(
            f"It takes uint8 RGB images [b, H, W, 3], grey levels 0..255 ({out.name}.json). It expires: JAX promises "
            "to read it for six months; to archive the network use --format safetensors"
        )


if __name__ == "__main__":
    cli.run(main)
