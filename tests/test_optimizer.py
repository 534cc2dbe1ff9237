import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import OptimizerConfig
from alexnet_jax.training import optimizer

pytestmark = pytest.mark.both_lines


def test_paper_sgd_is_the_papers_update():
    """v <- 0.9 v - 0.0005 lr w - lr g; w <- w + v, with the rate changing on the way."""
    schedule = optimizer.step_schedule(0.1, [3], 0.1)
    update_rule = optimizer.paper_sgd(optimizer.scale_by_rate(schedule), 0.9, 5e-4)
    w = jnp.array([1.0, -2.0])
    state = update_rule.init(w)
    expected_w, v = np.array([1.0, -2.0]), np.zeros(2)
    for step in range(6):
        gradient = np.array([0.5, -1.0]) * (step + 1)
        updates, state = update_rule.update(jnp.asarray(gradient, jnp.float32), state, w)
        w = optax.apply_updates(w, updates)
        rate = 0.1 if step < 3 else 0.01
        v = 0.9 * v - 5e-4 * rate * expected_w - rate * gradient
        expected_w = expected_w + v
        np.testing.assert_allclose(w, expected_w, rtol=1e-5)


def test_drops_come_after_whole_epochs():
    _, schedule = optimizer.from_config(PRESETS["cifar10-paper"].config.optimizer, steps_per_epoch=10, epochs=30)
    rates = [float(schedule(step)) for step in (0, 199, 200, 259, 260)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.001, 0.001, 0.0001], rtol=1e-6)


