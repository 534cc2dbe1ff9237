"""Layers other than normalization: overlapping pooling, local connections, dropout per example.

Shape letters: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: int = 3, stride: int = 2, padding: str = "SAME") -> jax.Array:
    """Max pooling, overlapping where `window` > `stride` (paper, section 3.4: 3 and 2).

    The values are those of `flax.linen.max_pool`. It is computed as a maximum over strided slices, first along rows,
    then along columns, because the gradient of XLA's own (select-and-scatter) is 15 times slower on a CPU and has no
    deterministic form on a GPU. Where several elements of a window equal its maximum, the first in the order of reading
    gets the gradient, as in PyTorch and cuDNN.

    Args:
      x: floating [B, H, W, C].
      window: side of the window in pixels.
      stride: distance between windows.
      padding: "SAME" or "VALID", XLA's rules; padding never wins a maximum.

    Returns:
      [B, H', W', C] of the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1), padding="VALID")[0, :, :, 0].tolist()
    [[12.0, 14.0], [22.0, 24.0]]
    """
    return _pool(x, window, stride, padding, _first_maximum, -jnp.inf)


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


def _first_maximum(a: jax.Array, b: jax.Array) -> jax.Array:
    """The maximum, NaN if either is; of equal values `a`, which alone gets the gradient."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


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
def locally_connected(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution with stride 1 and zero padding that has a different kernel at each position.

        y[h, w, f] = sum over r, s, c of kernel[h, w, r, s, c, f] * x[h + r - R // 2, w + s - R // 2, c]

    The paper's networks for CIFAR-10 end in such layers (section 3.3). A sum over extracted patches is four times as
    fast on a CPU, gradients included, as `flax.linen.ConvLocal`.

    Args:
      x: [B, H, W, C].
      kernel: [H, W, R, R, C, F], R odd.

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
    return jnp.einsum("bhwkc,hwkcf->bhwf", patches, kernel.reshape(height, width, size * size, *kernel.shape[4:]))


def bias_in_float32(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`promote_dtype` of Flax's layers that adds the bias in float32.

    With dtype bfloat16, the product's result is bfloat16, the layer's is float32. The gradient of a bias, a sum over
    the batch and all pixels, is then summed up in float32, too: in bfloat16, small terms are lost.
    """
    return inputs.astype(dtype), kernel.astype(dtype), bias


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Dropout with one key per example (paper, section 4.2), scaled by 1 / (1 - rate) in training.

    An example's mask depends only on its own key, so it is the same on any number of devices. The paper halves the
    outputs at test time instead; the expectation is the same.

    Args:
      x: [B, ...].
      rate: probability that an element is set to 0; 0 <= rate < 1.
      keys: [B] typed PRNG keys. None: evaluation, `x` is returned.

    Returns:
      An array of the shape and dtype of `x`.
    """
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def split_keys(keys: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Keys [B] for each of two dropout layers, from one key per example; None (evaluation) gives None for both."""
    if keys is None:
        return None, None
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]
