"""Pictures that a training run draws.

`plots` is imported in the functions: it takes a second, for which no run should wait before its first step.
"""

import numpy as np

from alexnet_jax.augment.preprocess import Preprocessing, visible_noise
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.runs.log import read_jsonl
from alexnet_jax.training.trainer import SAMPLE


def draw_data(dataset: Dataset, preprocessing: Preprocessing, folder: RunFolder) -> None:
    """Draws random training images with their labels, and ten PCA perturbations of one image."""
    from alexnet_jax import plots

    train = dataset.sample(SAMPLE)
    chosen = np.random.default_rng(0).choice(len(train), min(20, len(train)), replace=False)
    titles = [dataset.class_names[label] for label in train.labels[chosen]]
    plots.save(plots.portraits(train.images[chosen], titles), folder.plots / "portraits.png")

    image = train.images[min(4, len(train) - 1)]  # the original post's choice
    perturbed, noise = visible_noise(preprocessing, image)
    plots.save(plots.pca_strip(perturbed, noise, image), folder.plots / "pca_noise.png")


def draw_curves(folder: RunFolder) -> None:
    """Draws loss, accuracy and learning rate of the whole run."""
    from alexnet_jax import plots

    plots.save(plots.training_curves(read_jsonl(folder.metrics)), folder.plots / "curves.png")
