"""Measures AlexNetSmall here, in PyTorch and in TensorFlow: `python benchmarks/run.py`; see `--help`.

The machine's speed changes from minute to minute. Therefore programs take turns, A B C A B C, and are compared within a
round; each has the machine to itself while its block runs.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, Self

import numpy as np
import report
from programs import BATCHES, OPERATIONS, PRODUCT_SIDES, Spec

from alexnet_jax import plots
from alexnet_jax.config import cli
from alexnet_jax.config.settings import DataConfig
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.data import load
from alexnet_jax.data.dataset import ArrayDataset
from alexnet_jax.errors import AlexNetError
from alexnet_jax.runs.log import read_jsonl
from alexnet_jax.runtime import available_cores

ROOT = pathlib.Path(__file__).parent.parent
PEERS = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
PACKAGES = ("alexnet-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision", "tensorflow")
BATCH_SIZES, DEVICES = (32, 64, 128, 256, 512), (1, 2, 4, 8)
IMAGENET_BATCH_SIZES = {"cpu": (32,), "gpu": (256, 512, 1024, 2048)}
CALLS_PER_STEP = 4  # an operation takes much less time than a training step: its blocks have more calls
REPEATS = 3  # of `start` and `epoch`
INTERVALS = 6  # lines of the log that `epoch` waits for; the first includes compilation and is left out
Section = Literal["train", "operations", "start", "epoch", "scaling", "imagenet", "forward", "tuning"]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure AlexNetSmall here, in PyTorch and in TensorFlow, side by side, as far as they are installed."""

    sections: tuple[Section, ...] = (
        *("train", "operations", "start", "epoch", "scaling"),
        *("imagenet", "forward", "tuning"),
    )
    """`train`: the same training step in all programs. `operations`: LRN, max pooling, PCA noise. `start`: from the
    command to the first step. `epoch`: the whole loop against the bare step. `scaling`: batch sizes and devices.
    `imagenet`: torchvision's AlexNet, here and in PyTorch, and how close it comes to the device's speed. `forward`:
    its predictions. `tuning`: its training with convolutions that are not trained."""
    data_dir: pathlib.Path | None = None
    """Folder with CIFAR-10, as for train.py. Unset: synthetic shapes."""
    rounds: PositiveInt = 7
    """Blocks of each program."""
    steps: PositiveInt | None = None
    """Training steps in a block. Unset: 15 on a CPU, 250 elsewhere."""
    batch_size: PositiveInt = 128
    """Images per step, in `train` and `epoch`."""
    out: pathlib.Path | None = None
    """JSON file to write; the plot is written beside it. Unset: the repository's results/benchmark-cpu.json (or
    -gpu)."""
    quick: bool = False
    """2 rounds of 3 steps, to check that everything runs."""
    table: pathlib.Path | None = None
    """Measure nothing: print the tables of this JSON file."""


class WorkerError(Exception):
    """A program that can't be built or has died; the message is one line."""


class Worker:
    """A program in its own process (worker.py): ready when it is made, ended by `close`."""

    def __init__(self, spec: Spec, log: IO[bytes]) -> None:
        self.spec = spec
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), json.dumps(dataclasses.asdict(spec))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=worker_environment(spec)
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, program: str, steps: int) -> Record:
        """Runs one block.

        Raises:
          WorkerError: the program failed, or its process has died.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the rest of its output says why
            print(json.dumps({"program": program, "steps": steps}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Record:
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process died, exit code {self._process.wait()}"}
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


def package_environment() -> dict[str, str]:
    """The environment of a process that imports this checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def worker_environment(spec: Spec) -> dict[str, str]:
    """A worker's environment: it measures this checkout, shares the GPU, and reuses nothing compiled earlier."""
    environment = package_environment() | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if spec.platform == "cpu" else {})


def installed(framework: str) -> bool:
    """Whether a peer can be imported here."""
    return importlib.util.find_spec(framework) is not None


def label(spec: Spec) -> str:
    """A program's name in tables."""
    return f"{PEERS.get(spec.framework, 'alexnet_jax')} {spec.variant}".strip()


