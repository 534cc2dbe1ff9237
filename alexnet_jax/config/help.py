"""The text of --help, which lists the flags that most runs need, and of --help-all, which lists all."""

import ast
import dataclasses
import inspect
import itertools
import pathlib
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from alexnet_jax.config.flags import POSITIONAL, SUPPRESSED, argument, flag, marked, metadata
from alexnet_jax.config.types import Mark

UNSET = {int: "INT", float: "FLOAT", str: "TEXT", pathlib.Path: "PATH"}

Row = tuple[str, str]  # a flag with its default; its help text


def help_text(prog: str, description: str, config_type: Any, default: Any, everything: bool) -> str:
    """Usage, description, and the flags with their defaults and docstrings.

    Args:
      prog: the program, with the words that precede its arguments.
      description: printed with its own line breaks. Empty: the docstring of the class is used.
      config_type: the configuration class.
      default: a configuration with the default values. None: the defaults of the class.
      everything: whether to list flags marked as rare, and print more than the first paragraphs of docstrings.
    """
    sections = _sections("flags, with their defaults", config_type, default, everything)
    rows = [row for _, section in sections for row in section]
    usage = [prog, *(name for name, _ in rows if not name.startswith("--")), "[FLAGS]"]
    if not everything:
        sections = [(sections[0][0], rows)]
    parts = [f"usage: {' '.join(usage)}", description or inspect.getdoc(config_type) or ""]
    parts += [f"{title}:\n{table(section, 26)}" for title, section in sections if section]
    if not everything and marked(config_type, Mark.RARE):
        parts.append("--help-all lists all flags.")
    return "\n\n".join(parts)


def table(rows: Iterable[Row], column: int) -> str:
    """A table of names and, from `column` on, their texts, wrapped at the width of the terminal."""
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


def _sections(title: str, config_type: Any, default: Any, everything: bool) -> list[tuple[str, list[Row]]]:
    """The flags of a class, and below them those of the classes of its fields, each with a title."""
    docstrings = _docstrings(config_type)
    rows: list[Row] = []
    nested = []
    for field in dataclasses.fields(config_type):
        value = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(field.type):
            about = (inspect.getdoc(field.type) or "").removesuffix(".")
            nested += _sections(f"{field.name} ({about})", field.type, value, everything)
        elif SUPPRESSED not in metadata(field) and (everything or Mark.RARE not in metadata(field)):
            summary, *details = docstrings.get(field.name, "").split("\n\n")
            rows.append(_row(field, value, summary, details if everything else []))
    return [(title, rows), *nested]


def _row(field: dataclasses.Field[Any], value: Any, summary: str, details: list[str]) -> Row:
    kind = _kind(field.type)
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    if not all(choice in summary for choice in choices):
        summary = f"{summary.removesuffix('.')}: {', '.join(choices)}."
    if POSITIONAL in metadata(field):
        name = argument(field) if value is dataclasses.MISSING else f"[{argument(field)} ...]"
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
    """The placeholder for the value of a flag without a default."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case None:
            return UNSET.get(annotation, "VALUE")
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
