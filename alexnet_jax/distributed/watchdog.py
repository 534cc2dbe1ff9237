"""Whether the other processes of a training are still there; if not, an end with one line within half a minute.

(A process that lives but does not come on is given longer, `STUCK` times as long.)

A process that is gone, or that is there but does nothing any more (stopped, swapped out, cut off), would leave the
others waiting in a collective for ever. JAX notices after a hundred seconds, and ends them amid pages of its own
output. So each process says every second that it lives, in the key-value store of JAX's coordination service, which
process 0 holds, and looks when the others last said so.
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
from jax._src import distributed  # JAX has no public name for the store; Orbax takes it from here, too

from alexnet_jax import terminal
from alexnet_jax.errors import program_name, shown

BEAT = 1.0  # seconds
STUCK = 30  # times the limit for silence: so long a process may live and not come on, while others wait for it
LOST_LINK = re.compile(r"gloo|nccl|UNAVAILABLE|coordination|socket closed|connection (closed|reset)", re.IGNORECASE)
_BEATS, _ENDS = "alexnet_jax/beats/", "alexnet_jax/ends/"


class HeldBackOutput:
    """What C++ libraries print comes a second late, on stderr; or never, if the process leaves before.

    Python's own output goes its way as before. So a process that leaves says one line, without gloo's and gRPC's pages.

    Attributes:
      stderr: Python's, whatever becomes of `sys.stderr` (it is set aside while Orbax writes).
      is_muted: what comes from C++ is no longer shown.
      on_lost_service: is called where JAX's client has lost its service, which process 0 holds, and is about to abort
        this process; has to end it.
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
        # The client aborts from a thread of its own. Python would call a handler only after that.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _abort(self, number: int) -> None:
        """The handler of SIGABRT."""
        time.sleep(BEAT / 5)  # for what was printed before
        if b"distributed service" in b"".join(line for _, line in list(self._lines)):
            self.is_muted = True
            self.on_lost_service()
        time.sleep(2 * BEAT)  # until all is shown
        self._libc.signal(signal.SIGABRT, None)  # the system's own, as it returns to the abort

    def _relay(self) -> None:
        while True:
            wait = max(0.0, self._lines[0][0] - time.monotonic()) if self._lines else None
            if select.select([self._reader], [], [], wait)[0]:
                *lines, self._begun = (self._begun + os.read(self._reader, 2**16)).split(b"\n")
                self._lines.extend((time.monotonic() + BEAT, line + b"\n") for line in lines)
            while self._lines and self._lines[0][0] <= time.monotonic():
                if not self.is_muted and not self._lines[0][1].startswith(b"[Gloo] Rank"):
                    with contextlib.suppress(OSError):  # nobody reads it any more
                        os.write(self.stderr.fileno(), self._lines[0][1])
                self._lines.popleft()


class Peer:
    """What is known of another process.

    Attributes:
      beat: how often it has said that it lives.
      heard: when that last changed, in seconds.
      place: how often it has come by `Watchdog.advance`.
      moved: when that last changed, in seconds.
    """

    def __init__(self) -> None:
        self.beat = self.place = -1
        self.heard = self.moved = time.monotonic()

    def hear(self, beat: int, place: int) -> None:
        """Takes note of what it said."""
        now = time.monotonic()
        if beat != self.beat:
            self.beat, self.heard = beat, now
        if place != self.place:
            self.place, self.moved = place, now


