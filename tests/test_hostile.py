"""Malicious pickles do nothing, and fuzzed input of every kind loads correctly or is refused in one line.

`tests/stress/fuzz.py` makes the fuzzed input and judges the outcome; this is its short form.
"""

import contextlib
import copyreg
import gc
import marshal
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from alexnet_jax.data import cifar10
from alexnet_jax.errors import AlexNetError
from alexnet_jax.exchange import state_dict, weights
from tests.stress import fuzz

# Opcodes


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def opcodes(value: object, protocol: int = 2) -> bytes:
    """Those that put a value on the stack."""
    return pickle.dumps(value, protocol)[2:-1]


def arguments(*values: object) -> bytes:
    """A tuple; bytes stand for the opcodes of a value."""
    return b"(" + b"".join(value if isinstance(value, bytes) else opcodes(value) for value in values) + b"t"


def name(path: str) -> bytes:
    """What `module:name` names."""
    return b"c" + path.replace(":", "\n").encode() + b"\n"


def stack_name(path: str) -> bytes:
    return b"".join(text(part) for part in path.split(":")) + b"\x93"


def call(path: str, *values: object) -> bytes:
    return name(path) + arguments(*values) + b"R"


class Reduced:
    """Pickles as a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (self.command,)


def code(marker: str) -> str:
    return f"open({marker!r}, 'w').close()"


def touch_marker(marker: str) -> None:
    pathlib.Path(marker).touch()


def attacks(marker: str) -> dict[str, bytes]:
    """Pickles that leave a file `marker` behind when the standard library loads them, which a test verifies."""
    touch = f"touch '{marker}'"
    system, run = name("os:system"), arguments(touch) + b"R."
    memmap = (marker, "uint8", "w+", 0, 1)
    calls = {
        "os:system": (touch,),
        "posix:system": (touch,),
        "os:open": (marker, os.O_CREAT | os.O_WRONLY),
        "subprocess:call": (["touch", marker],),
        "builtins:eval": (code(marker),),
        "__builtin__:eval": (code(marker),),  # of Python 2
        "_io:open": (marker, "w"),
        "numpy:memmap": memmap,
        "runpy:run_path": (f"{marker}.py",),  # exists
        "copyreg:__newobj__": (name("numpy:memmap"), *memmap),
        f"{__name__}:touch_marker": (marker,),
    }
    batch = fuzz.python_2_pickle(*fuzz.pixels_and_labels("data_batch_2"))
    array = pickle.dumps(np.zeros(4, np.uint8), 2)[:-1]
    import_os = call("importlib:import_module", "os")
    partial = call("functools:partial", name("builtins:print"))
    in_numpy = "numpy:os.system" if hasattr(np, "os") else "numpy:f2py.os.system"
    compiled = opcodes(marshal.dumps(compile(code(marker), "x", "exec")), 3)
    return {
        **{f"{path} by GLOBAL": b"\x80\x02" + call(path, *values) + b"." for path, values in calls.items()},
        **{
            f"os.system, protocol {protocol}": pickle.dumps({b"data": Reduced(touch), b"labels": [1]}, protocol)
            for protocol in (0, 2, 4)
        },
        "STACK_GLOBAL": b"\x80\x04" + stack_name("os:system") + run,
        "STACK_GLOBAL of names in the memo": (
            b"\x80\x04" + text("system") + b"\x94" + text("os") + b"\x9400h\x01h\x00\x93" + run
        ),
        "STACK_GLOBAL of a dotted name": b"\x80\x04" + stack_name("subprocess:os.system") + run,
        "dotted name in what a batch may name": b"\x80\x04" + stack_name(in_numpy) + run,
        "INST": b"(" + text(touch) + b"ios\nsystem\n.",
        "OBJ": b"(" + system + text(touch) + b"o.",
        "NEWOBJ": b"\x80\x02" + name("numpy:memmap") + arguments(*memmap) + b"\x81.",
        "NEWOBJ_EX": (
            b"\x80\x04" + name("numpy:memmap") + arguments(marker) + opcodes({"mode": "w+", "shape": 1}) + b"\x92."
        ),
        "EXT1": b"\x80\x02\x82\xf7" + run,
        "EXT2": b"\x80\x02\x83\xf7\x01" + run,
        "EXT4": b"\x80\x02\x84\xf7\xf7\x01\x00" + run,
        "memo by text": b"cos\nsystem\np99999\n0g99999\n(V" + touch.encode() + b"\ntR.",
        "memo of a huge index": system + b"r\xff\xff\xff\x010j\xff\xff\xff\x01" + run,
        "memo that changes": b"\x80\x02" + name("numpy:dtype") + b"q\x00" + system + b"q\x000h\x00" + run,
        "what is dropped": b"\x80\x02(" + call("os:system", touch) + b"1}.",
        "after the batch": b"\x80\x02}" + call("os:system", touch) + b"0.",
        "key of the batch": b"\x80\x02}(" + call("os:system", touch) + b"Nu.",
        "in an intact batch": batch[:-2] + text("x") + call("os:system", touch) + b"u.",
        "deep in a list": b"\x80\x02" + b"]" * 500 + call("os:system", touch) + b"a" * 500 + b".",
        "in an array of objects": pickle.dumps(np.array([Reduced(touch)]), 2),
        "as the state of an array": array + call("os:system", touch) + b"b.",
        "pickle in a pickle": (
            b"\x80\x03" + name("pickle:loads") + b"(" + opcodes(pickle.dumps(Reduced(touch)), 3) + b"tR."
        ),
        "import, getattr, call": b"\x80\x02" + call("builtins:getattr", import_os, "system") + run,
        "__setstate__ of a partial": (b"\x80\x02" + partial + arguments(system, arguments(touch), {}, {}) + b"b)R."),
        "map in a list": (
            b"\x80\x02" + call("builtins:list", call("builtins:map", name("builtins:eval"), [code(marker)])) + b"."
        ),
        "code by marshal": (
            b"\x80\x03" + call("types:FunctionType", name("marshal:loads") + b"(" + compiled + b"tR", {}) + b")R."
        ),
    }


_STRING = b"X\x01\x00\x00\x00x"

EXPONENTIAL = b"]" + b"q\x00h\x00\x86" * 100  # opcodes of a tuple whose hash and repr take 2^100 steps

# What the standard library refuses, or what harms by its size or shape.
TRICKS: dict[str, bytes] = {
    "persistent id": b"\x80\x02" + _STRING + b"Q.",
    "persistent id, protocol 0": b"Px\n.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of bytes": b"\x80\x04C\x02osC\x06system\x93.",
    "STACK_GLOBAL of one": b"\x80\x04" + text("os") + b"\x93.",
    "name of exponential length": b"\x80\x04" + EXPONENTIAL + b"h\x00\x93.",
    "key of exponential size": b"\x80\x02})" + EXPONENTIAL[1:] + b"Ns.",
    "keys of exponential size": b"\x80\x02}()" + EXPONENTIAL[1:] + b"Nu.",
    "codec of exponential size": b"\x80\x02" + name("_codecs:encode") + text("a") + EXPONENTIAL + b"\x86R.",
    "dtype of exponential size": b"\x80\x02" + name("numpy:dtype") + EXPONENTIAL + b"K\x00K\x01\x87R.",
    "byte order of exponential size": (
        b"\x80\x02" + call("numpy:dtype", "f4", 0, 1) + b"(K\x03" + EXPONENTIAL + b"NNNK\x01K\x01K\x00tb."
    ),
    "name called with a dict of exponential keys": (
        b"\x80\x02" + name("collections:OrderedDict") + b"])" + EXPONENTIAL[1:] + b"N\x86a\x85R."
    ),
    "look-alike: Cyrillic": b"\x80\x04" + stack_name("оs:system") + arguments("true") + b"R.",
    "look-alike: zero width": b"\x80\x04" + stack_name("numpy\u200b:dtype") + arguments("u1", 0, 1) + b"R.",
    "name of half a pair": b"\x80\x04" + text("\ud800") + text("x") + b"\x93.",
    "name with a null": b"\x80\x04" + stack_name("numpy\0:dtype") + b".",
    "relative name": b"\x80\x02c.os\nsystem\n.",
    "name of 10 MB": b"\x80\x02c" + b"o" * 10_000_000 + b"\nx\n.",
    "control characters in a name": b"\x80\x02c\x1b[31mos\nsystem\x07\n.",
    "state set on a name": b"\x80\x02cnumpy\ndtype\n}U\x01xK\x01sb.",
    "attributes set on an array": pickle.dumps(np.zeros(4, np.uint8), 2)[:-1] + b"}U\x09__class__Nsb.",
    "state set twice": (
        pickle.dumps(np.zeros(4, np.uint8), 2)[:-1]
        + arguments(1, (1,), call("numpy:dtype", "u1", 0, 1), False, b"U\x01x")
        + b"b."
    ),
    "object made of a name": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "object made with options": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "call of what is no function": b"\x80\x02cnumpy\nndarray\n)R.",
    "call with what is no tuple": b"\x80\x02cnumpy\ndtype\n]R.",
    "call of an empty stack": b"\x80\x02R.",
    "another codec": b"\x80\x02" + call("_codecs:encode", "a", "hex") + b".",
    "encodes what is no string": b"\x80\x02" + call("_codecs:encode", [1], "latin1") + b".",
    "array of objects": b"\x80\x02" + call("numpy:dtype", "O8", 0, 1) + b".",
    "array of a long dtype": b"\x80\x02" + call("numpy:dtype", "\x1b" * 1_000_000, 0, 1) + b".",
    "list as a dictionary": b"\x80\x02]]s.",
    "dictionary as a list": b"\x80\x02}Na.",
    "list as a key": b"\x80\x02}]Ns.",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "set": b"\x80\x04\x8f(" + _STRING + b"\x90.",
    "frozenset": b"\x80\x04(" + _STRING + b"\x91.",
    "byte array": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
    "buffer out of band": b"\x80\x05\x97\x98.",
    "memo without a stack": b"\x80\x02r\xff\xff\xff\x7fN.",
    "memo of 4 billion entries": b"\x80\x02}r\xff\xff\xff\xff.",
    "memo that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "mark that is not there": b"\x80\x02t.",
    "marks below the stack": b"\x80\x02N(0t.",
    "string of 2 GiB": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "string of -1 bytes": b"\x80\x02T\xff\xff\xff\xffabc.",
    "bytes of 2^63": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",
    "frame of 2^63": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
    "number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "number of 5,000 digits": b"L" + b"9" * 5_000 + b"L\n.",
    "number of 1 MB": b"\x80\x02\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000 + b".",
    "200,001 dictionaries": b"\x80\x02" + b"}" * 200_001 + b".",
    "199,000 marks": b"\x80\x02" + b"(" * 199_000 + b".",
    "deeply nested key": b"\x80\x02})" + b"\x85" * 190_000 + b"Ns.",
    "deeply nested value": b"\x80\x02}U\x01x)" + b"\x85" * 190_000 + b"s.",
    "deeply nested lists": b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b".",
    "deeply nested dtype": b"\x80\x02" + call("numpy:dtype", b"]" * 1000 + b"a" * 999, 0, 1) + b".",
    "tuples of exponential size": b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b".",
    "protocol 255": b"\x80\xff}.",
    "escape that is none": b"S'\\q'\n.",
    "nothing but an end": b".",
    "no end": b"\x80\x02}",
}


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """Leaves what was made before out of garbage collection, so that collecting takes milliseconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def batches(tmp_path):
    """A folder of intact batches."""
    folder: pathlib.Path = fuzz.Pickle(tmp_path).folder
    return folder


