"""Heartbeat between processes: if one of them dies or hangs, the others exit within 30 s with one line that names it.

Otherwise the others would wait in a collective forever: JAX notices a lost process after 100 seconds, and then prints
pages of its own output. Therefore every second, each process writes a beat and its progress to the key-value store of
JAX's coordination service (in process 0), and reads those of the others. For a process that is alive but makes no
progress, the limit is `STUCK` times as long.
"""

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; Orbax imports it from here as well

from alexnet_jax import terminal
from alexnet_jax.errors import program_name, reason, shown

BEAT = 1.0  # seconds
# Limit for a process that makes no progress while others wait for it, in multiples of the timeout for silence.
STUCK = 30
LOST_LINK = re.compile(r"gloo|nccl|UNAVAILABLE|coordination|socket closed|connection (closed|reset)", re.IGNORECASE)
_BEATS, _ENDS = "alexnet_jax/beats/", "alexnet_jax/ends/"


class HeldBackOutput:
    """Delays the output of C++ libraries by one second, and drops it if the process exits earlier.

    A process that exits therefore prints one line, without the pages of gloo and gRPC. Python's own output is not
    delayed.

    Attributes:
      stderr: Python's stderr, even while `sys.stderr` is replaced (as it is while Orbax writes).
      is_muted: whether the output of C++ libraries is dropped.
      on_lost_service: called when JAX's client has lost the service in process 0 and is about to abort this process;
        it must exit.
    """

    def __init__(self, on_lost_service: Callable[[], None]) -> None:
        self.is_muted, self.on_lost_service = False, on_lost_service
        for name, fd in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            stream.flush()
            setattr(sys, name, terminal.unfailing(os.dup(fd), stream.encoding))
        self.stderr = sys.stderr
        self._reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        self._lines: deque[tuple[float, bytes]] = deque()
        self._begun = b""
        threading.Thread(target=self._relay, daemon=True).start()
        # JAX's client aborts in its own thread; Python would call a handler only after that.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _abort(self, number: int) -> None:
        """The handler of SIGABRT."""
        time.sleep(BEAT / 5)  # until earlier output has been read
        if b"distributed service" in b"".join(line for _, line in list(self._lines)):
            self.is_muted = True
            self.on_lost_service()
        time.sleep(2 * BEAT)  # until everything is shown
        self._libc.signal(signal.SIGABRT, None)  # the default handler, because `abort` continues

    def _relay(self) -> None:
        while True:
            wait = max(0.0, self._lines[0][0] - time.monotonic()) if self._lines else None
            if select.select([self._reader], [], [], wait)[0]:
                *lines, self._begun = (self._begun + os.read(self._reader, 2**16)).split(b"\n")
                self._lines.extend((time.monotonic() + BEAT, line + b"\n") for line in lines)
            while self._lines and self._lines[0][0] <= time.monotonic():
                if not self.is_muted and not self._lines[0][1].startswith(b"[Gloo] Rank"):
                    with contextlib.suppress(OSError):  # its reader has exited
                        os.write(self.stderr.fileno(), self._lines[0][1])
                self._lines.popleft()


class Peer:
    """What is known about another process.

    Attributes:
      beat: number of its last beat.
      heard: when that changed, in seconds (`time.monotonic`).
      progress: its number of calls of `Watchdog.advance`.
      moved: when that changed, in seconds.
    """

    def __init__(self) -> None:
        self.beat = self.progress = -1
        self.heard = self.moved = time.monotonic()

    def hear(self, beat: int, progress: int) -> None:
        """Records a message of the process."""
        now = time.monotonic()
        if beat != self.beat:
            self.beat, self.heard = beat, now
        if progress != self.progress:
            self.progress, self.moved = progress, now


