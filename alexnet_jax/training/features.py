"""Training of the last layer alone, on its inputs, which are computed once.

Where every other layer keeps its weights, and neither augmentation nor dropout changes what they compute, an image has
the same features in every epoch. The steps are then those of the whole network, at the cost of one layer.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alexnet_jax.augment.crops import CENTRE, View
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.batches import Batch, Batches
from alexnet_jax.data.dataset import Dataset, Examples, Placement, calls_by_index, in_batches, select
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.network.layers import bias_in_float32
from alexnet_jax.training.initial import HEAD
from alexnet_jax.training.predict import make_predict_step, predict_split

MOST_BYTES = 2 * 2**30  # of features, on each device
AT_ONCE = 500  # images whose features are computed together: rounding depends on it, so it is not a setting


def stay_the_same(config: TrainConfig, frozen: Collection[str], params: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether an image has the same features in every epoch, and there is memory for those of all images."""
    augmentation = config.augmentation
    varied = augmentation.crop_padding or augmentation.flip or augmentation.cutout or augmentation.pca != "none"
    cropped = augmentation.crop_size not in (None, *dataset.image_shape[:2])
    if set(params) - set(frozen) != {HEAD} or varied or cropped or config.network.dropout_rate:
        return False
    return sum(dataset.counts.values()) * params[HEAD]["kernel"].shape[0] * 4 <= MOST_BYTES


def input_of_head(model: nn.Module, params: Any, inputs: jax.Array) -> jax.Array:
    """The last layer's input, [B, F], for the network's input [B, H, W, 3]; there is no dropout."""
    kept = []

    def keep(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.name == HEAD and context.method_name == "__call__":
            kept.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        model.apply({"params": params}, inputs)
    (features,) = kept
    return features.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Below:
    """A network without its last layer, in place of the network."""

    model: nn.Module

    def apply(self, variables: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
        """The last layer's input."""
        return input_of_head(self.model, variables["params"], inputs)


class Head(nn.Module):
    """The last layer, in place of the network: features [B, F] -> logits, float32 [B, num_classes]."""

    num_classes: int
    dtype: DTypeLike
    precision: str

    @nn.compact
    def __call__(self, features: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Computes the logits."""
        dense = nn.Dense(
            self.num_classes, dtype=self.dtype, precision=self.precision, promote_dtype=bias_in_float32, name=HEAD
        )
        return dense(features.astype(self.dtype)).astype(jnp.float32)


class Unchanged:
    """Features as the network's input, in place of the preprocessing of images."""

    @staticmethod
    def training(keys: jax.Array, images: jax.Array, step: jax.Array) -> jax.Array:
        """The features."""
        return images

    @staticmethod
    def evaluation(images: jax.Array, view: View = CENTRE) -> jax.Array:
        """The features."""
        return images


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a data set's images, in the images' place in a `Dataset`.

    Attributes:
      splits: float32 [N, F] and labels of the training and the validation images.
    """

    splits: Mapping[str, Examples]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        model: nn.Module,
        preprocessing: Preprocessing,
        params: Any,
        devices: Sequence[jax.Device],
    ) -> "Features":
        """Computes the features of all training and validation images."""
        step = make_predict_step(Below(model), preprocessing, processes.local(devices))
        on_devices = replicate(params, devices)
        return cls(
            {
                split: Examples(*predict_split(step, on_devices, dataset, split, AT_ONCE, devices))
                for split in ("train", "validation")
                if split in dataset.counts
            }
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of images in each split."""
        return {name: len(examples.labels) for name, examples in self.splits.items()}

    def resident(self) -> Examples:
        """The training examples."""
        return self.splits["train"]

    def calls(
        self, seed: int, epoch: int, batch_size: int, placement: Placement, first: int, length: Callable[[int], int]
    ) -> Iterator[Batches]:
        """Indices of the examples of each step."""
        return calls_by_index(self.counts["train"], seed, epoch, batch_size, placement, first, length)

    @staticmethod
    def fetch(resident: Examples, call: Batches) -> Batch:
        """Selects the examples on the device."""
        return select(resident, call)

    def batches(self, split: str, batch_size: int, placement: Placement) -> Iterator[Batch]:
        """One pass over a split in its own order."""
        return in_batches(*self.splits[split], batch_size, placement)
