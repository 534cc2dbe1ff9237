"""Training-time augmentation: random crops, flips and PCA colour noise, as pure functions of keys and images.

Every function takes one key for each example, so that an example's draw is the same wherever in a batch and on however
many devices it is worked on. Images are float32 [B, H, W, 3] in GREY LEVELS, 0..255 (not 0..1), noise too.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.config import AugmentationConfig

Images = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class PcaBasis:
    """Principal components of a data set's RGB pixels, in grey levels (0..255).

    Attributes:
      mean: float64 [3], mean of each channel.
      eigenvalues: float64 [3], of the pixels' 3x3 covariance (squared grey levels), largest first.
      eigenvectors: float64 [3, 3], COLUMN i belongs to eigenvalue i.
    """

    mean: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


def pca_basis(images: np.ndarray) -> PcaBasis:
    """Computes the PCA basis of all pixels of uint8 images [N, H, W, 3], exactly.

    Sums are taken in integers; the covariance is divided by the number of pixels less one.
    """
    count, total, products = 0, np.zeros(3, np.int64), np.zeros((3, 3), np.int64)
    for start in range(0, len(images), 1000):
        # float64 products of whole numbers are exact up to 2^53; a chunk's stay far below.
        pixels = images[start : start + 1000].reshape(-1, 3).astype(np.float64)
        count += len(pixels)
        total += pixels.sum(axis=0).astype(np.int64)
        products += (pixels.T @ pixels).astype(np.int64)
    return basis_from_sums(count, total, products)


def basis_from_sums(count: int, total: np.ndarray, products: np.ndarray) -> PcaBasis:
    """The PCA basis from sums over `count` pixels x: int64 [3], of x, and int64 [3, 3], of x x^T."""
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / max(count - 1, 1)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return PcaBasis(mean, np.maximum(eigenvalues[::-1], 0.0), np.ascontiguousarray(eigenvectors[:, ::-1]))


def image_covariance(images: jax.Array) -> jax.Array:
    """The 3x3 covariance of each image's own STANDARDIZED pixels, as the seed computes it.

    Each channel is centred and divided by its population standard deviation (a constant channel keeps scale 1); sums of
    products are divided by n - 1, n = H * W pixels. So it is the correlation matrix times n / (n - 1): its trace, the
    sum of the eigenvalues, is 3 n / (n - 1).

    Args:
      images: float32 [B, H, W, 3]. Any scale: the result doesn't depend on it.

    Returns:
      float32 [B, 3, 3].
    """
    pixels = images.reshape(images.shape[0], -1, 3)
    n = pixels.shape[1]
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    products = jnp.einsum("bni,bnj->bij", centred, centred, precision="highest")
    deviation = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2) / n)
    # A constant channel is 0 after centring, but for rounding; levels are whole numbers, so a real one is far above.
    scale = jnp.where(deviation > 1e-3, 1 / jnp.maximum(deviation, 1e-3), 0.0)
    return products * scale[:, :, None] * scale[:, None, :] / (n - 1)


def per_image_noise(keys: jax.Array, images: jax.Array, std: jax.Array | float) -> jax.Array:
    """The seed's PCA colour noise: one RGB shift an image from that image's own principal components.

        sum_i p_i alpha_i lambda_i,  alpha_i ~ N(0, std^2)

    with p_i, lambda_i the eigenvectors and eigenvalues of C = `image_covariance`. This sum is Gaussian with covariance
    std^2 sum_i lambda_i^2 p_i p_i^T = std^2 C C, and so is std * C z with z ~ N(0, I): that needs no eigenvectors.

    As C is computed from standardized pixels but the shift is added on the 0..255 scale, the noise is tiny: a channel's
    standard deviation is std * |row of C|, between std and sqrt(3) * std grey levels (up to 0.17 for std = 0.1).

    Args:
      keys: [B] PRNG keys.
      images: float32 [B, H, W, 3], grey levels.
      std: standard deviation of alpha; the seed and the paper have 0.1.

    Returns:
      float32 [B, 3], grey levels.
    """
    z = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return std * jnp.einsum("bij,bj->bi", image_covariance(images), z, precision="highest")


def dataset_noise(keys: jax.Array, scales: np.ndarray, eigenvectors: np.ndarray, std: jax.Array | float) -> jax.Array:
    """PCA colour noise from the whole training set's principal components.

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
    """s_i = lambda_i of the pixels scaled to 0..1, brought back to grey levels: lambda_i / 255.

    This is the paper's text (section 4.1) on 0..1 pixels, which most ports do. On 0..255 pixels the text, taken
    literally, would shift colours by hundreds of grey levels.
    """
    return basis.eigenvalues / 255


