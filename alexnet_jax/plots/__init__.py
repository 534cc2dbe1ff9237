"""Pictures of the data, the training and the network. Every function takes arrays and returns a `Figure`.

They use matplotlib's objects and never `pyplot`: no window, no backend to choose, no figure kept alive unseen.
The confusion matrix does without seaborn, which loads pandas and `pyplot`: 0.8 s more to import.

Letters in the shapes: N images or kernels, H W height and width in pixels, C classes or channels, KH KW kernel size.
"""

import contextlib
import functools
import io
import itertools
import os
import pathlib
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

from alexnet_jax.files import write_atomically

DPI, MAX_PIXELS = 200, 1600  # sharp on a dense screen; wider figures get fewer dots, which keeps the files small
WIDTH = 7.5  # inches
TITLE, LABEL, SMALL = 10, 9, 8  # font sizes in points
TRAIN, VALIDATION, INK = "#0072B2", "#D55E00", "#444444"  # blue and vermilion of Okabe and Ito's colour-blind safe set
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # the same set
MAX_NUMBERED_CLASSES = 30  # beyond, the numbers in a confusion matrix are too small to read


def portraits(images: ArrayLike, titles: Sequence[object], columns: int = 10) -> Figure:
    """Draws images in a grid, row by row, each under its title.

    Args:
      images: uint8 [N, H, W, 3], grey levels 0..255, or float [N, H, W, 3] in [0, 1].
      titles: N titles, such as class names; long ones are wrapped.
      columns: images in a row.

    Raises:
      ValueError: the images are none of the above, or their number is not that of the titles.
    """
    pixels = _unit_images(images)
    if len(titles) != len(pixels):
        raise ValueError(f"{len(titles)} titles for {len(pixels)} images")
    lines = [
        "\n".join(map(_as_it_is, textwrap.wrap(text, max(14 * len(text) // max(_columns(text), 1), 1))))
        for text in map(str, titles)
    ]
    figure, axes = _image_grid(pixels, columns, above=max(text.count("\n") + 1 for text in lines))
    for ax, text in zip(axes, lines, strict=True):
        ax.set_title(text, fontsize=SMALL, pad=3)
    return figure


def pca_strip(perturbed: ArrayLike, noise_levels: ArrayLike, original: ArrayLike) -> Figure:
    """Draws one image and, beside it, its PCA colour perturbations with the shift that each adds to every pixel.

    Args:
      perturbed: [N, H, W, 3], uint8 grey levels or float in [0, 1], already clipped to its range.
      noise_levels: float [N, 3], the RGB shift of each in grey levels (of 255).
      original: [H, W, 3], uint8 grey levels or float in [0, 1].

    Raises:
      ValueError: an array has another shape or range.
    """
    noisy, shifts = _unit_images(perturbed), np.asarray(noise_levels, dtype=float)
    if shifts.shape != (len(noisy), 3):
        raise ValueError(f"noise_levels must be [{len(noisy)}, 3], not {list(shifts.shape)}")
    pixels = np.concatenate([_unit_images(np.asarray(original)[np.newaxis]), noisy])
    figure, axes = _image_grid(pixels, columns=len(pixels), above=2, below=3)
    figure.suptitle("PCA colour noise: shift of every pixel in grey levels", fontsize=TITLE, y=0.99, va="top")
    axes[0].set_title("Original", fontsize=SMALL, pad=3)
    for ax, shift in zip(axes[1:], shifts, strict=True):
        text = "\n".join(f"{channel} {round(level):+4d}" for channel, level in zip("RGB", shift, strict=True))
        ax.set_xlabel(text.replace("-", "\N{MINUS SIGN}"), fontsize=SMALL, family="monospace", labelpad=3)
    return figure


def by_split(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of `metrics.jsonl` of "train" and of "validation", by rising step.

    Of two of one split and step, as a resumed run may leave, the later counts.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {"train": {}, "validation": {}}
    for record in records:
        found[record["split"]][record["step"]] = record
    return {split: [steps[step] for step in sorted(steps)] for split, steps in found.items()}


def training_curves(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draws loss, accuracy and, where it was recorded, the learning rate against the training step.

    Gaps are values that are not finite; the legend counts them. Of two records of one split and step, as a resumed run
    may leave, the later counts. The loss is drawn on a logarithmic axis if its largest value, such as the first one,
    would press the rest flat. The epochs are those completed, from 0; their axis needs records of two epochs.

    Args:
      records: the lines of `metrics.jsonl`: mappings with `step` (updates made), `epoch` (the index from 0 of the one
        that the last of them was in), `split` ("train" or "validation"), `loss` (mean cross entropy in nats),
        `accuracy` (in [0, 1]) and, for "train", `learning_rate`.
    """
    train, validation = by_split(records).values()
    rates = _values(train, "learning_rate")
    has_rate = bool(np.isfinite(rates).any())

    figure = Figure(figsize=(6.5, 6.5 if has_rate else 5.5), layout="constrained")
    axes = figure.subplots(2 + has_rate, sharex=True, height_ratios=[3, 3, 1.2][: 2 + has_rate])
    loss, accuracy = axes[:2]
    for ax, key in ((loss, "loss"), (accuracy, "accuracy")):
        _curve(ax, train, key, "Train (dropout on)", TRAIN)
        _curve(ax, validation, key, "Validation", VALIDATION)
    _mark_best(accuracy, validation)

    losses = _values([*train, *validation], "loss")
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.max() > 10 * np.median(losses) > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss.minorticks_off()
    else:
        loss.set_ylim(bottom=0)
    loss.set_ylabel("Cross entropy (nats)", fontsize=LABEL)
    accuracy.set_ylabel("Accuracy", fontsize=LABEL)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    if has_rate:
        _curve(axes[2], train, "learning_rate", "", INK)
        axes[2].set_ylabel("Learning rate", fontsize=LABEL)
        if np.nanmin(rates) > 0:
            axes[2].set_yscale("log")
            axes[2].set_ylim(np.nanmin(rates) / 10**0.5, np.nanmax(rates) * 10**0.5)  # holds a power of ten to label
            axes[2].minorticks_off()

    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=SMALL)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=SMALL, frameon=False)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("Step", fontsize=LABEL)
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _epochs_above(loss, [*train, *validation])
    return figure


def compared_curves(records: Mapping[str, Iterable[Mapping[str, Any]]], steps_per_epoch: Mapping[str, int]) -> Figure:
    """Draws loss and accuracy of several runs over the epochs: validation in full lines, training in thin dashed ones.

    Args:
      records: the lines of each run's `metrics.jsonl` by its name, as for `training_curves`.
      steps_per_epoch: of each run by its name, as batches may differ.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    legend: list[tuple[Line2D, str]] = []
    for number, (name, lines) in enumerate(records.items()):
        color, marker = RUNS[number % len(RUNS)], "os^vDPX"[number // len(RUNS) % 7]
        for split, ordered in by_split(lines).items():
            epochs = [record["step"] / steps_per_epoch[name] for record in ordered]
            style = "--" if split == "train" else "-"
            width, dot = (0.8, "") if split == "train" else (1.6, marker)
            for ax, key in zip(axes, ("loss", "accuracy"), strict=True):
                ax.plot(epochs, _values(ordered, key), style, color=color, linewidth=width, marker=dot, markersize=2.5)
        legend.append((Line2D([], [], color=color, marker=marker, markersize=4), _as_it_is(shortened(name))))
    legend.append((Line2D([], [], color=INK, linewidth=1.6), "validation"))
    legend.append((Line2D([], [], color=INK, linewidth=0.8, linestyle="--"), "training, dropout on"))
    for ax, label in zip(axes, ("Cross entropy (nats)", "Accuracy"), strict=True):
        ax.set_xlabel("Epoch", fontsize=LABEL)
        ax.set_ylabel(label, fontsize=LABEL)
        ax.set_xlim(left=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.6)
        ax.tick_params(labelsize=SMALL)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[0].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = zip(*legend, strict=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def predictions(
    images: ArrayLike, names: Sequence[str], tops: Sequence[Sequence[tuple[str, float]]], columns: int = 6
) -> Figure:
    """Draws images with the classes that a network takes them for, as in the paper's figure 4.

    Args:
      images: uint8 [N, H, W, 3], grey levels 0..255, or float [N, H, W, 3] in [0, 1].
      names: N names, drawn above.
      tops: for each image its most probable classes with their probabilities, drawn as bars below.
      columns: images in a row.

    Raises:
      ValueError: the images are none of the above, or lengths differ.
    """
    pixels = _unit_images(images)
    if not len(pixels) == len(names) == len(tops):
        raise ValueError(f"{len(names)} names and {len(tops)} predictions for {len(pixels)} images")
    most = max(map(len, tops))
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    side, bar, line, gap = 1.05, 0.155, 0.2, 0.14  # inches: image, a class, the name, between
    size = (columns * (side + gap) + gap, rows * (line + side + most * bar + gap) + gap)
    figure = Figure(figsize=size)
    for i, (image, name, top) in enumerate(zip(pixels, names, tops, strict=True)):
        row, column = divmod(i, columns)
        left, above = gap + column * (side + gap), size[1] - gap - row * (line + side + most * bar + gap) - line
        picture = figure.add_axes(
            (left / size[0], (above - side) / size[1], side / size[0], side / size[1]), xticks=[], yticks=[]
        )
        picture.imshow(image, interpolation="nearest", aspect="auto")
        picture.spines[:].set_visible(False)
        picture.set_title(_as_it_is(shortened(name, 18)), fontsize=SMALL, pad=3)
        height = len(top) * bar
        bars = figure.add_axes(
            (left / size[0], (above - side - height - 0.03) / size[1], side / size[0], height / size[1])
        )
        bars.barh(range(len(top)), [probability for _, probability in top], color="#9ECAE9", height=0.85)
        for place, (label, probability) in enumerate(top):
            bars.text(0.02, place, _as_it_is(shortened(label, 13)), va="center", fontsize=6.5)
            bars.text(0.98, place, f"{probability:.0%}", va="center", ha="right", fontsize=6.5)
        bars.set(xlim=(0, 1), ylim=(len(top) - 0.5, -0.5))
        bars.set_axis_off()
    return figure


def histograms(values: Mapping[str, ArrayLike], title: str, columns: int = 4) -> Figure:
    """Draws how the values of each array are distributed, with a logarithmic count; the share of zeros is told.

    Args:
      values: arrays of any shape by name, such as the weights or the activations of each layer.
      title: the title.
      columns: histograms in a row.
    """
    columns = min(columns, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(WIDTH, 1.25 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=TITLE)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(values) :]:
        ax.set_axis_off()
    for ax, (name, array) in zip(axes, values.items(), strict=False):
        flat = _nan_unless_finite(array).ravel()
        finite = flat[np.isfinite(flat)]
        zeros = float((flat == 0).mean()) if flat.size else 0.0
        ax.hist(finite, bins=60, color=TRAIN, log=True)
        notes = [f"{zeros:.0%} zeros"] * (zeros >= 0.005) + [f"{len(flat) - len(finite):,} not finite"] * (
            len(finite) < len(flat)
        )
        ax.set_title(_as_it_is(" · ".join([name, *notes])), fontsize=SMALL, pad=3)
        ax.tick_params(labelsize=6.5, length=2)
        ax.yaxis.set_major_locator(LogLocator(numticks=4))
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def saliency(image: ArrayLike, occlusion: ArrayLike, gradient: ArrayLike, title: str) -> Figure:
    """Draws an image beside what a class hangs on: its probability with parts covered, and the logit's gradient.

    Args:
      image: [H, W, 3], uint8 grey levels or float in [0, 1].
      occlusion: float [h, w] in [0, 1], from `inspection.occlusion_map`.
      gradient: float [H, W, 3], from `inspection.input_gradient`; drawn is the largest absolute value of the channels.
      title: the title, such as the class.

    Raises:
      ValueError: an array has another shape or range.
    """
    pixels, covered, change = (
        _unit_images(np.asarray(image)[np.newaxis])[0],
        np.asarray(occlusion),
        np.asarray(gradient),
    )
    if covered.ndim != 2 or change.shape != pixels.shape:
        raise ValueError(
            f"maps must be [h, w] and {list(pixels.shape)}, not {list(covered.shape)}, {list(change.shape)}"
        )
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    figure.suptitle(_as_it_is(title), fontsize=TITLE)
    axes = figure.subplots(1, 3)
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    axes[0].imshow(pixels, interpolation="nearest", extent=extent)
    axes[0].set_title("Image", fontsize=LABEL)
    low, high = float(covered.min()), max(float(covered.max()), float(covered.min()) + 0.05)  # no drama from nothing
    heat = axes[1].imshow(covered, cmap="viridis", vmin=low, vmax=high, interpolation="nearest", extent=extent)
    axes[1].set_title("Probability if covered here", fontsize=LABEL)
    steep = axes[2].imshow(np.abs(change).max(axis=-1), cmap="magma", interpolation="nearest", extent=extent)
    axes[2].set_title("|gradient| (per grey level)", fontsize=LABEL)
    for ax in axes:
        ax.set_axis_off()
    for ax, drawn in ((axes[1], heat), (axes[2], steep)):
        figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=SMALL)
    return figure


def confusion_matrix(matrix: ArrayLike, class_names: Sequence[str], title: str) -> Figure:
    """Draws how often each true class (row) was predicted as each class (column), with the recall of each row.

    Colour is the share of the true class on a square-root scale: a confusion of 4% is a fifth of the way to full
    colour, where a linear scale would leave it white. Above 30 classes there are no numbers and only some of the names.

    Args:
      matrix: int [C, C], counts of examples, `matrix[true, predicted]`.
      class_names: C names.
      title: the title.

    Raises:
      ValueError: the matrix is not [C, C].
    """
    counts = np.asarray(matrix)
    classes = len(class_names)
    if counts.shape != (classes, classes):
        raise ValueError(f"matrix must be [{classes}, {classes}] for {classes} classes, not {list(counts.shape)}")
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)  # a class without examples has an empty row
    numbered = classes <= MAX_NUMBERED_CLASSES

    side = min(max(0.5 * classes, 3.0), 5.0 if classes <= 10 else 9.0 if numbered else 6.5)  # inches
    figure = Figure(figsize=(side + 2.5, side + 1.2), layout="compressed")
    ax = figure.add_subplot()
    image = ax.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    ax.set_title(title, fontsize=TITLE)
    ax.set_xlabel("Predicted class", fontsize=LABEL)
    ax.set_ylabel("True class", fontsize=LABEL)

    ticks = range(0, classes, 1 if numbered else -(-classes // 25))
    names = [_as_it_is(shortened(class_names[tick], 20)) for tick in ticks]
    ax.set_yticks(ticks, names, fontsize=SMALL)
    ax.set_xticks(ticks, names, fontsize=SMALL, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(length=2 if not numbered else 0)
    if numbered:
        ax.spines[:].set_visible(False)
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if share[row, column] > 0.35 else "black"
            ax.text(column, row, str(count), ha="center", va="center", fontsize=SMALL, color=ink)
        recall = [f"{share[i, i]:.1%}" if totals[i] else "\N{EN DASH}" for i in range(classes)]
        right = ax.secondary_yaxis("right")
        right.set_yticks(range(classes), recall, fontsize=SMALL)
        right.set_ylabel("Recall", fontsize=LABEL)
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, aspect=30, pad=0.02, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("Share of the true class", fontsize=LABEL)
    bar.outline.set_visible(False)
    return figure


def kernels(kernel: ArrayLike, columns: int = 16) -> Figure:
    """Draws the kernels of the first layer as RGB tiles, in the order of the layer.

    All share one scale, so that strong and weak kernels can be told apart: mid-grey is a weight of 0, full colour the
    99.5th percentile of the absolute weights, and the few beyond are clipped. Scaling by the least and the largest
    weight would let one outlier turn all the other tiles grey. A weight that is not finite is white.

    Args:
      kernel: float [KH, KW, 3, N].
      columns: tiles in a row; with 16, the paper's 96 kernels fill 6 rows, the upper 3 from its first GPU.

    Raises:
      ValueError: the kernel is not [KH, KW, 3, N].
    """
    tiles, scale = kernel_tiles(kernel)
    count, height, width, _ = tiles.shape
    picture = np.nan_to_num(mosaic(tiles, columns), nan=1.0)
    title = (
        f"First-layer kernels: {count} of {height} \N{MULTIPLICATION SIGN} {width} \N{MULTIPLICATION SIGN} 3 "
        f"(grey is 0, full colour ±{scale:.2g})"
    )
    figure, ax = _mosaic_figure(picture, title)
    ax.imshow(picture, interpolation="nearest")
    return figure


def kernel_tiles(kernel: ArrayLike) -> tuple[np.ndarray, float]:
    """Kernels [KH, KW, 3, N] as N pictures, float [N, KH, KW, 3] in [0, 1], and the weight that is full colour.

    The scale is that of `kernels`; NaN where a weight is not finite.

    Raises:
      ValueError: the kernel is not [KH, KW, 3, N].
    """
    weights = _nan_unless_finite(kernel)
    if weights.ndim != 4 or weights.shape[2] != 3 or weights.shape[3] == 0:
        raise ValueError(f"kernel must be [KH, KW, 3, N], not {list(weights.shape)}")
    scale = _percentile(np.abs(weights))
    return np.moveaxis(np.clip(0.5 + weights / (2 * scale), 0, 1), -1, 0), scale


def mosaic(tiles: np.ndarray, columns: int = 16) -> np.ndarray:
    """Joins float tiles [N, H, W, C] row by row into one picture, with NaN between them and in the places left over."""
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = 1 + width // 16
    padded = np.full((rows * columns, height + gap, width + gap, channels), np.nan)
    padded[:count, :height, :width] = tiles
    grid = padded.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def feature_maps(maps: ArrayLike, columns: int = 16, title: str = "Feature maps") -> Figure:
    """Draws the feature maps that one image gives in one layer, in the order of the channels.

    All share one colour scale, from the least value (0 after ReLU) to the 99.5th percentile: a dead channel stays dark.
    A value that is not finite is white.

    Args:
      maps: float [H, W, C], the activations of one image.
      columns: maps in a row.
      title: what the title says before the sizes, such as the layer's name.

    Raises:
      ValueError: the maps are not [H, W, C].
    """
    values = _nan_unless_finite(maps)
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"maps must be [H, W, C], not {list(values.shape)}")
    height, width, channels = values.shape
    picture = mosaic(np.moveaxis(values, -1, 0)[..., np.newaxis], columns)[..., 0]
    figure, ax = _mosaic_figure(picture, f"{title}: {channels} of {height} \N{MULTIPLICATION SIGN} {width}", beside=0.7)
    low = float(np.min(values, initial=0.0, where=np.isfinite(values)))
    image = ax.imshow(picture, cmap="viridis", vmin=low, vmax=_percentile(values), interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, aspect=30, fraction=0.04, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("Activation", fontsize=LABEL)
    bar.outline.set_visible(False)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's contents."""
    png = io.BytesIO()
    _use_fonts_with_all_glyphs(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # drawn as boxes where no font has them
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support")  # how some scripts join letters
        figure.savefig(png, format="png", dpi=min(DPI, MAX_PIXELS / figure.get_figwidth()))
    return png.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, atomically, over any file of that name; creates the folder.

    Raises:
      AlexNetError: the file can't be written.
    """
    write_atomically(pathlib.Path(path), to_png(figure))


def shortened(text: str, length: int = 40) -> str:
    """The text, or as much of its ends as fits: names often differ at either end. Wide letters (CJK) count twice."""
    if _columns(text) <= length:
        return text
    room = (length - 1) // 2
    head = sum(used <= length - 1 - room for used in itertools.accumulate(map(_columns, text)))
    tail = sum(used <= room for used in itertools.accumulate(map(_columns, reversed(text))))
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _columns(text: str) -> int:
    """The width of a text in letters of the Latin script."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _as_it_is(text: str) -> str:
    """For matplotlib, which takes what is between two $ for a formula and leaves a name with _ out of a legend.

    What can't be printed, such as half of a character in the name of a file, becomes an escape.
    """
    text = "".join(
        c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )
    return ("\N{THIN SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")


def _use_fonts_with_all_glyphs(figure: Figure) -> None:
    """Adds to each text the installed fonts that have the letters which the font of the rest lacks."""
    for ax in figure.axes:
        ax.get_xticklabels(), ax.get_yticklabels()  # made when they are asked for
    texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
    letters = frozenset(c for text in texts for c in text.get_text() if not c.isascii() and c.isprintable())
    if families := _fonts_with(letters):
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), *families])


@functools.lru_cache(maxsize=16)
def _fonts_with(letters: frozenset[str]) -> tuple[str, ...]:
    """Families of installed fonts that together have the letters which the default font lacks, as far as there are."""
    manager = font_manager.fontManager

    def covered(path: str, letters: frozenset[str]) -> frozenset[str]:
        try:
            font = FT2Font(path)
        except Exception:  # a damaged font
            return frozenset()
        return frozenset(letter for letter in letters if font.get_char_index(ord(letter)))

    letters -= covered(font_manager.findfont(font_manager.FontProperties()), letters)
    if not letters:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = {entry.fname for entry in manager.ttflist}
        for path in set(font_manager.findSystemFonts()) - known:  # installed after matplotlib made its list
            with contextlib.suppress(Exception):  # of a kind that matplotlib can't read
                manager.addfont(path)
    regular = [e for e in manager.ttflist if (str(e.weight), e.style) in (("400", "normal"), ("normal", "normal"))]
    regular = [e for e in regular if "lastresort" not in e.name.lower().replace(" ", "")]  # of macOS: boxes
    regular.sort(key=lambda e: ("Sans" not in e.name, "Mono" in e.name, e.name))
    has = {entry.name: covered(entry.fname, letters) for entry in reversed(regular)}
    families: list[str] = []
    while has and (best := max(reversed(has), key=lambda name: len(has[name] & letters))) and has[best] & letters:
        families.append(best)
        letters -= has[best]
    return tuple(families)


def _unit_images(images: ArrayLike) -> np.ndarray:
    """Checks images [N, H, W, 3], uint8 or float, and gives them as float in [0, 1]."""
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) == 0:
        raise ValueError(f"images must be [N, H, W, 3], not {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return pixels / 255.0
    rounding = 1e-3  # far below one grey level
    if pixels.dtype.kind != "f" or not (pixels.min() >= -rounding and pixels.max() <= 1 + rounding):
        raise ValueError(f"images must be uint8 or float in [0, 1], not {pixels.dtype} up to {pixels.max()}")
    return np.clip(pixels, 0, 1)


def _image_grid(pixels: np.ndarray, columns: int, above: int = 0, below: int = 0) -> tuple[Figure, list[Axes]]:
    """Lays out float images [N, H, W, 3] with room for so many lines of small text above and below each row.

    The sizes are reckoned in inches, as matplotlib's own layout takes seconds for a hundred images.
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


def _values(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The values of one key, float [N], with NaN where a record lacks it or has none (JSON's null)."""
    return _nan_unless_finite([record.get(key) for record in records])


def _nan_unless_finite(values: Any) -> np.ndarray:
    """The values as float, with NaN for infinities and None, so that there is one kind of gap to draw."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _curve(ax: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    """Draws one key of one split against the step."""
    if not records:
        return
    values = _values(records, key)
    broken = int(np.isnan(values).sum())
    if broken and label:
        label += f", {broken} of {len(values)} not finite"
    few = len(values) <= 100  # without markers a lone point, or one between gaps, would not be seen
    steps = [record["step"] for record in records]
    ax.plot(steps, values, color=color, label=label, linewidth=1.2, marker="o" if few else "", markersize=2.5)


def _mark_best(ax: Axes, validation: Sequence[Mapping[str, Any]]) -> None:
    """Stars the best validation accuracy (the first of equals); the words are in the legend, off the curves."""
    accuracies = _values(validation, "accuracy")
    if np.isnan(accuracies).all():
        return
    best = validation[int(np.nanargmax(accuracies))]
    label = f"Best validation: {best['accuracy']:.1%}, step {best['step']:,}"
    ax.plot(best["step"], best["accuracy"], "*", color=VALIDATION, markeredgecolor="black", markersize=10, label=label)


def _epochs_above(ax: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds an axis of epochs above, if the first epoch was seen to end."""
    if not any(record["epoch"] for record in records):
        return
    # No record lies beyond the end of its epoch, and the training loop leaves one at the end: there the bound is exact.
    steps_per_epoch = max(record["step"] / (record["epoch"] + 1) for record in records)
    above = ax.secondary_xaxis("top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch))
    above.set_xlabel("Epoch", fontsize=LABEL)
    above.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    above.tick_params(labelsize=SMALL)


def _percentile(values: np.ndarray) -> float:
    """The 99.5th percentile of the finite values, or 1 where it is not above 0 (all of them dead)."""
    finite = values[np.isfinite(values)]
    percentile = float(np.percentile(finite, 99.5)) if finite.size else 0.0
    return percentile if percentile > 0 else 1.0


def _mosaic_figure(mosaic: np.ndarray, title: str, beside: float = 0.0) -> tuple[Figure, Axes]:
    """An empty figure in the proportions of the mosaic [H, W, ...], with its title and some inches beside it."""
    height = (WIDTH - beside) * mosaic.shape[0] / mosaic.shape[1]
    figure = Figure(figsize=(WIDTH, height + 0.35), layout="compressed")
    ax = figure.add_subplot()
    ax.set_axis_off()
    ax.set_title(title, fontsize=TITLE)
    return figure, ax
