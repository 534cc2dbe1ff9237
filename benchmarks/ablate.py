"""Trains with one thing changed at a time: `python benchmarks/ablate.py STUDY`; see `--help`.

A row of a study is a few runs that differ only in the seed. On a CPU, a run is `train.py` and `eval.py` in separate
processes, one per core: the printed commands are those that were run. On an accelerator, this process does the same one
run after another.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import ablation_report
import jax
import run
import tqdm
import tyro
from studies import STUDIES, Study, Variant

from alexnet_jax import data, runtime
from alexnet_jax.config import cli
from alexnet_jax.config.config_json import to_json
from alexnet_jax.config.types import Path, PositiveInt
from alexnet_jax.data.batches import steps_per_epoch
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, shown
from alexnet_jax.files import locked, write_atomically
from alexnet_jax.inspection.evaluate import evaluate
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.runs.log import Record, read_jsonl
from alexnet_jax.signals import handled
from alexnet_jax.training.loop import train_and_evaluate

ROOT = pathlib.Path(__file__).parent.parent
Row = dict[str, Any]
Finished = tuple[Variant, int, Row, pathlib.Path | None]  # row, seed, results, the run's folder
Runner = Callable[[Sequence[tuple[Variant, int]]], Generator[Finished, None, None]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Train with one thing changed at a time, with several seeds, and measure the effect of each change.

    Finished runs are kept in a file, one line each; repeating the command does the missing runs.
    """

    study: tyro.conf.Positional[
        Literal["tips", "relu", "rates", "normalization", "lrn", "time", "options", "search", "longer", "best", "post"]
    ]
    """`tips`: the paper's techniques, one removed at a time. `relu`: ReLU and tanh (figure 1); `rates`: their rates.
    `normalization`: section 3.3; `lrn`: on grey levels 0..255. `time`: how long it takes to reach an accuracy.
    `options`: what each option adds to cifar10-best as it was before its search; `search`: that search; `longer`:
    its best row in twice the epochs. `best`: the most accurate presets. `post`: the original post's program."""
    seeds: PositiveInt = 3
    """Runs of each row: seeds 0, 1, ..."""
    rows: tuple[str, ...] = ()
    """Only these rows (and the first); unset: all."""
    epochs: PositiveInt | None = None
    """Epochs of every run, instead of the study's; the results go to a separate file."""
    data_dir: Path | None = None
    """Folder with CIFAR-10, as for train.py."""
    jobs: PositiveInt | None = None
    """Number of runs at the same time on a CPU, at most one per core, which is the default; on an accelerator, runs
    follow each other."""
    out: Path | None = None
    """File of finished runs; the plot is written beside it. Unset: results/ablation-STUDY-cpu.jsonl in the repository
    (-gpu on a GPU, STUDY-N-epochs with --epochs)."""
    runs: Path | None = None
    """Folder for unfinished runs; a run's folder is removed once its line is written. Unset: the repository's
    runs/ablate."""
    table: bool = False
    """Train nothing: print and plot the finished runs."""


def arguments(study: Study, variant: Variant, seed: int, epochs: int | None = None) -> tuple[str, ...]:
    """What follows `python train.py` to give a run."""
    longer = () if epochs is None else ("--epochs", str(epochs))
    return (study.preset, *study.flags, *variant.flags, *longer, "--seed", str(seed))


def settings(args: Sequence[str]) -> Row:
    """Every setting of a run, except those that say where it runs, as read back from JSON."""
    found = json.loads(json.dumps(to_json(cli.parse_train(args))))
    return {name: value for name, value in found.items() if name not in ("data_dir", "workdir")}


