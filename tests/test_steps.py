import functools
import os

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data.batches import Batch, batches, epoch_order
from alexnet_jax.data.dataset import ArrayDataset, Examples
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.data.streamed import StreamedDataset
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import AXIS, replicate, select_devices
from alexnet_jax.errors import UsageError
from alexnet_jax.network.layers import bias_in_float32
from alexnet_jax.training import gradients, optimizer, predict
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step, train_step
from tests.tiny_runs import UPDATE, TinyNetwork, everything_on, relative_difference


def without_augmentation(images: np.ndarray, **settings) -> preprocess.Preprocessing:
    return preprocess.Preprocessing(AugmentationConfig(**settings), Statistics.of(images), steps_per_epoch=1)


def compiled(model, update, preprocessing, devices, fetch=ArrayDataset.fetch, **options):
    step = functools.partial(train_step, model=model, optimizer=update, preprocess=preprocessing, **options)
    return compile_train_step(step, devices, fetch)


def train(split, num_devices: int, num_steps: int, seed: int = 1, steps_per_call: int = 1):
    """Trains with everything on; 100 images in batches of 16 leave a padded last batch of 4 in each pass."""
    devices = jax.devices()[:num_devices]
    model = TinyNetwork()
    step = compiled(model, UPDATE, everything_on(split.images), devices)
    state = create_state(model, UPDATE, (32, 32, 3), jax.random.key(0))
    initial = jax.device_get(state.params)
    state = replicate(state, devices)
    key = replicate(jax.random.key(seed), devices)
    metrics, epoch = [], 0
    examples = replicate(Examples(split.images, split.labels), devices)
    while len(metrics) < num_steps:
        layout = batches(epoch_order(0, epoch, len(split)), 16, num_devices)
        for first in range(0, 7, steps_per_call):
            count = min(steps_per_call, 7 - first, num_steps - len(metrics))
            if count == 0:
                break
            state, m = step(state, examples, layout.part(first, count), key)
            m = jax.device_get(m)
            metrics += [jax.tree.map(lambda x, i=i: x[i], m) for i in range(count)]
        epoch += 1
    return initial, jax.device_get(state), metrics, step


@pytest.fixture(scope="module")
def one_device(tiny):
    return train(tiny["train"], 1, 20)


@pytest.mark.both_lines
def test_more_devices_compute_the_same(tiny, one_device):
    _, expected, expected_metrics, _ = one_device
    _, state, metrics, _ = train(tiny["train"], 8, 20)
    assert relative_difference(expected.params, state.params) < 1e-4
    assert [m.count for m in metrics] == [m.count for m in expected_metrics]
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in expected_metrics], rtol=1e-3)


@pytest.mark.stress  # the short form is in test_loop.py
def test_many_steps_in_one_call_compute_the_same(tiny, one_device):
    """Calls of 3, 3 and 1 steps in each pass of 7."""
    _, expected, expected_metrics, _ = one_device
    _, state, metrics, _ = train(tiny["train"], 8, 20, steps_per_call=3)
    assert int(state.step) == 20
    assert relative_difference(expected.params, state.params) < 1e-4
    assert [m.count for m in metrics] == [m.count for m in expected_metrics]
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in expected_metrics], rtol=1e-3)


class Narrow(nn.Module):
    """Computes in bfloat16."""

    @nn.compact
    def __call__(self, images, dropout_keys=None):
        options = {"dtype": jnp.bfloat16, "promote_dtype": bias_in_float32}
        x = nn.Conv(8, (5, 5), strides=4, name="conv1", **options)(images)
        return nn.Dense(10, name="logits", **options)(nn.relu(x).reshape(len(x), -1)).astype(jnp.float32)


def test_kernels_in_bfloat16_are_those_of_the_last_update(tiny):
    """Calls of three steps, in which an update writes them, and of one, in which the network converts them."""
    model, split, devices = Narrow(), tiny["train"], jax.devices()[:1]
    call = batches(epoch_order(0, 0, len(split)), 16, 1)
    initial = create_state(model, UPDATE, (32, 32, 3), jax.random.key(0))
    resident, key = replicate((Examples(split.images, split.labels), jax.random.key(1)), devices)

    def trained(dtype: str, number: int) -> jax.Array:
        step = functools.partial(train_step, model=model, optimizer=UPDATE, preprocess=everything_on(split.images))
        compiled = compile_train_step(step, devices, ArrayDataset.fetch, dtype=dtype)
        state = replicate(initial, devices)
        for first in range(0, 6, number):
            state, _ = compiled(state, resident, call.part(first, number), key)
        return jax.device_get(state.params)

    one, three, converted = trained("bfloat16", 1), trained("bfloat16", 3), trained("float32", 3)
    assert relative_difference(converted, three) == 0
    assert relative_difference(one, three) < 1e-3


