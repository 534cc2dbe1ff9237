"""Compiles the train and predict steps for a GPU, without one, and counts what the compiled programs do.

    python benchmarks/gpu_program.py                                       # the table of benchmarks/README.md
    python benchmarks/gpu_program.py --presets cifar10 --dtypes bfloat16   # one program

XLA's compiler for GPUs runs on any Linux machine with an x86-64 processor, given a description of the GPU. It is in two
wheels (200 MB), which are downloaded to the user's cache directory if JAX's CUDA plugin is not installed. Nothing is
executed: times are what the memory's bandwidth and the arithmetic units would take at their best (roofline), and the
same with at least 2 microseconds a kernel (floored). What cuDNN, cuBLAS and NCCL really take, only a GPU shows.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin's search for a driver would fail

import hlo
import jax
import numpy as np
import platformdirs
from collectives import split_shapes
from jax.experimental import topologies

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config import cli
from alexnet_jax.config.flags import replace
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.config.types import PositiveInt
from alexnet_jax.data.batches import Batch, Batches
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.data.streamed import StreamedDataset
from alexnet_jax.errors import AlexNetError, UsageError, shown
from alexnet_jax.network import build
from alexnet_jax.network.layer_outputs import layer_outputs
from alexnet_jax.runs.folder import versions
from alexnet_jax.training import optimizer
from alexnet_jax.training.predict import make_predict_step
from alexnet_jax.training.state import REPLICATED, SPLIT_DENSE, create_state
from alexnet_jax.training.step import compile_train_step
from alexnet_jax.training.trainer import build_step, is_split

LAUNCH = 2e-6  # seconds; a kernel takes no less


class Gpu(NamedTuple):
    """A GPU, from public figures of its maker.

    Attributes:
      description: the fields that differ in XLA's description of a target.
      bandwidth: of the memory, bytes per second.
      flops: dense peak per second by HLO dtype; float32 products run as TF32, JAX's default.
    """

    description: Mapping[str, Any]
    bandwidth: float
    flops: Mapping[str, float]


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "H100": Gpu(  # SXM, 80 GB
            {
                "name": "NVIDIA H100 80GB HBM3", "capability": 9, "cores": 132, "fpus": 128, "clock": 1.98,
                "shared_per_core": 233472, "shared_optin": 232448, "l2": 50 * 2**20, "memory": 85 * 10**9,
            },
            3.35e12,
            {"bf16": 989e12, "f16": 989e12, "f32": 494e12},
        ),
        "A100": Gpu(  # SXM, 80 GB
            {
                "name": "NVIDIA A100-SXM4-80GB", "capability": 8, "cores": 108, "fpus": 64, "clock": 1.41,
                "shared_per_core": 167936, "shared_optin": 166912, "l2": 40 * 2**20, "memory": 85 * 10**9,
            },
            2.04e12,
            {"bf16": 312e12, "f16": 312e12, "f32": 156e12},
        ),
    }
)  # fmt: skip
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_optin}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""

# The kinds of work, by JAX's scopes; a kernel has the first kind that occurs in it.
SCOPES = (
    ("LRN", "local_response_norm"),
    ("pooling", "_pool/"),
    ("augmentation", "augmentation/"),
    ("finite check", "finite/"),
    ("update", "update/"),
    ("keys", "keys/"),
)
KINDS = ("convolution", "dense", *(kind for kind, _ in SCOPES), "collectives", "copies", "other")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the train and predict steps for a GPU, without one, and count what the programs do."""

    gpu: Literal["H100", "A100"] = "H100"
    """The GPU to compile for."""
    presets: tuple[str, ...] = ("cifar10", "imagenet-paper")
    """Presets of train.py."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of the network."""
    steps: tuple[Literal["train", "predict"], ...] = ("train", "predict")
    """Which of the two compiled steps."""
    batch_size: PositiveInt | None = None
    """Global batch size; default: 128 per device for CIFAR-10, 256 for ImageNet."""
    steps_per_call: PositiveInt | None = None
    """Train steps in a call; default: 25, or 1 where images are streamed."""
    devices: PositiveInt = 1
    """Number of GPUs."""
    parallelism: Literal["data", "hybrid"] = "data"
    """As for train.py."""
    json: pathlib.Path | None = None
    """File for the figures."""
    hlo: pathlib.Path | None = None
    """Folder for the texts of the compiled programs."""


