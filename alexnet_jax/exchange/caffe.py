"""Caffe's .caffemodel files: which variant of `alexnet.AlexNet` a file contains, and its arrays.

A .caffemodel is a NetParameter message of protobuf. It lists the layers in order of computation, with their types,
their parameters (stride, groups, alpha ...), their inputs, outputs and arrays. Field numbers: Caffe's
src/caffe/proto/caffe.proto. `bvlc_alexnet` and `bvlc_reference_caffenet` have arrays of the same names and shapes, so
every parameter that affects the result is compared with the variant's, and any difference is refused.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.errors import shown
from alexnet_jax.network import alexnet

VARIANTS = ("caffe", "caffenet")

_SOURCES = ("Data", "Input", "ImageData", "HDF5Data", "MemoryData", "WindowData")
_OUTPUTS = ("Accuracy", "Softmax", "SoftmaxWithLoss")

# Values of V1LayerParameter.LayerType.
_OLD_TYPES = {
    1: "Accuracy", 2: "BNLL", 3: "Concat", 4: "Convolution", 5: "Data", 6: "Dropout", 7: "EuclideanLoss", 8: "Flatten",
    9: "HDF5Data", 10: "HDF5Output", 11: "Im2col", 12: "ImageData", 13: "InfogainLoss", 14: "InnerProduct", 15: "LRN",
    16: "MultinomialLogisticLoss", 17: "Pooling", 18: "ReLU", 19: "Sigmoid", 20: "Softmax", 21: "SoftmaxWithLoss",
    22: "Split", 23: "TanH", 24: "WindowData", 25: "Eltwise", 26: "Power", 27: "SigmoidCrossEntropyLoss",
    28: "HingeLoss", 29: "MemoryData", 30: "ArgMax", 31: "Threshold", 32: "DummyData", 33: "Slice", 34: "MVN",
    35: "AbsVal", 36: "Silence", 37: "ContrastiveLoss", 38: "Exp", 39: "Deconvolution",
}  # fmt: skip

# Message -> its fields as `name number type default`. A type is protobuf's or the name of another message; `*`:
# repeated. Other fields of the parameters are refused, except for `_HARMLESS`. Where there are many packed numbers,
# they are read as bytes: as a list they would take seconds.
_MESSAGES = {
    "Shape": "dim 1 packed*",
    "Blob": "num 1 int, channels 2 int, height 3 int, width 4 int, data 5 bytes*, shape 7 Shape, double_data 8 bytes*",
    "Convolution": (
        "num_output 1 int, bias_term 2 bool true, pad 3 int*, kernel_size 4 int*, group 5 int 1, stride 6 int*, "
        "pad_h 9 int, pad_w 10 int, kernel_h 11 int, kernel_w 12 int, stride_h 13 int, stride_w 14 int, axis 16 int 1, "
        "dilation 18 int*"
    ),
    "Pooling": (
        "pool 1 int, kernel_size 2 int*, stride 3 int*, pad 4 int*, kernel_h 5 int, kernel_w 6 int, stride_h 7 int, "
        "stride_w 8 int, pad_h 9 int, pad_w 10 int, global_pooling 12 bool"
    ),
    "LRN": "local_size 1 int 5, alpha 2 float 1, beta 3 float 0.75, norm_region 4 int, k 5 float 1",
    "InnerProduct": "num_output 1 int, bias_term 2 bool true, axis 5 int 1, transpose 6 bool",
    "ReLU": "negative_slope 1 float",
    "Dropout": "scale_train 2 bool true",
    "Transform": "scale 1 float 1, crop_size 3 int, mean_file 4 bytes, mean_value 5 float*, force_gray 7 bool",
    "Source": "scale 2 float 1, mean_file 3 bytes, crop_size 5 int",
    "Memory": "height 3 int, width 4 int",
    "Input": "shape 1 Shape*",
    "Layer": (
        "name 1 string, type 2 string, bottom 3 string*, top 4 string*, blobs 7 Blob*, include 8 bytes*, "
        "exclude 9 bytes*, transform_param 100 Transform, convolution_param 106 Convolution, data_param 107 Source, "
        "dropout_param 108 Dropout, image_data_param 115 Source, inner_product_param 117 InnerProduct, "
        "lrn_param 118 LRN, memory_data_param 119 Memory, pooling_param 121 Pooling, relu_param 123 ReLU, "
        "window_data_param 129 Source, input_param 143 Input"
    ),
    "OldLayer": (  # V1LayerParameter
        "oldest 1 bytes, bottom 2 string*, top 3 string*, name 4 string, type 5 int, blobs 6 Blob*, "
        "convolution_param 10 Convolution, data_param 11 Source, dropout_param 12 Dropout, image_data_param 15 Source, "
        "inner_product_param 17 InnerProduct, lrn_param 18 LRN, pooling_param 19 Pooling, window_data_param 20 Source, "
        "memory_data_param 22 Memory, relu_param 30 ReLU, include 32 bytes*, exclude 33 bytes*, "
        "transform_param 36 Transform"
    ),
    "Net": ("old_layers 2 OldLayer*, input 3 string*, input_dim 4 int*, input_shape 8 Shape*, layers 100 Layer*"),
}
# Fields of the parameters without effect on the result: initial values, the implementation, the rate of dropout.
_HARMLESS = {"Convolution": (7, 8, 15, 17), "Pooling": (11,), "LRN": (6,), "InnerProduct": (3, 4), "ReLU": (2,)}
_HARMLESS["Dropout"] = (1,)

_PARAMETERS = {
    "Convolution": "convolution_param", "Pooling": "pooling_param", "LRN": "lrn_param", "ReLU": "relu_param",
    "InnerProduct": "inner_product_param", "Dropout": "dropout_param",
}  # fmt: skip
_SOURCE_PARAMETERS = ("transform_param", "data_param", "image_data_param", "window_data_param")
_NAMES = {"pool": ("MAX", "AVE", "STOCHASTIC"), "norm_region": ("ACROSS_CHANNELS", "WITHIN_CHANNEL")}
_WHEN_UNSET = {"pad": 0, "stride": 1, "dilation": 1}


class Net(NamedTuple):
    """The contents of a .caffemodel.

    Attributes:
      variant: variant of `alexnet.AlexNet`.
      arrays: kernel and bias of each of `alexnet.LAYERS`, in Caffe's layout: channels first, blue before red.
      mean: [3], grey levels 0..255 (blue, green, red) that the data layer subtracts; None if the file has no mean.
      mean_files: names of the files from which the data layers read a mean instead.
    """

    variant: str
    arrays: dict[str, dict[str, np.ndarray]]
    mean: np.ndarray | None
    mean_files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Expected:
    """A layer of a variant: its type in Caffe, and the parameters that affect the result."""

    kind: str
    parameters: Mapping[str, Any]


def read(data: bytes) -> Net:
    """Reads a .caffemodel in the current format (LayerParameter) or that of 2014 (V1LayerParameter).

    Raises:
      ValueError: neither of the two networks has such a layer, or a parameter differs; the message names it.
      google.protobuf.message.DecodeError: it is not a message of protobuf.
    """
    net = _net_class().FromString(data)
    if net.layers and net.old_layers:
        raise ValueError("it contains its layers twice, in the current format and in that of 2014")
    layers = [*net.layers, *net.old_layers]
    if not layers:
        raise ValueError("it contains no layers")
    if sum(1 + len(layer.bottom) + len(layer.top) for layer in layers) > 10_000:
        raise ValueError(f"it contains {len(layers):,} layers")
    if any(layer.oldest for layer in net.old_layers):
        raise ValueError("Caffe's format from before 2014: convert it with Caffe's upgrade_net_proto_binary")
    chain = _chain(layers, set(net.input))
    variant = _variant(chain)
    size = alexnet.architecture(variant).input_size
    for shape in (net.input_dim[:4], *(shape.dim for shape in net.input_shape)):
        _check_shape("its input", shape, size)
    sources = [layer for layer in layers if _kind(layer) in _SOURCES]
    means = [mean for layer in sources for mean in _check_source(layer, size)]
    if any(mean != means[0] for mean in means):
        raise ValueError("its data layers subtract different means")
    _check_parameters(chain, list(_expected_layers(variant)), [layer for layer in layers if _kind(layer) == "Dropout"])
    files = dict.fromkeys(getattr(layer, field).mean_file for layer in sources for field in _SOURCE_PARAMETERS)
    mean_files = tuple(file.decode(errors="replace") for file in files if file)
    return Net(variant, _arrays(layers, chain), np.array(means[0]) if means else None, mean_files)


def _name(layer: Any) -> str:
    return shown(layer.name) or "a layer without a name"


def _kind(layer: Any) -> str:
    if isinstance(layer.type, str):
        return layer.type
    return _OLD_TYPES.get(layer.type, f"type {layer.type}") if layer.type else ""


def _chain(layers: Sequence[Any], inputs: set[str]) -> list[Any]:
    """The layers between image and logits, in order, without dropout and copies.

    Raises:
      ValueError: the layers have no types, or are not a chain.
    """
    chain: list[Any] = []
    copies: dict[str, str] = {}  # a Split gives its input under new names
    current: str | None = None  # the name of the last layer's output
    last = ""
    wired = any(layer.bottom or layer.top for layer in layers)
    for layer in layers:
        kind, name = _kind(layer), _name(layer)
        if not kind:
            raise ValueError(f"{name} has no type: without types this can't be recognized as a network")
        if kind in _SOURCES:
            inputs = inputs | set(layer.top)
            current = None if current in layer.top else current
        elif kind == "Split":
            copies |= {top: copies.get(layer.bottom[0], layer.bottom[0]) for top in layer.top if layer.bottom}
        elif kind in _OUTPUTS:
            last = name
        elif kind != "Silence":
            if last:
                raise ValueError(
                    f"{name} ({kind}) comes after {last}: only losses and accuracies can follow the logits"
                )
            if wired:
                if len(layer.bottom) != 1 or len(layer.top) != 1:
                    raise ValueError(f"{name} ({kind}) has {len(layer.bottom)} inputs and {len(layer.top)} outputs")
                source = copies.get(layer.bottom[0], layer.bottom[0])
                if source != current and (chain or (inputs and source not in inputs)):
                    before = _name(chain[-1]) if chain else "the data layer"
                    raise ValueError(
                        f"{name} ({kind}) takes {shown(layer.bottom[0])} as input, not the output of {before}"
                    )
                current = layer.top[0]
                copies = {copy: of for copy, of in copies.items() if current not in (copy, of)}
            if kind != "Dropout":
                if layer.include or layer.exclude:
                    raise ValueError(f"{name} ({kind}) is used in some phases only")
                chain.append(layer)
    return chain


def _expected_layers(variant: str) -> Iterator[_Expected]:
    """The layers of a variant."""
    network = alexnet.architecture(variant)
    lrn = {"local_size": 5, "alpha": 1e-4, "beta": 0.75, "norm_region": 0, "k": network.lrn_k}
    pooling = {"pool": 0, "global_pooling": False, "stride": 2, "pad": 0, "kernel_size": 3}
    after = {
        "activation": _Expected("ReLU", {"negative_slope": 0.0}),
        "LRN": _Expected("LRN", lrn),
        "pool": _Expected("Pooling", pooling),
    }
    for i, side in enumerate(alexnet.KERNEL_SIDES):
        padding = network.conv1_padding[0] if i == 0 else side // 2
        geometry = {"stride": 4 if i == 0 else 1, "pad": padding, "dilation": 1, "kernel_size": side, "axis": 1}
        channels = {"group": network.groups[i], "num_output": network.features[i], "bias_term": True}
        yield _Expected("Convolution", geometry | channels)
        for operation in network.operations[i]:
            yield after[operation]
    for features in (4096, 4096, None):
        dense = {"bias_term": True, "axis": 1, "transpose": False}
        yield _Expected("InnerProduct", dense | ({"num_output": features} if features else {}))
        if features:
            yield after["activation"]


def _variant(chain: Sequence[Any]) -> str:
    """The variant with layers of these types in this order.

    Raises:
      ValueError: there is none.
    """
    found = [_kind(layer) for layer in chain]
    kinds = {variant: [layer.kind for layer in _expected_layers(variant)] for variant in VARIANTS}
    for variant in VARIANTS:
        if kinds[variant] == found:
            return variant
    equal = {  # number of first layers
        variant: next(i for i in range(len(found), -1, -1) if kinds[variant][:i] == found[:i]) for variant in VARIANTS
    }
    at = max(equal.values())
    needed = " or ".join(dict.fromkeys((*kinds[v], "the output")[at] for v in VARIANTS if equal[v] == at))
    before = f"after {_name(chain[at - 1])}" if at else "first"
    what = f"{_name(chain[at])} ({shown(found[at])})" if at < len(found) else "the end"
    raise ValueError(f"{before} comes {what}; {needed} is needed there")


def _check_parameters(chain: Sequence[Any], expected: Sequence[_Expected], dropouts: Sequence[Any]) -> None:
    """Raises ValueError for a parameter that differs.

    In a layer with parameters, omitted ones have Caffe's defaults. Some programs omit the parameters of all layers:
    these are assumed to be those of the variant.
    """
    pairs = [
        *zip(chain, expected, strict=True),
        *((layer, _Expected("Dropout", {"scale_train": True})) for layer in dropouts),
    ]
    stated = [layer.HasField(_PARAMETERS[one.kind]) for layer, one in pairs]
    for (layer, one), is_stated in zip(pairs, stated, strict=True):
        if is_stated:
            _check_layer(layer, one)
        elif any(stated) and one.kind not in ("ReLU", "Dropout"):
            raise ValueError(f"{_name(layer)} ({one.kind}) has no {_PARAMETERS[one.kind]}, unlike other layers")


def _check_layer(layer: Any, expected: _Expected) -> None:
    from google.protobuf import unknown_fields

    message = getattr(layer, _PARAMETERS[expected.kind])
    differences = []
    for name, value in expected.parameters.items():
        found = _values(message, name)
        if found is not None and any(not math.isclose(v, value, rel_tol=1e-6) for v in found):
            given = " and ".join(_described(name, v) for v in sorted(found))
            differences.append(f"{name} is {given}, {_described(name, value)} is needed")
    for field in unknown_fields.UnknownFieldSet(message):
        if field.field_number not in _HARMLESS[expected.kind]:
            differences.append(f"field {field.field_number} of its {_PARAMETERS[expected.kind]} is unknown")
    if differences:
        raise ValueError(f"{_name(layer)} ({expected.kind}): {'; '.join(differences)}")


def _values(message: Any, name: str) -> set[Any] | None:
    """The values of a field, for both axes; None if it is omitted and the arrays' shapes determine it."""
    if name == "num_output" and not message.HasField(name):
        return None
    if name not in ("pad", "kernel_size", "stride", "dilation"):
        return {getattr(message, name)}
    sides = [f"{name.removesuffix('_size')}_{side}" for side in "hw"]
    known = message.DESCRIPTOR.fields_by_name
    apart = [getattr(message, s) for s in sides] if any(s in known and message.HasField(s) for s in sides) else []
    if found := {*getattr(message, name), *apart}:
        return found
    if name in _WHEN_UNSET:
        return {_WHEN_UNSET[name]}
    return None if message.DESCRIPTOR.name == "Convolution" else {0}