@pytest.mark.both_lines
def test_other_draws_would_be_seen(tiny, one_device):
    """The bounds above are far below the effect of other crops, noise and masks."""
    _, expected, expected_metrics, _ = one_device
    _, state, metrics, _ = train(tiny["train"], 1, 20, seed=2)
    assert relative_difference(expected.params, state.params) > 1e-3
    assert abs(metrics[0].loss / expected_metrics[0].loss - 1) > 0.01


@pytest.mark.both_lines
def test_every_parameter_gets_a_gradient_and_moves(one_device):
    initial, state, _, _ = one_device
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(initial), jax.tree.leaves(state.params), strict=True
    ):
        moved = np.asarray(before) != np.asarray(after)
        assert moved.mean() > 0.99, jax.tree_util.keystr(path)


def test_gradient_without_weight_decay_reaches_every_tensor(tiny):
    split, model = tiny["train"], TinyNetwork()
    update = optax.sgd(1.0)
    step = compiled(model, update, everything_on(split.images), jax.devices()[:1])
    state = create_state(model, update, (32, 32, 3), jax.random.key(0))
    before = jax.device_get(state.params)
    batch = batches(np.arange(100), 16, 1).part(0)
    examples = Examples(split.images, split.labels)
    after, _ = step(replicate(state, jax.devices()[:1]), examples, batch, jax.random.key(1))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(jax.device_get(after.params)), strict=True
    ):
        assert np.abs(x - y).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.both_lines
def test_the_step_compiles_once(tiny):
    """Full batches, a padded batch, another epoch, the colour noise switched off: one program."""
    traces = 0

    class Counting(TinyNetwork):
        def __call__(self, *args, **kwargs):
            nonlocal traces
            traces += 1
            return super().__call__(*args, **kwargs)

    split, devices = tiny["train"], jax.devices()[:2]
    model = Counting()
    step = compiled(model, UPDATE, everything_on(split.images), devices)
    state = replicate(create_state(model, UPDATE, (32, 32, 3), jax.random.key(0)), devices)
    key = replicate(jax.random.key(1), devices)
    traces = 0
    examples = replicate(Examples(split.images, split.labels), devices)
    for epoch in range(3):
        layout = batches(epoch_order(0, epoch, 100), 16, 2)
        for first in range(7):
            state, _ = step(state, examples, layout.part(first), key)
    assert int(state.step) == 21
    assert traces == 1


@pytest.mark.both_lines
def test_padding_changes_nothing(tiny):
    """A batch of 4 in room for 16 gives the update of a batch of 4."""
    split, devices = tiny["train"], jax.devices()[:1]
    model, update = TinyNetwork(dropout_rate=0.0), optax.sgd(0.01)
    preprocessing = without_augmentation(split.images)
    results = []
    for size in (4, 16):
        step = compiled(model, update, preprocessing, devices)
        state = replicate(create_state(model, update, (32, 32, 3), jax.random.key(0)), devices)
        examples, batch = Examples(split.images, split.labels), batches(np.arange(4), size, 1)
        results.append(jax.device_get(step(state, examples, batch, jax.random.key(1))))
    (short, short_metrics), (padded, padded_metrics) = results
    assert relative_difference(short.params, padded.params) < 1e-6
    assert padded_metrics.count == short_metrics.count == 4
    np.testing.assert_allclose(padded_metrics.loss, short_metrics.loss, rtol=1e-5)


def test_metrics_are_sums_of_the_true_loss(tiny):
    split, devices = tiny["train"], jax.devices()[:2]
    model = TinyNetwork(dropout_rate=0.0)
    step = compiled(model, UPDATE, without_augmentation(split.images), devices)
    state = create_state(model, UPDATE, (32, 32, 3), jax.random.key(0))
    logits = np.asarray(
        jax.jit(model.apply)({"params": state.params}, jnp.asarray(split.images[:16] / 255.0, jnp.float32))
    )
    examples, batch = Examples(split.images, split.labels), batches(np.arange(100), 16, 2).part(0)
    _, metrics = step(replicate(state, devices), examples, batch, jax.random.key(1))
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = e / e.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.loss[0], -np.log(probabilities[range(16), split.labels[:16]]).sum(), rtol=1e-5)
    assert int(metrics.correct[0]) == (logits.argmax(axis=1) == split.labels[:16]).sum()


