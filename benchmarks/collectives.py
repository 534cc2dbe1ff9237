"""Counts bytes that parallel training moves between devices: `python benchmarks/collectives.py [--out FILE.json]`.

Compiles the train step of the full AlexNet (1000 classes, float32, SGD with momentum) for CPU devices, executes
nothing, and counts the bytes of every collective in the compiled program. The counts are affine in the batch size, so
lines through two of them show where both kinds move the same amount; in theory, this follows from the layers' sizes.
"""

import dataclasses
import functools
import json
import pathlib
import platform
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from worker import peak_host_memory

from alexnet_jax.augment import preprocess
from alexnet_jax.config import cli
from alexnet_jax.config.settings import AugmentationConfig, OptimizerConfig
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.data import statistics
from alexnet_jax.data.batches import Batch
from alexnet_jax.data.streamed import StreamedDataset
from alexnet_jax.distributed.devices import AXIS, select_devices
from alexnet_jax.network import alexnet, layer_counts, split_dense
from alexnet_jax.runs.folder import versions
from alexnet_jax.training import gradients, optimizer
from alexnet_jax.training.state import REPLICATED, SPLIT_DENSE, SplitState, TrainState, create_state
from alexnet_jax.training.step import compile_train_step, train_step

ROOT = pathlib.Path(__file__).parent.parent
Parallelism = Literal["data", "hybrid"]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Options:
    """Count the bytes that AlexNet's train step moves between devices, for data and hybrid parallelism."""

    variant: Literal["paper", "2012", "caffe", "one-column", "torchvision"] = "one-column"
    """Variant of the network."""
    devices: tuple[PositiveInt, ...] = (2, 4, 8)
    """Numbers of devices."""
    batch_sizes: tuple[PositiveInt, ...] = (128, 512, 1024, 4096)
    """Global batch sizes, at least two."""
    out: pathlib.Path = ROOT / "results" / "collectives-cpu.json"
    """JSON file for the counts."""


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      result_bytes: total size of its results on each device.
    """

    kind: str
    result_bytes: int

    def sent_bytes(self, devices: int) -> float:
        """Bytes that each device sends in a ring (a direct exchange, for all-to-all).

        With a result of S bytes on each of D devices: all-reduce 2 (D - 1) / D S; all-gather (D - 1) / D S;
        reduce-scatter (D - 1) S, because its operand has D S bytes; all-to-all (D - 1) / D S; collective-permute S.
        """
        size, others = self.result_bytes, devices - 1
        return {
            "all-reduce": 2 * others * size / devices,
            "all-gather": others * size / devices,
            "reduce-scatter": others * size,
            "all-to-all": others * size / devices,
            "collective-permute": size,
        }[self.kind]


def collectives(text: str) -> list[Collective]:
    """The collectives in the text of a compiled program, all of which must be over all devices.

    An asynchronous operation counts once, by its `-start`; if `async-start` calls a computation, the operation in that
    computation counts. Operations in the body of a loop count once.
    """
    operation = re.compile(rf" = (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
    found = []
    for line in text.splitlines():
        if match := operation.search(re.sub(r"/\*.*?\*/", "", line)):
            result = match["type"]
            if match["start"] and match["kind"] in ("all-gather", "collective-permute"):
                result = _elements(result)[1]  # (operands, results, ...)
            found.append(Collective(match["kind"], sum(array.nbytes for array in hlo.arrays(result))))
    return found


def _elements(type_text: str) -> list[str]:
    """The elements of a tuple's type."""
    parts, depth = [""], 0
    for character in type_text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def compiled_text(variant: str, parallelism: Parallelism, devices: int, batch_size: int) -> str:
    """The compiled train step for streamed images, as text; its inputs are only shapes."""
    model, side = alexnet.AlexNet(variant), alexnet.architecture(variant).input_size
    settings = OptimizerConfig("sgd", 0.01, momentum=0.9, weight_decay=5e-4)
    update, _ = optimizer.from_config(settings, 1, 1)
    measured = statistics.Statistics.of(np.zeros((1, side, side, 3), np.uint8))
    preprocessing = preprocess.Preprocessing(AugmentationConfig(input_range=255), measured, steps_per_epoch=1)
    step = functools.partial(train_step, model=model, optimizer=update, preprocess=preprocessing)
    layout = REPLICATED
    if parallelism == "hybrid":
        step = functools.partial(
            step,
            model=model.clone(dense_axis=AXIS),
            sum_gradients=functools.partial(gradients.at_once, add_up=gradients.add_up_copied),
        )
        layout = SPLIT_DENSE
    program: Any = compile_train_step(step, jax.devices()[:devices], StreamedDataset.fetch, layout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: create_state(model, update, (side, side, 3), key), key)
    placed = split_shapes(state, devices) if parallelism == "hybrid" else state
    share = (devices, 1, batch_size // devices)
    call = Batch(
        jax.ShapeDtypeStruct((*share, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct(share, jnp.int32),
        jax.ShapeDtypeStruct(share, jnp.bool_),
    )
    text: str = program.lower(placed, None, call, key).compile().as_text()
    return text


def split_shapes(state: TrainState, devices: int) -> SplitState:
    """The shapes of the result of `SPLIT_DENSE.put` for a state."""

    def part(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
        rows, features = leaf.shape if split_dense.is_split_kernel(path) else (0, 0)
        return jax.ShapeDtypeStruct((devices, -(-rows // devices), features), leaf.dtype) if rows else None

    copied = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if split_dense.is_split_kernel(path) else leaf, state
    )
    return SplitState(copied, jax.tree_util.tree_map_with_path(part, state))


def on_paper(variant: str, devices: int) -> dict[str, float]:
    """The batch size at which both kinds move the same amount: dense weights / amount per image of hybrid parallelism.

    Data parallelism moves each weight of the dense kernels twice (all-reduce), hybrid parallelism for each image and
    layer F / D inputs and all outputs, forward and backward; both with a factor of (D - 1) / D. `split_by_outputs` is
    the same for kernels divided by outputs: all inputs, and 1 / D of the logits.
    """
    shapes = [layer_counts.count_layers(variant)[name].kernel for name in split_dense.LAYERS]
    weights, inputs, outputs = sum(i * o for i, o in shapes), sum(i for i, _ in shapes), sum(o for _, o in shapes)
    by_inputs, by_outputs = inputs / devices + outputs, inputs + shapes[-1][1] / devices
    return {
        "dense_weights": weights,
        "numbers_an_image": by_inputs,
        "crossing": weights / by_inputs,
        "crossing_split_by_outputs": weights / by_outputs,
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """Counts for each number of devices, kind of parallelism and batch size."""
    rows = []
    for devices in options.devices:
        for parallelism in ("data", "hybrid"):
            for batch_size in options.batch_sizes:
                begin = time.perf_counter()
                text = compiled_text(options.variant, parallelism, devices, batch_size)
                found = collectives(text)
                kinds = {
                    kind: {
                        "operations": len(same),
                        "result_bytes": sum(c.result_bytes for c in same),
                        "sent_bytes": sum(c.sent_bytes(devices) for c in same),
                    }
                    for kind in KINDS
                    if (same := [c for c in found if c.kind == kind])
                }
                rows.append(
                    {
                        "devices": devices,
                        "parallelism": parallelism,
                        "batch_size": batch_size,
                        "collectives": kinds,
                        "sent_bytes": sum(kind["sent_bytes"] for kind in kinds.values()),
                        "seconds": round(time.perf_counter() - begin, 1),
                    }
                )
    return rows


def crossing(rows: list[dict[str, Any]], devices: int) -> dict[str, float]:
    """The batch size where the lines through the counts at the smallest and the largest batch cross.

    `largest_deviation` is the largest relative deviation of the other counts from those lines.
    """
    lines, deviation = {}, 0.0
    for parallelism in ("data", "hybrid"):
        sent = {
            row["batch_size"]: row["sent_bytes"]
            for row in rows
            if (row["devices"], row["parallelism"]) == (devices, parallelism)
        }
        first, last = min(sent), max(sent)
        slope = (sent[last] - sent[first]) / (last - first)
        lines[parallelism] = constant, slope = sent[first] - slope * first, slope
        deviation = max(deviation, *(abs((constant + slope * batch) / value - 1) for batch, value in sent.items()))
    (constant, slope), (hybrid_constant, hybrid_slope) = lines["data"], lines["hybrid"]
    return {
        "data_bytes": constant,
        "data_bytes_an_image": slope,
        "hybrid_bytes": hybrid_constant,
        "hybrid_bytes_an_image": hybrid_slope,
        "crossing": (constant - hybrid_constant) / (hybrid_slope - slope),
        "largest_deviation": deviation,
    }


def table(rows: list[dict[str, Any]], crossings: dict[str, dict[str, Any]]) -> str:
    """Megabytes that each device sends in a step, and the crossings, in Markdown."""
    batch_sizes = sorted({row["batch_size"] for row in rows})
    sent = {(row["devices"], row["parallelism"], row["batch_size"]): row["sent_bytes"] / 1e6 for row in rows}
    heads = ["devices", "data", *(f"hybrid, batch {b:,}" for b in batch_sizes), "same at batch", "on paper"]
    lines = [heads, ["---"] * len(heads)]
    for devices in sorted({row["devices"] for row in rows}):
        counted, paper = (crossings[str(devices)][kind]["crossing"] for kind in ("compiled", "paper"))
        cells = [sent[devices, "data", batch_sizes[0]], *(sent[devices, "hybrid", b] for b in batch_sizes)]
        lines.append([str(devices), *(f"{cell:,.1f} MB" for cell in cells), f"{counted:,.1f}", f"{paper:,.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(args: Sequence[str]) -> None:
    """Parses the flags, compiles, writes the counts, prints a Markdown table."""
    options = cli.parse(Options, args, "collectives.py")
    select_devices(max(options.devices))
    rows = measure(options)
    crossings = {
        str(devices): {"compiled": crossing(rows, devices), "paper": on_paper(options.variant, devices)}
        for devices in options.devices
    }
    report = {
        "command": "python benchmarks/collectives.py",
        "variant": options.variant,
        "counts": rows,
        "crossings": crossings,
        "peak_memory_gib": round(peak_host_memory() / 2**30, 2),
        "device": jax.devices()[0].device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows, crossings))


if __name__ == "__main__":
    cli.run(main)
