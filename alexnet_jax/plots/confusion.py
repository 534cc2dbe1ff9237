"""Confusion matrices.

Drawn without seaborn, which imports pandas and pyplot and so takes 0.8 s longer to import.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from alexnet_jax.plots.style import LABEL, SMALL, TITLE
from alexnet_jax.plots.text import escaped, shortened

MAX_NUMBERED_CLASSES = 30  # with more classes, the numbers in the cells are too small to read


def confusion_matrix(matrix: ArrayLike, class_names: Sequence[str], title: str) -> Figure:
    """Draws the counts `matrix[true, predicted]`, int [C, C], with the recall of each row.

    Colour is the share of the true class on a square-root scale: a confusion of 4% is a fifth of the way to full
    colour, where a linear scale would leave it white. With more than 30 classes, there are no numbers and only some of
    the names.

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
    names = [escaped(shortened(class_names[tick], 20)) for tick in ticks]
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
