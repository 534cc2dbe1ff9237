"""config.json: writing and reading settings, and which of them may change when a run is resumed."""

import pathlib
from collections.abc import Mapping
from typing import Any

from alexnet_jax.config.checks import from_settings
from alexnet_jax.config.flags import fields, flat_items, marked
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.config.types import Mark
from alexnet_jax.errors import UsageError, shown


def to_json(config: TrainConfig) -> dict[str, Any]:
    """All settings as a flat, JSON-ready dict."""
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flat_items(config).items()
    }


def from_json(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_json`.

    Raises:
      UsageError: naming the setting that is missing, unknown or refused.
    """
    names = [field.name for field in fields(TrainConfig)]
    for name in names:
        if name not in settings:
            raise UsageError(f"setting '{name}' is missing")
    for name in settings:
        if name not in names:
            raise UsageError(f"unknown setting '{shown(name)}'")
    return from_settings(TrainConfig, settings)


def differing_settings(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Names of the settings that differ, other than those that may change when a run of `old` is resumed."""
    may_change = marked(TrainConfig, Mark.MAY_CHANGE)
    if old.optimizer.rate_schedule == "cosine":  # its rate depends on the number of epochs
        may_change -= {"epochs"}
    new_items = flat_items(new)
    return [n for n, value in flat_items(old).items() if n not in may_change and new_items[n] != value]
