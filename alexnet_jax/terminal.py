"""Output that can't end a program: nobody reads it any more, the disk is full, or its encoding lacks a character."""

import io
import os
import sys
from typing import Any


class _Unfailing(io.FileIO):
    """A file that drops what can't be written."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def unfailing(descriptor: int, encoding: str | None = None) -> io.TextIOWrapper:
    """A text stream on a descriptor that escapes what `encoding` can't show and ignores write errors.

    It writes line by line: a program that is killed must have shown what it said.
    """
    raw = io.BufferedWriter(_Unfailing(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def never_fail() -> None:
    """Makes stdout and stderr `unfailing`, unless they are somebody else's, such as a notebook's.

    A closed one becomes the null device; else the next file that is opened would get its descriptor, and with it what
    libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, unfailing(number, getattr(stream, "encoding", None)))


def bar(share: float, width: int = 40) -> str:
    """A bar for a share in [0, 1], `width` characters long at 1."""
    block = "█"
    try:
        block.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        block = "#"
    return block * round(width * share)
