"""PCA colour noise: one random RGB shift per image, along the principal components of its colours.

The paper (section 4.1) adds sum_i p_i alpha_i lambda_i, with p_i and lambda_i the eigenvectors and eigenvalues of the
3x3 covariance of RGB pixels and alpha_i ~ N(0, 0.1^2). Eigenvalues are in squared grey levels, and programs scale them
differently: `pca_noise` has three kinds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.data.statistics import PcaBasis


def pca_noise(
    keys: jax.Array, images: jax.Array | np.ndarray, basis: PcaBasis, kind: str, std: jax.Array | float
) -> jax.Array:
    """PCA colour noise, float32 [B, 3]: a shift of R, G and B in grey levels for each image.

    Args:
      keys: [B] PRNG keys.
      images: uint8 or float [B, H, W, 3], grey levels; only "per-image" uses their pixels.
      basis: PCA basis of the training set; not used by "per-image".
      kind: "per-image" (the original post), "dataset-std" (the 2012 program) or "dataset-eigenvalue" (most ports).
      std: standard deviation of alpha, 0.1 in the paper.

    Raises:
      ValueError: unknown kind.
    """
    match kind:
        case "per-image":
            return per_image_noise(keys, jnp.asarray(images, jnp.float32), std)
        case "dataset-std":
            return dataset_noise(keys, deviation_scales(basis), basis.eigenvectors, std)
        case "dataset-eigenvalue":
            return dataset_noise(keys, eigenvalue_scales(basis), basis.eigenvectors, std)
    raise ValueError(f"there is no PCA noise {kind!r}; choose from per-image, dataset-std, dataset-eigenvalue")


def image_covariance(images: jax.Array) -> jax.Array:
    """The 3x3 covariance of each image's own STANDARDIZED pixels, as the original post computes it.

    Each channel is centred and divided by its population standard deviation (a constant channel keeps scale 1); sums of
    products are divided by n - 1, with n = H * W pixels. The result is the correlation matrix times n / (n - 1): its
    trace, the sum of the eigenvalues, is 3 n / (n - 1).

    Args:
      images: float32 [B, H, W, 3], at any scale: the result does not depend on it.

    Returns:
      float32 [B, 3, 3].
    """
    pixels = images.reshape(images.shape[0], -1, 3)
    n = pixels.shape[1]
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    products = jnp.einsum("bni,bnj->bij", centred, centred, precision="highest")
    deviation = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2) / n)
    # A constant channel is 0 after centring, up to rounding; grey levels are integers, so the deviation of any other
    # channel is far above 1e-3.
    scale = jnp.where(deviation > 1e-3, 1 / jnp.maximum(deviation, 1e-3), 0.0)
    return products * scale[:, :, None] * scale[:, None, :] / (n - 1)


def per_image_noise(keys: jax.Array, images: jax.Array, std: jax.Array | float) -> jax.Array:
    """The original post's noise: the shift comes from the image's own principal components.

        sum_i p_i alpha_i lambda_i,  alpha_i ~ N(0, std^2)

    with p_i, lambda_i the eigenvectors and eigenvalues of C = `image_covariance`. This sum is Gaussian with covariance
    std^2 sum_i lambda_i^2 p_i p_i^T = std^2 C C, and so is std * C z with z ~ N(0, I), which needs no eigenvectors.

    Because C is computed from standardized pixels but the shift is added on the 0..255 scale, the noise is tiny: a
    channel's standard deviation is std * |row of C|, between std and sqrt(3) * std grey levels (up to 0.17 for std =
    0.1).

    Args:
      keys: [B] PRNG keys.
      images: float32 [B, H, W, 3], grey levels.
      std: standard deviation of alpha, 0.1 in the original post and in the paper.

    Returns:
      float32 [B, 3], grey levels.
    """
    z = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return std * jnp.einsum("bij,bj->bi", image_covariance(images), z, precision="highest")


def dataset_noise(keys: jax.Array, scales: np.ndarray, eigenvectors: np.ndarray, std: jax.Array | float) -> jax.Array:
    """Noise along the principal components of the whole training set.

        sum_i p_i alpha_i s_i,  alpha_i ~ N(0, std^2)

    Args:
      keys: [B] PRNG keys.
      scales: [3], s_i in grey levels: `deviation_scales` (the 2012 program) or `eigenvalue_scales` (the common port).
      eigenvectors: [3, 3], column i is p_i.
      std: standard deviation of alpha.

    Returns:
      float32 [B, 3], grey levels.
    """
    alpha = std * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    mixing = jnp.asarray(eigenvectors * scales, jnp.float32)  # [channel, component]
    return jnp.einsum("ci,bi->bc", mixing, alpha, precision="highest")


def deviation_scales(basis: PcaBasis) -> np.ndarray:
    """s_i = sqrt(lambda_i), grey levels, as in the 2012 program (121.8, 37.1 and 19.7 there, on ImageNet)."""
    return np.sqrt(basis.eigenvalues)


def eigenvalue_scales(basis: PcaBasis) -> np.ndarray:
    """s_i = lambda_i of pixels scaled to 0..1, converted back to grey levels: lambda_i / 255.

    This is the paper's formula (section 4.1) applied to 0..1 pixels, as in most ports. Applied to 0..255 pixels, the
    formula would shift colours by hundreds of grey levels.
    """
    return basis.eigenvalues / 255
