"""SIGINT and SIGTERM: the first asks for an end, the second is one."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

from alexnet_jax.errors import StoppedError

HANDLED = (signal.SIGINT, signal.SIGTERM)


def leave_at_once(prog: str) -> Callable[[int, FrameType | None], NoReturn]:
    """A handler for a time when there is nothing to save.

    It raises nothing: where Python is called back from C, as by the garbage collector, an exception would be swallowed.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        stop = StoppedError(number, "stopped; the same command goes on")
        os.write(sys.stderr.fileno(), f"{prog}: {stop}\n".encode())
        os._exit(stop.exit_code)

    return leave


class StopSignals:
    """In its `with` block the first SIGINT or SIGTERM is only noted, the second ends the process at once.

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
            self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in HANDLED}
            threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_fd)
            self._writer.close()  # which ends the thread

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while byte := reader.recv(1):
                if byte[0] in HANDLED:
                    if self.received is not None:
                        os._exit(128 + byte[0])
                    self.received = byte[0]
