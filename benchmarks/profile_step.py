"""Where the time of our training step goes, by layer: `python benchmarks/profile_step.py`; `--help` explains.

XLA names what it runs after what was fused into it; so a row also holds the cheap operations beside it (the ReLU with
the bias of a convolution, say). Operations overlap, so the rows can come to more than a step takes.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from programs import BATCHES, Spec

from alexnet_jax import cli, runtime
from alexnet_jax.config import NetworkConfig, PositiveInt, validate

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = .*op_name=\"([^\"]*)\"", re.MULTILINE)
LAYER = re.compile(r"\b(conv\d|fc\d|logits|local_response_norm|max_pool|dropout)\b")


@dataclasses.dataclass(frozen=True)
class Options:
    """Profile the training step of AlexNetSmall on this machine's CPU."""

    batch_size: PositiveInt = 128
    """Images a step."""
    steps: PositiveInt = 20
    """Steps to trace."""
    network: NetworkConfig = NetworkConfig()
    out: pathlib.Path | None = None
    """JSON file to write the table to."""


def layer_of(op_name: str) -> str:
    """The row that an operation belongs to, by the path that JAX gave it."""
    found = LAYER.findall(op_name)
    direction = "backward" if "transpose(" in op_name else "forward"
    if found:
        return f"{found[-1]}, {direction}"
    return "loss and the rest of the network" if "jvp" in op_name else "optimizer, random numbers, copies"


def events(trace: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Names and seconds of everything in a trace."""
    from jax.profiler import ProfileData

    (file,) = trace.rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                yield event.name, event.duration_ns / 1e9


def profile(options: Options, folder: pathlib.Path) -> dict[str, float]:
    """Milliseconds a step by row, largest first, and in all."""
    rng = np.random.default_rng(0)
    count = BATCHES * options.batch_size
    images, labels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count, np.int32)
    np.savez(folder / "data.npz", images=images, labels=labels)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"

    import jax
    import programs_jax

    spec = Spec("jax", "cpu", batch_size=options.batch_size, data=str(folder / "data.npz"))
    program = programs_jax.train(spec, options.network)["train"]
    program.run(5)
    start = time.perf_counter()
    program.run(options.steps)
    seconds = time.perf_counter() - start
    with jax.profiler.trace(str(folder / "trace")):
        program.run(options.steps)

    (dump,) = folder.glob("*train_steps*after_optimizations.txt")
    rows = {name: layer_of(op_name) for name, op_name in INSTRUCTION.findall(dump.read_text())}
    totals: collections.Counter[str] = collections.Counter()
    for name, duration in events(folder / "trace"):
        if name in rows:
            totals[rows[name]] += duration * 1e3 / options.steps
    return {"whole step, without the profiler": seconds * 1e3 / options.steps, **dict(totals.most_common())}


def main(args: Sequence[str]) -> None:
    """Parses the flags, profiles, prints a Markdown table."""
    options = validate(cli.parse(Options, args, "profile_step.py", Options.__doc__ or ""))
    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="alexnet_jax_profile_") as folder:
        rows = profile(options, pathlib.Path(folder))
    print("| part of the step | ms |\n| --- | --- |")
    for name, milliseconds in rows.items():
        print(f"| {name} | {milliseconds:.1f} |")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    cli.run(main)
