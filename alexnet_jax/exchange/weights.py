"""Weights trained by other programs: torchvision's AlexNet, Caffe's bvlc_alexnet and bvlc_reference_caffenet.

    weights = load_weights("alexnet-owt-7be5be79.pth")
    weights.predict(images)  # uint8 [N, 224, 224, 3], RGB -> probabilities [N, 1000]

The arrays are converted so that `alexnet.AlexNet` computes the same:

- convolutions: [out, in, H, W] becomes [H, W, in, out]; nothing is flipped, because PyTorch and Caffe compute
  correlations, like JAX
- dense layers: [out, in] becomes [in, out]; the rows of the first are reordered from (C, H, W) to (H, W, C)
- Caffe's images are blue, green, red: the order of conv1's input channels is reversed
- groups are kept: [out, in / groups, ..] is Flax's layout, too
- float16, bfloat16 and float64 become float32

A file must have every array that the network uses, and no other. Further checks depend on the format. A .caffemodel
lists the layers in order with their parameters, and all of them are compared. The other formats contain only named
arrays: a network that differs from torchvision's or Caffe's AlexNet only in properties without weights (order of the
layers, stride, kind of pooling, activation) can't be recognized as different.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax.data import pickles
from alexnet_jax.errors import AlexNetError, reason, shown, warn
from alexnet_jax.exchange import caffe, state_dict
from alexnet_jax.exchange.state_dict import listed, to_float32
from alexnet_jax.files import expanded, read_bytes
from alexnet_jax.inspection.inputs import in_parts, to_grey_levels
from alexnet_jax.network import alexnet, layer_counts
from alexnet_jax.network.layer_outputs import compiled_layer_outputs
from alexnet_jax.training.predict import softmax

Params = dict[str, dict[str, np.ndarray]]  # layer -> "kernel", "bias"

# The layers of `alexnet.AlexNet`, and their names in other programs.
TORCHVISION = dict(
    zip(
        alexnet.LAYERS,
        [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), *(f"classifier.{i}" for i in (1, 4, 6))],
        strict=True,
    )
)
TORCHVISION_ARRAYS = [f"{name}.{kind}" for name in TORCHVISION.values() for kind in ("weight", "bias")]
CAFFE = dict(zip(alexnet.LAYERS, ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), strict=True))

# ILSVRC-2012's, RGB: torchvision standardizes images in 0..1, Caffe subtracts the mean from grey levels.
TORCHVISION_MEAN = 255 * np.array([0.485, 0.456, 0.406])
TORCHVISION_STD = 255 * np.array([0.229, 0.224, 0.225])
CAFFE_MEAN = np.array([122.68, 116.67, 104.01])


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A network with weights from another program.

    Attributes:
      variant: variant of `alexnet.AlexNet`.
      params: float32, for `alexnet.AlexNet(variant, num_classes)`.
      mean: [3], RGB grey levels 0..255 that are subtracted from an image.
      std: [3], RGB grey levels by which the difference is divided.
    """

    variant: str
    params: Params
    mean: np.ndarray
    std: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # excludes the compiled program
        return {field.name: getattr(self, field.name) for field in fields}

    @property
    def model(self) -> alexnet.AlexNet:
        """The Flax module of `params`."""
        return alexnet.AlexNet(self.variant, num_classes=len(self.params["logits"]["bias"]))

    def logits(self, images: Any) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes].

        Args:
          images: [N, S, S, 3] of the variant's size S, RGB: uint8 grey levels, or floats of any width in [0, 1].

        Raises:
          ValueError: another shape, dtype or range.
        """
        return self._computed(lambda inputs: self._apply({"params": self.params}, inputs), images)

    def predict(self, images: Any) -> np.ndarray:
        """Class probabilities, float32 [N, classes]; `images` as for `logits`."""
        return softmax(self.logits(images))

    def features(self, images: Any, layer: str) -> np.ndarray:
        """Output of a layer, "fc2", or of an operation after it, "fc2 activation": float32 [N, H, W, C] or [N, C].

        `images` are as for `logits`.

        Raises:
          ValueError: another shape, dtype or range.
          KeyError: the network has no such layer; the message lists all.
        """
        return self._computed(
            lambda inputs: compiled_layer_outputs(self.model, self.params, inputs, (layer,))[layer], images
        )

    def _computed(self, function: Callable[[np.ndarray], jax.Array], images: Any) -> np.ndarray:
        size = alexnet.architecture(self.variant).input_size
        grey = to_grey_levels(images, (size, size, 3))
        return in_parts(lambda part: function(((part - self.mean) / self.std).astype(np.float32)), grey, 128)

    @functools.cached_property
    def _apply(self) -> Callable[..., jax.Array]:
        return jax.jit(self.model.apply)


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads torchvision's state dict (.safetensors, .pth) or Caffe's AlexNet or CaffeNet (.caffemodel, .npy).

    The format is recognized by the file's contents, not by its name. Nothing that a pickle names is imported or called.

    - .pth, .safetensors: names can have the components that `DataParallel` ("module") and `torch.compile` ("_orig_mod")
      add, and a common prefix ("model."). A .pth can be a checkpoint, with the state dict at any depth of its dicts and
      lists; one with two whose values differ (averaged weights, for example) is refused.
    - .caffemodel: the order of the layers tells Caffe's AlexNet (`variant` "caffe") from CaffeNet ("caffenet"), and
      stride, padding, groups, pooling, LRN, slope of ReLU, size and scale of the input must be those of that network if
      the file has them. The mean is taken from the file if it has `mean_value`.
    - .npy, of caffe-tensorflow: contains no order of layers, and CaffeNet's arrays have the names and shapes of
      AlexNet's, so it is read as AlexNet. For CaffeNet use `dataclasses.replace(load_weights(path),
      variant="caffenet")`.

    If the file has no mean, that of ILSVRC-2012 is used, on which the published weights were trained. For weights
    trained on other images (Places205), use `dataclasses.replace(weights, mean=...)`; if a .caffemodel takes its mean
    from another file, a warning says so.

    Raises:
      AlexNetError: the file can't be read, or contains another network; the message names the difference.
    """
    path = expanded(path)
    try:
        data = read_bytes(path, state_dict.MAX_BYTES)
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({reason(error)})") from error
    try:
        refuse_other_files(data)
        if data[:2] == b"PK":
            return _from_torchvision(state_dict.find(state_dict.read_pth(data), TORCHVISION_ARRAYS))
        if data[8:9] == b"{":
            return _from_torchvision(state_dict.find(state_dict.read_safetensors(data), TORCHVISION_ARRAYS))
        if data[:6] == b"\x93NUMPY":
            return _from_npy(_read_npy(data))
        if data[:1] == b"\x80":
            raise ValueError("PyTorch's format from before 2020: save it again with a current torch.save")
        return _from_caffemodel(caffe.read(data))
    except Exception as error:  # a damaged file causes errors of many kinds
        raise AlexNetError(f"{path}: not an AlexNet of torchvision or Caffe ({reason(error, 400)})") from error


