"""Training-time augmentation: random crops, flips and PCA colour noise, as pure functions of keys and images.

Every function takes one key for each example, so that an example's draw is the same wherever in a batch and on however
many devices it is worked on. Images are float32 [B, H, W, 3] in GREY LEVELS, 0..255 (not 0..1), noise too.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.augment.crops import CENTRE, Images, View, _pad, random_crop, random_flip, random_window
from alexnet_jax.augment.pca import dataset_noise, deviation_scales, eigenvalue_scales, per_image_noise
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data.statistics import PcaBasis, Statistics


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
