"""Settings by flat name: flags and the keys of config.json are derived from these names."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro

from alexnet_jax.config.types import Mark

C = TypeVar("C")
POSITIONAL, SUPPRESSED = (get_args(marker)[1] for marker in (tyro.conf.Positional[int], tyro.conf.Suppress[int]))


def fields(config_type: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a configuration class, with each nested class replaced by its fields."""
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type)
        else:
            yield field


def flat_items(config: Any) -> dict[str, Any]:
    """All settings of a (nested) configuration by flat name."""
    items: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items |= flat_items(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return items


def replace(config: C, **settings: Any) -> C:
    """`dataclasses.replace` with flat names: `replace(TrainConfig(), epochs=3, flip=True)`.

    Raises:
      TypeError: there is no such setting.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names = [nested.name for nested in fields(value) if nested.name in settings]
            changed[field.name] = replace(value, **{name: settings.pop(name) for name in names})
    return dataclasses.replace(config, **changed, **settings)  # type: ignore[type-var]


def flag(name: str) -> str:
    """The flag of a setting: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def argument(field: dataclasses.Field[Any]) -> str:
    """A setting's name on the command line: its flag, or `RUN` for a positional argument."""
    return field.name.upper() if POSITIONAL in metadata(field) else flag(field.name)


def flags_of(config_type: Any) -> list[str]:
    """Every flag of a (nested) configuration class."""
    return [
        flag(field.name)
        for field in fields(config_type)
        if POSITIONAL not in metadata(field) and SUPPRESSED not in metadata(field)
    ]


def metadata(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """The metadata in a field's annotation: `Mark`s and others."""
    return get_args(field.type)[1:] if get_origin(field.type) is Annotated else ()


def marked(config_type: Any, mark: Mark) -> set[str]:
    """Names of the settings that have a mark."""
    return {field.name for field in fields(config_type) if mark in metadata(field)}


def shared_settings(config: Any) -> dict[str, Any]:
    """The settings that must be the same in all processes of a training run, by flag."""
    own = marked(type(config), Mark.PER_PROCESS)
    return {flag(name): value for name, value in flat_items(config).items() if name not in own}
