"""SIGTERM and SIGINT at random instants of `train.py`: `python -m tests.stress.stop_signals`."""

import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import tqdm

from tests.stress import results_file

ROOT = pathlib.Path(__file__).parents[2]


def stop(workdir: pathlib.Path, after: float, numbers: list[int]) -> tuple[int, float, str]:
    """Starts training, sends the signals 0.2 s apart; returns exit code, seconds from the first one, and stderr."""
    command = [sys.executable, "train.py", "quickstart", "--workdir", str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    begin = time.perf_counter()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    _, stderr = process.communicate()
    return process.returncode, time.perf_counter() - begin, stderr


def main() -> None:
    """Stops runs, checks code, time and words, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draws = random.Random(arguments.seed)
    seconds: dict[str, list[float]] = {"SIGTERM": [], "SIGINT": [], "SIGINT twice": []}
    saved, failures = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for trial in tqdm.trange(arguments.trials):
            kind = list(seconds)[trial % 3]
            number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT
            after = draws.uniform(2, 15)
            numbers = [number, number] if kind == "SIGINT twice" else [number]
            code, took, stderr = stop(pathlib.Path(folder) / f"{trial}", after, numbers)
            seconds[kind].append(took)
            saved += "saved step" in stderr
            fewest = 0 if kind == "SIGINT twice" else 1
            if code != 128 + number or took > 10 or not fewest <= len(stderr.splitlines()) <= 1:
                failures.append([kind, after, code, took, stderr])
    results_file.write(
        "signals",
        f"python -m tests.stress.stop_signals --trials {arguments.trials} --seed {arguments.seed}",
        {
            "trials": arguments.trials,
            "saved": saved,
            "slowest_seconds": {kind: round(max(times), 2) for kind, times in seconds.items()},
            "failures": failures,
        },
    )
    if failures:
        sys.exit("a run did not stop as promised")


if __name__ == "__main__":
    main()
