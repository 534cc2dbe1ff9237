"""Convolutions for CPUs: the sums of `lax.conv_general_dilated`, with gradients in half the time or less.

On a CPU, XLA runs the gradient of a convolution with respect to its kernel at a tenth of the speed of a matrix product.
Here that gradient is a matrix product; where it pays, the whole convolution is done by Winograd's algorithm, which also
needs fewer multiplications. A GPU gains nothing from either.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # small powers of two, because products with them are exact
MAX_GROUPS = 4  # each group is a convolution of its own here
Pads = tuple[tuple[int, int], ...]

# Lower precision (a GPU's TF32) would ruin Winograd's results.
_product = functools.partial(jnp.matmul, precision="highest")
_direct = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")


def fast_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Replaces `lax.conv_general_dilated` as `nn.Conv(conv_general_dilated=...)`.

    A float32 convolution of [B, H, W, C] without dilation is computed by `winograd` (3x3 and 5x5 with stride 1 and
    "SAME" padding, where that is faster, see `_winograd_pays`) or `convolution_by_patches`, for each group of channels.
    One in bfloat16 is computed in float32, and the result is rounded. All others are computed by
    `lax.conv_general_dilated`. Sums are in full float32, whatever `precision` says. Only reverse-mode derivatives are
    defined.
    """
    if lhs.dtype == rhs.dtype == jnp.bfloat16 and options.get("preferred_element_type") is None:
        wide = fast_convolution(lhs.astype("float32"), rhs.astype("float32"), window_strides, padding, **options)
        return wide.astype(jnp.bfloat16)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    if (
        lhs.dtype != jnp.float32
        or lhs.ndim != 4
        or numbers != lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
        or options.get("batch_group_count", 1) != 1
        or options.get("feature_group_count", 1) > MAX_GROUPS
        or options.get("preferred_element_type") is not None
        or any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in options.get(name) or ())
    ):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    groups = options.get("feature_group_count", 1)
    strides, size = tuple(window_strides), rhs.shape[:2]
    same = lax.padtype_to_pads(lhs.shape[1:3], size, strides, "SAME")
    pads = lax.padtype_to_pads(lhs.shape[1:3], size, strides, padding) if isinstance(padding, str) else padding
    pads = tuple((int(before), int(after)) for before, after in pads)
    maps = []
    for images, kernel in zip(jnp.split(lhs, groups, axis=3), jnp.split(rhs, groups, axis=3), strict=True):
        by_winograd = strides == (1, 1) and size in ((3, 3), (5, 5)) and pads == tuple(same)
        if by_winograd and _winograd_pays(images.shape, kernel.shape):
            maps.append(winograd(images, kernel))
        else:
            maps.append(convolution_by_patches(images, kernel, strides, pads))
    return jnp.concatenate(maps, axis=3)


