"""Convolutions as matrix products, for CPUs: the sums of `lax.conv_general_dilated` in half the time or less.

On a CPU, XLA runs the gradient of a convolution with respect to its kernel at a fraction of the speed of a matrix
product. Here convolution and gradients are matrix products: with stride 1 by Winograd's algorithm, which also needs
fewer multiplications, with larger strides by extracting patches. A GPU gains nothing from either.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 4  # outputs of a Winograd tile along an axis; smaller tiles are slower and more exact
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # small powers of two, because products with them are exact

# Lower precision (a GPU's TF32) would ruin Winograd's results.
_product = functools.partial(jnp.matmul, precision="highest")


def fast_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Replaces `lax.conv_general_dilated` as `nn.Conv(conv_general_dilated=...)`.

    A float32 convolution of [B, H, W, C] with "SAME" padding, one group, no dilation and a square kernel is computed by
    `winograd` (3x3 and 5x5 with stride 1, where that is faster, see `_winograd_pays`) or `patches_product` (both
    strides above 1). All others are computed by `lax.conv_general_dilated`, including those in half precision, for
    which Winograd's intermediate values grow too large. Sums are in full float32, whatever `precision` says.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    size = rhs.shape[0]
    if (
        lhs.dtype == jnp.float32
        and lhs.ndim == 4
        and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
        and padding == "SAME"
        and rhs.shape[1] == size
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and all(d == 1 for name in ("lhs_dilation", "rhs_dilation") for d in options.get(name) or ())
    ):
        if all(stride > 1 for stride in window_strides):
            return patches_product(lhs, rhs, window_strides)
        if size in (3, 5) and all(stride == 1 for stride in window_strides) and _winograd_pays(lhs.shape, rhs.shape):
            return winograd(lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _winograd_pays(images: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether `winograd` is faster, judging by the shapes [B, H, W, C] and [R, R, C, F].

    The cost of its transforms grows with the square of the pixels and with C + F, that of the convolution with C F.
    With 1.3 times the multiplications of a direct convolution, it took 0.86 of the time, gradients included (16x16, 48
    to 128 channels, 5x5), with 2.7 times as many, it took twice as long (16x16, 32 to 32): see `benchmarks/layers.py
    --choices`.
    """
    (_, height, width, channels), (size, *_, features) = images, kernel
    points = (TILE + size - 1) ** 2 * -(-height // TILE) * -(-width // TILE)
    pixels = height * width
    return points * (pixels * (channels + features) + channels * features) < 2 * size**2 * pixels * channels * features


def patches_product(images: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    """Convolves with "SAME" padding, as one product of all patches with the kernel.

    Args:
      images: [B, H, W, C].
      kernel: [R, S, C, F].
      strides: of rows and columns.

    Returns:
      [B, ceil(H / strides[0]), ceil(W / strides[1]), F].
    """
    pads = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, "SAME")
    height, width = (-(-size // stride) for size, stride in zip(images.shape[1:3], strides, strict=True))
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])

    def shifted(x: jax.Array, axis: int, count: int, stride: int, size: int) -> list[jax.Array]:
        ends = range((count - 1) * stride + 1, (count - 1) * stride + 1 + size)
        return [lax.slice_in_dim(x, i, end, stride, axis) for i, end in enumerate(ends)]

    rows = shifted(padded, 1, height, strides[0], kernel.shape[0])
    patches = jnp.stack(
        [jnp.stack(shifted(row, 2, width, strides[1], kernel.shape[1]), axis=3) for row in rows], axis=3
    )
    return _product(patches.reshape(len(images), height, width, -1), kernel.reshape(-1, kernel.shape[-1]))


def winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with stride 1 and "SAME" padding by Winograd's F(TILE x TILE, R x R).

    Along an axis, a tile of m outputs is y = A^T [(G g) * (B^T d)], with n = m + R - 1 inputs d and kernel g, so n
    multiplications replace m R; along both, n^2 replace m^2 R^2 (4x4 tiles: 1/4 for R = 3, 1/6 for R = 5). The cost
    is rounding: about 1e-5 of the largest value, where a plain float32 convolution has 1e-6.

    Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.

    Args:
      images: float32 [B, H, W, C].
      kernel: float32 [R, R, C, F], R odd and at most 5.

    Returns:
      float32 [B, H, W, F].
    """
    batch, height, width, channels = images.shape
    size, features = kernel.shape[0], kernel.shape[-1]
    rows_in, kernel_map, rows_out = _winograd_maps(height, size)
    columns_in, _, columns_out = _winograd_maps(width, size)
    # Letters: p, q points; t, u tiles; h, w pixels; r, s positions in the kernel.
    input_map = np.einsum("pth,quw->pqtuhw", rows_in, columns_in).reshape(-1, height * width)
    kernel_map = np.einsum("pr,qs->pqrs", kernel_map, kernel_map).reshape(-1, size * size)
    output_map = np.einsum("hpt,wqu->hwpqtu", rows_out, columns_out).reshape(height * width, -1)

    # Matrix products with the pixels first: the form in which XLA runs them, and their gradients, at full speed.
    pixels = images.reshape(batch, height * width, channels).swapaxes(0, 1).reshape(height * width, -1)
    tiles = _product(input_map, pixels).reshape(len(kernel_map), -1, channels)
    kernels = _product(kernel_map, kernel.reshape(size * size, -1)).reshape(-1, channels, features)
    products = _product(tiles, kernels).reshape(output_map.shape[1], -1)
    outputs = _product(output_map, products).reshape(height * width, batch, features)
    return outputs.swapaxes(0, 1).reshape(batch, height, width, features)


def _winograd_maps(size: int, kernel_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The linear maps of F(TILE, kernel_size) along an axis of `size` pixels with "SAME" padding, float32.

    The product of two polynomials is determined by its values at n points (Cook and Toom); a convolution is its
    transpose: with V_k the values of 1, x, .., x^(k-1) at the points, G = V_R, A = V_TILE, B = V_n^-1.

    Returns:
      B^T for each tile, without the columns that meet the zero padding, [n, tiles, size]; G, [n, kernel_size];
      A^T for each tile, without the rows that extend past the edge, [size, n, tiles].
    """
    n, tiles, before = TILE + kernel_size - 1, -(-size // TILE), (kernel_size - 1) // 2

    def values(count: int) -> np.ndarray:
        at_infinity = np.eye(count)[-1:]
        return np.vstack([np.vander(POINTS[: n - 1], count, increasing=True), at_infinity])

    inputs, outputs = np.zeros((n, tiles, (tiles - 1) * TILE + n)), np.zeros((tiles * TILE, n, tiles))
    for i in range(tiles):
        inputs[:, i, i * TILE : i * TILE + n] = np.linalg.inv(values(n)).T
        outputs[i * TILE : (i + 1) * TILE, :, i] = values(TILE).T
    inputs, outputs = inputs[:, :, before : before + size], outputs[:size]
    return inputs.astype(np.float32), values(kernel_size).astype(np.float32), outputs.astype(np.float32)
