"""First-layer kernels and feature maps as mosaics of tiles."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from alexnet_jax.plots.arrays import nan_unless_finite
from alexnet_jax.plots.style import LABEL, SMALL, TITLE, WIDTH


def kernels(kernel: ArrayLike, columns: int = 16) -> Figure:
    """Draws first-layer kernels, float [KH, KW, 3, N], as RGB tiles in the order of the layer.

    All share the scale of `kernel_tiles`, so that strong and weak kernels can be distinguished; a weight that is not
    finite is white. In 16 columns the paper's 96 kernels fill 6 rows, the upper 3 from its first GPU.

    Raises:
      ValueError: the kernel is not [KH, KW, 3, N].
    """
    tiles, scale = kernel_tiles(kernel)
    count, height, width, _ = tiles.shape
    image = np.nan_to_num(mosaic(tiles, columns), nan=1.0)
    title = (
        f"First-layer kernels: {count} of {height} \N{MULTIPLICATION SIGN} {width} \N{MULTIPLICATION SIGN} 3 "
        f"(grey is 0, full colour ±{scale:.2g})"
    )
    figure, ax = _mosaic_figure(image, title)
    ax.imshow(image, interpolation="nearest")
    return figure


def kernel_tiles(kernel: ArrayLike) -> tuple[np.ndarray, float]:
    """Kernels [KH, KW, 3, N] as N RGB images, float [N, KH, KW, 3] in [0, 1], and the weight of full colour.

    Mid-grey is a weight of 0, full colour the 99.5th percentile of the absolute weights; larger ones are clipped.
    Scaling by the largest weight would let one outlier turn all other tiles grey. NaN where a weight is not finite.

    Raises:
      ValueError: the kernel is not [KH, KW, 3, N].
    """
    weights = nan_unless_finite(kernel)
    if weights.ndim != 4 or weights.shape[2] != 3 or weights.shape[3] == 0:
        raise ValueError(f"kernel must be [KH, KW, 3, N], not {list(weights.shape)}")
    scale = _percentile(np.abs(weights))
    return np.moveaxis(np.clip(0.5 + weights / (2 * scale), 0, 1), -1, 0), scale


def mosaic(tiles: np.ndarray, columns: int = 16) -> np.ndarray:
    """Joins float tiles [N, H, W, C] row by row into one image, with NaN between them and in unused places."""
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = 1 + width // 16
    padded = np.full((rows * columns, height + gap, width + gap, channels), np.nan)
    padded[:count, :height, :width] = tiles
    grid = padded.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def feature_maps(maps: ArrayLike, columns: int = 16, title: str = "Feature maps") -> Figure:
    """Draws the feature maps of one image in one layer, float [H, W, C], in the order of the channels.

    All share one colour scale, from the smallest value (0 after ReLU) to the 99.5th percentile: a dead channel stays
    dark. A value that is not finite is white. The sizes are appended to `title`.

    Raises:
      ValueError: the maps are not [H, W, C].
    """
    values = nan_unless_finite(maps)
    if values.ndim != 3 or values.size == 0:
        raise ValueError(f"maps must be [H, W, C], not {list(values.shape)}")
    height, width, channels = values.shape
    image = mosaic(np.moveaxis(values, -1, 0)[..., np.newaxis], columns)[..., 0]
    figure, ax = _mosaic_figure(image, f"{title}: {channels} of {height} \N{MULTIPLICATION SIGN} {width}", beside=0.7)
    low = float(np.min(values, initial=0.0, where=np.isfinite(values)))
    drawn = ax.imshow(image, cmap="viridis", vmin=low, vmax=_percentile(values), interpolation="nearest")
    bar = figure.colorbar(drawn, ax=ax, aspect=30, fraction=0.04, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("Activation", fontsize=LABEL)
    bar.outline.set_visible(False)
    return figure


def _percentile(values: np.ndarray) -> float:
    """The 99.5th percentile of the finite values, or 1 if it is not above 0 (all channels are dead)."""
    finite = values[np.isfinite(values)]
    percentile = float(np.percentile(finite, 99.5)) if finite.size else 0.0
    return percentile if percentile > 0 else 1.0


def _mosaic_figure(image: np.ndarray, title: str, beside: float = 0.0) -> tuple[Figure, Axes]:
    """An empty figure with the proportions of a mosaic [H, W, ...], a title and some inches beside the mosaic."""
    height = (WIDTH - beside) * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(WIDTH, height + 0.35), layout="compressed")
    ax = figure.add_subplot()
    ax.set_axis_off()
    ax.set_title(title, fontsize=TITLE)
    return figure, ax
