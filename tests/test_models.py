import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.config import NetworkConfig
from alexnet_jax.models import AlexNetSmall, from_config


@jax.jit
def predict(params, images):
    return AlexNetSmall().apply({"params": params}, images)


@pytest.fixture(scope="module")
def params():
    return jax.jit(AlexNetSmall().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


def test_parameters_are_the_seeds(params):
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {
        "conv1": (7, 7, 3, 48),
        "conv2": (5, 5, 48, 128),
        "conv3": (3, 3, 128, 192),
        "conv4": (3, 3, 192, 192),
        "conv5": (3, 3, 192, 192),
        "fc1": (4 * 4 * 192, 512),
        "fc2": (512, 512),
        "logits": (512, 10),
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_887_306
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_initial_values(params):
    for layer in params.values():
        kernel = np.asarray(layer["kernel"])
        fan_in = np.prod(kernel.shape[:-1])
        # The spread of a sample's standard deviation is about 1 / sqrt(2 size); the smallest kernel has 5,120 weights.
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / fan_in), rtol=0.05)
        np.testing.assert_array_equal(layer["bias"], 1.0)


def test_each_image_is_classified_by_itself(params):
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    together = predict(params, images)
    alone = jnp.concatenate([predict(params, image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (4, 10)


def test_dropout_is_on_only_with_keys(params):
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    off = predict(params, images)
    on = jax.jit(AlexNetSmall().apply)({"params": params}, images, jax.random.split(jax.random.key(2), 2))
    assert float(jnp.abs(on - off).max()) > 0.1
    np.testing.assert_array_equal(off, predict(params, images))


def test_both_hidden_layers_are_dropped(params):
    def hidden(name):
        _, tree = AlexNetSmall().apply(
            {"params": params},
            jnp.ones((1, 32, 32, 3)),
            jax.random.split(jax.random.key(3), 1),
            capture_intermediates=lambda module, _: module.name in ("fc1", "fc2", "logits"),
        )
        return tree["intermediates"][name]["__call__"][0]

    def gradient(layer):
        def logit(kernel):
            changed = params | {layer: params[layer] | {"kernel": kernel}}
            keys = jax.random.split(jax.random.key(3), 1)
            return AlexNetSmall().apply({"params": changed}, jnp.ones((1, 32, 32, 3)), keys)[0, 0]

        return jax.jit(jax.grad(logit))(params[layer]["kernel"])

    # A dropped input gets no gradient on its row of the next kernel. ReLU alone silences fewer: biases begin at 1.
    for following, before in (("fc2", "fc1"), ("logits", "fc2")):
        silent = np.asarray(jnp.all(gradient(following) == 0, axis=1))
        relu_off = np.asarray(hidden(before)[0] <= 0)
        dropped = silent & ~relu_off
        assert 0.4 < dropped.sum() / (~relu_off).sum() < 0.6


def test_bfloat16_computes_narrow_and_answers_wide(params):
    images = jax.random.uniform(jax.random.key(1), (8, 32, 32, 3))
    wide = predict(params, images)
    narrow = jax.jit(AlexNetSmall(dtype=jnp.bfloat16).apply)({"params": params}, images)
    assert narrow.dtype == jnp.float32
    error = float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide))
    assert 1e-5 < error < 0.05  # rounded, but not wrong


def test_both_ways_to_convolve_agree(params):
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)

    def loss(params, convolution):
        return from_config(NetworkConfig(convolution=convolution), 10).apply({"params": params}, images).var()

    (direct, wanted), (products, got) = (
        jax.jit(jax.value_and_grad(lambda p, c=convolution: loss(p, c)))(params) for convolution in ("direct", "auto")
    )
    assert direct != products  # on a CPU "auto" is another computation
    np.testing.assert_allclose(products, direct, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
