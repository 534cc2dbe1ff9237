"""Run in a copy of the repository to which a diff of docs/how-to-change.md was applied: `changed_copy.py NAME COMMAND`.

Trains as the page's command says, for five steps on 100 images, evaluates, and checks that the change has its effect.
"""

import functools
import json
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alexnet_jax
import eval as evaluating
import train as training
from alexnet_jax import data
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config import cli
from alexnet_jax.config.flags import replace
from alexnet_jax.config.settings import DataConfig
from alexnet_jax.data import shapes
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.network import build
from alexnet_jax.training import optimizer
from tests.tiny_runs import TINY_NETWORKS, draw_nothing

SHORT = "--epochs 1 --batch-size 20 --num-devices 1 --workdir run"
DRAWN = functools.partial(shapes.load, train=100, validation=30, test=70)


def augmentation(run):
    """Each image's deviation from its mean is multiplied by a factor that its key decides; all else is as before."""
    before = np.load("before.npz")
    images, keys = before["images"], jax.random.split(jax.random.key(1), (len(before["images"]), 6))
    base = replace(run.config.augmentation, crop_padding=4, flip=True, pca="dataset-std")

    def inputs(first, **settings):
        preprocessing = Preprocessing(replace(base, **settings), run.statistics, 1)
        return np.asarray(preprocessing.training(keys[first:], images[first:], jnp.int32(0)))

    assert base.contrast == 0.3
    np.testing.assert_allclose(inputs(0, contrast=0.0), before["inputs"], rtol=0, atol=1e-6)
    changed = inputs(0)
    mean = before["inputs"].mean(axis=(1, 2), keepdims=True)
    factors = (changed - mean).std(axis=(1, 2, 3)) / (before["inputs"] - mean).std(axis=(1, 2, 3))
    assert (abs(factors - 1) <= 0.3).all()
    assert np.ptp(factors) > 0.3
    expected = mean + factors.reshape(-1, 1, 1, 1) * (before["inputs"] - mean)
    np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(inputs(7), changed[7:], rtol=0, atol=1e-6)  # whatever else is in the batch


def network(run):
    assert list(build.layers(run.config.network)) == sorted(run.params) == ["conv1", "conv2", "fc1", "fc2", "logits"]
    assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == 62_006
    assert run.features(np.zeros((2, 32, 32, 3), np.uint8), "conv2 pool").shape == (2, 5, 5, 16)
    with pytest.raises(UsageError, match=r"--layer-decays conv3: the layers of --network lenet are conv1, conv2, fc1"):
        training.main(
            shlex.split(
                f"--dataset shapes --network lenet --optimizer sgd --layer-decays conv3 1 {SHORT} --workdir other"
            )
        )


def data_set(run):
    assert (run.dataset.name, run.class_names) == ("npz", ("dark", "light"))
    assert run.dataset.counts == {"train": 100, "test": 70}
    assert run.params["logits"]["bias"].shape == (2,)
    good = dict(np.load("mine.npz"))
    for changed in ({"test_labels": good["test_labels"] + 1}, {"train_images": good["train_images"][..., :1]}):
        np.savez("bad.npz", **good | changed)
        with pytest.raises(AlexNetError, match=r"^bad\.npz: t\w+ needs RGB images and labels from 0 to 1"):
            data.load(DataConfig("npz", pathlib.Path("bad.npz")))
    for name in ("nothing.npz", "train.py"):
        with pytest.raises(AlexNetError, match=r": not a data set \("):
            data.load(DataConfig("npz", pathlib.Path(name)))


def new_optimizer(run):
    """Lion moves every weight by the learning rate, plus the weight decay."""
    config = run.config.optimizer
    rule, _ = optimizer.from_config(config, steps_per_epoch=5, epochs=1)
    params = {"conv1": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.zeros(1)}}
    gradients = {"conv1": {"kernel": jnp.array([1e-3, 50.0]), "bias": jnp.full(1, -7.0)}}
    updates, state = rule.update(gradients, rule.init(params), params)
    expected = -config.learning_rate * (np.array([1.0, 1.0]) + config.weight_decay * np.array([2.0, -1.0]))
    np.testing.assert_allclose(updates["conv1"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["conv1"]["bias"], [config.learning_rate], rtol=1e-5)
    after, _ = rule.update(jax.tree.map(lambda g: -0.05 * g, gradients), state, params)  # the average decides
    np.testing.assert_allclose(after["conv1"]["kernel"], expected, rtol=1e-5)
    assert optax.tree.get(state, "mu") is not None
    with pytest.raises(UsageError, match="--momentum and --nesterov are for --optimizer sgd and muon"):
        cli.parse_train(["quickstart", "--optimizer", "lion", "--momentum", "0.9"])


def recipe(run):
    assert (run.config.preset, run.config.optimizer.momentum) == ("quickstart-sgd", 0.9)


EXAMPLES = {
    "A new augmentation": (augmentation, {"contrast": 0.3}),
    "A new network": (network, {"network": "lenet"}),
    "A new data set": (data_set, {"dataset": "npz"}),
    "A new optimizer": (new_optimizer, {"optimizer": "lion"}),
    "A new recipe": (recipe, {"preset": "quickstart-sgd", "optimizer": "sgd"}),
}

if __name__ == "__main__":
    name, command = sys.argv[1:]
    check, settings = EXAMPLES[name]
    assert pathlib.Path(alexnet_jax.__file__).parents[1] == pathlib.Path.cwd()  # not the repository itself
    shapes.load = DRAWN
    draw_nothing()
    build.NETWORKS = TINY_NETWORKS
    rng = np.random.default_rng(0)
    labels = {split: rng.integers(0, 2, number) for split, number in (("train", 100), ("test", 70))}
    images = {
        split: rng.integers(0, 128, (len(of), 32, 32, 3)) + 128 * of.reshape(-1, 1, 1, 1)
        for split, of in labels.items()
    }
    np.savez(
        "mine.npz",
        class_names=["dark", "light"],
        **{f"{split}_labels": of for split, of in labels.items()},
        **{f"{split}_images": of.astype(np.uint8) for split, of in images.items()},
    )
    program = shlex.split(command)
    assert program[:2] == ["python", "train.py"]
    training.main([*program[2:], *shlex.split(SHORT)])
    written = json.loads(pathlib.Path("run/config.json").read_text("utf-8"))
    assert written.items() >= settings.items()
    lines = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["step"] == 5
    evaluating.main(["run"])
    assert json.loads(pathlib.Path("run/eval/test.json").read_text("utf-8"))["count"] == 70
    check(alexnet_jax.open_run("run"))
