"""The pickles of `cifar-10-batches-py`, read without ever running what a pickle can ask for.

`pickle.load` calls whatever a file names. Here the standard library's disassembler (`pickletools.genops`) takes the
file apart, and a small stack machine follows the few opcodes that a batch is made of: nothing is imported, nothing that
the file names is called, and no state is set on any object but an array's. PyTorch's `weights_only` unpickler is alike.

Beyond bytes, strings, numbers, tuples, lists and dicts it knows what Python 2 and 3 write for a uint8 array and for
bytes (protocols 2 to 4): `_reconstruct`, `ndarray` and `dtype` of NumPy, and `_codecs.encode` to Latin-1.
"""

import dataclasses
import enum
import pickle
import pickletools
from typing import Any, TypeVar

import numpy as np

_Container = TypeVar("_Container", list, dict)

# A published batch has 20,078. One makes at most a small object beyond its own argument, so this and the bound on what
# `_codecs.encode` makes keep the memory within a few times the size of the file and some 64 MB.
_MAX_OPCODES = 1_000_000


class _Known(enum.Enum):
    """What a file may name, and the one dtype."""

    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()
    UINT8 = enum.auto()


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,  # NumPy 2
    ("numpy", "ndarray"): _Known.NDARRAY,
    ("numpy", "dtype"): _Known.DTYPE,
    ("_codecs", "encode"): _Known.ENCODE,  # bytes, as Python 3 writes them in protocol 2
}


@dataclasses.dataclass(eq=False)
class PickledArray:
    """A uint8 array of the file; `values` is None until the file has given its state."""

    values: np.ndarray | None = None


def loads(data: bytes) -> object:
    """The object that the pickle `data` describes: Python 2 strings as bytes, arrays as `PickledArray`.

    Raises:
      pickle.UnpicklingError: it asks for anything beyond a batch.
      Exception: it is damaged; the disassembler and the stack machine raise errors of many kinds then.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, object] = {}
    encoded = 0  # bytes
    argument: Any

    def pop_to_mark() -> list:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count == _MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {_MAX_OPCODES:,} opcodes")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))  # the disassembler decodes Python 2's strings as Latin-1
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                items = pop_to_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else pop_to_mark()
                _container(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else pop_to_mark()
                # The hash of tuples nested a million deep would overflow the interpreter's own stack.
                if not all(isinstance(key, bytes | str) for key in items[::2]):
                    raise pickle.UnpicklingError("it has a key that is no string")
                _container(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case "REDUCE":
                arguments, callee = stack.pop(), stack.pop()
                value = _reduce(callee, arguments)
                if isinstance(value, bytes):
                    encoded += len(value)
                    if encoded > len(data):  # the same string again and again
                        raise pickle.UnpicklingError("it encodes more bytes than it has")
                stack.append(value)
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "STOP":
                return stack.pop()
            case _:
                raise pickle.UnpicklingError(f"it uses the opcode {opcode.name}")
    raise pickle.UnpicklingError("it has no end")


def _container(value: object, kind: type[_Container]) -> _Container:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"it adds to what is no {kind.__name__}")
    return value


def _global(module: object, name: object) -> _Known:
    # Nothing but strings is ever printed: lists that hold lists twice over have a repr of exponential length.
    if not (isinstance(module, str) and isinstance(name, str)):
        raise pickle.UnpicklingError("it names something by what is no string")
    if (module, name) not in _GLOBALS:
        raise pickle.UnpicklingError(f"it names {module[:100]}.{name[:100]}")
    return _GLOBALS[module, name]


def _reduce(callee: object, arguments: object) -> object:
    match callee, arguments:
        case _Known.ENCODE, (str(text), "latin1"):
            return text.encode("latin-1")
        case _Known.DTYPE, ("u1" | b"u1", 0, 1):
            return _Known.UINT8
        case _Known.DTYPE, (str() | bytes() as code, *_):
            raise pickle.UnpicklingError(f"it has an array of dtype {code[:20]!r} instead of 'u1' (uint8)")
        case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), "b" | b"b"):
            return PickledArray()
    raise pickle.UnpicklingError("it calls what is no array or string")


def _build(target: object, state: object) -> None:
    match target, state:
        case _Known.UINT8, (3, "|" | b"|", None, None, None, -1, -1, 0):
            pass
        case PickledArray(values=None), (1, tuple(shape), _Known.UINT8, (0 | 1) as fortran, bytes(buffer)):
            values = np.frombuffer(buffer, np.uint8)
            target.values = values.reshape(shape, order="F" if fortran else "C")
        case _:
            raise pickle.UnpicklingError("it sets the state of what is no array")
