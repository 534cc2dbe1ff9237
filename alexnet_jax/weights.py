"""Weights that other programs have trained: torchvision's AlexNet and Caffe's bvlc_alexnet, read with NumPy alone.

    weights = load_weights("alexnet-owt-7be5be79.pth")
    weights.predict(images)  # uint8 [N, 224, 224, 3], RGB -> probabilities [N, 1000]

What is done to their arrays, so that `models.AlexNet` computes the same:

- convolutions: [out, in, H, W] becomes [H, W, in, out]; nothing is flipped, as PyTorch and Caffe correlate, like JAX
- dense layers: [out, in] becomes [in, out]; the rows of the first go from (C, H, W) to (H, W, C)
- Caffe's conv1 looks at blue, green, red: its input channels are turned round
- groups need nothing: [out, in / groups, ..] is how Flax has them, too
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from alexnet_jax import models
from alexnet_jax.errors import AlexNetError
from alexnet_jax.files import read_bytes
from alexnet_jax.metrics import softmax

MAX_BYTES = 1024**3  # the published files have 244 MB
MAX_OPCODES = 100_000
Arrays = Mapping[str, np.ndarray]

# The layers of `models.AlexNet`, and what the others call them.
_FEATURES, _CLASSIFIER = (0, 3, 6, 8, 10), (1, 4, 6)
TORCHVISION = dict(
    zip(models.LAYERS, [*(f"features.{i}" for i in _FEATURES), *(f"classifier.{i}" for i in _CLASSIFIER)], strict=True)
)
CAFFE = dict(zip(models.LAYERS, ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A network with weights from elsewhere.

    Attributes:
      variant: of `models.AlexNet`.
      params: nested dict of float32 arrays, for `models.AlexNet(variant, num_classes)`.
      mean: [3], RGB grey levels that are subtracted from an image.
      std: [3], by which the rest is divided.
    """

    variant: str
    params: dict[str, dict[str, np.ndarray]]
    mean: np.ndarray
    std: np.ndarray

    @property
    def model(self) -> models.AlexNet:
        """The Linen module that `params` belong to."""
        return models.AlexNet(self.variant, num_classes=len(self.params["logits"]["bias"]))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes], of uint8 RGB images [N, S, S, 3] of the variant's size S.

        Raises:
          ValueError: for another shape or dtype.
        """
        images, size = np.asarray(images), models.architecture(self.variant).input_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be uint8 [N, {size}, {size}, 3], not {images.dtype} {list(images.shape)}")
        inputs = (images - self.mean) / self.std
        return np.asarray(self._apply({"params": self.params}, inputs.astype(np.float32)))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities, float32 [N, classes]; `images` as for `logits`."""
        return softmax(self.logits(images))

    @functools.cached_property
    def _apply(self) -> Callable[..., jax.Array]:
        return jax.jit(self.model.apply)


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads torchvision's state dict (.safetensors, .pth) or Caffe's bvlc_alexnet (.caffemodel, .npy).

    The file's contents tell which it is. Pickles are read by an unpickler that knows arrays, dicts and strings; nothing
    that a file names is imported or called.

    Raises:
      AlexNetError: it can't be read, or is another network's; the message names what is wrong.
    """
    path = pathlib.Path(path)
    try:
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        if data[:2] == b"PK":
            return _from_torchvision(_read_pth(data))
        if data[8:9] == b"{":
            return _from_torchvision(_read_safetensors(data))
        if data[:6] == b"\x93NUMPY":
            return _from_caffe_npy(_read_npy(data))
        if data[:1] == b"\x80":
            raise ValueError("PyTorch's format of before 2020: save it again with today's torch.save")
        return _from_caffemodel(_read_caffemodel(data))
    except Exception as error:  # a damaged file makes errors of many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise AlexNetError(f"{path}: no AlexNet of torchvision or Caffe ({reason})") from error


def _from_torchvision(arrays: Arrays) -> Weights:
    found: dict[str, dict[str, np.ndarray]] = {}
    for layer, name in TORCHVISION.items():
        found[layer] = {"kernel": _taken(arrays, f"{name}.weight"), "bias": _taken(arrays, f"{name}.bias")}
    if extra := sorted(
        set(arrays) - {f"{name}.{kind}" for name in TORCHVISION.values() for kind in ("weight", "bias")}
    ):
        raise ValueError(f"{extra[0]} does not belong to it")
    # Its images are scaled to 0..1, then standardized by these, of ImageNet.
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    return _checked(Weights("torchvision", _from_channels_first(found), mean, std))


def _from_caffemodel(blobs: Mapping[str, list[np.ndarray]]) -> Weights:
    found = {}
    for layer, name in CAFFE.items():
        if len(blobs.get(name, ())) != 2:
            raise ValueError(f"{name} has not two blobs" if name in blobs else f"{name} is missing")
        kernel, bias = blobs[name]
        dense = layer.startswith(("fc", "logits"))  # blobs of before 2014 have four axes throughout
        found[layer] = {"kernel": kernel.reshape(kernel.shape[-2:]) if dense else kernel, "bias": bias.reshape(-1)}
    return _caffe(_from_channels_first(found))


def _from_caffe_npy(layers: Mapping[str, Any]) -> Weights:
    """As caffe-tensorflow writes it: {layer: [kernel, bias]}, channels last, the rows of fc6 in that order, too."""
    found = {}
    for layer, name in CAFFE.items():
        if name not in layers or len(layers[name]) != 2:
            raise ValueError(f"{name} is missing")
        kernel, bias = layers[name]
        found[layer] = {"kernel": _float32(f"{name}'s kernel", kernel), "bias": _float32(f"{name}'s bias", bias)}
    return _caffe(found)


def _caffe(params: dict[str, dict[str, np.ndarray]]) -> Weights:
    params["conv1"]["kernel"] = params["conv1"]["kernel"][:, :, ::-1]  # from blue, green, red
    return _checked(Weights("caffe", params, np.array([122.68, 116.67, 104.01]), np.ones(3)))


def _from_channels_first(layers: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for layer, arrays in layers.items():
        kernel = arrays["kernel"]
        if layer == "fc1" and kernel.ndim == 2 and kernel.shape[1] % 36 == 0:
            kernel = kernel.reshape(len(kernel), -1, 6, 6).transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        elif kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)
        else:
            kernel = kernel.T
        found[layer] = {"kernel": kernel, "bias": arrays["bias"]}
    return found


def _checked(weights: Weights) -> Weights:
    """The same, made contiguous; ValueError names the first array that is not of the shape that the network needs."""
    bias = weights.params["logits"]["bias"]
    for layer, count in models.count_layers(weights.variant, max(len(bias), 1)).items():
        arrays = weights.params[layer]
        for name, wanted in (("kernel", count.kernel), ("bias", count.kernel[-1:])):
            if arrays[name].shape != wanted:
                raise ValueError(f"{layer}'s {name} is {list(arrays[name].shape)}, {list(wanted)} is needed")
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{layer}'s {name} holds Inf or NaN")
            arrays[name] = np.ascontiguousarray(arrays[name])
    return weights


def _taken(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    return _float32(name, arrays[name])


def _float32(name: str, array: Any) -> np.ndarray:
    values = array.values if isinstance(array, _PickledArray) else array
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        raise ValueError(f"{name} is {getattr(values, 'dtype', type(values).__name__)}, float32 is needed")
    return values


def _read_safetensors(data: bytes) -> Arrays:
    import safetensors.numpy

    return safetensors.numpy.load(data)


class _PickledArray:
    """Stands in for a NumPy array in a pickle."""

    values: np.ndarray | list[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):  # of objects
            self.values = data
            return
        if not (isinstance(dtype, _PickledDtype) and dtype.name == "<f4" and isinstance(data, bytes)):
            raise pickle.UnpicklingError("an array that is not float32")
        self.values = np.frombuffer(data, np.float32).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """Stands in for a NumPy dtype in a pickle."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.name = code, ""

    def __setstate__(self, state: Any) -> None:
        self.name = f"{state[1]}{self.code}"


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode("latin-1")


