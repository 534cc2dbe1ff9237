"""What only a GPU can tell: `python -m tests.gpu`, one command for whoever has one.

It compares a GPU with the CPU of the same machine, from the same state: train steps, resumption, `--deterministic`,
evaluation, export, LRN and pooling. Then it runs `benchmarks/run.py` and, with --data-dir, trains `cifar10-best` to
64.36% ten times. Everything goes into results/gpu-check.json. `--against cpu` compares the CPU with itself, to try the
command where there is no GPU.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alexnet_jax
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config.flags import replace
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.data import load, shapes
from alexnet_jax.data.batches import batches
from alexnet_jax.data.dataset import ArrayDataset, Examples, Split
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.exchange import export
from alexnet_jax.network import build
from alexnet_jax.network.layers import max_pool
from alexnet_jax.network.lrn import local_response_norm, local_response_norm_by_the_book
from alexnet_jax.runs.folder import versions
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step
from alexnet_jax.training.trainer import build_step

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 5

# Largest relative deviation, see `deviation`, of parameters' changes after `STEPS` steps.
BOUNDS = {"float32": 3e-3, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every check gets: the two devices, a temporary folder, and the command's flags."""

    gpu: jax.Device
    cpu: jax.Device
    folder: pathlib.Path
    quick: bool
    data_dir: str | None
    seeds: int


Figures = dict[str, Any]


def deviation(one: Any, other: Any) -> float:
    """The norm of the difference of two trees, relative to that of the first."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    difference = sum(np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2) for x, y in pairs)
    return float(np.sqrt(difference / sum(np.sum(np.asarray(x, np.float64) ** 2) for x, _ in pairs)))


def steps_on(device: jax.Device, preset: str, dtype: str, steps_per_call: int, **settings: Any) -> tuple[Any, float]:
    """How `STEPS` steps of gradient descent change the parameters, and the mean loss of the last one.

    Batches of 8 images, enlarged for the networks for ImageNet, with all augmentation that the preset switches on.
    """
    config = replace(PRESETS[preset].config, dtype=dtype, matmul_precision="highest", convolution="direct", **settings)
    split = shapes.load(train=40, validation=0, test=0)["train"]
    if side := build.input_size(config.network):
        images = np.asarray(jax.image.resize(split.images, (40, side, side, 3), "nearest"))
        split = Split(images, split.labels)
        config = replace(config, crop_size=None)
    preprocessing = Preprocessing(config.augmentation, Statistics.of(split.images), 5)
    model = build.from_config(config.network, 10)
    rule = optax.sgd(1e-4)  # Adam would turn the rounding of gradients near zero into steps of full length
    step = build_step(config, model, rule, preprocessing, [device])
    program = compile_train_step(step, [device], ArrayDataset.fetch, dtype=dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        state = create_state(model, rule, preprocessing.input_shape(split.images.shape[1:]), jax.random.key(0))
        key = jax.random.key(1)
    before = jax.device_get(state.params)
    state, key, resident = replicate((state, key, Examples(split.images, split.labels)), [device])
    layout = batches(np.arange(len(split)), 8, 1)
    loss = 0.0
    for first in range(0, STEPS, steps_per_call):
        state, metrics = program(state, resident, layout.part(first, steps_per_call), key)
        loss = float(metrics.loss[-1]) / 8
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, jax.device_get(state.params), before), loss


def check_steps(setup: Setup) -> Figures:
    """Train steps of five networks."""
    figures = {}
    cases = [
        *(("cifar10", dtype, calls) for dtype in ("float32", "bfloat16") for calls in (1, STEPS)),
        ("cifar10-best", "float32", 1),
        ("cifar10-18pct", "float32", 1),
        ("cifar10-11pct", "float32", 1),
        ("imagenet-paper", "float32", 1),
        ("imagenet-paper", "bfloat16", 1),
    ]
    for preset, dtype, calls in cases:
        (here, loss), (there, other) = (steps_on(device, preset, dtype, calls) for device in (setup.cpu, setup.gpu))
        found = deviation(here, there)
        name = f"{preset}, {dtype}, {calls} steps a call"
        figures[name] = {"deviation": found, "loss": [loss, other]}
        assert found < BOUNDS[dtype], f"{name}: parameters deviate by {found:.2g}"
    return figures


def check_operations(setup: Setup) -> Figures:
    """LRN against the formula in float64, pooling exactly, and the gradients of both against the CPU's."""
    random = np.random.default_rng(0)
    figures = {}
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        x = np.asarray(jnp.asarray(random.normal(0, 30, (4, 13, 13, 96)), dtype))
        by_the_book = local_response_norm_by_the_book(x.astype(np.float64), 5, 1e-4, 0.75, 2.0, False)
        with jax.default_device(setup.gpu):
            found = deviation(by_the_book, jax.jit(local_response_norm)(x))
        figures[f"LRN, {dtype.__name__}"] = found
        assert found < bound, f"LRN deviates by {found:.2g}"
        for name, function in (("LRN", local_response_norm), ("pooling", functools.partial(max_pool, padding="VALID"))):
            here, there = (value_and_gradient(function, x, device) for device in (setup.cpu, setup.gpu))
            found = max(deviation(one, other) for one, other in zip(here, there, strict=True))
            figures[f"{name} with gradient, {dtype.__name__}"] = found
            assert found < bound, f"{name} with gradient deviates by {found:.2g}"
        ties = np.asarray(jnp.asarray(random.integers(0, 4, x.shape), dtype))
        here, there = (value_and_gradient(max_pool, ties, device) for device in (setup.cpu, setup.gpu))
        assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True)), "pooling: ties differ"
    return figures


