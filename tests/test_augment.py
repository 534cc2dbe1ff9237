import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from alexnet_jax.augment.crops import CENTRE, VIEWS, View, alternating_flip, cutout, pad, random_crop, random_flip
from alexnet_jax.augment.pca import deviation_scales, eigenvalue_scales, image_covariance, pca_noise
from alexnet_jax.augment.preprocess import Preprocessing, visible_noise
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data.statistics import PcaBasis, Statistics


@pytest.fixture(scope="module")
def images(tiny):
    return tiny["train"].images


@pytest.fixture(scope="module")
def statistics(images):
    return Statistics.of(images)


@pytest.fixture(scope="module")
def basis(statistics):
    return statistics.basis


@pytest.fixture(scope="module")
def make(statistics):
    """Preprocessing with some settings and, in all cases, 5 steps an epoch."""
    return lambda **settings: Preprocessing(AugmentationConfig(**settings), statistics, steps_per_epoch=5)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def keys_of_all_draws(n, seed=0):
    return jax.random.split(jax.random.key(seed), (n, 6))


def test_basis_equals_sklearn(images, basis):
    pca = PCA(3).fit(images.reshape(-1, 3))
    np.testing.assert_allclose(basis.mean, pca.mean_, rtol=1e-9)
    np.testing.assert_allclose(basis.eigenvalues, pca.explained_variance_, rtol=1e-7)
    # Rows of components_ are eigenvectors, columns of ours; the sign is free.
    np.testing.assert_allclose(np.abs((pca.components_ * basis.eigenvectors.T).sum(axis=1)), 1, atol=1e-7)


def posts_pca(image: np.ndarray) -> PCA:
    """Chapter 2 of the original post."""
    return PCA(3).fit(StandardScaler().fit_transform(image.reshape(-1, 3).astype(np.float64)))


@pytest.mark.both_lines
def test_image_covariance_is_the_posts(images):
    ours = np.asarray(image_covariance(jnp.asarray(images[:20], jnp.float32)))
    for image, matrix in zip(images[:20], ours, strict=True):
        pca = posts_pca(image)
        expected = pca.components_.T @ np.diag(pca.explained_variance_) @ pca.components_
        np.testing.assert_allclose(matrix, expected, atol=2e-5)


def test_a_constant_channel_keeps_scale_one(images):
    image = images[0].copy()
    image[:, :, 1] = 77
    matrix = np.asarray(image_covariance(jnp.asarray(image, jnp.float32)[None]))[0]
    np.testing.assert_allclose(matrix[1], 0, atol=1e-6)
    np.testing.assert_allclose(matrix[0, 0], 1024 / 1023, rtol=1e-5)
    flat = np.full((1, 32, 32, 3), 200.0, np.float32)
    np.testing.assert_array_equal(image_covariance(jnp.asarray(flat)), 0)


def assert_covariance(draws: np.ndarray, expected: np.ndarray) -> None:
    """Mean 0 and the expected covariance, within five standard errors of n draws."""
    n = len(draws)
    deviation = np.sqrt(np.diag(expected))
    assert np.all(np.abs(draws.mean(axis=0)) < 5 * deviation / np.sqrt(n))
    standard_error = np.sqrt((expected**2 + np.outer(deviation, deviation) ** 2) / n)
    assert np.all(np.abs(np.cov(draws.T) - expected) < 5 * standard_error)


DRAWS = 100_000


@pytest.mark.parametrize("index", [0, 3, 4])
def test_per_image_noise_has_the_posts_distribution(images, basis, index):
    """sum_i p_i alpha_i lambda_i with the image's own eigenvectors and eigenvalues, alpha ~ N(0, 0.1^2)."""
    image = jnp.asarray(images[index], jnp.float32)[None]
    matrix = image_covariance(image)
    pca = posts_pca(images[index])
    expected = 0.1**2 * pca.components_.T @ np.diag(pca.explained_variance_**2) @ pca.components_
    # The same image each time: 1,000 calls' worth of pixels need not be stacked.
    noise = jax.jit(jax.vmap(lambda key: pca_noise(key[None], image, basis, "per-image", 0.1)[0]))
    draws = np.asarray(noise(keys(DRAWS)))
    assert matrix.shape == (1, 3, 3)
    assert_covariance(draws, expected)
    assert draws.std(axis=0).max() < 0.5  # under half a grey level, as the README says