def refuse_other_files(data: bytes) -> None:
    """Raises ValueError for contents often found in place of a large file: none, a web page, a Git LFS pointer."""
    start = data[:100].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not data:
        raise ValueError("the file is empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise ValueError("it is an HTML page: the address led to a page, not to the file; download the file itself")
    if start.startswith(b"\x89hdf"):
        raise ValueError("it is an HDF5 file, which is not supported: save Caffe's network as a binary .caffemodel")
    if start.startswith(b"version https://git-lfs."):
        raise ValueError("it is a Git LFS pointer, not the file: run git lfs pull")


def _from_torchvision(state: state_dict.StateDict) -> Weights:
    extra = sorted(state.names[name] for name in state.names if name not in TORCHVISION_ARRAYS)
    if normalization := [n for n in extra if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]:
        raise ValueError(f"it has {listed(normalization)} of batch normalization, which AlexNet does not have")
    for name in TORCHVISION_ARRAYS:
        if name not in state.arrays:
            there = listed([*extra, *(name for name in state.names.values() if name not in extra)])
            raise ValueError(f"{name} is missing; it has {there}")
    if extra:
        raise ValueError(f"it has {listed(extra)}, which would not be used")

    def array(name: str) -> np.ndarray:
        return to_float32(state.names[name], state.arrays[name])

    params = {
        layer: {"kernel": array(f"{name}.weight"), "bias": array(f"{name}.bias")} for layer, name in TORCHVISION.items()
    }
    return checked(Weights("torchvision", _channels_last(params), TORCHVISION_MEAN, TORCHVISION_STD))


def _from_caffemodel(net: caffe.Net) -> Weights:
    for file in net.mean_files if net.mean is None else ():
        name = file.replace("\\", "/").rpartition("/")[2].lower()
        if "imagenet_mean" not in name and "ilsvrc" not in name:
            warn(
                f"Caffe takes the mean from {shown(file)}, which is not in the .caffemodel; ILSVRC-2012's is used "
                "instead: set the right one with dataclasses.replace(weights, mean=...), [3], RGB grey levels, or with "
                "the --mean of exchange.convert"
            )
    params = {
        layer: {kind: to_float32(f"{layer}'s {kind}", array) for kind, array in arrays.items()}
        for layer, arrays in net.arrays.items()
    }
    return _from_caffe(_channels_last(params), net.variant, net.mean)


def _read_npy(data: bytes) -> Mapping[str, Any]:
    """The dict in an .npy file, with strings as keys even if Python 2 wrote it."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"an array {list(shape)} of {dtype}, not one dict")
    match pickles.loads(data[file.tell() :]):
        case pickles.PickledArray(values=[dict(layers)]):
            return {key.decode("latin-1") if isinstance(key, bytes) else key: layers[key] for key in layers}
    raise ValueError("no dict of layers")


def _from_npy(layers: Mapping[str, Any]) -> Weights:
    """From caffe-tensorflow's {layer: [kernel, bias]}: channels last, in the rows of fc6, too."""
    params = {}
    for name in CAFFE.values():
        if name not in layers:
            raise ValueError(f"{name} is missing; it has {listed(layers)}")
    if extra := [name for name in layers if name not in CAFFE.values()]:
        raise ValueError(f"it has {listed(extra)}, which would not be used")
    for layer, name in CAFFE.items():
        match layers[name]:
            case [pickles.PickledArray(values=kernel), pickles.PickledArray(values=bias)]:
                params[layer] = {
                    "kernel": to_float32(f"{name}'s kernel", kernel),
                    "bias": to_float32(f"{name}'s bias", bias),
                }
            case _:
                raise ValueError(f"{name} is not a list of a kernel and a bias")
    return _from_caffe(params, "caffe", None)


def _from_caffe(params: Params, variant: str, mean: np.ndarray | None) -> Weights:
    """From arrays with channels last and a mean, if the file has one; the channels of both are blue, green, red."""
    params["conv1"]["kernel"] = params["conv1"]["kernel"][:, :, ::-1]
    return checked(Weights(variant, params, CAFFE_MEAN if mean is None else mean[::-1], np.ones(3)))


def _channels_last(params: Params) -> Params:
    converted = {}
    for layer, arrays in params.items():
        kernel = arrays["kernel"]
        if layer == "fc1" and kernel.ndim == 2 and kernel.shape[1] % 36 == 0:
            kernel = kernel.reshape(len(kernel), -1, 6, 6).transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        elif kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)
        else:
            kernel = kernel.T
        converted[layer] = {"kernel": kernel, "bias": arrays["bias"]}
    return converted


def checked(weights: Weights) -> Weights:
    """The same weights, with contiguous arrays.

    Raises:
      ValueError: an array does not have the shape that the network needs, or contains Inf or NaN.
    """
    bias = weights.params["logits"]["bias"]
    for layer, count in layer_counts.count_layers(weights.variant, max(bias.size, 1)).items():
        arrays = weights.params[layer]
        for name, shape in (("kernel", count.kernel), ("bias", count.kernel[-1:])):
            if arrays[name].shape != shape:
                raise ValueError(f"{layer}'s {name} is {list(arrays[name].shape)}, {list(shape)} is needed")
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{layer}'s {name} contains Inf or NaN")
            arrays[name] = np.ascontiguousarray(arrays[name])
    return weights