class Watchdog:
    """Ends this process, with one line and a code that is not 0, soon after another one is lost.

    Lost is who has failed (the others then repeat its message), has said nothing for `timeout` seconds, or has not
    come on for `STUCK` times as long while this process waits.

    Attributes:
      process_id: this process's number, known also where JAX finds no device.
    """

    def __init__(self, timeout: float, output: HeldBackOutput) -> None:
        """JAX must have joined the processes.

        Args:
          timeout: seconds of silence.
          output: of this process; what it still holds back at the end is dropped.
        """
        self._timeout, self._output = timeout, output
        self._store: Any = distributed.global_state.client
        self.process_id = distributed.global_state.process_id
        self._peers = {i: Peer() for i in range(distributed.global_state.num_processes) if i != self.process_id}
        self._place, self._answered = 0, time.monotonic()
        self._leaving, self._is_over = threading.Lock(), threading.Event()
        self._code = 1
        self._limited: tuple[str, float] | None = None
        output.on_lost_service = self._first_is_gone
        for task in (self._exchange, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def advance(self) -> None:
        """To be called wherever all processes come by: tells how far this one is."""
        self._place += 1

    def stop(self) -> None:
        """From now on others may go."""
        self._is_over.set()

    def fail(self, text: str, code: int) -> None:
        """Tells the others that this process ends, and why; at its exit it no longer waits for them."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)  # another thread is about to end the process
        self._code, self._output.is_muted = code, True
        self._tell(text)
        atexit.register(self._end)  # before JAX's own, which waits

    @contextlib.contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """Ends this process if the block takes as long as one may be stuck."""
        self._limited = what, time.monotonic()
        try:
            yield
        finally:
            self._limited = None

    def lost(self, error: Exception) -> str:
        """Says which process must be lost, after a collective has failed with `error`."""
        time.sleep(4 * BEAT)  # meanwhile one that has failed may have said so
        now = time.monotonic()
        quiet = [i for i, peer in self._peers.items() if now - peer.heard > 2.5 * BEAT]
        if now - self._answered > 2.5 * BEAT:
            quiet = [0]  # with it went the store, and so nobody is heard
        if quiet:
            return _gone(quiet, "gone")
        return f"no process is gone, but they can't reach each other: {shown(' '.join(str(error).split()), 300)}"

    def _exchange(self) -> None:
        """Says that this process lives, and takes note of what the others say."""
        beat = 0
        while not self._is_over.wait(BEAT):
            beat += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_watch` will see to that
                self._store.key_value_set(f"{_BEATS}{self.process_id}", f"{beat} {self._place}", allow_overwrite=True)
                for key, value in self._store.key_value_dir_get(_BEATS):
                    if (peer := self._peers.get(int(key.rsplit("/")[-1]))) is not None:
                        peer.hear(*map(int, value.split()))
                for _, value in self._store.key_value_dir_get(_ENDS):
                    self._leave(*json.loads(value))
                self._answered = time.monotonic()

    def _watch(self) -> None:
        """Judges by what is known. A thread of its own, because the store may never answer."""
        while not self._is_over.wait(BEAT / 2):
            now = time.monotonic()
            silent = [i for i, peer in self._peers.items() if now - peer.heard > self._timeout]
            behind = [i for i, peer in self._peers.items() if peer.place < self._place]
            stuck = [i for i in behind if now - self._peers[i].moved > STUCK * self._timeout]
            if now - self._answered > self._timeout:
                self._leave(_gone([0], f"silent for {self._timeout:g} s"), 1)
            elif silent:
                self._leave(_gone(silent, f"silent for {self._timeout:g} s"), 1)
            elif stuck:
                self._leave(_gone(stuck, f"stuck: it has not come on for {STUCK * self._timeout:g} s"), 1)
            elif (limited := self._limited) and now - limited[1] > STUCK * self._timeout:
                self._leave(f"{limited[0]} has taken {STUCK * self._timeout:g} s: a process or its disk is stuck", 1)

    def _first_is_gone(self) -> None:
        self._leave(_gone([0], "gone"), 1)
        time.sleep(2 * BEAT)  # another thread is about to end the process with its own line
        os._exit(self._code)

    def _leave(self, text: str, code: int) -> None:
        """Ends the process, from another thread than the main one."""
        if not self._leaving.acquire(blocking=False):
            return
        self._code, self._output.is_muted = code, True
        print(f"{program_name()}: {text}", file=self._output.stderr, flush=True)
        self._tell(text)
        self._end()

    def _tell(self, text: str) -> None:
        """Leaves the others a message, unless that takes long."""

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.key_value_set(f"{_ENDS}{self.process_id}", json.dumps([shown(text, 1000), self._code]))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(BEAT)

    def _end(self) -> None:
        for child in multiprocessing.active_children():  # they load images
            child.terminate()
        sys.stdout.flush()
        if self.process_id == 0:
            time.sleep(2 * BEAT)  # for the others to read why: with this process goes the store
        os._exit(self._code)


def _gone(who: list[int], what: str) -> str:
    processes = f"process {who[0]}" if len(who) == 1 else f"one of the processes {', '.join(map(str, who))}"
    return f"{processes} is {what}: look at its output; the same commands go on from the last checkpoint"