@pytest.mark.both_lines
@pytest.mark.parametrize(
    ("num_devices", "batch_size", "count"),
    [(1, 1, 7), (1, 64, 64), (1, 64, 65), (2, 1, 1), (2, 100, 63), (4, 64, 70), (8, 1, 7), (8, 64, 65)],
)
def test_every_image_is_predicted_once_and_in_order(tiny, num_devices, count, batch_size):
    class MeanLevel(nn.Module):
        @nn.compact
        def __call__(self, images, dropout_keys=None):
            return images.mean(axis=(1, 2))

    images, devices = tiny["test"].images[:count], jax.devices()[:num_devices]
    step = predict.make_predict_step(MeanLevel(), without_augmentation(images), devices)
    logits = predict.predict_logits(step, {}, images, batch_size, num_devices)
    np.testing.assert_allclose(logits, images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def tiny_update(split, num_devices: int, streamed: bool = False, **options):
    """The state after a padded batch of 12 images, and the step's metrics."""
    devices = jax.devices()[:num_devices]
    model, update = TinyNetwork(), optax.sgd(1.0)
    state = replicate(create_state(model, update, (32, 32, 3), jax.random.key(0)), devices)
    layout = batches(np.arange(20, 32), 16, num_devices)
    resident, call, fetch = Examples(split.images, split.labels), layout, ArrayDataset.fetch
    if streamed:  # each call brings its own images
        resident, fetch = None, StreamedDataset.fetch
        call = Batch(split.images[layout.indices], split.labels[layout.indices], layout.mask)
    step = compiled(model, update, everything_on(split.images), devices, fetch, **options)
    return jax.device_get(step(state, resident, call, replicate(jax.random.key(1), devices)))


IN_TWO_PARTS = [functools.partial(gradients.in_parts, number=2, unroll=unroll) for unroll in (True, False)]


@pytest.mark.parametrize(
    ("num_devices", "options"),
    [
        (2, {"sum_gradients": IN_TWO_PARTS[0]}),
        (2, {"sum_gradients": IN_TWO_PARTS[1]}),
        (2, {"sum_gradients": gradients.in_fixed_order}),
        (4, {"streamed": True}),
    ],
)
def test_parts_and_streams_give_the_same_update(tiny, num_devices, options):
    state, metrics = tiny_update(tiny["train"], 1)
    other_state, other_metrics = tiny_update(tiny["train"], num_devices, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, other_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, other_metrics)
    assert int(metrics.count[0]) == 12


def test_views_are_averaged_as_probabilities(tiny):
    images, devices = tiny["test"].images[:6], jax.devices()[:2]
    preprocessing = without_augmentation(images, crop_size=24)
    model = TinyNetwork()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]
    apply = jax.jit(model.apply)
    params = jax.tree.map(lambda x: 20 * x, params)  # far from the linear part of the softmax
    step = predict.make_predict_step(model, preprocessing, devices, views=10)
    logits = predict.predict_logits(step, params, images, 6, 2)
    expected = np.zeros((6, 10))
    for row, column in ((4, 4), (0, 0), (0, 8), (8, 0), (8, 8)):
        for mirrored in (images, images[:, :, ::-1]):
            flipped = mirrored is not images
            left = 8 - column if flipped else column  # the same window, then mirrored
            window = mirrored[:, row : row + 24, left : left + 24] / 255
            expected += np.asarray(jax.nn.softmax(apply({"params": params}, window))) / 10
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(logits)), expected, atol=1e-6)
    assert np.ptp(expected) > 0.1


def deterministic_state(split, devices_at, sum_gradients=gradients.in_fixed_order):
    """The state after 9 steps on `devices_at(step)` devices; the seventh batch of each pass is padded."""
    programs, model = {}, TinyNetwork()
    update = optimizer.paper_sgd(optimizer.scale_by_rate(optimizer.step_schedule(0.01, [15], 0.1)), 0.9, 5e-4)
    state = jax.device_get(create_state(model, update, (32, 32, 3), jax.random.key(0)))
    for number in range(9):
        count = devices_at(number)
        devices = jax.devices()[:count]
        if count not in programs:
            programs[count] = compiled(model, update, everything_on(split.images), devices, sum_gradients=sum_gradients)
        batch = batches(epoch_order(0, number // 7, len(split)), 16, count).part(number % 7)
        arguments = Examples(split.images, split.labels), batch, jax.random.key(1)
        state = jax.device_get(programs[count](replicate(state, devices), *arguments)[0])
    return state


def test_deterministic_steps_compute_the_same_bits(tiny):
    """On one device, and changing over from 8 to 2; the long form: tests/stress/devices.py."""
    split = tiny["train"]
    one = deterministic_state(split, lambda step: 1)
    changing = deterministic_state(split, lambda step: 8 if step < 5 else 2)
    jax.tree.map(np.testing.assert_array_equal, one, changing)
    # At once the bits differ, so that equality above says something.
    plain = deterministic_state(split, lambda step: 2, gradients.at_once)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(plain), strict=True))