class Watchdog:
    """Exits with one line and a nonzero exit code soon after another process is lost.

    A process is lost if it has failed (the others then repeat its message), has been silent for `timeout` seconds, or
    has made no progress for `STUCK` times as long while this process waits for it.

    Attributes:
      process_id: number of this process, known even if JAX finds no device.
    """

    def __init__(self, timeout: float, output: HeldBackOutput) -> None:
        """Starts two threads; JAX must have joined the processes. `output` is muted when this process exits."""
        self._timeout, self._output = timeout, output
        self._store: Any = distributed.global_state.client
        self.process_id = distributed.global_state.process_id
        self._peers = {i: Peer() for i in range(distributed.global_state.num_processes) if i != self.process_id}
        self._progress, self._answered = 0, time.monotonic()
        self._exiting, self._is_over = threading.Lock(), threading.Event()
        self._code = 1
        self._limited: tuple[str, float] | None = None
        output.on_lost_service = self._process_0_is_gone
        for task in (self._exchange, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def advance(self) -> None:
        """Counts one more point that all processes reach."""
        self._progress += 1

    def stop(self) -> None:
        """Stops watching: from now on, the others may exit."""
        self._is_over.set()

    def fail(self, text: str, code: int) -> None:
        """Sends the others the reason why this process ends. At its exit it does not wait for them."""
        if not self._exiting.acquire(blocking=False):
            time.sleep(60)  # another thread is about to exit
        self._code, self._output.is_muted = code, True
        self._send(text)
        atexit.register(self._exit)  # runs before JAX's own function, which waits

    @contextlib.contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """Exits with a line about `what` if the block takes longer than a process may take without progress."""
        self._limited = what, time.monotonic()
        try:
            yield
        finally:
            self._limited = None

    def lost(self, error: Exception) -> str:
        """The line about the process that must have been lost, after a collective has failed with `error`."""
        time.sleep(4 * BEAT)  # meanwhile, a process that has failed may send its reason
        now = time.monotonic()
        quiet = [i for i, peer in self._peers.items() if now - peer.heard > 2.5 * BEAT]
        if now - self._answered > 2.5 * BEAT:
            quiet = [0]  # the store is gone, so no process can be heard
        if quiet:
            return _lost(quiet, "gone")
        return f"all processes are alive, but they can't reach each other: {reason(error, 300)}"

    def _exchange(self) -> None:
        """Sends this process's beats and reads those of the others."""
        beat = 0
        while not self._is_over.wait(BEAT):
            beat += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_watch` notices
                message = f"{beat} {self._progress}"
                self._store.key_value_set(f"{_BEATS}{self.process_id}", message, allow_overwrite=True)
                for key, value in self._store.key_value_dir_get(_BEATS):
                    if (peer := self._peers.get(int(key.rsplit("/")[-1]))) is not None:
                        peer.hear(*map(int, value.split()))
                for _, value in self._store.key_value_dir_get(_ENDS):
                    self._exit_with(*json.loads(value))
                self._answered = time.monotonic()

    def _watch(self) -> None:
        """Exits if a process is lost. It runs in its own thread, because the store may never answer."""
        patience = STUCK * self._timeout
        while not self._is_over.wait(BEAT / 2):
            now = time.monotonic()
            silent = [i for i, peer in self._peers.items() if now - peer.heard > self._timeout]
            behind = [i for i, peer in self._peers.items() if peer.progress < self._progress]
            stuck = [i for i in behind if now - self._peers[i].moved > patience]
            if now - self._answered > self._timeout:
                silent = [0]  # its store does not answer
            if silent:
                self._exit_with(_lost(silent, f"silent for {self._timeout:g} s"), 1)
            elif stuck:
                self._exit_with(_lost(stuck, f"stuck: no progress for {patience:g} s"), 1)
            elif (limited := self._limited) and now - limited[1] > patience:
                self._exit_with(f"{limited[0]} has taken {patience:g} s: a process or its disk is stuck", 1)

    def _process_0_is_gone(self) -> None:
        self._exit_with(_lost([0], "gone"), 1)
        time.sleep(2 * BEAT)  # another thread is about to exit with its own line
        os._exit(self._code)

    def _exit_with(self, text: str, code: int) -> None:
        """Prints a line and exits; for threads other than the main one."""
        if not self._exiting.acquire(blocking=False):
            return
        self._code, self._output.is_muted = code, True
        print(f"{program_name()}: {text}", file=self._output.stderr, flush=True)
        self._send(text)
        self._exit()

    def _send(self, text: str) -> None:
        """Sends the others the reason why this process ends; gives up after a second."""

        def send() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.key_value_set(f"{_ENDS}{self.process_id}", json.dumps([shown(text, 1000), self._code]))

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(BEAT)

    def _exit(self) -> None:
        for child in multiprocessing.active_children():  # the loader's
            child.terminate()
        sys.stdout.flush()
        if self.process_id == 0:
            time.sleep(2 * BEAT)  # until the others have read the reason: the store ends with this process
        os._exit(self._code)


def _lost(processes: list[int], what: str) -> str:
    names = ", ".join(map(str, processes))
    subject = f"process {names}" if len(processes) == 1 else f"one of the processes {names}"
    return f"{subject} is {what}: see its output; the same commands resume from the last checkpoint"
