"""Weights of torchvision and Caffe, against references in their own layout: channels first, blue before red."""

import collections
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.lib.stride_tricks import sliding_window_view

from alexnet_jax.errors import AlexNetError
from alexnet_jax.exchange import caffe as caffe_module
from alexnet_jax.exchange import weights
from alexnet_jax.exchange.weights import CAFFE, TORCHVISION, load_weights
from tests import python_2
from tests.foreign_weights import CLASSES, draw, torchvision_state, write_pth


@pytest.fixture(scope="module")
def torchvision():
    return torchvision_state()


@pytest.fixture(scope="module")
def caffe():
    return {CAFFE[layer]: list(pair) for layer, pair in draw("caffe").items()}


def convolve(x, weight, bias, stride=1, pad=0, groups=1):
    """One image [C, H, W] in float64."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(x, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
    parts = zip(np.split(windows, groups), np.split(weight.astype(np.float64), groups), strict=True)
    return np.concatenate([np.einsum("chwrs,fcrs->fhw", w, k, optimize=True) for w, k in parts]) + bias[:, None, None]


def pool(x):
    return sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))


def normalize(x):
    square = np.pad(x**2, ((2, 2), (0, 0), (0, 0)))
    return x / (1 + 1e-4 / 5 * sum(square[i : i + len(x)] for i in range(5))) ** 0.75


def relu(x):
    return np.maximum(x, 0)


def dense(x, pairs):
    for weight, bias in pairs[:-1]:
        x = relu(weight @ x + bias)
    return pairs[-1][0] @ x + pairs[-1][1]


def caffe_reference(layers, image, variant="caffe", mean=(104.01, 116.67, 122.68)):
    """Logits of one uint8 RGB image."""
    after = {"caffe": lambda x: pool(normalize(relu(x))), "caffenet": lambda x: normalize(pool(relu(x)))}[variant]
    x = image[:, :, ::-1].transpose(2, 0, 1) - np.array(mean)[:, None, None]
    x = after(convolve(x, *layers["conv1"], stride=4))
    x = after(convolve(x, *layers["conv2"], pad=2, groups=2))
    x = relu(convolve(x, *layers["conv3"], pad=1))
    x = relu(convolve(x, *layers["conv4"], pad=1, groups=2))
    x = pool(relu(convolve(x, *layers["conv5"], pad=1, groups=2)))
    return dense(x.ravel(), [layers[name] for name in ("fc6", "fc7", "fc8")])


def torchvision_reference(state, image):
    pairs = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in TORCHVISION.values()]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((image / 255 - mean) / std).transpose(2, 0, 1)
    x = pool(relu(convolve(x, *pairs[0], stride=4, pad=2)))
    x = pool(relu(convolve(x, *pairs[1], pad=2)))
    for pair in pairs[2:5]:
        x = relu(convolve(x, *pair, pad=1))
    return dense(pool(x).ravel(), pairs[5:])


def images(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, size, size, 3)).astype(np.uint8)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def write_npy(path, layers):
    """As caffe-tensorflow: channels last, fc6 by rows, columns, channels."""
    found = {}
    for name, (weight, bias) in layers.items():
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif name == "fc6":
            weight = weight.reshape(-1, 256, 6, 6).transpose(2, 3, 1, 0).reshape(9216, -1)
        else:
            weight = weight.T
        found[name] = [np.ascontiguousarray(weight), bias]
    np.save(path, found, allow_pickle=True)


# Caffe's files, by the field numbers of caffe.proto: of LayerParameter, and of V1LayerParameter.
FIELDS = {
    "name": (1, 4), "type": (2, 5), "bottom": (3, 2), "top": (4, 3), "blobs": (7, 6), "include": (8, 32),
    "transform_param": (100, 36), "convolution_param": (106, 10), "data_param": (107, 11), "dropout_param": (108, 12),
    "inner_product_param": (117, 17), "lrn_param": (118, 18), "memory_data_param": (119, 22),
    "pooling_param": (121, 19), "relu_param": (123, 30), "input_param": (143, 0),
}  # fmt: skip
OLD_TYPES = {
    "Accuracy": 1, "Convolution": 4, "Data": 5, "Dropout": 6, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18,
    "Softmax": 20, "SoftmaxWithLoss": 21, "Split": 22, "TanH": 23, "Silence": 36,
}  # fmt: skip
KINDS = {"data": "Data", "conv": "Convolution", "relu": "ReLU", "pool": "Pooling", "norm": "LRN", "drop": "Dropout"}
KINDS |= {"fc": "InnerProduct", "loss": "SoftmaxWithLoss"}
FIRST = {
    "caffe": "data conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 ",
    "caffenet": "data conv1 relu1 pool1 norm1 conv2 relu2 pool2 norm2 ",
}
REST = "conv3 relu3 conv4 relu4 conv5 relu5 pool5 fc6 relu6 drop6 fc7 relu7 drop7 fc8 loss"
GAUSSIAN = {1: "gaussian", 6: 0.01}
# convolution_param: num_output 1, pad 3, kernel_size 4, group 5, stride 6, fillers 7 and 8.
PARAMETERS = {
    "conv1": {1: 96, 4: 11, 6: 4, 7: GAUSSIAN, 8: GAUSSIAN}, "conv2": {1: 256, 3: 2, 4: 5, 5: 2},
    "conv3": {1: 384, 3: 1, 4: 3}, "conv4": {1: 384, 3: 1, 4: 3, 5: 2}, "conv5": {1: 256, 3: 1, 4: 3, 5: 2},
    "fc6": {1: 4096}, "fc7": {1: 4096}, "fc8": {1: CLASSES}, "norm1": {1: 5, 2: 1e-4, 3: 0.75}, "norm2": {2: 1e-4},
    "pool1": {1: 0, 2: 3, 3: 2}, "pool2": {2: 3, 3: 2}, "pool5": {5: 3, 6: 3, 7: 2, 8: 2}, "drop6": {1: 0.5},
    "data": {2: 1, 3: 227},
}  # fmt: skip
PARAMETERS_OF = {
    "conv": "convolution_param", "fc": "inner_product_param", "norm": "lrn_param", "pool": "pooling_param",
    "drop": "dropout_param", "data": "transform_param",
}  # fmt: skip


def varint(number):
    number &= 2**64 - 1
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def message(fields):
    """Protobuf's encoding of {number: value}; a list is repeated, a dict a message."""
    parts = []
    for number, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                parts.append(varint(number << 3) + varint(value))
            elif isinstance(value, float):
                parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
            else:
                data = message(value) if isinstance(value, dict) else value
                data = data.encode() if isinstance(data, str) else data
                parts += [varint(number << 3 | 2) + varint(len(data)), data]
    return b"".join(parts)


