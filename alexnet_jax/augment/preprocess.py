"""From stored images to the network's input, in training and in evaluation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.augment.crops import (
    CENTRE,
    View,
    alternating_flip,
    cutout,
    pad,
    random_crop,
    random_flip,
    view_crop,
)
from alexnet_jax.augment.pca import pca_noise
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data.batches import updates_before
from alexnet_jax.data.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From stored images, uint8 or float grey levels [B, H, W, 3], to the network's input, float32 [B, H', W', 3].

    To add an augmentation, add a setting to `AugmentationConfig` and a function, and call the function in `training`.

    Attributes:
      config: the settings.
      statistics: mean image and PCA basis of the training set.
      steps_per_epoch: updates in an epoch.
    """

    config: AugmentationConfig
    statistics: Statistics
    steps_per_epoch: int

    def training(self, keys: jax.Array, images: jax.Array | np.ndarray, step: jax.Array) -> jax.Array:
        """The input for training: subtract the mean image, crop, flip, add colour noise, cut out, scale, enlarge.

        Args:
          keys: [B, K] PRNG keys, one per example and kind of draw, K >= 4.
          images: uint8 [B, H, W, 3].
          step: int32 scalar, number of updates made so far.
        """
        crop_keys, flip_keys, noise_keys, cutout_keys, *_ = keys.T
        x = self._centred(images)
        if self.config.crop_size or self.config.crop_padding:
            x = random_crop(crop_keys, self._padded(x), self._window(images))
        if self.config.flip:
            alternating = self.config.flip_schedule == "alternating"
            x = alternating_flip(x, images, step // self.steps_per_epoch) if alternating else random_flip(flip_keys, x)
        if self.config.pca != "none":
            x = self._add_noise(noise_keys, x, images, step)
        if self.config.cutout:
            x = cutout(cutout_keys, x, self.config.cutout, 0.0 if self.config.subtract_mean else self._mean_colour())
        return self._scaled(x)

    def evaluation(self, images: jax.Array | np.ndarray, view: View = CENTRE) -> jax.Array:
        """The input for testing: subtract the mean image, crop and flip by the view, scale, enlarge.

        A view shifts the window at most as far as training does: within the stored image with `crop_size`, within the
        padded image with `crop_padding`. Without either, a view can only mirror the image.
        """
        x = view_crop(view, self._padded(self._centred(images)), self._window(images))
        return self._scaled(x)

    def noise(self, keys: jax.Array, images: jax.Array | np.ndarray, std: jax.Array | float) -> jax.Array:
        """The PCA colour noise of these settings, float32 [B, 3], grey levels, before any division."""
        return pca_noise(keys, images, self.statistics.basis, self.config.pca, std)

    def input_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape (H', W', C) of the network's input from stored images of `image_shape`."""
        return input_shape(self.config, image_shape)

    def _centred(self, images: jax.Array | np.ndarray) -> jax.Array:
        x = jnp.asarray(images, jnp.float32)
        return x - self.statistics.mean_image[None] if self.config.subtract_mean else x

    def _padded(self, x: jax.Array) -> jax.Array:
        return pad(x, self.config.crop_padding, self.config.crop_mode) if self.config.crop_padding else x

    def _window(self, images: jax.Array | np.ndarray) -> tuple[int, ...]:
        """Height and width of the window that is cut out."""
        side = self.config.crop_size
        return (side, side) if side else images.shape[1:3]

    def _add_noise(self, keys: jax.Array, x: jax.Array, images: jax.Array | np.ndarray, step: jax.Array) -> jax.Array:
        """Not clipped to 0..255: the 2012 program does not clip either (the original post clips for display)."""
        std: jax.Array | float = self.config.pca_std
        if self.config.pca_off_epoch is not None:
            std = jnp.where(step < updates_before(self.config.pca_off_epoch, self.steps_per_epoch), std, 0.0)
        noisy = x + self.noise(keys, images, std)[:, None, None, :]
        if self.config.pca != "dataset-std":
            return noisy
        # The 2012 program then divides the centred image by 1 + std, so that the pixels in training spread no wider
        # than those in testing, which have no noise. If no mean image was subtracted, only the deviation from the mean
        # colour is divided.
        centre = 0.0 if self.config.subtract_mean else self._mean_colour()
        return centre + (noisy - centre) / (1 + std)

    def _mean_colour(self) -> jax.Array:
        return jnp.asarray(self.statistics.basis.mean, jnp.float32).reshape(1, 1, 1, 3)

    def _scaled(self, x: jax.Array) -> jax.Array:
        x = x / 255 if self.config.input_range == 1 else x
        if self.config.enlarge_to:
            x = jax.image.resize(
                x, (x.shape[0], self.config.enlarge_to, self.config.enlarge_to, x.shape[-1]), "bilinear"
            )
        return x


def input_shape(config: AugmentationConfig, image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape (H', W', C) of the network's input from stored images of `image_shape`."""
    height, width, channels = image_shape
    side = config.enlarge_to or config.crop_size
    return (side, side, channels) if side else (height, width, channels)


def visible_noise(preprocessing: Preprocessing, image: np.ndarray, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """PCA perturbations of one image, for display.

    The noise follows the settings, except that for "none" and "per-image" it is per-image noise with standard deviation
    5, as in the original post's figure, because 0.1 is invisible.

    Args:
      preprocessing: determines the noise.
      image: uint8 [H, W, 3].
      count: number of perturbations, drawn from a fixed key.

    Returns:
      The perturbed images, uint8 [count, H, W, 3], clipped, and the shift added to each, float32 [count, 3], grey
      levels.
    """
    config, basis = preprocessing.config, preprocessing.statistics.basis
    kind, std = ("per-image", 5.0) if config.pca in ("none", "per-image") else (config.pca, config.pca_std)
    keys = jax.random.split(jax.random.key(0), count)
    noise = np.asarray(pca_noise(keys, np.stack([image] * count), basis, kind, std))
    return np.clip(image + noise[:, None, None, :], 0, 255).astype(np.uint8), noise
