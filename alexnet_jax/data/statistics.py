"""Mean image and PCA basis of a training set."""

import dataclasses
import pathlib

import numpy as np

from alexnet_jax.files import npz_bytes, read_npz

MAX_BYTES = 64 * 1024**2  # of a file; a mean image of 256x256 has 768 kB

# Arrays of a file: shape (None: any), least and largest value.
_ARRAYS = {
    "mean_image": (None, 0, 255),
    "mean": ((3,), 0, 255),
    "eigenvalues": ((3,), 0, 255**2 * 3),
    "eigenvectors": ((3, 3), -1.001, 1.001),
}


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

    Sums are taken in integers; the covariance is divided by the number of pixels minus one.
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
        # float64 products of integers are exact up to 2^53; those of a part are far below.
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
    """Statistics of the training images that preprocessing needs; stored in a file `statistics.npz`.

    Attributes:
      basis: PCA basis of the pixels.
      mean_image: float32 [H, W, 3], grey levels.
    """

    basis: PcaBasis
    mean_image: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> "Statistics":
        """Measures uint8 images [N, H, W, 3]."""
        return cls.from_sums(len(images), *pixel_sums(images))

    @classmethod
    def from_sums(cls, count: int, total: np.ndarray, products: np.ndarray) -> "Statistics":
        """The statistics of `count` images from their `pixel_sums`."""
        pixels = count * total.shape[0] * total.shape[1]
        basis = basis_from_sums(pixels, total.sum(axis=(0, 1)), products)
        return cls(basis, (total / count).astype(np.float32))

    def to_bytes(self) -> bytes:
        """The contents of a file."""
        return npz_bytes(mean_image=self.mean_image, **vars(self.basis))

    @classmethod
    def read(cls, path: pathlib.Path) -> "Statistics":
        """Reads a file.

        Raises:
          OSError: it can't be read.
          ValueError: it is damaged, or an array is missing, of another shape or out of range.
        """
        found = read_npz(path, MAX_BYTES)
        for name, (shape, low, high) in _ARRAYS.items():
            if name not in found:
                raise ValueError(f"it has no array {name}")
            array = found[name]
            if array.dtype not in (np.float32, np.float64) or shape not in (None, array.shape):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, but must be floats {shape or ''}")
            if not ((array >= low) & (array <= high)).all():
                raise ValueError(f"a value of {name} is not in {low} to {high}")
        return cls(PcaBasis(found["mean"], found["eigenvalues"], found["eigenvectors"]), found["mean_image"])
