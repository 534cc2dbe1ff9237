"""AlexNetSmall and the operations in TensorFlow.

Variants: "graph" (a program of 2016 to 2018: graph, session, feed_dict), "function" and "function, XLA" (tf.function).
All have `tf.compat.v1.train.AdamOptimizer`, whose update is one fused kernel per variable; Keras's takes several.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from programs import (
    OPERATION_BATCH,
    OPERATIONS,
    PCA_EIGENVECTORS,
    PCA_SCALES,
    PCA_STD,
    Program,
    Shape,
    Spec,
    cotangent,
    float_batches,
    operation_input,
)

KERNELS = {
    "conv1": (7, 7, 3, 48),
    "conv2": (5, 5, 48, 128),
    "conv3": (3, 3, 128, 192),
    "conv4": (3, 3, 192, 192),
    "conv5": (3, 3, 192, 192),
    "fc1": (4 * 4 * 192, 512),
    "fc2": (512, 512),
    "logits": (512, 10),
}
Params = dict[str, dict[str, Any]]

lrn = functools.partial(tf.nn.local_response_normalization, depth_radius=2, bias=2.0, alpha=1e-4, beta=0.75)
max_pool = functools.partial(tf.nn.max_pool2d, ksize=3, strides=2, padding="SAME")


def network(params: Params, images: tf.Tensor, training: bool) -> tf.Tensor:
    """`alexnet_jax.AlexNetSmall`: logits [B, 10] of float images [B, 32, 32, 3]."""

    def conv(x: tf.Tensor, name: str, stride: int = 1) -> tf.Tensor:
        x = tf.nn.conv2d(x, params[name]["kernel"], stride, "SAME")
        return tf.nn.relu(tf.nn.bias_add(x, params[name]["bias"]))

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.nn.bias_add(tf.matmul(x, params[name]["kernel"]), params[name]["bias"])

    x = max_pool(lrn(conv(images, "conv1", stride=2)))
    x = max_pool(lrn(conv(x, "conv2")))
    for name in ("conv3", "conv4", "conv5"):
        x = conv(x, name)
    x = tf.reshape(x, (-1, 4 * 4 * 192))
    for name in ("fc1", "fc2"):
        x = tf.nn.relu(dense(x, name))
        if training:
            x = tf.nn.dropout(x, 0.5)
    return dense(x, "logits")


def platform() -> str:
    """Where TensorFlow computes."""
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def device_peak() -> int | None:
    """Peak memory of the first device in bytes; None on a CPU."""
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] if platform() == "gpu" else None


def train(spec: Spec) -> Program:
    """Forward, backward and Adam."""
    return _train_graph(spec) if spec.variant == "graph" else _train_function(spec)


def operations(spec: Spec) -> dict[str, Program]:
    """The operations of `programs.OPERATIONS`."""
    compiled = tf.function(jit_compile=_uses_xla(spec))
    build = {
        "lrn": functools.partial(_with_gradient, lrn, compiled),
        "max_pool": functools.partial(_with_gradient, max_pool, compiled),
        "pca_noise": functools.partial(_noise, compiled),
    }
    return {name: build[kind](shape) for name, (kind, shape) in OPERATIONS.items()}


def logits(params: Params, images: np.ndarray) -> np.ndarray:
    """The network's output in evaluation with our parameters; images float32 [B, 32, 32, 3]."""
    variables = _variables()
    for name, layer in params.items():
        for key, value in layer.items():
            variables[name][key].assign(value)
    return network(variables, tf.constant(images), training=False).numpy()


def _variables() -> Params:
    return {
        name: {
            "kernel": tf.Variable(tf.random.truncated_normal(shape, stddev=float(np.sqrt(2 / np.prod(shape[:-1]))))),
            "bias": tf.Variable(tf.ones(shape[-1])),
        }
        for name, shape in KERNELS.items()
    }


def _make_update(variables: Params) -> Callable[[tf.Tensor, tf.Tensor], tf.Operation]:
    adam = tf.compat.v1.train.AdamOptimizer(1e-3, epsilon=1e-8)

    def update(images: tf.Tensor, labels: tf.Tensor) -> tf.Operation:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, network(variables, images, training=True))
        return adam.minimize(tf.reduce_mean(losses), var_list=tf.nest.flatten(variables))

    return update


def _count(variables: Params) -> int:
    return sum(int(np.prod(variable.shape)) for variable in tf.nest.flatten(variables))


def _train_graph(spec: Spec) -> Program:
    with tf.Graph().as_default():
        variables = _variables()
        images = tf.compat.v1.placeholder(tf.float32, (None, 32, 32, 3))
        labels = tf.compat.v1.placeholder(tf.int64, (None,))
        update = _make_update(variables)(images, labels)
        session = tf.compat.v1.Session()
        session.run(tf.compat.v1.global_variables_initializer())
    cycle = itertools.cycle(float_batches(spec))

    def run(count: int) -> None:
        for _ in range(count):
            batch = next(cycle)
            session.run(update, {images: batch[0], labels: batch[1]})

    return Program(run, _count(variables))


def _train_function(spec: Spec) -> Program:
    variables = _variables()
    update = _make_update(variables)

    @tf.function(jit_compile=_uses_xla(spec))
    def step(images: tf.Tensor, labels: tf.Tensor) -> None:
        update(images, labels)

    cycle = itertools.cycle([(tf.constant(images), tf.constant(labels)) for images, labels in float_batches(spec)])

    def run(count: int) -> None:
        for _ in range(count):
            step(*next(cycle))
        variables["logits"]["bias"].numpy()  # waits for the device

    return Program(run, _count(variables))


def _uses_xla(spec: Spec) -> bool:
    return spec.variant.endswith("XLA")


def _with_gradient(operation: Callable[..., tf.Tensor], compiled: Callable[..., Any], shape: Shape) -> Program:
    @compiled
    def both(x: tf.Tensor, gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = operation(x)
        return y, tape.gradient(y, x, gradient)

    x = tf.constant(operation_input(shape))
    gradient = tf.constant(cotangent(tuple(operation(x).shape)))
    return _repeat(lambda: both(x, gradient))


def _noise(compiled: Callable[..., Any], shape: Shape) -> Program:
    mixing = tf.constant((PCA_EIGENVECTORS * PCA_SCALES).T, tf.float32)

    @compiled
    def add_noise(x: tf.Tensor) -> tf.Tensor:
        alpha = tf.random.normal((OPERATION_BATCH, 3), stddev=PCA_STD)
        return x + (alpha @ mixing)[:, None, None]

    x = tf.constant(operation_input(shape))
    return _repeat(lambda: add_noise(x))


def _repeat(function: Callable[[], Any]) -> Program:
    def run(count: int) -> None:
        for _ in range(count):
            result = function()
        tf.nest.map_structure(lambda tensor: tensor[:1].numpy(), result)  # waits for the device

    return Program(run)
