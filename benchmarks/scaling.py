"""A model of the time of a training step: fitted to 1 to 8 local devices, and extrapolated to many GPUs.

    python benchmarks/scaling.py --measure     # steps on this machine's devices: results/scaling-cpu.json
    python benchmarks/scaling.py               # the fit, the tables and the plot, from that file

On one machine, where the devices that JAX makes of a CPU share its cores and its memory, a step of B images on D
devices takes

    t = a + b B + c D + d D P                                                                            [seconds]

with P the number of parameters: `a` is the cost per step, `b` that of an image's forward and backward pass, `c` that of
a device's launches, `d` that of each parameter on each device: the gradient's all-reduce, the update, the check that it
is finite. `b` depends on the network, the others only on the machine. In the extrapolation, each GPU has its own cores
and memory:

    t = max(operations B / (D rate), images B / (D input)) + launches + bytes(B, D) / bandwidth

with the bytes that `benchmarks/collectives.py` counts in the compiled programs.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import collectives
import jax
import numpy as np
import scipy.optimize
from matplotlib.figure import Figure

from alexnet_jax import plots, runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.settings import AugmentationConfig, OptimizerConfig
from alexnet_jax.data import statistics
from alexnet_jax.data.batches import batches
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.distributed.devices import replicate, select_devices
from alexnet_jax.errors import AlexNetError
from alexnet_jax.network import alexnet, layer_counts, small
from alexnet_jax.network.convolution import fast_convolution
from alexnet_jax.runs.folder import versions
from alexnet_jax.training import optimizer
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step, train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "results" / "scaling-cpu.json"
DEVICES, BATCHES = (1, 2, 4, 8), (64, 128, 256)
NETWORKS: dict[str, tuple[Any, int]] = {  # with the side of its images
    "AlexNetSmall, 32x32": (small.AlexNetSmall(), 32),
    # Most of its time is spent on its parameters, because these images leave a map of 1x1.
    "AlexNet one-column, 67x67": (alexnet.AlexNet("one-column", 10), 67),
}


def measure(rounds: int, count: int) -> dict[str, Any]:
    """Times `count` steps of each cell (network, devices, batch size), cell by cell in each of the rounds."""
    devices = select_devices(max(DEVICES))
    rng = np.random.default_rng(0)
    cells = []
    for name, (network, side) in NETWORKS.items():
        images, labels = rng.integers(0, 256, (512, side, side, 3), np.uint8), rng.integers(0, 10, 512, np.int32)
        model = network.clone(convolution=fast_convolution)
        update_rule, _ = optimizer.from_config(OptimizerConfig(optimizer="sgd", momentum=0.9), 100, 1)
        preprocessing = preprocess.Preprocessing(AugmentationConfig(), statistics.Statistics.of(images), 1)
        state = jax.device_get(create_state(model, update_rule, (side, side, 3), jax.random.key(0)))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        for number in DEVICES:
            own = devices[:number]
            step = functools.partial(train_step, model=model, optimizer=update_rule, preprocess=preprocessing)
            call = compile_train_step(step, own, ArrayDataset.fetch)
            examples, key = replicate((Examples(images, labels), jax.random.key(1)), own)
            for size in BATCHES:
                layout = batches(np.arange(512), size, number).part(0)
                run = functools.partial(_block, call, state, examples, layout, key, own, count)
                cell = {"network": name, "parameters": parameters, "devices": number, "batch_size": size}
                cells.append((cell | {"seconds": []}, run))
    for _, run in cells:
        run()  # compiles
    for _ in range(rounds):
        for cell, run in cells:
            cell["seconds"].append(run())
    device = {"kind": devices[0].device_kind, "cores": runtime.available_cores()}
    return {"cells": [cell for cell, _ in cells], "device": device, "rounds": rounds, "steps": count}


def _block(step: Any, state: Any, examples: Any, layout: Any, key: Any, devices: Any, count: int) -> float:
    """Seconds of a step, from a block of them."""
    state = replicate(state, devices)
    state, metrics = step(state, examples, layout, key)
    jax.block_until_ready((state, metrics))
    begin = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, examples, layout, key)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - begin) / count


def rows_of(cells: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a, c, d and each network's b, and the median seconds: [cells, 3 + networks], [cells]."""
    names = sorted({cell["network"] for cell in cells})
    rows = []
    for cell in cells:
        images = [cell["batch_size"] * (cell["network"] == name) for name in names]
        rows.append([1, cell["devices"], cell["devices"] * cell["parameters"], *images])
    return np.array(rows, float), np.array([np.median(cell["seconds"]) for cell in cells])


