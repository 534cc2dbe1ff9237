import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import optimizer
from alexnet_jax.config import PRESETS, OptimizerConfig


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
