"""Choice of devices, and arrays on them."""

import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import runtime
from alexnet_jax.config.checks import MICRO_BATCHES
from alexnet_jax.distributed import processes
from alexnet_jax.errors import UsageError

AXIS = "batch"
DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"  # deterministic algorithms only, none chosen by timing
PyTree = Any
T = TypeVar("T")


def select_devices(num_devices: int | None, deterministic: bool = False) -> list[jax.Device]:
    """The devices to train on: the first `num_devices`, or all; with several processes, always all devices of each.

    JAX can split a CPU into any number of devices, but only before it is first used in the process: call this early.
    With `deterministic`, a process that trains alone creates 8 CPU devices and 8 threads, whatever the number of
    devices used and of cores, because XLA splits sums on a CPU among its threads. By default, it uses one CPU device.
    XLA's flag for GPUs is set, too.

    Raises:
      UsageError: there are fewer devices, or the processes have different numbers of them; `deterministic` on a GPU
        that JAX already uses without that flag.
      AlexNetError: JAX can't use the devices that JAX_PLATFORMS names.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    too_late = False
    if deterministic:
        os.environ["NPROC"] = str(MICRO_BATCHES)  # XLA's own variable, which replaces the number of cores
        if DETERMINISTIC_GPU not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_GPU}".strip()
    is_alone = not jax.distributed.is_initialized()
    cpu_devices = MICRO_BATCHES if deterministic and is_alone else num_devices
    if cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # JAX has been used already; the number is checked below
            too_late = True
    devices = runtime.devices()
    if deterministic and too_late and devices[0].platform != "cpu" and DETERMINISTIC_GPU not in flags:
        os.environ["XLA_FLAGS"] = flags  # otherwise the next call would take the flag for one that XLA has read
        raise UsageError(
            "--deterministic: JAX has been used already, and XLA reads its flags only at the start: set "
            f"XLA_FLAGS={DETERMINISTIC_GPU}"
        )
    own = processes.local(devices)
    if deterministic and num_devices is None and devices[0].platform == "cpu":
        num_devices = 1
    if num_devices is not None and num_devices > len(own):
        raise UsageError(f"--num-devices {num_devices}, but JAX sees only {len(own)} ({devices[0].platform})")
    if jax.process_count() == 1:
        return devices[:num_devices]
    fewest, *_, most = sorted(len(jax.local_devices(process)) for process in range(jax.process_count()))
    if fewest < most:
        raise UsageError(
            f"--distributed: one process has {fewest} devices, another {most}: all must have the same number"
        )
    if num_devices is not None and num_devices < len(own):
        raise UsageError(f"--num-devices {num_devices}: --distributed uses all {len(own)} devices of each process")
    return devices


def default_steps_per_call(devices: Sequence[jax.Device]) -> int:
    """Steps per call of the train step: many on an accelerator, where a launch takes longer than a step."""
    return 1 if devices[0].platform == "cpu" else 25


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Copies a tree to each of this process's devices, without a stacked device axis."""
    devices = processes.local(devices)
    # The mesh axis must have the name of pmap's axis, or the step compiles a second time for its own output.
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def sent_ahead(trees: Iterable[T], devices: Sequence[jax.Device], count: int = 2) -> Iterator[T]:
    """Trees of arrays [d, ...] for this process's d devices, each sent to them before `count` earlier ones are used."""
    sharding = NamedSharding(Mesh(np.array(processes.local(devices)), (AXIS,)), PartitionSpec(AXIS))
    sent: collections.deque[T] = collections.deque()
    for tree in trees:
        sent.append(jax.device_put(tree, sharding))
        if len(sent) > count:
            yield sent.popleft()
    yield from sent


def fetched(trees: Iterable[T], count: int = 2) -> Iterator[T]:
    """Copies trees from the devices to the host, each when `count` later ones have been launched."""
    launched: collections.deque[T] = collections.deque()
    for tree in trees:
        launched.append(tree)
        if len(launched) > count:
            yield jax.device_get(launched.popleft())
    yield from map(jax.device_get, launched)


def shared(tree: PyTree) -> PyTree:
    """Arrays that are equal in all processes, in the form that Orbax saves.

    In one process, these are NumPy arrays; in several processes, JAX arrays over all devices, of which each process
    saves a part.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())

    def share(x: jax.Array) -> jax.Array:
        copies = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)

    return jax.tree.map(share, replicate(tree, jax.devices()))
