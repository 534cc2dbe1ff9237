"""Layers other than normalization: overlapping pooling, local connections, dropout per example.

Shape letters: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: int = 3, stride: int = 2, padding: str = "SAME") -> jax.Array:
    """Max pooling, overlapping where `window` > `stride` (paper, section 3.4: 3 and 2).

    The values are those of `flax.linen.max_pool`. It is computed as a maximum over strided slices, because the gradient
    of XLA's own (select-and-scatter) is 15 times slower on a CPU and has no deterministic form on a GPU. Where several
    elements of a window equal its maximum, the first in the order of reading gets the gradient, as in PyTorch and
    cuDNN.

    Args:
      x: floating [B, H, W, C].
      window: side of the window in pixels, at most 11.
      stride: distance between windows.
      padding: "SAME" or "VALID", XLA's rules; padding never wins a maximum.

    Returns:
      [B, H', W', C] of the dtype of `x`.

    Raises:
      ValueError: `window` is above 11, or with "VALID" larger than the map.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1), padding="VALID")[0, :, :, 0].tolist()
    [[12.0, 14.0], [22.0, 24.0]]
    """
    _check(x, window, padding)
    return _pool(x, window, stride, padding, jnp.maximum, -jnp.inf)  # not differentiated: ties don't matter


def max_pool_with_places(x: jax.Array, window: int, stride: int, padding: str) -> tuple[jax.Array, jax.Array]:
    """Max pooling, and for each window the place of its maximum, int8, numbered from 0 in the order of reading.

    The place in a window that contains a NaN is 0.
    """
    elements = _windows(x, window, stride, padding)
    y = functools.reduce(jnp.maximum, elements)
    # On a CPU, XLA would compute the maximum a second time for the places.
    y = lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)
    places = jnp.zeros(y.shape, jnp.int8)
    for place, element in reversed(list(enumerate(elements))):
        places = jnp.where(element == y, jnp.int8(place), places)
    return y, places


def gradient_from_places(
    x: jax.Array, places: jax.Array, gradient: jax.Array, window: int, stride: int, padding: str
) -> jax.Array:
    """The gradient with respect to `x`, of which only the shape is used, from that of the result."""
    parts = [jnp.where(places == place, gradient, 0) for place in range(window**2)]
    return jax.linear_transpose(lambda x: _windows(x, window, stride, padding), x)(parts)[0]


def gradient_by_blocks(
    x: jax.Array, places: jax.Array, gradient: jax.Array, window: int, stride: int, padding: str
) -> jax.Array:
    """The same as `gradient_from_places`, in the form that XLA compiles well for a CPU.

    A pixel in row a of a block of `stride` rows is in row a of the window that begins there, in row a + stride of the
    one before, and so on; columns likewise. For each position in a block, this adds up the gradients of those windows
    whose maximum is that pixel.
    """
    pads = lax.padtype_to_pads(x.shape[1:3], (window, window), (stride, stride), padding)
    blocks = [-(-(size + before) // stride) for size, (before, _) in zip(x.shape[1:3], pads, strict=True)]
    earlier = (window - 1) // stride
    edges = [(earlier, n - size, 0) for n, size in zip(blocks, places.shape[1:3], strict=True)]
    places = lax.optimization_barrier(places)  # or XLA determines them anew for each of the windows
    places = lax.pad(places, jnp.int8(-1), [(0, 0, 0), *edges, (0, 0, 0)])
    gradient = lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

    def at(row: int, column: int) -> jax.Array:
        total = jnp.zeros((len(x), *blocks, x.shape[3]), gradient.dtype)  # remains 0 between windows
        for i, r in enumerate(range(row, window, stride)):
            for j, c in enumerate(range(column, window, stride)):
                top, left = earlier - i, earlier - j
                part = (slice(None), slice(top, top + blocks[0]), slice(left, left + blocks[1]))
                total += jnp.where(places[part] == r * window + c, gradient[part], 0)
        return total

    rows = [jnp.stack([at(row, column) for column in range(stride)], axis=3) for row in range(stride)]
    whole = jnp.stack(rows, axis=2).reshape(len(x), blocks[0] * stride, blocks[1] * stride, x.shape[3])
    (top, _), (left, _) = pads
    return whole[:, top : top + x.shape[1], left : left + x.shape[2]]


@jax.named_scope("max_pool")
def _forward(x: jax.Array, window: int, stride: int, padding: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    _check(x, window, padding)
    y, places = max_pool_with_places(x, window, stride, padding)
    return y, (x, places)


@jax.named_scope("max_pool")
def _backward(
    window: int, stride: int, padding: str, stored: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    on_cpu = functools.partial(gradient_by_blocks, window=window, stride=stride, padding=padding)
    elsewhere = functools.partial(gradient_from_places, window=window, stride=stride, padding=padding)
    return (lax.platform_dependent(*stored, gradient, cpu=on_cpu, default=elsewhere),)


max_pool.defvjp(_forward, _backward)


@jax.named_scope("average_pool")
def average_pool(x: jax.Array, window: int = 3, stride: int = 2) -> jax.Array:
    """Average pooling with "SAME" padding; the mean is over the pixels of the window that are inside the map.

    The values are those of `flax.linen.avg_pool(..., count_include_pad=False)`, computed as in `max_pool`.

    Args:
      x: floating [B, H, W, C].
      window: side of the window in pixels.
      stride: distance between windows.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C] of the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> average_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 6.5], [11.0, 12.5]]
    """
    sums, counts = (_pool(y, window, stride, "SAME", jnp.add, 0.0) for y in (x, jnp.ones_like(x[:1, :, :, :1])))
    return sums / counts


def _check(x: jax.Array, window: int, padding: str) -> None:
    if window > 11:
        raise ValueError(f"max_pool: {window=}: at most 11, because places in a window are stored in 8 bits")
    if padding == "VALID" and min(x.shape[1:3]) < window:
        raise ValueError(f"max_pool: {window=} is larger than the map {x.shape[1:3]}: pad it, or use padding='SAME'")


def _windows(x: jax.Array, window: int, stride: int, padding: str) -> list[jax.Array]:
    """The elements of each window, in the order of reading: window**2 arrays [B, H', W', C]; padding is -Inf."""
    pads = lax.padtype_to_pads(x.shape[1:3], (window, window), (stride, stride), padding)
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
    height, width = ((size - window) // stride * stride + 1 for size in x.shape[1:3])
    return [
        x[:, row : row + height : stride, column : column + width : stride]
        for row in range(window)
        for column in range(window)
    ]


def _pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: str,
    join: Callable[[jax.Array, jax.Array], jax.Array],
    outside: float,
) -> jax.Array:
    """Joins the elements of each window, first in each row, then the rows; padding has the value `outside`."""
    pads = lax.padtype_to_pads(x.shape[1:3], (window, window), (stride, stride), padding)
    for axis, (before, after) in ((2, pads[1]), (1, pads[0])):
        edges = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
        x = lax.pad(x, jnp.array(outside, x.dtype), edges)
        end = (x.shape[axis] - window) // stride * stride + 1  # of the slice that begins at 0
        slices = [lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(window)]
        x = functools.reduce(join, slices)
    return x


@jax.named_scope("locally_connected")
def locally_connected(x: jax.Array, kernel: jax.Array, precision: str = "default") -> jax.Array:
    """A convolution with stride 1 and zero padding that has a different kernel at each position.

        y[h, w, f] = sum over r, s, c of kernel[h, w, r, s, c, f] * x[h + r - R // 2, w + s - R // 2, c]

    The paper's networks for CIFAR-10 end in such layers (section 3.3). A sum over extracted patches is four times as
    fast on a CPU, gradients included, as `flax.linen.ConvLocal`.

    Args:
      x: [B, H, W, C].
      kernel: [H, W, R, R, C, F], R odd.
      precision: of float32 products, as for `jax.numpy.einsum`.

    Returns:
      [B, H, W, F].

    >>> import jax.numpy as jnp
    >>> kernel = jnp.arange(4.0).reshape(2, 2, 1, 1, 1, 1)
    >>> locally_connected(jnp.ones((1, 2, 2, 1)), kernel)[0, :, :, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    height, width = x.shape[1:3]
    size = kernel.shape[2]
    padded = jnp.pad(x, [(0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)])
    patches = jnp.stack([padded[:, r : r + height, s : s + width] for r in range(size) for s in range(size)], axis=3)
    kernels = kernel.reshape(height, width, size * size, *kernel.shape[4:])
    return jnp.einsum("bhwkc,hwkcf->bhwf", patches, kernels, precision=precision)


def bias_in_float32(*arrays: jax.Array | None, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """`promote_dtype` of Flax's layers that leaves the bias, the last of the arrays, in float32.

    With dtype bfloat16, the product's result is bfloat16, the layer's is float32. The gradient of a bias, a sum over
    the batch and all pixels, is then summed up in float32, too: in bfloat16, small terms are lost.
    """
    *others, bias = arrays
    return [*promote_dtype(*others, dtype=dtype, inexact=inexact), bias]


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Dropout with one key per example (paper, section 4.2), scaled by 1 / (1 - rate) in training.

    An example's mask depends only on its own key, so it is the same on any number of devices. The paper halves the
    outputs at test time instead; the expectation is the same.

    Args:
      x: [B, ...].
      rate: probability that an element is set to 0; 0 <= rate < 1.
      keys: [B] typed PRNG keys.

    Returns:
      An array of the shape and dtype of `x`.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
