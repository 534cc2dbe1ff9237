import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from alexnet_jax.datasets import shapes


@pytest.fixture(scope="module")
def drawn():
    return shapes.load(train=3000, validation=200, test=1000)


def test_sizes_and_balance(drawn):
    assert drawn.name == "shapes"
    assert len(set(drawn.class_names)) == 10
    for name, size in (("train", 3000), ("validation", 200), ("test", 1000)):
        split = drawn[name]
        assert split.images.shape == (size, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(split.labels), size // 10)
        assert np.any(np.diff(split.labels) < 0)  # in random order


def test_odd_sizes_are_balanced_within_one():
    counts = np.bincount(shapes.load(train=123, validation=7, test=0)["train"].labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_the_seed_decides_every_pixel(drawn):
    again = shapes.load(0, train=200, validation=200, test=100)
    assert shapes.load(0, train=200, validation=200, test=100).fingerprint() == again.fingerprint()
    assert shapes.load(1, train=200, validation=200, test=100).fingerprint() != again.fingerprint()
    # The first images do not change with the number drawn, nor with that of another split.
    np.testing.assert_array_equal(again["train"].images, drawn["train"].images[:200])
    np.testing.assert_array_equal(again["test"].images, drawn["test"].images[:100])


def test_splits_share_no_image(drawn):
    seen = [image.tobytes() for split in drawn.splits.values() for image in split.images]
    assert len(set(seen)) == len(seen) == 4200


def test_a_linear_classifier_stays_under_60_percent(drawn):
    scaler = StandardScaler()
    train = scaler.fit_transform(drawn["train"].images.reshape(3000, -1).astype(np.float32))
    test = scaler.transform(drawn["test"].images.reshape(1000, -1).astype(np.float32))
    classifier = RidgeClassifier(alpha=1e3).fit(train, drawn["train"].labels)
    accuracy = classifier.score(test, drawn["test"].labels)
    assert 0.05 < accuracy < 0.60
    assert classifier.score(train, drawn["train"].labels) > 0.5  # it did learn what a linear one can


def test_colour_does_not_tell_the_class(drawn):
    """Mean colours of the classes differ by less than a quarter of their spread between images."""
    split = drawn["train"]
    colours = split.images.mean(axis=(1, 2))
    means = np.stack([colours[split.labels == label].mean(axis=0) for label in range(10)])
    assert np.all(np.ptp(means, axis=0) < 0.5 * colours.std(axis=0))


def test_edges_are_anti_aliased():
    """A disk of radius 8 pixels: full inside, empty outside, in between only within a pixel of the outline."""
    y, x = np.mgrid[:32, :32].astype(np.float32) - 15.5
    distance = np.hypot(x, y) - 8
    cover = shapes.coverage(distance)
    np.testing.assert_array_equal(cover[distance < -0.5], 1)
    np.testing.assert_array_equal(cover[distance > 0.5], 0)
    between = (cover > 0) & (cover < 1)
    assert between.sum() > 30
    np.testing.assert_allclose(cover.sum(), np.pi * 64, rtol=0.01)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_similar_extents_and_areas(name):
    """Else size would tell the class: the area that a linear classifier can sum up."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    inside = shapes.SHAPES[name](u, v) < 0
    assert 0.65 < np.hypot(u, v)[inside].max() < 1.25
    assert 1.0 < inside.sum() * 0.01**2 < 1.9


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        shapes.load(train=-1)
