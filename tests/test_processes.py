"""Several processes train as one: same batches, same losses, one of them writes; none waits for a lost one.

Tests that start processes only to wait for a timeout are marked `stress`, except one of a kill and one of SIGTERM.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.config import cli
from alexnet_jax.config.settings import RunConfig
from alexnet_jax.distributed import processes
from alexnet_jax.errors import UsageError
from alexnet_jax.network import build
from alexnet_jax.training import loop
from tests.stress import process_faults
from tests.stress.process_faults import FLAGS, LONGER, WORKER
from tests.tiny_runs import TINY_NETWORKS


def test_two_processes_compute_what_one_does(tiny, tmp_path, monkeypatch):
    """Without interruption, and stopped after an epoch and resumed on more devices; behind a proxy that does not
    answer.

    The long form, also bit for bit with --deterministic: tests/stress/process_grid.py.
    """
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    flags = (*FLAGS, "--optimizer", "sgd", "--epochs")
    said = process_faults.finish(process_faults.start(tmp_path / "two", 2, 1, (*flags, "1")))
    assert "network" in said[0][0]
    assert said[1] == ("", "")  # nor does JAX warn of the proxy
    written = json.loads((tmp_path / "two" / "checkpoints" / "7" / "manifest.json").read_text())["files"]
    assert {name.split("/")[1] for name in written if "ocdbt.process" in name} == {"ocdbt.process_0", "ocdbt.process_1"}
    process_faults.finish(process_faults.start(tmp_path / "two", 2, 2, (*flags, "2")))
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    config = cli.parse_train([*flags, "2", "--workdir", str(tmp_path / "one"), "--num-devices", "2"])
    loop.train_and_evaluate(config, tiny)
    one, two = (alexnet_jax.open_run(tmp_path / name) for name in ("one", "two"))
    assert one.step == two.step == 14
    for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    pairs = zip(*(process_faults.records(tmp_path / name) for name in ("one", "two")), strict=True)
    for left, right in pairs:
        assert left == right | {"loss": pytest.approx(right["loss"], rel=1e-5)}


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.stress),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.stress),
    ],
)
def test_the_others_leave_when_one_is_lost(tmp_path, number, victim):
    """The long form, which then resumes the run: tests/stress/process_faults.py."""
    running = process_faults.start(tmp_path / "run", 2, 1, (*LONGER, "--epochs", "100", "--peer-timeout", "6"))
    outcome = process_faults.lose_one(tmp_path / "run", running, victim, number, 3.0)
    assert outcome.problems == []
    found = (
        ("silent for 6 s",) if number == signal.SIGSTOP else ("gone", "silent for 6 s")
    )  # by the process that sees it first
    assert any(f"process {victim} is {what}: " in outcome.lines[0] for what in found)


# What process 1 does after its second step.
FAILS = """
from orbax.checkpoint import Checkpointer
from alexnet_jax import errors
from alexnet_jax.distributed import processes, watchdog
poll, calls = processes.Poll.__call__, []
def mishap(*args):
    calls.append(args)
    if len(calls) == 2 and processes.jax.process_index() == 1:
        {mishap}
    return poll(*args)
