"""Runs that are killed, or whose file-system calls fail: a fork server and what compares run folders.

`Server` starts one process that has imported everything but has not begun to use JAX, with `faults.c` preloaded. It
forks a child for each trial, so that a trial costs no imports; the compiled programs come from a shared cache. The
child does what `train.py` or `eval.py` does, on 100 drawn images, and ends as a process does.

A trial is a `Trial` in, a `Result` out. The child says through a pipe which phase it enters; the server may kill it any
time after that.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODES = {"count": 1, "kill": 2, "kill halfway": 3, "fail": 4}
PHASES = ("first start", "restart", "training", "validation", "saving", "finishing", "evaluation")
# Seven steps an epoch, of which the last is padded; saves at each epoch's end and at the best of the other validations.
RECIPE = (
    "cifar10-paper --dataset shapes --batch-size 16 --num-devices 1 --log-every 3 --learning-rate 1e-3 "
    "--epochs 3 --eval-every 2 --eval-batch-size 30 --checkpoint-every 1"
)
EVERY = 2**40  # "to the last call"


@dataclasses.dataclass(frozen=True)
class Faults:
    """What happens to the file-system calls below a folder, from one to another, counted from 1.

    Attributes:
      mode: of MODES.
      first, last: the calls it happens to.
      error: errno for "fail".
      begin: "start" counts from the process's start and below its workdir; "save" from the first save and below
        `checkpoints`.
    """

    mode: str = "count"
    first: int = 1
    last: int = EVERY
    error: int = 0
    begin: str = "save"


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL so many seconds after a phase was entered for the n-th time; None: after the start."""

    seconds: float
    phase: str | None = None
    occurrence: int = 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a child does.

    Attributes:
      job: "train", "evaluate", or "save": the state in the pickle `state`, once.
      workdir: of the run.
      log: its stdout and stderr go to this path with .out and .err behind it.
      flags: more flags of train.py or eval.py.
      digests: append each saved state's digest to this file.
    """

    job: str
    workdir: str
    log: str
    flags: tuple[str, ...] = ()
    state: str | None = None
    digests: str | None = None
    faults: Faults | None = None
    kill: Kill | None = None
    timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Result:
    """How a child ended.

    Attributes:
      code: exit code, or minus the signal's number.
      seconds: from the fork to its end.
      phases: (phase, seconds since the fork when it was entered), in order.
      hung: it was still there after the time limit.
      calls: names of the file-system calls that were counted, if it lived to tell.
    """

    code: int
    seconds: float
    phases: list[tuple[str, float]]
    hung: bool
    calls: list[str]
    stdout: str
    stderr: str

    @property
    def phase(self) -> str:
        """The last phase."""
        return self.phases[-1][0]

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL

    def durations(self) -> list[tuple[str, float]]:
        """Each phase and how long it took."""
        ends = [begin for _, begin in self.phases[1:]] + [self.seconds]
        return [(name, end - begin) for (name, begin), end in zip(self.phases, ends, strict=True)]


def unavailable() -> str | None:
    """Why there can be no `Server` here; None if there can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    return None if compiler() else "needs a C compiler"


def compiler() -> str | None:
    """A C compiler."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


class Server:
    """The fork server; a context manager."""

    def __init__(
        self, folder: pathlib.Path, cache: pathlib.Path | None = None, prefix: Sequence[str] = (), tiny: bool = False
    ) -> None:
        """Compiles the shim into `folder`, keeps logs there, and compiled programs in `cache`.

        `prefix` is put before the command that starts the process; `tiny` replaces AlexNetSmall by the tests' tiny
        network.
        """
        if reason := unavailable():
            raise RuntimeError(reason)
        self.folder = folder.resolve()
        self.cache = cache or self.folder / "cache"
        shim = self.folder / "faults.so"
        command = [str(compiler()), "-O1", "-shared", "-fPIC", "-o", str(shim), str(HERE / "faults.c"), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        preload = " ".join(filter(None, (str(shim), os.environ.get("LD_PRELOAD"))))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.log = (self.folder / "server.log").open("wb")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.stress.harness"],
            env=os.environ
            | {
                "LD_PRELOAD": preload,
                "FAULTS": str(shim),
                "PYTHONPATH": path,
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "OPENBLAS_NUM_THREADS": "1",
                "TINY": "1" if tiny else "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def run(self, job: str, workdir: pathlib.Path, **rest: Any) -> Result:
        """Runs one trial to its end; see `Trial`."""
        trial = Trial(job, str(workdir.resolve()), str(self.folder / "trial"), **rest)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(trial)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server has ended:\n" + (self.folder / "server.log").read_text())
        texts = (pathlib.Path(trial.log + end).read_text(errors="replace") for end in (".out", ".err"))
        reply = json.loads(line)
        reply["phases"] = [tuple(entry) for entry in reply["phases"]]
        return Result(**reply, **dict(zip(("stdout", "stderr"), texts, strict=True)))

    def close(self) -> None:
        """Ends the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def server(cache: pathlib.Path | None = None) -> Iterator[Server]:
    """A server with a temporary folder, which stays if something fails."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="alexnet_jax_stress_")).resolve()
    with Server(folder, cache) as running:
        yield running
    shutil.rmtree(folder)


def short(text: str) -> str:
    """A text on stderr in one line: what it begins and ends with."""
    lines = text.strip().splitlines()
    return repr(lines[0] if len(lines) == 1 else f"{lines[0]} .. {len(lines)} lines .. {lines[-1]}" if lines else "")


# What the tests look at in a run's folder.


def digest(tree: Any) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of nested dicts of arrays."""
    import jax

    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def saved_digest(workdir: pathlib.Path, step: int) -> dict[str, str]:
    """What a checkpoint restores to: digest of the state, and the memory."""
    from alexnet_jax.runs.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    tree, memory = checkpoints.restore_tree(step)
    checkpoints.close()
    return {"state": digest(tree), "memory": comparable_json(memory)}


