"""Data sets: `Dataset` in memory over CIFAR-10 and drawn shapes, `ImageNet` streamed from disk."""

from alexnet_jax.config.settings import DataConfig
from alexnet_jax.data import cifar10, shapes, streamed
from alexnet_jax.data.dataset import Dataset, Split
from alexnet_jax.data.streamed import ImageNet
from alexnet_jax.errors import UsageError

__all__ = ["Dataset", "ImageNet", "Split", "load"]


def load(config: DataConfig) -> Dataset | ImageNet:
    """Loads the data set that a configuration names.

    Raises:
      AlexNetError: if it is not there and can't be had, or is broken.
    """
    if config.dataset == "imagenet":
        if config.data_dir is None:
            raise UsageError("--dataset imagenet needs --data-dir: the folder that alexnet_jax.data.prepare has made")
        return streamed.open_prepared(config.data_dir)
    dataset = shapes.load() if config.dataset == "shapes" else cifar10.load(config.data_dir, url=config.data_url)
    return dataset.train_on_all() if config.train_on == "all" else dataset