def _array(*_: Any) -> _PickledArray:
    return _PickledArray()


class _Unpickler(pickle.Unpickler):
    """Knows what `known` names, and nothing else: what a pickle may call is ours and does nothing but hold data."""

    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any]) -> None:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            # A pickle of weights has some hundred opcodes; the memo is an array that grows to the largest index.
            if number > MAX_OPCODES or ("PUT" in opcode.name and int(argument or 0) > MAX_OPCODES):
                raise pickle.UnpicklingError("a pickle with more than weights in it")
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for."""
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:150])
        value = self._known[module, name]
        # New each time: a pickle may set attributes of what it gets, and those of ours must stay as they are.
        return functools.partial(value) if callable(value) else value


_NUMPY = {
    (module, name): value
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy", "_codecs")
    for name, value in {
        "_reconstruct": _array,
        "ndarray": "ndarray",  # an argument only
        "dtype": _PickledDtype,
        "encode": _latin1,
    }.items()
}


def _read_npy(data: bytes) -> Mapping[str, Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"an array {list(shape)} of {dtype}, one dict is needed")
    loaded = _Unpickler(data[file.tell() :], _NUMPY).load()
    if not (isinstance(loaded, _PickledArray) and isinstance(loaded.values, list) and len(loaded.values) == 1):
        raise ValueError("no dict of layers")
    (layers,) = loaded.values
    if not isinstance(layers, dict):
        raise ValueError("no dict of layers")
    return layers


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A tensor's memory in PyTorch's file."""

    values: np.ndarray


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """Stands in for torch._utils._rebuild_tensor_v2."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without memory")
    if not all(isinstance(number, int) for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape is no numbers")
    count = math.prod(size)
    contiguous = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if tuple(stride) != contiguous or not 0 <= offset <= offset + count <= len(storage.values):
        raise pickle.UnpicklingError("a tensor that does not lie in one piece in its memory")
    return storage.values[offset : offset + count].reshape(size)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands in for torch._utils._rebuild_parameter."""
    return tensor


