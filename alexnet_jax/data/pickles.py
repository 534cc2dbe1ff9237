"""Pickles read as data: nothing that a file names is imported or called.

`loads` is the standard library's unpickler with three restrictions: it accepts only the opcodes that data consists of,
only names from a table, and only strings and numbers as keys of a dict. PyTorch's `weights_only` unpickler is similar.

It derives from `pickle._Unpickler`, the implementation in Python, whose table of opcodes a subclass can change; joblib
does the same. `pickle.Unpickler`, in C, hashes anything that a file uses as a key, and hashing a tuple that refers to
another tuple twice, and so on for 60 levels, takes 2^60 steps.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from alexnet_jax.errors import shown

# CIFAR-10's batches have 20,078; rewritten by Python 3 in protocol 2, which encodes each file name, about 130,000.
# Beyond its own argument, an opcode creates at most a small object.
MAX_OPCODES = 200_000

# Of protocols 2 to 4.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE",
    "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE",
    "BUILD", "BINPERSID",
}  # fmt: skip


class UnknownNameError(pickle.UnpicklingError):
    """The pickle asks for a class or function that is not in the table of names."""


class PickledArray:
    """Stands in for `numpy.ndarray`: a uint8 or float array, or the list of an array of objects.

    `values` is None until the pickle has given the contents.
    """

    values: np.ndarray | list[Any] | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (1, tuple(), _Dtype(code="O" | "O8"), _, list(items)):
                self.values = items
            case (1, tuple(shape), _Dtype(code="u1" | "f2" | "f4" | "f8" as code), fortran, bytes(buffer)):
                self.values = np.frombuffer(buffer, f"<{code}").reshape(shape, order="F" if fortran else "C")
            case _:
                raise pickle.UnpicklingError("it has an array without shape, dtype or contents")


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: object, *_: object) -> None:
        name = code.decode("latin-1") if isinstance(code, bytes) else code
        if name not in ("u1", "f2", "f4", "f8", "O", "O8"):
            raise pickle.UnpicklingError(f"it has an array of dtype {shown(name, 20)}")
        self.code = name

    def __setstate__(self, state: object) -> None:
        match state:
            case (3, "<" | "|" | b"<" | b"|", None, None, None, -1, -1, int()):
                pass
            case _:
                raise pickle.UnpicklingError("it has an array of records, or in another byte order")


def _new_array(*_: object) -> PickledArray:
    return PickledArray()


NAMES: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _new_array,  # NumPy 2
    ("numpy", "ndarray"): "an argument of _reconstruct",
    ("numpy", "dtype"): _Dtype,
}


def loads(
    data: bytes,
    names: Mapping[tuple[str, str], Any] = NAMES,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that a pickle describes, with `PickledArray` for arrays and bytes for strings of Python 2.

    Args:
      data: in protocols 2 to 4.
      names: (module, name) -> the object that stands in for it. A file can call the callables with any arguments, and
        can call `__setstate__` of objects that have one.
      persistent_load: as that of `pickle.Unpickler`.

    Raises:
      UnknownNameError: it asks for something that is not in `names`.
      pickle.UnpicklingError: it uses other opcodes, too many of them, or other keys.
      Exception: it is damaged, which causes errors of many kinds.
    """
    for count, (opcode, _, _) in enumerate(pickletools.genops(data)):
        if count == MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} opcodes")
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"it uses the opcode {opcode.name}")
    return _Unpickler(data, names, persistent_load).load()


_LOAD: Mapping[int, Any] = {
    ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)]
    for opcode in pickletools.opcodes
    if opcode.name in _OPCODES
}


class _Unpickler(pickle._Unpickler):
    stack: list[Any]  # set by the base class

    def __init__(
        self, data: bytes, names: Mapping[tuple[str, str], Any], persistent_load: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._names = names
        self._load_by_id = persistent_load
        self._bytes_left = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in self._names:
            raise UnknownNameError(f"it asks for {shown(f'{module}.{name}', 150)}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_by_id is None:
            raise pickle.UnpicklingError("it refers to data outside the pickle")
        return self._load_by_id(pid)

    def _encode(self, text: object, encoding: object) -> bytes:
        """Bytes as Python 3 writes them in protocol 2; a file could encode one long text many times."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("it encodes text, but not to Latin-1")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it encodes more bytes than it has")
        return text.encode("latin-1")

    def _load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        _LOAD[pickle.SETITEM[0]](self)

    def _load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # what comes after the mark
        _LOAD[pickle.SETITEMS[0]](self)

    def _load_reduce(self) -> None:
        if not isinstance(self.stack[-1], tuple):  # a text would become a tuple of its characters
            raise pickle.UnpicklingError("it calls something with arguments that are not a tuple")
        _LOAD[pickle.REDUCE[0]](self)

    def _load_build(self) -> None:
        if not hasattr(type(self.stack[-2]), "__setstate__"):  # else it would set attributes, of our functions too
            raise pickle.UnpicklingError("it sets the state of an object that has none")
        _LOAD[pickle.BUILD[0]](self)

    dispatch: ClassVar[dict[int, Any]] = {
        **_LOAD,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.REDUCE[0]: _load_reduce,
        pickle.BUILD[0]: _load_build,
    }


def _check_keys(keys: Iterable[object]) -> None:
    if not all(isinstance(key, str | bytes | int | float) for key in keys):
        raise pickle.UnpicklingError("it has a dict with a key that is neither a string nor a number")
