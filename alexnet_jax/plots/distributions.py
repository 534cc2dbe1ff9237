"""Distributions of weights and activations."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from alexnet_jax.plots.arrays import nan_unless_finite
from alexnet_jax.plots.style import SMALL, TITLE, TRAIN, WIDTH, style
from alexnet_jax.plots.text import escaped


def histograms(values: Mapping[str, ArrayLike], title: str, columns: int = 4) -> Figure:
    """Draws a histogram of each array, by name, with a logarithmic count; the titles give the share of zeros."""
    columns = min(columns, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(WIDTH, 1.25 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=TITLE)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(values) :]:
        ax.set_axis_off()
    for ax, (name, array) in zip(axes, values.items(), strict=False):
        flat = nan_unless_finite(array).ravel()
        finite = flat[np.isfinite(flat)]
        zeros = float((flat == 0).mean()) if flat.size else 0.0
        ax.hist(finite, bins=60, color=TRAIN, log=True)
        notes = [f"{zeros:.0%} zeros"] * (zeros >= 0.005) + [f"{len(flat) - len(finite):,} not finite"] * (
            len(finite) < len(flat)
        )
        ax.set_title(escaped(" · ".join([name, *notes])), fontsize=SMALL, pad=3)
        style(ax)
        ax.tick_params(labelsize=6.5, length=2)
        ax.yaxis.set_major_locator(LogLocator(numticks=4))
        ax.minorticks_off()
    return figure
