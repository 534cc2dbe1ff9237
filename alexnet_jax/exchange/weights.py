"""Weights that other programs have trained: torchvision's AlexNet, Caffe's bvlc_alexnet and bvlc_reference_caffenet.

    weights = load_weights("alexnet-owt-7be5be79.pth")
    weights.predict(images)  # uint8 [N, 224, 224, 3], RGB -> probabilities [N, 1000]

What is done to their arrays, so that `models.AlexNet` computes the same:

- convolutions: [out, in, H, W] becomes [H, W, in, out]; nothing is flipped, as PyTorch and Caffe correlate, like JAX
- dense layers: [out, in] becomes [in, out]; the rows of the first go from (C, H, W) to (H, W, C)
- Caffe's conv1 looks at blue, green, red: the order of its input channels is reversed
- groups need nothing: [out, in / groups, ..] is how Flax has them, too
- float16, bfloat16 and float64 become float32

Every array of a file must be one that the network uses, and every one that it uses must be there. What can be told
beyond that depends on the format. A .caffemodel lists the layers in order with their parameters, and all of them are
compared. The others hold arrays with names and nothing else: a network that differs from torchvision's or Caffe's
AlexNet in what has no weights (order of the layers, stride, kind of pooling, activation) can't be told from it.
"""

import collections
import dataclasses
import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.errors import AlexNetError, shown, warn
from alexnet_jax.exchange import caffe
from alexnet_jax.files import expanded, read_bytes
from alexnet_jax.network import alexnet, layer_counts
from alexnet_jax.training.predict import softmax

MAX_BYTES = 1024**3  # the published files have 244 MB
MAX_OPCODES = 100_000
Arrays = Mapping[str, Any]  # NumPy's, or stand-ins for them

