"""Several processes train as one: the same batches, the same losses, one that writes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import cli
from alexnet_jax.errors import UsageError

WORKER = """
import sys
import train
from alexnet_jax import cli, datasets, evaluation
from alexnet_jax.datasets import shapes
tiny = shapes.load(train=100, validation=30, test=70)
datasets.load = evaluation.load = lambda config: tiny
cli.run(train.main)
"""
ROOT = pathlib.Path(__file__).parent.parent
FLAGS = ["quickstart", "--batch-size", "16", "--log-every", "3", "--deterministic"]


def train(workdir, epochs, processes, devices):
    """Trains in so many processes of so many devices; returns what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": os.environ["ALEXNET_JAX_TEST_CACHE"],
        "PYTHONPATH": str(ROOT),
    }
    running = []
    for process in range(processes):
        flags = [*FLAGS, "--workdir", str(workdir), "--epochs", str(epochs), "--num-devices", str(devices)]
        if processes > 1:
            flags += ["--distributed", "--coordinator", coordinator]
            flags += ["--num-processes", str(processes), "--process-id", str(process)]
        command = [sys.executable, "-c", WORKER, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * processes, said
    return said


def records(workdir, split):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines if line["split"] == split]


def test_two_processes_compute_what_one_does(tmp_path):
    """With --deterministic bit for bit: in one go, and stopped after an epoch and gone on with by another number."""
    train(tmp_path / "one", epochs=2, processes=1, devices=2)
    said = train(tmp_path / "two", epochs=1, processes=2, devices=1)
    assert "network" in said[0][0]
    assert "network" not in said[1][0]
    train(tmp_path / "two", epochs=2, processes=2, devices=2)
    one, two = (alexnet_jax.open_run(tmp_path / name) for name in ("one", "two"))
    assert one.step == two.step == 14
    for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(left, right)
    assert records(tmp_path / "one", "train") == records(tmp_path / "two", "train")
    for left, right in zip(*(records(tmp_path / name, "validation") for name in ("one", "two")), strict=True):
        assert left["count"] == right["count"] == 30
        assert left["accuracy"] == right["accuracy"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num-processes", "2"], "--num-processes: only with --distributed"),
        (["--distributed", "--process-id", "0"], "--coordinator, --num-processes is missing"),
        (
            ["--distributed", "--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "--coordinator here: HOST:PORT is needed",
        ),
        (
            ["--distributed", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2: with --num-processes 2 it is less",
        ),
    ],
)
def test_flags_must_go_together(flags, reason):
    with pytest.raises(UsageError, match=reason):
        cli.parse_train(flags)
