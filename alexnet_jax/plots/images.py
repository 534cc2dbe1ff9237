"""Images with titles, colour noise, predictions or saliency."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from alexnet_jax.plots.arrays import unit_images
from alexnet_jax.plots.style import LABEL, SMALL, TITLE, WIDTH
from alexnet_jax.plots.text import escaped, shortened, text_width


def portraits(images: ArrayLike, titles: Sequence[object], columns: int = 10) -> Figure:
    """Draws images [N, H, W, 3], uint8 or float in [0, 1], in a grid, each under its title; long titles are wrapped.

    Raises:
      ValueError: the images have another shape or range, or the number of titles differs.
    """
    pixels = unit_images(images)
    if len(titles) != len(pixels):
        raise ValueError(f"{len(titles)} titles for {len(pixels)} images")
    lines = [
        "\n".join(map(escaped, textwrap.wrap(text, max(14 * len(text) // max(text_width(text), 1), 1))))
        for text in map(str, titles)
    ]
    figure, axes = _image_grid(pixels, columns, above=max(text.count("\n") + 1 for text in lines))
    for ax, text in zip(axes, lines, strict=True):
        ax.set_title(text, fontsize=SMALL, pad=3)
    return figure


def pca_strip(perturbed: ArrayLike, noise_levels: ArrayLike, original: ArrayLike) -> Figure:
    """Draws an image and, beside it, its PCA colour perturbations with the shift that each adds to every pixel.

    Args:
      perturbed: [N, H, W, 3], uint8 grey levels or float in [0, 1], already clipped to its range.
      noise_levels: float [N, 3], the RGB shift of each in grey levels (0..255).
      original: [H, W, 3], uint8 grey levels or float in [0, 1].

    Raises:
      ValueError: an array has another shape or range.
    """
    noisy, shifts = unit_images(perturbed), np.asarray(noise_levels, dtype=float)
    if shifts.shape != (len(noisy), 3):
        raise ValueError(f"noise_levels must be [{len(noisy)}, 3], not {list(shifts.shape)}")
    pixels = np.concatenate([unit_images(np.asarray(original)[np.newaxis]), noisy])
    figure, axes = _image_grid(pixels, columns=len(pixels), above=2, below=3)
    figure.suptitle("PCA colour noise: shift of every pixel in grey levels", fontsize=TITLE, y=0.99, va="top")
    axes[0].set_title("Original", fontsize=SMALL, pad=3)
    for ax, shift in zip(axes[1:], shifts, strict=True):
        text = "\n".join(f"{channel} {round(level):+4d}" for channel, level in zip("RGB", shift, strict=True))
        ax.set_xlabel(text.replace("-", "\N{MINUS SIGN}"), fontsize=SMALL, family="monospace", labelpad=3)
    return figure


def predictions(
    images: ArrayLike, names: Sequence[str], tops: Sequence[Sequence[tuple[str, float]]], columns: int = 6
) -> Figure:
    """Draws images with the classes that a network predicts for them, as in the paper's figure 4.

    Args:
      images: [N, H, W, 3], uint8 grey levels or float in [0, 1].
      names: N names, drawn above the images.
      tops: the most probable classes of each image with their probabilities, drawn as bars below it.
      columns: images in a row.

    Raises:
      ValueError: the images have another shape or range, or lengths differ.
    """
    pixels = unit_images(images)
    if not len(pixels) == len(names) == len(tops):
        raise ValueError(f"{len(names)} names and {len(tops)} predictions for {len(pixels)} images")
    most = max(map(len, tops))
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    side, bar, line, gap = 1.05, 0.155, 0.2, 0.14  # inches: image, a class, the name, between
    size = (columns * (side + gap) + gap, rows * (line + side + most * bar + gap) + gap)
    figure = Figure(figsize=size)

    def axes_at(left: float, top: float, height: float, **options: Any) -> Axes:
        return figure.add_axes((left / size[0], (top - height) / size[1], side / size[0], height / size[1]), **options)

    for i, (image, name, top) in enumerate(zip(pixels, names, tops, strict=True)):
        row, column = divmod(i, columns)
        left, above = gap + column * (side + gap), size[1] - gap - row * (line + side + most * bar + gap) - line
        ax = axes_at(left, above, side, xticks=[], yticks=[])
        ax.imshow(image, interpolation="nearest", aspect="auto")
        ax.spines[:].set_visible(False)
        ax.set_title(escaped(shortened(name, 18)), fontsize=SMALL, pad=3)
        bars = axes_at(left, above - side - 0.03, len(top) * bar)
        bars.barh(range(len(top)), [probability for _, probability in top], color="#9ECAE9", height=0.85)
        for rank, (label, probability) in enumerate(top):
            bars.text(0.02, rank, escaped(shortened(label, 13)), va="center", fontsize=6.5)
            bars.text(0.98, rank, f"{probability:.0%}", va="center", ha="right", fontsize=6.5)
        bars.set(xlim=(0, 1), ylim=(len(top) - 0.5, -0.5))
        bars.set_axis_off()
    return figure


def saliency(image: ArrayLike, occlusion: ArrayLike, gradient: ArrayLike, title: str) -> Figure:
    """Draws an image beside two maps of what a class depends on: occlusion and input gradient.

    Args:
      image: [H, W, 3], uint8 grey levels or float in [0, 1].
      occlusion: float [h, w] in [0, 1], the class's probability with parts covered (`activations.occlusion_map`).
      gradient: float [H, W, 3], of the class's logit (`activations.input_gradient`); the largest absolute value of the
        three channels is drawn.
      title: title of the figure, such as the class.

    Raises:
      ValueError: an array has another shape or range.
    """
    (pixels,) = unit_images(np.asarray(image)[np.newaxis])
    covered, change = np.asarray(occlusion), np.asarray(gradient)
    if covered.ndim != 2 or change.shape != pixels.shape:
        raise ValueError(
            f"maps must be [h, w] and {list(pixels.shape)}, not {list(covered.shape)}, {list(change.shape)}"
        )
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    figure.suptitle(escaped(title), fontsize=TITLE)
    height, width = pixels.shape[:2]
    # The colours span at least 5 percentage points, so that a map without any effect looks uniform.
    low, high = float(covered.min()), max(float(covered.max()), float(covered.min()) + 0.05)
    drawings: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "Image": (pixels, {}),
        "Probability if covered here": (covered, {"cmap": "viridis", "vmin": low, "vmax": high}),
        "|gradient| (per grey level)": (np.abs(change).max(axis=-1), {"cmap": "magma"}),
    }
    for ax, (name, (values, options)) in zip(figure.subplots(1, 3), drawings.items(), strict=True):
        drawn = ax.imshow(values, interpolation="nearest", extent=(0, width, height, 0), **options)
        ax.set_title(name, fontsize=LABEL)
        ax.set_axis_off()
        if options:
            figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=SMALL)
    return figure


def _image_grid(pixels: np.ndarray, columns: int, above: int = 0, below: int = 0) -> tuple[Figure, list[Axes]]:
    """Draws float images [N, H, W, 3] in rows, with room for `above` and `below` lines of small text at each.

    Positions are computed in inches, because matplotlib's own layout takes seconds for a hundred images.
    """
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tile, gap, line = 0.9, 0.08, SMALL * 1.35 / 72
    tall = tile * height / width
    pitch = tall + gap + (above + below) * line
    size = (columns * (tile + gap) + gap, rows * pitch + gap)
    figure = Figure(figsize=size)
    axes = []
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        left, bottom = gap + column * (tile + gap), size[1] - row * pitch - gap - above * line - tall
        ax = figure.add_axes((left / size[0], bottom / size[1], tile / size[0], tall / size[1]), xticks=[], yticks=[])
        ax.imshow(image, interpolation="nearest", aspect="auto")
        ax.spines[:].set_visible(False)
        axes.append(ax)
    return figure, axes