def blob(array, old=False):
    number = 8 if array.dtype == np.float64 else 5
    if old:  # four axes, ones in front
        shape = (1,) * (4 - array.ndim) + array.shape
        return dict(zip((1, 2, 3, 4), shape, strict=True)) | {number: array.tobytes()}
    return {number: array.tobytes(), 7: {1: b"".join(map(varint, array.shape))}}


def caffe_net(variant="caffe", parameters=True):
    """The layers of a network for training, by name, as the zoo's train_val.prototxt has them."""
    layers, last = {}, "data"
    for name in (FIRST[variant] + REST).split():
        kind = name.rstrip("0123456789")
        top = last if kind in ("relu", "drop") else name
        layers[name] = {"name": name, "type": KINDS[kind], "bottom": [last], "top": [top]}
        if parameters and name in PARAMETERS:
            layers[name][PARAMETERS_OF[kind]] = dict(PARAMETERS[name])
        last = top
    layers["data"] |= {"bottom": [], "top": ["data", "label"], "include": {1: 0}}
    layers["loss"]["bottom"].append("label")
    return layers


def serialized(layers, old=False, net=None):
    found = []
    for layer in layers.values():
        fields = {FIELDS[name][old]: value for name, value in layer.items()}
        if old and "type" in layer:
            fields[5] = OLD_TYPES.get(layer["type"], layer["type"])
        found.append(fields)
    return message({1: "net"} | (net or {}) | {2 if old else 100: found})


def with_arrays(layers, arrays, old=False):
    for name, pair in arrays.items():
        layers[name]["blobs"] = [blob(array, old) for array in pair]
    return layers


@pytest.mark.parametrize(("form", "variant"), [("npy", "caffe"), ("caffemodel", "caffenet")])
def test_caffes_weights_compute_the_same(caffe, tmp_path, form, variant):
    path, batch = tmp_path / "bvlc.npy", images(227)
    if form == "npy":
        write_npy(path, caffe)
    else:
        path.write_bytes(serialized(with_arrays(caffe_net(variant), caffe)))
    got = load_weights(path)
    assert got.variant == variant
    assert_close(got.logits(batch), caffe_reference(caffe, batch[0], variant, (104.01, 116.67, 122.68))[None])


