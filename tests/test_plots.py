import io
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from alexnet_jax import plots
from alexnet_jax.errors import AlexNetError
from alexnet_jax.plots.text import fonts_with

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


def draw(figure: Figure) -> None:
    """Layout, tick labels and many of matplotlib's complaints come only with the drawing."""
    figure.savefig(io.BytesIO(), format="png")


def pixels(ax: Axes) -> np.ndarray:
    (image,) = ax.images
    array = image.get_array()
    assert array is not None
    return array


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def train_record(step: int, epoch: int, **values: Any) -> dict[str, Any]:
    record = {"step": step, "epoch": epoch, "split": "train", "loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-3}
    return record | values


def validation_record(step: int, epoch: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "split": "validation", "loss": 1.2, "accuracy": 0.6, "count": 100} | values


class TestImages:
    def test_portraits_draw_each_image_under_its_title(self, images: np.ndarray) -> None:
        figure = plots.portraits(images, list("abcdefg"), columns=3)
        draw(figure)
        assert [ax.get_title() for ax in figure.axes] == list("abcdefg")
        for ax, image in zip(figure.axes, images, strict=True):
            np.testing.assert_allclose(pixels(ax) * 255, image, atol=1e-9)
        corners = [ax.get_position() for ax in figure.axes]
        assert len({round(corner.x0, 6) for corner in corners}) == 3
        assert len({round(corner.y0, 6) for corner in corners}) == 3
        assert corners[0].y0 > corners[3].y0  # the first row is at the top

    def test_float_images_look_the_same_as_grey_levels(self, images: np.ndarray) -> None:
        as_float = plots.portraits((images / 255).astype(np.float32), range(7))
        for ours, theirs in zip(as_float.axes, plots.portraits(images, range(7)).axes, strict=True):
            np.testing.assert_allclose(pixels(ours), pixels(theirs), atol=1e-6)

    @pytest.mark.parametrize("title", ["frog", "a much longer name of a class", "line\nbreak"])
    def test_titles_are_within_the_figure_and_off_the_images(self, images: np.ndarray, title: str) -> None:
        figure = plots.portraits(images[:4], [title] * 4, columns=2)
        draw(figure)
        boxes = [ax.title.get_window_extent() for ax in figure.axes]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
            assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])

    @pytest.mark.parametrize(
        "bad",
        [
            np.full((2, 8, 8, 3), 200.0),  # grey levels as float would be drawn as white
            np.full((2, 8, 8, 3), np.nan),
            np.full((2, 8, 8, 3), 3, dtype=np.int64),
            np.zeros((2, 8, 8, 1), np.uint8),
            np.zeros((8, 8, 3), np.uint8),
            np.zeros((0, 8, 8, 3), np.uint8),
        ],
    )
    def test_refuses_other_arrays(self, bad: np.ndarray) -> None:
        with pytest.raises(ValueError, match="images must be"):
            plots.portraits(bad, ["a"] * len(bad))

    def test_pca_strip_prints_the_shift_under_each_image(self, images: np.ndarray) -> None:
        shifts = np.array([[12.4, -3.0, 0.2], [-110.0, 7.6, -0.4]])
        figure = plots.pca_strip(images[:2], shifts, images[6])
        draw(figure)
        assert [ax.get_title() for ax in figure.axes] == ["Original", "", ""]
        for ax, image in zip(figure.axes, images[[6, 0, 1]], strict=True):
            np.testing.assert_allclose(pixels(ax) * 255, image, atol=1e-9)
        labels = [ax.get_xlabel().replace("\N{MINUS SIGN}", "-").split() for ax in figure.axes]
        assert labels == [[], ["R", "+12", "G", "-3", "B", "+0"], ["R", "-110", "G", "+8", "B", "+0"]]
        assert all(figure.bbox.y0 <= ax.xaxis.label.get_window_extent().y0 for ax in figure.axes)


