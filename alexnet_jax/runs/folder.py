"""What describes a run: config.json, dataset.json, statistics.npz."""

import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import warnings
import zipfile
from typing import Annotated, Any, ClassVar, TextIO

import numpy as np
import pydantic

import alexnet_jax
from alexnet_jax.config.flags import flag, flat_items
from alexnet_jax.config.saved import differing_settings, from_json, to_json
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.statistics import PcaBasis, Statistics
from alexnet_jax.errors import AlexNetError, UsageError, is_one_line, shown, warn
from alexnet_jax.files import locked, read_bytes, to_bytes, write_atomically

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


def describe(dataset: Dataset) -> DatasetInfo:
    """What a run remembers of its data set."""
    return DatasetInfo(
        name=dataset.name,
        source=dataset.source,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        counts=dict(dataset.counts),
        fingerprint=dataset.fingerprint(),
    )


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

    def prepare(self, config: TrainConfig, info: DatasetInfo, statistics: Statistics) -> None:
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

    def read_statistics(self) -> Statistics:
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
        return Statistics(PcaBasis(**found), mean_image)

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
