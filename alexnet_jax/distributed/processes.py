"""Several processes that train as one: how they find each other, and how they agree.

All of it is JAX's own runtime (`jax.distributed`, collectives over the devices). With one process every function here
does nothing, or what its argument says.
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
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, program_name, shown

T = TypeVar("T")

JOIN_TIMEOUT = 300  # seconds for all to be there
_MESSAGE = 4096  # bytes that an agreement has room for
_watchdog: watchdog.Watchdog | None = None


@contextlib.contextmanager
def joined(run: RunConfig) -> Iterator[None]:
    """Joins the other processes, if the flags say that there are any; to be entered before JAX is first used.

    Under Slurm, Open MPI and on Cloud TPU `jax.distributed` finds out by itself who they are. If one of them is lost
    while the block runs, this process leaves with a line that says so (`watchdog`). The block's end waits for all.

    Raises:
      AlexNetError: they can't be joined, they don't come, or a collective fails because one is lost.
    """
    global _watchdog
    if not run.distributed:
        yield
        return
    if os.name == "nt":  # JAX has no collectives for CPUs there, and `watchdog` needs POSIX
        raise UsageError("--distributed: Windows is not supported; use Linux, macOS or WSL")
    output = watchdog.HeldBackOutput(_not_joined)
    if run.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", run.num_devices)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    # The processes reach each other directly. gRPC would send their connection to the coordinator through http_proxy or
    # https_proxy, where it waits for minutes; an empty grpc_proxy (gRPC reads no upper case) comes before both.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)  # it would warn of any proxy
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # C++ waits there, and signals are heard here
            pool.submit(
                jax.distributed.initialize,
                run.coordinator,
                run.num_processes,
                run.process_id,
                cluster_detection_method="deactivate" if run.coordinator else None,
                initialization_timeout=JOIN_TIMEOUT,
                heartbeat_timeout_seconds=10 * run.peer_timeout,  # the watchdog is to be first
            ).result()
    except (RuntimeError, ValueError) as error:
        raise AlexNetError(
            f"--distributed: {shown(' '.join(str(error).split()), 300)}; where JAX can't find out who the "
            "processes are, give --coordinator HOST:PORT, --num-processes and --process-id"
        ) from error
    _watchdog = watchdog.Watchdog(run.peer_timeout, output)
    try:
        try:
            yield
        except StoppedError:  # in all of them
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
        if short := runtime.memory_shortage(error):
            _watchdog.fail(f"process {_watchdog.process_id}: {short}", short.exit_code)
            raise short from error
        _watchdog.fail(f"process {_watchdog.process_id}: {type(error).__name__}: {error}", AlexNetError.exit_code)
        raise


def _not_joined() -> None:
    """Ends this process, which waits for the others in C++ code that would abort it."""
    print(
        f"{program_name()}: --distributed: the processes did not find each other within {JOIN_TIMEOUT} s: all must be "
        "started, and must reach the first one's address",
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
    """Whether an error may be another process's: a collective or a barrier has failed."""
    return jax.process_count() > 1 and bool(watchdog.LOST_LINK.search(str(error)))


def is_main() -> bool:
    """Whether this is the process that writes: the first."""
    return jax.process_index() == 0


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def local_rows(devices: Sequence[jax.Device]) -> slice:
    """The places of this process's devices among `devices`: they stand together, process by process."""
    places = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
    return slice(places[0], places[-1] + 1)


def on_main(act: Callable[[], T]) -> T:
    """What `act` returns in the first process, in all; so with its AlexNetError.

    Args:
      act: returns what JSON can hold in 4 kB. The others don't call it.
    """
    if jax.process_count() == 1:
        return act()
    outcome: dict[str, Any] = {}
    if is_main():
        try:
            outcome = {"value": act()}
        except AlexNetError as error:
            outcome = {"error": shown(str(error), _MESSAGE // 8), "is_usage": isinstance(error, UsageError)}
    advance()
    message = np.zeros(_MESSAGE, np.uint8)
    text = json.dumps(outcome).encode()
    message[: len(text)] = np.frombuffer(text, np.uint8)
    sent = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0")
    outcome = json.loads(sent)
    if "error" in outcome:
        raise (UsageError if outcome["is_usage"] else AlexNetError)(outcome["error"])
    value: T = outcome["value"]
    return value


class Poll:
    """The largest of all processes' values, without waiting for the devices: with several processes a call late."""

    def __init__(self) -> None:
        self._largest = jax.pmap(lambda x: jax.lax.pmax(x, "devices"), axis_name="devices", out_axes=None)
        self._pending: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """With one process `value`, else the largest at the call before (0 at the first); in all processes the same."""
        if jax.process_count() == 1:
            return value
        advance()
        before, self._pending = self._pending, self._largest(np.full(jax.local_device_count(), value, np.int32))
        return 0 if before is None else int(before)


def gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which have one shape, one after another along the first axis."""
    if jax.process_count() == 1:
        return array
    advance()
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agree(facts: Mapping[str, object]) -> None:
    """Makes sure that all processes have the same of each.

    Raises:
      UsageError: in all of them, naming what differs, and where.
    """
    digests = [hashlib.sha256(repr(fact).encode()).digest() for fact in facts.values()]
    by_process = gathered(np.array([[list(digest) for digest in digests]], np.uint8))
    for name, theirs in zip(facts, by_process.swapaxes(0, 1), strict=True):
        if others := np.flatnonzero((theirs != theirs[0]).any(axis=1)).tolist():
            raise UsageError(f"{name}: not the same in process {others[0]} as in process 0")


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Ends this process if the block, in which it waits for others unseen, takes as long as one may be stuck."""
    if _watchdog is None:
        yield
        return
    with _watchdog.limited(what):
        yield


def advance() -> None:
    """To be called before whatever waits for all processes: who comes here first is seen to wait for the rest."""
    if _watchdog is not None:
        _watchdog.advance()