# The layers of `models.AlexNet`, and what the others call them.
_FEATURES, _CLASSIFIER = (0, 3, 6, 8, 10), (1, 4, 6)
TORCHVISION = dict(
    zip(alexnet.LAYERS, [*(f"features.{i}" for i in _FEATURES), *(f"classifier.{i}" for i in _CLASSIFIER)], strict=True)
)
TORCHVISION_ARRAYS = [f"{name}.{kind}" for name in TORCHVISION.values() for kind in ("weight", "bias")]
CAFFE = dict(zip(alexnet.LAYERS, ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), strict=True))


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

    def __getstate__(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }  # without compiled programs

    @property
    def model(self) -> alexnet.AlexNet:
        """The Linen module that `params` belong to."""
        return alexnet.AlexNet(self.variant, num_classes=len(self.params["logits"]["bias"]))

    def logits(self, images: Any) -> np.ndarray:
        """Unnormalized scores, float32 [N, classes].

        Args:
          images: [N, S, S, 3] of the variant's size S, RGB: uint8 grey levels, or float of any width in [0, 1].

        Raises:
          ValueError: for another shape, dtype or range.
        """
        from alexnet_jax.inspection.inputs import in_parts, to_grey_levels

        size = alexnet.architecture(self.variant).input_size
        grey = to_grey_levels(images, (size, size, 3))

        def compute(part: np.ndarray) -> jax.Array:
            return self._apply({"params": self.params}, ((part - self.mean) / self.std).astype(np.float32))

        return in_parts(compute, grey, 128)

    def predict(self, images: Any) -> np.ndarray:
        """Class probabilities, float32 [N, classes]; `images` as for `logits`."""
        return softmax(self.logits(images))

    @functools.cached_property
    def _apply(self) -> Callable[..., jax.Array]:
        return jax.jit(self.model.apply)


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads torchvision's state dict (.safetensors, .pth) or Caffe's AlexNet or CaffeNet (.caffemodel, .npy).

    The file's contents tell which it is. Pickles are read by an unpickler that knows arrays, dicts and strings; nothing
    that a file names is imported or called.

    - .pth, .safetensors: the names may have the components that `DataParallel` ("module") and `torch.compile`
      ("_orig_mod") put in, and a prefix that all of them share ("model."). A .pth may be a checkpoint, with the state
      dict at any depth of its dicts and lists; if it holds two whose values differ (averaged weights, for example), it
      is refused.
    - .caffemodel: the order of the layers tells Caffe's AlexNet (`variant` "caffe") from its CaffeNet ("caffenet"), and
      stride, padding, groups, pooling, LRN, slope of ReLU, size and scale of the input must be theirs where the file
      says them. The mean is the file's, if it has `mean_value`.
    - .npy, of caffe-tensorflow: holds no order, and CaffeNet's arrays have the names and shapes of AlexNet's. It is
      taken for AlexNet. For CaffeNet's use `dataclasses.replace(load_weights(path), variant="caffenet")`.

    Means that a file does not hold are those of ILSVRC-2012, on which the published weights were trained. For weights
    of other images (Places205) use `dataclasses.replace(weights, mean=...)`; there is a warning if a .caffemodel names
    another file for its mean.

    Raises:
      AlexNetError: it can't be read, or is another network's; the message names what is wrong.
    """
    path = expanded(path)
    try:
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise AlexNetError(f"{path}: can't be read ({error.strerror or error})") from error
    try:
        refuse_other_files(data)
        if data[:2] == b"PK":
            return _from_torchvision(*_state_dict(_read_pth(data)))
        if data[8:9] == b"{":
            return _from_torchvision(*_state_dict(_read_safetensors(data)))
        if data[:6] == b"\x93NUMPY":
            return _from_caffe_npy(_read_npy(data))
        if data[:1] == b"\x80":
            raise ValueError("PyTorch's format of before 2020: save it again with today's torch.save")
        return _from_caffemodel(caffe.read(data))
    except Exception as error:  # a damaged file makes errors of many kinds
        raise AlexNetError(f"{path}: no AlexNet of torchvision or Caffe ({_reason(error)})") from error


def refuse_other_files(data: bytes) -> None:
    """Raises ValueError for what is often found in place of a large file: nothing, a web page, a pointer to it."""
    start = data[:100].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not data:
        raise ValueError("the file is empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise ValueError("it is an HTML page: the address led to a page, not to the file; download the file itself")
    if start.startswith(b"\x89hdf"):
        raise ValueError("it is an HDF5 file, which is not read: save Caffe's network as a binary .caffemodel")
    if start.startswith(b"version https://git-lfs."):
        raise ValueError("it is a pointer of Git LFS, not the file: run git lfs pull")


def _reason(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return shown(" ".join(text.split()) or type(error).__name__, 400)


def _from_torchvision(arrays: Arrays, names: Mapping[str, str]) -> Weights:
    """Of arrays by torchvision's names; `names` has the file's own."""
    extra = sorted(names[name] for name in names if name not in TORCHVISION_ARRAYS)
    if normalization := [n for n in extra if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]:
        raise ValueError(f"it has {_listed(normalization)} of batch normalization, which AlexNet does not have")
    for key in TORCHVISION_ARRAYS:
        if key not in arrays:
            there = _listed([*extra, *(name for name in names.values() if name not in extra)])
            raise ValueError(f"{key} is missing; it has {there}")
    if extra:
        raise ValueError(f"it has {_listed(extra)}, which would not be used")
    found: dict[str, dict[str, np.ndarray]] = {}
    for layer, name in TORCHVISION.items():
        kernel, bias = (_float32(names[key], arrays[key]) for key in (f"{name}.weight", f"{name}.bias"))
        found[layer] = {"kernel": kernel, "bias": bias}
    # Its images are scaled to 0..1, then standardized by these, of ImageNet.
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    return _checked(Weights("torchvision", _from_channels_first(found), mean, std))


def _from_caffemodel(net: caffe.Net) -> Weights:
    for file in net.mean_files if net.mean is None else ():
        name = file.replace("\\", "/").rpartition("/")[2].lower()
        if "imagenet_mean" not in name and "ilsvrc" not in name:
            warn(
                f"Caffe takes the mean from {shown(file)}, which is not in the .caffemodel; ILSVRC-2012's is used "
                "instead: set the right one with dataclasses.replace(weights, mean=...), [3], RGB grey levels"
            )
    found = {
        layer: {kind: _float32(f"{layer}'s {kind}", array) for kind, array in arrays.items()}
        for layer, arrays in net.arrays.items()
    }
    return _caffe(_from_channels_first(found), net.variant, net.mean)


def _from_caffe_npy(layers: Mapping[str, Any]) -> Weights:
    """As caffe-tensorflow writes it: {layer: [kernel, bias]}, channels last, the rows of fc6 in that order, too."""
    found = {}
    for name in CAFFE.values():
        if name not in layers:
            raise ValueError(f"{name} is missing; it has {_listed(layers)}")
    if extra := [name for name in layers if name not in CAFFE.values()]:
        raise ValueError(f"it has {_listed(extra)}, which would not be used")
    for layer, name in CAFFE.items():
        if not isinstance(layers[name], list | tuple) or len(layers[name]) != 2:
            raise ValueError(f"{name} is no list of a kernel and a bias")
        kernel, bias = layers[name]
        found[layer] = {"kernel": _float32(f"{name}'s kernel", kernel), "bias": _float32(f"{name}'s bias", bias)}
    return _caffe(found, "caffe", None)


def _caffe(params: dict[str, dict[str, np.ndarray]], variant: str, mean: np.ndarray | None) -> Weights:
    params["conv1"]["kernel"] = params["conv1"]["kernel"][:, :, ::-1]  # from blue, green, red
    mean = np.array([122.68, 116.67, 104.01]) if mean is None else mean[::-1]
    return _checked(Weights(variant, params, mean, np.ones(3)))


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
    for layer, count in layer_counts.count_layers(weights.variant, max(bias.size, 1)).items():
        arrays = weights.params[layer]
        for name, wanted in (("kernel", count.kernel), ("bias", count.kernel[-1:])):
            if arrays[name].shape != wanted:
                raise ValueError(f"{layer}'s {name} is {list(arrays[name].shape)}, {list(wanted)} is needed")
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{layer}'s {name} holds Inf or NaN")
            arrays[name] = np.ascontiguousarray(arrays[name])
    return weights


def _listed(names: Iterable[object]) -> str:
    """The first of some names, and how many there are."""
    shorts = [shown(str(name), 60) for name in names]
    if len(shorts) < 2:
        return shorts[0] if shorts else "no arrays"
    return f"{', '.join(shorts[:3])}{', ...' if len(shorts) > 3 else ''} ({len(shorts)} arrays)"


def _float32(name: str, array: Any) -> np.ndarray:
    """A float array of any width as float32.

    Raises:
      ValueError: it is no array, no floats, too large for this program, or has a value beyond float32's range.
    """
    values = array.values if isinstance(array, _PickledArray) else array
    values = values.values() if isinstance(values, _Tensor) else values
    if not isinstance(values, np.ndarray) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} is {getattr(values, 'dtype', type(values).__name__)}, floats are needed")
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32, copy=False)
    if narrow is not values and (np.isinf(narrow) & np.isfinite(values)).any():
        raise ValueError(f"{name} has a value beyond the range of float32")
    return narrow


_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
}  # fmt: skip


def _read_safetensors(data: bytes) -> Arrays:
    import safetensors

    found = {}
    for name, tensor in safetensors.deserialize(data):
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {tensor['dtype']}, floats are needed")
        dtype = np.dtype(_DTYPES[tensor["dtype"]]).newbyteorder("<")
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found


def _state_dict(loaded: Any) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a state dict by torchvision's names, and the names that the file has for these.

    Args:
      loaded: the state dict, or a dict that holds it.

    Raises:
      ValueError: there is none, or there are two with different values.
    """
    if not isinstance(loaded, dict):
        raise ValueError("no dict of tensors")
    plain = [(where, depth, *_without_wrappers(one)) for where, depth, one in _dicts(loaded)]
    found = [one for one in plain if any(name in one[2] for name in TORCHVISION_ARRAYS)]
    where, depth, arrays, names = found[0] if found else max(plain, key=lambda one: len(one[2]))
    for other, other_depth, others, other_names in plain if found else ():
        if others is arrays:
            continue
        if any(name in others for name in TORCHVISION_ARRAYS):
            for name in TORCHVISION_ARRAYS:
                if arrays.get(name) is others.get(name):
                    continue
                if not (name in arrays and name in others) or not np.array_equal(
                    _float32(name, arrays[name]), _float32(name, others[name])
                ):
                    raise ValueError(
                        f"{where} and {other} both hold weights, and {name} differs: save one of them alone"
                    )
        # Those further down are an optimizer's.
        elif other_depth <= max(depth, 1) and (unused := [other_names[n] for n in others if _is_floats(others[n])]):
            raise ValueError(f"beside {where} it has {_listed(unused)}, which would not be used")
    return arrays, names


