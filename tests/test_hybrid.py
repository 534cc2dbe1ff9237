"""Hybrid parallelism computes what data parallelism does, with a part of the dense layers on each device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.augment import preprocess
from alexnet_jax.config.settings import AugmentationConfig, OptimizerConfig
from alexnet_jax.data import statistics
from alexnet_jax.data.batches import Batch, batches
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.data.streamed import StreamedDataset
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.network import build, split_dense
from alexnet_jax.network.alexnet import AlexNet
from alexnet_jax.network.small import AlexNetSmall
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.training import gradients, loop, optimizer
from alexnet_jax.training.state import REPLICATED, SPLIT_DENSE, SplitState, StepMetrics, TrainState, create_state
from alexnet_jax.training.step import compile_train_step, train_step
from tests.stress import process_faults
from tests.tiny_runs import TINY_NETWORKS, TinyNetwork, comparable, everything_on, make_config, relative_difference

SGD = OptimizerConfig("sgd", 1e-3, momentum=0.9, weight_decay=5e-4, average_decay=0.9)
UPDATE, _ = optimizer.from_config(SGD, 5, 1)


@dataclasses.dataclass
class Outcome:
    """The results of some steps.

    Attributes:
      state: the whole state.
      metrics: of each step.
      placed: the state as laid out on the devices.
    """

    state: TrainState
    metrics: list[StepMetrics]
    placed: TrainState | SplitState


def compiled(
    model, update, preprocessing, devices, parts, fetch=ArrayDataset.fetch, sum_gradients=gradients.at_once, **options
):
    step = functools.partial(train_step, optimizer=update, preprocess=preprocessing, **options)
    if not parts:
        step = functools.partial(step, model=model, sum_gradients=sum_gradients)
        return compile_train_step(step, devices, fetch), REPLICATED
    sum_gradients = functools.partial(sum_gradients, add_up=gradients.add_up_copied)
    step = functools.partial(
        step,
        model=model.clone(dense_axis="batch"),
        sum_gradients=sum_gradients,
    )
    return compile_train_step(step, devices, fetch, SPLIT_DENSE), SPLIT_DENSE


def train(split, model, devices, parts, update=UPDATE, spoil=lambda state: state, **options):
    """The second half of an epoch of 100 images in batches of 24: batches 2 and 3, and one of 4 images."""
    devices = jax.devices()[:devices]
    step, layout = compiled(model, update, everything_on(split.images), devices, parts, **options)
    state = spoil(jax.device_get(create_state(model, update, (32, 32, 3), jax.random.key(0))))
    shapes = jax.eval_shape(lambda: state)
    state = layout.put(state, devices)
    examples, key = replicate((Examples(split.images, split.labels), jax.random.key(1)), devices)
    metrics = []
    for number in (2, 3, 4):
        call = batches(np.arange(100), 24, len(devices)).part(number)
        state, sums = step(state, examples, call, key)
        metrics.append(jax.device_get(sums))
    return Outcome(jax.device_get(layout.gather(state, shapes)), metrics, state)


def assert_alike(a: Outcome, b: Outcome, tolerance: float = 1e-5) -> None:
    for left, right in zip(a.metrics, b.metrics, strict=True):
        np.testing.assert_allclose(left.loss, right.loss, rtol=tolerance)
        np.testing.assert_array_equal((left.correct, left.count), (right.correct, right.count))
    assert relative_difference(a.state.params, b.state.params) < tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a.state, b.state)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (TinyNetwork(), {"fc1": (8, 16, 20), "logits": (8, 3, 10)}),
        pytest.param(
            AlexNetSmall(initial_bias=0.0),
            {"fc1": (8, 384, 512), "fc2": (8, 64, 512), "logits": (8, 64, 10)},
            marks=pytest.mark.stress,
        ),
    ],
)
def test_hybrid_steps_compute_what_data_parallel_ones_do(tiny, model, parts):
    """With crops, noise, dropout, momentum, weight decay and averaging."""
    data, outcome = (train(tiny["train"], model, 8, hybrid) for hybrid in (False, True))
    assert_alike(data, outcome)
    divided = outcome.placed.divided.params
    assert {name: divided[name]["kernel"].shape for name in split_dense.LAYERS if name in divided} == parts
    for kernel in jax.tree.leaves(outcome.placed.divided):
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, *kernel.shape[1:])}


@pytest.fixture(scope="module")
def tiny_reference(tiny):
    return train(tiny["train"], TinyNetwork(), 1, parts=False)


def test_adam_smoothed_labels_and_parts_of_a_share_in_one_program(tiny):
    traces = 0

    class Counting(TinyNetwork):
        def __call__(self, *args, **kwargs):
            nonlocal traces
            traces += self.dense_axis is not None
            return super().__call__(*args, **kwargs)

    update, _ = optimizer.from_config(OptimizerConfig("adam", 1e-3), 5, 1)
    one = train(tiny["train"], TinyNetwork(), 1, False, update, label_smoothing=0.1)
    halves = functools.partial(gradients.in_parts, number=2, unroll=True)
    assert_alike(
        one, train(tiny["train"], Counting(), 3, True, update, label_smoothing=0.1, sum_gradients=halves), 1e-4
    )
    assert traces == 3  # for the shapes, and once for each part


@pytest.mark.both_lines
def test_several_steps_in_a_call_and_streams(tiny, tiny_reference):
    split, devices = tiny["train"], jax.devices()[:3]
    first = jax.device_get(create_state(TinyNetwork(), UPDATE, (32, 32, 3), jax.random.key(0)))
    calls = batches(np.arange(100), 24, 3).part(2, 3)
    images = Batch(split.images[calls.indices], split.labels[calls.indices], calls.mask)
    for resident, call, fetch in (
        (Examples(split.images, split.labels), calls, ArrayDataset.fetch),
        (None, images, StreamedDataset.fetch),
    ):
        step, layout = compiled(TinyNetwork(), UPDATE, everything_on(split.images), devices, True, fetch)
        state, metrics = step(layout.put(first, devices), resident, call, jax.random.key(1))
        one_each = [jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], metrics) for i in range(3)]
        assert_alike(tiny_reference, Outcome(jax.device_get(layout.gather(state, first)), one_each, state))


def test_an_infinite_weight_of_one_device_stops_all_at_the_next_step(tiny):
    """Kernels of dense layers are not examined, and only the last of 3 devices has this one's row."""

    def spoil(state):
        kernel = state.params["logits"]["kernel"].copy()
        kernel[-1] = 1e30
        return state.replace(params=state.params | {"logits": state.params["logits"] | {"kernel": kernel}})

    update = optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p: jnp.where(p > 1e29, jnp.inf, u), updates, params)
    )
    outcome = train(tiny["train"], TinyNetwork(), 3, parts=True, update=update, spoil=spoil)
    assert [bool(m.finite[0]) for m in outcome.metrics] == [True, False, False]
    assert int(outcome.state.step) == 1


