"""benchmarks/training_queue.py: runs are resumed, never repeated, and listed with their time."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alexnet_jax import data
from alexnet_jax.errors import StoppedError
from alexnet_jax.inspection import task
from alexnet_jax.network import build
from alexnet_jax.training import loop
from tests.tiny_runs import TINY_NETWORKS

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import one another as a script's neighbours

import ablate  # noqa: E402
import run as benchmark  # noqa: E402
import training_queue  # noqa: E402
from studies import Study, Variant  # noqa: E402
from training_queue import Entry  # noqa: E402

FLAGS = ("--epochs", "3", "--drop-epochs", "--batch-size", "16", "--num-devices", "1", "--checkpoint-every", "1")
STUDIES = {
    "tips": Study("Does it run?", "quickstart", FLAGS, (Variant("first"), Variant("second", ("--no-flip",)))),
    "post": Study("And this?", "quickstart", (*FLAGS, "--learning-rate", "0.01"), (Variant("other"),)),
}
QUEUE = (Entry("tips", seeds=1, rows=("first",)), Entry("post", seeds=2), Entry("tips", seeds=1))


@pytest.fixture
def queue(tiny, monkeypatch, tmp_path):
    """Runs of 21 steps of a tiny network."""
    monkeypatch.setattr(ablate, "STUDIES", STUDIES)
    monkeypatch.setattr(training_queue, "QUEUE", QUEUE)
    monkeypatch.setattr(training_queue, "use_one_core", lambda: None)
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    monkeypatch.setattr(benchmark, "describe_device", lambda: {"platform": "cpu", "name": "?", "count": 1, "cores": 1})
    for module in (data, task):
        monkeypatch.setattr(module, "load", lambda config: tiny)
    return ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]


def rows(folder):
    found = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [(row["variant"], row["seed"]) for row in found], found


def train_only(seed, out, runs):
    """One run of "post", outside the queue."""
    ablation = ablate.Ablation(ablate.Options("post", seeds=seed + 1, out=out, runs=runs))
    ablation.run(ablation.in_this_process, only=(ablation.variants[0], seed))
    return ablation.rows[-1]


def test_all_are_done_once_in_order_and_an_interrupted_one_first(queue, tmp_path, capsys, monkeypatch):
    def stop(config, dataset):
        for call in loop.training(config, dataset):
            if call.step == 16:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)  # a thread notes it

    with monkeypatch.context() as patched:
        patched.setattr(ablate, "train_and_evaluate", stop)
        with pytest.raises(StoppedError):
            train_only(1, tmp_path / "out" / "ablation-post-cpu.jsonl", tmp_path / "runs")
    capsys.readouterr()
    training_queue.main([*queue, "--list"])
    out = capsys.readouterr().out
    listed = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert [(line[1], line[2], line[3]) for line in listed] == [
        ("other", "1", "2 of 3"),
        ("first", "0", "0 of 3"),
        ("other", "0", "0 of 3"),
        ("second", "0", "0 of 3"),
    ]
    assert "4 runs are left: 0.0 core-hours, and 3 runs of unknown duration." in out

    order, trained = [], ablate.train_and_evaluate

    def noted(config, dataset):
        order.append((config.optimizer.learning_rate, config.augmentation.flip))
        return trained(config, dataset)

    monkeypatch.setattr(ablate, "train_and_evaluate", noted)
    training_queue.main(queue)
    assert order == [(0.01, True), (0.001, True), (0.01, True), (0.001, False)]
    names, found = rows(tmp_path / "out")
    assert names == [("other", 1), ("other", 0), ("first", 0), ("second", 0)]
    assert not any((tmp_path / "runs").iterdir())
    out = capsys.readouterr().out
    assert "1 runs are left: 0.0 core-hours." in out  # "first" tells what "second" takes
    assert out.endswith("Nothing is left.\n")
    training_queue.main(queue)
    assert len(order) == 4
    undisturbed = train_only(1, tmp_path / "undisturbed.jsonl", tmp_path / "runs")
    assert found[0]["test"] == undisturbed["test"]


# What the script does, with a tiny network and drawn images.
WORKER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from alexnet_jax import data
from alexnet_jax.config import cli
from alexnet_jax.data import shapes
from alexnet_jax.inspection import task
from alexnet_jax.network import build
import ablate, training_queue
from tests import test_training_queue as test
tiny = shapes.load(train=100, validation=30, test=70)
data.load = task.load = lambda config: tiny
build.NETWORKS = test.TINY_NETWORKS
ablate.STUDIES, training_queue.QUEUE = test.STUDIES, (test.Entry("post", seeds=1),)
cli.run(training_queue.main)
"""


@pytest.mark.stress
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_queue_leaves_nothing_behind_and_gives_the_same_row(tmp_path):
    def start(name):
        command = [
            sys.executable,
            "-c",
            WORKER,
            "--out",
            str(tmp_path / name),
            "--runs",
            str(tmp_path / f"{name}-runs"),
        ]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    killed = start("killed")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed-runs/*/checkpoints/7/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert start("killed").wait(240) == 0  # its predecessor's training would hold the run's lock
    assert start("undisturbed").wait(240) == 0
    (first,), (second,) = rows(tmp_path / "killed")[1], rows(tmp_path / "undisturbed")[1]
    assert first["test"] == second["test"]
