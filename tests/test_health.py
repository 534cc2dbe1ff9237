import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.network.convnet import ConvNet
from alexnet_jax.network.small import AlexNetSmall
from alexnet_jax.training import health

pytestmark = pytest.mark.both_lines


def test_dead_shares(tiny):
    model = AlexNetSmall()
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    images = jnp.asarray(tiny["test"].images / 255.0, jnp.float32)
    shares = health.dead_shares(model, params, images)
    assert list(shares) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2"]
    assert max(shares.values()) < 0.5
    # A bias far below 0 kills a unit: 12 of the 48 of conv1, all of fc2.
    bias = np.array(params["conv1"]["bias"])
    bias[:12] = -100
    params["conv1"] = params["conv1"] | {"bias": bias}
    params["fc2"] = params["fc2"] | {"bias": np.full(512, -1e4, np.float32)}
    shares = health.dead_shares(model, params, images)
    assert shares["conv1"] == 0.25
    assert shares["fc2"] == 1.0


def test_locally_connected_layers_count():
    model, images = ConvNet("convnet-11pct"), jnp.ones((2, 24, 24, 3))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), images))["params"]
    assert list(health.dead_shares(model, params, images)) == ["conv1", "conv2", "local3", "local4"]


def test_update_ratios():
    before = {"fc1": {"kernel": np.array([[3.0, 4.0]])}}
    after = {"fc1": {"kernel": np.array([[3.0, 4.05]])}}
    np.testing.assert_allclose(health.update_ratios(before, after)["fc1"], 0.01)


def test_the_diagnosis_names_the_likely_cause():
    assert "most units of a layer are dead" in health.diagnosis({"fc1": 0.9}, {"fc1": 1e-3})
    assert "hardly move" in health.diagnosis({"fc1": 0.1}, {"fc1": 1e-7})
    assert "change too much in one update" in health.diagnosis({"fc1": 0.1}, {"fc1": 0.5})
    text = health.diagnosis({"fc1": 0.1, "fc2": 0.25}, {"fc1": 1e-3, "logits": 2e-3})
    assert "neither suggests a cause" in text
    assert "dead units: fc1 10%, fc2 25%; update-to-weight ratio: fc1 1e-03, logits 2e-03" in text
