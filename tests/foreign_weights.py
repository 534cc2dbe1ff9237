"""Random weights in the layouts of torchvision and Caffe, and PyTorch's files written without PyTorch."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from alexnet_jax.exchange.weights import TORCHVISION
from alexnet_jax.network import layer_counts

CLASSES = 7


def draw(variant: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random weights in the others' layout, so large that normalization is strong: layer -> (weight, bias)."""
    rng = np.random.default_rng(0)
    found = {}
    for layer, count in layer_counts.count_layers(variant, CLASSES).items():
        kernel = count.kernel
        shape = (kernel[3], kernel[2], *kernel[:2]) if len(kernel) == 4 else kernel[::-1]
        scale = np.float32(0.05 if layer == "conv1" else 2 / np.sqrt(np.prod(shape[1:])))
        found[layer] = (scale * rng.standard_normal(shape, np.float32), rng.standard_normal(shape[0], np.float32))
    return found


def torchvision_state() -> dict[str, np.ndarray]:
    """A state dict of torchvision's AlexNet."""
    return {
        f"{TORCHVISION[layer]}.{kind}": array
        for layer, pair in draw("torchvision").items()
        for kind, array in zip(("weight", "bias"), pair, strict=True)
    }


STORAGES = {
    name: type(name, (), {"__module__": "torch"})
    for name in ("FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage")
}
DTYPES = dict(zip(("float32", "float64", "float16", "bfloat16", "int64"), STORAGES.values(), strict=True))


def _rebuild_tensor_v2(*_):
    raise NotImplementedError


_rebuild_tensor_v2.__module__ = "torch._utils"


class Storage:
    def __init__(self, array):
        self.array = array


class Pickler(pickle.Pickler):
    """Pickles arrays as PyTorch does tensors: as views of the array that owns the memory."""

    def __init__(self, file, metadata=()):
        super().__init__(file, 2)
        self.owners, self.metadata = [], metadata

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        owner = value
        while owner.base is not None:
            owner = owner.base
        offset = (value.ctypes.data - owner.ctypes.data) // value.itemsize
        strides = tuple(step // value.itemsize for step in value.strides)
        arguments = Storage(owner), offset, value.shape, strides, False, collections.OrderedDict(), *self.metadata
        return _rebuild_tensor_v2, arguments

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        keys = [key for key, owner in enumerate(self.owners) if owner is value.array]
        if not keys:
            keys = [len(self.owners)]
            self.owners.append(value.array)
        return ("storage", DTYPES[value.array.dtype.name], str(keys[0]), "cpu", value.array.size)


def write_pth(path, state, change=lambda pickled: pickled, compression=zipfile.ZIP_STORED, metadata=()):
    """PyTorch's zip format, made without PyTorch."""
    buffer = io.BytesIO()
    pickler = Pickler(buffer, metadata)
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    vars(torch).update(STORAGES, _utils=utils)
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        pickler.dump(state)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("alexnet/data.pkl", change(buffer.getvalue()))
        archive.writestr("alexnet/byteorder", "little")
        for key, owner in enumerate(pickler.owners):
            archive.writestr(f"alexnet/data/{key}", owner.tobytes("A"))
