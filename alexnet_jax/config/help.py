"""The text of --help, which has the flags that most runs need, and of --help-all."""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin

import tyro

from alexnet_jax.config.flags import flag, marked, marks
from alexnet_jax.config.types import Mark

POSITIONAL, SUPPRESSED = (get_args(marker)[1] for marker in (tyro.conf.Positional[int], tyro.conf.Suppress[int]))
UNSET = {int: "INT", float: "FLOAT", str: "TEXT", pathlib.Path: "PATH"}

Rows = list[tuple[str, str]]


class Section(NamedTuple):
    """The flags of one configuration class: (flag with its default, help text) of each."""

    title: str
    rows: Rows


def help_text(prog: str, description: str, config_type: Any, default: Any, everything: bool) -> str:
    """Usage, description, and the flags with their defaults and docstrings.

    Args:
      prog: the program, and what precedes its arguments.
      description: its lines are kept. Empty: the docstring of the class.
      config_type: the configuration class.
      default: a configuration with the default values; None: the class has them.
      everything: whether to list flags marked as rare, and print more than the first paragraphs of docstrings.
    """
    sections = _sections("flags, with their defaults", config_type, default, everything)
    rows = [row for section in sections for row in section.rows]
    usage = [prog, *(name for name, _ in rows if not name.startswith("--")), "[FLAGS]"]
    if not everything:
        sections = [Section(sections[0].title, rows)]
    parts = [f"usage: {' '.join(usage)}", description or inspect.getdoc(config_type) or ""]
    parts += [f"{section.title}:\n{table(section.rows, 26)}" for section in sections if section.rows]
    if not everything and marked(config_type, Mark.RARE):
        parts.append("--help-all lists all flags.")
    return "\n\n".join(parts)


def table(rows: Iterable[tuple[str, str]], column: int) -> str:
    """Names, and texts from `column` on, wrapped at the width of the terminal."""
    width, margin = max(shutil.get_terminal_size().columns, 2 * column), " " * column
    lines = []
    for name, text in rows:
        start = f"  {name} "
        if len(start) > column:
            lines.append(start.rstrip())
            start = ""
        start = start.ljust(column)
        lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=margin, break_on_hyphens=False)
    return "\n".join(lines)


def _sections(title: str, config_type: Any, default: Any, everything: bool) -> list[Section]:
    docstrings = _docstrings(config_type)
    own, nested = Section(title, []), []
    for field in dataclasses.fields(config_type):
        value = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(field.type):
            title = f"{field.name} ({inspect.getdoc(field.type)})".replace(".)", ")")
            nested += _sections(title, field.type, value, everything)
        elif SUPPRESSED not in get_args(field.type) and (everything or Mark.RARE not in marks(field)):
            first, *others = docstrings.get(field.name, "").split("\n\n")
            own.rows.append(_row(field, value, first, others if everything else []))
    return [own, *nested]


def _row(field: dataclasses.Field[Any], value: Any, summary: str, details: list[str]) -> tuple[str, str]:
    kind = _kind(field.type)
    if get_origin(kind) is Literal and not all(str(choice) in summary for choice in get_args(kind)):
        summary = f"{summary.removesuffix('.')}: {', '.join(map(str, get_args(kind)))}."
    if POSITIONAL in get_args(field.type):
        name = field.name.upper() if value is dataclasses.MISSING else f"[{field.name.upper()} ...]"
    elif kind is bool:
        name = f"{flag(field.name)}, {flag('no_' + field.name)}"
        details = [*details, f"Default: {'on' if value else 'off'}."]
    else:
        name = f"{flag(field.name)} {_words(value) or _unset(field.type)}"
    return name, " ".join(" ".join([summary, *details]).split())


def _docstrings(config_type: type) -> dict[str, str]:
    """The docstrings below a class's fields."""
    definition = ast.parse(inspect.getsource(config_type)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                found[name] = inspect.cleandoc(docstring)
    return found


def _kind(annotation: Any) -> Any:
    """T in T, Annotated[T, ...], T | None or tuple[T, ...]."""
    return annotation if get_origin(annotation) in (None, Literal) else _kind(get_args(annotation)[0])


def _unset(annotation: Any) -> str:
    """What stands for the value of a flag that has none."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case None:
            return UNSET[annotation]
        case origin if origin is Literal:
            return "NAME"
        case origin if origin is tuple:
            return " ".join("..." if argument is Ellipsis else _unset(argument) for argument in arguments)
        case _:  # Annotated[T, ...], T | None
            return _unset(arguments[0])


def _words(value: Any) -> str:
    """A value as it is written after its flag."""
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return "" if value is None or value is dataclasses.MISSING else str(value)