def test_caffes_older_format_gives_the_same(caffe, tmp_path):
    layers = with_arrays(caffe_net("caffe"), caffe, old=True)
    layers["data"]["transform_param"][5] = [104.0, 117.0, 123.0]
    (tmp_path / "old").write_bytes(serialized(layers, old=True))
    write_npy(tmp_path / "new.npy", caffe)
    old, new = load_weights(tmp_path / "old"), load_weights(tmp_path / "new.npy")
    assert old.variant == new.variant == "caffe"
    np.testing.assert_array_equal(old.mean, [123, 117, 104])
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)


def test_npy_files_of_python_2(tmp_path, monkeypatch):
    """As most files of caffe-tensorflow."""
    monkeypatch.setattr(weights, "checked", lambda found: found)
    rng = np.random.default_rng(0)
    layers = {name: [rng.standard_normal((2, 2, 3, 4)), rng.standard_normal(4, np.float32)] for name in CAFFE.values()}
    layers["fc7"][0] = np.asfortranarray(layers["fc7"][0].astype(np.float16))
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": (), "fortran_order": False, "descr": "|O"})
    (tmp_path / "x.npy").write_bytes(file.getvalue() + python_2.dumps(np.array(layers, object)))
    params = load_weights(tmp_path / "x.npy").params
    for layer, name in CAFFE.items():
        kernel = layers[name][0][:, :, ::-1] if name == "conv1" else layers[name][0]
        np.testing.assert_array_equal(params[layer]["kernel"], kernel.astype(np.float32))
        np.testing.assert_array_equal(params[layer]["bias"], layers[name][1])


SMALL = {name: [np.zeros((1, 1, 1, 1), np.float32), np.zeros(1, np.float32)] for name in CAFFE.values()}


def deploy(layers):
    """As a deploy.prototxt has it: another input, probabilities, nothing in place."""
    del layers["data"], layers["loss"]
    last = "data"
    for name, layer in layers.items():
        layer |= {"bottom": [last], "top": [name]}
        last = name
    prob = {"name": "prob", "type": "Softmax", "bottom": ["fc8"], "top": ["prob"]}
    return layers | {"prob": prob}


def test_net(layers):
    """As Caffe makes it of a network that is tested while it trains: copies, and an accuracy."""
    split = {"name": "fc8_split", "type": "Split", "bottom": ["fc8"], "top": ["fc8_0", "fc8_1"]}
    accuracy = {"name": "accuracy", "type": "Accuracy", "bottom": ["fc8_0", "label"], "top": ["accuracy"]}
    copy = {"name": "conv3_split", "type": "Split", "bottom": ["pool2"], "top": ["pool2_0"]}
    layers["conv3"]["bottom"] = ["pool2_0"]
    layers["loss"]["bottom"] = ["fc8_1", "label"]
    found = {}
    for name, layer in layers.items():
        found |= {"copy": copy} if name == "conv3" else {}
        found |= {"split": split, "accuracy": accuracy} if name == "loss" else {}
        found[name] = layer
    silence = {"name": "silence", "type": "Silence", "bottom": ["accuracy"]}
    return found | {"silence": silence}


test_net.__test__ = False