@pytest.mark.both_lines
@pytest.mark.parametrize(("mode", "exponent", "divisor"), [("dataset-std", 1, 1), ("dataset-eigenvalue", 2, 255**2)])
def test_dataset_noise_has_the_published_distribution(basis, mode, exponent, divisor):
    draws = np.asarray(pca_noise(keys(DRAWS), jnp.zeros((1, 1, 1, 3)), basis, mode, 0.1))
    vectors, values = basis.eigenvectors, basis.eigenvalues
    assert_covariance(draws, 0.1**2 * vectors @ np.diag(values**exponent) @ vectors.T / divisor)


def test_imagenet_noise_in_grey_levels():
    """The published deviations 121.78, 37.09, 19.72 give 12.2, 3.7 and 2.0 levels; the common port 5.5, 0.48, 0.11."""
    values = np.array([121.78, 37.09, 19.72]) ** 2
    basis = PcaBasis(np.zeros(3), values, np.eye(3))
    np.testing.assert_allclose(0.1 * deviation_scales(basis), [12.2, 3.7, 2.0], atol=0.05)
    port = PcaBasis(np.zeros(3), np.array([0.2175, 0.0188, 0.0045]) * 255**2, np.eye(3))
    np.testing.assert_allclose(0.1 * eigenvalue_scales(port), [5.5, 0.48, 0.11], atol=0.05)


def test_other_kinds_of_noise_are_refused(images, basis):
    with pytest.raises(ValueError, match="there is no PCA noise 'none'; choose from per-image, dataset-std"):
        pca_noise(keys(1), images[:1], basis, "none", 0.1)


def test_noise_is_one_shift_for_all_pixels_and_std_mode_divides_by_1_1(images, basis, make):
    def training(**settings):
        return np.asarray(make(**settings).training(keys_of_all_draws(8), images[:8], jnp.int32(0)))

    def assert_one_shift(difference):
        np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :1, :1], difference.shape), atol=1e-6)
        assert np.all(np.abs(difference).max(axis=(1, 2, 3)) > 0)

    assert_one_shift(training(pca="dataset-eigenvalue") - training())
    centred = {"subtract_mean": True}
    assert_one_shift(training(pca="dataset-std", **centred) * 1.1 - training(**centred))
    # Without a mean image, the deviation from the mean colour is divided in the same way.
    centre = basis.mean / 255
    assert_one_shift((training(pca="dataset-std") - centre) * 1.1 - (training() - centre))


@pytest.mark.parametrize("mode", ["per-image", "dataset-std", "dataset-eigenvalue"])
def test_noise_stops_at_its_epoch(images, make, mode):
    preprocessing = make(pca=mode, pca_off_epoch=2)  # of 5 steps
    plain = preprocessing.evaluation(images[:4])
    before = preprocessing.training(keys_of_all_draws(4), images[:4], jnp.int32(9))
    after = preprocessing.training(keys_of_all_draws(4), images[:4], jnp.int32(10))
    assert float(jnp.abs(before - plain).max()) > 1e-5
    np.testing.assert_allclose(after, plain, atol=1e-6)


def test_an_epoch_that_no_run_reaches(images, make):
    far = make(pca="per-image", pca_off_epoch=2**31 - 1).training(keys_of_all_draws(4), images[:4], jnp.int32(9))
    np.testing.assert_array_equal(far, make(pca="per-image").training(keys_of_all_draws(4), images[:4], jnp.int32(9)))


@pytest.mark.parametrize(
    "settings", [{"enlarge_to": 48}, {"crop_size": 24}, {"crop_padding": 4, "flip": True, "subtract_mean": True}]
)
def test_images_of_any_number_are_one_program(images, make, settings):
    """As an export has."""
    evaluation = make(**settings).evaluation
    some = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {images.shape[1]}, {images.shape[2]}, 3"), np.uint8)
    program = jax.export.export(jax.jit(evaluation))(some)
    for count in (1, 3):
        np.testing.assert_allclose(program.call(images[:count]), evaluation(images[:count]), atol=1e-5)


def test_visible_noise_is_drawn_where_the_settings_have_too_little(images, make):
    def shifts(**settings):
        noisy, noise = visible_noise(make(**settings), images[0], count=100)
        levels = images[0] + noise[:, None, None]
        assert noisy.dtype == np.uint8
        assert np.all(noisy == np.clip(levels, 0, 255).astype(np.uint8))
        return noise

    none, large = shifts(), shifts(pca="dataset-std")
    np.testing.assert_array_equal(none, shifts(pca="per-image", pca_std=0.1))
    assert 3 < none.std(axis=0).max() < 12  # 50 times the 0.1 to 0.17 of the settings
    assert not np.array_equal(none, large)


