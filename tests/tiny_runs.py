"""Short training runs of a tiny network: settings, a stop in the middle, and comparisons."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import AugmentationConfig, NetworkConfig, TrainConfig
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.inspection import evaluate
from alexnet_jax.network import build
from alexnet_jax.network.layers import dropout, max_pool
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.split_dense import dense_layer
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.log import read_jsonl
from alexnet_jax.training import loop, optimizer

ONES = nn.initializers.ones  # for biases: no unit is dead

# At higher rates rounding can grow a thousandfold in a step: which of two equal elements is a window's maximum depends
# on the last bit, and shapes have many equal pixels. At twice this rate it did, with JAX 0.10 on one processor.
UPDATE = optimizer.paper_sgd(optimizer.scale_by_rate(optimizer.step_schedule(0.00005, [15], 0.1)), 0.9, 5e-4)


class TinyNetwork(nn.Module):
    """A convolution, normalization, pooling, dropout and two dense layers: it compiles in a second."""

    num_classes: int = 10
    dropout_rate: float = 0.5
    dense_axis: str | None = None

    @nn.compact
    def __call__(self, images, dropout_keys=None):
        dense = dense_layer(self.dense_axis)
        x = nn.relu(nn.Conv(8, (5, 5), strides=4, bias_init=ONES, name="conv1")(images))
        x = max_pool(local_response_norm(x)).reshape(images.shape[0], -1)
        x = nn.relu(dense(20, bias_init=ONES, name="fc1")(x))  # three devices can't have equal parts of its 20 outputs
        if dropout_keys is not None:
            x = dropout(x, self.dropout_rate, dropout_keys[:, 0])
        return dense(self.num_classes, name="logits")(x)


def tiny_network(config: NetworkConfig, num_classes: int, **_: Any) -> nn.Module:
    """Replaces the network of `--network small`."""
    return TinyNetwork(num_classes, config.dropout_rate)


TINY_NETWORKS = {**build.NETWORKS, "small": build.Network(tiny_network, None)}


def make_config(workdir: pathlib.Path, epochs: int = 3, **run: Any) -> TrainConfig:
    """The paper's recipe on 100 images in batches of 16: seven steps an epoch, the last one padded."""
    base = PRESETS["cifar10-paper"].config
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, dataset="shapes"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, drop_epochs=(1,)),
        schedule=dataclasses.replace(base.schedule, epochs=epochs, batch_size=16),
        run=dataclasses.replace(base.run, **{"workdir": workdir, "num_devices": 2, "log_every": 3} | run),
    )


DRAWING = ((loop, "draw_data", None), (loop, "draw_curves", None), (evaluate, "draw", {}))
DRAWN = [getattr(module, name) for module, name, _ in DRAWING]


def draw_nothing(change: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on, training and evaluation draw no plots: matplotlib takes longer than a short run."""
    for module, name, result in DRAWING:
        change(module, name, lambda *_, result=result: result)


@contextlib.contextmanager
def with_pictures() -> Iterator[None]:
    """Training and evaluation in this context draw their plots, as outside the tests."""
    import pytest  # takes a quarter of a second, also in the processes that tests start

    with pytest.MonkeyPatch.context() as patch:
        for (module, name, _), draw in zip(DRAWING, DRAWN, strict=True):
            patch.setattr(module, name, draw)
        yield


def train_until(config: TrainConfig, dataset: Dataset, step: int, number: int, *pretrained: Any) -> None:
    """Trains; the process sends itself a signal after `step`."""
    for call in loop.training(config, dataset, *pretrained):
        if call.step == step:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # a thread notes it


def comparable(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run, without speeds."""
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in read_jsonl(workdir / "metrics.jsonl")]


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    """Parameters, optimizer state, the loop's memory, and metrics."""
    one, other = (Checkpoints(run / "checkpoints", read_only=True).restore_newest() for run in (a, b))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert comparable(a) == comparable(b)


def everything_on(images: np.ndarray) -> Preprocessing:
    """Crops, flips, the mean image and PCA noise, which ends after 15 steps."""
    config = AugmentationConfig(crop_padding=4, flip=True, subtract_mean=True, pca="per-image", pca_off_epoch=1)
    return Preprocessing(config, Statistics.of(images), steps_per_epoch=15)


def relative_difference(a: Any, b: Any) -> float:
    """The largest |x - y| / |x| of two trees' leaves, Euclidean norms."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in leaves)