def main(args: Sequence[str]) -> None:
    """Parses the flags, compiles, prints the tables."""
    options = cli.parse(Options, args, "gpu_program.py")
    for preset in options.presets:
        if preset not in PRESETS:
            raise UsageError(f"--presets {shown(preset)}: the presets are {', '.join(PRESETS)}")
    if options.batch_size and options.batch_size % options.devices:
        raise UsageError(f"--batch-size {options.batch_size} can't be divided over --devices {options.devices}")
    use_compiler(wheels())
    rows = []
    for preset in options.presets:
        for dtype in options.dtypes:
            for step in options.steps:
                rows.append(measure(options, preset, dtype, step))
                print(f"{rows[-1]['program']}: compiled in {rows[-1]['seconds']} s", file=sys.stderr)
    if options.json:
        report = {"command": " ".join(["python benchmarks/gpu_program.py", *args]), "programs": rows}
        options.json.write_text(json.dumps(report | {"versions": versions()}, indent=1) + "\n")
    print(tables(rows, options.gpu))


def wheels() -> pathlib.Path | None:
    """The folder of XLA's compiler for GPUs, downloaded if need be; None: it is installed with JAX.

    Raises:
      AlexNetError: there is none for this system, or it can't be downloaded.
    """
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12"):
        return None
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise AlexNetError("XLA's compiler for GPUs runs on Linux with an x86-64 processor only")
    version = versions()["jaxlib"]
    folder = platformdirs.user_cache_path("alexnet_jax") / "gpu-compiler" / f"{version}-python{sys.version_info.minor}"
    if not folder.exists():
        print(f"Downloading XLA's compiler for GPUs to {folder} (200 MB)", file=sys.stderr)
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        names = [f"{name}=={version}" for name in ("jax-cuda12-pjrt", "jax-cuda12-plugin")]
        # Not into the environment: there, JAX would report in every process that the GPU's other libraries are missing.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        ended = subprocess.run([*pip, "--target", str(part), *names], capture_output=True, text=True)
        if ended.returncode:
            raise AlexNetError(f"pip could not install {' '.join(names)}: {ended.stderr.strip().splitlines()[-1]}")
        part.rename(folder)
    return folder


def use_compiler(folder: pathlib.Path | None) -> None:
    """Makes the compiler known to JAX; must be called before JAX looks for devices."""
    if folder:
        sys.path.append(str(folder))


def devices(gpu: str, number: int) -> list[Any]:
    """Devices that programs can be compiled for, and that can't run any."""
    description = TARGET.format(**GPUS[gpu].description, bandwidth=int(GPUS[gpu].bandwidth))
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{number}")
    return list(topology.devices)


def measure(options: Options, preset: str, dtype: str, step: str) -> dict[str, Any]:
    """Compiles one program and counts what a step does."""
    start = time.perf_counter()
    config = replace(PRESETS[preset].config, dtype=dtype, convolution="direct", parallelism=options.parallelism)
    streamed = config.data.dataset == "imagenet"
    batch_size = options.batch_size or (256 if streamed else 128) * options.devices
    steps = 1 if step == "predict" or streamed else options.steps_per_call or 25
    stored, num_classes = ((256, 256, 3), 1000) if streamed else ((32, 32, 3), 10)
    lowered = lower(
        config,
        devices(options.gpu, options.devices),
        stored=stored,
        num_classes=num_classes,
        step=step,
        batch_size=batch_size,
        steps=steps,
    )
    compiled = lowered.compile()
    text = compiled.as_text()
    name = f"{preset}, {step}, {dtype}, batch {batch_size:,}"
    name += f", {options.devices} GPUs, {options.parallelism} parallelism" if options.devices > 1 else ""
    if options.hlo:
        options.hlo.mkdir(parents=True, exist_ok=True)
        (options.hlo / (name.replace(", ", "-").replace(" ", "-").replace(",", "") + ".txt")).write_text(text)
    figures = counts(hlo.kernels(hlo.parse(text)), steps, GPUS[options.gpu])
    share = batch_size // options.devices
    memory = compiled.memory_analysis()
    return {
        "program": name,
        "steps_per_call": steps,
        **figures,
        "ideal": ideal(config, stored, num_classes, share, figures, GPUS[options.gpu], step == "train"),
        "peak_memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "seconds": round(time.perf_counter() - start, 1),
    }


