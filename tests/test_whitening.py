"""Kernels that whiten patches."""

import dataclasses

import jax
import numpy as np
import pytest

from alexnet_jax.training.trainer import Trainer
from alexnet_jax.training.whitening import SMALLEST, whiten
from tests.tiny_runs import make_config


@pytest.fixture
def images():
    """Smooth noise, so that patches have directions."""
    noise = np.random.default_rng(0).normal(size=(60, 20, 20, 3))
    smooth = (noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)) / 3 + noise.mean(axis=3, keepdims=True)
    return (0.3 + 0.2 * smooth).astype(np.float32)


def test_responses_are_uncorrelated_with_variance_one(images):
    kernel = whiten(images, (3, 3, 3, 20))
    responses = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    rows = np.asarray(responses, np.float64).reshape(-1, 20)
    covariance = np.cov(rows[:, :10].T)
    expected = np.diag(np.diag(covariance))
    np.testing.assert_allclose(covariance, expected, atol=1e-4)
    assert (np.diag(covariance) < 1).all()
    # lambda / (lambda + SMALLEST), lambda = 1 / |kernel|^2 - SMALLEST
    lengths = (kernel[..., :10].astype(np.float64) ** 2).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(np.diag(covariance), 1 - SMALLEST * lengths, atol=1e-3)
    assert (np.diff(lengths) > 0).all()  # the direction of the largest variance first
    np.testing.assert_array_equal(kernel[..., 10:], -kernel[..., :10])


def test_a_training_begins_with_them(tiny, tmp_path):
    config = make_config(tmp_path, num_devices=1)
    whitening = dataclasses.replace(config, network=dataclasses.replace(config.network, conv1_init="whitening"))
    he, begun, again = (Trainer(c, tiny, jax.devices()[:1]) for c in (config, whitening, whitening))
    params, others = begun.params(), he.params()
    inputs = np.asarray(begun.preprocessing.evaluation(tiny.sample(1000).images))
    np.testing.assert_array_equal(params["conv1"]["kernel"], whiten(inputs, (7, 7, 3, 48)))
    np.testing.assert_array_equal(params["conv1"]["kernel"], again.params()["conv1"]["kernel"])
    params["conv1"]["kernel"] = others["conv1"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, params, others)  # nothing else is changed