@pytest.fixture
def extensions():
    """Three functions in the registry of `copyreg`."""
    entries = [("os", "system", 0xF7), ("posix", "system", 0x1F7), ("subprocess", "getoutput", 0x1F7F7)]
    for entry in entries:
        copyreg.add_extension(*entry)
    yield
    for entry in entries:
        copyreg.remove_extension(*entry)
    copyreg.clear_extension_cache()


def judge(folder: pathlib.Path, content: bytes) -> bool:
    """Whether `content` is accepted as a batch; fails where anything but reading or a refusal in one line happens."""
    path = folder / "data_batch_2"
    path.write_bytes(content)

    def load() -> object:
        return cifar10.load(folder, records_per_batch=fuzz.RECORDS)

    accepted: bool = fuzz.judge(fuzz.Case(load, (str(path),), fuzz.check_dataset, watched=True))
    return accepted


def test_intact_batches_are_accepted(batches):
    assert judge(batches, (batches / "data_batch_2").read_bytes())


@pytest.mark.parametrize("attack", attacks("marker"))
def test_attack_does_nothing(attack, batches, tmp_path, extensions):
    marker = tmp_path / "executed"
    (tmp_path / "executed.py").write_text(code(str(marker)))
    content = attacks(str(marker))[attack]
    before = set(sys.modules)
    assert not judge(batches, content)
    assert not marker.exists()
    assert set(sys.modules) == before

    # The standard library falls for it, and the audit sees that.
    with contextlib.suppress(Exception), warnings.catch_warnings(), fuzz.audited() as events:
        warnings.simplefilter("ignore")  # files and databases that are left open
        try:
            pickle.loads(content, encoding="bytes")
        finally:
            gc.collect()  # now, not in a test where warnings are errors
    assert marker.exists(), "this attack is a dud"
    assert fuzz.beyond_reading(events)


