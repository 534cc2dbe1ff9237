"""Settings as config.json holds them, and which of them a resumed run may change."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from alexnet_jax.config.checks import _from_nested
from alexnet_jax.config.flags import flat_items
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.errors import UsageError, shown

# Settings that may differ when a run is resumed: they change no draw and no batch. (Devices, parallelism and steps in a
# call change the rounding: a run goes on bit for bit with the same of all three.)
RESUMABLE = frozenset(
    {
        "preset", "data_dir", "data_url", "epochs", "workdir", "num_devices", "steps_per_call", "eval_batch_size",
        "log_every", "eval_every", "checkpoint_every", "tensorboard", "compilation_cache",
        "stall_steps", "loader_workers", "distributed", "coordinator", "num_processes", "process_id",
        "peer_timeout", "parallelism",
    }
)  # fmt: skip

# Settings in which the processes of one training may differ.
OWN = frozenset({"data_dir", "data_url", "workdir", "coordinator", "process_id", "loader_workers", "compilation_cache"})

# Settings that runs of the first version don't have. Their defaults are what it did.
ADDED = frozenset(
    {
        "activation", "lrn", "pool_window", "conv1_stride", "dropout_after", "rate_schedule", "warmup_epochs",
        "nesterov", "layer_decays", "label_smoothing", "average_decay", "distributed", "coordinator", "num_processes",
        "process_id", "peer_timeout", "parallelism", "data_url",
    }
)  # fmt: skip


def to_json(config: TrainConfig) -> dict[str, Any]:
    """All settings as a flat, JSON-ready dict."""
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flat_items(config).items()
    }


def from_json(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Keys that this version doesn't know are refused; `ADDED` ones may be missing.

    Raises:
      UsageError: naming the setting that is missing, unknown or has an impossible value.
    """
    nested: dict[str, Any] = {}
    known = set()
    for field in dataclasses.fields(TrainConfig):
        names = [f.name for f in dataclasses.fields(field.type)] if isinstance(field.type, type) else None
        known |= set(names or [field.name])
        if missing := [name for name in names or [field.name] if name not in {*settings, *ADDED}]:
            raise UsageError(f"setting {missing[0]!r} is missing")
        given = {name: settings[name] for name in names or [field.name] if name in settings}
        nested |= {field.name: given} if names else given
    if unknown := sorted(set(settings) - known):
        raise UsageError(f"unknown setting '{shown(unknown[0])}'")
    return _from_nested(TrainConfig, nested)


def differing_settings(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Names of the settings that forbid `new` to go on with a run of `old`."""
    new_items = flat_items(new)
    # A schedule to the last epoch's end hangs on where that is.
    may_differ = RESUMABLE - {"epochs"} if old.optimizer.rate_schedule == "cosine" else RESUMABLE
    return [n for n, value in flat_items(old).items() if n not in may_differ and new_items[n] != value]
