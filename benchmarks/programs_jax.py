"""Our own programs: the train step that `train.py` runs, and the functions of `layers` and `augment`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs import (
    IMAGENET_CLASSES,
    OPERATION_BATCH,
    OPERATIONS,
    PCA_EIGENVECTORS,
    PCA_SCALES,
    PCA_STD,
    PRODUCT_SIDES,
    Program,
    Shape,
    Spec,
    cotangent,
    examples,
    operation_input,
)

from alexnet_jax.augment import pca, preprocess
from alexnet_jax.config.settings import AugmentationConfig, NetworkConfig, OptimizerConfig
from alexnet_jax.data import statistics
from alexnet_jax.data.batches import Batches, batches
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.distributed.devices import default_steps_per_call, replicate, select_devices
from alexnet_jax.network import alexnet, layers, lrn
from alexnet_jax.network.build import from_config
from alexnet_jax.training import optimizer
from alexnet_jax.training.predict import make_predict_step
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step, train_step


def device_peak() -> int | None:
    """Peak memory of the first device in bytes; None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


RULES = {
    "small": OptimizerConfig(),
    "torchvision": OptimizerConfig("sgd", 0.01, momentum=0.9, weight_decay=5e-4),
}


def train(spec: Spec) -> Program:
    """The step of `python train.py --pca none`: no augmentation, dropout 0.5. Variants: the values of --convolution."""
    devices = select_devices(spec.devices)
    images, labels = examples(spec)
    turns = len(images) // spec.batch_size
    preprocessing = preprocess.Preprocessing(AugmentationConfig(), statistics.Statistics.of(images[:1000]), turns)
    network = NetworkConfig(network=spec.network, dtype=spec.dtype, convolution=spec.variant or "auto")  # type: ignore[arg-type]
    model = from_config(network, 10 if spec.network == "small" else IMAGENET_CLASSES)
    update_rule, _ = optimizer.from_config(RULES[spec.network], turns, 1)
    frozen = alexnet.LAYERS[:5] if spec.frozen else ()
    step = functools.partial(train_step, model=model, optimizer=update_rule, preprocess=preprocessing, frozen=frozen)
    call = compile_train_step(step, devices, ArrayDataset.fetch, dtype=spec.dtype)
    key = replicate(jax.random.key(0), devices)
    state = replicate(create_state(model, update_rule, images.shape[1:], jax.random.key(1), frozen=frozen), devices)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    data = replicate(Examples(images, labels), devices)
    layout = batches(np.arange(len(images)), spec.batch_size, spec.devices)
    per_call = default_steps_per_call(devices)
    done = 0

    def run(count: int) -> None:
        nonlocal state, done
        while count:
            now = per_call if count >= per_call else 1
            turn = np.arange(done, done + now) % turns
            state, _ = call(state, data, Batches(layout.indices[:, turn], layout.mask[:, turn]), key)
            count, done = count - now, done + now
        jax.block_until_ready(state)

    run(per_call + 1)  # compiles both
    return Program(run, parameters)


def predict(spec: Spec) -> Program:
    """The step with which `eval.py` predicts, on images that are on the device."""
    devices = select_devices(1)
    images, _ = examples(spec)
    preprocessing = preprocess.Preprocessing(AugmentationConfig(), statistics.Statistics.of(images[:100]), 1)
    network = NetworkConfig(network=spec.network, dtype=spec.dtype, convolution=spec.variant or "auto")  # type: ignore[arg-type]
    model = from_config(network, IMAGENET_CLASSES)
    params = model.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))["params"]
    step = make_predict_step(model, preprocessing, devices)
    params, batch = replicate((params, images[None, : spec.batch_size]), devices)
    return _repeat(lambda call: step(params, batch))


def product(spec: Spec) -> Program:
    """A product of square matrices, at the device's highest speed; float32 in full precision only on a CPU."""
    side = PRODUCT_SIDES[spec.platform]
    a = jax.random.normal(jax.random.key(0), (side, side), spec.dtype)
    return _repeat(functools.partial(_product, a))


@jax.jit
def _product(a: jax.Array, call: int) -> jax.Array:
    return a @ a


def operations(spec: Spec) -> dict[str, Program]:
    """The operations of `programs.OPERATIONS`."""
    build: dict[str, Callable[[Shape], Program]] = {
        "lrn": functools.partial(_with_gradient, lrn.local_response_norm),
        "max_pool": functools.partial(_with_gradient, layers.max_pool),
        "pca_noise": _noise,
    }
    return {name: build[kind](shape) for name, (kind, shape) in OPERATIONS.items()}


def _with_gradient(operation: Callable[[jax.Array], jax.Array], shape: Shape) -> Program:
    @jax.jit
    def both(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(operation, x)
        return y, vjp(gradient)[0]

    x = jnp.asarray(operation_input(shape))
    gradient = jnp.asarray(cotangent(jax.eval_shape(operation, x).shape))
    return _repeat(lambda call: both(x, gradient))


def _noise(shape: Shape) -> Program:
    @jax.jit
    def add_noise(x: jax.Array, call: int) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), call), OPERATION_BATCH)
        return x + pca.dataset_noise(keys, PCA_SCALES, PCA_EIGENVECTORS, PCA_STD)[:, None, None]

    x = jnp.asarray(operation_input(shape))
    return _repeat(lambda call: add_noise(x, call))


def _repeat(function: Callable[[int], Any]) -> Program:
    def run(count: int) -> None:
        for call in range(count):
            result = function(call)
            if jax.default_backend() == "cpu":  # two small calls would share the cores; the peers' can't
                jax.block_until_ready(result)
        jax.block_until_ready(result)

    return Program(run)