@pytest.mark.parametrize("trick", TRICKS)
def test_trick_is_refused(trick, batches):
    assert not judge(batches, TRICKS[trick])


# Weights


def torch_file(path: pathlib.Path, pickled: bytes, members: dict[str, bytes] | None = None) -> None:
    """A .pth of PyTorch's zip format."""
    b"x".decode("cp437")  # zipfile's, which is imported at its first use
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for member, data in ({"0": bytes(16)} if members is None else members).items():
            archive.writestr(f"x/data/{member}", data)


def numpy_file(path: pathlib.Path, pickled: bytes) -> None:
    """A .npy of an object."""
    np.save(path, np.array({}, object), allow_pickle=True)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\n") + 1] + pickled)


def judge_weights(path: pathlib.Path, reason: str, watched: bool = True) -> bool:
    case = fuzz.Case(lambda: weights.load_weights(path), (reason,), lambda _: None, watched=watched)
    accepted: bool = fuzz.judge(case)
    return accepted


@pytest.mark.parametrize("write", [torch_file, numpy_file])
def test_attacks_do_nothing_as_weights(write, tmp_path, extensions):
    marker, path = tmp_path / "executed", tmp_path / "x.npy"
    (tmp_path / "executed.py").write_text(code(str(marker)))
    write(path, b"")
    before = set(sys.modules)
    for content in [*attacks(str(marker)).values(), *TRICKS.values()]:
        write(path, content)
        assert not judge_weights(path, str(path), watched=write is torch_file)  # NumPy parses a header as Python
        assert not marker.exists()
    assert set(sys.modules) == before