@pytest.mark.parametrize(("mode", "numpy_mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_crops_are_windows_of_the_padded_image(images, mode, numpy_mode):
    image = images[0]
    crops = np.asarray(random_crop(keys(500), pad(jnp.asarray(np.stack([image] * 500)), 2, mode), (32, 32)))
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)], mode=numpy_mode)
    windows = {padded[r : r + 32, c : c + 32].tobytes(): (r, c) for r in range(5) for c in range(5)}
    offsets = [windows[crop.tobytes()] for crop in crops]
    _, counts = np.unique(offsets, axis=0, return_counts=True)
    assert len(counts) == 25
    # 500 crops over 25 places: chi-square with 24 degrees of freedom stays under 60 in all but 1 of 10,000 cases.
    assert ((counts - 20) ** 2 / 20).sum() < 60


def test_flips_mirror_left_to_right_half_the_time(images):
    image = images[0]
    flipped = np.asarray(random_flip(keys(1000), jnp.asarray(np.stack([image] * 1000))))
    mirrored = np.array([np.array_equal(f, image[:, ::-1]) for f in flipped])
    assert np.all(mirrored | np.array([np.array_equal(f, image) for f in flipped]))
    assert 430 < mirrored.sum() < 570


@pytest.mark.both_lines
def test_an_examples_draws_depend_on_its_key_alone(images, make):
    preprocessing = make(crop_padding=4, flip=True, pca="per-image")
    together = preprocessing.training(keys_of_all_draws(8), images[:8], jnp.int32(0))
    half = preprocessing.training(keys_of_all_draws(8)[4:], images[4:8], jnp.int32(0))
    np.testing.assert_allclose(together[4:], half, atol=1e-6)
    again = preprocessing.training(keys_of_all_draws(8, seed=1), images[:8], jnp.int32(0))
    assert float(jnp.abs(again - together).mean()) > 0.01


def test_evaluation_only_scales(images, make):
    augmented = make(pca="dataset-std", crop_padding=4, flip=True)
    np.testing.assert_allclose(augmented.evaluation(images), images / 255.0, 1e-6)
    centred = make(subtract_mean=True).evaluation(images)
    np.testing.assert_allclose(np.asarray(centred).mean(axis=0), 0, atol=1e-5)


@pytest.mark.both_lines
def test_alternating_flips_show_each_image_both_ways(images, make):
    """In two epochs; which way comes first depends on the image alone, not on keys or neighbours."""
    preprocessing = make(flip=True, flip_schedule="alternating", input_range=255)
    first, second, third = (
        np.asarray(preprocessing.training(keys_of_all_draws(len(images)), images, jnp.int32(step)))
        for step in (1, 9, 10)
    )
    mirrored = images[:, :, ::-1]
    as_stored = np.array([np.array_equal(one, image) for one, image in zip(first, images, strict=True)])
    assert 0.2 < as_stored.mean() < 0.8
    np.testing.assert_array_equal(first, np.where(as_stored[:, None, None, None], images, mirrored))
    np.testing.assert_array_equal(second, np.where(as_stored[:, None, None, None], mirrored, images))
    np.testing.assert_array_equal(third, first)
    alone = preprocessing.training(keys_of_all_draws(3)[2:], images[:1], jnp.int32(1))
    np.testing.assert_array_equal(alone, first[:1])
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    white[0, 0, 0] = 0  # the largest sums stay exact
    assert np.array_equal(alternating_flip(jnp.asarray(white), white, jnp.int32(1)), white) == (white.sum() % 2 == 1)


