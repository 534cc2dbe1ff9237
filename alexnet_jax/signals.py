"""SIGINT, SIGTERM, SIGHUP: save and exit at the first, exit at once at a second."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from alexnet_jax.errors import StoppedError, program_name

SECOND_AFTER = 0.1  # seconds after which another signal counts as a second one
Handler = Callable[[int, FrameType | None], object]


def handled() -> list[signal.Signals]:
    """The signals that end a program. SIGHUP (the terminal was closed) is not one under nohup and on Windows."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    return numbers


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Installs `handler` for the signals that end a program, while the block runs and while the interpreter exits."""
    before = {number: signal.signal(number, handler) for number in handled()}
    try:
        yield
    finally:
        # An interpreter that stays alive (`%run train.py`) gets its handlers back. Otherwise it exits now, and a signal
        # during the exit would print a traceback.
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        atexit.register(lambda: [signal.signal(number, handler) for number in before])


def leave_at_once(prog: str, message: str = "stopped") -> Callable[[int, FrameType | None], NoReturn]:
    """A handler that ends the process with one line; for times when there is nothing to save.

    It doesn't raise: where C calls back into Python, as the garbage collector does, an exception would be swallowed.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        stop = StoppedError(number, message)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal is closed
            os.write(sys.stderr.fileno(), f"{prog}: {stop}\n".encode())
        os._exit(stop.exit_code)

    return leave


class StopSignals:
    """Inside its `with` block, the first SIGINT, SIGTERM or SIGHUP is only recorded; a second one ends the process.

    A signal less than 0.1 s after the first is ignored: closing a terminal may send SIGHUP twice, and a process manager
    may send SIGTERM twice. A second SIGHUP is always ignored.

    Python calls handlers between its own instructions, so a handler would wait while XLA compiles. Here the
    interpreter's C handler writes the signal's number into a socket, from which a thread reads it.

    Attributes:
      received: number of the signal; None before the first, and always outside the main thread.
    """

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno())
            self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in handled()}
            threading.Thread(target=self._watch, args=(self._reader, set(self._handlers)), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(self._wakeup_fd)
            self._writer.close()  # ends the thread

    def _watch(self, reader: socket.socket, numbers: set[int]) -> None:
        with reader:
            while byte := reader.recv(1):
                if byte[0] not in numbers:
                    continue
                if self.received is None:
                    self.received, first = byte[0], time.monotonic()
                elif byte[0] != getattr(signal, "SIGHUP", None) and time.monotonic() - first > SECOND_AFTER:
                    leave_at_once(program_name(), "stopped immediately; unsaved work is lost")(byte[0], None)
