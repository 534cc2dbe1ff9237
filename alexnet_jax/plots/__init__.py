"""Plots of the data, the training and the network.

Every function takes arrays and returns a `Figure`. They use matplotlib's objects and never `pyplot`: no window, no
backend to choose, no figure that stays in memory.

Shape letters: N images or kernels, H W height and width in pixels, C classes or channels, KH KW kernel size.
"""

from alexnet_jax.plots.confusion import confusion_matrix
from alexnet_jax.plots.curves import by_split, compared_curves, training_curves
from alexnet_jax.plots.distributions import histograms
from alexnet_jax.plots.images import pca_strip, portraits, predictions, saliency
from alexnet_jax.plots.png import save, to_png
from alexnet_jax.plots.style import DPI, INK, LABEL, SMALL, TITLE, TRAIN, VALIDATION, WIDTH, style
from alexnet_jax.plots.text import shortened
from alexnet_jax.plots.tiles import feature_maps, kernel_tiles, kernels, mosaic

__all__ = [
    "DPI",
    "INK",
    "LABEL",
    "SMALL",
    "TITLE",
    "TRAIN",
    "VALIDATION",
    "WIDTH",
    "by_split",
    "compared_curves",
    "confusion_matrix",
    "feature_maps",
    "histograms",
    "kernel_tiles",
    "kernels",
    "mosaic",
    "pca_strip",
    "portraits",
    "predictions",
    "saliency",
    "save",
    "shortened",
    "style",
    "to_png",
    "training_curves",
]
