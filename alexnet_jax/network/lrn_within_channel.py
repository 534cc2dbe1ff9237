"""Local response normalization within a channel: the 2012 program's second kind, which the paper does not mention."""

import jax

from alexnet_jax.network.lrn import check_arguments, normalize, sum_along


def local_response_norm_within_channel(
    x: jax.Array, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
    """Divides each activation by a power of the sum of squares over a square of pixels around it in its channel.

        y_hw = x_hw / (k + alpha / size^2 * sum of x_ij^2 over the size x size pixels around h, w) ^ beta

    The authors' 2012 program applies it after the second normalization across channels, with the defaults here (run
    145: `rnorm`, size 5, scale 1e-3, k 1); Caffe calls it WITHIN_CHANNEL. Both programs divide alpha by the area of the
    whole window, even where the window extends past the edge of the map and sums fewer pixels. An even `size` reaches
    one pixel further up and left. The gradient is that of `lrn.normalize`.

    Args:
      x: float32, bfloat16 or float16 [..., H, W, C]; squares and sums are computed in float32.
      size: side of the window in pixels, at least 1; may exceed H and W.
      alpha: strength; non-negative.
      beta: exponent.
      k: added to the sum; positive.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: if `size` is below 1, `alpha` is negative, `k` is not positive or `x` has fewer than 3 axes.
      TypeError: if `x` does not have a floating dtype.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1)  # a 3x3 window sees all four pixels from each
    >>> local_response_norm_within_channel(x, size=3, alpha=9.0, beta=1.0, k=2.0).ravel().tolist()
    [0.03125, 0.0625, 0.09375, 0.125]
    """
    check_arguments("local_response_norm_within_channel", x, size, alpha, k)
    if x.ndim < 3:
        raise ValueError(f"local_response_norm_within_channel needs [..., H, W, C], not the shape {x.shape}")
    return normalize(x, size, alpha / size**2, beta, k, _square_sum)


def _square_sum(x: jax.Array, before: int, after: int) -> jax.Array:
    """Sums [..., H, W, C] over a square of pixels: a sum over columns of sums over rows."""
    return sum_along(sum_along(x, before, after, axis=-3), before, after, axis=-2)
