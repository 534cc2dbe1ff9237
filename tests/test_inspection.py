import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.neighbors import NearestNeighbors

import alexnet_jax
from alexnet_jax.config.settings import NetworkConfig
from alexnet_jax.inspection import activations
from alexnet_jax.network import build, layers, lrn
from alexnet_jax.training import health


@pytest.fixture(scope="module")
def run(small_run):
    return alexnet_jax.open_run(small_run)


@pytest.fixture(scope="module")
def images(tiny):
    return tiny["test"].images[:3]


def test_activations_are_what_the_layers_compute(run, images):
    found = activations.activations(run, images)
    assert list(found)[:8] == [
        *("conv1", "conv1 activation", "conv1 LRN", "conv1 pool"),
        *("conv2", "conv2 activation", "conv2 LRN", "conv2 pool"),
    ]
    assert list(found)[-5:] == ["fc1", "fc1 activation", "fc2", "fc2 activation", "logits"]
    np.testing.assert_array_equal(found["conv1 activation"], np.maximum(found["conv1"], 0))
    np.testing.assert_allclose(
        found["conv1 LRN"], lrn.local_response_norm(found["conv1 activation"]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(found["conv1 pool"], layers.max_pool(found["conv1 LRN"]))
    fc2 = run.params["fc2"]
    np.testing.assert_allclose(
        found["fc2"], found["fc1 activation"] @ fc2["kernel"] + fc2["bias"], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found["logits"], run.logits(images), rtol=1e-4, atol=1e-4)


def test_features_are_activations_of_any_number_of_images(run, tiny):
    images = tiny["test"].images[:5]  # computed as a part of eight
    features = run.features(images / 255, "conv1 pool")
    np.testing.assert_allclose(features, activations.activations(run, images)["conv1 pool"], rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError, match="no 'conv9': the layers and operations are conv1, conv1 activation, "):
        run.features(images, "conv9")


def test_the_nnx_module_gives_the_same_logits(run, images):
    module = run.nnx()
    inputs = run.preprocessing.evaluation(images)
    np.testing.assert_allclose(
        nnx.jit(lambda module, x: module(x))(module, inputs), run.logits(images), rtol=1e-4, atol=1e-5
    )
    before = run.params["conv1"]["bias"].copy()
    module.conv1["bias"][...] += 1
    np.testing.assert_array_equal(run.params["conv1"]["bias"], before)
    assert not np.allclose(module(inputs), run.logits(images), rtol=1e-3, atol=1e-3)


def test_a_second_call_compiles_nothing(run, images, caplog):
    def call():
        activations.activations(run, images[:2])
        activations.hidden_features(run, images[:2])
        activations.input_gradient(run, images[0], label=3)
        activations.input_gradient(run, images[1], label=4)
        health.dead_shares(run.model, run.params, run.preprocessing.evaluation(images[:2]))

    counts = []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles(), warnings.catch_warnings(action="ignore"):
            call()
        counts.append(sum("racing" in record.message or "Compiling" in record.message for record in caplog.records))
    assert counts[0] > 0  # JAX reports it
    assert counts[1] == 0


def test_steps_per_epoch_are_those_of_the_training(run):
    assert run.steps_per_epoch == run.step == 7  # one epoch of 100 images in batches of 16


def test_only_the_requested_layers_are_returned(run, images):
    assert {name: x.shape for name, x in activations.activations(run, images, ["conv2", "conv1 pool"]).items()} == {
        "conv2": (3, 8, 8, 128),
        "conv1 pool": (3, 8, 8, 48),
    }
    with pytest.raises(KeyError, match="conv9"):
        activations.activations(run, images, ["conv9"])
    with pytest.raises(ValueError, match="images must be"):
        activations.activations(run, images[:, :16])


@pytest.mark.parametrize(
    ("network", "side", "expected"),
    [
        ("paper", 67, ["conv1", "conv1 activation", "conv1 LRN", "conv1 pool", "conv2"]),
        ("2012", 67, ["conv1", "conv1 LRN", "conv1 pool", "conv1 activation", "conv2"]),
        ("convnet-18pct", 32, ["conv1", "conv1 pool", "conv1 activation", "conv1 LRN within", "conv2"]),
        ("convnet-11pct", 24, ["conv1", "conv1 activation", "conv1 pool", "conv1 LRN", "conv2"]),
    ],
)
def test_every_network_names_its_operations_in_order(network, side, expected):
    model = build.from_config(NetworkConfig(network=network), 10)
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)

    def names(images):
        variables = model.init(jax.random.key(0), images)
        assert set(variables) == {"params"}  # nothing that was kept lands in a new state
        _, state = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        found.extend(state["intermediates"])

    found: list[str] = []
    jax.eval_shape(names, images)
    assert [name for name in found if name != "__call__"][:5] == expected


def test_without_normalization_none_is_named():
    model = build.from_config(NetworkConfig(network="convnet-11pct", lrn="none"), 10)
    images = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32)

    def names(images):
        _, state = model.apply(model.init(jax.random.key(0), images), images, mutable=["intermediates"])
        found.extend(state["intermediates"])

    found: list[str] = []
    jax.eval_shape(names, images)
    assert found
    assert not any("LRN" in name for name in found)