def test_a_part_computes_with_nothing_but_its_own_inputs(tiny):
    """With --deterministic. What a part took from outside, the compiler could merge with the neighbouring parts: then
    the bits depend on the number of parts. With AlexNetSmall and full optimization they did.
    """
    split, model = tiny["train"], TinyNetwork()
    preprocessing = everything_on(split.images)
    rule = optax.sgd(0.1)
    step = functools.partial(
        train_step, model=model, optimizer=rule, preprocess=preprocessing, sum_gradients=gradients.in_fixed_order
    )
    state = create_state(model, rule, (32, 32, 3), jax.random.key(0))
    batch = Batch(split.images[:8], split.labels[:8], np.ones(8, bool))
    jaxpr = jax.make_jaxpr(step, axis_env=[(AXIS, 2)])(state, batch, jax.random.key(0)).jaxpr
    barriers = [  # LRN's own have one operand
        n for n, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == "optimization_barrier" and len(eqn.invars) > 1
    ]
    made_by = {var: n for n, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    made_by |= dict.fromkeys(jaxpr.invars, -1)
    for begin, end in zip(barriers[0:8:2], barriers[1:8:2], strict=True):  # 4 parts on each of 2 devices
        for eqn in jaxpr.eqns[begin + 1 : end + 1]:
            inputs = [var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)]
            outside = [var for var in inputs if made_by.get(var, begin) < begin]
            assert outside == [], eqn


@pytest.mark.both_lines
def test_select_devices():
    assert len(select_devices(3)) == 3
    assert len(select_devices(None)) == 8
    with pytest.raises(UsageError, match="--num-devices 99, but JAX sees only 8"):
        select_devices(99)


def test_deterministic_sets_xlas_flag_in_time(monkeypatch):
    class Gpu:
        platform = "gpu"

    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
    monkeypatch.setenv("NPROC", "")
    select_devices(1, deterministic=True)
    assert os.environ["XLA_FLAGS"] == "--xla_some=1 --xla_gpu_deterministic_ops=true"
    assert os.environ["NPROC"] == "8"
    monkeypatch.setattr(runtime, "devices", lambda: [Gpu()])
    monkeypatch.setattr(processes, "local", lambda devices: devices)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert len(select_devices(1, deterministic=True)) == 1
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax.config, "update", refused)  # as after JAX has started
    for _ in range(2):  # the first call leaves nothing that the second would take for a flag that XLA has read
        with pytest.raises(UsageError, match="--deterministic: JAX has been used already"):
            select_devices(1, deterministic=True)


def refused(name, value):
    raise RuntimeError(name)


def test_label_smoothing_spreads_a_share_of_the_label(tiny):
    """The gradient is that of the cross entropy with smoothed targets, the metric that of the plain ones."""
    split, model, devices = tiny["train"], TinyNetwork(dropout_rate=0.0), jax.devices()[:1]
    preprocessing = without_augmentation(split.images)
    update = optax.sgd(1.0)
    step = compiled(model, update, preprocessing, devices, label_smoothing=0.3)
    before = create_state(model, update, (32, 32, 3), jax.random.key(0))
    params = jax.device_get(before.params)
    layout = batches(np.arange(100), 16, 1).part(6)  # 4 images and 12 of padding
    examples = Examples(split.images, split.labels)
    after, metrics = step(replicate(before, devices), examples, layout, jax.random.key(1))

    def losses(params):
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, split.images[96:] / np.float32(255)))
        plain = jax.nn.one_hot(split.labels[96:], 10)
        smoothed, plain = (-(t * log_probabilities).sum(axis=1).mean() for t in (0.7 * plain + 0.03, plain))
        return smoothed, plain

    gradient, plain = jax.jit(jax.grad(losses, has_aux=True))(params)
    np.testing.assert_allclose(metrics.loss[0] / 4, plain, rtol=1e-5)
    taken = jax.tree.map(lambda old, new: old - new, params, jax.device_get(after.params))
    assert relative_difference(jax.device_get(gradient), taken) < 1e-3


@pytest.mark.parametrize(
    ("layer", "finite"),
    [
        ({"kernel": np.ones((2, 2)), "bias": np.ones(2)}, True),
        ({"kernel": np.ones((2, 2)), "bias": np.array([0, np.nan])}, False),
        ({"kernel": np.array([[0, np.inf]])}, False),
    ],
)
def test_of_a_layer_without_a_bias_the_kernels_gradient_is_examined(layer, finite):
    gradient = {"fc1": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}, "logits": layer}
    assert gradients.all_finite(jnp.float32(1), gradient) == finite
    assert not gradients.all_finite(jnp.float32(np.inf), gradient)
