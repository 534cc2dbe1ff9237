"""Kills a save, or makes it fail, at each of its file-system calls: earlier saves must remain, and the error be clear.

`python -m tests.stress.save_faults`. Before each call of a save, and half-way through each write, the process is
killed; from each call on, and at each call alone, calls fail with ENOSPC, EROFS or EIO (a full, a read-only, a broken
disk). Whole runs get ENOSPC from a call anywhere in them, and as root one gets a disk that is really full. After each,
the checkpoints from before must be what they were, the new one complete or absent, and the same command must then run
to the end. A failed save ends with one line on stderr and a code other than 0, within 10 s.
"""

import argparse
import collections
import dataclasses
import errno
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from tests.stress import harness
from tests.stress.harness import Faults, Saved

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)
MOST_SECONDS = 10.0
NEW_STEP = 28


@dataclasses.dataclass
class Figures:
    """What came of it."""

    counts: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    slowest: float = 0.0
    messages: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)


class Tester:
    """A run of three epochs in `folder`, and saves of one more checkpoint, which is the best."""

    def __init__(self, server: harness.Server, folder: pathlib.Path) -> None:
        self.server, self.folder, self.figures = server, folder, Figures()
        self.workdir = folder / "run"
        self.template = folder / "whole"
        digests = folder / "digests.jsonl"
        result = server.run("train", self.template, digests=str(digests))
        if result.code:
            raise RuntimeError(result.stderr)
        self.saved = harness.read_digests(digests)
        self.before = harness.steps_there(self.template)
        self.state = folder / "state.pickle"
        self._write_state(self.before[-1])
        self._copy()
        result = server.run("save", self.workdir, state=str(self.state), faults=Faults())
        self.calls = result.calls
        self.after = sorted(harness.to_keep([*self.before, NEW_STEP], self.saved))
        if result.code or harness.steps_there(self.workdir) != self.after:
            raise RuntimeError(f"{harness.steps_there(self.workdir)} instead of {self.after}: {result.stderr}")

    def _write_state(self, step: int) -> None:
        from alexnet_jax.runs.checkpoint import Checkpoints

        checkpoints = Checkpoints(self.template / "checkpoints", read_only=True)
        tree, memory = checkpoints.restore_tree(step)
        checkpoints.close()
        tree["step"] = tree["step"] + (NEW_STEP - tree["step"]).astype(tree["step"].dtype)
        self.state.write_bytes(pickle.dumps((tree, memory, 1.0)))
        self.saved[NEW_STEP] = Saved({"state": harness.digest(tree), "memory": harness.comparable_json(memory)}, 1.0)

    def _copy(self) -> None:
        shutil.rmtree(self.workdir, ignore_errors=True)
        self.workdir.mkdir()
        shutil.copytree(self.template / "checkpoints", self.workdir / "checkpoints")

    def kill(self, call: int, mode: str) -> None:
        """Kills a save before, or half-way through, a call; then saves again."""
        self._copy()
        what = f"{mode} at call {call}, {self.calls[call - 1]}"
        faults = Faults(mode, first=call, last=call)
        result = self.server.run("save", self.workdir, state=str(self.state), faults=faults)
        self.figures.counts[mode] += result.killed
        self._check(what, again=True)

    def fail(self, call: int, number: int, once: bool) -> None:
        """Has a save's calls fail from one on, or at one alone; then saves again."""
        self._copy()
        name = errno.errorcode[number]
        what = f"{name} {'at' if once else 'from'} call {call}, {self.calls[call - 1]}"
        faults = Faults("fail", first=call, last=call if once else harness.EVERY, error=number)
        result = self.server.run("save", self.workdir, state=str(self.state), faults=faults)
        self.figures.counts[f"{name} {'once' if once else 'from there on'}"] += 1
        self._check_end(result, what, saved=NEW_STEP in harness.steps_there(self.workdir))
        self._check(what, again=True)

    def fail_a_run(self, call: int, number: int) -> None:
        """Has a whole run's calls fail from one on; then goes on without."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        faults = Faults("fail", first=call, error=number, begin="start")
        result = self.server.run("train", self.workdir, faults=faults)
        name = errno.errorcode[number]
        self.figures.counts[f"{name} in a whole run"] += 1
        what = f"{name} from call {call} of a run"
        # What fails at the very end may be the closing of a file that holds all it must.
        self._check_end(result, what, saved=not result.code and not harness.differences(self.template, self.workdir))
        self._finish(self.server, self.workdir, what)

    def full_disk(self) -> None:
        """Trains on a file system that has room for one checkpoint, then for all."""
        folder = self.folder / "disk"
        folder.mkdir()
        mount = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=40m tmpfs {folder} && exec "$@"', "sh"]
        logs = self.folder / "disk-logs"
        logs.mkdir()
        with harness.Server(logs, self.server.cache, mount) as server:
            seen = pathlib.Path(f"/proc/{server.process.pid}/root{folder}")
            result = server.run("train", folder / "run")
            self.figures.counts["runs on a full disk"] += 1
            self._check_end(result, "a full disk", saved=False)
            there = harness.steps_there(seen / "run")
            if not there:
                self._fail("a full disk: no checkpoint")
            self._problems(seen / "run", there, "a full disk")
            enter = ["nsenter", "-t", str(server.process.pid), "-m"]
            subprocess.run([*enter, "mount", "-o", "remount,size=400m", str(folder)], check=True)
            self._finish(server, folder / "run", "a full disk", seen / "run")

    def _finish(
        self, server: harness.Server, workdir: pathlib.Path, what: str, seen: pathlib.Path | None = None
    ) -> None:
        """The same command, repeated, must run to the end and give the same result."""
        result = server.run("train", workdir)
        if result.code:
            self._fail(f"{what}: the same command again ends with {result.code}: {harness.short(result.stderr)}")
        else:
            for difference in harness.differences(self.template, seen or workdir):
                self._fail(f"{what}, run again: {difference}")

    def _check_end(self, result: harness.Result, what: str, saved: bool) -> None:
        """One line and a code, unless nothing was lost by the errors."""
        figures = self.figures
        figures.slowest = max(figures.slowest, result.seconds - result.phases[-1][1])
        lines = result.stderr.splitlines()
        if result.hung:
            self._fail(f"{what}: hangs")
        elif result.seconds - result.phases[-1][1] > MOST_SECONDS:
            self._fail(f"{what}: takes {result.seconds:.1f} s")
        elif result.code < 0 or (not result.code and not saved) or len(lines) > 1 or (result.code and not lines):
            self._fail(f"{what}: ends with {result.code} and says {harness.short(result.stderr)}")
        figures.messages[self._general(lines[-1]) if lines else "nothing"] += 1

    def _general(self, message: str) -> str:
        """A message without the names and numbers that change each time."""
        message = re.sub(r"[0-9a-f]{32}|(?<=file )\d+|(?<=write )\d+", "..", message.replace(str(self.folder), ""))
        return re.sub(r'"[a-z0-9_.]+/[0-9.]*"', '".."', message)

    def _check(self, what: str, again: bool) -> None:
        """The checkpoints of before, and the new one or not; a next save leaves what there must be."""
        there = harness.steps_there(self.workdir)
        if missing := harness.to_keep(sorted({*self.before, *there}), self.saved) - set(there):
            self._fail(f"{what}: {sorted(missing)} missing")
        self._problems(self.workdir, there, what)
        if again:
            result = self.server.run("save", self.workdir, state=str(self.state))
            what += ", saved again"
            if result.code or result.stderr:
                self._fail(f"{what}: ends with {result.code}: {harness.short(result.stderr)}")
            there = harness.steps_there(self.workdir)
            if missing := set(self.after) - set(there):
                self._fail(f"{what}: {sorted(missing)} missing")
            self.figures.counts["superseded checkpoints left"] += len(there) - len(self.after)
            self._problems(self.workdir, self.after[-1:], what)
            names = {path.name for path in (self.workdir / "checkpoints").iterdir()}
            if left := names - {str(step) for step in there}:
                self._fail(f"{what}: {sorted(left)} left over")

    def _problems(self, workdir: pathlib.Path, steps: list[int], what: str) -> None:
        for problem in harness.problems(workdir, steps, {step: saved.digest for step, saved in self.saved.items()}):
            self._fail(f"{what}: {problem}")

    def _fail(self, text: str) -> None:
        self.figures.failures.append(text)


def writes(name: str) -> bool:
    """Whether a call can be done by half."""
    return "write" in name or name in ("sendfile", "sendfile64", "copy_file_range")


def main() -> None:
    """Parses the flags, goes through all calls, reports."""
    from tests.stress import results_file

    parser = argparse.ArgumentParser(description="Kill and fail a save at each of its file-system calls.")
    parser.add_argument("--every", type=int, default=1, help="only each so-many-th call")
    parser.add_argument("--runs", type=int, default=24, help="whole runs that get errors")
    args = parser.parse_args()
    begin = time.monotonic()
    with harness.server() as server:
        tester = Tester(server, server.folder)
        figures, calls = tester.figures, tester.calls
        print(f"{len(calls)} calls in a save: {dict(collections.Counter(calls))}", flush=True)
        numbers = range(1, len(calls) + 1, args.every)
        for call in numbers:
            tester.kill(call, "kill")
            if writes(calls[call - 1]):
                tester.kill(call, "kill halfway")
        print(f"killed: {dict(figures.counts)}", flush=True)
        for number in ERRORS:
            for call in numbers:
                tester.fail(call, number, once=False)
                tester.fail(call, number, once=True)
            print(f"{errno.errorcode[number]}: {dict(figures.counts)}", flush=True)
        counting = server.run("train", server.folder / "counting", faults=Faults(begin="start"))
        for index in range(args.runs):
            tester.fail_a_run(1 + index * len(counting.calls) // args.runs, errno.ENOSPC)
        if os.geteuid() == 0 and shutil.which("unshare") and shutil.which("nsenter"):
            tester.full_disk()
        if figures.failures:
            print("\n".join(figures.failures), file=sys.stderr)
            print(f"see {server.folder}", file=sys.stderr)
            sys.exit(1)  # out of the block by an exception: the folder stays
    results: dict[str, Any] = {
        "calls in a save": len(calls),
        "calls by name": dict(sorted(collections.Counter(calls).items())),
        "calls in a whole run": len(counting.calls),
        "times": dict(sorted(figures.counts.items())),
        "lost, wrong or unrestorable checkpoints": len(figures.failures),
        "hangs": 0,
        "slowest end after an error, seconds": round(figures.slowest, 1),
        "messages": dict(sorted(figures.messages.items())),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    every = f" --every {args.every}" if args.every > 1 else ""
    runs = f" --runs {args.runs}" if args.runs != 24 else ""
    results_file.write("save-faults", f"python -m tests.stress.save_faults{every}{runs}", results)


if __name__ == "__main__":
    main()
