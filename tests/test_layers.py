import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import convolve2d

from alexnet_jax.network.layers import (
    average_pool,
    dropout,
    gradient_from_places,
    locally_connected,
    max_pool,
    max_pool_with_places,
)
from alexnet_jax.network.lrn import local_response_norm, local_response_norm_by_the_book
from alexnet_jax.network.lrn_within_channel import local_response_norm_within_channel
from alexnet_jax.network.split_dense import dense_layer
from tests.gradients import with_gradients

# size, alpha, beta, k, divide_by_size: the paper, the 2012 program, odd and even windows, windows wider than the map
CONVENTIONS = [
    (5, 1e-4, 0.75, 2.0, False),
    (5, 1e-4, 0.75, 1.0, True),
    (4, 1e-3, 0.75, 1.0, True),
    (2, 0.5, 0.5, 1.0, False),
    (1, 0.1, 1.0, 0.5, False),
    (9, 1e-2, 0.75, 1.0, False),
    (40, 1e-3, 0.6, 2.0, True),
]


def by_the_book(x: np.ndarray, *convention: float) -> np.ndarray:
    return local_response_norm_by_the_book(x.astype(np.float64), *convention)


def inputs(scale: float, shape: tuple[int, ...] = (2, 3, 3, 13)) -> np.ndarray:
    return np.random.default_rng(0).uniform(-scale, scale, shape).astype(np.float32)


@pytest.mark.both_lines
@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_lrn_equals_the_book(convention, scale):
    x = inputs(scale)
    y = jax.jit(lambda x: local_response_norm(x, *convention))(x)
    np.testing.assert_allclose(y, by_the_book(x, *convention), 2e-5)


def test_the_book_by_hand():
    """Five channels of 100, in the middle of which the window of 3 is whole, and one of 0 beside them."""
    x = np.array([100.0, 100, 100, 100, 100, 0])
    y = local_response_norm_by_the_book(x, size=3, alpha=3e-4, beta=0.5, k=1.0, divide_by_size=True)
    np.testing.assert_allclose(y, [100 / 3**0.5, 50, 50, 50, 100 / 3**0.5, 0])


def test_conventions_differ_visibly_on_large_inputs():
    x = jnp.asarray(inputs(1000.0))
    paper = local_response_norm(x, 5, 1e-4, 0.75, 2.0, divide_by_size=False)
    program = local_response_norm(x, 5, 1e-4, 0.75, 2.0, divide_by_size=True)
    assert float(jnp.abs(program).sum() / jnp.abs(paper).sum()) > 2


@pytest.mark.both_lines
@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_lrn_gradient_equals_finite_differences(convention, scale):
    x, cotangent = inputs(scale, (1, 1, 1, 13)), inputs(1.0, (1, 1, 1, 13))[..., ::-1]
    _, gradient = with_gradients(lambda a: local_response_norm(a, *convention), lambda _: cotangent, x)
    h = scale * 1e-6
    wide = x.astype(np.float64)
    expected = [
        ((by_the_book(wide + h * e, *convention) - by_the_book(wide - h * e, *convention)) * cotangent).sum() / 2 / h
        for e in np.eye(13)
    ]
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_lrn_in_bfloat16_is_accumulated_in_float32():
    x = jnp.asarray(inputs(1000.0)).astype(jnp.bfloat16)
    y = local_response_norm(x, 9, 1e-2, 0.75, 1.0)
    assert y.dtype == jnp.bfloat16
    expected = by_the_book(np.asarray(x, np.float32), 9, 1e-2, 0.75, 1.0, False)
    # Half a unit in the last place of bfloat16: only the result is rounded.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8)


@pytest.mark.both_lines
def test_lrn_keeps_only_its_input_for_the_gradient():
    x = jnp.asarray(inputs(1.0))
    _, vjp = jax.vjp(local_response_norm, x)
    residuals = [leaf for leaf in jax.tree.leaves(vjp) if np.size(leaf) > 1]
    assert [r.shape for r in residuals] == [x.shape]
    np.testing.assert_array_equal(residuals[0], x)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"alpha": -1.0}, {"k": 0.0}])
