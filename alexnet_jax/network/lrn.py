"""Local response normalization."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def _window_sum(x: jax.Array, before: int, after: int, axis: int) -> jax.Array:
    """Sums x over [i - before, i + after] for each place i on the axis; what lies outside the map counts as 0."""
    length = x.shape[axis]
    before, after = min(before, length - 1), min(after, length - 1)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    padded = jnp.pad(x, pads)
    # On a CPU a pad fused into the sum keeps it from being vectorized; on a GPU the fusion saves a pass over memory.
    padded = lax.platform_dependent(padded, cpu=lax.optimization_barrier, default=lambda x: x)
    # Shifted adds: XLA fuses them into one pass, unlike reduce_window, and they cost half of a banded matrix product.
    shifted = (lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(before + after + 1))
    return functools.reduce(jnp.add, shifted)


def _neighbourhood_sum(x: jax.Array, before: int, after: int, axes: tuple[int, ...]) -> jax.Array:
    """Sums x over a window along each of the axes: a sum over a square is one over columns of one over rows."""
    return functools.reduce(lambda x, axis: _window_sum(x, before, after, axis), axes, x)


def _power(d: jax.Array, beta: float) -> jax.Array:
    """Computes d ** -beta for d > 0."""
    if beta == 0.75:  # the paper's; two square roots are several times faster than a general power
        root = lax.rsqrt(d)
        return root * jnp.sqrt(root)
    return d**-beta


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
@jax.named_scope("local_response_norm")
def _normalize(x: jax.Array, size: int, a: float, beta: float, k: float, axes: tuple[int, ...]) -> jax.Array:
    wide = x.astype(jnp.float32)
    d = k + a * _neighbourhood_sum(wide * wide, size // 2, (size - 1) // 2, axes)
    return (wide * _power(d, beta)).astype(x.dtype)


def _normalize_forward(
    x: jax.Array, size: int, a: float, beta: float, k: float, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    return _normalize(x, size, a, beta, k, axes), x


@jax.named_scope("local_response_norm")
def _normalize_backward(
    size: int, a: float, beta: float, k: float, axes: tuple[int, ...], x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    # With d_i = k + a sum_{j in W(i)} x_j^2 and y_i = x_i d_i^-beta:
    #   dL/dx_j = g_j d_j^-beta - 2 a beta x_j sum_{i: j in W(i)} g_i x_i d_i^(-beta-1)
    # The window {i: j in W(i)} is W mirrored, so `before` and `after` change places.
    wide, g = x.astype(jnp.float32), gradient.astype(jnp.float32)
    before, after = size // 2, (size - 1) // 2
    d = k + a * _neighbourhood_sum(wide * wide, before, after, axes)
    scaled = g * _power(d, beta)
    inner = _neighbourhood_sum(scaled * wide / d, after, before, axes)
    return ((scaled - (2 * a * beta) * wide * inner).astype(x.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _check_arguments(name: str, x: jax.Array, size: int, alpha: float, k: float) -> None:
    if size < 1 or alpha < 0 or k <= 0:
        raise ValueError(f"{name} needs size >= 1, alpha >= 0, k > 0; got {size=}, {alpha=}, {k=}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} needs a floating dtype, not {x.dtype}")


def local_response_norm(
    x: jax.Array,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    divide_by_size: bool = False,
) -> jax.Array:
    """Local response normalization across channels (paper, section 3.3).

        y_c = x_c / (k + a * sum of x_j^2 over the window of c) ^ beta

    The window of channel c is [c - size // 2, c + (size - 1) // 2], cut off at the first and last channel: symmetric
    for an odd `size`, one channel further back for an even one (PyTorch's rule).

    `a` is where implementations differ, by a factor of `size`:

    - `divide_by_size=False`: a = alpha, as the paper prints it, and TensorFlow (whose `depth_radius` is the half-width)
    - `divide_by_size=True`: a = alpha / size, as the authors' 2012 program ran it, Caffe, PyTorch and ONNX

    The gradient is written by hand. It keeps `x` alone, which the layer before holds anyway, and computes the
    denominator again: that is cheaper than to store and load it.

    Args:
      x: float32, bfloat16 or float16 [..., C]; squares and sums are taken in float32 whatever its dtype.
      size: number of channels in the window, at least 1; may exceed C.
      alpha: strength; non-negative.
      beta: exponent.
      k: what is added to the sum; positive. The paper has 2, most libraries have 1.
      divide_by_size: which of the two conventions `alpha` follows.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: for a size below 1, a negative alpha or a k that is not positive.
      TypeError: for an `x` that is not of a floating dtype.

    >>> import jax.numpy as jnp
    >>> local_response_norm(jnp.array([1.0, 2.0, 3.0]), size=3, alpha=1.0, beta=1.0, k=0.5).tolist()
    [0.1818181872367859, 0.13793103396892548, 0.2222222238779068]
    """
    _check_arguments("local_response_norm", x, size, alpha, k)
    return _normalize(x, size, alpha / size if divide_by_size else alpha, beta, k, (-1,))


def local_response_norm_within_channel(
    x: jax.Array, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
    """Local response normalization within each channel, over a square of pixels.

        y_hw = x_hw / (k + alpha / size^2 * sum of x_ij^2 over the size x size pixels around h, w) ^ beta

    The paper does not mention it. The authors' 2012 program has it after the second normalization across channels, with
    the defaults here (run 145: `rnorm`, size 5, scale 1e-3, k 1); Caffe calls it WITHIN_CHANNEL. All divide alpha by
    the area of the whole window, also where the window hangs over the edge of the map and sums fewer pixels. An even
    `size` reaches one pixel further up and left. The gradient is written by hand, as that of `local_response_norm`.

    Args:
      x: float32, bfloat16 or float16 [..., H, W, C]; squares and sums are taken in float32 whatever its dtype.
      size: side of the window in pixels, at least 1; may exceed H and W.
      alpha: strength; non-negative.
      beta: exponent.
      k: what is added to the sum; positive.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: for a size below 1, a negative alpha, a k that is not positive or an `x` of less than 3 axes.
      TypeError: for an `x` that is not of a floating dtype.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1)  # a 3x3 window sees all four pixels from each
    >>> local_response_norm_within_channel(x, size=3, alpha=9.0, beta=1.0, k=2.0).ravel().tolist()
    [0.03125, 0.0625, 0.09375, 0.125]
    """
    _check_arguments("local_response_norm_within_channel", x, size, alpha, k)
    if x.ndim < 3:
        raise ValueError(f"local_response_norm_within_channel needs [..., H, W, C], not the shape {x.shape}")
    return _normalize(x, size, alpha / size**2, beta, k, (-3, -2))
