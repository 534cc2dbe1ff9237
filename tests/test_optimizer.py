import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import optimizer
from alexnet_jax.config import PRESETS


def test_paper_sgd_is_the_papers_update():
    """v <- 0.9 v - 0.0005 lr w - lr g; w <- w + v, with the rate changing on the way."""
    schedule = optimizer.step_schedule(0.1, [3], 0.1)
    update_rule = optimizer.paper_sgd(schedule, 0.9, 5e-4)
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
    _, schedule = optimizer.from_config(PRESETS["cifar10-paper"].config.optimizer, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in (0, 199, 200, 259, 260)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.001, 0.001, 0.0001], rtol=1e-6)


def test_adam_takes_a_first_step_of_the_learning_rate():
    update_rule, _ = optimizer.from_config(PRESETS["cifar10"].config.optimizer, steps_per_epoch=10)
    updates, _ = update_rule.update(jnp.array([3.0, -0.2]), update_rule.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(updates, [-1e-3, 1e-3], rtol=1e-5)