def _dicts(loaded: dict[Any, Any]) -> list[tuple[str, int, dict[Any, Any]]]:
    """Where it is, how deep, and itself: each dict in dicts, lists and tuples, the outer ones first.

    Raises:
      ValueError: they hold more than a checkpoint's.
    """
    found: list[tuple[str, int, Any]] = [("the file itself", 0, loaded)]
    entries = 0
    for where, depth, one in found:  # which grows; without end, if one holds itself
        for key, value in one.items() if isinstance(one, dict) else enumerate(one):
            if isinstance(value, dict) or type(value) in (list, tuple):
                name = shown(key, 60)
                found.append((shown(f"{where}.{name}", 60) if depth else name, depth + 1, value))
        entries += len(one)
        if len(found) > 1000 or entries > MAX_OPCODES:
            raise ValueError(f"it holds {len(found):,} dicts and lists: save model.state_dict() alone")
    return [(where, depth, one) for where, depth, one in found if isinstance(one, dict)]


def _without_wrappers(state: Mapping[Any, Any]) -> tuple[Arrays, dict[str, str]]:
    """Arrays without what DataParallel and torch.compile put into their names, and the names with that.

    A prefix that all of torchvision's names have (`model.` in Lightning's checkpoints) is removed, too.
    """
    arrays: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, _Tensor | np.ndarray):
            name = ".".join(part for part in str(key).split(".") if part not in ("module", "_orig_mod"))
            if name in arrays:
                raise ValueError(f"{names[name]} and {key} are the same array by name")
            arrays[name], names[name] = value, str(key)
    first = TORCHVISION_ARRAYS[0]
    prefixes = [name.removesuffix(first) for name in arrays if name.endswith(f".{first}")]
    short = {prefix + name: name for prefix in prefixes for name in TORCHVISION_ARRAYS}
    if len(prefixes) == 1 and short.keys() <= arrays.keys() and arrays.keys().isdisjoint(TORCHVISION_ARRAYS):
        arrays = {short.get(name, name): array for name, array in arrays.items()}
        names = {short.get(name, name): key for name, key in names.items()}
    return arrays, names


