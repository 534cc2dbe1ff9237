"""The errors that a user can cause: each becomes one line on the terminal and an exit code, never a traceback."""

import pathlib
import reprlib
import signal
import sys
import unicodedata


class AlexNetError(Exception):
    """Something outside the program is wrong: a file, a data set, a checkpoint, a disk. Exit code 1.

    The message is one line that says what is wrong and what to do.
    """

    exit_code = 1


class UsageError(AlexNetError):
    """The command line or a configuration value is wrong. Exit code 2."""

    exit_code = 2


class StoppedError(BaseException):
    """A signal ended the program. Exit code 128 + its number, as in a shell: SIGHUP 129, SIGINT 130, SIGTERM 143.

    No `Exception`, like KeyboardInterrupt: it comes anywhere, and no library may take it for a failure of its own.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


def warn(message: str) -> None:
    """Prints one line on stderr about what went wrong and was dealt with."""
    if sys.stderr is not None:  # `2>&-`
        print(f"warning: {message}", file=sys.stderr, flush=True)


def program_name() -> str:
    """What begins a line of this program: `train.py`, `python -m alexnet_jax.data.prepare`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m; IPython's has none
    return f"python -m {module.name}" if module else pathlib.PurePath(sys.argv[0]).name


def is_one_line(text: str) -> bool:
    """Whether a text can stand in a line of output: no control characters, no halves of UTF-16 pairs."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def shown(value: object, limit: int = 100) -> str:
    """A value as part of a message of one line: cut in the middle, with escapes for what can't be printed."""
    text = str(value) if isinstance(value, str | int | float | pathlib.Path) else reprlib.repr(value)
    text = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: BaseException, limit: int = 200) -> str:
    """What an exception says, in one line: the `strerror` of an OSError, else its text, else its type."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return shown(" ".join(text.split()) or type(error).__name__, limit)
