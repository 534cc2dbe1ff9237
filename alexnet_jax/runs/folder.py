"""A run's folder: its paths, and the files that describe the run (config.json, dataset.json, statistics.npz)."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TextIO

import pydantic

import alexnet_jax
from alexnet_jax.config.config_json import differing_settings, from_json, to_json
from alexnet_jax.config.flags import flag, flat_items
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import AlexNetError, UsageError, is_one_line, reason, shown, warn
from alexnet_jax.files import locked, read_bytes, to_bytes, write_atomically

_MAX_BYTES = 16 * 1024**2  # of config.json and dataset.json, which have a few kB
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that results depend on."""
    own = {"alexnet-jax": alexnet_jax.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def _require_one_line(text: str) -> str:
    if not is_one_line(text):
        raise ValueError("must be text without control characters")
    return text


def _require_distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(texts)) < len(texts):
        raise ValueError("names must differ")
    return texts


_Text = Annotated[str, pydantic.Field(min_length=1, max_length=10_000), pydantic.AfterValidator(_require_one_line)]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Description of a run's data set, as in dataset.json; `counts` is empty if the weights were converted."""

    name: _Text
    source: _Text
    class_names: Annotated[tuple[_Text, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_require_distinct)]
    image_shape: Annotated[tuple[PositiveInt, ...], pydantic.Field(min_length=3, max_length=3)]
    counts: dict[Annotated[str, pydantic.Field(pattern="^(train|validation|test)$")], PositiveInt]
    fingerprint: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]  # SHA-256

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")


def describe(dataset: Dataset) -> DatasetInfo:
    """The description of a data set that a run stores.

    Raises:
      AlexNetError: a name of a class can't be stored.
    """
    info = DatasetInfo(
        name=dataset.name,
        source=dataset.source,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        counts=dict(dataset.counts),
        fingerprint=dataset.fingerprint(),
    )
    return _checked(dataclasses.asdict(info), f"{shown(dataset.source)} can't be used")


def _checked(described: Any, problem: str) -> DatasetInfo:
    """A description as in dataset.json; raises AlexNetError if it is none."""
    try:
        return pydantic.TypeAdapter(DatasetInfo).validate_python(described)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = shown(" ".join(map(str, first["loc"])))
        raise AlexNetError(f"{problem} ({where}: {shown(first['input'])}: {first['msg'].lower()})") from None