def full_network_after_a_step(parts):
    """AlexNet on 8 devices with 16 random images of 67x67, the smallest it takes."""
    images = np.random.default_rng(0).integers(0, 256, (16, 67, 67, 3), np.uint8)
    devices, model = jax.devices(), AlexNet("paper")
    measured = statistics.Statistics.of(images)
    preprocessing = preprocess.Preprocessing(AugmentationConfig(input_range=255), measured, steps_per_epoch=1)
    step, layout = compiled(model, UPDATE, preprocessing, devices, parts)
    state = jax.device_get(create_state(model, UPDATE, (67, 67, 3), jax.random.key(0)))
    examples = Examples(images, np.arange(16, dtype=np.int32))
    new, metrics = step(layout.put(state, devices), examples, batches(np.arange(16), 16, 8).part(0), jax.random.key(1))
    return jax.device_get((layout.gather(new, state).params, metrics.loss, state.params))


@pytest.mark.stress
def test_the_full_network(capsys):
    (params, loss, before), (other, other_loss, _) = (full_network_after_a_step(parts) for parts in (False, True))
    changes, other_changes = (jax.tree.map(np.subtract, p, before) for p in (params, other))
    difference = relative_difference(changes, other_changes)
    with capsys.disabled():
        print(f"loss {loss[0]!r} and {other_loss[0]!r}, updates differ by {difference:.2g} of their norm at most")
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    assert difference < 1e-3


