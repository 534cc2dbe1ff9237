"""Weights of torchvision and Caffe, against references in their own layout: channels first, blue before red."""

import collections
import io
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from numpy.lib.stride_tricks import sliding_window_view

from alexnet_jax import models, weights
from alexnet_jax.errors import AlexNetError
from alexnet_jax.weights import CAFFE, TORCHVISION, load_weights

CLASSES = 7


def draw(variant: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random weights in the others' layout, so large that normalization is strong: layer -> (weight, bias)."""
    rng = np.random.default_rng(0)
    found = {}
    for layer, count in models.count_layers(variant, CLASSES).items():
        kernel = count.kernel
        shape = (kernel[3], kernel[2], *kernel[:2]) if len(kernel) == 4 else kernel[::-1]
        scale = np.float32(0.05 if layer == "conv1" else 2 / np.sqrt(np.prod(shape[1:])))
        found[layer] = (scale * rng.standard_normal(shape, np.float32), rng.standard_normal(shape[0], np.float32))
    return found


@pytest.fixture(scope="module")
def torchvision():
    found = draw("torchvision")
    return {
        f"{TORCHVISION[layer]}.{kind}": a
        for layer, pair in found.items()
        for kind, a in zip(("weight", "bias"), pair, strict=True)
    }


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


def caffe_reference(layers, image):
    """Logits of one uint8 RGB image."""
    x = image[:, :, ::-1].transpose(2, 0, 1) - np.array([104.01, 116.67, 122.68])[:, None, None]
    x = pool(normalize(relu(convolve(x, *layers["conv1"], stride=4))))
    x = pool(normalize(relu(convolve(x, *layers["conv2"], pad=2, groups=2))))
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


def write_caffemodel(path, layers, old):
    net = weights._net_parameter()()
    for name, pair in layers.items():
        layer = (net.old_layers if old else net.layers).add(name=name)
        for array in pair:
            blob = layer.blobs.add()
            size, varint = array.nbytes, b""
            while size:
                varint, size = varint + bytes([size & 0x7F | (0x80 if size > 0x7F else 0)]), size >> 7
            blob.MergeFromString(b"\x2a" + varint + array.tobytes())  # field 5, packed: a list would take seconds
            if old:  # four axes, ones in front
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
    path.write_bytes(net.SerializeToString())


@pytest.mark.parametrize("form", ["npy", "caffemodel", "old caffemodel"])
def test_caffes_weights_compute_the_same(caffe, tmp_path, form):
    path = tmp_path / "bvlc_alexnet.npy"
    if form == "npy":
        write_npy(path, caffe)
    else:
        write_caffemodel(path, caffe, old=form == "old caffemodel")
    batch = images(227)
    got = load_weights(path)
    assert got.variant == "caffe"
    assert_close(got.logits(batch), np.stack([caffe_reference(caffe, image) for image in batch]))


class FloatStorage:
    """What PyTorch's pickles name."""


FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"


def _rebuild_tensor_v2(*_):
    raise NotImplementedError


_rebuild_tensor_v2.__module__ = "torch._utils"


class Tensor:
    def __init__(self, array, key):
        self.array, self.key = array, key

    def __reduce__(self):
        strides = tuple(s // 4 for s in self.array.strides)
        return _rebuild_tensor_v2, (Storage(self), 0, self.array.shape, strides, False, collections.OrderedDict())


class Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", FloatStorage, value.tensor.key, "cpu", value.tensor.array.size)
        return None


def write_pth(path, state, change=lambda pickled: pickled, compression=zipfile.ZIP_STORED):
    """PyTorch's zip format, made without PyTorch."""
    buffer = io.BytesIO()
    tensors = collections.OrderedDict((n, Tensor(a, str(i))) for i, (n, a) in enumerate(state.items()))
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage, torch._utils, utils._rebuild_tensor_v2 = FloatStorage, utils, _rebuild_tensor_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(buffer, 2).dump(tensors)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("alexnet/data.pkl", change(buffer.getvalue()))
        archive.writestr("alexnet/byteorder", "little")
        for tensor in tensors.values():
            archive.writestr(f"alexnet/data/{tensor.key}", tensor.array.tobytes())


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_torchvisions_weights_compute_the_same(torchvision, tmp_path, form):
    path = tmp_path / f"alexnet.{form}"
    if form == "pth":
        write_pth(path, torchvision)
    else:
        safetensors.numpy.save_file(torchvision, path)
    batch = images(224)
    loaded = load_weights(path)
    got = loaded.logits(batch)
    assert_close(got, np.stack([torchvision_reference(torchvision, image) for image in batch]))
    probabilities = loaded.predict(batch)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 224, 224, 3\], not float32"):
        loaded.predict(batch.astype(np.float32))


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
        ("features.3.bias", None, "features.3.bias is missing"),
        ("features.1.running_mean", np.zeros(64, np.float32), "features.1.running_mean does not belong"),
        ("features.0.weight", np.zeros((64, 1, 11, 11), np.float32), "conv1's kernel is [11, 11, 1, 64]"),
        ("features.0.bias", np.zeros(64, np.float16), "features.0.bias is float16, float32 is needed"),
        ("features.0.bias", np.full(64, np.inf, np.float32), "conv1's bias holds Inf or NaN"),
        ("features.0.bias", np.zeros(64, np.float32), "conv2's kernel is [1]"),
    ],
)
def test_what_does_not_fit_is_named(first_layer_alone, tmp_path, name, value, message):
    state = first_layer_alone | {name: value}
    safetensors.numpy.save_file({key: array for key, array in state.items() if array is not None}, tmp_path / "x")
    with pytest.raises(AlexNetError) as error:
        load_weights(tmp_path / "x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def call(module: str, name: str, *args) -> bytes:
    """A pickle that calls what it names."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(args, 2)[2:-1] + b"R."


HOSTILE = {
    "system": call("os", "system", "touch marker"),
    "posix": call("posix", "system", "touch marker"),
    "eval": call("builtins", "eval", "open('marker', 'w')"),
    "exec": call("builtins", "exec", "open('marker', 'w')"),
    "getattr": call("builtins", "getattr", "", "format"),
    "importlib": call("importlib", "import_module", "antigravity"),
    "import": call("builtins", "__import__", "antigravity"),
    "subprocess": call("subprocess", "Popen", "touch marker"),
    "runpy": call("runpy", "run_path", "marker"),
    "codecs": call("_codecs", "encode", "x", "rot13"),
    "nested": b"\x80\x02}" + b"X\x01\x00\x00\x00a" + call("os", "system", "touch marker")[2:-1] + b"s.",
    "torch load": call("torch", "load", "marker"),
    "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.__init__.__self__\x93.",
    "open": call("io", "open", "marker", "w"),
    "numpy load": call("numpy", "load", "marker"),
    "ctypes": call("ctypes", "CDLL", "marker"),
    "tensor without memory": call("torch._utils", "_rebuild_tensor_v2", None, 0, (1 << 40,), (1,)),
    "no end": b"\x80\x02}",
    "memo bomb": b"\x80\x02}r\x00\x00\x00\x10.",
    "many opcodes": b"\x80\x02" + b"}0" * 60_000 + b"}.",
    "shape of text": call("torch._utils", "_rebuild_tensor_v2", None, 0, ("a",), (1,)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["pth", "npy"])
def test_hostile_files_do_nothing(tmp_path, name, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE[name]
    path = tmp_path / f"x.{form}"
    if form == "pth":
        write_pth(path, {"a": np.zeros(2, np.float32)}, lambda _: hostile)
    else:
        np.save(path, {"a": 1}, allow_pickle=True)
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"\n") + 1] + hostile)
    deeds = []
    watched = ("import", "exec", "os.system", "subprocess.Popen", "ctypes.dlopen")

    def hook(event, args):
        if watching and (event in watched or (event == "open" and "marker" in str(args[0]))):
            deeds.append((event, args[:1]))

    watching = False
    sys.addaudithook(hook)
    with pytest.raises(AlexNetError):  # once before: what our own code imports is imported then
        load_weights(path)
    watching = True
    with pytest.raises(AlexNetError, match=r"no AlexNet of torchvision or Caffe"):
        load_weights(path)
    watching = False
    assert deeds == []
    assert not (tmp_path / "marker").exists()


def test_a_pickle_changes_none_of_our_functions(tmp_path):
    """BUILD sets attributes of whatever a pickle was given."""
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b."
    write_pth(tmp_path / "x", {"a": np.zeros(2, np.float32)}, lambda _: hostile)
    with pytest.raises(AlexNetError):
        load_weights(tmp_path / "x")
    assert weights._tensor.__defaults__ is None


def test_bombs_and_lies_in_a_zip(torchvision, tmp_path):
    small = {"a": np.zeros(1000, np.float32)}
    write_pth(tmp_path / "bomb.pth", small, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(AlexNetError, match="it is compressed"):
        load_weights(tmp_path / "bomb.pth")
    with zipfile.ZipFile(tmp_path / "empty.pth", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(AlexNetError, match=r"it holds no data\.pkl"):
        load_weights(tmp_path / "empty.pth")


@pytest.mark.parametrize("data", [b"", b"\x80\x02}.", b"\x93NUMPY", b"PK\x03\x04", b"\xff" * 100, b"\x00" * 8 + b"{}"])
def test_what_is_no_network_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(AlexNetError, match="no AlexNet of torchvision or Caffe") as error:
        load_weights(tmp_path / "x")
    assert "\n" not in str(error.value)
    with pytest.raises(AlexNetError, match="can't be read"):
        load_weights(tmp_path / "nothing")