processes.Poll.__call__ = mishap
"""


@pytest.mark.parametrize(
    ("mishap", "codes", "lines"),
    [
        (
            "raise errors.UsageError('the dog ate it')",
            (2, 2),
            ("-c: process 1: the dog ate it\n", "-c: the dog ate it\n"),
        ),
        pytest.param(
            "import time; time.sleep(100)",
            (1, 1),
            ("-c: process 1 is stuck: no progress for 16 s: see its output; the same commands resume from the last "
             "checkpoint\n",) * 2,
            marks=pytest.mark.stress,
        ),
        pytest.param(
            "import time; Checkpointer.save = lambda *_, **__: time.sleep(100)",
            (1, 1),
            ("-c: {run}/checkpoints/7: saving has taken 16 s: a process or its disk is stuck\n",) * 2,
            marks=pytest.mark.stress,
        ),
    ],
)  # fmt: skip
def test_a_mishap_of_one_is_told_by_all(tmp_path, mishap, codes, lines):
    worker = WORKER.replace("cli.run", FAILS.format(mishap=mishap) + "watchdog.STUCK = 0.8\ncli.run")
    said = process_faults.finish(
        process_faults.start(tmp_path / "run", 2, 1, (*FLAGS, "--peer-timeout", "20"), worker), codes
    )
    assert tuple(stderr for _, stderr in said) == tuple(line.format(run=tmp_path / "run") for line in lines)


@pytest.mark.both_lines
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--seed", "7"], "--seed: process 1 differs from process 0"),
        pytest.param(
            ["--num-devices", "2"],
            "--distributed: one process has 1 devices, another 2: all must have the same number",
            marks=pytest.mark.stress,
        ),
    ],
)
def test_all_must_want_the_same(tmp_path, flags, line):
    worker = WORKER.replace("cli.run", f"if sys.argv[-1] == '1': sys.argv += {flags}\ncli.run")
    said = process_faults.finish(process_faults.start(tmp_path / "run", 2, 1, FLAGS, worker), [2, 2])
    assert [stderr.split(": ", 1)[1].removeprefix("process 0: ") for _, stderr in said] == [f"{line}\n"] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.both_lines
def test_sigterm_to_one_stops_all_after_the_same_step(tmp_path):
    running = process_faults.start(tmp_path / "run", 2, 1, (*FLAGS, "--epochs", "1000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert [process.poll() for process in running] == [None, None]
        time.sleep(0.1)
    running[1].terminate()
    (_, first), (_, second) = process_faults.finish(running, [143, 143])
    assert re.fullmatch(r"-c: SIGTERM: saved step [\d,]+; the same command resumes from there\n", first)
    assert second == first


@pytest.mark.stress
def test_sigterm_ends_one_that_waits_for_the_others(tmp_path):
    alone = process_faults.start(
        tmp_path / "run", 2, 1, FLAGS, WORKER.replace("cli.run", "print('here', flush=True)\ncli.run")
    )
    alone[0].kill()
    alone[0].communicate()
    assert alone[1].stdout.readline() == "here\n"
    time.sleep(2)
    alone[1].terminate()
    ((_, stderr),) = process_faults.finish(alone[1:], [143])
    assert stderr == "-c: SIGTERM: stopped\n"


@pytest.mark.stress
def test_a_process_that_stays_alone_says_so(tmp_path):
    worker = WORKER.replace(
        "cli.run", "from alexnet_jax.distributed import processes\nprocesses.JOIN_TIMEOUT = 2\ncli.run"
    )
    alone = process_faults.start(tmp_path / "run", 2, 1, FLAGS, worker)
    alone[0].kill()
    alone[0].communicate()
    ((_, said),) = process_faults.finish(alone[1:], [1])
    assert said.startswith("-c: --distributed: the processes did not find each other within 2 s")
    assert said.count("\n") == 1


def test_an_abort_for_another_reason_is_shown_and_is_one():
    program = "import os; from alexnet_jax.distributed import watchdog; watchdog.HeldBackOutput(lambda: os._exit(0))\n"
    program += "os.write(2, b'something else is fatal\\n'); os.abort()"
    ended = subprocess.run([sys.executable, "-c", program], cwd=process_faults.ROOT, capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGABRT
    assert ended.stderr == b"something else is fatal\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num-processes", "2"], "--num-processes: only with --distributed"),
        (["--distributed", "--process-id", "0"], "missing: --coordinator, --num-processes: give all three"),
        (
            ["--distributed", "--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "--coordinator here: must be HOST:PORT",
        ),
        (
            ["--distributed", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 must be less than --num-processes 2",
        ),
    ],
)
def test_flags_must_go_together(flags, reason):
    with pytest.raises(UsageError, match=reason):
        cli.parse_train(flags)


def test_windows_is_refused(monkeypatch):
    run = RunConfig(distributed=True)
    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "name", "nt")
        with pytest.raises(UsageError, match="--distributed: Windows is not supported"), processes.joined(run):
            pass


def test_a_platform_that_is_not_there_is_one_line():
    """JAX can't even tell the process's number then."""
    program = """
from alexnet_jax import runtime
from alexnet_jax.config import cli
from alexnet_jax.distributed import processes
def main(args):
    with processes.joined(cli.parse_train(args).run):
        runtime.devices()
cli.run(main)
"""
    address = process_faults.free_address()
    flags = ["--distributed", "--coordinator", address, "--num-processes", "1", "--process-id", "0"]
    environment = os.environ | {"PYTHONPATH": str(process_faults.ROOT), "JAX_PLATFORMS": "nonsense"}
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "-c: JAX_PLATFORMS='nonsense': JAX can't use such a device here (Unable to initialize "
    )
    assert "unset JAX_PLATFORMS" in done.stderr
    assert done.stderr.count("\n") == 1