@pytest.mark.parametrize("side", [1, 7, 8, 32])
def test_cutout_hides_a_square(side):
    """Its centre is uniform over the image."""
    images = jnp.ones((2000, 32, 32, 3))
    hidden = np.asarray(cutout(keys(2000), images, side, 0.0)) == 0
    assert (hidden[..., :1] == hidden).all()
    rows, columns = hidden[..., 0].any(axis=2), hidden[..., 0].any(axis=1)
    np.testing.assert_array_equal(hidden[..., 0], rows[:, :, None] & columns[:, None, :])  # a rectangle
    assert (rows.sum(axis=1) <= side).all()
    assert (rows.sum(axis=1) == side).mean() == pytest.approx(1 - (side - 1) / 32, abs=0.05)
    # A pixel is hidden if the centre is in a square around it: near the border, part of that is outside the image.
    reach = np.array([sum(0 <= p - d < 32 for d in range(-(side // 2), side - side // 2)) for p in range(32)]) / 32
    np.testing.assert_allclose(hidden[..., 0].mean(axis=0), np.outer(reach, reach), atol=0.05)


def test_cutout_has_the_mean_colour_and_changes_no_other_draw(images, statistics, make):
    settings = {"crop_padding": 4, "flip": True, "pca": "dataset-std"}
    for subtract_mean, colour in ((True, 0.0), (False, statistics.basis.mean / 255)):
        without, cut = (
            np.asarray(
                make(**settings, subtract_mean=subtract_mean, cutout=side).training(
                    keys_of_all_draws(len(images)), images, jnp.int32(0)
                )
            )
            for side in (0, 8)
        )
        changed = (without != cut).any(axis=-1)
        assert 16 / 1024 <= changed.mean() <= 64 / 1024
        np.testing.assert_allclose(cut[changed], np.broadcast_to(colour, cut[changed].shape), atol=1e-6)


def test_six_views_are_shifted_by_a_pixel(images, make):
    preprocessing = make(crop_padding=4, input_range=255)
    padded = np.pad(images[:2], [(0, 0), (4, 4), (4, 4), (0, 0)], "reflect")
    expected = [padded[:, 4 + s : 36 + s, 4 + s : 36 + s][:, :, ::way] for s in (0, -1, 1) for way in (1, -1)]
    for view, window in zip(VIEWS[6], expected, strict=True):
        np.testing.assert_array_equal(preprocessing.evaluation(images[:2], view), window)
    narrow = make(crop_size=32, input_range=255)  # nothing to shift
    np.testing.assert_array_equal(narrow.evaluation(images[:2], View(0.5, 0.5, False, 1)), images[:2])
    assert VIEWS[6][0] == CENTRE


def test_windows_of_larger_images(images, statistics, make):
    """Every position occurs, and the matching window of the mean image is subtracted."""
    image, preprocessing = images[0], make(crop_size=29, subtract_mean=True, input_range=255)
    windows = np.asarray(preprocessing.training(keys_of_all_draws(400), np.stack([image] * 400), jnp.int32(0)))
    whole = image - statistics.mean_image
    places = {whole[r : r + 29, c : c + 29].tobytes(): (r, c) for r in range(4) for c in range(4)}
    found = [places[window.tobytes()] for window in windows]
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 16
    # Chi-square with 15 degrees of freedom stays under 45 in all but 1 of 10,000 cases.
    assert ((counts - 25) ** 2 / 25).sum() < 45


@pytest.mark.both_lines
def test_training_windows_are_those_of_the_views(images, make):
    """Without noise, windows in training are shifted versions of the centre view in evaluation."""
    preprocessing = make(crop_size=30, flip=True, input_range=255)
    assert preprocessing.input_shape((32, 32, 3)) == (30, 30, 3)
    trained = np.asarray(preprocessing.training(keys_of_all_draws(64), np.stack([images[0]] * 64), jnp.int32(0)))
    mirrored = images[0][:, ::-1]
    places = {x[r : r + 30, c : c + 30].astype(np.float32).tobytes() for x in (images[0], mirrored) for r in range(3)
              for c in range(3)}  # fmt: skip
    assert {window.tobytes() for window in trained} <= places
    np.testing.assert_array_equal(preprocessing.evaluation(images[:2]), images[:2, 1:31, 1:31].astype(np.float32))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_views_of_a_padded_image(images, make, mode):
    preprocessing = make(crop_padding=4, crop_mode=mode, input_range=255)
    padded = np.pad(images[:2], [(0, 0), (4, 4), (4, 4), (0, 0)], "reflect" if mode == "reflect" else "constant")
    for view in VIEWS[10]:
        row, column = int(8 * view.row), int(8 * view.column)
        window = padded[:, row : row + 32, column : column + 32]
        expected = window[:, :, ::-1] if view.flip else window
        np.testing.assert_array_equal(preprocessing.evaluation(images[:2], view), expected)
    assert len(set(VIEWS[10])) == 10


def test_enlarging(images, make):
    preprocessing = make(enlarge_to=64, input_range=255)
    assert preprocessing.input_shape((32, 32, 3)) == (64, 64, 3)
    enlarged = np.asarray(preprocessing.evaluation(images[:1]))[0]
    expected = np.asarray(PIL.Image.fromarray(images[0]).resize((64, 64), PIL.Image.Resampling.BILINEAR), np.float32)
    assert np.abs(enlarged - expected).max() <= 1  # Pillow rounds to whole levels, twice