def _described(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _NAMES[name][value] if name in _NAMES and 0 <= value < len(_NAMES[name]) else f"{value:g}"


def _check_source(layer: Any, size: int) -> Iterator[tuple[float, ...]]:
    """Yields the mean that a data layer subtracts, if it has one.

    Raises:
      ValueError: it scales or crops images in another way, or makes them grey.
    """
    name = _name(layer)
    for field in _SOURCE_PARAMETERS:
        source = getattr(layer, field)
        if source.scale != 1:
            raise ValueError(f"{name}: scale is {source.scale:g}, 1 is needed (grey levels 0..255)")
        if source.crop_size not in (0, size):
            raise ValueError(f"{name}: crop_size is {source.crop_size}, {size} is needed")
    if layer.transform_param.force_gray:
        raise ValueError(f"{name}: force_gray is set, images in colour are needed")
    if layer.HasField("memory_data_param"):
        _check_size(name, layer.memory_data_param.height, layer.memory_data_param.width, size)
    if isinstance(layer.type, str):
        for shape in layer.input_param.shape:
            _check_shape(name, shape.dim, size)
    if means := tuple(layer.transform_param.mean_value):
        if len(means) not in (1, 3):
            raise ValueError(f"{name}: mean_value has {len(means)} numbers, 3 are needed")
        yield means * 3 if len(means) == 1 else means


def _check_shape(name: str, shape: Sequence[int], size: int) -> None:
    """Checks the shape of an input; only that of the images has three channels."""
    if len(shape) == 4 and shape[1] == 3:
        _check_size(name, shape[2], shape[3], size)


def _check_size(name: str, height: int, width: int, size: int) -> None:
    if (height, width) != (size, size):
        raise ValueError(f"{name}: images are {height}x{width}, {size}x{size} is needed")


def _arrays(layers: Sequence[Any], chain: Sequence[Any]) -> dict[str, dict[str, np.ndarray]]:
    """Kernel and bias of each of `alexnet.LAYERS`.

    Raises:
      ValueError: arrays are missing or damaged, or another layer has some.
    """
    weighted = [layer for layer in chain if _kind(layer) in ("Convolution", "InnerProduct")]
    for layer in layers:
        if layer.blobs and not any(layer is other for other in weighted):
            raise ValueError(f"{_name(layer)} ({_kind(layer)}) contains an array, which would not be used")
    arrays = {}
    for name, layer in zip(alexnet.LAYERS, weighted, strict=True):
        if len(layer.blobs) != 2:
            raise ValueError(f"{_name(layer)} contains {len(layer.blobs)} arrays; a kernel and a bias are needed")
        kernel, bias = (_array(_name(layer), blob) for blob in layer.blobs)
        # Dense kernels from before 2014 have four axes.
        kernel = kernel.reshape(kernel.shape[-2:]) if _kind(layer) == "InnerProduct" else kernel
        arrays[name] = {"kernel": kernel, "bias": bias.reshape(-1)}
    return arrays


def _array(name: str, blob: Any) -> np.ndarray:
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    values = np.frombuffer(b"".join(blob.data), "<f4")
    if blob.double_data:
        values = np.frombuffer(b"".join(blob.double_data), "<f8")
    if math.prod(shape) != len(values):
        raise ValueError(f"{name}: an array of shape {list(shape)} contains {len(values):,} numbers")
    return values.reshape(shape)


@functools.cache
def _net_class() -> Any:
    """Caffe's NetParameter, with the fields in `_MESSAGES`, as a class of protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    types = {"int": kinds.TYPE_INT64, "packed": kinds.TYPE_INT64, "float": kinds.TYPE_FLOAT, "bool": kinds.TYPE_BOOL}
    types |= {"string": kinds.TYPE_STRING, "bytes": kinds.TYPE_BYTES}
    package = "alexnet_jax.exchange.caffe"
    file = descriptor_pb2.FileDescriptorProto(name="alexnet_jax/caffe.proto", package=package, syntax="proto2")
    for message, fields in _MESSAGES.items():
        entry = file.message_type.add(name=message)
        for definition in fields.split(", "):
            name, number, kind, *default = definition.split()
            field = entry.field.add(name=name, number=int(number), default_value=default[0] if default else None)
            field.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in types:
                field.type = types[kind]
                field.options.packed = kind == "packed"
            else:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Net"))
