"""Mean image and PCA basis of a training set."""

import dataclasses

import numpy as np


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
    total, products = pixel_sums(images)
    return basis_from_sums(images.size // 3, total.sum(axis=(0, 1)), products)


def pixel_sums(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact sums over uint8 images [N, H, W, 3].

    Returns:
      The sum of the images, int64 [H, W, 3], and of x x^T over all their pixels x, int64 [3, 3].
    """
    total, products = np.zeros(images.shape[1:], np.int64), np.zeros((3, 3), np.int64)
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000]
        total += part.sum(axis=0, dtype=np.int64)
        # float64 products of whole numbers are exact up to 2^53; a part's stay far below.
        pixels = part.reshape(-1, 3).astype(np.float64)
        products += (pixels.T @ pixels).astype(np.int64)
    return total, products


def basis_from_sums(count: int, total: np.ndarray, products: np.ndarray) -> PcaBasis:
    """The PCA basis from sums over `count` pixels x: int64 [3], of x, and int64 [3, 3], of x x^T."""
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / max(count - 1, 1)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return PcaBasis(mean, np.maximum(eigenvalues[::-1], 0.0), np.ascontiguousarray(eigenvectors[:, ::-1]))


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