def storage(kind: str = "FloatStorage", key: object = "0", count: object = 4) -> bytes:
    """Opcodes of a tensor's memory: 16 bytes, unless its size is wrong."""
    return arguments("storage", name(f"torch:{kind}"), key, "cpu", count) + b"Q"


def tensor(offset: object, size: object, stride: object, memory: bytes | None = None, *more: object) -> bytes:
    memory = storage() if memory is None else memory
    return call("torch._utils:_rebuild_tensor_v2", memory, offset, size, stride, False, {}, *more)


NO_SHAPE, NO_NUMBERS = "a tensor with an invalid shape", "a tensor whose shape or strides are not numbers from 0"
BEYOND, KIND = "a tensor that reaches beyond its memory", "a tensor of an unknown kind"
NO_STATE = "it sets the state of an object that has none"
# What would be read beyond a tensor's memory, or take more memory than there is: opcodes, and why they are refused.
TENSORS: dict[str, tuple[bytes, str]] = {
    "size": (tensor(0, (5,), (1,)), BEYOND),
    "offset": (tensor(1, (4,), (1,)), BEYOND),
    "offset of nothing": (tensor(5, (0,), (1,)), BEYOND),
    "stride": (tensor(0, (2, 2), (3, 1)), BEYOND),
    "one of many": (tensor(3, (1, 2, 1), (1, 1, 1)), BEYOND),
    "negative offset": (tensor(-1, (1,), (1,)), NO_NUMBERS),
    "negative stride": (tensor(3, (4,), (-1,)), NO_NUMBERS),
    "negative size": (tensor(0, (-4,), (1,)), NO_NUMBERS),
    "two negative sizes": (tensor(0, (-2, -2), (1, 1)), NO_NUMBERS),
    "huge by stride 0": (tensor(0, (2**30, 2**9), (0, 0)), f"a tensor of {2**39:,} numbers"),
    "product that overflows": (tensor(0, (2**32, 2**32), (0, 0)), f"a tensor of {2**64:,} numbers"),
    "stride that overflows": (tensor(0, (2,), (2**62,)), NO_NUMBERS),
    "sum that overflows": (tensor(0, (2, 2, 2), (2**39, 2**39, 2**39)), BEYOND),
    "huge number": (tensor(0, (2**1000,), (0,)), NO_NUMBERS),
    "fractions": (tensor(0, (1.5,), (1,)), NO_NUMBERS),
    "truth": (tensor(False, (True,), (True,)), NO_NUMBERS),
    "no tuple": (tensor(0, 4, 1), NO_SHAPE),
    "text": (tensor(0, "4", "1"), NO_SHAPE),
    "lengths differ": (tensor(0, (2, 2), (1,)), NO_SHAPE),
    "many axes": (tensor(0, (1,) * 65, (1,) * 65), NO_SHAPE),
    "kind": (tensor(0, (4,), (1,), storage("UntypedStorage")), "it asks for torch.UntypedStorage"),
    "kind that is none": (tensor(0, (4,), (1,), arguments("storage", "x", "0", "cpu", 4) + b"Q"), KIND),
    "kind of lists": (tensor(0, (4,), (1,), arguments("storage", [], "0", "cpu", 4) + b"Q"), KIND),
    "another file": (tensor(0, (4,), (1,), storage(key="../data.pkl")), "There is no item named 'x/data/../data.pkl'"),
    "no file": (tensor(0, (4,), (1,), storage(key="1")), "There is no item named 'x/data/1'"),
    "key that is none": (tensor(0, (4,), (1,), storage(key=0)), "a tensor whose memory has no name or size"),
    "more than there is": (tensor(0, (9,), (1,), storage(count=9)), "data/0 has 16 bytes, not 9 float32"),
    "less than there is": (tensor(0, (3,), (1,), storage(count=3)), "data/0 has 16 bytes, not 3 float32"),
    "as wider numbers": (tensor(0, (4,), (1,), storage("DoubleStorage")), "data/0 has 16 bytes, not 4 float64"),
    "as narrower numbers": (tensor(0, (4,), (1,), storage("HalfStorage")), "data/0 has 16 bytes, not 4 float16"),
    "count below 0": (tensor(0, (0,), (1,), storage(count=-4)), "a tensor whose memory has no name or size"),
    "count of text": (tensor(0, (4,), (1,), storage(count="4")), "a tensor whose memory has no name or size"),
    "no memory": (tensor(0, (4,), (1,), opcodes({})), "a tensor without memory"),
    "metadata": (tensor(0, (4,), (1,), None, {"conj": True}), "a tensor with metadata"),
    "attributes of a tensor": (tensor(0, (4,), (1,)) + b"}" + text("size") + opcodes((9,)) + b"sb", NO_STATE),
    "state of a tensor": (tensor(0, (4,), (1,)) + arguments(storage(), 0, (9,), (1,)) + b"b", NO_STATE),
    "state of memory": (tensor(0, (4,), (1,), storage() + arguments("<f4", 9) + b"b"), NO_STATE),
    "slots of a tensor": (
        tensor(0, (4,), (1,)) + b"(N}" + text("size") + opcodes((9,)) + b"stb", NO_STATE
    ),
}  # fmt: skip


