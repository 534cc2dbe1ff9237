"""Errors that a user can cause: one line and an exit code, never a traceback."""

import pathlib
import reprlib
import signal
import sys
import unicodedata


class AlexNetError(Exception):
    """Something outside the program is wrong: a file, a data set, a checkpoint, a disk. Exit code 1.

    The message is one line that says what is wrong, then what to do.
    """

    exit_code = 1


class UsageError(AlexNetError):
    """The command line or a configuration value is wrong. Exit code 2."""

    exit_code = 2


class StoppedError(BaseException):
    """A signal ended the program. Exit code 128 + its number, as in a shell: SIGHUP 129, SIGINT 130, SIGTERM 143.

    Like KeyboardInterrupt, not an `Exception`: it can occur anywhere, and no library may handle it as its own failure.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


def warn(message: str) -> None:
    """Prints a one-line warning on stderr."""
    if sys.stderr is not None:  # `2>&-`
        print(f"warning: {message}", file=sys.stderr, flush=True)


def program_name() -> str:
    """The name that starts this program's messages: `train.py`, `python -m alexnet_jax.data.prepare`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m; IPython's has none
    return f"python -m {module.name}" if module else pathlib.PurePath(sys.argv[0]).name


def command(name: str) -> str:
    """The command `train` or `eval`: a module if this program is run as one, since a wheel has no `train.py`."""
    is_module = program_name().startswith("python -m alexnet_jax.")
    return f"python -m alexnet_jax.{name}" if is_module else f"python {name}.py"


def is_one_line(text: str) -> bool:
    """Whether a text can be printed in one line: it has no control characters and no lone UTF-16 surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def shown(value: object, limit: int = 100) -> str:
    """A value for a one-line message: longer text is cut in the middle, unprintable characters are escaped."""
    text = str(value) if isinstance(value, str | int | float | pathlib.Path) else reprlib.repr(value)
    text = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: BaseException, limit: int = 200) -> str:
    """An exception's reason, in one line: the system's `strerror`, else its message, else the name of its type."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return shown(" ".join(text.split()) or type(error).__name__, limit)
