import pathlib
import re
import runpy
import typing

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.signal import convolve2d

from alexnet_jax.config.settings import NetworkConfig
from alexnet_jax.errors import AlexNetError
from alexnet_jax.network import build, split_dense
from alexnet_jax.network.alexnet import LAYERS, VARIANTS, AlexNet
from alexnet_jax.network.build import from_config
from alexnet_jax.network.layer_counts import count_layers
from alexnet_jax.network.lrn import local_response_norm
from alexnet_jax.network.lrn_within_channel import local_response_norm_within_channel
from alexnet_jax.network.operations import Operation
from alexnet_jax.network.small import AlexNetSmall

COLUMNS = ("one-column", "torchvision")  # variants without towers


@jax.jit
def predict(params, images):
    return AlexNetSmall().apply({"params": params}, images)


@pytest.fixture(scope="module")
def params():
    return jax.jit(AlexNetSmall().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


@pytest.mark.both_lines
def test_parameters_are_the_posts(params):
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
    on = jax.jit(AlexNetSmall().apply)({"params": params}, images, jax.random.split(jax.random.key(2), (2, 2)))
    assert float(jnp.abs(on - off).max()) > 0.1
    np.testing.assert_array_equal(off, predict(params, images))


def test_both_hidden_layers_are_dropped(params):
    @jax.jit
    def hidden():
        _, tree = AlexNetSmall().apply(
            {"params": params},
            jnp.ones((1, 32, 32, 3)),
            jax.random.split(jax.random.key(3), (1, 2)),
            capture_intermediates=lambda module, _: module.name in ("fc1", "fc2", "logits"),
        )
        return {name: tree["intermediates"][name]["__call__"][0] for name in ("fc1", "fc2")}

    @jax.jit
    @jax.grad
    def gradients(params):
        keys = jax.random.split(jax.random.key(3), (1, 2))
        return AlexNetSmall().apply({"params": params}, jnp.ones((1, 32, 32, 3)), keys)[0, 0]

    outputs, gradient = hidden(), gradients(params)
    # A dropped input gets no gradient on its row of the next kernel. ReLU alone silences fewer: biases begin at 1.
    for following, before in (("fc2", "fc1"), ("logits", "fc2")):
        silent = np.asarray(jnp.all(gradient[following]["kernel"] == 0, axis=1))
        relu_off = np.asarray(outputs[before][0] <= 0)
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


def logits_of(images, **settings):
    """Logits of a small network with these settings, and its parameters, with biases of 0 (needed for tanh)."""
    model = from_config(NetworkConfig(initial_bias=0.0, **settings), 10)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    return np.asarray(jax.jit(model.apply)({"params": params}, images)), params


def by_hand(images, params, activation, normalize, window, stride):
    """The small network from Flax's functions."""

    def conv(x, layer, step=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = layer["kernel"]
        y = jax.lax.conv_general_dilated(x, kernel, (step, step), "SAME", dimension_numbers=numbers)
        return activation(y + layer["bias"][None, None, None])

    x = conv(images, params["conv1"], stride)
    x = nn.max_pool(normalize(x), (window, window), (2, 2), "SAME")
    x = nn.max_pool(normalize(conv(x, params["conv2"])), (window, window), (2, 2), "SAME")
    for name in ("conv3", "conv4", "conv5"):
        x = conv(x, params[name])
    x = x.reshape(len(x), -1)
    for name in ("fc1", "fc2"):
        x = activation(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["logits"]["kernel"] + params["logits"]["bias"][None]


@pytest.mark.parametrize(
    ("settings", "activation", "normalize", "window", "stride"),
    [
        ({}, nn.relu, local_response_norm, 3, 2),
        ({"activation": "tanh"}, jnp.tanh, local_response_norm, 3, 2),
        ({"lrn": "none"}, nn.relu, lambda x: x, 3, 2),
        ({"lrn": "divided"}, nn.relu, lambda x: local_response_norm(x, divide_by_size=True), 3, 2),
        ({"pool_window": 2}, nn.relu, local_response_norm, 2, 2),
        ({"conv1_stride": 1}, nn.relu, local_response_norm, 3, 1),
    ],
)
def test_options_of_the_small_network(settings, activation, normalize, window, stride):
    # So large that normalization is strong, except for tanh, which would saturate.
    images = np.random.default_rng(0).uniform(0, 1 if settings.get("activation") else 300, (2, 32, 32, 3))
    images = images.astype(np.float32)
    logits, params = logits_of(images, **settings)
    expected = jax.jit(lambda images, params: by_hand(images, params, activation, normalize, window, stride))(
        images, params
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if settings and stride == 2:  # with another stride fc1 has other weights
        usual, _ = logits_of(images)
        assert np.abs(usual - logits).max() > 1e-3 * np.abs(logits).max()


def test_the_posts_mistake_drops_after_fc1_alone(params):
    """The logits of dropout after both layers and after the first differ by what the second mask takes away."""
    images, keys = jnp.ones((1, 32, 32, 3)), jax.random.split(jax.random.key(3), (1, 2))

    def gradient(dropout_after):
        model = from_config(NetworkConfig(dropout_after=dropout_after), 10)

        def logit(kernel):
            changed = params | {"logits": params["logits"] | {"kernel": kernel}}
            return model.apply({"params": changed}, images, keys)[0, 0]

        return np.asarray(jax.jit(jax.grad(logit))(params["logits"]["kernel"]))[:, 0]  # = the inputs of the logits

    both, first = gradient("both"), gradient("fc1")
    active = first > 0
    assert active.sum() > 100
    kept = both > 0
    assert 0.4 < kept[active].mean() < 0.6
    assert not kept[~active].any()
    np.testing.assert_allclose(both[kept], 2 * first[kept], rtol=1e-5)


CONVNET_SHAPES = {
    "convnet-18pct": {
        "conv1": (5, 5, 3, 32), "conv2": (5, 5, 32, 32), "conv3": (5, 5, 32, 64), "logits": (4 * 4 * 64, 10),
    },
    "convnet-11pct": {
        "conv1": (5, 5, 3, 64), "conv2": (5, 5, 64, 64), "local3": (6, 6, 3, 3, 64, 64),
        "local4": (6, 6, 3, 3, 64, 32), "logits": (6 * 6 * 32, 10),
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", CONVNET_SHAPES)
def test_four_layer_networks_are_cuda_convnets(variant):
    side = 24 if variant == "convnet-11pct" else 32
    images = np.random.default_rng(0).uniform(-120, 120, (2, side, side, 3)).astype(np.float32)
    params = jax.jit(from_config(NetworkConfig(network=variant), 10).init)(jax.random.key(0), images)["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == CONVNET_SHAPES[variant]
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(params))
        == {"convnet-18pct": 89_578, "convnet-11pct": 2_112_970}[variant]
    )
    deviations = {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "local3": 0.04, "local4": 0.04, "logits": 0.01}
    for name, layer in params.items():
        np.testing.assert_allclose(layer["kernel"].std(), deviations[name], rtol=0.05)
        assert not layer["bias"].any()
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: rng.normal(0, 2 / np.sqrt(np.prod(p.shape[-4:-1])), p.shape).astype(np.float32), params
    )

    def conv(x, name):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        return y + params[name]["bias"][None, None, None]

    def local(x, name):
        kernel = params[name]["kernel"]
        module = nn.ConvLocal(kernel.shape[-1], (3, 3), padding="SAME")
        # Flax has the channel before the place in the window.
        flat = np.moveaxis(kernel, 4, 2).reshape(*kernel.shape[:2], -1, kernel.shape[-1])
        return module.apply({"params": {"kernel": flat, "bias": params[name]["bias"]}}, x)

    def pool(x, mean=False):
        if mean:
            return nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)
        return nn.max_pool(x, (3, 3), (2, 2), "SAME")

    for normalize, name in ((True, "relu"), (False, "relu"), (True, "tanh")):
        activation = {"relu": nn.relu, "tanh": jnp.tanh}[name]
        within = lambda x, on=normalize: local_response_norm_within_channel(x, 3, 5e-5) if on else x  # noqa: E731
        across = lambda x, on=normalize: local_response_norm(x, 9, 1e-3, 0.75, 1.0, True) if on else x  # noqa: E731

        @jax.jit
        def by_hand(images, activation=activation, within=within, across=across):
            if variant == "convnet-18pct":
                x = within(activation(pool(conv(images, "conv1"))))
                x = within(pool(activation(conv(x, "conv2")), mean=True))
                x = pool(activation(conv(x, "conv3")), mean=True)
            else:
                x = across(pool(activation(conv(images, "conv1"))))
                x = pool(across(activation(conv(x, "conv2"))))
                x = activation(local(activation(local(x, "local3")), "local4"))
            return x.reshape(2, -1) @ params["logits"]["kernel"] + params["logits"]["bias"][None]

        expected = by_hand(images)
        config = NetworkConfig(network=variant, lrn="own" if normalize else "none", activation=name)
        model = from_config(config, 10)
        logits = np.asarray(jax.jit(model.apply)({"params": params}, images))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


PARAMETERS = {
    "paper": [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000],
    "one-column": [23_296, 307_392, 663_936, 884_992, 590_080, 37_752_832, 16_781_312, 4_097_000],
}
# By hand: places x kernel x input channels (of a group) x output channels.
PRODUCTS = {
    "paper": [
        55**2 * 11**2 * 3 * 96,
        27**2 * 5**2 * 48 * 256,
        13**2 * 3**2 * 256 * 384,
        13**2 * 3**2 * 192 * 384,
        13**2 * 3**2 * 192 * 256,
        9216 * 4096,
        4096 * 4096,
        4096 * 1000,
    ],
    "one-column": [
        55**2 * 11**2 * 3 * 64,
        27**2 * 5**2 * 64 * 192,
        13**2 * 3**2 * 192 * 384,
        13**2 * 3**2 * 384 * 256,
        13**2 * 3**2 * 256 * 256,
        9216 * 4096,
        4096 * 4096,
        4096 * 1000,
    ],
}
TOTALS = {"paper": 60_965_224, "one-column": 61_100_840}


@pytest.mark.both_lines
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_published_size(variant):
    shape, counts = "one-column" if variant in COLUMNS else "paper", count_layers(variant)
    assert list(counts) == list(LAYERS)
    assert [layer.parameters for layer in counts.values()] == PARAMETERS[shape]
    assert sum(PARAMETERS[shape]) == TOTALS[shape]
    assert [layer.multiply_accumulates for layer in counts.values()] == PRODUCTS[shape]
    assert counts["fc1"].kernel == (6 * 6 * 256, 4096)


def test_the_document_shows_the_networks_as_they_are():
    docs = pathlib.Path(__file__).parent.parent / "docs"
    tables = runpy.run_path(str(docs / "tables.py"))["tables"]()
    text = (docs / "networks.md").read_text(encoding="utf-8")
    assert text.endswith(tables), "put the output of python docs/tables.py at its end"


@pytest.mark.both_lines
@pytest.mark.parametrize("name", build.NETWORKS)
def test_every_network_keeps_to_what_the_rest_relies_on(name):
    """The list in `alexnet_jax.network`."""
    config = NetworkConfig(network=name)
    side = build.input_size(config) or 32
    model, calls = build.from_config(config, 7), []

    def shapes(images, keys):
        params = model.init(jax.random.key(0), images)["params"]
        logits, state = model.apply({"params": params}, images, keys, capture_intermediates=True)
        calls.extend(state["intermediates"])
        return params, logits

    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    params, logits = jax.eval_shape(shapes, images, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 2))))
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    layers = [call for call in calls if call in params]
    assert layers == sorted(params) == list(build.layers(config))
    assert layers[0] == "conv1"
    assert layers[-1] == "logits"
    assert params["conv1"]["kernel"].ndim == 4
    assert params["conv1"]["kernel"].shape[2] == 3
    assert params["logits"]["bias"].shape == (7,)
    dense = [layer for layer in layers if params[layer]["kernel"].ndim == 2]
    assert set(dense) <= set(split_dense.LAYERS)
    followed = {call.split(" ")[0] for call in calls if " " in call}
    assert followed == set(layers) - {"logits"}
    assert {call.split(" ", 1)[1] for call in calls if " " in call} <= set(typing.get_args(Operation))