def comparable_json(memory: Any) -> str:
    """JSON without what differs from run to run."""
    if isinstance(memory, dict):
        memory = {key: value for key, value in memory.items() if key != "images_per_second"}
    return json.dumps(memory, sort_keys=True)


def steps_there(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that a run's folder shows, rising."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def problems(workdir: pathlib.Path, steps: Sequence[int], digests: dict[int, dict[str, str]]) -> list[str]:
    """What is wrong with the checkpoints of these steps; `digests` says what they must restore to."""
    from alexnet_jax.errors import AlexNetError
    from alexnet_jax.runs.checkpoint import verify

    found = []
    for step in steps:
        try:
            verify(workdir / "checkpoints" / str(step), step)
            if step in digests and saved_digest(workdir, step) != digests[step]:
                found.append(f"checkpoint {step} restores to something else")
        except AlexNetError as error:
            found.append(f"checkpoint {step}: {error}")
    return found


def metrics_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without images_per_second; every line must be whole."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run saved under a step: digest of what it restores to, and the validation accuracy."""

    digest: dict[str, str]
    accuracy: float | None


def read_digests(path: pathlib.Path) -> dict[int, Saved]:
    """What a trial with `digests` has noted."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["step"]: Saved({"state": r["state"], "memory": r["memory"]}, r["accuracy"]) for r in lines}


def to_keep(steps: Sequence[int], saved: dict[int, Saved]) -> set[int]:
    """Which of these checkpoints must be there: the two newest and the best, the earliest of equals."""
    scores = [(accuracy, -step) for step in steps if (accuracy := saved[step].accuracy) is not None]
    return set(sorted(steps)[-2:]) | ({-max(scores)[1]} if scores else set())


def differences(whole: pathlib.Path, other: pathlib.Path) -> list[str]:
    """How a finished run differs from another."""
    found = []
    if missing := set(steps_there(whole)) - set(steps_there(other)):
        found.append(f"checkpoints {sorted(missing)} are not there")
    else:
        found += problems(other, steps_there(whole), {step: saved_digest(whole, step) for step in steps_there(whole)})
    if metrics_lines(whole) != metrics_lines(other):
        found.append("metrics.jsonl differs")
    ours, theirs = (sorted(p.name for p in (w / "plots").iterdir()) for w in (whole, other))
    if ours != theirs:
        found.append(f"plots {theirs} instead of {ours}")
    return found


# The server's process.


class _Phases:
    """Tells the server what the child is doing, by one byte for each change."""

    def __init__(self, pipe: int, first: str) -> None:
        self.pipe, self.now = pipe, first
        self.enter(first)

    def enter(self, phase: str) -> None:
        """Notes a change."""
        self.now = phase
        os.write(self.pipe, bytes([PHASES.index(phase)]))

    def wrap(self, owner: Any, name: str, phase: str, back: str | None = None) -> None:
        """Makes a function note `phase` while it runs, and then `back`, or what was noted before."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            before = self.now
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(back or before)

        setattr(owner, name, noting)


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Makes a function call `action` with its arguments first."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, both)


def _child(trial: dict[str, Any], pipe: int, shim: ctypes.CDLL) -> None:
    """Does what the trial says; ends by the end of the interpreter, as `train.py` does."""
    import train
    from alexnet_jax import plots
    from alexnet_jax.config import cli
    from alexnet_jax.runs import checkpoint
    from alexnet_jax.training import trainer
    from alexnet_jax.training.state import TrainState

    workdir, job, faults = pathlib.Path(trial["workdir"]), trial["job"], trial["faults"]
    first = "evaluation" if job == "evaluate" else "restart" if (workdir / "config.json").exists() else "first start"
    phases = _Phases(pipe, first)
    if job != "evaluate":
        phases.wrap(trainer.Trainer, "__init__", first, back="training")
        phases.wrap(trainer.Trainer, "validate", "validation")
        phases.wrap(plots, "training_curves", "finishing", back="finishing")
        phases.wrap(checkpoint.Checkpoints, "save", "saving")

    def arm(folder: pathlib.Path) -> None:
        arguments = MODES[faults["mode"]], faults["first"], faults["last"], faults["error"]
        shim.faults_arm(os.fsencode(folder), *arguments)

    armed = []

    def arm_once(*_: object) -> None:
        if not armed:
            armed.append(True)
            arm(workdir / "checkpoints")

    def note(_: object, state: Any, memory: Any, accuracy: float | None) -> None:
        import flax.serialization
        import jax

        tree = jax.device_get(flax.serialization.to_state_dict(state))
        line = {"step": int(state.step), "state": digest(tree), "memory": comparable_json(memory), "accuracy": accuracy}
        with open(trial["digests"], "a") as file:
            file.write(json.dumps(line) + "\n")

    if trial["digests"]:
        _before(checkpoint.Checkpoints, "save", note)
    if faults and faults["begin"] == "save":
        _before(checkpoint.Checkpoints, "save", arm_once)
    elif faults:
        arm(workdir)

    def save(_: Sequence[str]) -> None:
        tree, memory, accuracy = pickle.loads(pathlib.Path(trial["state"]).read_bytes())
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
        try:
            checkpoints.save(TrainState(**tree), memory, accuracy)
        finally:
            checkpoints.close()

    if job == "train":
        sys.argv = ["train.py", *RECIPE.split(), "--workdir", str(workdir), *trial["flags"]]
        cli.run(train.main)
    elif job == "evaluate":
        import eval as evaluation

        sys.argv = ["eval.py", str(workdir), *trial["flags"]]
        cli.run(evaluation.main)
    else:
        sys.argv = ["train.py"]
        cli.run(save)


def _supervise(trial: dict[str, Any], pid: int, pipe: int) -> dict[str, Any]:
    """Waits for a child, kills it when it is time."""
    begin = time.monotonic()
    phases: list[tuple[str, float]] = []
    kill, deadline, hung, open_pipe = trial["kill"], begin + trial["timeout"], False, True
    moment = begin + kill["seconds"] if kill and kill["phase"] is None else None
    while True:
        now = time.monotonic()
        if moment is not None and now >= moment:
            os.kill(pid, signal.SIGKILL)
            moment = None
        elif now >= deadline:
            hung = True
            os.kill(pid, signal.SIGKILL)
        # The pipe ends when the child does: the last thing that a process does is to close its files.
        ready, _, _ = select.select([pipe], [], [], max(0.0, min(moment or deadline, deadline) - now))
        if ready:
            data = os.read(pipe, 4096)
            now = time.monotonic()
            for number in data:
                phases.append((PHASES[number], now - begin))
                entered = [name for name, _ in phases].count(phases[-1][0])
                if kill and kill["phase"] == phases[-1][0] and kill["occurrence"] == entered:
                    moment = now + kill["seconds"]
            open_pipe = bool(data)
        if not open_pipe or hung:
            break
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - begin
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": seconds, "phases": phases or [("first start", 0.0)], "hung": hung}


def _serve() -> None:
    """Reads trials from stdin, answers with results on stdout."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in ("train", "eval", "matplotlib.pyplot", "orbax.checkpoint"):
        importlib.import_module(name)
    from alexnet_jax import data, plots
    from alexnet_jax.data import shapes
    from alexnet_jax.inspection import task
    from alexnet_jax.network import build
    from tests.tiny_runs import TINY_NETWORKS

    tiny = shapes.load(train=100, validation=30, test=70)
    data.load = task.load = lambda config: tiny
    if os.environ["TINY"]:
        build.NETWORKS = TINY_NETWORKS  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:  # fonts are read once
        plots.save(plots.portraits(tiny["train"].images[:4], ["a"] * 4), pathlib.Path(folder) / "portraits.png")
    shim = ctypes.CDLL(os.environ["FAULTS"])
    shim.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    shim.faults_calls.restype = ctypes.c_long
    shim.faults_name.restype = ctypes.c_char_p
    for line in requests:
        trial = json.loads(line)
        pipe_end, pipe = os.pipe()
        calls = pathlib.Path(trial["log"] + ".calls")
        calls.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            os.close(pipe_end)
            for end, number in ((".out", 1), (".err", 2)):
                os.dup2(os.open(trial["log"] + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            try:
                _child(trial, pipe, shim)
            finally:
                names = [shim.faults_name(n).decode() for n in range(1, shim.faults_calls() + 1)]
                calls.write_text(json.dumps(names))
            return
        os.close(pipe)
        reply = _supervise(trial, pid, pipe_end)
        os.close(pipe_end)
        reply["calls"] = json.loads(calls.read_text()) if calls.exists() else []
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
