"""Prediction: logits of images, and of a whole split."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alexnet_jax.augment.crops import CENTRE, VIEWS, View
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.data.batches import batches
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.streamed import ImageNet
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import AXIS
from alexnet_jax.training.state import PyTree


def make_predict_step(
    model: nn.Module, preprocessing: Preprocessing, devices: Sequence[jax.Device], views: int = 1
) -> Callable[[PyTree, np.ndarray], jax.Array]:
    """Builds `step(params, images) -> logits`: [D, B / D, H, W, 3] in grey levels -> float32 [D, B / D, classes].

    With several `views` of each image (paper, section 4.1) these are logarithms of the views' mean probabilities, whose
    softmax is that mean.
    """

    def of_view(params: PyTree, images: jax.Array, view: View) -> jax.Array:
        return model.apply({"params": params}, preprocessing.evaluation(images, view))  # type: ignore[return-value]

    def predict_step(params: PyTree, images: jax.Array) -> jax.Array:
        if views == 1:
            return of_view(params, images, CENTRE)
        logits = jnp.stack([jax.nn.log_softmax(of_view(params, images, view)) for view in VIEWS[views]])
        return jax.nn.logsumexp(logits, axis=0) - jnp.log(views)

    return jax.pmap(predict_step, axis_name=AXIS, in_axes=(None, 0), devices=devices)


def predict_logits(
    predict_step: Callable[[PyTree, np.ndarray], jax.Array],
    params: PyTree,
    images: np.ndarray,
    batch_size: int,
    num_devices: int,
) -> np.ndarray:
    """Logits of every image once, in order, whatever the batch size and the number of devices.

    Args:
      predict_step: from `make_predict_step`.
      params: replicated over the devices.
      images: uint8 or float32 grey levels [N, H, W, 3], N > 0.
      batch_size: images a step; rounded up to a multiple of `num_devices`.
      num_devices: number of devices, D.

    Returns:
      float32 [N, classes].
    """
    batch_size = -(-batch_size // num_devices) * num_devices
    layout = batches(np.arange(len(images)), batch_size, num_devices)
    parts = [
        jax.device_get(predict_step(params, images[index])).reshape(batch_size, -1)[mask.ravel()]
        for index, mask in zip(layout.indices.swapaxes(0, 1), layout.mask.swapaxes(0, 1), strict=True)
    ]
    return np.concatenate(parts)


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross entropy of each example in nats, float64 [N], from logits [N, classes] and int labels [N]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 [N, classes]; each row adds up to 1."""
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def predict_split(
    predict_step: Callable[[Any, np.ndarray], jax.Array],
    params: Any,
    dataset: Dataset | ImageNet,
    split: str,
    batch_size: int,
    num_devices: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [N, classes], and labels, int [N], of every image of a split once, in order.

    Args:
      predict_step: from `steps.make_predict_step`.
      params: replicated over the devices.
      dataset: has the split.
      split: its name.
      batch_size: images a step (of streamed images, in all processes); rounded up to a multiple of the devices.
      num_devices: of this process, that the step runs on. Each of several processes predicts a share.
      workers: processes that decode, if the images are streamed.
    """
    share = process, count = jax.process_index(), jax.process_count()
    if isinstance(dataset, Dataset):
        images, labels = dataset[split].images, dataset[split].labels
        each = -(-len(labels) // count)
        own = np.minimum(
            np.arange(process * each, (process + 1) * each), len(labels) - 1
        )  # what is too many comes last
        own_images = images if count == 1 else images[own]
        logits = predict_logits(predict_step, params, own_images, batch_size, num_devices)
        return processes.gathered(logits)[: len(labels)], labels
    batch_size = -(-batch_size // (num_devices * count)) * num_devices * count
    parts = []
    for batch in tqdm.tqdm(
        dataset.stream(split, 0, None, batch_size, num_devices, share=share, workers=workers),
        total=-(-len(dataset[split]) // batch_size),
        desc=split,
        leave=False,
        disable=None if process == 0 else True,
    ):
        parts.append((jax.device_get(predict_step(params, batch.images)), batch.labels, batch.mask))
    # [devices, batches, ...] of each process, and with those of the others between batches and devices.
    all_logits, all_labels, mask = (
        processes.gathered(np.stack(arrays, axis=1)).swapaxes(0, 1) for arrays in zip(*parts, strict=True)
    )
    return all_logits[mask], all_labels[mask]
