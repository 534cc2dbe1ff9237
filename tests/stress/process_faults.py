"""Processes that train as one, of which one is killed or stopped: the others must exit, and the next ones resume.

    python -m tests.stress.process_faults --trials 20 --processes 2 4

A trial starts a training in several processes, sends one of them SIGKILL or SIGSTOP at a random instant between the
claim of the folder and the end, and waits for the others. Each must exit within 30 s with one line on stderr and code
1; so must the one that was stopped, when it is continued. Then the same commands are run again, and their results must
equal those of an undisturbed run.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 30.0  # seconds in which all must be gone
# What train.py does, on 100 drawn images.
WORKER = """
import sys
import train
from alexnet_jax import data
from alexnet_jax.config import cli
from alexnet_jax.data import shapes
from alexnet_jax.network import build
from tests.tiny_runs import TINY_NETWORKS, draw_nothing
draw_nothing()
tiny = shapes.load(train=100, validation=30, test=70)
data.load = lambda config: tiny
build.NETWORKS = TINY_NETWORKS
cli.run(train.main)
"""
FLAGS = ("quickstart", "--batch-size", "16", "--log-every", "3")
LONGER = (*FLAGS, "--epochs", "3", "--checkpoint-every", "1")


def free_address() -> str:
    """A HOST:PORT of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(
    workdir: pathlib.Path, processes: int, devices: int, flags: Sequence[str] = (), worker: str = WORKER
) -> list[subprocess.Popen[str]]:
    """Starts a training in so many processes of so many devices."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    address, running = free_address(), []
    for process in range(processes):
        command = [sys.executable, "-c", worker, *flags, "--workdir", str(workdir), "--num-devices", str(devices)]
        if processes > 1:
            command += ["--distributed", "--coordinator", address]
            command += ["--num-processes", str(processes), "--process-id", str(process)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
    return running


def finish(running: list[subprocess.Popen[str]], codes: Sequence[int] = ()) -> list[tuple[str, str]]:
    """Waits for all; returns what each said on stdout and stderr, once they have ended with these codes (0)."""
    said = [process.communicate(timeout=240) for process in running]
    if [process.returncode for process in running] != (list(codes) or [0] * len(running)):
        raise AssertionError(f"codes {[process.returncode for process in running]}: {said}")
    return said


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, less what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def is_like(workdir: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two runs have the same parameters, bit for bit, and the same metrics."""
    import jax

    import alexnet_jax

    one, two = (alexnet_jax.open_run(path) for path in (workdir, other))
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True)
    same = all(np.array_equal(a, b) for a, b in leaves)
    return same and one.step == two.step and records(workdir) == records(other)


class TooLateError(Exception):
    """The training was over before anything happened to it."""


@dataclasses.dataclass
class Outcome:
    """The outcome of a training run in which one process was lost.

    Attributes:
      seconds: until the last of the others had left.
      lines: what they said on stderr.
      problems: whatever was not as promised.
    """

    seconds: float
    lines: list[str]
    problems: list[str]


def wait_for_claim(workdir: pathlib.Path, running: list[subprocess.Popen[str]]) -> None:
    """Waits until a training has claimed its folder."""
    while not (workdir / "train.lock").exists():
        if any(process.poll() is not None for process in running):
            raise AssertionError(f"it ended by itself: {[process.communicate() for process in running]}")
        time.sleep(0.01)


