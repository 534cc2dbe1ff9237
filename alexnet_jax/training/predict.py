"""Prediction: logits of images, and of a whole split."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from alexnet_jax.augment.crops import CENTRE, VIEWS, View
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.data.batches import batches
from alexnet_jax.data.dataset import Placement, Splits
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import AXIS, fetched

PyTree = Any


class Network(Protocol):
    """What prediction needs of a Flax module."""

    def apply(self, variables: Mapping[str, Any], images: jax.Array, /) -> Any:
        """Logits, float32 [B, classes], of the network's input."""


def make_predict_step(
    model: Network, preprocessing: Preprocessing, devices: Sequence[jax.Device], views: int = 1
) -> Callable[[PyTree, np.ndarray], jax.Array]:
    """Builds `step(params, images) -> logits`: [D, B / D, H, W, 3] in grey levels -> float32 [D, B / D, classes].

    With several `views` of each image (paper, section 4.1), these are logarithms of the mean probabilities over the
    views, so their softmax is that mean.
    """

    def of_view(params: PyTree, images: jax.Array, view: View) -> jax.Array:
        return model.apply({"params": params}, preprocessing.evaluation(images, view))

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
    """Logits, float32 [N, classes], of every image once, in order.

    `images` are uint8 or float32 grey levels [N, H, W, 3], N > 0; `params` are replicated over the devices;
    `batch_size` is rounded up to a multiple of `num_devices`.
    """
    batch_size = -(-batch_size // num_devices) * num_devices
    layout = batches(np.arange(len(images)), batch_size, num_devices)
    logits = fetched(predict_step(params, images[index]) for index in layout.indices.swapaxes(0, 1))
    masks = layout.mask.swapaxes(0, 1)
    return np.concatenate([part[mask] for part, mask in zip(logits, masks, strict=True)])


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross entropy of each example in nats, float64 [N], from logits [N, classes] and int labels [N]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 [N, classes]; each row adds up to 1."""
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def predict_split(
    predict_step: Callable[[PyTree, np.ndarray], jax.Array],
    params: PyTree,
    dataset: Splits,
    split: str,
    batch_size: int,
    devices: Sequence[jax.Device],
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [N, classes], and labels, int [N], of every image of a split once, in order.

    `params` are replicated over this process's part of `devices`; `batch_size` images are predicted at a time by all
    devices together, rounded up to a multiple of their number.
    """
    batch_size = -(-batch_size // len(devices)) * len(devices)
    progress = tqdm.tqdm(
        dataset.batches(split, batch_size, Placement(len(devices), processes.local_rows(devices))),
        total=-(-dataset.counts[split] // batch_size),
        desc=split,
        leave=False,
        delay=2,
        disable=None if processes.is_main() else True,
    )
    parts = list(fetched((predict_step(params, batch.images), batch.labels, batch.mask) for batch in progress))
    # [d, K, ...] of this process's devices, then [K, D, ...] of all.
    logits, labels, mask = (
        processes.gathered(np.stack(arrays, axis=1)).swapaxes(0, 1) for arrays in zip(*parts, strict=True)
    )
    return logits[mask], labels[mask]
