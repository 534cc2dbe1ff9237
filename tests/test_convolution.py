import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alexnet_jax.network.convolution import fast_convolution, winograd
from tests.gradients import with_gradients

pytestmark = pytest.mark.both_lines

NUMBERS = ("NHWC", "HWIO", "NHWC")


def draw(image_shape, kernel_shape):
    rng = np.random.default_rng(0)
    fan_in = np.prod(kernel_shape[:3])
    return (
        rng.normal(size=image_shape).astype(np.float32),
        (rng.normal(size=kernel_shape) / np.sqrt(fan_in)).astype(np.float32),
    )


def exact(images, kernel, cotangent, strides):
    """Output and both gradients in float64, by NumPy, tap by tap."""
    images, kernel, cotangent = (a.astype(np.float64) for a in (images, kernel, cotangent))
    pads = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, "SAME")
    padded = np.pad(images, [(0, 0), *pads, (0, 0)])
    height, width = cotangent.shape[1:3]
    output, d_padded, d_kernel = np.zeros_like(cotangent), np.zeros_like(padded), np.zeros_like(kernel)
    for r in range(kernel.shape[0]):
        for s in range(kernel.shape[1]):
            rows = slice(r, r + (height - 1) * strides[0] + 1, strides[0])
            columns = slice(s, s + (width - 1) * strides[1] + 1, strides[1])
            output += padded[:, rows, columns] @ kernel[r, s]
            d_kernel[r, s] = np.einsum("bhwc,bhwf->cf", padded[:, rows, columns], cotangent)
            d_padded[:, rows, columns] += cotangent @ kernel[r, s].T
    (top, _), (left, _) = pads
    return output, d_padded[:, top : top + images.shape[1], left : left + images.shape[2]], d_kernel


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "strides"),
    [
        ((8, 8, 8, 48), (5, 5, 48, 128), (1, 1)),  # conv2 of AlexNetSmall
        ((8, 4, 4, 128), (3, 3, 128, 192), (1, 1)),  # conv3
        ((8, 4, 4, 192), (3, 3, 192, 192), (1, 1)),  # conv4, conv5
        ((8, 32, 32, 3), (7, 7, 3, 48), (2, 2)),  # conv1
        ((2, 13, 9, 5), (3, 3, 5, 7), (1, 1)),  # tiles hang over the edge
        ((2, 3, 1, 5), (5, 5, 5, 2), (1, 1)),  # map smaller than the kernel
        ((1, 1, 1, 1), (3, 3, 1, 1), (1, 1)),
        ((2, 27, 27, 16), (5, 5, 16, 24), (1, 1)),  # conv2 of AlexNet, with fewer channels
        ((2, 13, 13, 24), (3, 3, 24, 24), (1, 1)),  # conv3
        ((2, 16, 16, 4), (5, 5, 4, 4), (1, 1)),  # too few channels for Winograd
        ((2, 8, 9, 4), (3, 5, 4, 6), (1, 1)),
        ((2, 8, 9, 4), (1, 1, 4, 6), (1, 2)),
        ((2, 57, 31, 3), (11, 11, 3, 4), (4, 3)),
    ],
)
def test_output_and_gradients_against_float64(image_shape, kernel_shape, strides):
    images, kernel = draw(image_shape, kernel_shape)

    def convolve(images, kernel):
        return fast_convolution(images, kernel, strides, "SAME", dimension_numbers=NUMBERS)

    def cotangent(output):
        return np.random.default_rng(1).normal(size=output.shape).astype(np.float32)

    found = with_gradients(convolve, cotangent, images, kernel)
    wanted = exact(images, kernel, cotangent(found[0]), strides)
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < 3e-5 * np.abs(want).max()


def test_the_largest_tiles_are_exact_enough():
    """6 for 3x3 and 4 for 5x5: the error grows with their side."""
    for image_shape, kernel_shape in [((4, 6, 6, 32), (3, 3, 32, 32)), ((4, 8, 8, 32), (5, 5, 32, 32))]:
        images, kernel = draw(image_shape, kernel_shape)
        wanted, _, _ = exact(images, kernel, np.zeros((*image_shape[:3], kernel_shape[-1])), (1, 1))
        assert np.abs(jax.jit(winograd)(images, kernel) - wanted).max() < 3e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("padding", [[(2, 2), (2, 2)], [(0, 3), (0, 3)], [(1, 0), (2, 0)], "VALID"])
def test_explicit_padding(padding):
    """The conv1 of torchvision's AlexNet and of the 2012 program."""
    images, kernel = draw((2, 35, 35, 3), (11, 11, 3, 8))
    _same_as_xla(images, kernel, (4, 4), padding)


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "padding"),
    [
        ((0, 8, 8, 4), (7, 7, 4, 6), "SAME"),  # no images
        ((0, 8, 8, 48), (3, 3, 48, 48), "SAME"),
        ((2, 3, 3, 4), (5, 5, 4, 6), "VALID"),  # no positions
    ],
)
def test_nothing_to_convolve(image_shape, kernel_shape, padding):
    images, kernel = draw(image_shape, kernel_shape)
    output, of_images, of_kernel = with_gradients(
        lambda x, w: fast_convolution(x, w, (1, 1), padding, dimension_numbers=NUMBERS),
        lambda output: output,
        images,
        kernel,
    )
    assert output.size == 0
    assert not of_images.any()
    assert not of_kernel.any()