def unwired(layers):
    """Order and types alone."""
    return {name: {"name": layer["name"], "type": layer["type"]} for name, layer in layers.items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("change", [lambda layers: layers, deploy, unwired, test_net])
def test_the_order_of_layers_tells_caffes_networks_apart(change, old):
    for variant in ("caffe", "caffenet"):
        layers = caffe_net(variant)
        if change is test_net and variant == "caffenet":
            layers["norm2"]["top"] = ["pool2"]  # in the place of what goes into the copy
            layers["pool2"]["top"] = layers["norm2"]["bottom"] = ["pooled"]
        data = serialized(with_arrays(change(layers), SMALL, old), old, {8: {1: [10, 3, 227, 227]}})
        assert caffe_module.read(data).variant == variant


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(AlexNetError) as error:
        load_weights(path)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("conv1", "convolution_param", {6: 2}, "conv1 (Convolution): stride is 2, 4 is needed"),
        ("conv1", "convolution_param", {6: [4, 2]}, "conv1 (Convolution): stride is 2 and 4, 4 is needed"),
        ("conv1", "convolution_param", {6: [], 13: 4}, "stride is 0 and 4, 4 is needed"),
        ("conv1", "convolution_param", {6: []}, "conv1 (Convolution): stride is 1, 4 is needed"),
        ("conv1", "convolution_param", {3: 2}, "conv1 (Convolution): pad is 2, 0 is needed"),
        ("conv1", "convolution_param", {2: 0}, "bias_term is false, true is needed"),
        ("conv1", "convolution_param", {16: 2}, "axis is 2, 1 is needed"),
        ("conv2", "convolution_param", {5: []}, "conv2 (Convolution): group is 1, 2 is needed"),
        ("conv2", "convolution_param", {18: 2}, "dilation is 2, 1 is needed"),
        ("conv2", "convolution_param", {3: [], 9: 2}, "pad is 0 and 2, 2 is needed"),
        ("conv3", "convolution_param", {5: 2, 6: 2}, "stride is 2, 1 is needed; group is 2, 1 is needed"),
        ("conv5", "convolution_param", {19: 2}, "field 19 of its convolution_param is unknown"),
        ("pool1", "pooling_param", {1: 1}, "pool1 (Pooling): pool is AVE, MAX is needed"),
        ("pool2", "pooling_param", {2: 2}, "pool2 (Pooling): kernel_size is 2, 3 is needed"),
        ("pool5", "pooling_param", {8: 3}, "stride is 2 and 3, 2 is needed"),
        ("pool5", "pooling_param", {12: 1}, "global_pooling is true, false is needed"),
        ("norm1", "lrn_param", {1: 3}, "norm1 (LRN): local_size is 3, 5 is needed"),
        ("norm1", "lrn_param", {2: 5e-4}, "alpha is 0.0005, 0.0001 is needed"),
        ("norm1", "lrn_param", {2: []}, "alpha is 1, 0.0001 is needed"),
        ("norm2", "lrn_param", {3: 0.5}, "beta is 0.5, 0.75 is needed"),
        ("norm2", "lrn_param", {4: 1}, "norm_region is WITHIN_CHANNEL, ACROSS_CHANNELS is needed"),
        ("norm2", "lrn_param", {5: 2.0}, "k is 2, 1 is needed"),
        ("norm2", "lrn_param", None, "norm2 (LRN) has no lrn_param, unlike other layers"),
        ("conv3", "convolution_param", None, "conv3 (Convolution) has no convolution_param, unlike other layers"),
        ("relu3", "relu_param", {1: 0.1}, "relu3 (ReLU): negative_slope is 0.1, 0 is needed"),
        ("fc7", "inner_product_param", {6: 1}, "fc7 (InnerProduct): transpose is true, false is needed"),
        ("fc6", "inner_product_param", {1: 2048}, "num_output is 2048, 4096 is needed"),
        ("drop6", "dropout_param", {2: 0}, "drop6 (Dropout): scale_train is false, true is needed"),
        ("data", "transform_param", {1: 1 / 256}, "data: scale is 0.00390625, 1 is needed"),
        ("data", "data_param", {2: 2.0}, "data: scale is 2, 1 is needed"),
        ("data", "transform_param", {3: 224}, "data: crop_size is 224, 227 is needed"),
        ("data", "transform_param", {7: 1}, "force_gray"),
        ("data", "memory_data_param", {3: 224, 4: 224}, "data: images are 224x224, 227x227 is needed"),
        ("norm1", "blobs", [blob(np.zeros(1, np.float32))], "norm1 (LRN) contains an array, which would not be used"),
        ("conv1", "blobs", [blob(np.zeros(1, np.float32))] * 3, "conv1 contains 3 arrays; a kernel and a bias"),
        ("conv1", "blobs", [{5: b"1234", 7: {1: varint(-1) + varint(-2)}}] * 2, "conv1: an array of shape [-1, -2]"),
        ("conv1", "type", "Deconvolution", "Convolution is needed there"),
        ("relu2", "type", "TanH", "after conv2 comes relu2 (TanH); ReLU is needed there"),
        ("relu5", "include", {1: 0}, "relu5 (ReLU) is used in some phases only"),
        ("pool1", "bottom", ["conv1"], "pool1 (Pooling) takes conv1 as input, not the output of norm1"),
        ("conv4", "bottom", ["conv3", "label"], "conv4 (Convolution) has 2 inputs and 1 outputs"),
        (
            "conv1",
            "bottom",
            ["elsewhere"],
            "conv1 (Convolution) takes elsewhere as input, not the output of the data layer",
        ),
        ("fc6", "type", None, "fc6 has no type: without types this can't be recognized as a network"),
    ],
)
def test_a_caffemodel_that_computes_something_else_is_refused(tmp_path, old, name, field, value, expected):
    layers = with_arrays(caffe_net(), SMALL, old)
    if value is None:
        layers[name].pop(field)
    elif isinstance(value, dict):
        layers[name][field] = layers[name].get(field, {}) | value
    else:
        layers[name][field] = value
    if old and value == "Deconvolution":
        layers[name]["type"] = 39
    assert expected in refused(tmp_path / "x", serialized(layers, old))