def test_lrn_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match="local_response_norm needs"):
        local_response_norm(jnp.ones((1, 4)), **arguments)


def test_lrn_refuses_integers():
    with pytest.raises(TypeError, match="floating dtype, not int32"):
        local_response_norm(jnp.ones((1, 4), jnp.int32))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_lrn_equals_pytorch(convention):
    torch = pytest.importorskip("torch")
    size, alpha, beta, k, divide = convention
    x = inputs(1000.0)
    leaf = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = torch.nn.functional.local_response_norm(leaf, size, alpha if divide else alpha * size, beta, k)
    y.sum().backward()
    ours, vjp = jax.vjp(lambda a: local_response_norm(a, *convention), jnp.asarray(x))
    np.testing.assert_allclose(ours, y.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4)
    expected = leaf.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(vjp(jnp.ones_like(ours))[0], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_lrn_equals_tensorflow(radius):
    tf = pytest.importorskip("tensorflow")
    x = inputs(1000.0)
    with tf.GradientTape() as tape:
        leaf = tf.Variable(x)
        y = tf.nn.local_response_normalization(leaf, depth_radius=radius, bias=2.0, alpha=1e-4, beta=0.75)
    ours, vjp = jax.vjp(lambda a: local_response_norm(a, 2 * radius + 1, 1e-4, 0.75, 2.0), jnp.asarray(x))
    np.testing.assert_allclose(ours, y.numpy(), rtol=1e-4)
    expected = tape.gradient(y, leaf).numpy()
    np.testing.assert_allclose(vjp(jnp.ones_like(ours))[0], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


# size, alpha, beta, k: run 145 of the 2012 program, even windows, windows wider than the map
WITHIN_CONVENTIONS = [(5, 1e-3, 0.75, 1.0), (4, 1e-2, 0.5, 2.0), (1, 0.1, 1.0, 0.5), (15, 1e-2, 0.75, 1.0)]


def reference_within(x: np.ndarray, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """The formula, map by map, in float64, for one image [H, W, C]."""
    x = x.astype(np.float64)
    height, width, channels = x.shape
    y = np.empty_like(x)
    first = (size - 1) // 2  # the full convolution's place whose window begins at -size // 2
    for c in range(channels):
        sums = convolve2d(x[..., c] ** 2, np.ones((size, size)))[first : first + height, first : first + width]
        y[..., c] = x[..., c] / (k + alpha / size**2 * sums) ** beta
    return y


@pytest.mark.both_lines
@pytest.mark.parametrize("convention", WITHIN_CONVENTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_lrn_within_channel_equals_the_convolution(convention, scale):
    x = inputs(scale, (2, 6, 9, 3))
    expected = np.stack([reference_within(image, *convention) for image in x])
    y = jax.jit(lambda x: local_response_norm_within_channel(x, *convention))(x)
    np.testing.assert_allclose(y, expected, 2e-5)


@pytest.mark.parametrize("convention", WITHIN_CONVENTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_lrn_within_channel_gradient_equals_finite_differences(convention, scale):
    shape = (3, 4, 2)
    x, cotangent = inputs(scale, shape), inputs(1.0, shape)[::-1]
    _, gradient = with_gradients(lambda a: local_response_norm_within_channel(a, *convention), lambda _: cotangent, x)
    h = scale * 1e-6
    wide = x.astype(np.float64)
    steps = h * np.eye(x.size).reshape(-1, *shape)
    expected = [
        ((reference_within(wide + e, *convention) - reference_within(wide - e, *convention)) * cotangent).sum() / 2 / h
        for e in steps
    ]
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_lrn_within_channel_in_bfloat16_is_accumulated_in_float32():
    x = jnp.asarray(inputs(1000.0, (6, 9, 3))).astype(jnp.bfloat16)
    y = local_response_norm_within_channel(x)
    assert y.dtype == jnp.bfloat16
    expected = reference_within(np.asarray(x, np.float32), 5, 1e-3, 0.75, 1.0)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"alpha": -1.0}, {"k": 0.0}])
def test_lrn_within_channel_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match="local_response_norm_within_channel needs size"):
        local_response_norm_within_channel(jnp.ones((4, 4, 1)), **arguments)


def test_lrn_within_channel_needs_a_map_of_floats():
    with pytest.raises(ValueError, match=r"needs \[..., H, W, C\], not the shape \(4, 4\)"):
        local_response_norm_within_channel(jnp.ones((4, 4)))
    with pytest.raises(TypeError, match="floating dtype, not int32"):
        local_response_norm_within_channel(jnp.ones((4, 4, 1), jnp.int32))


def cotangent(y: jax.Array) -> np.ndarray:
    return inputs(1.0, y.shape)


POOLINGS = [(3, 2, "SAME"), (3, 2, "VALID"), (2, 2, "SAME"), (3, 1, "SAME"), (5, 3, "VALID"), (2, 3, "SAME")]


@pytest.mark.both_lines
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("side", [5, 8])
def test_max_pool_equals_flax(pooling, side):
    window, stride, padding = pooling
    x = inputs(1.0, (2, side, side + 1, 3)) - np.float32(2)  # all negative: padding with 0 would show

    def flax_pool(a: jax.Array) -> jax.Array:
        return nn.max_pool(a, (window, window), (stride, stride), padding)

    ours, gradient = with_gradients(lambda a: max_pool(a, window, stride, padding), cotangent, x)
    theirs, their_gradient = with_gradients(flax_pool, cotangent, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [5, 8])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (5, 3), (2, 3)])