def test_a_run_continues_with_the_other_parallelism(tiny, tmp_path, monkeypatch):
    """There and back; 3 devices can't have equal parts of 512 rows, and a checkpoint does not show it."""
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)

    def config(name, epochs, parallelism, num_devices):
        config = make_config(tmp_path / name, epochs, parallelism=parallelism, num_devices=num_devices)
        return dataclasses.replace(
            config,
            optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-5),
            schedule=dataclasses.replace(config.schedule, batch_size=24),
        )

    loop.train_and_evaluate(config("data", 3, "data", 2), tiny)
    for epochs, (parallelism, devices) in enumerate((("hybrid", 3), ("data", 2), ("hybrid", 3)), 1):
        loop.train_and_evaluate(config("mixed", epochs, parallelism, devices), tiny)
    (data, _), (mixed, _) = (
        Checkpoints(tmp_path / name / "checkpoints", read_only=True).restore_newest() for name in ("data", "mixed")
    )
    assert relative_difference(data["opt_state"], mixed["opt_state"]) < 1e-2  # the momentum: sums of 15 gradients
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5), data, mixed)
    for got, wanted in zip(comparable(tmp_path / "mixed"), comparable(tmp_path / "data"), strict=True):
        assert got == {k: pytest.approx(v, rel=1e-3) if isinstance(v, float) else v for k, v in wanted.items()}


@pytest.mark.stress
def test_two_processes_compute_what_one_does(tmp_path):
    """Two processes of two devices against data parallelism in the same, and one process of four; then crosswise."""
    flags = ["quickstart", "--batch-size", "16", "--log-every", "1", "--optimizer", "sgd", "--learning-rate", "5e-5"]
    flags += ["--momentum", "0.9", "--weight-decay", "5e-4", "--parallelism"]

    def train_on(name, parallelism, epochs, processes, devices):
        options = [*flags, parallelism, "--epochs", str(epochs)]
        process_faults.finish(process_faults.start(tmp_path / name, processes, devices, options))
        return Checkpoints(tmp_path / name / "checkpoints", read_only=True).restore_newest()[0]["opt_state"]

    def assert_same_losses(name, other):
        for got, wanted in zip(comparable(tmp_path / name), comparable(tmp_path / other), strict=True):
            assert got == {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in wanted.items()}

    data, two, one = (
        train_on(name, parallelism, 1, processes, devices)
        for name, parallelism, processes, devices in (
            ("data", "data", 2, 2), ("two", "hybrid", 2, 2), ("one", "hybrid", 1, 4)
        )
    )  # fmt: skip
    differences = [relative_difference(two, other) for other in (data, one)]
    print(f"the momentum differs by {differences}")
    # One process and two differ by as much in data parallelism: another number of threads, other maxima among equals.
    assert differences[0] < 1e-3
    assert differences[1] < 1e-1
    assert_same_losses("two", "data")
    assert_same_losses("two", "one")
    train_on("two", "hybrid", 2, 1, 4)
    train_on("one", "hybrid", 2, 2, 1)
    assert_same_losses("two", "one")


def test_layers_with_unequal_parts():
    kernel = np.arange(14.0).reshape(7, 2)
    parts = split_dense.split_kernel(kernel, 3)
    assert parts.shape == (3, 3, 2)
    np.testing.assert_array_equal(split_dense.join_kernel(parts, 7), kernel)
    x = np.random.default_rng(0).random((6, 7)).astype(np.float32)
    bias = np.array([1.0, 2.0], np.float32)
    layer = split_dense.SplitDense(2, "devices")
    y = jax.pmap(
        lambda kernel, x: layer.apply({"params": {"kernel": kernel, "bias": jnp.asarray(bias)}}, x),
        axis_name="devices",
        devices=jax.devices()[:3],
    )(parts.astype(np.float32), x.reshape(3, 2, 7))
    np.testing.assert_allclose(np.asarray(y).reshape(6, 2), x @ kernel + bias, rtol=1e-6)
