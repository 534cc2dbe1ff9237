"""Data sets: `Dataset` in memory over CIFAR-10 and drawn shapes, `ImageNet` streamed from disk."""

from alexnet_jax.config import DataConfig
from alexnet_jax.datasets import cifar10, imagenet, shapes
from alexnet_jax.datasets.dataset import Dataset, Split
from alexnet_jax.datasets.imagenet import ImageNet
from alexnet_jax.errors import UsageError

__all__ = ["Dataset", "ImageNet", "Split", "load"]


def load(config: DataConfig) -> Dataset | ImageNet:
    """Loads the data set that a configuration names.

    Raises:
      AlexNetError: if it is not there and can't be had, or is broken.
    """
    if config.dataset == "imagenet":
        if config.data_dir is None:
            raise UsageError("--dataset imagenet needs --data-dir: the folder that alexnet_jax.prepare has made")
        return imagenet.open_prepared(config.data_dir)
    dataset = shapes.load() if config.dataset == "shapes" else cifar10.load(config.data_dir, url=config.data_url)
    return dataset.train_on_all() if config.train_on == "all" else dataset