def test_adam_takes_a_first_step_of_the_learning_rate():
    update_rule, _ = optimizer.from_config(PRESETS["cifar10"].config.optimizer, steps_per_epoch=10, epochs=30)
    updates, _ = update_rule.update(jnp.array([3.0, -0.2]), update_rule.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(updates, [-1e-3, 1e-3], rtol=1e-5)


def test_epochs_that_no_run_reaches():
    last = 2**31 - 1
    config = OptimizerConfig("sgd", 0.01, drop_epochs=(last,), conv1_slow_epoch=last, conv1_stop_epoch=last)
    update_rule, rate = optimizer.from_config(config, steps_per_epoch=7, epochs=9)
    params = {"conv1": {"kernel": jnp.float32(1)}}
    updates, _ = update_rule.update(params, update_rule.init(params), params)
    np.testing.assert_allclose(updates["conv1"]["kernel"], -0.01)
    assert float(rate(60)) == pytest.approx(0.01)


def test_the_2012_programs_factors():
    """Biases learn at twice the rate and do not decay; conv1 slows down, then coasts on its momentum and stops."""
    config = OptimizerConfig(
        "sgd", 0.01, momentum=0.9, weight_decay=5e-4, decay_biases=False, bias_rate=2.0,
        conv1_slow_epoch=2, conv1_stop_epoch=3,
    )  # fmt: skip
    update_rule, _ = optimizer.from_config(config, steps_per_epoch=1, epochs=9)
    params = {name: {"kernel": jnp.float32(3), "bias": jnp.float32(5)} for name in ("conv1", "conv2")}
    gradients = jax.tree.map(jnp.ones_like, params)
    state, v = update_rule.init(params), dict.fromkeys(["conv1", "conv2", "bias1", "bias2"], 0.0)
    for rate1 in (0.01, 0.01, 0.001, 0.0, 0.0):
        updates, state = update_rule.update(gradients, state, params)
        for name, rate in (("1", rate1), ("2", 0.01)):
            v["conv" + name] = 0.9 * v["conv" + name] - rate * (1 + 5e-4 * 3)
            v["bias" + name] = 0.9 * v["bias" + name] - 2 * rate
            np.testing.assert_allclose(updates[f"conv{name}"]["kernel"], v["conv" + name], rtol=1e-5)
            np.testing.assert_allclose(updates[f"conv{name}"]["bias"], v["bias" + name], rtol=1e-5)


def test_a_plateau_lowers_the_rate():
    plateau, scales = optimizer.Plateau(), []
    for accuracy in (0.1, 0.3, 0.3, 0.2, 0.31, 0.31, 0.1, 0.1, 0.1):
        plateau = plateau.after(accuracy, patience=2, factor=0.1)
        scales.append(plateau.scale)
    np.testing.assert_allclose(scales, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert plateau.best == 0.31


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_plateaus_scale_reaches_the_updates(name):
    update_rule, _ = optimizer.from_config(OptimizerConfig(name, 0.5), steps_per_epoch=1, epochs=9)
    params = {"conv1": {"kernel": jnp.ones(2)}}
    state = update_rule.init(params)
    full, _ = update_rule.update(params, state, params)
    tenth, after = update_rule.update(params, optimizer.with_plateau_scale(state, 0.1), params)
    np.testing.assert_allclose(tenth["conv1"]["kernel"], 0.1 * full["conv1"]["kernel"], rtol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_checkpoints_of_the_first_version_fit():
    """Its weight decay was optax's own, which affected the tree of the state."""
    config = PRESETS["cifar10-paper"].config.optimizer
    update_rule, schedule = optimizer.from_config(config, steps_per_epoch=10, epochs=30)
    params = {"conv1": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}}
    old = optax.chain(
        optax.add_decayed_weights(5e-4, lambda params: jax.tree.map(lambda _: True, params)),
        optimizer.scale_by_rate(schedule),
        optax.trace(decay=0.9),
    )
    tree = flax.serialization.to_state_dict(old.init(params))
    state = flax.serialization.from_state_dict(update_rule.init(params), tree)
    assert jax.tree.structure(state) == jax.tree.structure(update_rule.init(params))


def cosine(**settings) -> OptimizerConfig:
    return OptimizerConfig("sgd", 0.1, rate_schedule="cosine", **settings)


def test_cosine_rises_and_falls_to_zero():
    _, schedule = optimizer.from_config(cosine(warmup_epochs=0.5), steps_per_epoch=10, epochs=4)
    rates = [float(schedule(step)) for step in range(41)]
    np.testing.assert_allclose(rates[:6], [0.0, 0.02, 0.04, 0.06, 0.08, 0.1], atol=1e-7)
    falling = [0.05 * (1 + np.cos(np.pi * step / 35)) for step in range(36)]
    np.testing.assert_allclose(rates[5:], falling, atol=1e-7)
    _, all_warm = optimizer.from_config(cosine(warmup_epochs=0.99), steps_per_epoch=10, epochs=1)
    np.testing.assert_allclose([float(all_warm(step)) for step in (0, 9)], [0.0, 0.1], atol=1e-7)
    _, at_once = optimizer.from_config(cosine(), steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose(float(at_once(0)), 0.1, rtol=1e-6)


def test_nesterov_looks_ahead():
    """With v <- 0.9 v - lr g, the weights move by 0.9 v - lr g."""
    rate = optimizer.scale_by_rate(optimizer.step_schedule(0.1, [], 0.1))
    update_rule = optimizer.paper_sgd(rate, 0.9, 0.0, nesterov=True)
    w, state, v = jnp.zeros(1), update_rule.init(jnp.zeros(1)), 0.0
    for gradient in (1.0, -3.0, 2.0):
        updates, state = update_rule.update(jnp.array([gradient]), state, w)
        v = 0.9 * v - 0.1 * gradient
        np.testing.assert_allclose(updates, [0.9 * v - 0.1 * gradient], rtol=1e-5)


def test_layers_have_weight_decays_of_their_own():
    config = OptimizerConfig(
        "sgd", 0.1, weight_decay=0.5, decay_biases=False, layer_decays=(("logits", 2.0), ("conv1", 0.0))
    )
    update_rule, _ = optimizer.from_config(config, steps_per_epoch=1, epochs=1)
    params = {name: {"kernel": jnp.ones(1), "bias": jnp.ones(1)} for name in ("conv1", "conv2", "logits")}
    updates, _ = update_rule.update(jax.tree.map(jnp.zeros_like, params), update_rule.init(params), params)
    for name, decay in (("conv1", 0.0), ("conv2", 0.5), ("logits", 2.0)):
        np.testing.assert_allclose(updates[name]["kernel"], [-0.1 * decay], rtol=1e-6)
        np.testing.assert_array_equal(updates[name]["bias"], [0.0])


def test_muon_evens_out_singular_values():
    """Kernels get a matrix whose singular values are all alike, of root mean square 0.2, biases what Adam gives."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (5, 5, 8, 16), "fc": (64, 32)}
    # A bias is one whatever its shape: locally connected layers have maps of them.
    params = {name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros((1, 3))} for name, shape in shapes.items()}
    # One direction is a hundred times as strong as the others: plain momentum would follow it alone.
    gradients = {}
    for name, shape in shapes.items():
        matrix = rng.normal(size=(np.prod(shape[:-1]), shape[-1]))
        matrix += 100 * np.outer(rng.normal(size=len(matrix)), rng.normal(size=shape[-1])) / 10
        gradients[name] = {"kernel": jnp.float32(matrix.reshape(shape)), "bias": jnp.array([[4.0, -0.5, 0.01]])}
    config = OptimizerConfig("muon", 0.1, momentum=0.9)
    update_rule, _ = optimizer.from_config(config, steps_per_epoch=1, epochs=1)
    updates, _ = update_rule.update(gradients, update_rule.init(params), params)
    for name, shape in shapes.items():
        update = np.asarray(updates[name]["kernel"]).reshape(-1, shape[-1])
        singular = np.linalg.svd(np.asarray(gradients[name]["kernel"]).reshape(-1, shape[-1]), compute_uv=False)
        assert singular[0] / np.median(singular) > 20
        after = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * np.sqrt(len(update)))
        assert 0.3 < np.median(after) < 1.3
        assert after.max() < 1.5
        assert (update * np.asarray(gradients[name]["kernel"]).reshape(update.shape)).sum() < 0  # downhill
        np.testing.assert_allclose(updates[name]["bias"], [[-0.1, 0.1, -0.1]], rtol=1e-3)


def test_muons_weight_decay_keeps_out_of_its_momentum():
    config = OptimizerConfig("muon", 0.1, momentum=0.9, weight_decay=0.5, decay_biases=False)
    update_rule, _ = optimizer.from_config(config, steps_per_epoch=1, epochs=1)
    params = {"fc": {"kernel": jnp.full((4, 4), 3.0), "bias": jnp.ones(4)}}
    state = update_rule.init(params)
    for _ in range(3):
        updates, state = update_rule.update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_allclose(updates["fc"]["kernel"], np.full((4, 4), -0.1 * 0.5 * 3.0), rtol=1e-5)
        np.testing.assert_allclose(updates["fc"]["bias"], np.zeros(4), atol=1e-7)


def test_the_average_follows_the_parameters():
    config = OptimizerConfig("sgd", 1.0, average_decay=0.9)
    update_rule, _ = optimizer.from_config(config, steps_per_epoch=1, epochs=1)
    params = {"w": jnp.array([0.0])}
    state = update_rule.init(params)
    w = average = 0.0
    for step in range(200):
        updates, state = update_rule.update({"w": jnp.array([-0.1])}, state, params)
        params = optax.apply_updates(params, updates)
        w += 0.1
        d = min(0.9, (1 + step) / (10 + step))
        average = d * average + (1 - d) * w
    np.testing.assert_allclose(optimizer.averaged(state, params)["w"], [average], rtol=1e-4)
    assert abs(average - w) > 0.5
    plain, _ = optimizer.from_config(OptimizerConfig(), steps_per_epoch=1, epochs=1)
    assert optimizer.averaged(plain.init(params), params) is params