def _is_floats(array: Any) -> bool:
    """Whether it could be a network's: not one number (the best accuracy), nor integers (a generator's state)."""
    dtype, shape = (array.storage.dtype, array.size) if isinstance(array, _Tensor) else (array.dtype, array.shape)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and math.prod(shape) > 1


class _PickledArray:
    """Stands in for a NumPy array in a pickle."""

    values: np.ndarray | list[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):  # of objects
            self.values = data
            return
        if not (isinstance(dtype, _PickledDtype) and dtype.name in ("<f2", "<f4", "<f8") and isinstance(data, bytes)):
            raise pickle.UnpicklingError("an array that is not float16, float32 or float64")
        self.values = np.frombuffer(data, dtype.name).reshape(shape, order="F" if fortran else "C")


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

    remedy = ""  # for a file that asks for something else

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
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:150] + self.remedy)
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


class _Storage(NamedTuple):
    """A tensor's memory in PyTorch's file, which is read when it is needed."""

    dtype: np.dtype
    numbers: int
    key: str
    read: Callable[[str], np.ndarray]


class _Tensor(NamedTuple):
    """A tensor in PyTorch's file: a strided view of a storage, which others may share.

    `_tensor` checks that it stays in its storage. It must be a tuple: a pickle can set the attributes of anything else
    that it gets, a frozen dataclass with slots included.
    """

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def values(self) -> np.ndarray:
        raw, dtype = self.storage.read(self.storage.key), self.storage.dtype
        if raw.size != self.storage.numbers * dtype.itemsize:
            raise ValueError(f"data/{self.storage.key} has {raw.size:,} bytes, not {self.storage.numbers:,} {dtype}")
        strides = [step * dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(raw.view(dtype)[self.offset :], self.size, strides, writeable=False)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without memory")
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise pickle.UnpicklingError("a tensor whose shape is no shape")
    if not all(type(number) is int and 0 <= number < 2**40 for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape or strides are no numbers from 0")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if offset > storage.numbers or (count and last >= storage.numbers):
        raise pickle.UnpicklingError("a tensor that reaches beyond its memory")
    if count * storage.dtype.itemsize > MAX_BYTES:
        raise pickle.UnpicklingError(f"a tensor of {count:,} numbers")
    if more[2:] and more[2]:
        raise pickle.UnpicklingError("a tensor with metadata, which may change its values")
    return _Tensor(storage, offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands in for torch._utils._rebuild_parameter."""
    return tensor


# Those that are no floats are known so that the message can name the array.
_STORAGES: Mapping[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): name for name in _STORAGES},  # arguments only
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def _read_pth(data: bytes) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = {member.filename: member for member in archive.infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise ValueError("it is compressed; PyTorch's files are not")
    if sum(member.file_size for member in members.values()) > len(data):
        raise ValueError("its members hold more than the file")
    names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise ValueError("it holds no data.pkl")
    folder = names[0].removesuffix("data.pkl")
    if members.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")

    @functools.cache
    def read(key: str) -> np.ndarray:
        return np.frombuffer(archive.read(f"{folder}data/{key}"), np.uint8)

    class Unpickler(_Unpickler):
        remedy = ": save model.state_dict() alone"

        def persistent_load(self, reference: Any) -> _Storage:
            kind, storage, key, _, count = reference
            if kind != "storage" or not isinstance(storage, str) or storage not in _STORAGES:
                raise pickle.UnpicklingError("a tensor of a kind that is not known here")
            if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**40:
                raise pickle.UnpicklingError("a tensor whose memory has no name or size")
            return _Storage(np.dtype(_STORAGES[storage]), count, key, read)

    return Unpickler(archive.read(names[0]), _TORCH).load()
