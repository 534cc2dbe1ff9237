"""Kills runs with SIGKILL at random instants, restarts them, and compares the results.

`python -m tests.stress.kill [--kills 1000] [--seed 0]`. Half of the kills fall anywhere in a process's life, the others
within a chosen phase: starting, training, validating, saving, finishing. After each, every checkpoint in the folder
must be what the uninterrupted run saved under that step, and none that has to be kept may be missing. A run that was
killed and restarted until it finished must have the uninterrupted run's checkpoints and lines of metrics. Evaluations
are killed, too, and then repeated. Ends with 1, and keeps the folder, if anything differs.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.stress import harness

CHANCES = {"start": 2, "training": 3, "validation": 2, "saving": 6, "finishing": 1}
MOST_KILLS = 12  # of one run


@dataclasses.dataclass
class Figures:
    """What came of it."""

    kills: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    runs_finished: int = 0
    evaluations_finished: int = 0
    checkpoints_checked: int = 0
    superseded_checkpoints_left: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {"kills": sum(self.kills.values()), "kills by phase": dict(sorted(self.kills.items()))} | {
            "runs finished, each like the uninterrupted one": self.runs_finished,
            "evaluations repeated, each with the same results": self.evaluations_finished,
            "checkpoints checked": self.checkpoints_checked,
            "superseded checkpoints left in finished runs": self.superseded_checkpoints_left,
            "lost, wrong or unrestorable checkpoints and differences": len(self.failures),
        }


class Tester:
    """Kills runs in `folder`; stops at the first failure."""

    def __init__(self, server: harness.Server, folder: pathlib.Path, seed: int) -> None:
        self.server, self.folder = server, folder
        self.random, self.figures = random.Random(seed), Figures()
        self.whole = folder / "whole"
        digests = folder / "digests.jsonl"
        self.server.run("train", folder / "warm-up")  # fills the compilation cache
        shutil.rmtree(folder / "warm-up")
        result = self._finish("train", self.whole, digests=str(digests))
        self.saved = harness.read_digests(digests)
        self.digests = {step: saved.digest for step, saved in self.saved.items()}
        self.last_step = max(self.saved)
        self.validations = [r["step"] for r in harness.metrics_lines(self.whole) if r["split"] == "validation"]
        self.seconds = result.seconds
        self.lengths: dict[str, list[float]] = collections.defaultdict(list)
        for phase, seconds in result.durations():
            self.lengths[phase].append(seconds)
        self.evaluation = self._finish("evaluate", self.whole)
        self.results = self._results(self.whole)

    def run(self, kills: int, say: Callable[[str], None] = lambda text: None) -> Figures:
        """Continues until that many processes were killed, at most two per run while evaluating."""
        number, figures = 0, self.figures
        while sum(figures.kills.values()) < kills and not figures.failures:
            workdir = self.folder / f"run{number}"
            self._one_run(workdir, kills)
            if not figures.failures:
                self._evaluations(workdir, kills)
            if figures.failures:
                break
            shutil.rmtree(workdir)
            number += 1
            say(f"run {number}: {sum(figures.kills.values())} kills, {dict(figures.kills)}")
        return figures

    def _one_run(self, workdir: pathlib.Path, kills: int) -> None:
        """Kills and restarts one run until it is finished."""
        known: set[int] = set()
        checked: dict[int, int] = {}
        figures = self.figures
        for number in range(MOST_KILLS + 1):
            enough = number == MOST_KILLS or sum(figures.kills.values()) >= kills
            kill = None if enough else self._choose(max(known, default=0), first=number == 0)
            result = self.server.run("train", workdir, kill=kill)
            if not result.killed:
                self._expect_clean(result, workdir)
                break
            figures.kills[result.phase] += 1
            there = set(harness.steps_there(workdir))
            known |= there
            self._fail_if(not known <= self.saved.keys(), f"{workdir}: checkpoints {sorted(there)}")
            missing = harness.to_keep(sorted(known), self.saved) - there if not figures.failures else ()
            self._fail_if(missing, f"{workdir}: checkpoints {missing} are gone after {kill} in {result.phase}")
            # A checkpoint is checked when it appears, and once more when the run is finished.
            stamps = {step: (workdir / "checkpoints" / str(step)).stat().st_ino for step in there}
            self._check(workdir, [step for step in sorted(there) if checked.get(step) != stamps[step]])
            checked = stamps
            if figures.failures:
                return
        if figures.failures:
            return
        for difference in harness.differences(self.whole, workdir):
            self._fail_if(True, f"{workdir}: {difference}")
        there = set(harness.steps_there(workdir))
        self._check(workdir, sorted(there))
        extra = there - harness.to_keep(sorted(there), self.saved)
        figures.superseded_checkpoints_left += len(extra)
        figures.runs_finished += 1

    def _evaluations(self, workdir: pathlib.Path, kills: int) -> None:
        """Kills an evaluation, twice at most, then repeats it."""
        figures = self.figures
        for _ in range(2):
            if sum(figures.kills.values()) >= kills:
                break
            result = self.server.run("evaluate", workdir, kill=self._within(self.evaluation.seconds))
            figures.kills["evaluation"] += result.killed
            self._check(workdir, harness.steps_there(workdir)[-1:])
        result = self.server.run("evaluate", workdir)
        self._expect_clean(result, workdir)
        if not figures.failures:
            self._fail_if(self._results(workdir) != self.results, f"{workdir}: another evaluation")
            figures.evaluations_finished += 1

    def _choose(self, step: int, first: bool) -> harness.Kill:
        """A random instant of a process that starts after `step`."""
        if self.random.random() < 0.5:
            return self._within(self.seconds * (0.35 + 0.65 * (1 - step / self.last_step)))
        saves, validations = (sum(s > step for s in steps) for steps in (self.saved, self.validations))
        weights = [0 if phase == "saving" and not saves else weight for phase, weight in CHANCES.items()]
        (phase,) = self.random.choices(list(CHANCES), weights)
        length = float(np.median(self.lengths["first start" if phase == "start" else phase]))
        if phase == "start":
            phase = "first start" if first else "restart"
            length = max(self.lengths["first start"])
        occurrences = {"saving": saves, "validation": validations, "training": validations}.get(phase, 1)
        return harness.Kill(self.random.uniform(0, 1.1 * length), phase, self.random.randint(1, max(occurrences, 1)))

    def _within(self, seconds: float) -> harness.Kill:
        return harness.Kill(self.random.uniform(0, 1.05 * seconds))

    def _check(self, workdir: pathlib.Path, steps: list[int]) -> None:
        for problem in harness.problems(workdir, steps, self.digests):
            self._fail_if(True, f"{workdir}: {problem}")
        self.figures.checkpoints_checked += len(steps)

    def _expect_clean(self, result: harness.Result, workdir: pathlib.Path) -> None:
        text = f"{workdir}: exit code {result.code}{', hung' if result.hung else ''}: {harness.short(result.stderr)}"
        self._fail_if(result.code or result.stderr, text)

    def _fail_if(self, wrong: object, text: str) -> None:
        if wrong:
            self.figures.failures.append(text)

    def _finish(self, job: str, workdir: pathlib.Path, **rest: Any) -> harness.Result:
        """Lets a trial end by itself."""
        result = self.server.run(job, workdir, **rest)
        if result.code:
            raise RuntimeError(f"{job} ends with {result.code}: {result.stderr}")
        return result

    def _results(self, workdir: pathlib.Path) -> tuple[Any, ...]:
        """All results of an evaluation, except for the plots."""
        folder = workdir / "eval"
        with np.load(folder / "predictions.npz") as arrays:
            predictions = {name: arrays[name].tolist() for name in sorted(arrays)}
        return json.loads((folder / "test.json").read_text()), predictions, sorted(p.name for p in folder.iterdir())


def main() -> None:
    """Parses the flags, kills, reports."""
    from tests.stress import results_file

    parser = argparse.ArgumentParser(description="Kill runs at random instants and compare what they become.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    with harness.server() as server:
        figures = Tester(server, server.folder, args.seed).run(args.kills, lambda text: print(text, flush=True))
        if figures.failures:
            print("\n".join(figures.failures), file=sys.stderr)
            print(f"see {server.folder}", file=sys.stderr)
            sys.exit(1)  # out of the block by an exception: the folder stays
    minutes = round((time.monotonic() - begin) / 60, 1)
    command = f"python -m tests.stress.kill --kills {args.kills} --seed {args.seed}"
    results_file.write("kill", command, figures.as_json() | {"seed": args.seed, "minutes": minutes})


if __name__ == "__main__":
    main()
