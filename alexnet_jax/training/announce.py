"""Output of a training run before its first step."""

import jax
import numpy as np

from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.distributed import processes
from alexnet_jax.runs.folder import RunFolder
from alexnet_jax.training.initial import Pretrained
from alexnet_jax.training.trainer import SAMPLE, Trainer


def noise_levels(preprocessing: Preprocessing, images: np.ndarray) -> np.ndarray:
    """Standard deviation of the PCA colour noise in R, G and B, grey levels [3], measured on about 2,000 draws."""
    keys = jax.random.split(jax.random.key(0), (-(-2000 // len(images)), len(images)))
    std = preprocessing.config.pca_std
    draws = jax.jit(lambda keys, x: jax.lax.map(lambda k: preprocessing.noise(k, x, std), keys))
    return np.asarray(draws(keys, images)).std(axis=(0, 1))


def announce(trainer: Trainer, folder: RunFolder, pretrained: Pretrained | None = None) -> None:
    """Prints data, network, weights, noise and run."""
    if not processes.is_main():
        return
    config, dataset, devices = trainer.config, trainer.dataset, trainer.devices
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.shapes.params))
    counts = ", ".join(f"{count:,} {name}" for name, count in dataset.counts.items())
    print(f"data     {dataset.name}: {counts} images, {'x'.join(map(str, dataset.image_shape))}, {dataset.source}")
    print(
        f"network  {type(trainer.model).__name__}, {parameters:,} parameters, {config.network.dtype}, "
        f"on {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}"
    )
    if pretrained is not None and not trainer.step:
        taken = pretrained.layers(dataset.class_names)
        drawn = [layer for layer in trainer.shapes.params if layer not in taken]
        print(f"weights  {', '.join(taken)} from {pretrained.source}" + (f"; drawn: {', '.join(drawn)}" * bool(drawn)))
    if trainer.frozen:
        print(f"frozen   {', '.join(trainer.frozen)}")
    augmentation = config.augmentation
    if augmentation.pca != "none":
        red, green, blue = noise_levels(trainer.preprocessing, dataset.sample(SAMPLE).images)
        print(
            f"noise    PCA {augmentation.pca}, coefficients' std {augmentation.pca_std:g}: shifts R, G, B by "
            f"{red:.2g}, {green:.2g}, {blue:.2g} grey levels (standard deviation)"
        )
    state = f"resumes after step {trainer.step:,}" if trainer.step else "new"
    total = trainer.steps_per_epoch * config.schedule.epochs
    print(f"run      {folder.path}, {state}, {total:,} steps in total", flush=True)
