"""Several processes that train as one: joining, agreement, and collectives between hosts.

Everything uses JAX's own runtime (`jax.distributed`, collectives over the devices). With one process these functions
return at once.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax import runtime
from alexnet_jax.config.settings import RunConfig
from alexnet_jax.distributed import watchdog
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, program_name, reason, shown

T = TypeVar("T")

JOIN_TIMEOUT = 300  # seconds until all processes must have started
_MESSAGE_BYTES = 4096  # size of what process 0 sends in `on_main`
_watchdog: watchdog.Watchdog | None = None


@contextlib.contextmanager
def joined(run: RunConfig) -> Iterator[None]:
    """Joins the other processes with `--distributed`, else does nothing; enter it before JAX is first used.

    If a process is lost while the block runs, the others exit with one line that names it (see `watchdog`). At the end
    of the block each process waits for the others.

    Raises:
      AlexNetError: the processes can't be joined, or a collective fails because one of them is lost.
    """
    global _watchdog
    if not run.distributed:
        yield
        return
    if os.name == "nt":  # JAX has no CPU collectives there, and `watchdog` needs POSIX
        raise UsageError("--distributed: Windows is not supported; use Linux, macOS or WSL")
    output = watchdog.HeldBackOutput(_exit_unjoined)
    _initialize(run)
    _watchdog = watchdog.Watchdog(run.peer_timeout, output)
    try:
        try:
            yield
        except StoppedError:  # raised in all processes
            _leave_together()
            raise
        _leave_together()
    except AlexNetError as error:
        _watchdog.fail(f"process {_watchdog.process_id}: {error}", error.exit_code)
        raise
    except Exception as error:
        if is_lost_link(error):
            text = _watchdog.lost(error)
            _watchdog.fail(text, AlexNetError.exit_code)
            raise AlexNetError(text) from error
        short = runtime.memory_shortage(error)
        what = short or f"{type(error).__name__}: {error}"
        _watchdog.fail(f"process {_watchdog.process_id}: {what}", AlexNetError.exit_code)
        if short:
            raise short from error
        raise


def _initialize(run: RunConfig) -> None:
    """Calls `jax.distributed.initialize`, which discovers the processes under Slurm, Open MPI and on Cloud TPU."""
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM
    # The processes connect to each other directly. gRPC would use http_proxy or https_proxy for the connection to the
    # coordinator and wait for minutes; an empty grpc_proxy (gRPC reads only lower case) overrides both.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)  # it would warn about any proxy
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # C++ blocks that thread; this one can handle signals
            pool.submit(
                jax.distributed.initialize,
                run.coordinator,
                run.num_processes,
                run.process_id,
                cluster_detection_method="deactivate" if run.coordinator else None,
                initialization_timeout=JOIN_TIMEOUT,
                heartbeat_timeout_seconds=10 * run.peer_timeout,  # the watchdog must be first
            ).result()
    except (RuntimeError, ValueError) as error:
        raise AlexNetError(
            f"--distributed: {reason(error, 300)}; if JAX can't discover the processes by itself, set --coordinator "
            "HOST:PORT, --num-processes and --process-id"
        ) from error


def _exit_unjoined() -> None:
    """Exits while C++ code waits for the other processes; that code would abort this process."""
    print(
        f"{program_name()}: --distributed: the processes did not find each other within {JOIN_TIMEOUT} s: start all of "
        "them, and make sure that they can reach the address of process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(AlexNetError.exit_code)


def _leave_together() -> None:
    """Waits until all processes are done."""
    jax.distributed.shutdown()
    if _watchdog is not None:
        _watchdog.stop()


def is_lost_link(error: Exception) -> bool:
    """Whether an error may come from another process: a collective or a barrier has failed."""
    return jax.process_count() > 1 and bool(watchdog.LOST_LINK.search(str(error)))


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def local_rows(devices: Sequence[jax.Device]) -> slice:
    """The positions of this process's devices in `devices`, which are ordered by process."""
    places = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
    return slice(places[0], places[-1] + 1)


def on_main(act: Callable[[], T]) -> T:
    """Runs `act` in process 0 and returns its result, or raises its AlexNetError, in every process.

    The result must be JSON-ready and fit into 4 kB.
    """
    if jax.process_count() == 1:
        return act()
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": act()}
        except AlexNetError as error:
            outcome = {"error": shown(str(error), _MESSAGE_BYTES // 8), "is_usage": isinstance(error, UsageError)}
    advance()
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = json.dumps(outcome).encode()
    message[: len(text)] = np.frombuffer(text, np.uint8)
    sent = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0")
    outcome = json.loads(sent)
    if "error" in outcome:
        raise (UsageError if outcome["is_usage"] else AlexNetError)(outcome["error"])
    value: T = outcome["value"]
    return value


class Poll:
    """Maximum of an integer over all processes. It never waits for the devices: the result is that of the last call."""

    def __init__(self) -> None:
        self._maximum = jax.pmap(lambda x: jax.lax.pmax(x, "devices"), axis_name="devices", out_axes=None)
        self._pending: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """The maximum at the previous call (0 at the first), the same in all processes; `value` with one process."""
        if jax.process_count() == 1:
            return value
        advance()
        before, self._pending = self._pending, self._maximum(np.full(jax.local_device_count(), value, np.int32))
        return 0 if before is None else int(before)


def gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which must have the same shape, concatenated along the first axis."""
    if jax.process_count() == 1:
        return array
    advance()
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agree(facts: Mapping[str, object]) -> None:
    """Makes sure that each of these facts is the same in all processes.

    Raises:
      UsageError: one differs; raised in all processes, with the name of the first.
    """
    digests = [hashlib.sha256(repr(fact).encode()).digest() for fact in facts.values()]
    by_process = gathered(np.array([[list(digest) for digest in digests]], np.uint8))
    for name, theirs in zip(facts, by_process.swapaxes(0, 1), strict=True):
        if others := np.flatnonzero((theirs != theirs[0]).any(axis=1)).tolist():
            raise UsageError(f"{name}: process {others[0]} differs from process 0")


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Exits with a line about `what` if the block takes longer than a process may take without progress.

    For blocks in which a library waits for the other processes.
    """
    with contextlib.nullcontext() if _watchdog is None else _watchdog.limited(what):
        yield


def advance() -> None:
    """Counts one more point that all processes reach; call it before anything that waits for all of them.

    A process whose count stays behind while others wait is stuck (see `watchdog`).
    """
    if _watchdog is not None:
        _watchdog.advance()
