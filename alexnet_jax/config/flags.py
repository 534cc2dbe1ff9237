"""Flat names of settings, and the flags that they generate."""

import dataclasses
from typing import Any


def flat_items(config: Any) -> dict[str, Any]:
    """All settings of a (nested) configuration by their flat names."""
    items: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items |= flat_items(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return items


def flag(name: str) -> str:
    """The flag of a setting: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def flags_of(config_type: Any) -> list[str]:
    """Every flag that a (nested) configuration class generates."""
    flags = []
    for field in dataclasses.fields(config_type):
        flags += flags_of(field.type) if dataclasses.is_dataclass(field.type) else [flag(field.name)]
    return flags