def inserted(layers, before, name, kind):
    """The same with a layer in place before another."""
    found = {}
    for key, layer in layers.items():
        if key == before:
            found[name] = {"name": name, "type": kind, "bottom": layer["bottom"][:1], "top": layer["bottom"][:1]}
        found[key] = layer
    return found


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda n: inserted(n, "relu1", "bn1", "BatchNorm"), "after conv1 comes bn1 (BatchNorm); ReLU is needed"),
        (lambda n: inserted(n, "conv1", "scaled", "Power"), "first comes scaled (Power); Convolution is needed"),
        (lambda n: inserted(n, "fc7", "early", "Softmax"), "fc7 (InnerProduct) comes after early"),
        (lambda n: inserted(n, "loss", "sigmoid", "Sigmoid"), "after fc8 comes sigmoid (Sigmoid); the output"),
        (lambda n: {k: n[k] for k in n if not k.startswith("norm")}, "takes norm1 as input, not the output of relu1"),
        (lambda n: unwired({k: n[k] for k in n if k[:4] != "norm"}), "after pool1 comes conv2 (Convolution); LRN"),
        (lambda n: unwired({k: n[k] for k in n if k != "norm2"}), "after relu2 comes pool2 (Pooling); LRN is needed"),
        (lambda n: {k: n[k] for k in n if k not in ("fc8", "loss")}, "after relu7 comes the end; InnerProduct"),
        (lambda n: {k: n[k] for k in n if k in CAFFE.values()}, "takes pool1 as input, not the output of conv1"),
        (lambda n: {}, "it contains no layers"),
    ],
)
def test_caffes_other_networks_are_refused(tmp_path, make, expected):
    assert expected in refused(tmp_path / "x", serialized(make(caffe_net())))


def test_what_caffes_format_may_hold_besides(tmp_path):
    path, layers = tmp_path / "x", caffe_net()
    both = serialized(layers) + serialized(layers, old=True)
    assert "twice" in refused(path, both)
    oldest = message({2: [{1: {1: "conv1", 2: "conv"}, 2: "data", 3: "conv1"}]})
    assert "format from before 2014: convert it with Caffe's upgrade_net_proto_binary" in refused(path, oldest)
    assert "it contains 20,000 layers" in refused(path, message({100: [{1: "x", 2: "Split"}] * 20_000}))
    for net in ({4: [10, 3, 224, 224]}, {8: {1: [10, 3, 224, 224]}}):
        assert "its input: images are 224x224, 227x227 is needed" in refused(path, serialized(layers, net=net))
    layers["data"] |= {"type": "Input", "input_param": {1: [{1: [1, 3, 256, 256]}, {1: [1, 1, 1, 1]}]}}
    assert "data: images are 256x256" in refused(path, serialized(layers))
    doubles = {name: [array.astype(np.float64) + 1e39 for array in pair] for name, pair in SMALL.items()}
    assert "conv1's kernel has a value beyond the range of float32" in refused(
        path, serialized(with_arrays(caffe_net(), doubles))
    )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("field", "number", "file", "warns"),
    [
        ("transform_param", 4, "data/places205_mean.binaryproto", True),
        ("data_param", 3, "C:\\ilsvrc\\places_mean.binaryproto", True),
        ("transform_param", 4, "data/ilsvrc12/imagenet_mean.binaryproto", False),
        ("data_param", 3, "ILSVRC_2012_mean.binaryproto", False),
    ],
)
def test_a_mean_that_a_caffemodel_does_not_hold_is_named(
    tmp_path, monkeypatch, capsys, old, field, number, file, warns
):
    monkeypatch.setattr(weights, "checked", lambda found: found)
    layers = with_arrays(caffe_net(), SMALL, old)
    layers["data"].setdefault(field, {})[number] = file
    (tmp_path / "x").write_bytes(serialized(layers, old))
    np.testing.assert_array_equal(load_weights(tmp_path / "x").mean, [122.68, 116.67, 104.01])
    expected = f"warning: Caffe takes the mean from {file}, which is not in the .caffemodel"
    printed = capsys.readouterr().err
    assert (printed.count("\n"), expected in printed, "replace(weights, mean=" in printed) == (warns, warns, warns)
    layers["data"]["transform_param"][5] = [1.0, 2.0, 3.0]  # is in the file
    (tmp_path / "x").write_bytes(serialized(layers, old))
    np.testing.assert_array_equal(load_weights(tmp_path / "x").mean, [3, 2, 1])
    assert capsys.readouterr().err == ""


