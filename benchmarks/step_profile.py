"""Where a whole training step on a CPU spends its time, layer by layer, as JAX's profiler sees it; see `--help`.

A part that is timed on its own (`layers.py`) may be laid out and fused differently in the step. Here the step itself is
traced. XLA names each of its operations after the scopes of the code it comes from: layers, `max_pool`, `update`.
"""

import collections
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Literal

from alexnet_jax.config import cli
from alexnet_jax.config.types import PositiveInt

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "logits")
SCOPES = (*LAYERS, "local_response_norm", "max_pool", "dropout", "augmentation", "keys", "finite", "update")
ACTIVATION, OTHER = "activation", "copies and other"


@dataclasses.dataclass(frozen=True)
class Options:
    """Trace some training steps on a CPU, and add up their operations by layer and direction."""

    network: Literal["small", "torchvision"] = "torchvision"
    """AlexNetSmall, or torchvision's AlexNet."""
    batch_size: PositiveInt = 32
    """Images per step."""
    steps: PositiveInt = 3
    """Traced steps."""
    slowest: int = 0
    """Also print that many of the slowest operations."""


def main(args: Sequence[str]) -> None:
    """Parses the flags, traces, prints Markdown tables."""
    options = cli.parse(Options, args, "step_profile.py")
    with tempfile.TemporaryDirectory(prefix="alexnet_jax_profile_") as folder:
        times, scopes = traced(options, pathlib.Path(folder))
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, milliseconds in times.items():
        parts[part_of(scopes[name])]["transpose(" in scopes[name]] += milliseconds
    print("| part | forward ms | backward ms | of the step |\n| --- | --- | --- | --- |")
    total = sum(times.values())
    for name, (forward, backward) in sorted(parts.items(), key=lambda item: -sum(item[1])):
        print(f"| {name} | {forward:.1f} | {backward:.1f} | {(forward + backward) / total:.0%} |")
    print(f"| sum | {sum(a for a, _ in parts.values()):.1f} | {sum(b for _, b in parts.values()):.1f} | |")
    for name, milliseconds in times.most_common(options.slowest):
        print(f"{milliseconds:8.1f} ms  {name}  {scopes[name]}")


def traced(options: Options, folder: pathlib.Path) -> tuple[collections.Counter[str], Mapping[str, str]]:
    """Milliseconds per step of each operation of the compiled step, and the scopes that each comes from."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
    os.environ["JAX_PLATFORMS"] = "cpu"  # both before JAX is imported
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    import jax
    import layers

    step = layers.whole_step(options.network, options.batch_size, folder)
    with jax.profiler.trace(str(folder)):
        step.run(options.steps)
    programs = [path.read_text() for path in folder.glob("*cpu_after_optimizations.txt")]
    program = next(text for text in programs if "/update/" in text)
    scopes = dict(re.findall(r'^ *(?:ROOT )?%([\w.-]+) = .*?(?:op_name="([^"]*)".*)?$', program, re.MULTILINE))
    times: collections.Counter[str] = collections.Counter()
    (trace,) = folder.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in scopes:
                    times[event.name] += event.duration_ns / 1e6 / options.steps
    return times, scopes


def part_of(scope: str) -> str:
    """The part of the network, or of the step, that an operation with this name belongs to."""
    found = [name for name in re.findall(r"\w+", scope) if name in SCOPES]
    if found:
        return found[-1]
    return ACTIVATION if "AlexNet" in scope else OTHER


if __name__ == "__main__":
    cli.run(main)