def lower(
    config: TrainConfig,
    devices: Sequence[Any],
    *,
    stored: tuple[int, int, int],
    num_classes: int,
    step: str,
    batch_size: int,
    steps: int,
) -> Any:
    """The call that `train.py` makes (or validation, for step "predict"), ready to be compiled for these devices."""
    examples, number, share = 45_000, len(devices), batch_size // len(devices)
    model = build.from_config(config.network, num_classes)
    random = np.random.default_rng(0).integers(0, 256, (16, *stored), np.uint8)
    preprocessing = Preprocessing(config.augmentation, Statistics.of(random), examples // batch_size)
    rule, _ = optimizer.from_config(config.optimizer, examples // batch_size, config.schedule.epochs)
    input_shape = preprocessing.input_shape(stored)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: create_state(model, rule, input_shape, key), key)
    shape: Any = jax.ShapeDtypeStruct
    if step == "predict":
        predict: Any = make_predict_step(model, preprocessing, devices)
        return predict.lower(state.params, shape((number, share, *stored), np.uint8))
    split = is_split(config, devices)
    resident: Any = None
    call: Any = Batches(shape((number, steps, share), np.int32), shape((number, steps, share), np.bool_))
    fetch: Any = ArrayDataset.fetch
    if config.data.dataset == "imagenet":
        fetch, images = StreamedDataset.fetch, shape((number, steps, share, *stored), np.uint8)
        call = Batch(images, call.indices, call.mask)
    else:
        resident = Examples(shape((examples, *stored), np.uint8), shape((examples,), np.int32))
    train: Any = compile_train_step(
        build_step(config, model, rule, preprocessing, devices),
        devices,
        fetch,
        SPLIT_DENSE if split else REPLICATED,
        config.network.dtype,
    )
    return train.lower(split_shapes(state, number) if split else state, resident, call, key)


def seconds(kernel: hlo.Kernel, gpu: Gpu, least: float = 0.0) -> float:
    """A kernel's time, if it used the whole bandwidth or all arithmetic units, and took at least `least`."""
    moved = (kernel.bytes_read + kernel.bytes_written) / gpu.bandwidth
    return max(moved, kernel.flops / gpu.flops[kernel.dtype] if kernel.dtype else 0.0, least)


def kind_of(kernel: hlo.Kernel) -> str:
    """The kind of work, one of `KINDS`."""
    if kernel.flops:
        return "convolution" if "conv" in kernel.target else "dense"
    if any(name in kernel.target for name in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")):
        return "collectives"
    scopes = " ".join(f"{scope}/" for scope in kernel.scopes)
    for kind, scope in SCOPES:
        if scope in scopes:
            return kind
    return "copies" if kernel.target in ("copy", "transpose", "copy-start") else "other"


def counts(kernels: Sequence[hlo.Kernel], steps: int, gpu: Gpu) -> dict[str, Any]:
    """What the kernels do in a step; times in microseconds."""
    floored: collections.Counter[str] = collections.Counter()
    roofline: collections.Counter[str] = collections.Counter()
    number: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        runs, kind = kernel.runs / steps, kind_of(kernel)
        number[kind] += runs  # type: ignore[assignment]
        roofline[kind] += runs * seconds(kernel, gpu) * 1e6  # type: ignore[assignment]
        floored[kind] += runs * seconds(kernel, gpu, LAUNCH) * 1e6  # type: ignore[assignment]

    def total(values: Mapping[str, float]) -> dict[str, float]:
        return {kind: round(values.get(kind, 0.0), 2) for kind in KINDS} | {"all": round(sum(values.values()), 2)}

    return {
        "kernels": total(number),
        "roofline_us": total(roofline),
        "floored_us": total(floored),
        "gigabytes": sum(k.runs * (k.bytes_read + k.bytes_written) for k in kernels) / steps / 1e9,
        "gigaflops": sum(k.runs * k.flops for k in kernels) / steps / 1e9,
    }


def ideal(
    config: TrainConfig,
    stored: tuple[int, int, int],
    num_classes: int,
    share: int,
    figures: Mapping[str, Any],
    gpu: Gpu,
    with_gradient: bool,
) -> dict[str, float]:
    """The least time of each kind of work on one GPU, in microseconds.

    Convolutions and dense layers as compiled. LRN reads its input and writes its output, and its gradient reads the
    input and the output's gradient and writes the input's; pooling the same, with a byte for each output that says
    which element won. The update reads state and gradient and writes the state. Augmentation reads the stored
    images and writes the network's input. The rest is fused into these or need not be.
    """
    model = build.from_config(config.network, num_classes)
    side = config.augmentation.enlarge_to or config.augmentation.crop_size or stored[0]
    images = jax.ShapeDtypeStruct((share, side, side, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    maps = jax.eval_shape(functools.partial(layer_outputs, model), params, images)
    width = np.dtype(config.network.dtype).itemsize
    moved: collections.Counter[str] = collections.Counter(augmentation=images.size * (1 + width))
    for (_, before), (name, after) in itertools.pairwise(maps.items()):
        if "LRN" in name:
            moved["LRN"] += (5 if with_gradient else 2) * after.size * width
        elif "pool" in name:
            moved["pooling"] += (before.size + after.size) * width
            moved["pooling"] += (before.size + after.size) * width + 2 * after.size if with_gradient else 0
    if with_gradient:
        rule, _ = optimizer.from_config(config.optimizer, 1, 1)
        state = jax.tree.leaves(jax.eval_shape(lambda params: (params, rule.init(params)), params))
        gradient = jax.tree.leaves(params)
        moved["update"] = sum(2 * leaf.size * leaf.dtype.itemsize for leaf in state) + sum(x.size * 4 for x in gradient)
    times = {kind: moved[kind] / gpu.bandwidth * 1e6 for kind in KINDS}
    times |= {kind: figures["roofline_us"][kind] for kind in ("convolution", "dense")}
    return {kind: round(value, 2) for kind, value in times.items()} | {"all": round(sum(times.values()), 2)}


def tables(rows: Sequence[Mapping[str, Any]], gpu: str) -> str:
    """Two tables in Markdown: totals, and floored time by kind of work."""
    totals = [["program", "steps a call", "kernels", "GB", "GFLOP", "GiB of memory", "roofline", "floored", "ideal"]]
    kinds = [["program", *KINDS]]
    for row in rows:
        totals.append(
            [
                row["program"],
                str(row["steps_per_call"]),
                f"{row['kernels']['all']:,.0f}",
                f"{row['gigabytes']:,.2f}",
                f"{row['gigaflops']:,.0f}",
                f"{row['peak_memory_gib']:,.2f}",
                *(f"{row[name]['all']:,.0f} us" for name in ("roofline_us", "floored_us", "ideal")),
            ]
        )
        kinds.append(
            [row["program"], *(f"{row['floored_us'][kind]:,.0f} ({row['ideal'][kind]:,.0f})" for kind in KINDS)]
        )
    return "\n\n".join(
        [
            f"Compiled for {gpu}, not measured on it. Kernels, bytes and times are those of a step on one GPU:",
            _markdown(totals),
            "Floored time of each kind of work in microseconds, compiled for, not measured on; in brackets the ideal:",
            _markdown(kinds),
        ]
    )


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