def lose_one(
    workdir: pathlib.Path, running: list[subprocess.Popen[str]], victim: int, number: signal.Signals, delay: float
) -> Outcome:
    """Sends the signal so many seconds after the folder was claimed."""
    wait_for_claim(workdir, running)
    time.sleep(delay)
    if running[victim].poll() is not None:
        finish(running)
        raise TooLateError
    running[victim].send_signal(number)
    begin = time.monotonic()
    others = [process for process in running if process is not running[victim]]
    problems, lines = [], []
    for process in others:
        try:
            process.wait(timeout=max(0.1, begin + 2 * LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"process {running.index(process)} hangs")
            process.kill()
    seconds = time.monotonic() - begin
    if number == signal.SIGSTOP:
        running[victim].send_signal(signal.SIGCONT)
        others.append(running[victim])
    for process in others:
        try:
            _, stderr = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            problems.append(f"process {running.index(process)} hangs after it was let go on")
            process.kill()
            continue
        lines.append(stderr)
        if process.returncode != 1 or stderr.count("\n") != 1:
            problems.append(f"process {running.index(process)}: code {process.returncode}, {stderr!r}")
    running[victim].kill()
    running[victim].communicate()
    if seconds > LIMIT:
        problems.append(f"{seconds:.1f} s")
    return Outcome(seconds, lines, problems)


@dataclasses.dataclass
class Trial:
    """One training, and what happens to it; see `run`."""

    processes: int
    number: signal.Signals
    victim: int
    delay: float
    outcome: Outcome | None = None


def run(trial: Trial, whole: pathlib.Path, choice: random.Random) -> Trial:
    """Loses a process, goes on, compares with the undisturbed run."""
    workdir = pathlib.Path(tempfile.mkdtemp(dir=whole.parent)) / "run"
    while trial.outcome is None:
        running = start(workdir, trial.processes, 1, LONGER)
        try:
            trial.outcome = lose_one(workdir, running, trial.victim, trial.number, trial.delay)
        except TooLateError:
            trial.delay = choice.uniform(0, trial.delay)
            shutil.rmtree(workdir)
    finish(start(workdir, trial.processes, 1, LONGER))
    if not is_like(workdir, whole):
        trial.outcome.problems.append(f"{workdir}: not like the undisturbed run")
    text = f"{trial.number.name} to {trial.victim} of {trial.processes} after {trial.delay:.1f} s:"
    text += f" {trial.outcome.seconds:.1f} s, {trial.outcome.lines} {trial.outcome.problems}"
    print(text, flush=True)
    if not trial.outcome.problems:
        shutil.rmtree(workdir.parent)
    return trial


def main() -> None:
    """Parses the flags, loses processes, reports."""
    from tests.stress import results_file

    parser = argparse.ArgumentParser(description="Kill and stop processes of a training and see what becomes of it.")
    parser.add_argument("--trials", type=int, default=20, help="of each signal and number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--at-once", type=int, default=3, help="trials that run side by side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin, choice, folder = time.monotonic(), random.Random(args.seed), pathlib.Path(tempfile.mkdtemp())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    trials = []
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        for processes in args.processes:
            whole = folder / f"undisturbed-{processes}"
            for _ in range(2):  # the first compiles
                shutil.rmtree(whole, ignore_errors=True)
                running = start(whole, processes, 1, LONGER)
                wait_for_claim(whole, running)
                begun = time.monotonic()
                finish(running)
                length = time.monotonic() - begun
            planned = [
                Trial(processes, number, choice.randrange(processes), choice.uniform(0, length))
                for _ in range(args.trials)
                for number in (signal.SIGKILL, signal.SIGSTOP)
            ]
            trials += pool.map(lambda trial, whole=whole: run(trial, whole, choice), planned)
    rows = []
    for processes in args.processes:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            ours = [trial for trial in trials if (trial.processes, trial.number) == (processes, number)]
            outcomes = [trial.outcome for trial in ours if trial.outcome]
            seconds = [outcome.seconds for outcome in outcomes]
            rows.append(
                {
                    "processes": processes,
                    "signal": number.name,
                    "trials": len(ours),
                    "to_process": [sum(trial.victim == i for trial in ours) for i in range(processes)],
                    "seconds_until_all_left": {
                        "median": round(float(np.median(seconds)), 1),
                        "most": round(max(seconds), 1),
                    },
                    "left_as_promised_and_resumed_like_undisturbed": sum(not o.problems for o in outcomes),
                    "lines": sorted({line for outcome in outcomes for line in outcome.lines}),
                }
            )
    if failures := [problem for trial in trials if trial.outcome for problem in trial.outcome.problems]:
        print("\n".join(failures), file=sys.stderr)
        print(f"see {folder}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder)
    command = f"python -m tests.stress.process_faults --trials {args.trials} --processes"
    command += "".join(f" {n}" for n in args.processes) + f" --seed {args.seed}"
    minutes = round((time.monotonic() - begin) / 60, 1)
    name = "-".join(["process-faults", *map(str, args.processes)])
    results_file.write(name, command, {"rows": rows, "seed": args.seed, "minutes": minutes})


if __name__ == "__main__":
    main()