def test_sums_are_in_full_float32():
    """Also forward and for the images, where XLA convolves: a GPU would take TF32."""
    images, kernel = draw((2, 32, 32, 3), (7, 7, 3, 48))
    lowered = jax.jit(
        jax.grad(lambda x: (fast_convolution(x, kernel, (2, 2), "SAME", dimension_numbers=NUMBERS) ** 2).sum())
    )
    convolutions = [line for line in lowered.lower(images).as_text().splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 2
    assert all(line.count("HIGHEST") == 2 for line in convolutions)  # of both operands


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_groups(groups, size):
    images, kernel = draw((2, 9, 9, 12), (size, size, 12 // groups, 24))
    _same_as_xla(images, kernel, (1, 1), "SAME", feature_group_count=groups)


def _same_as_xla(images, kernel, *arguments, **options):
    def values_and_gradients(convolve):
        return with_gradients(
            lambda x, w: convolve(x, w, *arguments, dimension_numbers=NUMBERS, **options),
            lambda output: np.cos(np.arange(output.size, dtype=np.float32)).reshape(output.shape),
            images,
            kernel,
        )

    wanted = values_and_gradients(lax.conv_general_dilated)
    for got, want in zip(values_and_gradients(fast_convolution), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_bfloat16_is_computed_in_float32_and_rounded():
    images, kernel = (x.astype(jnp.bfloat16) for x in draw((4, 8, 8, 48), (5, 5, 48, 128)))

    def convolve(images, kernel):
        return fast_convolution(images, kernel, (1, 1), "SAME", dimension_numbers=NUMBERS)

    def loss(images, kernel):
        return (convolve(images, kernel).astype(jnp.float32) ** 2).sum()

    output, gradients = convolve(images, kernel), jax.grad(loss, (0, 1))(images, kernel)
    wanted = exact(*(np.asarray(x, np.float64) for x in (images, kernel, 2 * output.astype(jnp.float32))), (1, 1))
    for got, want in zip((output, *gradients), wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        # Half a unit in the last of 8 bits, and the rounding of Winograd's algorithm.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2e-5 * np.abs(want).max())


def test_products_are_used_where_they_pay():
    """No gradient of a kernel is computed by XLA's convolution: Winograd has none at all, conv1 one forward."""
    for image_shape, kernel_shape, stride, dtype, convolutions in [
        ((2, 32, 32, 3), (7, 7, 3, 48), 2, jnp.float32, 1),
        ((2, 8, 8, 48), (5, 5, 48, 128), 1, jnp.float32, 0),
        ((2, 8, 8, 48), (5, 5, 48, 128), 1, jnp.bfloat16, 0),
        ((2, 4, 4, 128), (3, 3, 128, 192), 1, jnp.float32, 0),
        ((2, 27, 27, 64), (5, 5, 64, 192), 1, jnp.float32, 0),
    ]:

        def loss(kernel, images, stride=stride):
            output = fast_convolution(images, kernel, (stride, stride), "SAME", dimension_numbers=NUMBERS)
            return (output**2).sum()

        images, kernel = (x.astype(dtype) for x in draw(image_shape, kernel_shape))
        lowered = jax.jit(jax.grad(loss)).lower(kernel, images).as_text()
        assert "dot_general" in lowered
        assert lowered.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "VALID"},
        {"padding": [(1, 1), (1, 1)]},
        {"kernel_dilation": 2},
        {"dtype": jnp.bfloat16},
        {"kernel_size": (3, 5)},
        {"kernel_size": (7, 7)},
        {"kernel_size": (1, 1)},
        {"strides": (1, 2)},
    ],
)
def test_the_forward_pass_of_all_others_is_that_of_xla(settings):
    images, _ = draw((2, 8, 8, 4), (3, 3, 4, 6))
    settings = {"features": 6, "kernel_size": (3, 3)} | settings
    direct = nn.Conv(**settings)
    params = direct.init(jax.random.key(0), images)
    fast = nn.Conv(conv_general_dilated=fast_convolution, **settings)
    np.testing.assert_array_equal(fast.apply(params, images), direct.apply(params, images))


@pytest.mark.parametrize("numbers", [("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NHWC"), ("HWNC", "HWIO", "HWNC")])
def test_other_layouts_go_to_xla(numbers):
    images, kernel = draw((4, 4, 4, 4), (3, 3, 4, 4))
    kernel = kernel if numbers[1] == "HWIO" else kernel.transpose(3, 2, 0, 1)
    arguments = (images, kernel, (1, 1), "SAME")
    np.testing.assert_array_equal(
        fast_convolution(*arguments, dimension_numbers=numbers),
        lax.conv_general_dilated(*arguments, dimension_numbers=numbers),
    )


@pytest.mark.parametrize(
    ("image", "kernel", "pays"),
    [
        ((2, 8, 8, 48), (5, 5, 48, 128), True),
        ((2, 4, 4, 192), (3, 3, 192, 192), True),
        ((2, 13, 13, 256), (3, 3, 256, 384), True),
        ((2, 16, 16, 48), (5, 5, 48, 128), True),
        ((2, 16, 16, 32), (5, 5, 32, 32), False),
        ((2, 27, 27, 64), (5, 5, 64, 192), True),
        ((2, 12, 12, 64), (5, 5, 64, 64), True),
        ((2, 17, 16, 2), (3, 3, 2, 2), False),
    ],
)
def test_winograd_is_taken_where_it_pays(image, kernel, pays):
    convolve = jax.jit(lambda x, k: fast_convolution(x, k, (1, 1), "SAME", dimension_numbers=NUMBERS))
    program = convolve.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel))).as_text()
    assert ("stablehlo.convolution" not in program) == pays