def training_specs(spec: Spec) -> list[Spec]:
    """Every training program, ours first; `spec` gives platform, batch size and data."""
    # On a CPU without instructions for bfloat16, a block took minutes.
    dtypes = ("float32", "bfloat16") if spec.platform != "cpu" or "bf16" in cpuinfo() else ("float32",)
    modes = ["eager", "compile"]
    if spec.platform == "gpu":
        modes += ["compile reduce-overhead", "compile max-autotune"]
    return [
        *(dataclasses.replace(spec, dtype=dtype) for dtype in dtypes),
        *(
            dataclasses.replace(spec, framework="torch", variant=mode, dtype=dtype)
            for dtype in dtypes
            for mode in modes
        ),
        *(
            dataclasses.replace(spec, framework="tensorflow", variant=variant)
            for variant in ("graph", "function", "function, XLA")
        ),
    ]


def operation_specs(spec: Spec) -> list[Spec]:
    """Every worker that has the operations, ours first."""
    variants = [("torch", "eager"), ("torch", "compile"), ("tensorflow", "function"), ("tensorflow", "function, XLA")]
    spec = dataclasses.replace(spec, task="operations")
    return [
        spec,
        *(dataclasses.replace(spec, framework=framework, variant=variant) for framework, variant in variants),
    ]