def test_average_pool_equals_flax(window, stride, side):
    x = inputs(1.0, (2, side, side + 1, 3))

    def flax_pool(a: jax.Array) -> jax.Array:
        return nn.avg_pool(a, (window, window), (stride, stride), "SAME", count_include_pad=False)

    ours, gradient = with_gradients(lambda a: average_pool(a, window, stride), cotangent, x)
    theirs, their_gradient = with_gradients(flax_pool, cotangent, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_locally_connected_is_a_convolution_with_a_kernel_for_each_place(size):
    x, kernel = inputs(1.0, (2, 4, 5, 3)), inputs(1.0, (4, 5, size, size, 3, 2))
    y = np.asarray(locally_connected(jnp.asarray(x), jnp.asarray(kernel)))
    for h in range(4):
        for w in range(5):
            place = jax.lax.conv_general_dilated(
                x, kernel[h, w], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            np.testing.assert_allclose(y[:, h, w], place[:, h, w], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (5, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_first_of_equals_gets_the_gradient(window, stride, padding, dtype):
    """As in Flax (XLA), and in the form for GPUs; most of the numbers 0 to 3 occur in a window more than once."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 9, 8, 5)), dtype)

    def cotangent(y: jax.Array) -> jax.Array:
        return jnp.asarray(np.random.default_rng(1).integers(1, 9, y.shape), dtype)  # their sums are exact

    @jax.jit
    def by_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, places = max_pool_with_places(x, window, stride, padding)
        return y, gradient_from_places(x, places, cotangent(y), window, stride, padding)

    ours = with_gradients(lambda x: max_pool(x, window, stride, padding), cotangent, x)
    flax = with_gradients(lambda x: nn.max_pool(x, (window, window), (stride, stride), padding), cotangent, x)
    for one, another in (*zip(ours, flax, strict=True), *zip(ours, by_places(x), strict=True)):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(another, np.float32))


@pytest.mark.both_lines
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_places_are_those_of_rounded_values(padding):
    """XLA may keep more digits of a value than bfloat16 has; no element would then be equal to the rounded maximum."""
    x = jnp.asarray(inputs(1.0, (4, 9, 8, 16)))

    def rounded(x: jax.Array) -> jax.Array:
        return local_response_norm((x * 3).astype(jnp.bfloat16))

    y, places = jax.jit(lambda x: max_pool_with_places(rounded(x), 3, 2, padding))(x)
    a_map = jax.jit(rounded)(x)
    ours = y, gradient_from_places(a_map, places, jnp.ones_like(y), 3, 2, padding)
    flax = with_gradients(lambda x: nn.max_pool(x, (3, 3), (2, 2), padding), jnp.ones_like, a_map)
    jax.tree.map(np.testing.assert_array_equal, ours, tuple(flax))


def test_max_pool_refuses_windows_whose_places_need_more_than_8_bits():
    x = jnp.zeros((1, 16, 16, 1))
    for function in (max_pool, jax.grad(lambda x, window: max_pool(x, window).sum())):
        jax.eval_shape(lambda x, function=function: function(x, 11), x)
        with pytest.raises(ValueError, match="window=12: at most 11"):
            function(x, 12)


def test_max_pool_refuses_a_map_smaller_than_its_window():
    for function in (max_pool, jax.grad(lambda x, *args: max_pool(x, *args).sum())):
        with pytest.raises(ValueError, match=r"window=3 is larger than the map \(2, 4\): pad it, or use"):
            function(jnp.zeros((1, 2, 4, 1)), 3, 2, "VALID")


def test_max_pool_passes_nan_on():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2].set(jnp.nan)
    for y in (max_pool(x, 2, 2), max_pool_with_places(x, 2, 2, "SAME")[0]):
        np.testing.assert_array_equal(jnp.isnan(y[0, :, :, 0]), [[False, True], [False, False]])


@pytest.mark.both_lines
def test_max_pool_needs_no_select_and_scatter():
    text = jax.jit(jax.grad(lambda x: max_pool(x).sum())).lower(jnp.ones((1, 8, 8, 4))).as_text()
    assert "select_and_scatter" not in text
    flax_text = (
        jax.jit(jax.grad(lambda x: nn.max_pool(x, (3, 3), (2, 2)).sum())).lower(jnp.ones((1, 8, 8, 4))).as_text()
    )
    assert "select_and_scatter" in flax_text  # so the name above is the one that XLA uses


@pytest.mark.parametrize("devices", [1, 2])
def test_bias_gradients_are_summed_in_float32(devices):
    """512 gradients of 1 and 512 of 2^-8: added to 512, the latter would vanish in bfloat16, one at a time."""
    gradient = jnp.asarray([[1.0]] * 512 + [[2.0**-8]] * 512, jnp.bfloat16)
    layer = dense_layer("devices" if devices > 1 else None)(1, dtype=jnp.bfloat16)

    def bias_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
        params = layer.init(jax.random.key(0), x)["params"]
        _, vjp = jax.vjp(lambda params: layer.apply({"params": params}, x).astype(jnp.bfloat16), params)
        return vjp(gradient)[0]["bias"]

    parts = [array.reshape(devices, -1, array.shape[-1]) for array in (jnp.ones((1024, 4), jnp.bfloat16), gradient)]
    sums = jax.vmap(bias_gradient, axis_name="devices")(*parts)
    assert sums.dtype == jnp.float32
    assert float(sums.sum()) == 512 + 2


@pytest.mark.both_lines
def test_dropout_masks_by_key_and_scales():
    keys = jax.random.split(jax.random.key(0), 64)
    x = jnp.ones((64, 1000))
    y = dropout(x, 0.3, keys)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    # 64,000 draws: the share that is kept has standard deviation 0.0018.
    assert abs(float((y > 0).mean()) - 0.7) < 0.01
    shuffled = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(dropout(x, 0.3, keys[shuffled]), y[shuffled])
    np.testing.assert_array_equal(dropout(x, 0.0, keys), x)