def read_rows(path: pathlib.Path) -> list[Row]:
    """The finished runs in a file, without an incomplete last line (of a killed process); none if the file is missing.

    Raises:
      AlexNetError: it can't be read, or another line is not a run.
    """
    try:
        *lines, _ = path.read_text().split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise AlexNetError(f"{path}: can't be read ({shown(str(error))})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError) as error:
            raise AlexNetError(f"{path}: line {number} is not a finished run: remove it") from error
    return rows


FIELDS = (
    "variant", "seed", "command", "settings", "test", "curve", "data", "side_by_side", "device", "versions", "date",
)  # fmt: skip

# Settings that train.py had when runs were recorded, each with the value that all runs have now.
REMOVED = {"conv1_init": "he"}


class Ablation:
    """A study in progress."""

    def __init__(self, options: Options) -> None:
        self.options, self.study = options, STUDIES[options.study]
        # Absolute, because the scripts run in the repository's folder.
        self.runs = (options.runs or ROOT / "runs" / "ablate").absolute()
        self.data_dir = options.data_dir and options.data_dir.absolute()
        names = [variant.name for variant in self.study.variants]
        if unknown := [name for name in options.rows if name not in names]:
            raise UsageError(f"--rows '{shown(unknown[0])}': the rows of {options.study} are {', '.join(names)}")
        if options.epochs and any("--epochs" in variant.flags for variant in self.study.variants):
            raise UsageError(f"--epochs {options.epochs}: the rows of {options.study} have their own")
        self.variants = [
            v for i, v in enumerate(self.study.variants) if not options.rows or i == 0 or v.name in options.rows
        ]
        runtime.devices()  # raises if it is missing
        self.platform = jax.default_backend()
        name = options.study + (f"-{options.epochs}-epochs" if options.epochs else "")
        self.out = options.out or ROOT / "results" / f"ablation-{name}-{self.platform}.jsonl"
        self.rows = read_rows(self.out)

    def arguments(self, variant: Variant, seed: int) -> tuple[str, ...]:
        """What follows `python train.py` to give a run."""
        return arguments(self.study, variant, seed, self.options.epochs)

    def valid_rows(self) -> list[Row]:
        """The finished runs that match the study as it is now: a preset may have changed since."""
        variants = {variant.name: variant for variant in self.study.variants}
        found = []
        for row in self.rows:
            if row["variant"] in variants:
                wanted = REMOVED | settings(self.arguments(variants[row["variant"]], row["seed"]))
                # Settings that were added later have the value that the run used implicitly.
                if all(wanted.get(name) == value for name, value in row["settings"].items()):
                    found.append(row)
        return found

    def missing(self) -> list[tuple[Variant, int]]:
        """The missing runs, all rows of one seed before the next: a study stopped early can be compared."""
        done = {(row["variant"], row["seed"]) for row in self.valid_rows()}
        todo = [(variant, seed) for seed in range(self.options.seeds) for variant in self.variants]
        return [(variant, seed) for variant, seed in todo if (variant.name, seed) not in done]

    def run(self, runner: Runner | None = None, only: tuple[Variant, int] | None = None) -> None:
        """Runs what is missing.

        Args:
          runner: does the runs; None: `on_cores` on a CPU, `in_this_process` elsewhere.
          only: row and seed of the one run to do, unless it has been done.

        Raises:
          AlexNetError: a run failed; runs beside it are ended, earlier ones are kept.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(locked(self.out.with_suffix(".lock"), f"is writing {self.out.name}; wait for it")):
            self.rows = read_rows(self.out)
            write_atomically(self.out, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
            todo = [one for one in self.missing() if only in (None, one)]
            finished = (runner or (self.on_cores if self.platform == "cpu" else self.in_this_process))(todo)
            about = {"device": run.describe_device(), "versions": run.versions()}
            bar = tqdm.tqdm(total=len(todo), unit=" runs", dynamic_ncols=True, disable=only is not None)
            with contextlib.closing(finished), bar, self.out.open("a") as file:
                for variant, seed, outcome, folder in finished:
                    args = self.arguments(variant, seed)
                    row = {
                        "variant": variant.name,
                        "seed": seed,
                        "command": "python train.py " + shlex.join(args),
                        "settings": settings(args),
                        **outcome,
                        **about,
                        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    }
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    self.rows.append(row)
                    if folder:
                        shutil.rmtree(folder)
                    bar.update()
                    accuracy = outcome["test"][str(self.study.views[0])]["accuracy"]
                    bar.write(f"{variant.name}, seed {seed}: {accuracy:.2%}")

    def on_cores(self, todo: Sequence[tuple[Variant, int]]) -> Generator[Finished, None, None]:
        """Runs scripts, each on its own core if the system can bind a process to a core."""
        bindable = hasattr(os, "sched_setaffinity")
        cores = sorted(os.sched_getaffinity(0)) if bindable else list(range(runtime.available_cores()))
        jobs = min(self.options.jobs or len(cores), len(cores))
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in cores[:jobs]:
            free.put(core)
        scripts = Scripts()

        def bind() -> None:
            if bindable and jobs > 1:
                os.sched_setaffinity(0, {free.get()})  # of this thread, and so of all processes that it starts

        def one(variant: Variant, seed: int) -> Finished:
            outcome, folder = self.by_scripts(scripts.run, variant, seed)
            return variant, seed, outcome | {"side_by_side": jobs}, folder

        with raised_signals(), concurrent.futures.ThreadPoolExecutor(jobs, initializer=bind) as pool:
            try:
                for future in concurrent.futures.as_completed([pool.submit(one, *item) for item in todo]):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                scripts.end()
                raise

    def in_this_process(self, todo: Sequence[tuple[Variant, int]]) -> Generator[Finished, None, None]:
        """Runs one after another, without a process that could outlive this one."""
        for variant, seed in todo:
            outcome, folder = self.by_scripts(run_here, variant, seed)
            yield variant, seed, outcome | {"side_by_side": 1}, folder

    def folder(self, variant: Variant, seed: int) -> RunFolder:
        """The folder of an unfinished run."""
        name = hashlib.sha256(shlex.join(self.arguments(variant, seed)).encode()).hexdigest()[:12]
        return RunFolder(self.runs / f"{self.options.study}-{name}")

    def by_scripts(self, script: Callable[..., None], variant: Variant, seed: int) -> tuple[Row, pathlib.Path]:
        """Trains and evaluates one run; returns its row and its folder.

        `script(name, *flags)` does what `python name flags` does, for train.py and eval.py.
        """
        folder = self.folder(variant, seed)
        where = [] if self.data_dir is None else ["--data-dir", str(self.data_dir)]
        script("train.py", *self.arguments(variant, seed), "--workdir", str(folder.path), *where)
        test = {}
        for views in self.study.views:
            script("eval.py", str(folder.path), "--views", str(views))
            result = json.loads((folder.eval / "test.json").read_text())
            test[str(views)] = {key: result[key] for key in ("accuracy", "loss", "count")}
        info = folder.read_dataset()
        batch_size = folder.read_config().schedule.batch_size
        curve = epoch_curve(read_jsonl(folder.metrics), info.counts["train"], batch_size)
        data = {"source": info.name, "fingerprint": info.fingerprint[:16]}
        return {"test": test, "curve": curve, "data": data}, folder.path


def epoch_curve(records: Iterable[Record], examples: int, batch_size: int) -> list[dict[str, Any]]:
    """A run's epochs from its records of intervals.

    Args:
      records: all lines of a run's metrics.jsonl.
      examples: training images.
      batch_size: batch size of the run.

    Returns:
      For each epoch: `loss` (mean training loss, nats) and `accuracy` over its updates, `seconds` of training, without
        evaluation and saving, and `validation_accuracy` after it, None without validation.
    """
    per_epoch = steps_per_epoch(examples, batch_size)

    def seen(step: int) -> int:
        epochs, batch = divmod(step, per_epoch)
        return epochs * examples + min(batch * batch_size, examples)

    epochs: dict[int, dict[str, Any]] = {}
    before = 0
    for record in records:
        epoch = epochs.setdefault(
            record["epoch"], {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0, "validation_accuracy": None}
        )
        if record["split"] == "validation":
            epoch["validation_accuracy"] = record["accuracy"]
            continue
        count, before = seen(record["step"]) - before, seen(record["step"])
        epoch["loss"] += record["loss"] * count / examples
        epoch["accuracy"] += record["accuracy"] * count / examples
        epoch["seconds"] += count / record["images_per_second"]
    return [epochs[epoch] for epoch in sorted(epochs)]


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Inside its `with` block, SIGINT, SIGTERM and SIGHUP raise StoppedError in the main thread."""

    def stop(number: int, frame: types.FrameType | None) -> NoReturn:
        raise StoppedError(number, "finished runs are kept; the same command resumes")

    before = {number: signal.signal(number, stop) for number in handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_here(script: str, *args: str) -> None:
    """Does in this process what `python train.py` or `python eval.py` does with these arguments."""
    if script == "eval.py":
        evaluate(cli.parse_eval(args))
    else:
        config = cli.parse_train(args)
        select_devices(config.run.num_devices, config.run.deterministic)
        train_and_evaluate(config, data.load(config.data))


class Scripts:
    """Runs this repository's scripts in separate processes, and can end running ones."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, *args: str) -> None:
        """Waits for the end of a script.

        Raises:
          AlexNetError: it failed; the message is its last line.
        """
        with self._lock:
            if self._ended:
                raise AlexNetError("ended")
            process = subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                # A terminal's Ctrl-C must not reach it in addition to our own signal, because a second signal makes it
                # exit without saving.
                start_new_session=True,
            )
            self._running.add(process)
        _, complaint = process.communicate()
        self._running.discard(process)
        if process.returncode:
            raise AlexNetError(f"python {shlex.join(args)}: {(complaint.strip().splitlines() or ['no reason'])[-1]}")

    def end(self) -> None:
        """Makes running scripts save and stop."""
        with self._lock:
            self._ended = True
            for process in list(self._running):
                process.terminate()


def main(args: Sequence[str]) -> None:
    """Parses the flags, does the missing runs, prints the tables, draws the plot."""
    options = cli.parse(Options, args, "ablate.py")
    ablation = Ablation(options)
    if not options.table:
        ablation.run()
    rows = ablation.valid_rows()
    if not rows:
        raise AlexNetError(f"{ablation.out}: no finished run of this study")
    print(ablation_report.tables(ablation.study, rows))
    picture = ablation.out.with_suffix(".png")
    if ablation_report.draw(ablation.study, rows, picture):
        print(f"\nPicture: {picture}")


if __name__ == "__main__":
    cli.run(main)