def write_safetensors(path, state):
    """With any dtype, of which safetensors.numpy knows some."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}
    header, data = {}, b""
    for name, array in state.items():
        ends = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": ends}
        data += array.tobytes()
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    path.write_bytes(struct.pack("<Q", len(start)) + start + data)


@pytest.mark.both_lines
def test_torchvisions_weights_compute_the_same(torchvision, tmp_path):
    path = tmp_path / "alexnet.safetensors"
    safetensors.numpy.save_file(torchvision, path)
    write_pth(tmp_path / "alexnet.pth", torchvision)
    batch = images(224)
    loaded = load_weights(path)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "alexnet.pth").params, loaded.params)
    got = loaded.logits(batch)
    assert_close(got, np.stack([torchvision_reference(torchvision, image) for image in batch]))
    probabilities = loaded.predict(batch)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert_close(loaded.logits(jnp.asarray(batch / 255, jnp.float32)), got)
    np.testing.assert_array_equal(loaded.features(batch, "logits"), got)
    with pytest.raises(KeyError, match="there is no 'fc8': the layers and operations are conv1, "):
        loaded.features(batch, "fc8")
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        loaded.predict(batch.astype(np.float32))
    with pytest.raises(ValueError, match=r"images must be \[N, 224, 224, 3\]"):
        loaded.predict(batch[:, :100])


@pytest.fixture
def small_state(monkeypatch):
    """A state dict whose arrays are small; the check of their shapes, which comes last, is left out."""
    monkeypatch.setattr(weights, "checked", lambda found: found)
    rng = np.random.default_rng(0)
    shapes = {"weight": (3, 2, 2, 2), "bias": (3,)}
    return {
        name: rng.integers(-8, 8, (3, 2) if name in DENSE else shapes[name.rsplit(".")[-1]]).astype(np.float32)
        for name in weights.TORCHVISION_ARRAYS
    }


DENSE = {"classifier.1.weight", "classifier.4.weight", "classifier.6.weight"}


def renamed(state, change):
    return {change(name): array for name, array in state.items()}


def in_one_memory(state):
    """Views of one array, one after the other, the kernels by columns."""
    memory, at, found = np.zeros(sum(a.size for a in state.values()) + 5, np.float32), 5, {}
    for name, array in state.items():
        order = np.argsort([-i for i in range(array.ndim)])
        view = memory[at : at + array.size].reshape(array.shape[::-1]).transpose(order)
        view[...] = array
        found[name], at = view, at + array.size
    return found


def ordered(state):
    """As PyTorch's, with an attribute."""
    found = collections.OrderedDict(state)
    found._metadata = collections.OrderedDict({"": {"version": 1}})
    return found


PTH = {
    "plain": lambda s: s,
    "ordered": ordered,
    "pytorch/examples": lambda s: {
        "epoch": 90,
        "arch": "alexnet",
        "state_dict": renamed(s, lambda name: name.replace("features.", "features.module.")),
        "best_acc1": np.ones(1, np.float32),
        "optimizer": {"state": {0: {"momentum_buffer": np.ones(7, np.float32)}}, "param_groups": [{"lr": 0.1}]},
        "rng": np.arange(5),
    },
    "DataParallel": lambda s: {"state_dict": renamed(s, lambda name: f"module.{name}")},
    "torch.compile": lambda s: {"model": renamed(s, lambda name: f"_orig_mod.{name}")},
    "both": lambda s: {"model_state_dict": renamed(s, lambda name: f"module._orig_mod.{name}")},
    "any name": lambda s: {"net": s, "loss": 0.5},
    "deep": lambda s: {"checkpoint": [{"model": s, "optimizer": {"state": {0: {"exp_avg": np.ones(7, np.float32)}}}}]},
    "deep, twice the same": lambda s: {
        "model": s,
        "ema": {"module": {name: array.copy() for name, array in s.items()}},
    },
    "Lightning": lambda s: {
        "state_dict": renamed(s, lambda name: f"model.{name}"),
        "optimizer_states": [{"state": {0: {"momentum_buffer": np.ones(7, np.float32)}}}],
    },
    "prefixes": lambda s: renamed(s, lambda name: f"module.alexnet.backbone.{name}"),
    "twice the same": lambda s: {"model": s, "state_dict": {name: array.copy() for name, array in s.items()}},
    "half": lambda s: {name: array.astype(np.float16) for name, array in s.items()},
    "double": lambda s: {name: array.astype(np.float64) for name, array in s.items()},
    "bfloat16": lambda s: {name: array.astype(jnp.bfloat16) for name, array in s.items()},
    "strides": lambda s: {name: np.asfortranarray(array) for name, array in s.items()},
    "one memory": in_one_memory,
}