def _winograd_pays(images: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether `winograd` is faster, judging by the shapes [B, H, W, C] and [R, R, C, F].

    The cost of its transforms grows with C + F, that of the products with C F. In products with the small matrices of
    the transforms, a multiplication takes about twice as long. With 0.4 of the multiplications of a direct convolution,
    counted that way, it took 0.5 of the time, gradients included (13x13, 256 to 256 channels, 3x3), with 0.64 of them
    as long (16x16, 32 to 32, 5x5). `benchmarks/layers.py --choices` compares the two.
    """
    (_, height, width, channels), (size, *_, features) = images, kernel
    tile = _tile(height, width, size)
    rows, columns = (-(-length // tile) * (tile + size - 1) for length in (height, width))
    transforms = rows * width * (height + columns) * (channels + features)
    products = rows * columns * channels * features
    return 2 * transforms + products < 0.6 * size**2 * height * width * channels * features


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution_by_patches(images: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads) -> jax.Array:
    """XLA's convolution, whose gradient with respect to the kernel is computed by matrix products of patches.

    Args:
      images: [B, H, W, C].
      kernel: [R, S, C, F].
      strides: of rows and columns.
      pads: zeros before and after the rows and the columns.

    Returns:
      [B, H', W', F].
    """
    return _direct(images, kernel, strides, pads)


def _forward(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _direct(images, kernel, strides, pads), (images, kernel)


def _backward(
    strides: Sequence[int], pads: Pads, stored: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = stored
    of_images = jax.linear_transpose(lambda x: _direct(x, kernel, strides, pads), images)(gradient)[0]
    return of_images, _kernel_gradient(images, gradient, kernel.shape, strides, pads)


convolution_by_patches.defvjp(_forward, _backward)


def _kernel_gradient(
    images: jax.Array, gradient: jax.Array, kernel: Sequence[int], strides: Sequence[int], pads: Pads
) -> jax.Array:
    """The gradient with respect to a kernel of the shape `kernel`.

    Blocks of `strides` pixels are taken as the channels of one pixel, so that the kernel moves by one. Then there is a
    product for each row of the kernel: what that row covers, times the gradient, summed over all its positions.
    """
    batch, height, width, features = gradient.shape
    channels = images.shape[3]
    size = [-(-length // stride) for length, stride in zip(kernel[:2], strides, strict=True)]
    blocks = [height + size[0] - 1, width + size[1] - 1]
    ends = zip(images.shape[1:3], blocks, strides, pads, strict=True)
    edges = [(before, n * stride - length - before, 0) for length, n, stride, (before, _) in ends]
    x = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(batch, blocks[0], strides[0], blocks[1], strides[1] * channels).swapaxes(2, 3)
    x = x.reshape(batch, *blocks, strides[0] * strides[1] * channels)
    covered = jnp.concatenate([x[:, :, i : i + width] for i in range(size[1])], axis=3)
    positions, of_row = batch * height * width, covered.shape[3]
    flat = gradient.reshape(positions, features)
    rows = [_product(covered[:, i : i + height].reshape(positions, of_row).T, flat) for i in range(size[0])]
    whole = jnp.stack(rows).reshape(*size, *strides, channels, features).swapaxes(1, 2)
    whole = whole.reshape(size[0] * strides[0], size[1] * strides[1], channels, features)
    return whole[: kernel[0], : kernel[1]]


def winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with stride 1 and "SAME" padding by Winograd's F(m x m, R x R).

    Along an axis, a tile of m outputs is y = A^T [(G g) * (B^T d)], with n = m + R - 1 inputs d and kernel g, so n
    multiplications replace m R; along both, n^2 replace m^2 R^2 (m = 4: 1/4 for R = 3, 1/6 for R = 5). The cost is
    rounding: about 1e-5 of the largest value, where a plain float32 convolution has 1e-6.

    Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.

    Args:
      images: float32 [B, H, W, C].
      kernel: float32 [R, R, C, F], R odd and at most 5.

    Returns:
      float32 [B, H, W, F].
    """
    batch, height, width, channels = images.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    rows_in, kernel_map, rows_out = _winograd_maps(height, size, tile := _tile(height, width, size))
    columns_in, _, columns_out = _winograd_maps(width, size, tile)
    n, tiles = len(kernel_map), (rows_in.shape[1], columns_in.shape[1])

    # Matrix products with the pixels first: the form in which XLA runs them, and their gradients, at full speed.
    pixels = images.transpose(1, 2, 0, 3).reshape(height, width, -1)
    points = _along_both(rows_in.reshape(-1, height), columns_in.reshape(-1, width), pixels)
    points = points.reshape(n, tiles[0], n, tiles[1], -1).swapaxes(1, 2).reshape(n * n, -1, channels)
    kernels = _along_both(kernel_map, kernel_map, kernel.reshape(size, size, -1)).reshape(n * n, channels, features)
    products = _product(points, kernels).reshape(n, n, *tiles, -1).swapaxes(1, 2)
    products = products.reshape(n * tiles[0], n * tiles[1], -1)
    outputs = _along_both(rows_out.reshape(height, -1), columns_out.reshape(width, -1), products)
    return outputs.reshape(height, width, batch, features).transpose(2, 0, 1, 3)


def _along_both(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """Applies `rows` [P, H] and `columns` [Q, W] along the first two axes of `x` [H, W, N]; returns [P, Q, N]."""
    (p, height), (q, width) = rows.shape, columns.shape
    if min(height * width, p * q) <= 64:  # one product reads and writes less than two
        return _product(np.kron(rows, columns), x.reshape(height * width, -1)).reshape(p, q, -1)
    return _product(columns, _product(rows, x.reshape(height, -1)).reshape(p, width, -1))


def _tile(height: int, width: int, size: int) -> int:
    """The side m of the tiles that need the fewest multiplications; of equals the smaller, which is more exact."""
    sides = range(2, len(POINTS) + 3 - size)
    return min(sides, key=lambda m: -(-height // m) * -(-width // m) * (m + size - 1) ** 2)


@functools.cache
def _winograd_maps(size: int, kernel_size: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The linear maps of F(tile, kernel_size) along an axis of `size` pixels with "SAME" padding, float32.

    The product of two polynomials is determined by its values at n points (Cook and Toom); a convolution is its
    transpose: with V_k the values of 1, x, .., x^(k-1) at the points, G = V_R, A = V_tile, B = V_n^-1.

    Returns:
      B^T for each tile, without the columns that meet the zero padding, [n, tiles, size]; G, [n, kernel_size];
      A^T for each tile, without the rows that extend past the edge, [size, n, tiles].
    """
    n, tiles, before = tile + kernel_size - 1, -(-size // tile), (kernel_size - 1) // 2

    def values(count: int) -> np.ndarray:
        at_infinity = np.eye(count)[-1:]
        return np.vstack([np.vander(POINTS[: n - 1], count, increasing=True), at_infinity])

    inputs, outputs = np.zeros((n, tiles, (tiles - 1) * tile + n)), np.zeros((tiles * tile, n, tiles))
    for i in range(tiles):
        inputs[:, i, i * tile : i * tile + n] = np.linalg.inv(values(n)).T
        outputs[i * tile : (i + 1) * tile, :, i] = values(tile).T
    inputs, outputs = inputs[:, :, before : before + size], outputs[:size]
    return inputs.astype(np.float32), values(kernel_size).astype(np.float32), outputs.astype(np.float32)