def value_and_gradient(
    function: Callable[[jax.Array], jax.Array], x: np.ndarray, device: jax.Device
) -> list[np.ndarray]:
    """The result, and the gradient of the sum of its products with small whole numbers, as float32."""

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(function, x)
        return y, vjp((jnp.arange(y.size).reshape(y.shape) % 7).astype(y.dtype))[0]

    return [np.asarray(array, np.float32) for array in both(jax.device_put(x, device))]


def train(folder: pathlib.Path, *flags: str) -> alexnet_jax.Run:
    """`python train.py quickstart --deterministic` with further flags, on one device; returns the run."""
    run_script("train.py", "quickstart", "--workdir", str(folder), "--deterministic", "--num-devices", "1", *flags)
    return alexnet_jax.open_run(folder)


def run_script(*command: str) -> str:
    """Runs a script of the repository; returns what it prints."""
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, f"python {' '.join(command)}: {ended.stderr[-2000:]}"
    return ended.stdout


def check_runs(setup: Setup) -> Figures:
    """The same bits twice, and after a stop; evaluation and export against the run's own logits."""
    once, again = (train(setup.folder / name, "--epochs", "2") for name in ("once", "again"))
    train(setup.folder / "resumed", "--epochs", "1")
    resumed = train(setup.folder / "resumed", "--epochs", "2")
    for name, other in (("again", again), ("resumed", resumed)):
        same = jax.tree.map(np.array_equal, once.params, other.params)
        assert jax.tree.all(same), f"--deterministic, {name}: other bits: {same}"
    run_script("eval.py", str(setup.folder / "once"))
    result = json.loads((setup.folder / "once" / "eval" / "test.json").read_text())
    test = load(once.config.data)["test"]
    with jax.default_device(setup.gpu):
        logits = once.logits(test.images)
        exported = export.load(export.save(export.ExportConfig(setup.folder / "once", "stablehlo")))
        probabilities = exported.predict(test.images[:100])
    correct = int((logits.argmax(axis=1) == test.labels).sum())
    assert result["count"] == len(test.labels)
    assert abs(round(result["accuracy"] * result["count"]) - correct) <= 1, "eval.py counts others than the logits"
    softmax = np.exp(logits[:100] - logits[:100].max(axis=1, keepdims=True))
    difference = float(np.abs(softmax / softmax.sum(axis=1, keepdims=True) - probabilities).max())
    assert difference < 1e-3, f"the export's probabilities differ by {difference:.2g}"
    return {"accuracy": result["accuracy"], "largest difference of the export": difference}


def check_speed(setup: Setup) -> Figures:
    """benchmarks/run.py; the train step alone where --quick."""
    out = setup.folder / "benchmark.json"
    flags = ["--sections", "train", "--quick"] if setup.quick else ["--rounds", "3"]
    run_script("benchmarks/run.py", "--out", str(out), *flags)
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def check_accuracy(setup: Setup) -> Figures:
    """Seconds until cifar10-best reaches 64.36% on CIFAR-10, `--seeds` times."""
    out = setup.folder / "time.jsonl"
    where = ["--out", str(out), "--runs", str(setup.folder / "runs"), "--data-dir", str(setup.data_dir)]
    run_script("benchmarks/ablate.py", "time", "--rows", "2 epochs", "--seeds", str(setup.seeds), *where)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    curves = [row["curve"] for row in rows]
    reached = [
        sum(epoch["seconds"] for epoch in curve) for curve in curves if curve[-1]["validation_accuracy"] >= 0.6436
    ]
    return {"runs": len(rows), "reached 64.36% within 2 epochs": len(reached), "seconds of training": reached}


def main() -> int:
    """Runs the checks; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--against", choices=("gpu", "cpu"), default="gpu", help="what is compared with the CPU")
    parser.add_argument("--data-dir", help="folder with CIFAR-10: also measures the time to 64.36%%")
    parser.add_argument("--seeds", type=int, default=10, help="runs to 64.36%%")
    parser.add_argument("--quick", action="store_true", help="only the train step is timed, and briefly")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu-check.json")
    arguments = parser.parse_args()
    if arguments.against == "cpu":
        jax.config.update("jax_num_cpu_devices", 2)
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the scripts need memory, too
    cpus = jax.devices("cpu")
    try:
        gpu = cpus[1] if arguments.against == "cpu" else jax.devices("gpu")[0]
    except RuntimeError as error:
        print(f"JAX finds no GPU ({error}); --against cpu tries the checks without one", file=sys.stderr)
        return 1
    checks = [check_operations, check_steps, check_runs, check_speed]
    if arguments.data_dir:
        checks.append(check_accuracy)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(arguments, name) for name in ("quick", "data_dir", "seeds")}
        setup = Setup(gpu, cpus[0], pathlib.Path(folder), **flags)
        for check in checks:
            name = check.__name__.removeprefix("check_")
            start = time.perf_counter()
            try:
                results[name] = {"passed": True, "figures": check(setup)}
            except Exception as error:
                results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
            results[name]["seconds"] = round(time.perf_counter() - start, 1)
            outcome = "passed" if results[name]["passed"] else f"FAILED: {results[name]['error']}"
            print(f"{name}: {outcome} ({results[name]['seconds']} s)", flush=True)
    report = {
        "command": " ".join(["python -m tests.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": gpu.device_kind,
        "versions": versions(),
        "checks": results,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Figures: {arguments.out}")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
