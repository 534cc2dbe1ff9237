"""Types of settings: ranges, paths, addresses."""

import pathlib
import urllib.parse
from typing import Annotated, Literal, TypeVar

import pydantic
import pydantic_core
import tyro

from alexnet_jax.errors import UsageError, is_one_line
from alexnet_jax.files import expanded

C = TypeVar("C")


def _not_empty(path: object) -> object:
    if path == "":
        raise pydantic_core.PydanticCustomError("empty_path", "the path is empty: give one, or leave the flag out")
    return path


def _usable(path: pathlib.Path, info: pydantic.ValidationInfo) -> pathlib.Path:
    if not is_one_line(str(path)):
        raise ValueError("a path without control characters is needed")
    try:
        return expanded(path) if info.context == _FLAGS else path  # what config.json holds was expanded before
    except UsageError as error:
        raise pydantic_core.PydanticCustomError("home", str(error).split(": ", 1)[1]) from None


def web_address(url: str) -> str:
    """The address of a file on the web, as it is given.

    Raises:
      ValueError: it is none.
    """
    parts = urllib.parse.urlsplit(url)  # ValueError for half an IPv6 address
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("an address that begins with http:// or https:// is needed")
    if not url.isascii():
        raise ValueError("a percent-encoded address, with the host name in its xn-- form, is needed")
    if parts.username is not None:
        raise ValueError("an address without user name and password is needed")
    return url


# Strict, as config.json would otherwise be read with "3" and true for numbers. Steps are counted in 32 bits, and JAX
# drops the bits of a seed beyond 32.
_INT_END = 2**31
PositiveInt = Annotated[int, pydantic.Field(gt=0, lt=_INT_END, strict=True)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0, lt=_INT_END, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32, strict=True)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False, strict=True)]
FiniteFloat = Annotated[float, pydantic.Field(allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, strict=True)]
Bool = Annotated[bool, pydantic.Field(strict=True)]
LayerName = Literal[
    "conv1", "conv2", "conv3", "conv4", "conv5", "local3", "local4", "fc1", "fc2", "logits"
]  # fmt: skip
Path = Annotated[
    pathlib.Path,
    pydantic.BeforeValidator(_not_empty),
    pydantic.AfterValidator(_usable),
    # From the command line as text until it is validated: pathlib.Path("") would be the working directory.
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: args[0],
        is_instance=lambda value: isinstance(value, str | pathlib.Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
WebAddress = Annotated[str, pydantic.AfterValidator(web_address)]
_FLAGS = "flags"  # the context of a validation
