"""SIGINT, SIGTERM and SIGHUP: the first one asks the program to save and leave, another one ends it at once."""

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

SECOND_AFTER = 0.1  # seconds after which another signal is meant as such
Handler = Callable[[int, FrameType | None], object]


def handled() -> list[signal.Signals]:
    """The signals that end a program; SIGHUP, which says that the terminal is closed, not under nohup or on Windows."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    return numbers


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Has `handler` called for signals that end a program while the block runs, and while the interpreter ends."""
    before = {number: signal.signal(number, handler) for number in handled()}
    try:
        yield
    finally:
        # In a living interpreter (`%run train.py`) others have their handlers back. Elsewhere it ends now, and a signal
        # in its last moments would print a traceback.
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        atexit.register(lambda: [signal.signal(number, handler) for number in before])


def leave_at_once(prog: str, message: str = "stopped") -> Callable[[int, FrameType | None], NoReturn]:
    """A handler for a time when there is nothing to save.

    It raises nothing: where Python is called back from C, as by the garbage collector, an exception would be swallowed.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        stop = StoppedError(number, message)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal is closed
            os.write(sys.stderr.fileno(), f"{prog}: {stop}\n".encode())
        os._exit(stop.exit_code)

    return leave


class StopSignals:
    """In its `with` block the first SIGINT, SIGTERM or SIGHUP is only noted, a later one ends the process at once.

    Later is 0.1 s and more after the first: what closes a terminal may send SIGHUP twice, and what stops a process,
    SIGTERM. A second SIGHUP is ignored.

    Python calls handlers between its own instructions, so one would wait while XLA compiles. Here the interpreter's C
    handler writes the signal's number into a socket, and a thread reads it there.

    Attributes:
      received: the signal's number, None before it has come. In threads other than the main one it never comes.
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
            self._writer.close()  # which ends the thread

    def _watch(self, reader: socket.socket, numbers: set[int]) -> None:
        with reader:
            while byte := reader.recv(1):
                if byte[0] not in numbers:
                    continue
                if self.received is None:
                    self.received, first = byte[0], time.monotonic()
                elif byte[0] != getattr(signal, "SIGHUP", None) and time.monotonic() - first > SECOND_AFTER:
                    leave_at_once(program_name(), "stopped at once; what was not saved is lost")(byte[0], None)
