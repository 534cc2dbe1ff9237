"""Data sets: CIFAR-10, ImageNet, shapes, image folders; batches and statistics."""

from typing import TYPE_CHECKING

from alexnet_jax.config.settings import DataConfig
from alexnet_jax.errors import UsageError

if TYPE_CHECKING:
    from alexnet_jax.data.dataset import Dataset


def load(config: DataConfig) -> "Dataset":
    """Loads the data set that a configuration names.

    Raises:
      AlexNetError: it is missing and can't be downloaded, or is damaged.
    """
    # Imported here: a process that prepares images needs none of them, nor JAX.
    from alexnet_jax.data import cifar10, cifar100, shapes

    match config.dataset:
        case "imagenet":
            from alexnet_jax.data import streamed

            if config.data_dir is None:
                raise UsageError(
                    "--dataset imagenet needs --data-dir: "
                    "the folder written by python -m alexnet_jax.data.prepare imagenet"
                )
            prepared = streamed.open_prepared(config.data_dir, config.loader_workers)
            if prepared.name != "imagenet":
                raise UsageError(
                    f"{config.data_dir} contains a prepared folder data set: use --dataset {prepared.name}"
                )
            return prepared
        case "shapes":
            dataset = shapes.load()
        case "folder":
            from alexnet_jax.data import image_folder

            return image_folder.load(
                config.data_dir, config.image_size, config.validation_share, config.scaling, config.loader_workers
            )
        case "cifar100":
            dataset = cifar100.load(config.data_dir)
        case "cifar10":
            dataset = cifar10.load(config.data_dir, url=config.data_url)
    return dataset.train_on_all() if config.train_on == "all" else dataset