class TestTrainingCurves:
    def test_draws_both_splits_and_marks_the_best(self) -> None:
        records = [train_record(step, (step - 1) // 100, loss=2 - step / 400) for step in range(50, 301, 50)]
        records += [
            validation_record(100, 0, accuracy=0.5),
            validation_record(200, 1, accuracy=0.75),
            validation_record(300, 2, accuracy=0.7),
        ]
        figure = plots.training_curves(records)
        draw(figure)
        loss, accuracy, rate = figure.axes
        train, validation = loss.lines
        np.testing.assert_array_equal(train.get_xdata(), [50, 100, 150, 200, 250, 300])
        np.testing.assert_allclose(np.asarray(train.get_ydata()), 2 - np.arange(50, 301, 50) / 400)
        np.testing.assert_array_equal(validation.get_xdata(), [100, 200, 300])
        assert texts(loss) == ["Train (dropout on)", "Validation"]
        assert texts(accuracy)[-1] == "Best validation: 75.0%, step 200"
        star = accuracy.lines[-1]
        assert (star.get_xdata(), star.get_ydata()) == ([200], [0.75])
        np.testing.assert_array_equal(rate.lines[0].get_ydata(), [1e-3] * 6)

    def test_the_axis_of_epochs_counts_completed_ones(self) -> None:
        # Validation in the middle of epochs must not stretch the axis: epoch 2 is complete at step 200.
        records = [validation_record(70, 0), train_record(100, 0), validation_record(140, 1), train_record(200, 1)]
        figure = plots.training_curves(records)
        draw(figure)
        (above,) = figure.axes[0].child_axes
        limits = figure.axes[0].get_xlim()
        np.testing.assert_allclose(above.get_xlim(), np.array(limits) / 100)

    @pytest.mark.parametrize(
        ("records", "panels"),
        [
            ([], 2),
            ([train_record(100, 0)], 3),
            ([train_record(100, 0), train_record(200, 1)], 3),
            ([validation_record(100, 0)], 2),
            ([train_record(100, 0, learning_rate=0.0)], 3),
            ([{"step": 100, "split": "train", "loss": 2.0, "accuracy": 0.5}, train_record(200, 1)], 3),
            ([{"step": 5, "epoch": 0, "split": "train", "loss": None, "accuracy": math.nan}], 2),
            ([train_record(1, 0, loss=math.nan, learning_rate=math.nan), validation_record(1, 0, accuracy=None)], 2),
        ],
    )
    def test_draws_what_there_is(self, records: list[dict[str, Any]], panels: int) -> None:
        figure = plots.training_curves(records)
        draw(figure)
        assert len(figure.axes) == panels

    def test_counts_the_values_that_are_not_finite(self) -> None:
        losses = [1.0, math.nan, math.inf, 0.5]
        figure = plots.training_curves([train_record(step, 0, loss=loss) for step, loss in enumerate(losses)])
        draw(figure)
        assert texts(figure.axes[0]) == ["Train (dropout on), 2 of 4 not finite"]
        (line,) = figure.axes[0].lines
        np.testing.assert_array_equal(line.get_ydata(), [1.0, np.nan, np.nan, 0.5])
        assert line.get_marker() == "o"  # without it, a lone value between gaps would not be seen

    def test_of_two_records_of_a_step_the_later_counts(self) -> None:
        records = [train_record(2, 0, loss=9.0), train_record(1, 0, loss=3.0), train_record(2, 0, loss=2.0)]
        (line,) = plots.training_curves(records).axes[0].lines
        np.testing.assert_array_equal(line.get_xydata(), [[1, 3.0], [2, 2.0]])

    def test_a_large_first_loss_makes_the_axis_logarithmic(self) -> None:
        ordinary = [train_record(step, 0) for step in range(1, 9)]
        assert plots.training_curves(ordinary).axes[0].get_yscale() == "linear"
        figure = plots.training_curves([train_record(0, 0, loss=90.0), *ordinary])
        draw(figure)
        assert figure.axes[0].get_yscale() == "log"


class TestConfusionMatrix:
    def test_numbers_recall_and_names(self) -> None:
        matrix = np.array([[8, 2, 0], [1, 30, 9], [0, 0, 0]])
        figure = plots.confusion_matrix(matrix, ["cat", "dog", "fox"], "Test")
        draw(figure)
        ax, _ = figure.axes
        cells = np.full((3, 3), -1)
        for text in ax.texts:
            column, row = (int(place) for place in text.get_position())
            cells[row, column] = int(text.get_text())
        np.testing.assert_array_equal(cells, matrix)
        np.testing.assert_allclose(pixels(ax), np.array([[0.8, 0.2, 0], [0.025, 0.75, 0.225], [0, 0, 0]]))
        assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "fox"]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog", "fox"]
        (recall,) = ax.child_axes
        assert [label.get_text() for label in recall.get_yticklabels()] == ["80.0%", "75.0%", "\N{EN DASH}"]
        assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Test", "Predicted class", "True class")

    def test_every_number_stands_out_from_its_cell(self) -> None:
        """WCAG's contrast ratio, (lighter + 0.05) / (darker + 0.05) of the relative luminances, is 3 or more."""
        matrix = np.zeros((30, 30), int)
        matrix[:, 0] = np.arange(30)  # with the next column: shares from 0 to 1 in steps of 1/29
        matrix[:, 1] = 29 - matrix[:, 0]
        figure = plots.confusion_matrix(matrix, [str(i) for i in range(30)], "Test")
        ax = figure.axes[0]
        image = ax.images[0]
        for text in ax.texts:
            column, row = (int(place) for place in text.get_position())
            colour = np.array(image.to_rgba(pixels(ax))[row, column, :3])
            linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
            luminance = linear @ [0.2126, 0.7152, 0.0722]
            contrast = 1.05 / (luminance + 0.05) if text.get_color() == "white" else (luminance + 0.05) / 0.05
            assert contrast >= 3, (row, column, text.get_color())

    def test_the_colour_distinguishes_small_confusions_from_none(self) -> None:
        figure = plots.confusion_matrix([[96, 4], [0, 100]], ["a", "b"], "Test")
        image = figure.axes[0].images[0]
        none, some = image.to_rgba(np.array([[0.0, 0.04]]))[0, :, :3]
        linear = np.array(colormaps["Blues"](0.04)[:3])
        assert np.abs(some - none).sum() > 3 * np.abs(linear - none).sum()

    @pytest.mark.parametrize("classes", [31, 100])
    def test_many_classes_get_no_numbers_and_few_names(self, classes: int) -> None:
        names = [f"n{i:04d}_with_a_name_that_goes_on" for i in range(classes)]
        figure = plots.confusion_matrix(np.eye(classes, dtype=int), names, "Test")
        draw(figure)
        ax = figure.axes[0]
        shown = [label.get_text() for label in ax.get_yticklabels()]
        assert not ax.texts
        assert 10 <= len(shown) <= 25
        assert shown[0] == "n0000_with…t_goes_on"
        assert [label.get_text()[:5] for label in ax.get_yticklabels()] == [names[int(i)][:5] for i in ax.get_yticks()]


class TestKernels:
    def test_tiles_are_in_the_order_of_the_layer(self) -> None:
        kernel = np.random.default_rng(0).normal(size=(5, 5, 3, 7)).astype(np.float32)
        figure = plots.kernels(kernel, columns=4)
        draw(figure)
        (ax,) = figure.axes
        mosaic = pixels(ax)
        assert mosaic.shape == (2 * 6 - 1, 4 * 6 - 1, 3)
        scale = np.percentile(np.abs(kernel), 99.5)
        for i in range(7):
            top, left = 6 * (i // 4), 6 * (i % 4)
            expected = np.clip(0.5 + kernel[..., i] / (2 * scale), 0, 1)
            np.testing.assert_allclose(mosaic[top : top + 5, left : left + 5], expected, rtol=1e-5)
        assert (mosaic[5] == 1).all()  # between the rows
        assert (mosaic[6:, 18:] == 1).all()  # the place left over
        assert "7 of 5 × 5 × 3" in ax.get_title()
        assert f"±{scale:.2g}" in ax.get_title()

    def test_an_outlier_leaves_the_others_visible(self) -> None:
        kernel = np.random.default_rng(0).normal(scale=0.1, size=(7, 7, 3, 48))
        kernel[0, 0, 0, 0] = 100.0
        assert pixels(plots.kernels(kernel).axes[0]).std() > 0.15

    def test_zero_is_grey_and_not_finite_is_white(self) -> None:
        kernel = np.zeros((3, 3, 3, 2))
        kernel[0, 0, :, 1] = np.nan, np.inf, -np.inf
        figure = plots.kernels(kernel)
        draw(figure)
        mosaic = pixels(figure.axes[0])
        assert (mosaic[:3, :3] == 0.5).all()
        assert (mosaic[0, 4] == 1).all()


class TestFeatureMaps:
    def test_maps_share_one_scale(self) -> None:
        maps = np.random.default_rng(0).uniform(0, 2, size=(6, 4, 20)).astype(np.float32)
        maps[..., 3] = 0
        figure = plots.feature_maps(maps, title="conv1")
        draw(figure)
        ax, _ = figure.axes
        mosaic = pixels(ax)
        assert mosaic.shape == (2 * 7 - 1, 16 * 5 - 1)
        for i in range(20):
            top, left = 7 * (i // 16), 5 * (i % 16)
            np.testing.assert_array_equal(mosaic[top : top + 6, left : left + 4], maps[..., i])
        assert ax.images[0].get_clim() == pytest.approx((0.0, np.percentile(maps, 99.5)))
        assert ax.get_title() == "conv1: 20 of 6 × 4"

    @pytest.mark.parametrize(
        ("value", "limits"), [(0.0, (0, 1)), (-1.0, (-1, 1)), (math.nan, (0, 1)), (math.inf, (0, 1))]
    )
    def test_draws_dead_and_broken_layers(self, value: float, limits: tuple[float, float]) -> None:
        figure = plots.feature_maps(np.full((3, 3, 5), value))
        draw(figure)
        drawn = np.ma.filled(np.ma.masked_invalid(pixels(figure.axes[0])), np.nan)
        assert figure.axes[0].images[0].get_clim() == limits
        np.testing.assert_array_equal(drawn[:3, :3], np.full((3, 3), value if math.isfinite(value) else np.nan))


class TestSave:
    @pytest.fixture
    def figure(self) -> Figure:
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([1, 2])
        return figure

    def test_writes_a_png_into_a_new_folder_and_over_an_old_file(self, figure: Figure, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "a" / "b" / "plot.png"
        for _ in range(2):
            plots.save(figure, path)
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert image.size == (400, 200)
        assert os.listdir(path.parent) == ["plot.png"]

    def test_wide_figures_get_fewer_dots(self, tmp_path: pathlib.Path) -> None:
        plots.save(Figure(figsize=(20, 1)), tmp_path / "wide.png")
        with Image.open(tmp_path / "wide.png") as image:
            assert image.size == (1600, 80)

    @pytest.mark.parametrize(("owner", "name"), [(pathlib.Path, "write_bytes"), (os, "replace")])
    def test_a_failure_leaves_the_old_file_and_no_other_file(
        self, figure: Figure, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
    ) -> None:
        path = tmp_path / "plot.png"
        path.write_bytes(b"old")

        def full(target: Any, *_: Any) -> None:
            pathlib.Path(target).touch()  # a write that broke off
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(owner, name, full)
        with pytest.raises(AlexNetError, match=r"plot\.png: No space left on device") as caught:
            plots.save(figure, path)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["plot.png"]

    @pytest.mark.parametrize("place", ["a folder", "in a file"])
    def test_a_place_that_no_file_can_have_is_one_line(
        self, figure: Figure, tmp_path: pathlib.Path, place: str
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(AlexNetError, match="can't write"):
            plots.save(figure, tmp_path if place == "a folder" else tmp_path / "file" / "plot.png")
        assert list(tmp_path.parent.glob(".*.tmp")) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_unwritable_folder_is_one_line(self, figure: Figure, tmp_path: pathlib.Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(AlexNetError, match="Permission denied"):
            plots.save(figure, tmp_path / "plot.png")


IMAGES, IMAGE = np.zeros((7, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("draw_it", "message"),
    [
        (lambda: plots.portraits(IMAGES, range(6)), "6 titles for 7 images"),
        (lambda: plots.pca_strip(IMAGES, np.zeros((6, 3)), IMAGE), r"noise_levels must be \[7, 3\], not \[6, 3\]"),
        (lambda: plots.predictions(IMAGES, "abcdef", [[("cat", 1.0)]] * 7), "6 names and 7 predictions for 7 images"),
        (lambda: plots.saliency(IMAGE, np.zeros((4, 4)), np.zeros((4, 4, 3)), "cat"), "maps must be"),
        (lambda: plots.confusion_matrix(np.zeros((2, 2)), "abc", "Test"), r"matrix must be \[3, 3\]"),
        (lambda: plots.confusion_matrix(np.zeros(3), "abc", "Test"), r"matrix must be \[3, 3\]"),
        (lambda: plots.kernels(np.zeros((3, 3, 48, 8))), "kernel must be"),
        (lambda: plots.kernels(np.zeros((3, 3, 3))), "kernel must be"),
        (lambda: plots.kernels(np.zeros((3, 3, 3, 0))), "kernel must be"),
        (lambda: plots.feature_maps(np.zeros((1, 6, 6, 2))), "maps must be"),
    ],
)
def test_other_shapes_are_refused(draw_it: Callable[[], Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_it()


def test_importing_brings_in_neither_pyplot_nor_pandas() -> None:
    code = "import sys, alexnet_jax.plots; print(sorted({'matplotlib.pyplot', 'pandas', 'seaborn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class TestComparedCurves:
    def test_draws_each_run_against_its_own_epochs(self) -> None:
        runs = {
            "a": [train_record(10, 0), validation_record(20, 0, accuracy=0.4), validation_record(40, 1, accuracy=0.7)],
            "b": [train_record(100, 0, loss=float("nan")), train_record(200, 0, loss=0.3)],
        }
        figure = plots.compared_curves(runs, {"a": 20, "b": 100})
        draw(figure)
        loss, accuracy = figure.axes
        np.testing.assert_allclose(loss.lines[0].get_xdata(), [0.5])
        a = next(line for line in accuracy.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2)
        np.testing.assert_allclose(a.get_xdata(), [1, 2])
        np.testing.assert_allclose(a.get_ydata(), [0.4, 0.7])
        b = next(line for line in loss.lines if list(line.get_xdata()) == [1, 2] and line.get_linestyle() == "--")
        assert np.isnan(b.get_ydata()[0])
        assert a.get_color() != b.get_color()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "validation", "training, dropout on"]

    def test_names_are_drawn_as_they_are(self) -> None:
        names = ["$x^$", "_hidden", "a" * 30 + "b" * 30 + "1", "a" * 30 + "b" * 30 + "2", *"cdef"]
        figure = plots.compared_curves({name: [train_record(10, 0)] for name in names}, dict.fromkeys(names, 10))
        draw(figure)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(set(labels)) == len(names) + 2
        styles = {(h.get_color(), h.get_marker()) for h in figure.legends[0].legend_handles[: len(names)]}
        assert len(styles) == len(names)


class TestPredictions:
    def test_draws_bars_under_each_image(self, images: np.ndarray) -> None:
        tops = [[("cat", 0.75), ("dog", 0.25)]] * 6 + [[("an extraordinarily long name", 1.0)]]
        figure = plots.predictions(images, [f"picture {i}" for i in range(7)], tops, columns=3)
        draw(figure)
        pictures, bars = figure.axes[::2], figure.axes[1::2]
        for ax, image in zip(pictures, images, strict=True):
            np.testing.assert_allclose(pixels(ax) * 255, image, atol=1e-9)
        assert [ax.get_title() for ax in pictures] == [f"picture {i}" for i in range(7)]
        assert [patch.get_width() for patch in bars[0].patches] == [0.75, 0.25]
        assert [text.get_text() for text in bars[0].texts] == ["cat", "75%", "dog", "25%"]
        assert bars[6].texts[0].get_text() == "an ext…g name"
        for above, below in zip(pictures, bars, strict=True):  # the first class is nearest to the image
            assert below.get_position().y1 < above.get_position().y0
            assert below.get_ylim()[0] > below.get_ylim()[1]
        for other in pictures[3:6]:
            assert other.get_position().y1 < bars[0].get_position().y0

    def test_names_are_drawn_as_they_are(self, images: np.ndarray, tmp_path: pathlib.Path) -> None:
        """Read as a formula, the first would be a ValueError; a missing glyph would be a warning."""
        names = ["$x^$", "写真.png", "_x"] + ["x"] * 4
        figure = plots.predictions(images, names, [[("$x^$", 1.0)]] * 7)
        plots.save(figure, tmp_path / "sheet.png")
        plots.save(plots.portraits(images, names), tmp_path / "portraits.png")
        plots.save(plots.confusion_matrix(np.eye(7, dtype=int), names, "title"), tmp_path / "confusion.png")
        plots.save(plots.saliency(images[0], np.eye(4), np.zeros((8, 8, 3)), "$x^$"), tmp_path / "saliency.png")
        plots.save(plots.histograms({"$x^$": np.arange(9.0)}, "title"), tmp_path / "histograms.png")

    @pytest.mark.skipif(not any("CJK" in f for f in font_manager.findSystemFonts()), reason="no font has these letters")
    def test_names_in_other_scripts_are_drawn(self, images: np.ndarray, tmp_path: pathlib.Path) -> None:
        """Letters that no font has are all drawn as the same box."""
        for name, title, label in (("a", "写", "고"), ("b", "真", "고"), ("c", "写", "양")):
            figure = plots.predictions(images[:1], [title], [[(label, 1.0)]])
            plots.save(figure, tmp_path / name)
            plots.save(
                plots.confusion_matrix(np.eye(2, dtype=int), [title, label], "title"), tmp_path / f"matrix {name}"
            )
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 6

    def test_a_font_that_has_the_letters_is_used(self, images: np.ndarray, tmp_path: pathlib.Path, monkeypatch) -> None:
        """Of those that come with matplotlib, which are everywhere: without a font of the system."""
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
        bundled = [e for e in font_manager.fontManager.ttflist if "matplotlib" in pathlib.Path(e.fname).parts]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
        fonts_with.cache_clear()
        figure = plots.predictions(images[:1], ["Ⓐ.png"], [[("plain", 1.0)]])
        plots.save(figure, tmp_path / "sheet.png")
        assert figure.axes[0].title.get_fontfamily()[1:] == ["STIXGeneral"]
        fonts_with.cache_clear()

    def test_half_a_character_of_a_name_is_an_escape(self, images: np.ndarray, tmp_path: pathlib.Path) -> None:
        figure = plots.predictions(images[:1], ["a\udce9\x07"], [[("\udce9", 1.0)]])
        plots.save(figure, tmp_path / "sheet.png")
        assert figure.axes[0].get_title() == "a\\udce9\\x07"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("an extraordinarily long name", "an ext…g name"),
            ("寿限無寿限無五劫の擦り切れ", "寿限無…り切れ"),
            ("寿限無五劫の", "寿限無五劫の"),
            ("寿限無五劫のa.jpeg", "寿限無…a.jpeg"),
        ],
    )
    def test_wide_letters_count_twice(self, text: str, expected: str) -> None:
        assert plots.shortened(text, 13) == expected


class TestHistograms:
    def test_counts_zeros_and_values_that_are_not_finite(self) -> None:
        values = {"conv1": np.arange(100.0), "fc1": np.array([0, 0, 1, np.nan]), "fc2": np.zeros((3, 4))}
        figure = plots.histograms(values, "Weights", columns=2)
        draw(figure)
        titles = [ax.get_title() for ax in figure.axes]
        assert titles == ["conv1 · 1% zeros", "fc1 · 50% zeros · 1 not finite", "fc2 · 100% zeros", ""]
        assert sum(patch.get_height() for patch in figure.axes[0].patches) == 100


class TestSaliency:
    def test_draws_the_image_and_both_maps(self, images: np.ndarray) -> None:
        occlusion, gradient = np.linspace(0, 1, 16).reshape(4, 4), np.zeros((8, 8, 3))
        gradient[2, 3, 1] = -7
        figure = plots.saliency(images[0], occlusion, gradient, "cat")
        draw(figure)
        image, covered, steep = figure.axes[:3]
        np.testing.assert_allclose(pixels(image) * 255, images[0], atol=1e-9)
        np.testing.assert_array_equal(pixels(covered), occlusion)
        assert covered.images[0].get_clim() == (0, 1)
        flat = plots.saliency(images[0], np.full((4, 4), 0.9), gradient, "cat")
        assert flat.axes[1].images[0].get_clim() == pytest.approx((0.9, 0.95))
        assert pixels(steep)[2, 3] == 7
        assert image.get_xlim() == covered.get_xlim() == steep.get_xlim()
