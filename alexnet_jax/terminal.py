"""Output that never ends the program: closed pipe, full disk, missing character."""

import io
import os
import sys
from typing import Any


class _Unfailing(io.FileIO):
    """A file that drops data that can't be written."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def unfailing(descriptor: int, encoding: str | None = None) -> io.TextIOWrapper:
    """A text stream on a file descriptor that ignores write errors and escapes characters that `encoding` lacks.

    It is line-buffered, so that lines printed before a kill are shown.
    """
    raw = io.BufferedWriter(_Unfailing(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def never_fail() -> None:
    """Makes stdout and stderr `unfailing`, unless they were replaced, as in a notebook.

    Closed descriptors are opened on the null device: otherwise the next file to be opened would get the descriptor, and
    with it the output of libraries.
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
    """A bar of text for a share in [0, 1], `width` characters long at 1."""
    block = "█"
    try:
        block.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        block = "#"
    return block * round(width * share)