@pytest.mark.parametrize("name", ["small", "paper", "convnet-11pct"])
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_every_product_has_the_precision_of_the_settings(name, precision):
    """Forward and in the gradient."""
    config = NetworkConfig(network=name, matmul_precision=precision, convolution="direct")
    side = build.input_size(config) or 32
    model, images = build.from_config(config, 7), jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    loss = jax.grad(lambda params, images: model.apply({"params": params}, images).sum())
    text = str(jax.make_jaxpr(loss)(params, images))
    found = re.findall(r"\bprecision=(None|\(?Precision\.\w+)", text)
    assert len(found) >= 3 * len(params) - 1
    assert {one.removeprefix("(Precision.") for one in found} == {precision.upper()}


def test_every_network_of_the_settings_can_be_built():
    names = typing.get_args(typing.get_type_hints(NetworkConfig)["network"])
    assert set(build.NETWORKS) == set(names)


SIDE_LESS = 156  # the input size less this gives a 16 x 16 map after conv1, and 1 x 1 before fc1


def small_images(variant: str) -> np.ndarray:
    side = VARIANTS[variant].input_size - SIDE_LESS
    return np.random.default_rng(0).uniform(-128, 128, (1, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def large():
    """Parameters with which outputs of conv1 are in the hundreds, so that normalization is strong."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        scale = 0.1 if leaf.shape[0] == 11 else 3 / np.sqrt(np.prod(leaf.shape[:-1]))
        return scale * rng.standard_normal(leaf.shape, np.float32)

    def parameters(variant):
        shapes = jax.eval_shape(AlexNet(variant).init, jax.random.key(0), small_images(variant))
        return jax.tree.map(draw, shapes["params"])

    towers, column = parameters("paper"), parameters("one-column")
    return {variant: column if variant in COLUMNS else towers for variant in VARIANTS}


def convolve(x, layer, stride=1, pads=(0, 0), groups=1):
    """Convolution of one image [H, W, C] in float64, group by group."""
    x = np.pad(x, (pads, pads, (0, 0)))
    kernel = layer["kernel"].astype(np.float64)
    windows = sliding_window_view(x, kernel.shape[:2], (0, 1))[::stride, ::stride]
    pairs = zip(np.split(windows, groups, 2), np.split(kernel, groups, 3), strict=True)
    return np.concatenate([np.einsum("hwcrs,rscf->hwf", w, k, optimize=True) for w, k in pairs], -1) + layer["bias"]


def across(x, a, k):
    square = np.pad(x**2, ((0, 0), (0, 0), (2, 2)))
    return x / (k + a * sum(square[..., i : i + x.shape[-1]] for i in range(5))) ** 0.75


def across_in_towers(x, a, k):
    return np.concatenate([across(tower, a, k) for tower in np.split(x, 2, -1)], -1)


def within(x):
    sums = np.stack([convolve2d(m**2, np.ones((5, 5)), mode="same") for m in np.moveaxis(x, -1, 0)], -1)
    return x / (1 + 1e-3 / 25 * sums) ** 0.75


def pool(x):
    return sliding_window_view(x, (3, 3), (0, 1))[::2, ::2].max((-2, -1))


def relu(x):
    return np.maximum(x, 0)


# The operations after conv1, those after conv2, and the zeros around the image: not taken from VARIANTS.
REFERENCES = {
    "paper": (lambda x: pool(across(relu(x), 1e-4, 2)), lambda x: pool(across(relu(x), 1e-4, 2)), (0, 0)),
    "2012": (
        lambda x: relu(pool(across_in_towers(x, 2e-5, 2))),
        lambda x: pool(within(across_in_towers(relu(x), 2e-5, 2))),
        (0, 3),
    ),
    "one-column": (lambda x: relu(pool(across(x, 2e-5, 2))), lambda x: pool(across(relu(x), 2e-5, 2)), (0, 3)),
    "torchvision": (lambda x: pool(relu(x)), lambda x: pool(relu(x)), (2, 2)),
    "caffe": (lambda x: pool(across(relu(x), 2e-5, 1)), lambda x: pool(across(relu(x), 2e-5, 1)), (0, 0)),
    "caffenet": (lambda x: across(pool(relu(x)), 2e-5, 1), lambda x: across(pool(relu(x)), 2e-5, 1), (0, 0)),
}


def reference(variant, params, image):
    """The whole network for one image, in float64."""
    first, second, pads = REFERENCES[variant]
    towers = 1 if variant in COLUMNS else 2
    x = first(convolve(image.astype(np.float64), params["conv1"], 4, pads))
    x = second(convolve(x, params["conv2"], 1, (2, 2), towers))
    x = relu(convolve(x, params["conv3"], 1, (1, 1)))
    x = relu(convolve(x, params["conv4"], 1, (1, 1), towers))
    x = pool(relu(convolve(x, params["conv5"], 1, (1, 1), towers))).ravel()
    for name in ("fc1", "fc2"):
        x = relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.both_lines
@pytest.mark.parametrize("variant", VARIANTS)
def test_network_equals_the_reference(variant, large):
    images = small_images(variant)
    logits = jax.jit(AlexNet(variant).apply)({"params": large[variant]}, images)
    expected = reference(variant, large[variant], images[0])
    assert np.linalg.norm(logits[0] - expected) < 3e-5 * np.linalg.norm(expected)
    if variant == "caffenet":  # normalization is so strong that its place matters
        assert np.linalg.norm(logits[0] - reference("caffe", large["caffe"], images[0])) > 0.1 * np.linalg.norm(
            expected
        )


@pytest.mark.parametrize(
    ("variant", "dropped"),
    [pytest.param("paper", {"fc2", "logits"}, marks=pytest.mark.stress), ("torchvision", {"fc1", "fc2"})],
)
def test_dropout_falls_where_each_variant_has_it(variant, dropped, large):
    @jax.jit
    def active(keys):
        """Share of each dense layer's inputs that are not 0."""
        shares = {}

        def record(layer, arguments, keywords, context):
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                shares[context.module.name] = (arguments[0] != 0).mean()
            return layer(*arguments, **keywords)

        with nn.intercept_methods(record):
            AlexNet(variant).apply({"params": large[variant]}, small_images(variant), keys)
        return shares

    off, on = active(None), active(jax.random.split(jax.random.key(3), (1, 2)))
    for name in off:
        kept = on[name] / off[name]
        assert 0.4 < kept < 0.6 if name in dropped else kept > 0.9


# Standard deviations in the order of LAYERS, and biases: as the paper and the programs' files have them.
FIRST_VALUES = {
    "paper": ([0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),
    "2012": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
    "one-column": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, -7]),
    "caffe": ([0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    "caffenet": ([0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
}


def first_parameters(variant: str) -> dict:
    """The parameters; of kernels with more than 100 rows the first 100, so that XLA need not draw the others."""

    @jax.jit
    def draw(key):
        return jax.tree.map(lambda leaf: leaf[:100], AlexNet(variant, 100).init(key, small_images(variant))["params"])

    return draw(jax.random.key(0))


@pytest.mark.parametrize(
    "variant",
    ["2012", "caffe", *(pytest.param(v, marks=pytest.mark.stress) for v in ("paper", "one-column", "caffenet"))],
)
def test_first_values(variant):
    params = first_parameters(variant)
    for name, deviation, bias in zip(LAYERS, *FIRST_VALUES[variant], strict=True):
        # At least 10,000 weights: the spread of their standard deviation is 0.7%.
        np.testing.assert_allclose(params[name]["kernel"].std(), deviation, rtol=0.03)
        np.testing.assert_array_equal(params[name]["bias"], np.float32(bias))


def test_first_values_of_torchvision_are_uniform():
    params = first_parameters("torchvision")
    for name, fan_in in zip(LAYERS, (363, 1600, 1728, 3456, 2304, 256, 4096, 4096), strict=True):
        layer = params[name]
        bound = 1 / np.sqrt(fan_in)
        np.testing.assert_allclose([layer["kernel"].min(), layer["kernel"].max()], [-bound, bound], rtol=0.01)
        np.testing.assert_allclose(layer["kernel"].std(), bound / np.sqrt(3), rtol=0.02)
        assert 0.5 * bound < np.abs(layer["bias"]).max() <= bound


def test_a_variant_that_does_not_exist():
    with pytest.raises(AlexNetError, match="there is no AlexNet variant 'vgg'; choose from paper, 2012, one-column"):
        AlexNet("vgg").init(jax.random.key(0), jnp.zeros((1, 227, 227, 3)))


def test_images_of_the_wrong_size():
    with pytest.raises(AlexNetError, match=r"at least 67x67 pixels \(made for 227x227\), not 32x32"):
        jax.eval_shape(AlexNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = jax.eval_shape(AlexNet().init, jax.random.key(0), jnp.zeros((1, 227, 227, 3)))
    with pytest.raises(flax.errors.ScopeParamShapeError, match="fc1"):
        jax.eval_shape(AlexNet().apply, params, jnp.zeros((1, 260, 260, 3)))