@pytest.mark.parametrize("form", PTH)
def test_state_dicts_as_they_are_found(small_state, tmp_path, form):
    write_pth(tmp_path / "x.pth", PTH[form](small_state))
    params = load_weights(tmp_path / "x.pth").params
    for layer, name in TORCHVISION.items():
        kernel = small_state[f"{name}.weight"]
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        np.testing.assert_array_equal(params[layer]["kernel"], kernel)
        np.testing.assert_array_equal(params[layer]["bias"], small_state[f"{name}.bias"])
        assert params[layer]["kernel"].dtype == params[layer]["bias"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_safetensors_of_any_width(small_state, tmp_path, dtype):
    state = {f"module.{name}": array.astype(dtype) for name, array in small_state.items()}
    write_safetensors(tmp_path / "x", state)
    params = load_weights(tmp_path / "x").params
    np.testing.assert_array_equal(params["fc2"]["kernel"], small_state["classifier.4.weight"].T)
    assert params["fc2"]["kernel"].dtype == np.float32


def holds_itself():
    found = {}
    found["again"] = found
    return found


def other_bias(state):
    return state | {"features.0.bias": state["features.0.bias"] + 1}


def batch_normalized(state):
    """torchvision's with batch normalization, as many train it: the numbers of the layers shift."""
    moved = renamed(state, lambda name: name.replace("features.3", "features.4"))
    more = {f"features.1.{name}": np.zeros(3, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
    return moved | more | {"features.1.num_batches_tracked": np.array(7)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: renamed(s, lambda name: name.replace("features", "model.features")),
            "features.0.weight is missing; it has model.features.0.bias, model.features.0.weight, "
            "model.features.10.bias, ... (16 arrays)",
        ),
        (
            lambda s: renamed(s, lambda name: f"model.{name}") | renamed(s, lambda name: f"ema.{name}"),
            "features.0.weight is missing; it has ema.classifier.1.bias, ",
        ),
        (lambda s: s | renamed(s, lambda name: f"ema.{name}"), "it has ema.classifier.1.bias, "),
        (
            lambda s: renamed(s, lambda name: f"net.{name}") | {"head.weight": s["features.0.bias"]},
            "it has head.weight, which would not be used",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "features.3.bias"}, "features.3.bias is missing; it has "),
        (lambda s: {"epoch": 3}, "features.0.weight is missing; it has no arrays"),
        (lambda s: [s], "no dict of tensors"),
        (batch_normalized, "it has features.1.num_batches_tracked, features.1.running_mean, features.1.running_var"),
        (lambda s: s | {"fc.weight": s["features.0.bias"]}, "it has fc.weight, which would not be used"),
        (
            lambda s: {"model": s, "state_dict": other_bias(s)},
            "model and state_dict both contain weights, and features.0.bias differs",
        ),
        (
            lambda s: s | {"ema": other_bias(s)},
            "the file itself and ema both contain weights, and features.0.bias differs",
        ),
        *(
            (
                lambda s, beside=beside: {"model": s} | beside(other_bias(s)),
                f"model and {where} both contain weights, and",
            )
            for beside, where in (
                (lambda s: {"ema": {"module": s, "decay": 0.999}}, "ema.module"),
                (lambda s: {"ema": {"shadow": renamed(s, lambda name: f"model.{name}")}}, "ema.shadow"),
                (lambda s: {"ensemble": [s]}, "ensemble.0"),
                (lambda s: {"a": ({"b": [{"c": s}]},)}, "a.0.b.0.c"),
            )
        ),
        (
            lambda s: {"checkpoint": {"model": s, "head": {"fc": np.ones(2, np.float32)}}},
            "beside checkpoint.model it has fc, which would not be used",
        ),
        (lambda s: {"model": s, "more": holds_itself()}, "dicts and lists: save only model.state_dict()"),
        (lambda s: {"model": s, "more": [{} for _ in range(1000)]}, "dicts and lists: save only model.state_dict()"),
        (lambda s: {"model": s, "head": {"fc": np.ones(2, np.float32)}}, "beside model it has fc, which would not"),
        (lambda s: {"model": s, "mean": np.ones(3, np.float32)}, "beside model it has mean, which would not be used"),
        (
            lambda s: s | {"module.features.0.bias": s["features.0.bias"]},
            "features.0.bias and module.features.0.bias name the same array",
        ),
        (
            lambda s: s | {"features.0.bias": np.full(3, 1e39)},
            "features.0.bias has a value beyond the range of float32",
        ),
        (lambda s: s | {"features.0.bias": np.arange(3)}, "features.0.bias is int64, floats are needed"),
    ],
)
def test_state_dicts_of_something_else_are_refused(small_state, tmp_path, change, expected):
    write_pth(tmp_path / "x.pth", change(small_state))
    assert expected in refused(tmp_path / "x.pth", (tmp_path / "x.pth").read_bytes())