@pytest.mark.parametrize("hostile", TENSORS)
def test_tensors_stay_in_their_memory(hostile, tmp_path):
    made, reason = TENSORS[hostile]
    # Every array is there, so that nothing else is wrong; the first is made of the hostile tensor.
    state = b"".join(text(key) + made for key in weights.TORCHVISION_ARRAYS)
    torch_file(tmp_path / "x", b"\x80\x02}(" + state + b"u.")
    tracemalloc.start()
    try:
        assert not judge_weights(tmp_path / "x", reason)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [((4,), (1,), [0, 1, 2, 3]), ((2, 2), (1, 2), [[0, 2], [1, 3]]), ((3,), (0,), [1, 1, 1]), ((0,), (1,), [])],
)
def test_sound_tensors_are_read(size, stride, expected, tmp_path):
    offset = int(stride == (0,))
    path = tmp_path / "x"
    torch_file(
        path,
        b"\x80\x02}" + text("a") + tensor(offset, size, stride) + b"s.",
        {"0": np.arange(4, dtype="<f4").tobytes()},
    )
    np.testing.assert_array_equal(state_dict.read_pth(path.read_bytes())["a"].values(), expected)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A zip's directory may name the same bytes many times: 16 of 1 GB in a file of 1 GB."""
    path = tmp_path / "x"
    torch_file(path, b"\x80\x02}.", {"0": bytes(10_000), "1": b"1234"})
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(b"x/data/" + key) - 46 for key in (b"0", b"1"))  # of the directory
    data[second + 16 : second + 28] = data[first + 16 : first + 28]  # checksum and sizes
    data[second + 42 : second + 46] = data[first + 42 : first + 46]  # place
    path.write_bytes(data)
    assert not judge_weights(path, "its members are larger than the file")


