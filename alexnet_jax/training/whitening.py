"""Initial kernels for the first layer: the directions in which patches of the training images vary most."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.distributed import processes

IMAGES = 1000  # of the training set, of which patches are taken
SMALLEST = 5e-4  # added to each variance, in squared units of the network's input


def into(params: Any, preprocessing: Preprocessing, dataset: Dataset) -> Any:
    """`params` with kernels of `conv1` that whiten patches of the training images."""
    images = np.asarray(preprocessing.evaluation(dataset.sample(IMAGES).images))
    kernel = whiten(images, params["conv1"]["kernel"].shape)
    kernel = processes.gathered(kernel[None])[0]  # rounding may differ between hosts
    return params | {"conv1": params["conv1"] | {"kernel": jnp.asarray(kernel, jnp.float32)}}


def whiten(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels whose responses to patches of the images are uncorrelated and have variance 1.

        kernel_i = e_i / sqrt(lambda_i + SMALLEST),  kernel_{i + n/2} = -kernel_i,  i < n / 2

    where lambda_i and e_i are the largest eigenvalues, in descending order, and the eigenvectors of the patches'
    covariance. A kernel and its negative let both signs of a response pass the ReLU (Page, 2019; Jordan, 2024).

    Args:
      images: float32 [N, H, W, C], the network's input.
      shape: (h, w, C, n) of the kernels; n at most 2 h w C and even.

    Returns:
      float32, of that shape.
    """
    height, width, channels, count = shape
    patches = np.lib.stride_tricks.sliding_window_view(images, (height, width), axis=(1, 2))  # [N, H', W', C, h, w]
    size = height * width * channels
    total, products, number = np.zeros(size), np.zeros((size, size)), 0
    for some in np.array_split(patches, max(1, len(images) // 100)):
        rows = some.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size)
        total += rows.sum(axis=0, dtype=np.float64)
        products += rows.T @ rows
        number += len(rows)
    mean = total / number
    variances, vectors = np.linalg.eigh(products / number - np.outer(mean, mean))
    half = count // 2
    kernels = vectors[:, ::-1][:, :half] / np.sqrt(variances[::-1][:half] + SMALLEST)
    return np.concatenate([kernels, -kernels], axis=1).astype(np.float32).reshape(shape)