def test_a_pickle_of_other_objects_says_what_to_save(small_state, tmp_path):
    path = tmp_path / "x"
    write_pth(path, small_state, lambda _: call("argparse", "Namespace"))
    expected = "it asks for argparse.Namespace: save only model.state_dict())"
    assert refused(path, path.read_bytes()).endswith(expected)


def test_a_tensor_that_is_negated_when_read_is_refused(small_state, tmp_path):
    write_pth(tmp_path / "x", small_state, metadata=({"neg": True},))
    assert "a tensor with metadata" in refused(tmp_path / "x", (tmp_path / "x").read_bytes())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html>\n<html><head>", "it is an HTML page"),
        (b"<html>{}", "it is an HTML page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 244408911\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(8), "an HDF5 file"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "PyTorch's format from before 2020"),
    ],
)
def test_other_files_are_named(tmp_path, data, expected):
    assert expected in refused(tmp_path / "x", data)


PEER = """
import sys, numpy as np, torch
from torch import nn
features = nn.Sequential(
    nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
    nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
    nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2))
classifier = nn.Sequential(
    nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 7))
network = nn.ModuleDict({"features": features, "classifier": classifier}).eval()
torch.save(network.state_dict(), sys.argv[1])
images = torch.from_numpy(np.load(sys.argv[2]).transpose(0, 3, 1, 2) / 255).float()
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
with torch.no_grad():
    np.save(sys.argv[3], classifier(features((images - mean) / std).flatten(1)).numpy())
"""


def test_pytorch_computes_the_same_from_its_own_file(tmp_path):
    pytest.importorskip("torch")
    np.save(tmp_path / "images.npy", images(224))
    paths = [str(tmp_path / name) for name in ("alexnet.pth", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", PEER, *paths], check=True)
    assert_close(load_weights(paths[0]).logits(images(224)), np.load(paths[2]))


@pytest.fixture
def first_layer_alone(torchvision):
    """The others hold one number each: what is wrong with conv1 is said first."""
    small = {name: np.zeros(1, np.float32) for name in torchvision}
    return small | {name: torchvision[name] for name in ("features.0.weight", "features.0.bias")}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features.0.weight", np.zeros((64, 1, 11, 11), np.float32), "conv1's kernel is [11, 11, 1, 64]"),
        ("features.0.bias", np.full(64, np.inf, np.float32), "conv1's bias contains Inf or NaN"),
        ("features.0.bias", np.zeros(64, np.float32), "conv2's kernel is [1]"),
    ],
)
def test_what_does_not_fit_is_named(first_layer_alone, tmp_path, name, value, message):
    state = first_layer_alone | {name: value}
    safetensors.numpy.save_file(state, tmp_path / "x")
    assert message in refused(tmp_path / "x", (tmp_path / "x").read_bytes())


def call(module: str, name: str, *args) -> bytes:
    """A pickle that calls what it names."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(args, 2)[2:-1] + b"R."


def test_a_pickle_changes_none_of_our_functions(tmp_path):
    """BUILD sets attributes of whatever a pickle was given."""
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b."
    write_pth(tmp_path / "x", {"a": np.zeros(2, np.float32)}, lambda _: hostile)
    assert "it sets the state of an object that has none" in refused(tmp_path / "x", (tmp_path / "x").read_bytes())


def test_bombs_and_lies_in_a_zip(tmp_path):
    path = tmp_path / "x"
    write_pth(path, {"a": np.zeros(1000, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refused(path, path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    assert "it contains no data.pkl" in refused(path, path.read_bytes())


@pytest.mark.parametrize("data", [b"", b"\x80\x02}.", b"\x93NUMPY", b"PK\x03\x04", b"\xff" * 100, b"\x00" * 8 + b"{}"])
def test_what_is_no_network_is_refused(tmp_path, data):
    assert "not an AlexNet of torchvision or Caffe" in refused(tmp_path / "x", data)
    with pytest.raises(AlexNetError, match="can't be read"):
        load_weights(tmp_path / "nothing")
