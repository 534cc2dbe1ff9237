"""State dicts of PyTorch: the files that contain them (.pth, .safetensors), and the search for one in a checkpoint."""

import dataclasses
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_jax.data import pickles
from alexnet_jax.errors import shown

MAX_BYTES = 1024**3  # of a file, and of a tensor; the published files have 244 MB
MAX_ENTRIES = 100_000  # in all dicts and lists of a checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class StateDict:
    """The arrays of one dict.

    Attributes:
      arrays: NumPy arrays or `Tensor`s, by their names without the components that wrappers add.
      names: the names in the file, by the names in `arrays`.
    """

    arrays: Mapping[str, Any]
    names: Mapping[str, str]


def find(loaded: Any, needed: Sequence[str]) -> StateDict:
    """The state dict, at any depth in the dicts and lists of a checkpoint, that contains the `needed` arrays.

    If none contains any of them, returns the one with the most arrays, for the caller to refuse.

    Raises:
      ValueError: two contain `needed` arrays that differ, or there are arrays that would not be used.
    """
    if not isinstance(loaded, dict):
        raise ValueError("no dict of tensors")
    found = [(where, depth, _without_wrappers(each, needed)) for where, depth, each in _dicts(loaded)]
    networks = [entry for entry in found if not entry[2].arrays.keys().isdisjoint(needed)]
    if not networks:
        return max((state for *_, state in found), key=lambda state: len(state.arrays))
    where, depth, network = networks[0]
    for other, _, state in networks[1:]:
        if name := _first_difference(network, state, needed):
            raise ValueError(f"{where} and {other} both contain weights, and {name} differs: save only one of them")
    for entry in found:
        _, other_depth, state = entry
        if entry in networks or other_depth > max(depth, 1):  # those deeper down are an optimizer's
            continue
        if unused := [state.names[name] for name, array in state.arrays.items() if _is_weight(array)]:
            raise ValueError(f"beside {where} it has {listed(unused)}, which would not be used")
    return network


def _dicts(loaded: dict[Any, Any]) -> list[tuple[str, int, dict[Any, Any]]]:
    """(path, depth, dict) of each dict in dicts, lists and tuples, the outer ones first.

    Raises:
      ValueError: there are more than a checkpoint has, or one contains itself.
    """
    found: list[tuple[str, int, Any]] = [("the file itself", 0, loaded)]
    entries = 0
    for where, depth, each in found:  # which grows
        for key, value in each.items() if isinstance(each, dict) else enumerate(each):
            if isinstance(value, dict) or type(value) in (list, tuple):
                name = shown(key, 60)
                found.append((shown(f"{where}.{name}", 60) if depth else name, depth + 1, value))
        entries += len(each)
        if len(found) > 1000 or entries > MAX_ENTRIES:
            raise ValueError(f"it contains {len(found):,} dicts and lists: save only model.state_dict()")
    return [entry for entry in found if isinstance(entry[2], dict)]


def _without_wrappers(state: Mapping[Any, Any], needed: Sequence[str]) -> StateDict:
    """Removes what DataParallel and torch.compile add to names, and a prefix that all `needed` names share.

    Lightning, for example, adds the prefix `model.`.
    """
    arrays: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, Tensor | np.ndarray):
            name = ".".join(part for part in str(key).split(".") if part not in ("module", "_orig_mod"))
            if name in arrays:
                raise ValueError(f"{names[name]} and {key} name the same array")
            arrays[name], names[name] = value, str(key)
    prefixes = [name.removesuffix(needed[0]) for name in arrays if name.endswith(f".{needed[0]}")]
    short = {prefix + name: name for prefix in prefixes for name in needed}
    if len(prefixes) == 1 and short.keys() <= arrays.keys() and arrays.keys().isdisjoint(needed):
        arrays = {short.get(name, name): array for name, array in arrays.items()}
        names = {short.get(name, name): key for name, key in names.items()}
    return StateDict(arrays, names)


def _first_difference(a: StateDict, b: StateDict, needed: Sequence[str]) -> str | None:
    for name in needed:
        one, other = a.arrays.get(name), b.arrays.get(name)
        if one is not other and (
            one is None or other is None or not np.array_equal(to_float32(name, one), to_float32(name, other))
        ):
            return name
    return None


def _is_weight(array: Any) -> bool:
    """Whether an array can be a network's: not one number (the best accuracy), not integers (a generator's state)."""
    dtype, shape = (array.storage.dtype, array.size) if isinstance(array, Tensor) else (array.dtype, array.shape)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and math.prod(shape) > 1