def fit(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative coefficients with the smallest sum of squared relative errors."""
    scale = np.abs(rows).max(axis=0)
    found, _ = scipy.optimize.nnls(rows / scale / seconds[:, None], np.ones(len(seconds)))
    return found / scale


def left_out(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """For each cell, the relative error of its prediction from a fit to all others."""
    errors = []
    for i in range(len(seconds)):
        others = np.arange(len(seconds)) != i
        errors.append(rows[i] @ fit(rows[others], seconds[others]) / seconds[i] - 1)
    return np.array(errors)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Assumptions of the extrapolation; only the input's speed was measured here.

    Attributes:
      rate: operations per second that a GPU reaches in this network: 30% of an H100's 495 TFLOP/s in TF32.
      inside: bytes per second that a GPU sends to others in its server: 80% of NVLink's 450 GB/s.
      outside: bytes per second to other servers: 80% of one 400 Gb/s adapter per GPU.
      per_server: GPUs in a server.
      hop: seconds that a collective costs regardless of its size, times log2 of the number of GPUs.
      launches: seconds of a step in which no GPU computes.
      jpeg, raw: images per second that a core prepares (results/imagenet-input-cpu.json: 1,510 and 5,970 on 2 cores).
      cores: cores for the input, per GPU.
    """

    rate: float = 0.3 * 495e12
    inside: float = 0.8 * 450e9
    outside: float = 0.8 * 50e9
    per_server: int = 8
    hop: float = 5e-6
    launches: float = 3e-4
    jpeg: float = 1510 / 2
    raw: float = 5970 / 2
    cores: int = 12


@dataclasses.dataclass(frozen=True)
class Cost:
    """Extrapolated seconds of a step."""

    compute: float
    collectives: float
    input_jpeg: float
    input_raw: float

    def step(self, source: float = 0.0) -> float:
        """Total seconds; only the input overlaps with the rest."""
        return max(self.compute + self.collectives, source)


def bytes_sent(devices: int, batch_size: int, hybrid: bool, variant: str = "paper") -> float:
    """Bytes that a GPU sends in a step, by ring algorithms, in float32.

    Data parallelism: 2 (D - 1) / D of all gradients. Hybrid: the same for all gradients except those of the dense
    kernels, plus the dense layers' activations and their gradients.
    """
    numbers = float(sum(layer.parameters for layer in layer_counts.count_layers(variant).values()))
    if hybrid and devices > 1:
        dense = collectives.on_paper(variant, devices)
        numbers += batch_size * dense["numbers_an_image"] - dense["dense_weights"]
    return 4 * 2 * (devices - 1) / devices * numbers


def on_paper(devices: int, batch_size: int, hybrid: bool, cluster: Cluster, variant: str = "paper") -> Cost:
    """The extrapolated cost of a step."""
    operations = 6 * sum(layer.multiply_accumulates for layer in layer_counts.count_layers(variant).values())
    share = batch_size / devices
    bandwidth = cluster.inside if devices <= cluster.per_server else cluster.outside
    count = 13 if hybrid else 1  # of collectives: 12 of the dense layers, and the sum of all other gradients
    waits = count * cluster.hop * math.log2(devices)
    return Cost(
        compute=operations * share / cluster.rate + cluster.launches,
        collectives=bytes_sent(devices, batch_size, hybrid, variant) / bandwidth + waits,
        input_jpeg=share / (cluster.cores * cluster.jpeg),
        input_raw=share / (cluster.cores * cluster.raw),
    )


IMAGES, EPOCHS = 1_281_167, 90
PLANS = [(1, 128), (8, 1024), (8, 4096), (8, 8192), (256, 8192), (256, 32768)]


def tables(results: dict[str, Any]) -> str:
    """The fit, its check and the extrapolation, in Markdown."""
    cells = results["cells"]
    rows, seconds = rows_of(cells)
    once, launch, parameter, *images = fit(rows, seconds)
    errors, predicted = left_out(rows, seconds), rows @ fit(rows, seconds)
    names = sorted({cell["network"] for cell in cells})
    lines = [
        "| coefficient | value |",
        "| --- | --- |",
        f"| a, per step | {1e3 * once:.1f} ms |",
        *(f"| b, per image of {name} | {1e3 * b:.2f} ms |" for name, b in zip(names, images, strict=True)),
        f"| c, per device | {1e3 * launch:.1f} ms |",
        f"| d, per million parameters on a device | {1e9 * parameter:.2f} ms |",
        "",
        f"Left out in turn, {len(cells)} cells: relative errors of {np.median(np.abs(errors)):.0%} (median) and "
        f"{np.abs(errors).max():.0%} (largest).",
        "",
        "| network | devices | batch | measured ms, median (smallest to largest) | model | left out |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell, model, error in zip(cells, predicted, errors, strict=True):
        low, middle, high = (1e3 * f(cell["seconds"]) for f in (np.min, np.median, np.max))
        start = f"| {cell['network']} | {cell['devices']} | {cell['batch_size']} "
        lines.append(f"{start}| {middle:.0f} ({low:.0f} to {high:.0f}) | {1e3 * model:.0f} | {error:+.0%} |")
    heading = "GPUs | batch | scheme | compute | collectives | input JPEG / raw | images/s, raw | 90 epochs"
    lines += ["", f"| {heading} |", "| --- " * 8 + "|"]
    for devices, size in PLANS:
        for hybrid in (False, True) if devices > 1 else (False,):
            cost = on_paper(devices, size, hybrid, Cluster())
            rate = size / cost.step(cost.input_raw)
            start = f"| {devices} | {size:,} | {'hybrid' if hybrid else 'data'} | {1e3 * cost.compute:.1f} ms "
            start += f"| {1e3 * cost.collectives:.2f} ms | {1e3 * cost.input_jpeg:.1f} / {1e3 * cost.input_raw:.1f} ms "
            lines.append(f"{start}| {rate:,.0f} | {IMAGES * EPOCHS / rate / 60:.1f} min |")
    lines += ["", "| GPUs | same bytes at a batch of |", "| --- | --- |"]
    lines += [f"| {n} | {collectives.on_paper('paper', n)['crossing']:,.0f} |" for n in (2, 4, 8, 256)]
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any]) -> Figure:
    """Left: the model and the measurements; right: the extrapolation to GPUs."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    rows, seconds = rows_of(results["cells"])
    coefficients = fit(rows, seconds)
    for axis, name in zip(axes, NETWORKS, strict=False):
        for i, size in enumerate(BATCHES):
            chosen = [k for k, c in enumerate(results["cells"]) if (c["network"], c["batch_size"]) == (name, size)]
            numbers = [results["cells"][k]["devices"] for k in chosen]
            low, high = ([1e3 * f(results["cells"][k]["seconds"]) for k in chosen] for f in (np.min, np.max))
            middle = 1e3 * seconds[chosen]
            axis.errorbar(numbers, middle, [middle - low, high - middle], fmt="o", color=f"C{i}", capsize=3)
            axis.plot(numbers, 1e3 * rows[chosen] @ coefficients, color=f"C{i}", label=f"batch {size}")
        axis.set(title=name, xlabel="devices (of one CPU)", ylabel="ms a step", ylim=(0, None), xticks=DEVICES)
        axis.legend(title="points: measured\nlines: model")
    axis, numbers = axes[2], [2**i for i in range(9)]
    size = 8192
    for label, hybrid, source in [
        ("data parallel", False, ""),
        ("hybrid", True, ""),
        ("hybrid, JPEG input", True, "input_jpeg"),
        ("hybrid, raw input", True, "input_raw"),
    ]:
        costs = [on_paper(n, size, hybrid, Cluster()) for n in numbers]
        rates = [size / cost.step(getattr(cost, source) if source else 0.0) for cost in costs]
        axis.plot(numbers, rates, ".-" if not source else "--", label=label)
    alone = size / on_paper(1, size, False, Cluster()).step()
    axis.plot(numbers, [alone * n for n in numbers], color="grey", linewidth=0.8, label="perfect")
    axis.set(title=f"on paper: AlexNet, batch {size:,}", xlabel="GPUs", ylabel="images/s", xscale="log", yscale="log")
    axis.set_xticks(numbers, [str(n) for n in numbers], minor=False)
    axis.legend()
    return figure


def main() -> None:
    """Measures if requested, then fits, prints and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time steps on this machine first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--file", type=pathlib.Path, default=FILE)
    args = parser.parse_args()
    if args.measure:
        args.file.write_text(json.dumps(measure(args.rounds, args.steps) | {"versions": versions()}, indent=1) + "\n")
    results = json.loads(args.file.read_text())
    print(tables(results), end="")
    plots.save(picture(results), args.file.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main()
    except AlexNetError as error:
        sys.exit(f"scaling.py: {error}")