class RunFolder:
    """Paths in a run's folder; reads and writes the files that describe the run."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.dataset = path / "dataset.json"
        self.statistics = path / "statistics.npz"
        self.metrics = path / "metrics.jsonl"
        self.lock = path / "train.lock"
        self.checkpoints = path / "checkpoints"
        self.saved = path / "saved"
        self.plots = path / "plots"
        self.eval = path / "eval"

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.config.exists()

    def claim(self) -> TextIO:
        """Creates the folder if it is missing and locks it for training; closing the returned file unlocks it.

        Raises:
          UsageError: the folder contains something else, or Orbax can't write to its path.
          AlexNetError: another process is training there, or the folder can't be written.
        """
        if not is_one_line(str(self.path.absolute())):
            raise UsageError(f"--workdir {self.path}: the absolute path must be UTF-8 without control characters")
        try:
            # The lock file is written first: a folder that has one belongs to a run, even if its first start was
            # killed.
            if not self.exists() and not self.lock.exists() and self.path.exists() and any(self.path.iterdir()):
                raise UsageError(f"--workdir {self.path} is not empty and contains no run: choose another folder")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlexNetError(f"can't use --workdir {self.path}: {reason(error)}") from error
        return locked(self.lock, "is training there; wait for it, or choose another --workdir")

    def prepare(self, config: TrainConfig, info: DatasetInfo, statistics: Statistics) -> None:
        """Describes a new run, or checks that the run in this folder can be resumed with this configuration and data.

        Raises:
          UsageError: the run has different settings.
          AlexNetError: the run has different data or has lost its description, or the folder can't be written.
        """
        settings = to_json(_with_absolute_data_dir(config, info))
        from_json(settings)  # may refuse the absolute path
        if self.exists():
            self._check_resumable(config, info)
            if config.network.init_from and not self.statistics.exists():  # has the mean image of those weights
                raise AlexNetError(f"{self.statistics} is missing: copy it back, or choose another --workdir")
        elif self.saved.exists() or any(self.checkpoints.glob("[0-9]*")):
            raise AlexNetError(
                f"{self.config} is missing, but a checkpoint was saved: copy it back, or choose another --workdir"
            )
        else:
            write_atomically(self.dataset, to_bytes(dataclasses.asdict(info)))
        if not self.exists() or not self.statistics.exists():
            write_atomically(self.statistics, statistics.to_bytes())
        # Written last: a folder that has this file contains a run.
        write_atomically(self.config, to_bytes(settings | self._versions()))

    def mark_as_saved(self) -> None:
        """Notes that the run has a checkpoint: if all are lost, it must not be taken for one that has just begun.

        Raises:
          AlexNetError: the folder can't be written.
        """
        if not self.saved.exists():
            write_atomically(self.saved, b"")

    def check_settings(self, config: TrainConfig) -> None:
        """Checks that the run in this folder, if there is one, can be resumed with these settings.

        Raises:
          UsageError: it can't; the message names a setting that differs.
        """
        if not self.exists():
            return
        old = self.read_config()
        if names := differing_settings(old, config):
            before, now = flat_items(old)[names[0]], flat_items(config)[names[0]]
            why = ", on which its cosine schedule depends" if names[0] == "epochs" else ""
            raise UsageError(
                f"{self.path} contains a run with {flag(names[0])} {before}, not {now}{why}: resume it with its own "
                "settings, or choose another --workdir"
            )
        if config.schedule.epochs < old.schedule.epochs:
            raise UsageError(
                f"{self.path} contains a run with --epochs {old.schedule.epochs}, which may only be increased, not "
                f"reduced to {config.schedule.epochs}"
            )

    def _check_resumable(self, config: TrainConfig, info: DatasetInfo) -> None:
        self.check_settings(config)
        if self.read_dataset().fingerprint != info.fingerprint:
            raise AlexNetError(
                f"{self.path} was not trained on the images from {info.source}: set --data-dir to those, or choose "
                "another --workdir"
            )

    def _versions(self) -> dict[str, Any]:
        """The current versions and, for a resumed run, the earlier ones; warns if they differ."""
        now = versions()
        described = self._read_json(self.config) if self.exists() else {}
        before, earlier = described.get("versions"), described.get("earlier_versions") or []
        if isinstance(before, dict) and before != now:
            changed = [f"{n} {shown(before.get(n))} -> {now[n]}" for n in now if before.get(n) != now[n]]
            warn(
                f"{self.path} resumes with different versions ({', '.join(changed)}): results may differ in the last "
                "bits"
            )
            earlier = [*earlier, before]
        return {"versions": now} | ({"earlier_versions": earlier} if earlier else {})

    def read_config(self, defaults: Mapping[str, Any] | None = None) -> TrainConfig:
        """The run's settings; `defaults` are those of settings that the file may lack, as it is older than they are."""
        settings = {**(defaults or {}), **self._read_json(self.config)}
        for name in ("versions", "earlier_versions"):
            settings.pop(name, None)
        try:
            return from_json(settings)
        except UsageError as error:
            raise AlexNetError(f"{self.config}: {error}") from error

    def read_dataset(self) -> DatasetInfo:
        """The description of the run's data set."""
        return _checked(self._read_json(self.dataset), f"{self.dataset} was not written by this program")

    def read_statistics(self) -> Statistics:
        """Mean image (grey levels) and PCA basis of the run's training images."""
        try:
            return Statistics.read(self.statistics)
        except (OSError, ValueError) as error:
            raise AlexNetError(f"{self.statistics}: can't be read ({reason(error)})") from error

    def _read_json(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            value = json.loads(read_bytes(path, _MAX_BYTES))
        except FileNotFoundError:
            raise AlexNetError(f"{self.path} is not a run: it has no {path.name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
        if not isinstance(value, dict):
            raise AlexNetError(f"{path}: must be a JSON object")
        return value


def _with_absolute_data_dir(config: TrainConfig, info: DatasetInfo) -> TrainConfig:
    """The configuration with an absolute `data_dir`, so that the data is found from any working directory.

    This includes data found in the default folder ./data; the other default places are absolute.
    """
    place = config.data.data_dir
    if place is None and pathlib.Path(info.source).is_relative_to(os.path.abspath("data")):
        place = pathlib.Path(info.source)
    absolute = place and pathlib.Path(os.path.abspath(place))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=absolute))