# The judge


@pytest.mark.parametrize(
    ("load", "fault"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: _refuse("two\nlines of file"), "line break"),
        (lambda: _refuse("no name"), "names none"),
        (lambda: _refuse("file " * 1000), "characters"),
        (lambda: print("file"), "printed"),
        (lambda: subprocess.call(["echo", "file"]), "printed"),
        (lambda: warnings.warn("file", stacklevel=1), "warned"),
        (lambda: sys.exit(2), "exit with 2"),
        (lambda: "not sound", "not sound"),
    ],
)
def test_the_judge_finds_faults(load, fault):
    with pytest.raises(fuzz.FaultError, match=fault):
        fuzz.judge(fuzz.Case(load, ("file",), lambda value: fuzz.require(value is None, "value")))


def _refuse(message: str) -> None:
    raise AlexNetError(message)


@pytest.mark.parametrize(
    "deed",
    [
        lambda path: path.write_text("x"),
        lambda path: path.open("a").close(),
        lambda path: os.close(os.open(path, os.O_CREAT | os.O_RDWR)),
        lambda path: path.mkdir(),
        lambda path: __import__("this_is_no_module"),
        lambda path: eval("1"),
        lambda path: os.system("true"),
    ],
)
def test_the_judge_sees_what_is_done(deed, tmp_path):
    def load() -> None:
        with contextlib.suppress(ImportError):
            deed(tmp_path / "file")

    with pytest.raises(fuzz.FaultError, match="did "):
        fuzz.judge(fuzz.Case(load, ("file",), lambda value: None, watched=True))


def test_the_judge_ends_a_hang(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)

    def load() -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    with pytest.raises(fuzz.FaultError, match="Hang"):
        fuzz.judge(fuzz.Case(load, ("file",), lambda value: None))


# Fuzzed input

CASES = 20  # of each kind


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_fuzzed_input(kind, tiny_networks, tmp_path):
    maker = fuzz.KINDS[kind][1](tmp_path)
    accepted = 0
    for number in range(CASES):
        case = maker.case(fuzz.rng_of(0, kind, number))
        try:
            accepted += fuzz.judge(case)
        except fuzz.FaultError as fault:
            pytest.fail(f"case {number}: {fault}; {case.shown[:300]}")
    assert 0 < accepted < CASES  # harmless changes are among them
