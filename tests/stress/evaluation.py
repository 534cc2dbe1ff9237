"""Evaluation counts every image once, whatever the batch and the devices: `python -m tests.stress.evaluation`."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alexnet_jax.augment import preprocess
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data import shapes, statistics
from alexnet_jax.distributed.devices import replicate, select_devices
from alexnet_jax.inspection import scores
from alexnet_jax.network import build
from alexnet_jax.training import predict
from tests.stress import results_file

SIZES, DEVICES, BATCHES = (1, 7, 63, 64, 65, 127, 10_000), (1, 2, 4, 8), (1, 64, 100)


def main() -> None:
    """Evaluates AlexNetSmall with its initial weights in every way, and compares counts as integers."""
    select_devices(max(DEVICES))
    dataset = shapes.load(train=1, validation=1, test=max(SIZES))
    split = dataset["test"]
    model = build.from_config(PRESETS["cifar10"].config.network, 10)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    preprocessing = preprocess.Preprocessing(AugmentationConfig(), statistics.Statistics.of(split.images[:100]), 1)
    found: dict[int, set[tuple[int, int]]] = {size: set() for size in SIZES}
    largest = 0.0
    first: dict[int, np.ndarray] = {}
    for num_devices, batch_size in tqdm.tqdm(list(itertools.product(DEVICES, BATCHES))):
        devices = jax.devices()[:num_devices]
        step = predict.make_predict_step(model, preprocessing, devices)
        replicated = replicate(params, devices)
        for size in SIZES:
            logits = predict.predict_logits(step, replicated, split.images[:size], batch_size, num_devices)
            results = scores.score(logits, split.labels[:size], dataset.class_names)
            found[size].add((results["count"], results["correct"]))
            largest = max(largest, float(np.abs(logits - first.setdefault(size, logits)).max()))
    wrong = [size for size, counts in found.items() if len(counts) != 1 or next(iter(counts))[0] != size]
    results_file.write(
        "evaluation",
        "python -m tests.stress.evaluation",
        {
            "evaluations": len(SIZES) * len(DEVICES) * len(BATCHES),
            "sizes_with_another_count_or_number_correct": wrong,
            "largest_difference_of_a_logit": largest,
            "count_and_correct": {size: sorted(counts) for size, counts in found.items()},
        },
    )
    if wrong:
        sys.exit("counts differ")


if __name__ == "__main__":
    main()