def listed(names: Iterable[object]) -> str:
    """The first three of the names, and how many there are."""
    shorts = [shown(str(name), 60) for name in names]
    if len(shorts) < 2:
        return shorts[0] if shorts else "no arrays"
    return f"{', '.join(shorts[:3])}{', ...' if len(shorts) > 3 else ''} ({len(shorts)} arrays)"


def to_float32(name: str, array: Any) -> np.ndarray:
    """A NumPy array or `Tensor` of floats of any width as float32.

    Raises:
      ValueError: it is something else, damaged, or has a value beyond the range of float32.
    """
    values = array.values() if isinstance(array, Tensor) else array
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


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file."""
    import safetensors

    found = {}
    for name, tensor in safetensors.deserialize(data):
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {tensor['dtype']}, floats are needed")
        dtype = np.dtype(_DTYPES[tensor["dtype"]]).newbyteorder("<")
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found


def read_pth(data: bytes) -> Any:
    """The object in a file of torch.save (since PyTorch 1.6: a zip file), with a `Tensor` for each tensor.

    Raises:
      ValueError: it is not such a file, or its pickle contains unknown classes.
      Exception: it is damaged.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = {member.filename: member for member in archive.infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise ValueError("it is compressed; PyTorch's files are not")
    if sum(member.file_size for member in members.values()) > len(data):
        raise ValueError("its members are larger than the file")
    pickled = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickled) != 1:
        raise ValueError("it contains no data.pkl")
    folder = pickled[0].removesuffix("data.pkl")
    if members.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")

    @functools.cache
    def read(key: str) -> np.ndarray:
        return np.frombuffer(archive.read(f"{folder}data/{key}"), np.uint8)

    def storage(reference: Any) -> _Storage:
        kind, name, key, _, count = reference
        if kind != "storage" or not isinstance(name, str) or name not in _STORAGES:
            raise pickle.UnpicklingError("a tensor of an unknown kind")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**40:
            raise pickle.UnpicklingError("a tensor whose memory has no name or size")
        return _Storage(np.dtype(_STORAGES[name]), count, key, read)

    try:
        return pickles.loads(archive.read(pickled[0]), _NAMES, storage)
    except pickles.UnknownNameError as error:
        raise ValueError(f"{error}: save only model.state_dict()") from error


class _Storage(NamedTuple):
    """The memory of tensors, read from the zip file on demand."""

    dtype: np.dtype
    length: int
    key: str
    read: Callable[[str], np.ndarray]


class Tensor(NamedTuple):
    """A strided view of a storage, which tensors can share; `_tensor` has checked that it stays inside."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def values(self) -> np.ndarray:
        """Read-only.

        Raises:
          ValueError: the file's storage has another size than its pickle says.
        """
        raw, dtype = self.storage.read(self.storage.key), self.storage.dtype
        if raw.size != self.storage.length * dtype.itemsize:
            raise ValueError(f"data/{self.storage.key} has {raw.size:,} bytes, not {self.storage.length:,} {dtype}")
        strides = [step * dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(raw.view(dtype)[self.offset :], self.size, strides, writeable=False)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without memory")
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise pickle.UnpicklingError("a tensor with an invalid shape")
    if not all(type(number) is int and 0 <= number < 2**40 for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape or strides are not numbers from 0")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if offset > storage.length or (count and last >= storage.length):
        raise pickle.UnpicklingError("a tensor that reaches beyond its memory")
    if count * storage.dtype.itemsize > MAX_BYTES:
        raise pickle.UnpicklingError(f"a tensor of {count:,} numbers")
    if more[2:] and more[2]:
        raise pickle.UnpicklingError("a tensor with metadata, which may change its values")
    return Tensor(storage, offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands in for torch._utils._rebuild_parameter."""
    return tensor


class _OrderedDict(dict[Any, Any]):
    """Stands in for collections.OrderedDict, in which PyTorch sets an attribute, `_metadata`."""

    def __setstate__(self, state: object) -> None:
        pass


def _ordered_dict() -> _OrderedDict:
    return _OrderedDict()  # takes no items: their keys would not be checked


# Types that are not floats are included so that the message can name the array.
_STORAGES: Mapping[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): name for name in _STORAGES},  # arguments only
    ("collections", "OrderedDict"): _ordered_dict,
}
