"""Data sets: one face, `Dataset`, over CIFAR-10 and drawn shapes."""

from alexnet_jax.config import DataConfig
from alexnet_jax.datasets import cifar10, shapes
from alexnet_jax.datasets.dataset import Dataset, Split

__all__ = ["Dataset", "Split", "load"]


def load(config: DataConfig) -> Dataset:
    """Loads the data set that a configuration names.

    Raises:
      AlexNetError: if it is not there and can't be had, or is broken.
    """
    dataset = shapes.load() if config.dataset == "shapes" else cifar10.load(config.data_dir)
    return dataset.train_on_all() if config.train_on == "all" else dataset