def random_crop(keys: jax.Array, images: jax.Array, padding: int, mode: str) -> jax.Array:
    """Pads each image by `padding` pixels on all sides and cuts its own size back out at a uniformly random place.

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].
      padding: pixels; each offset is uniform on 0..2 * padding.
      mode: "reflect" (mirrors the image at its edge pixel, which is not repeated) or "zero".

    Returns:
      [B, H, W, C].
    """
    height, width, channels = images.shape[1:]
    padded = _pad(images, padding, mode)

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (row, column, 0), (height, width, channels))

    return jax.vmap(crop)(keys, padded)


def _pad(images: jax.Array, padding: int, mode: str) -> jax.Array:
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    return jnp.pad(images, pads, mode="reflect" if mode == "reflect" else "constant")


def random_window(keys: jax.Array, images: Images, mean_image: np.ndarray | None, size: int) -> jax.Array:
    """Cuts a window of `size` x `size` out of each image at a uniformly random place (paper, section 4.1).

    Args:
      keys: [B] PRNG keys.
      images: uint8 or float [B, H, W, 3], grey levels; H and W at least `size`.
      mean_image: float32 [H, W, 3]; the window's own part of it is subtracted. None: nothing is.
      size: side of the window, 224 of 256 in the paper.

    Returns:
      float32 [B, size, size, 3], grey levels.
    """
    height, width, channels = images.shape[1:]

    def window(key: jax.Array, image: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, np.array([height - size, width - size]) + 1)

        def cut(x: Images) -> jax.Array:
            return jax.lax.dynamic_slice(x, (row, column, 0), (size, size, channels)).astype(jnp.float32)

        return cut(image) if mean_image is None else cut(image) - cut(mean_image)

    return jax.vmap(window)(keys, jnp.asarray(images))


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2 (paper, section 4.1).

    Args:
      keys: [B] PRNG keys.
      images: [B, H, W, C].

    Returns:
      [B, H, W, C].
    """
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


class View(NamedTuple):
    """A way to look at an image when testing.

    Attributes:
      row: where the window lies, from 0 (top) to 1 (bottom).
      column: the same from left to right.
      flip: whether it is mirrored left to right.
    """

    row: float
    column: float
    flip: bool


CENTRE = View(0.5, 0.5, False)
_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS: Mapping[int, tuple[View, ...]] = types.MappingProxyType(
    {
        1: (CENTRE,),
        2: (CENTRE, View(0.5, 0.5, True)),
        10: tuple(View(*place, flip) for place in _PLACES for flip in (False, True)),  # paper, section 4.1
    }
)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From stored uint8 images to the network's input: what training and evaluation do to pixels.

    Training: subtract the mean image -> random crop -> random flip -> PCA colour noise -> scale -> enlarge.
    Evaluation: subtract the mean image -> the view's crop and flip -> scale -> enlarge.

    The colour noise is not clipped to 0..255 (the 2012 program does not clip either; the seed clips for display).

    Attributes:
      basis: PCA basis of the training images.
      mean_image: float32 [H, W, 3] grey levels that are subtracted; None leaves inputs in [0, 1].
      crop_padding: pixels of padding for the random crop; 0 for none.
      crop_mode: "reflect" or "zero".
      flip: whether images are mirrored at random.
      pca: "none", "per-image", "dataset-std" or "dataset-eigenvalue".
      pca_std: standard deviation of the noise's coefficients.
      pca_off_step: step from which on no noise is added; None for never.
      crop_size: side of the window that is cut out of larger images, at random in training; None: all of the image.
      enlarge_to: side to which the result is enlarged (bilinear); None: it is left.
      input_range: 1 or 255: what the grey levels 0..255 are scaled to.
    """

    basis: PcaBasis
    mean_image: np.ndarray | None = None
    crop_padding: int = 0
    crop_mode: str = "reflect"
    flip: bool = False
    pca: str = "none"
    pca_std: float = 0.1
    pca_off_step: int | None = None
    crop_size: int | None = None
    enlarge_to: int | None = None
    input_range: int = 1

    def input_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape (H, W, C) of the network's input from stored images of `image_shape`."""
        height, width, channels = image_shape
        side = self.enlarge_to or self.crop_size
        return (side, side, channels) if side else (height, width, channels)

    def evaluation(self, images: Images, view: View = CENTRE) -> jax.Array:
        """uint8 (or float grey levels) [B, H, W, 3] -> float32 network input.

        Views other than the centre shift the image as training's crops do at most: within the stored image by
        `crop_size`, or within the padded one by `crop_padding`. Without either they can only mirror.
        """
        x = self._centre(images)
        height, width = size = x.shape[1:3]
        if self.crop_size:
            size = (self.crop_size, self.crop_size)
        elif self.crop_padding and view[:2] != CENTRE[:2]:
            x = _pad(x, self.crop_padding, self.crop_mode)
            height, width = x.shape[1:3]
        row, column = round(view.row * (height - size[0])), round(view.column * (width - size[1]))
        x = x[:, row : row + size[0], column : column + size[1]]
        return self._scale(x[:, :, ::-1] if view.flip else x)

    def training(self, keys: jax.Array, images: Images, step: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> float32 network input, augmented.

        Args:
          keys: [B] PRNG keys, one an example.
          images: uint8 [B, H, W, 3].
          step: int32 scalar, number of updates made so far.
        """
        crop_keys, flip_keys, noise_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys).T
        if self.crop_size:
            x = random_window(crop_keys, images, self.mean_image, self.crop_size)
        else:
            x = self._centre(images)
            if self.crop_padding:
                x = random_crop(crop_keys, x, self.crop_padding, self.crop_mode)
        if self.flip:
            x = random_flip(flip_keys, x)
        if self.pca != "none":
            x = self._add_noise(x, images, noise_keys, step)
        return self._scale(x)

    def noise(self, keys: jax.Array, images: Images, std: jax.Array | float) -> jax.Array:
        """The PCA colour noise of this configuration, float32 [B, 3], grey levels, before any division."""
        if self.pca == "per-image":
            return per_image_noise(keys, jnp.asarray(images, jnp.float32), std)
        scales = deviation_scales(self.basis) if self.pca == "dataset-std" else eigenvalue_scales(self.basis)
        return dataset_noise(keys, scales, self.basis.eigenvectors, std)

    def _scale(self, x: jax.Array) -> jax.Array:
        x = x / 255 if self.input_range == 1 else x
        if self.enlarge_to:
            x = jax.image.resize(x, (len(x), self.enlarge_to, self.enlarge_to, x.shape[-1]), "bilinear")
        return x

    def _centre(self, images: Images) -> jax.Array:
        x = jnp.asarray(images, jnp.float32)
        return x if self.mean_image is None else x - self.mean_image[None]

    def _add_noise(self, x: jax.Array, images: Images, keys: jax.Array, step: jax.Array) -> jax.Array:
        std: jax.Array | float = self.pca_std
        if self.pca_off_step is not None:
            std = jnp.where(step < self.pca_off_step, std, 0.0)
        noisy = x + self.noise(keys, images, std)[:, None, None, :]
        if self.pca != "dataset-std":
            return noisy
        # The 2012 program then divides the centred image by 1 + std, so that training pixels spread no wider than the
        # noiseless ones of testing. Where no mean image was subtracted, the division goes about the mean colour.
        centre = jnp.asarray(self.basis.mean, jnp.float32).reshape(1, 1, 1, 3) if self.mean_image is None else 0.0
        return centre + (noisy - centre) / (1 + std)


def visible_noise(preprocessing: Preprocessing, image: np.ndarray, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """PCA perturbations of one image, to be looked at.

    The noise is the configuration's own; where that is "none" or "per-image" it is per image, with standard deviation 5
    as in the seed's picture, because 0.1 can't be seen.

    Args:
      preprocessing: whose noise.
      image: uint8 [H, W, 3].
      count: how many, from a fixed key.

    Returns:
      The perturbed images, uint8 [count, H, W, 3], clipped, and the shift of each, float32 [count, 3], grey levels.
    """
    if preprocessing.pca in ("none", "per-image"):
        preprocessing = dataclasses.replace(preprocessing, pca="per-image", pca_std=5.0)
    keys = jax.random.split(jax.random.key(0), count)
    noise = np.asarray(preprocessing.noise(keys, np.stack([image] * count), preprocessing.pca_std))
    return np.clip(image + noise[:, None, None, :], 0, 255).astype(np.uint8), noise


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is measured on the training images and lies beside the weights.

    Attributes:
      basis: PCA basis of the pixels.
      mean_image: float32 [H, W, 3], grey levels.
    """

    basis: PcaBasis
    mean_image: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> "Statistics":
        """Measures uint8 images [N, H, W, 3]."""
        return cls(pca_basis(images), images.mean(axis=0, dtype=np.float64).astype(np.float32))


def from_config(config: AugmentationConfig, statistics: Statistics, steps_per_epoch: int) -> Preprocessing:
    """The preprocessing that a configuration describes."""
    return Preprocessing(
        basis=statistics.basis,
        mean_image=statistics.mean_image if config.subtract_mean else None,
        crop_padding=config.crop_padding,
        crop_mode=config.crop_mode,
        flip=config.flip,
        pca=config.pca,
        pca_std=config.pca_std,
        pca_off_step=None if config.pca_off_epoch is None else config.pca_off_epoch * steps_per_epoch,
        crop_size=config.crop_size,
        enlarge_to=config.enlarge_to,
        input_range=config.input_range,
    )
