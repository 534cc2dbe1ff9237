"""Initial weights from another network."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax.config.flags import flag, flat_items
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import UsageError

HEAD = "logits"  # the last layer, whose outputs are the classes


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained network's weights, and the input that they were trained on.

    Attributes:
      source: where they come from, in words.
      settings: by flat name, the settings that decide what the weights compute. A training run that begins with them
        must have the same.
      image_size: side of the images that they were trained on, in pixels.
      crop_size: side of the windows cut out of these; None: whole images.
      params: nested dict of float32 arrays, as in `TrainState`.
      mean_image: [H, W, 3], grey levels, which --subtract-mean subtracts.
      scaling: how images became square, as --scaling.
      class_names: name of each output; None if they are not known.
    """

    source: str
    settings: Mapping[str, Any]
    image_size: int
    crop_size: int | None
    params: Mapping[str, Mapping[str, np.ndarray]]
    mean_image: np.ndarray
    scaling: str
    class_names: tuple[str, ...] | None

    def settings_for(self, dataset: str) -> dict[str, Any]:
        """The settings, by flat name, of a training run on `--dataset` that begins with these weights."""
        network = str(self.settings["network"])
        options: dict[str, Any] = {}
        if network != "small":  # the others have their own
            options |= {"initial_bias": None, "dropout_after": "both"}
        if network.startswith("convnet"):
            options["dropout_rate"] = 0.0
        if dataset == "folder":
            sizes = {"image_size": self.image_size, "crop_size": self.crop_size, "scaling": self.scaling}
        elif dataset == "imagenet" or self.image_size == 32:
            sizes = {"crop_size": self.crop_size}
        else:  # the images have 32x32 pixels
            sizes = {"enlarge_to": self.crop_size or self.image_size}
        return {**self.settings, **options, **sizes} | ({"crop_padding": 0} if sizes.get("crop_size") else {})

    def digest(self) -> str:
        """SHA-256 of the weights and the mean image."""
        digest = hashlib.sha256(np.ascontiguousarray(self.mean_image).data)
        for layer, arrays in sorted(self.params.items()):
            for name, array in sorted(arrays.items()):
                digest.update(f"{layer}/{name} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def check(self, config: TrainConfig, wanted: Any, class_names: Sequence[str]) -> None:
        """Checks that a training run can begin with these weights.

        Args:
          config: of the training.
          wanted: its parameters, or their shapes.
          class_names: of its data set.

        Raises:
          UsageError: a setting would let the weights compute something else, a layer is missing, or one has another
            shape.
        """
        chosen = flat_items(config)
        for name, value in self.settings.items():
            if chosen[name] != value:
                raise UsageError(
                    f"{flag(name)} {chosen[name]}: the weights of {self.source} were trained with {value}; leave the "
                    "flag out"
                )
        for layer in self.layers(class_names):
            for name in {**wanted.get(layer, {}), **self.params[layer]}:
                here, there = (tree.get(layer, {}).get(name) for tree in (wanted, self.params))
                shapes = [None if array is None else list(array.shape) for array in (here, there)]
                if shapes[0] != shapes[1]:
                    raise UsageError(
                        f"--init-from: {layer}'s {name} is {shapes[1]} in {self.source}, but {shapes[0]} here: use "
                        "the network, and the size of images, that it was trained with"
                    )
        if missing := [layer for layer in wanted if layer not in self.params]:
            raise UsageError(f"--init-from: {self.source} has no layer {missing[0]}")

    def layers(self, class_names: Sequence[str]) -> list[str]:
        """The layers that a training run takes: all but the last, and the last one if it has these classes."""
        return [layer for layer in self.params if layer != HEAD or self.class_names == tuple(class_names)]

    def into(self, params: Any, class_names: Sequence[str]) -> Any:
        """`params` with the `layers` from here, which `check` has found to fit."""
        taken = {
            layer: {name: jnp.asarray(array, jnp.float32) for name, array in self.params[layer].items()}
            for layer in self.layers(class_names)
        }
        return params | taken

    def statistics(self, measured: Statistics) -> Statistics:
        """Statistics of the training images with the mean image of these weights, on which their input is centred.

        For images of another shape, the mean colour takes its place.
        """
        shape = measured.mean_image.shape
        mean = self.mean_image
        if mean.shape != shape:
            mean = np.broadcast_to(mean.mean(axis=(0, 1), dtype=np.float64), shape)
        return dataclasses.replace(measured, mean_image=np.ascontiguousarray(mean, np.float32))
