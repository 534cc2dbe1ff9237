import hashlib

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from alexnet_jax.datasets import shapes
from alexnet_jax.datasets.dataset import Dataset


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return shapes.load(train=3000, validation=205, test=1000)


def mask(name: str, scale: float) -> np.ndarray:
    """Coverage of an upright shape in the middle of a 64 x 64 image."""
    v, u = (np.mgrid[:64, :64].astype(np.float32) - 31.5) / scale
    return shapes.coverage(shapes.SHAPES[name](u, v) * scale)


def test_splits_have_the_asked_sizes_and_types(dataset: Dataset) -> None:
    assert dataset.name == "shapes"
    assert len(dataset.class_names) == len(set(dataset.class_names)) == 10
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 3000,
        "validation": 205,
        "test": 1000,
    }
    for split in dataset.splits.values():
        assert split.images.shape == (len(split), 32, 32, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32


def test_classes_are_balanced_and_in_random_order(dataset: Dataset) -> None:
    for split in dataset.splits.values():
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
    # Balanced blocks of 100: a pair of neighbours repeats a class with probability 9 / 99, less than one in ten.
    labels = dataset["train"].labels
    assert 0.06 < np.mean(labels[1:] == labels[:-1]) < 0.13


def test_the_seed_decides_every_pixel() -> None:
    sizes = {"train": 120, "validation": 20, "test": 20}
    assert shapes.load(7, **sizes).fingerprint() == shapes.load(7, **sizes).fingerprint()
    first, other = shapes.load(7, **sizes), shapes.load(8, **sizes)
    assert not np.array_equal(first["train"].labels, other["train"].labels)
    assert not (first["train"].images == other["train"].images).all(axis=(1, 2, 3)).any()


def test_sizes_do_not_change_the_images(dataset: Dataset) -> None:
    small = shapes.load(train=2 * shapes.BLOCK, validation=205, test=0)
    np.testing.assert_array_equal(small["train"].images, dataset["train"].images[: 2 * shapes.BLOCK])
    np.testing.assert_array_equal(small["train"].labels, dataset["train"].labels[: 2 * shapes.BLOCK])
    np.testing.assert_array_equal(small["validation"].images, dataset["validation"].images)
    assert len(small["test"]) == 0


def test_drawing_one_image_at_a_time_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vector units work on other groups of pixels then; correctly rounded arithmetic does not show it."""
    together = shapes.load(train=30, validation=0, test=0)["train"].images
    draw_shape = shapes.SHAPES["disk"]

    def one_at_a_time(shape: shapes.Shape) -> shapes.Shape:
        return lambda u, v: np.stack([shape(a, b) for a, b in zip(u, v, strict=True)])

    assert draw_shape is shapes.SHAPES["disk"]
    for name, shape in list(shapes.SHAPES.items()):
        monkeypatch.setitem(shapes.SHAPES, name, one_at_a_time(shape))
    np.testing.assert_array_equal(shapes.load(train=30, validation=0, test=0)["train"].images, together)
