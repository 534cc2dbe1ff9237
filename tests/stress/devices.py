"""The same bits on any number of devices and cores: `python -m tests.stress.devices`."""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from alexnet_jax.runtime import available_cores

DEVICES = (1, 2, 4, 8)


def worker(workdir: str, num_devices: int, epochs: int, deterministic: bool) -> None:
    """Trains on 100 drawn images in batches of 16, with noise, crops and dropout; prints a hash of the whole state."""
    from alexnet_jax.config.recipes import PRESETS
    from alexnet_jax.data import shapes
    from alexnet_jax.runs import checkpoint
    from alexnet_jax.training import loop

    base = PRESETS["cifar10-paper"].config
    config = dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, drop_epochs=(2,)),
        schedule=dataclasses.replace(base.schedule, epochs=epochs, batch_size=16),
        run=dataclasses.replace(
            base.run, workdir=pathlib.Path(workdir), num_devices=num_devices, deterministic=deterministic
        ),
    )
    loop.train_and_evaluate(config, shapes.load(train=100, validation=30, test=70))
    checkpoints = checkpoint.Checkpoints(config.workdir / "checkpoints", read_only=True)
    tree, _ = checkpoints.restore_tree(checkpoints.all_steps()[-1])
    import jax

    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(tree)))
    print("HASH", digest.hexdigest())


def run(
    workdir: pathlib.Path, num_devices: int, epochs: int, deterministic: bool, cores: int, threads: int | None = None
) -> str:
    """The hash that a worker prints, on the first `cores` of the cores that this process may use.

    Args:
      threads: stands for a machine with more cores (XLA reads NPROC in place of their number); None: leave it.
    """
    allowed = sorted(os.sched_getaffinity(0))
    command = [
        sys.executable,
        "-m",
        "tests.stress.devices",
        "--worker",
        json.dumps([str(workdir), num_devices, epochs, deterministic]),
    ]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | ({"NPROC": str(threads)} if threads else {}),
        preexec_fn=lambda: os.sched_setaffinity(0, allowed[:cores]),
    )
    return done.stdout.split("HASH ")[1].strip()


def cost(num_devices: int, rounds: int = 5, steps_a_round: int = 10) -> dict[str, Any]:
    """Images/s of the bare step of `cifar10`, batch 128, in turn with and without `deterministic`."""
    import jax
    import numpy as np

    from alexnet_jax.augment import preprocess
    from alexnet_jax.config.recipes import PRESETS
    from alexnet_jax.data import shapes
    from alexnet_jax.data.batches import batches
    from alexnet_jax.data.dataset import ArrayDataset, Examples
    from alexnet_jax.data.statistics import Statistics
    from alexnet_jax.distributed.devices import replicate, select_devices
    from alexnet_jax.network import build
    from alexnet_jax.training import gradients, optimizer
    from alexnet_jax.training.state import create_state
    from alexnet_jax.training.step import compile_train_step, train_step

    config, split = PRESETS["cifar10"].config, shapes.load(train=1280, validation=1, test=1)["train"]
    devices = select_devices(num_devices)
    model = build.from_config(config.network, 10)
    rule, _ = optimizer.from_config(config.optimizer, 10, 1)
    preprocessing = preprocess.Preprocessing(config.augmentation, Statistics.of(split.images), 10)
    examples = replicate(Examples(split.images, split.labels), devices)
    layout, key = batches(np.arange(1280), 128, num_devices), replicate(jax.random.key(0), devices)
    programs, states = {}, {}
    for deterministic in (False, True):
        step = functools.partial(
            train_step,
            model=model,
            optimizer=rule,
            preprocess=preprocessing,
            sum_gradients=gradients.in_fixed_order if deterministic else gradients.at_once,
        )
        programs[deterministic] = compile_train_step(step, devices, ArrayDataset.fetch)
        state = create_state(model, rule, (32, 32, 3), jax.random.key(0))
        states[deterministic], _ = programs[deterministic](replicate(state, devices), examples, layout.part(0), key)
    rates = collections.defaultdict(list)
    for _ in range(rounds):
        for deterministic, step in programs.items():
            begin = time.perf_counter()
            for batch in range(steps_a_round):
                states[deterministic], metrics = step(states[deterministic], examples, layout.part(batch), key)
            jax.block_until_ready(metrics)
            rates[deterministic].append(steps_a_round * 128 / (time.perf_counter() - begin))
    ratios = [exact / plain for exact, plain in zip(rates[True], rates[False], strict=True)]
    return {
        "images_per_second": round(statistics.median(rates[False]), 1),
        "images_per_second_deterministic": round(statistics.median(rates[True]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least_and_largest": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    """Trains with each number of devices and of cores, compares, measures the cost, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*json.loads(arguments.worker))
        return
    cores = available_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        exact = {f"{d} devices": run(folder / f"{d}", d, 3, True, cores) for d in DEVICES}
        run(folder / "8 to 2", 8, 2, True, cores)
        exact["8 devices, resumed on 2"] = run(folder / "8 to 2", 2, 3, True, cores)
        exact["1 device again"] = run(folder / "again", 1, 3, True, cores)
        exact["1 device, 1 core"] = run(folder / "core", 1, 3, True, 1)
        plain = {f"{d} devices": run(folder / f"plain {d}", d, 3, False, cores) for d in (1, 8)}
        exact["1 device, 16 threads"] = run(folder / "threads", 1, 3, True, cores, 16)
        plain["1 device, 16 threads"] = run(folder / "plain threads", 1, 3, False, cores, 16)
        plain["1 device, 1 core"] = run(folder / "plain core", 1, 3, False, 1)
    from tests.stress import results_file

    results_file.write(
        "devices",
        "python -m tests.stress.devices",
        {
            "steps": 21,
            "cores": cores,
            "different_states_deterministic": len(set(exact.values())),
            "deterministic": exact,
            "not_deterministic": plain,
            "cost_on_1_device": cost(1),
        },
    )
    if len(set(exact.values())) != 1:
        sys.exit("the states differ")


if __name__ == "__main__":
    main()