_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "FloatStorage"): "FloatStorage",  # an argument only
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def _read_pth(data: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed; PyTorch's files are not")
        names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError("it holds no data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if members.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")

        storages: dict[str, _Storage] = {}

        class Unpickler(_Unpickler):
            def persistent_load(self, reference: Any) -> _Storage:
                kind, storage, key, _, count = reference
                if kind != "storage" or storage != "FloatStorage":
                    raise pickle.UnpicklingError("a tensor that is not float32")
                if key not in storages:
                    values = np.frombuffer(archive.read(f"{folder}data/{key}"), "<f4")
                    if len(values) != count:
                        raise pickle.UnpicklingError(f"data/{key} has {len(values):,} numbers, not {count:,}")
                    storages[key] = _Storage(values)
                return storages[key]

        loaded = Unpickler(archive.read(names[0]), _TORCH).load()
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError("no dict of tensors")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


@functools.cache
def _net_parameter() -> Any:
    """The few fields of Caffe's NetParameter that hold weights, as a class of protobuf's."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="alexnet_jax/caffe.proto", package="alexnet_jax.caffe", syntax="proto2"
    )
    # Message: fields as (name, number, type or message's name, repeated).
    messages = {
        "Shape": [("dim", 1, kinds.TYPE_INT64, True)],
        "Blob": [
            *((name, i, kinds.TYPE_INT32, False) for i, name in enumerate(("num", "channels", "height", "width"), 1)),
            ("data", 5, kinds.TYPE_FLOAT, True),
            ("shape", 7, "Shape", False),
        ],
        "Layer": [("name", 1, kinds.TYPE_STRING, False), ("blobs", 7, "Blob", True)],
        "OldLayer": [("name", 4, kinds.TYPE_STRING, False), ("blobs", 6, "Blob", True)],
        "Net": [("old_layers", 2, "OldLayer", True), ("layers", 100, "Layer", True)],
    }
    for message, fields in messages.items():
        entry = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = entry.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".alexnet_jax.caffe.{kind}"
            else:
                field.type = kind
                field.options.packed = repeated
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("alexnet_jax.caffe.Net"))


def _read_caffemodel(data: bytes) -> dict[str, list[np.ndarray]]:
    net = _net_parameter().FromString(data)
    found = {}
    for layer in (*net.layers, *net.old_layers):
        blobs = []
        for blob in layer.blobs:
            old = (blob.num, blob.channels, blob.height, blob.width)
            shape = tuple(blob.shape.dim) if blob.HasField("shape") else old
            blobs.append(np.array(blob.data, np.float32).reshape(shape))
        if blobs:
            found[layer.name] = blobs
    return found
