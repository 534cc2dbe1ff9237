"""The command line: flags from dataclasses by tyro, errors as one line and an exit code."""

import atexit
import contextlib
import difflib
import gc
import io
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tyro

from alexnet_jax import signals, terminal
from alexnet_jax.config.checks import validate
from alexnet_jax.config.flags import C, flags_of, replace
from alexnet_jax.config.help import help_text, table
from alexnet_jax.config.recipes import DEFAULT_PRESET, PRESETS
from alexnet_jax.config.settings import EvalConfig, TrainConfig
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, is_one_line, program_name, shown
from alexnet_jax.runtime import ignore_settings_of_others, keep_freed_memory, memory_shortage


def parse(config_type: type[C], args: Sequence[str], prog: str, description: str = "", default: C | None = None) -> C:
    """The validated configuration that flags describe; --help and --help-all print their text and exit with 0.

    Raises:
      UsageError: a message of one line; for a misspelled flag, it suggests the closest one.
    """
    for index, arg in enumerate(args):
        if not is_one_line(arg):
            before = f"{shown(args[index - 1])} " if index and args[index - 1].startswith("-") else ""
            raise UsageError(f"{before}{shown(arg)}: contains a control character")
    if wanted := {"-h", "--help", "--help-all"} & set(args):
        print(help_text(prog, description, config_type, default, everything="--help-all" in wanted))
        raise SystemExit(0)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config, unknown = tyro.cli(
                config_type,
                args=args,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_message(printed.getvalue())) from None
    except (AssertionError, OSError) as error:  # of --tyro-write-completion, tyro's own flag
        raise UsageError(f"{shown(args[0])}: {shown(str(error), 300)}") from None
    if unknown:
        raise UsageError(_unknown(unknown[0], args, config_type))
    return validate(config)


def parse_train(args: Sequence[str], settings: Mapping[str, Any] = types.MappingProxyType({})) -> TrainConfig:
    """Parses `[PRESET] [FLAGS]`; `settings`, by flat name, take the place of the preset's, and flags that of both.

    Raises:
      UsageError: for an unknown preset or flag, or an impossible value.
    """
    name, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (DEFAULT_PRESET, args)
    if name not in PRESETS:
        raise UsageError(
            f"unknown preset '{shown(name)}'{_nearest(name, PRESETS)}; the presets are {', '.join(PRESETS)}"
        )
    presets = table([(name, f"{preset.summary} {preset.measured}") for name, preset in PRESETS.items()], column=17)
    description = (
        "Train an AlexNet. Flags change settings of a preset; repeating the command resumes the run.\n\n"
        f"presets, with test accuracy (CIFAR-10's on a JPEG-coded copy) and time:\n{presets}"
    )
    return parse(TrainConfig, flags, "train.py [PRESET]", description, replace(PRESETS[name].config, **settings))


def parse_eval(args: Sequence[str]) -> EvalConfig:
    """Parses `RUN [RUN ...] [FLAGS]`."""
    return parse(EvalConfig, args, "eval.py")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a script's main function; a user's error becomes one line on stderr and the process's exit code."""
    prog = program_name()
    terminal.never_fail()
    keep_freed_memory()
    if is_interactive():
        code = _exit_code(main, prog)
    else:
        ignore_settings_of_others()
        atexit.register(gc.freeze)  # Python would look for cycles among all of JAX's objects at exit: half a second
        with signals.handling(signals.leave_at_once(prog)):
            code = _exit_code(main, prog)
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[Sequence[str]], None], prog: str) -> int:
    try:
        main(sys.argv[1:])
    except StoppedError as stop:
        if is_interactive():
            print(f"{prog}: {stop}", file=sys.stderr)
            return stop.exit_code
        for number in signals.handled():
            signal.signal(number, signal.SIG_IGN)  # a second signal would change the exit code
        print(f"{prog}: {stop}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(stop.exit_code)
    except Exception as error:
        # Running out of memory can surface as an error about whatever was being read.
        error = memory_shortage(error) or error
        if not isinstance(error, AlexNetError | OSError):  # OSError: a disk that is full or was disconnected
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, AlexNetError) else AlexNetError.exit_code
    return 0


def is_interactive() -> bool:
    """Whether the interpreter outlives the program: in IPython, a notebook, or `python -i`."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _message(printed: str) -> str:
    """The message in tyro's error text, without its title and the help that follows.

    Tyro draws rules between the parts, in colour on a terminal, and a box around them where the output is UTF-8.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    _, *lines = [line.strip("│╭╮╰╯ ") for line in plain.strip().splitlines()] or [""]
    text = "\n".join(lines).lstrip("-\n")
    message = re.split(r"\n[─-]+\n(?=Argument helptext|For full helptext)", text)[0]
    # The text after it describes types in Python's notation.
    return shown(" ".join(message.split()).split(" Got errors:")[0], 500)


def _unknown(word: str, args: Sequence[str], config_type: type) -> str:
    if word not in args and (flags := [arg.split("=")[0] for arg in args if arg.endswith(f"={word}")]):
        return f"{shown(flags[0])} takes no value, not '{shown(word)}'"
    if not word.startswith("-"):
        return f"unexpected argument '{shown(word)}'"
    name = shown(word.split("=")[0])
    return f"unknown flag {name}{_nearest(name, flags_of(config_type))} (--help-all lists all)"


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word[:100], list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""