def test_hidden_features_feed_the_logits(run, tiny):
    images = tiny["test"].images[:7]
    features = activations.hidden_features(run, images, batch_size=3)
    logits = run.params["logits"]
    np.testing.assert_allclose(features @ logits["kernel"] + logits["bias"], run.logits(images), rtol=1e-4, atol=1e-4)


def test_nearest_equals_sklearn():
    rng = np.random.default_rng(0)
    candidates, queries = rng.normal(size=(200, 16)), rng.normal(size=(9, 16))
    expected = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(candidates).kneighbors(queries)[1]
    np.testing.assert_array_equal(activations.nearest(queries, candidates, 5), expected)


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 120, 170])
def test_a_grating_is_selective_for_its_orientation(degrees):
    rows, columns = np.mgrid[:11, :11] - 5
    # Along the stripes the value stays: the phase goes across them. Rows run downwards.
    across = np.sin(np.radians(degrees)) * columns + np.cos(np.radians(degrees)) * rows
    grating = np.cos(across * 1.2)[..., None, None] * np.ones((1, 1, 3, 1))
    found = activations.selectivity(grating)
    assert found.orientation[0] > 0.9
    assert abs((found.angle[0] - degrees + 90) % 180 - 90) < 5
    assert found.colour[0] == pytest.approx(0, abs=1e-12)
    assert found.strength[0] == pytest.approx(np.linalg.norm(grating))


def test_a_coloured_blob_is_selective_for_colour_alone():
    rows, columns = np.mgrid[:11, :11] - 5
    blob = np.exp(-(rows**2 + columns**2) / 8.0)[..., None] * np.array([1.0, -0.5, -0.5])
    found = activations.selectivity(blob[..., None])
    assert found.colour[0] == pytest.approx(1)
    assert found.orientation[0] < 0.01


def test_noise_has_two_thirds_of_its_energy_in_colour():
    noise = activations.selectivity(np.random.default_rng(1).normal(size=(7, 7, 3, 2000)))
    assert noise.colour.mean() == pytest.approx(2 / 3, abs=0.01)
    colour, orientation = activations.selectivity_of_noise(7)
    assert np.mean(noise.colour > colour) == pytest.approx(0.01, abs=0.01)
    assert np.mean(noise.orientation > orientation) == pytest.approx(0.01, abs=0.01)
    assert noise.angle.min() >= 0
    assert noise.angle.max() < 180


def test_a_dead_kernel_is_selective_for_nothing():
    found = activations.selectivity(np.zeros((5, 5, 3, 2)))
    assert found.colour.tolist() == found.orientation.tolist() == found.strength.tolist() == [0, 0]
    with pytest.raises(ValueError, match="kernel must be"):
        activations.selectivity(np.zeros((5, 5, 4, 2)))


def test_the_occlusion_map_covers_a_square_at_each_place(run, images):
    image = images[0]
    found = activations.occlusion_map(run, image, label=2, window=9, stride=5)
    assert found.shape == (7, 7)
    covered = image.copy()
    covered[15 - 4 : 15 + 5, 30 - 4 :] = np.round(run.statistics.basis.mean)
    assert found[3, 6] == pytest.approx(run.predict(covered[None])[0, 2], rel=1e-4)
    covered = image.copy()
    covered[:5, :5] = np.round(run.statistics.basis.mean)
    assert found[0, 0] == pytest.approx(run.predict(covered[None])[0, 2], rel=1e-4)
    as_floats = activations.occlusion_map(run, image / 255, label=2, window=9, stride=5)
    np.testing.assert_allclose(as_floats, found, rtol=1e-4)
    with pytest.raises(ValueError, match="label must be from 0 to 9, not -1"):
        activations.occlusion_map(run, image, label=-1, window=9, stride=5)


def test_the_input_gradient_is_the_slope(run, images):
    gradient = activations.input_gradient(run, images[1], label=4)
    assert gradient.shape == (32, 32, 3)
    direction = gradient / np.linalg.norm(gradient)
    grey = images[1].astype(np.float32)
    step = 0.5  # grey levels
    up, down = (run.logits(np.clip((grey + sign * step * direction) / 255, 0, 1)[None])[0, 4] for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(np.linalg.norm(gradient), rel=0.1)
    with pytest.raises(ValueError, match="label must be from 0 to 9, not 10"):
        activations.input_gradient(run, images[1], label=10)


def test_the_most_confident_mistakes_come_first():
    confidence, right = np.array([0.9, 0.6, 0.7, 0.8]), np.array([True, False, False, False])
    assert activations.confident_mistakes(confidence, right, 2).tolist() == [3, 2]
    assert activations.confident_mistakes(confidence, right, 9).tolist() == [3, 2, 1]
