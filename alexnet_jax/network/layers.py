"""The layers that make a network an AlexNet: local response normalization, overlapping max pooling, dropout.

Shape letters: `B` batch, `H` height, `W` width, `C` channels.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: int = 3, stride: int = 2, padding: str = "SAME") -> jax.Array:
    """Max pooling, overlapping where `window` > `stride` (paper, section 3.4: 3 and 2).

    The values are those of `flax.linen.max_pool`. It is written as a maximum over strided slices, first rows, then
    columns, because the gradient of XLA's own (select-and-scatter) is 15 times slower on a CPU and has no
    deterministic form on a GPU. Where several elements of a window are equal to its maximum, the gradient is shared
    out among them; XLA's and PyTorch's give all of it to the first.

    Args:
      x: [B, H, W, C], a floating dtype.
      window: side of the window.
      stride: distance between windows.
      padding: "SAME" or "VALID", XLA's rules; padding never wins a maximum.

    Returns:
      [B, H', W', C] of the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1), padding="VALID")[0, :, :, 0].tolist()
    [[12.0, 14.0], [22.0, 24.0]]
    """
    return _pool(x, window, stride, padding, jnp.maximum, -jnp.inf)


@jax.named_scope("average_pool")
def average_pool(x: jax.Array, window: int = 3, stride: int = 2) -> jax.Array:
    """Average pooling with "SAME" padding; the mean is over the pixels of the window that lie in the map.

    The values are those of `flax.linen.avg_pool(..., count_include_pad=False)`, written as `max_pool` is for the sake
    of its gradient.

    Args:
      x: [B, H, W, C], a floating dtype.
      window: side of the window.
      stride: distance between windows.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C] of the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> average_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 6.5], [11.0, 12.5]]
    """
    sums, counts = (_pool(y, window, stride, "SAME", jnp.add, 0.0) for y in (x, jnp.ones_like(x[:1, :, :, :1])))
    return sums / counts


@jax.named_scope("locally_connected")
def locally_connected(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution with stride 1 and zero padding whose kernel differs from place to place.

        y[h, w, f] = sum over r, s, c of kernel[h, w, r, s, c, f] * x[h + r - R // 2, w + s - R // 2, c]

    The paper's networks for CIFAR-10 end in such layers (section 3.3). A sum over cut-out patches is four times as fast
    on a CPU, gradients included, as `flax.linen.ConvLocal`.

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


def _pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: str,
    join: Callable[[jax.Array, jax.Array], jax.Array],
    outside: float,
) -> jax.Array:
    """Joins the elements of each window, first along rows, then along columns."""
    pads = lax.padtype_to_pads(x.shape[1:3], (window, window), (stride, stride), padding)
    for axis, pad in zip((1, 2), pads, strict=True):
        x = _pool_along(x, axis, window, stride, pad, join, outside)
    return x


def _pool_along(
    x: jax.Array,
    axis: int,
    window: int,
    stride: int,
    pad: tuple[int, int],
    join: Callable[[jax.Array, jax.Array], jax.Array],
    outside: float,
) -> jax.Array:
    """Joins the elements of each window along one axis."""
    value = jnp.array(outside, x.dtype)
    padded = lax.pad(x, value, [(pad[0], pad[1], 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])
    count = (padded.shape[axis] - window) // stride + 1
    slices = (
        lax.slice_in_dim(padded, i, i + (count - 1) * stride + 1, stride=stride, axis=axis) for i in range(window)
    )
    return functools.reduce(join, slices)


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Dropout with one key for each example (paper, section 4.2), scaled by 1 / (1 - rate) while training.

    An example's mask depends on its own key alone, so it is the same on however many devices the batch is spread.
    The paper halves the outputs at test time instead; the expectation is the same.

    Args:
      x: [B, ...].
      rate: probability that an element is set to 0; 0 <= rate < 1.
      keys: [B] typed PRNG keys.

    Returns:
      An array of the shape and dtype of `x`.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def _kept(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """The value itself, kept under its name for whoever asks for `intermediates` (`inspection.activations`)."""
    module.sow("intermediates", name, x)
    return x