class Benchmark:
    """A session of measurements: the device, the settings and the results so far.

    Attributes:
      results: the contents of the JSON file except the summary.
    """

    def __init__(self, options: Options, folder: pathlib.Path) -> None:
        self.options, self.folder = options, folder
        self.peers = [framework for framework in PEERS if installed(framework)]
        device = describe_device()
        steps = options.steps or (15 if device["platform"] == "cpu" else 250)
        self.rounds, self.steps = (2, 3) if options.quick else (options.rounds, steps)
        self.results: Record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device,
            "system": platform.platform(),
            "versions": versions(),
            "settings": {
                "rounds": self.rounds,
                "steps": self.steps,
                "batch_size": options.batch_size,
                "data": "shapes" if options.data_dir is None else "cifar10",
            },
            "left_out": [],
        }
        self.spec = Spec("jax", device["platform"], batch_size=options.batch_size, data=str(folder / "data.npz"))
        for framework, name in PEERS.items():
            if framework not in self.peers:
                self.leave_out(f"{name}: not installed")

    def train(self) -> list[Record]:
        """The same training step in every program."""
        self._save_data()
        with self._workers(training_specs(self.spec)) as workers:
            return self._measure(workers, "train", self.steps)

    def operations(self) -> dict[str, list[Record]]:
        """Every operation in every framework."""
        with self._workers(operation_specs(self.spec)) as workers:
            return {name: self._measure(workers, name, CALLS_PER_STEP * self.steps) for name in OPERATIONS}

    def start(self) -> list[Record]:
        """Seconds from the command to the first step's record, without compiled programs on disk, then with them."""
        pairs = []
        for repeat in range(self._repeats()):
            cache = self.folder / f"cache{repeat}"
            pair = {}
            for state in ("empty", "filled"):
                args = ["quickstart", "--log-every", "1"]
                pair[state], _ = self._train_until(1, args, {"JAX_COMPILATION_CACHE_DIR": str(cache)})
                progress(f"start, {state} cache: {pair[state]:.1f} s")
            pairs.append(pair)
        return pairs

    def epoch(self) -> list[Record]:
        """Pairs of a block of bare steps, and images/s of the whole loop's intervals after the first."""
        self._save_data()
        options = self.options
        data = ["--dataset", "shapes"] if options.data_dir is None else ["--data-dir", str(options.data_dir.resolve())]
        every = self.steps if options.quick else 50
        sizes = ["--batch-size", str(options.batch_size), "--log-every", str(every), "--num-devices", "1"]
        pairs = []
        with self._workers([self.spec]) as workers:
            for _ in range(self._repeats()) if workers else ():
                (bare,) = self._measure(workers, "train", every, rounds=1)
                _, records = self._train_until(INTERVALS, ["cifar10", *data, *sizes], {})
                loop = [record["images_per_second"] for record in records[1:INTERVALS]]
                pairs.append({"bare": bare, "loop": loop})
                progress(f"epoch: {np.median(loop):.0f} images/s")
        return pairs

    def scaling(self) -> list[Record]:
        """Our training step at several batch sizes, and spread over several devices."""
        self._save_data()
        device = self.results["device"]
        devices = [n for n in DEVICES[1:] if device["platform"] == "cpu" or n <= device["count"]]
        specs = [dataclasses.replace(self.spec, batch_size=size) for size in BATCH_SIZES]
        specs += [dataclasses.replace(self.spec, batch_size=128, devices=n) for n in devices]
        with self._workers(specs) as workers:
            return self._measure(workers, "train", self.steps)

    def tuning(self) -> Record:
        """As `imagenet`, with convolutions that are not trained."""
        return self.imagenet(frozen=True)

    def forward(self) -> Record:
        """As `imagenet`, but predictions."""
        return self.imagenet(task="predict")

    def imagenet(self, frozen: bool = False, task: str = "train") -> Record:
        """The training step of torchvision's AlexNet here and in PyTorch, and bare matrix products."""
        platform, steps = self.spec.platform, max(3, self.steps // 5)
        dtypes = ("float32",) if platform == "cpu" else ("float32", "bfloat16")
        spec = dataclasses.replace(self.spec, network="torchvision", task=task, frozen=frozen)
        ours = [dataclasses.replace(spec, dtype=dtype) for dtype in dtypes]
        with self._workers([dataclasses.replace(spec, task="product") for spec in ours]) as workers:
            products = self._measure(workers, "product", 20)
        programs = []
        for size in IMAGENET_BATCH_SIZES[platform]:
            specs = [dataclasses.replace(spec, batch_size=size) for spec in ours]
            modes = ("eager", "compile", *(["compile max-autotune"] if platform == "gpu" else []))
            specs += [dataclasses.replace(spec, framework="torch", variant=mode) for spec in specs for mode in modes]
            with self._workers(specs) as workers:
                programs += self._measure(workers, task, steps)
        measured = {"product_side": PRODUCT_SIDES[platform], "products": products, "programs": programs}
        return measured | {"frozen": frozen, "task": task}

    def leave_out(self, line: str) -> None:
        """Prints and records what isn't measured, and why."""
        progress(f"skip {line}")
        self.results["left_out"].append(line)

    def _repeats(self) -> int:
        return min(REPEATS, self.rounds)

    def _save_data(self) -> None:
        """Writes the training images to a file for the workers, which need not know how to load a data set."""
        if pathlib.Path(self.spec.data).exists():
            return
        options = self.options
        config = DataConfig("shapes") if options.data_dir is None else DataConfig(data_dir=options.data_dir)
        dataset = load(config)
        assert isinstance(dataset, ArrayDataset)  # in memory
        train = dataset["train"]
        count = BATCHES * max(*BATCH_SIZES, options.batch_size)
        np.savez(self.spec.data, images=train.images[:count], labels=train.labels[:count])

    @contextlib.contextmanager
    def _workers(self, specs: Sequence[Spec]) -> Iterator[list[Worker]]:
        """Builds workers one after the other, and leaves out those that fail."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.folder / "workers.log").open("ab"))
            workers = []
            for spec in specs:
                if spec.framework in PEERS and spec.framework not in self.peers:
                    continue
                try:
                    workers.append(stack.enter_context(Worker(spec, log)))
                except WorkerError as error:
                    self.leave_out(f"{describe(spec)}: {error}")
                else:
                    progress(f"{describe(spec)}: ready after {workers[-1].ready['build_seconds']:.1f} s")
            yield workers

    def _measure(self, workers: list[Worker], program: str, steps: int, rounds: int = 0) -> list[Record]:
        """Runs blocks of `steps` in turn; a worker that fails is left out from then on."""
        seconds: dict[Worker, list[float]] = {worker: [] for worker in workers}
        last: dict[Worker, Record] = {}
        for number in range(rounds or self.rounds):
            for worker in list(seconds):
                try:
                    last[worker] = worker.run(program, steps)
                    seconds[worker].append(last[worker]["seconds"])
                except WorkerError as error:
                    self.leave_out(f"{describe(worker.spec)}: {error}")
                    workers.remove(worker)
                    del seconds[worker]
            progress(f"{program}: round {number + 1} of {rounds or self.rounds}")
        return [
            {
                "program": label(worker.spec),
                **{key: getattr(worker.spec, key) for key in ("framework", "dtype", "batch_size", "devices")},
                **worker.ready,
                **{key: last[worker][key] for key in ("peak_bytes", "device_peak_bytes")},
                "steps": steps,
                "seconds": blocks,
            }
            for worker, blocks in seconds.items()
        ]

    def _train_until(self, count: int, args: Sequence[str], environment: Record) -> tuple[float, list[Record]]:
        """Runs train.py until its log has the given number of training records, and kills it.

        Python may write byte code, as on a user's machine: without it, an import compiles every module again.

        Returns:
          Seconds from the process's start, and the records.

        Raises:
          AlexNetError: it ended earlier.
        """
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with tempfile.TemporaryDirectory(dir=self.folder) as workdir, tempfile.TemporaryFile() as log:
            command = [sys.executable, str(ROOT / "train.py"), *args, "--workdir", workdir]
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=inherited | environment) as process:
                try:
                    while True:
                        records = [dict(r) for r in read_jsonl(pathlib.Path(workdir, "metrics.jsonl"))]
                        records = [record for record in records if record["split"] == "train"]
                        if len(records) >= count:
                            return time.perf_counter() - start, records
                        if process.poll() is not None:
                            log.seek(0)
                            lines = log.read().decode(errors="replace").split("\n")
                            raise AlexNetError(f"train.py {' '.join(args)} ended early: {' '.join(lines[-2:])}")
                        time.sleep(0.02)
                finally:
                    process.kill()


def describe(spec: Spec) -> str:
    """A program in a line of progress."""
    task = f"{spec.dtype}, batch {spec.batch_size}" if spec.task == "train" else spec.task
    return f"{label(spec)}, {task}" + (f", {spec.devices} devices" if spec.devices > 1 else "")


def progress(line: str) -> None:
    """Prints the progress of the work."""
    print(line, file=sys.stderr, flush=True)


def describe_device() -> Record:
    """The device that JAX uses, determined in another process: one that holds a GPU would disturb measurements.

    Raises:
      AlexNetError: JAX can't use the devices that JAX_PLATFORMS names.
    """
    code = (
        "from alexnet_jax import runtime\n"
        "from alexnet_jax.config import cli\n"
        "def main(args):\n"
        "    devices = runtime.devices()\n"
        "    print(devices[0].platform, len(devices), devices[0].device_kind, sep='\\n')\n"
        "cli.run(main)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=package_environment())
    if process.returncode:
        raise AlexNetError((process.stderr.strip().splitlines() or ["JAX finds no device"])[-1].removeprefix("-c: "))
    backend, count, name = process.stdout.splitlines()[-3:]
    if backend == "cpu":
        models = (line.split(":", 1)[1].strip() for line in cpuinfo().splitlines() if "model name" in line)
        name = next(models, name)
    return {"platform": backend, "name": name, "count": int(count), "cores": available_cores()}


def cpuinfo() -> str:
    """What Linux tells about the processor; elsewhere nothing."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main(args: Sequence[str]) -> None:
    """Parses the flags, measures, prints the tables, writes the JSON file and the plot."""
    options = cli.parse(Options, args, "run.py")
    if options.table:
        print(report.tables(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory(prefix="alexnet_jax_benchmark_") as folder:
        benchmark = Benchmark(options, pathlib.Path(folder))
        results = benchmark.results
        out = options.out or ROOT / "results" / f"benchmark-{results['device']['platform']}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        for section in options.sections:
            results[section] = getattr(benchmark, section)()
            results["summary"] = report.summarize(results)
            out.write_text(json.dumps(results, indent=1) + "\n")
    if figure := report.figure(results):
        plots.save(figure, out.with_suffix(".png"))
    print(report.tables(results))
    progress(f"written: {out}")


if __name__ == "__main__":
    cli.run(main)
