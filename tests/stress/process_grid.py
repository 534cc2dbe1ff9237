"""Grids of processes and devices: each must compute what one process with as many devices does.

    python -m tests.stress.process_grid

Two epochs of drawn images, every step logged, with plain SGD (Adam's first updates magnify rounding). Compared are the
images that each device got at each step, the losses, the validation, the parameters; and with --deterministic also the
exact bits, for all numbers of devices and for a run that is resumed in another grid after each epoch.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.stress.process_faults import FLAGS, WORKER, finish, records, start

GRIDS = [(p, d) for p in (2, 4) for d in (1, 2, 4)]
SGD = (*FLAGS, "--optimizer", "sgd", "--log-every", "1", "--eval-every", "3")
# Each process notes which images its devices get, in files that begin with {order}.
NOTES = """
import json
from alexnet_jax.data.batches import Batches
of_devices = Batches.of_devices
def noted(self, rows):
    part = of_devices(self, rows)
    with open("{order}-%02d" % rows.start, "a") as file:
        for indices in part.indices.swapaxes(0, 1).tolist():  # of each step, device by device
            file.write(json.dumps(indices) + "\\n")
    return part
Batches.of_devices = noted
"""


def train(workdir: pathlib.Path, grid: tuple[int, int], epochs: int, flags: Sequence[str] = ()) -> pathlib.Path:
    """Trains to the end of an epoch in a grid of (processes, devices of each)."""
    worker = WORKER.replace("cli.run", NOTES.format(order=f"{workdir}-order") + "cli.run")
    finish(start(workdir, *grid, (*SGD, *flags, "--epochs", str(epochs)), worker))
    return workdir


def order(workdir: pathlib.Path) -> list[list[int]]:
    """The images of each step, device by device."""
    files = sorted(workdir.parent.glob(f"{workdir.name}-order-*"))
    per_process = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    steps = [np.concatenate(steps) for steps in zip(*per_process, strict=True)]
    return [step.ravel().tolist() for step in steps]


def compared(workdir: pathlib.Path, reference: pathlib.Path) -> dict[str, Any]:
    """How a run differs from another."""
    import jax

    import alexnet_jax

    pairs = list(zip(records(workdir), records(reference), strict=True))
    one, two = (jax.tree.leaves(alexnet_jax.open_run(path).params) for path in (workdir, reference))
    differences = [abs(a["loss"] / b["loss"] - 1) for a, b in pairs if a["split"] == "train"]
    validations = [(a, b) for a, b in pairs if a["split"] == "validation"]
    return {
        "steps": len(differences),
        "same_images_at_every_step": order(workdir) == order(reference),
        "largest_relative_difference_of_a_loss": float(f"{max(differences):.2g}"),
        "largest_difference_of_a_parameter": float(
            f"{max(np.abs(a - b).max() for a, b in zip(one, two, strict=True)):.2g}"
        ),
        "validations": len(validations),
        "same_count_and_accuracy": all(
            a["count"] == b["count"] and a["accuracy"] == b["accuracy"] for a, b in validations
        ),
        "same_bits": all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)),
    }


def main() -> None:
    """Trains in every grid, compares, reports."""
    from tests.stress import results_file

    argparse.ArgumentParser(description="Compare grids of processes and devices with one process.").parse_args()
    begin, folder = time.monotonic(), pathlib.Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []

    def add(grid: object, reference: object, flags: str, differences: dict[str, Any]) -> None:
        rows.append({"processes x devices": grid, "compared with": reference, "flags": flags} | differences)
        print(json.dumps(rows[-1]), flush=True)

    for processes, devices in GRIDS:
        alone = folder / f"1x{processes * devices}"
        if not alone.exists():
            train(alone, (1, processes * devices), 2)
        run = train(folder / f"{processes}x{devices}", (processes, devices), 2)
        add(run.name, alone.name, "", compared(run, alone))
    exact = ("--deterministic",)
    alone = train(folder / "1x1-exact", (1, 1), 3, exact)
    for processes, devices in [grid for grid in GRIDS if grid[0] * grid[1] <= 8]:
        run = train(folder / f"{processes}x{devices}-exact", (processes, devices), 3, exact)
        add(f"{processes}x{devices}", "1x1", exact[0], compared(run, alone))
    for epoch, grid in enumerate([(4, 2), (2, 1), (1, 4)], start=1):
        run = train(folder / "chain", grid, epoch, exact)
        for file in folder.glob("chain-order-*"):  # one grid's can't be put together with another's
            file.unlink()
    differences = compared(run, alone)
    del differences["same_images_at_every_step"]
    add("4x2, then 2x1, then 1x4", "1x1", exact[0], differences)
    shutil.rmtree(folder)
    minutes = round((time.monotonic() - begin) / 60, 1)
    results_file.write("process-grid", "python -m tests.stress.process_grid", {"rows": rows, "minutes": minutes})


if __name__ == "__main__":
    main()
