"""Local response normalization across channels (paper, section 3.3)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def local_response_norm(
    x: jax.Array,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    divide_by_size: bool = False,
) -> jax.Array:
    """Divides each activation by a power of the sum of squares over its neighbouring channels and itself.

        y_c = x_c / (k + a * sum of x_j^2 over the window of c) ^ beta

    The window of channel c is [c - size // 2, c + (size - 1) // 2], cut off at the first and last channel: symmetric
    for an odd `size`, one channel further back for an even one (PyTorch's rule).

    `a` is where implementations differ, by a factor of `size`:

    - `divide_by_size=False`: a = alpha, as in the paper's text and TensorFlow (whose `depth_radius` is the half-width)
    - `divide_by_size=True`: a = alpha / size, as in the authors' 2012 program, Caffe, PyTorch and ONNX

    Args:
      x: float32, bfloat16 or float16 [..., C]; squares and sums are computed in float32.
      size: number of channels in the window, at least 1; may exceed C.
      alpha: strength; non-negative.
      beta: exponent.
      k: added to the sum; positive. The paper uses 2; most libraries default to 1.
      divide_by_size: which of the two conventions `alpha` follows.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: if `size` is below 1, `alpha` is negative or `k` is not positive.
      TypeError: if `x` does not have a floating dtype.

    >>> import jax.numpy as jnp
    >>> local_response_norm(jnp.array([1.0, 2.0, 3.0]), size=3, alpha=1.0, beta=1.0, k=0.5).tolist()
    [0.1818181872367859, 0.13793103396892548, 0.2222222238779068]
    """
    check_arguments("local_response_norm", x, size, alpha, k)
    return normalize(x, size, alpha / size if divide_by_size else alpha, beta, k, _channel_sum)


def local_response_norm_by_the_book(
    x: np.ndarray, size: int, alpha: float, beta: float, k: float, divide_by_size: bool
) -> np.ndarray:
    """The formula of `local_response_norm`, channel by channel in NumPy: the reference for tests."""
    a = alpha / size if divide_by_size else alpha
    windows = [x[..., max(0, c - size // 2) : c + (size - 1) // 2 + 1] for c in range(x.shape[-1])]
    sums = np.stack([(window**2).sum(axis=-1) for window in windows], axis=-1)
    return x / (k + a * sums) ** beta


# From here on: a fast implementation of the same formula, with its gradient. `window_sum(x, before, after)` is the only
# part that depends on the kind of window: `_channel_sum` here, a square of pixels in lrn_within_channel.py.


def _channel_sum(x: jax.Array, before: int, after: int) -> jax.Array:
    """Sums [..., C] over channels c - before to c + after; channels outside the map count as 0."""
    return sum_along(x, before, after, axis=-1)


def sum_along(x: jax.Array, before: int, after: int, axis: int) -> jax.Array:
    """Sums x over [i - before, i + after] for each index i of an axis; elements outside count as 0."""
    length = x.shape[axis]
    before, after = min(before, length - 1), min(after, length - 1)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    padded = jnp.pad(x, pads)
    # On a CPU a pad fused into the sum prevents vectorization; on a GPU, the fusion saves a pass over memory.
    padded = lax.platform_dependent(padded, cpu=lax.optimization_barrier, default=lambda x: x)
    # Shifted adds: XLA fuses them into one pass, unlike reduce_window, and they cost half of a banded matrix product.
    shifted = (lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(before + after + 1))
    return functools.reduce(jnp.add, shifted)


WindowSum = Callable[[jax.Array, int, int], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
@jax.named_scope("local_response_norm")
def normalize(x: jax.Array, size: int, a: float, beta: float, k: float, window_sum: WindowSum) -> jax.Array:
    """`x / (k + a * window_sum(x^2)) ^ beta`, with a gradient written by hand.

    The gradient needs only `x`, which the layer before stores anyway. It computes the denominator again, which is
    faster than writing it to memory in float32 and reading it back.
    """
    wide = x.astype(jnp.float32)
    d = k + a * window_sum(wide * wide, size // 2, (size - 1) // 2)
    return (wide * _power(d, beta)).astype(x.dtype)


def _forward(
    x: jax.Array, size: int, a: float, beta: float, k: float, window_sum: WindowSum
) -> tuple[jax.Array, jax.Array]:
    return normalize(x, size, a, beta, k, window_sum), x


@jax.named_scope("local_response_norm")
def _backward(
    size: int, a: float, beta: float, k: float, window_sum: WindowSum, x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    # With d_i = k + a sum_{j in W(i)} x_j^2 and y_i = x_i d_i^-beta:
    #   dL/dx_j = g_j d_j^-beta - 2 a beta x_j sum_{i: j in W(i)} g_i x_i d_i^(-beta-1)
    # The window {i: j in W(i)} is W mirrored, so `before` and `after` are swapped.
    x = lax.optimization_barrier(x)  # else XLA merges `d` with the forward pass's, and stores it in float32
    wide, g = x.astype(jnp.float32), gradient.astype(jnp.float32)
    before, after = size // 2, (size - 1) // 2
    d = k + a * window_sum(wide * wide, before, after)
    scaled = g * _power(d, beta)
    terms = lax.optimization_barrier((scaled * wide / d).astype(x.dtype))  # XLA writes them: not in float32
    inner = window_sum(terms.astype(jnp.float32), after, before)
    return ((scaled - (2 * a * beta) * wide * inner).astype(x.dtype),)


normalize.defvjp(_forward, _backward)


def _power(d: jax.Array, beta: float) -> jax.Array:
    """Computes d ^ -beta for d > 0."""
    if beta == 0.75:  # the paper's; two square roots are several times faster than a general power
        root = lax.rsqrt(d)
        return root * jnp.sqrt(root)
    return d**-beta


def check_arguments(function: str, x: jax.Array, size: int, alpha: float, k: float) -> None:
    """Raises ValueError or TypeError, naming the function, for invalid arguments."""
    if size < 1 or alpha < 0 or k <= 0:
        raise ValueError(f"{function} needs size >= 1, alpha >= 0, k > 0; got {size=}, {alpha=}, {k=}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{function} needs a floating dtype, not {x.dtype}")
