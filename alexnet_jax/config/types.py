"""Types of settings: ranges, paths, addresses; and marks that a setting's annotation may carry."""

import enum
import pathlib
import re
import urllib.parse
from typing import Annotated

import pydantic
import tyro

from alexnet_jax.errors import UsageError, is_one_line
from alexnet_jax.files import expanded


class Mark(enum.Enum):
    """A property of a setting, given in its annotation: `Annotated[PositiveInt, Mark.MAY_CHANGE]`."""

    MAY_CHANGE = "may change when a run is resumed, because no random draw and no batch depends on it"
    PER_PROCESS = "may differ between the processes of one training run"
    RARE = "rarely needed: its flag is listed by --help-all, not by --help"


FROM_FLAGS = "from flags"  # pydantic's context while flags are validated


def _not_empty(path: object) -> object:
    if path == "":
        raise ValueError("the path is empty: give one, or omit the flag")
    return path


def _usable(path: pathlib.Path, info: pydantic.ValidationInfo) -> pathlib.Path:
    """Expands `~` in the path of a flag; config.json holds paths that were expanded before."""
    if not is_one_line(str(path)):
        raise ValueError("must be a path without control characters")
    if info.context != FROM_FLAGS:
        return path
    try:
        return expanded(path)
    except UsageError as error:
        raise ValueError(str(error).split(": ", 1)[1]) from None


def web_address(url: str) -> str:
    """Returns `url` unchanged if it is the address of a file on the web, else raises ValueError."""
    parts = urllib.parse.urlsplit(url)  # ValueError for half an IPv6 address
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("must be an address that begins with http:// or https://")
    if not url.isascii():
        raise ValueError("must be percent-encoded, with the host name in its xn-- form")
    if parts.username is not None:
        raise ValueError("must be an address without user name and password")
    return url


def _checkpoint(name: str) -> str:
    if not re.fullmatch("last|best|[0-9]{1,18}", name):
        raise ValueError("must be last, best or a step")
    return name


# Strict: otherwise "3" and true in config.json would be accepted as numbers. Steps are counted in 32 bits, and JAX
# drops the bits of a seed beyond the lowest 32.
_INT_END = 2**31
PositiveInt = Annotated[int, pydantic.Field(gt=0, lt=_INT_END, strict=True)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0, lt=_INT_END, strict=True)]
ImageSize = Annotated[int, pydantic.Field(ge=8, le=1024, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32, strict=True)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False, strict=True)]
FiniteFloat = Annotated[float, pydantic.Field(allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, strict=True)]
Bool = Annotated[bool, pydantic.Field(strict=True)]
Path = Annotated[
    pathlib.Path,
    pydantic.BeforeValidator(_not_empty),
    pydantic.AfterValidator(_usable),
    # Text from the command line until it is validated, because pathlib.Path("") would be the working directory.
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: args[0],
        is_instance=lambda value: isinstance(value, str | pathlib.Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
WebAddress = Annotated[str, pydantic.AfterValidator(web_address)]
Checkpoint = Annotated[str, pydantic.AfterValidator(_checkpoint)]
