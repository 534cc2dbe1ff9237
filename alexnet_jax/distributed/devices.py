"""Choice of devices, and arrays on them."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alexnet_jax import runtime
from alexnet_jax.config.checks import MICRO_BATCHES
from alexnet_jax.distributed import processes
from alexnet_jax.errors import UsageError

AXIS = "batch"
PyTree = Any


def select_devices(num_devices: int | None, deterministic: bool = False) -> list[jax.Device]:
    """The first `num_devices` devices; None: all there are (one CPU, if `deterministic`). Of several processes, all.

    A CPU counts as one device, but JAX can split it into any number. That must be settled before JAX is first used in
    the process, so call this early. With it goes the number of threads, and that changes how XLA divides sums on a CPU:
    `deterministic` has 8 CPU devices and 8 threads made, however many are used and however many cores there are.

    Raises:
      UsageError: if there are fewer.
      AlexNetError: JAX can't use the devices that JAX_PLATFORMS names.
    """
    if deterministic:
        os.environ["NPROC"] = str(MICRO_BATCHES)  # XLA's own variable, in place of the number of cores
    alone = not jax.distributed.is_initialized()  # else it is settled
    if wanted := alone and (MICRO_BATCHES if deterministic else num_devices):
        # Fails if JAX is in use already: then what there is must do, and is checked next.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    devices = runtime.devices()
    if deterministic and num_devices is None and devices[0].platform == "cpu":
        num_devices = 1
    own = processes.local(devices)
    if num_devices is not None and num_devices > len(own):
        raise UsageError(f"--num-devices {num_devices}: JAX sees {len(own)} ({devices[0].platform})")
    if jax.process_count() > 1:
        fewest, *_, most = sorted(len(jax.local_devices(process)) for process in range(jax.process_count()))
        if fewest < most:
            raise UsageError(f"--distributed: one process has {fewest} devices, another {most}; all need as many")
        if num_devices is not None and num_devices < len(own):
            raise UsageError(f"--num-devices {num_devices}: with --distributed all {len(own)} of each process are used")
        return devices
    return devices[:num_devices]


def default_steps_per_call(devices: Sequence[jax.Device]) -> int:
    """Steps in one call of the train step: many on an accelerator, where a step takes less time than its launch."""
    return 1 if devices[0].platform == "cpu" else 25


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts a tree on every device of this process, without a stacked device axis."""
    devices = processes.local(devices)
    # The mesh axis must bear pmap's axis name, or the step compiles a second time for its own output.
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))


def shared(tree: PyTree) -> PyTree:
    """Arrays that are the same in all processes, as what can be saved.

    With one process NumPy arrays. With several arrays over the devices of all, of which each process then saves a part.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())

    def share(x: jax.Array) -> jax.Array:
        copies = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)

    return jax.tree.map(share, replicate(tree, jax.devices()))
