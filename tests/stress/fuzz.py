"""Broken and hostile input: it loads correctly, or is refused in one line that names the file or flag.

    python -m tests.stress.fuzz                                      # 10,000 cases
    python -m tests.stress.fuzz --kind pickle --first 31 --cases 1   # one of them again

A case is a function of (seed, kind, number). It fails if it ends in anything but a sound result or an `AlexNetError`
of one line that names the file or flag, prints or warns, takes over 10 s, exceeds the limit of memory or, where a
pickle is read, does anything but read files.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import PIL.Image
import tqdm

import alexnet_jax
from alexnet_jax import errors
from alexnet_jax.config import checks, cli, recipes
from alexnet_jax.config.flags import flags_of, flat_items
from alexnet_jax.config.settings import EvalConfig, TrainConfig
from alexnet_jax.data import cifar10, shapes
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.errors import AlexNetError
from alexnet_jax.runs import log
from alexnet_jax.training import loop

SECONDS = 10
HEADROOM = 2 * 1024**3  # bytes of address space beyond what the process has before its first case
MESSAGE_LENGTH = 1000  # characters beyond the name

RECORDS = 2
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


class FaultError(Exception):
    """What a case may not end in."""


class Hang(BaseException):
    """Raised by the alarm: no Exception, so that nothing under test catches it."""


@dataclasses.dataclass
class Case:
    """An input, ready to be loaded.

    Attributes:
      load: what is under test.
      names: a refusal must name one of these.
      check: raises AssertionError if what was loaded is not sound.
      watched: whether `load` may do nothing but read files.
      shown: the input, in readable form.
    """

    load: Callable[[], Any]
    names: tuple[str, ...]
    check: Callable[[Any], None]
    watched: bool = False
    shown: str = ""


# What a process does, by Python's audit events


_events: list[tuple[str, str]] | None = None
_thread = 0


@functools.cache
def _add_audit_hook() -> None:
    """Once, as a hook can't be removed."""

    def hook(event: str, arguments: tuple) -> None:
        if _events is not None and threading.get_ident() == _thread:
            if event == "open":
                _, mode, flags = arguments
                reads = (mode is None or not set(mode) & set("wax+")) and not flags & ~(os.O_CLOEXEC | os.O_RDONLY)
                event = "open to read" if reads else "open to write"
            _events.append((event, repr(arguments)[:200]))

    sys.addaudithook(hook)


@contextlib.contextmanager
def audited() -> Iterator[list[tuple[str, str]]]:
    """Collects the audit events of this thread, with their arguments."""
    global _events, _thread
    _add_audit_hook()
    _events, _thread = [], threading.get_ident()
    try:
        yield _events
    finally:
        _events = None


def beyond_reading(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The events that reading a file or listing a folder does not cause."""
    return [event for event in events if event[0] not in ("open to read", "os.listdir", "os.scandir")]


# Judging a case


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], bytes]]:
    """Catches what is printed, by Python or below it; yields a function that returns it."""
    with tempfile.TemporaryFile() as file, open(os.dup(file.fileno()), "w", encoding="utf-8") as text:

        def printed() -> bytes:
            text.flush()
            return os.pread(file.fileno(), 10_000, 0)

        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield printed
        finally:
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        raise Hang(f"still at work after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> bool:
    """Whether the input was accepted.

    Raises:
      FaultError: it was neither loaded correctly nor refused in one line.
    """
    events: list[tuple[str, str]] = []
    with _captured() as printed, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as Python does
        try:
            with _alarm(), audited() if case.watched else contextlib.nullcontext(events) as events:
                value = case.load()
        except AlexNetError as error:
            accepted, message = False, str(error)
        except SystemExit as stop:
            if stop.code:
                raise FaultError(f"exit with {stop.code}") from stop
            return True  # --help, which prints
        except (Exception, Hang) as error:
            raise FaultError(f"{type(error).__name__}: {str(error)[:300]}") from error
        else:
            accepted = True
        if output := printed():
            raise FaultError(f"printed {output[:300]!r}")
        if warned:
            raise FaultError(f"warned {str(warned[0].message)[:300]!r}")
    if found := beyond_reading(events):
        raise FaultError(f"did {found[0]}")
    if accepted:
        try:
            case.check(value)
        except AssertionError as error:
            raise FaultError(f"accepted what is not sound: {error}") from error
        return True
    if not message.isprintable():
        raise FaultError(f"a message with a line break or control character: {message[:300]!r}")
    if not any(name in message for name in case.names):
        raise FaultError(f"a message that names none of {case.names}: {message[:300]!r}")
    if len(message) > MESSAGE_LENGTH + max(map(len, case.names)):
        raise FaultError(f"a message of {len(message):,} characters: {message[:300]!r}")
    return False


def require(condition: object, message: str) -> None:
    """Raises AssertionError, even under `python -O`."""
    if not condition:
        raise AssertionError(message)


# Mutations


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Damages `data` once to four times."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # Formats keep what matters at the beginning and the end.
        where = rng.choice([len(data), len(data), min(256, len(data))])
        start = rng.randrange(where + 1)
        if rng.random() < 0.25:
            start = len(data) - start
        length = rng.choice([1, 2, 4, 8, 32, 1024])
        head, part, tail = data[:start], data[start : start + length], data[start + length :]
        match rng.randrange(9):
            case 0 | 1 | 2 if part:
                changed = bytearray(part[:1])
                changed[0] ^= 1 << rng.randrange(8)
                data = head + changed + part[1:] + tail
            case 3:
                data = head
            case 4:
                data = head + tail
            case 5:
                data = head + part * rng.choice([2, 3, 100]) + tail
            case 6:
                data = head + rng.randbytes(len(part)) + tail
            case 7:
                number = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8])
                data = head + number + data[start + len(number) :]
            case _:
                other = rng.randrange(len(data) + 1)
                data = head + data[other : other + length] + part + tail
    return data


def nested(depth: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 9, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**4000),
    *(0.5, 1.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, "", "x", "0", "1", "true", "nan", "\0", "a\nb"),
    *("\x1b[31m", "\u2028", "\u202e", "\ud800", "\xff", "😀", "../../x", "a" * 100_000, "\n" * 1000, "١", "１", "last"),
    *([], {}, [[]], [None], [0], [1, 2], [2, 1], {"": None}, {"x": 1}, nested(50), list(range(1000)), "__class__"),
)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Changes one place in a tree of JSON: its value, its type or its key; works on a copy."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return rng.choice(ODD_VALUES)
    holder, key = rng.choice(places)
    old = holder[key]
    match rng.randrange(10):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [old]
        case 2:
            holder[key] = str(old)
        case 3:
            other_holder, other_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other_holder[other_key]))
        case 4 if isinstance(holder, dict):
            holder[rng.choice([f"{key} ", key.upper(), "", "__proto__", "x" * 5000, "\n", "\ud800"])] = holder.pop(key)
        case 5 if isinstance(old, int | float):
            holder[key] = rng.choice([-old, old * 10, old + 1, old / 3, float(old), old * 2**40])
        case _:
            holder[key] = rng.choice(ODD_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _places(part)


ODD_TEXTS = (
    *(b"", b" ", b"\0", b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"{" * 5, b"1" * 10_000, b"\xff\xfe\x00", b"\x80"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 500 + b"]" * 500, b"9" * 5000, b"\xef\xbb\xbf{}", b'{"x": 1e999}'),
    *(b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}', b"{'a': 1}", b"//", b"#" * 100_000),
)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """A damaged JSON text of `value`."""
    if rng.random() < 0.1:
        return rng.choice(ODD_TEXTS)
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        value = mutate_value(rng, value)
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice([None, 2]))
    finally:
        sys.set_int_max_str_digits(limit)
    data = text.encode("utf-8", "surrogatepass")
    choice = rng.random()
    if choice < 0.03:
        return text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]), "surrogatepass")
    return mutate_bytes(rng, data) if choice < 0.4 else data


def place(rng: random.Random, path: pathlib.Path, data: bytes) -> str:
    """Writes a file, or now and then puts something else in its place; returns what."""
    match rng.randrange(100):
        case 0:
            return "missing"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            os.mkfifo(path)
            return "a pipe"
        case 3:
            path.symlink_to(path)
            return "a link to itself"
        case 4:
            path.touch()
            os.truncate(path, 8 * 1024**3)
            return "8 GiB of zeros"
        case _:
            path.write_bytes(data)
            return repr(data[:2000])


def remove(path: pathlib.Path) -> None:
    """Removes what `place` has made."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# CIFAR-10


def check_dataset(dataset: Dataset) -> None:
    """Sizes and labels; `Split` itself sees to dtypes."""
    for name, size in (("train", 4 * RECORDS), ("validation", RECORDS), ("test", RECORDS)):
        split = dataset[name]
        require(split.images.shape == (size, 32, 32, 3), f"{name} has images {split.images.shape}")
        require(((split.labels >= 0) & (split.labels <= 9)).all(), f"{name} has labels {split.labels}")


def pixels_and_labels(batch: str) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [RECORDS, 3072] in planes, labels."""
    rng = np.random.default_rng(BATCHES.index(batch))
    return rng.integers(0, 256, (RECORDS, 3072), np.uint8), rng.integers(0, 10, RECORDS).tolist()


class Binary:
    """`cifar-10-batches-bin`."""

    layout, suffix = "cifar-10-batches-bin", ".bin"

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder / self.layout
        self.folder.mkdir()
        self.damaged: pathlib.Path | None = None
        for batch in BATCHES:
            self.write(batch)

    def write(self, batch: str) -> None:
        (self.folder / f"{batch}{self.suffix}").write_bytes(self.intact(batch))

    def intact(self, batch: str) -> bytes:
        pixels, labels = pixels_and_labels(batch)
        return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))

    def mutated(self, rng: random.Random, batch: str) -> bytes:
        data = self.intact(batch)
        if rng.random() < 0.2:  # a label
            at = rng.randrange(RECORDS) * 3073
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        return mutate_bytes(rng, data)

    def case(self, rng: random.Random) -> Case:
        if self.damaged:
            remove(self.damaged)
            self.write(self.damaged.name.removesuffix(self.suffix))
        batch = rng.choice(BATCHES)
        self.damaged = self.folder / f"{batch}{self.suffix}"
        remove(self.damaged)
        shown = place(rng, self.damaged, self.mutated(rng, batch))
        load = functools.partial(cifar10.load, self.folder, records_per_batch=RECORDS)
        return Case(load, (str(self.damaged),), check_dataset, watched=True, shown=shown)


def python_2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 and NumPy 1 wrote, protocol 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01K%cM\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T%b%btb"
    ) % (len(pixels), struct.pack("<i", pixels.nbytes), pixels.tobytes())
    numbers = b"".join(b"K%c" % label for label in labels)
    return b"\x80\x02}q\x01(U\x0bbatch_labelU\x07a batchU\x06labels](%beU\x04data%bu." % (numbers, array)


SNIPPETS = (
    *(b"cos\nsystem\n", b"X\x04\x00\x00\x00true\x85R", b"(X\x04\x00\x00\x00trueios\nsystem\n"),
    *(b"\x8c\x02os\x8c\x06system\x93", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"\x82\x01", b"\x83\x01\x00"),
    *(b"\x84\x01\x00\x00\x00", b"Px\n", b"Q", b"h\x00", b"h\x01", b"h\x07", b"j\xff\xff\xff\xff", b"q\x00"),
    *(b"r\xff\xff\xff\xff", b"\x94", b"0", b"1", b"2", b"(", b"t", b"N", b"\x88", b"K\x00", b"J\xff\xff\xff\xff"),
    *(b"\x8a\x09" + b"\xff" * 9, b"G" + b"\x7f\xf0" + b"\0" * 6, b"I99999\n", b"]", b"}", b")", b"\x85", b"\x86"),
    *(b"\x87", b"a", b"e", b"s", b"u", b"R", b"b", b"\x81", b"\x92", b"o", b"d", b"l", b"\x8f", b"\x90", b"\x91"),
    *(b"\x96\x01" + b"\0" * 7 + b"x", b"\x97", b"\x98", b"\x95" + b"\xff" * 8, b"S'\\d'\n", b"V\\u\n", b"L1L\n"),
    *(b"T\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"Fnan\n", b".", b"\x80\xff", b"2" * 3000),
)


class Pickle(Binary):
    """`cifar-10-batches-py`, as Python 2 and as Python 3 write it."""

    layout, suffix = "cifar-10-batches-py", ""

    def intact(self, batch: str) -> bytes:
        return python_2_pickle(*pixels_and_labels(batch))

    def good(self, rng: random.Random, batch: str) -> bytes:
        """Intact in any dialect; protocols 0 and 5 are not among those that are read."""
        pixels, labels = pixels_and_labels(batch)
        protocol = rng.choice([None, None, None, 0, 2, 2, 3, 4, 5])
        if protocol is None:
            return self.intact(batch)
        return pickle.dumps({b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * RECORDS}, protocol)

    def mutated(self, rng: random.Random, batch: str) -> bytes:
        data = self.good(rng, batch)
        if rng.random() < 0.5:
            return mutate_bytes(rng, data)
        positions = [position for _, _, position in pickletools.genops(data)]
        opcodes = [data[start:end] for start, end in itertools.pairwise([*positions, len(data)])]
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(opcodes))
            match rng.randrange(6):
                case 0:
                    del opcodes[at]
                case 1:
                    opcodes.insert(at, rng.choice(opcodes))
                case 2:
                    opcodes[at] = rng.choice(opcodes)
                case 3:
                    opcodes[at] = rng.choice(SNIPPETS)
                case 4:
                    opcodes.insert(at, rng.choice(SNIPPETS) * rng.choice([1, 1, 1, 1000]))
                case _:
                    opcodes[at] = mutate_bytes(rng, opcodes[at])
        return b"".join(opcodes)


class Archive:
    """`cifar-10-binary.tar.gz` and `cifar-10-python.tar.gz`, and both as a plain tar."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "archive"
        self.sources = [Binary(folder), Pickle(folder)]

    def case(self, rng: random.Random) -> Case:
        source = rng.choice(self.sources)
        damaged = rng.choice([*BATCHES, None, None])
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([0, 1, 2])) as archive:
            for batch in BATCHES:
                data = source.mutated(rng, batch) if batch == damaged else source.intact(batch)
                member = tarfile.TarInfo(f"{source.layout}/{batch}{source.suffix}")
                member.size = len(data)
                if rng.random() < 0.05:
                    member.type = bytes([rng.choice(b"01234567SLKxgX")])
                    member.linkname = rng.choice(["/etc/passwd", "../../x", ""])
                    member.name = rng.choice([member.name, "../../x", "/" + member.name, "a" * 99])
                archive.addfile(member, io.BytesIO(data))
        data = buffer.getvalue()
        if damaged is None and rng.random() < 0.5:
            at = rng.randrange(6) * (len(data) // 6 // 512) * 512 + rng.randrange(512)  # in a header, most likely
            data = data[:at] + rng.choice([b"\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 12]) + data[at + 12 :]
        if rng.random() < 0.7:
            data = gzip.compress(data, 1)
        if rng.random() < 0.5:
            data = mutate_bytes(rng, data)
        remove(self.path)
        shown = place(rng, self.path, data)
        load = functools.partial(cifar10.load, self.path, records_per_batch=RECORDS)
        return Case(load, (str(self.path),), check_dataset, watched=True, shown=shown)


def _png(image: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def mutate_image(rng: random.Random, good: bytes) -> bytes:
    """Bytes where a PNG of 32 x 32 pixels belongs."""
    image = np.full((32, 32, 3), rng.randrange(256), np.uint8)
    signature, header, rest = good[:8], good[16:29], good[33:]
    match rng.randrange(8):
        case 0:
            form = rng.choice(["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
            return mutate_bytes(rng, _png(image, form)) if rng.random() < 0.5 else _png(image, form)
        case 1:  # another size or mode, well formed
            shape = rng.choice([(1, 1, 3), (32, 31, 3), (33, 32, 3), (32, 32), (32, 32, 4), (500, 500, 3)])
            return _png(np.zeros(shape, np.uint8))
        case 2:  # a header that does not go with the rest
            width, height = (rng.choice([0, 1, 32, 33, 10_000, 14_000, 2**31 - 1, 2**32 - 1]) for _ in range(2))
            depth, colours = rng.choice([1, 2, 8, 16, 255]), rng.choice([0, 2, 3, 4, 6, 7])
            changed = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, rng.randrange(3))
            return signature + _chunk(b"IHDR", changed) + rest
        case 3:  # a chunk that unpacks to a lot
            bomb = b"x\0\0" + zlib.compress(bytes(50_000_000), 9)
            kind = rng.choice([b"zTXt", b"iCCP", b"IDAT"])
            return signature + _chunk(b"IHDR", header) + _chunk(kind, bomb if kind != b"IDAT" else bomb[3:]) + rest
        case 4:  # any chunk
            kind = rng.choice(
                [b"PLTE", b"tRNS", b"gAMA", b"acTL", b"fcTL", b"fdAT", b"tEXt", b"iTXt", b"IEND", b"abcd"]
            )
            data = rng.randbytes(rng.choice([0, 1, 4, 26, 768]))
            return signature + _chunk(b"IHDR", header) + _chunk(kind, data) + rest
        case 5:
            return rng.choice([b"", b"\0", signature, good * 2, good[:-12], b"\xff\xd8\xff", b"a" * 1_000_000])
        case _:
            return mutate_bytes(rng, good)


class Prepared:
    """A copy prepared by TFDS: its images, ids and labels, its shards, its JSON files."""

    def __init__(self, folder: pathlib.Path) -> None:
        from alexnet_jax.data import cifar10_tfds
        from alexnet_jax.data.dataset import Split

        self.root, self.folder = folder, folder / "cifar10" / "3.0.2"
        splits = []
        for batch in BATCHES:
            pixels, labels = pixels_and_labels(batch)
            images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            splits.append(Split(images, np.array(labels, np.int32)))
        builder = cifar10_tfds.Cifar10(data_dir=folder)
        builder._split_generators = lambda dl_manager: {
            "train": self.examples("train", splits[:5]),
            "test": self.examples("test", splits[5:]),
        }
        with _captured():  # TFDS draws its bars
            builder.download_and_prepare(file_format="array_record")
        self.good = {path: path.read_bytes() for path in self.folder.iterdir()}
        self.shards = [path for path in self.good if "array_record" in path.name]

    def case(self, rng: random.Random) -> Case:
        for path, data in self.good.items():
            remove(path)
            path.write_bytes(data)
        if rng.random() < 0.6:
            path = rng.choice(self.shards)
            shown = self.rewrite(rng, path)
        else:
            path = rng.choice(list(self.good))
            data = self.good[path]
            remove(path)
            if path.suffix == ".json" and rng.random() < 0.7:
                shown = place(rng, path, mutate_json(rng, json.loads(data)))
            else:
                shown = place(rng, path, mutate_bytes(rng, data))
        load = functools.partial(cifar10.load, self.root, records_per_batch=RECORDS, url="http://127.0.0.1:1/none")
        return Case(load, (str(self.folder),), check_dataset, shown=f"{path.name}: {shown}")

    @staticmethod
    def examples(split: str, batches: list) -> Iterator[tuple[int, dict[str, Any]]]:
        """What TFDS's builder yields, with images that Pillow can code."""
        images = np.concatenate([batch.images for batch in batches])
        labels = np.concatenate([batch.labels for batch in batches]).tolist()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"id": f"{split}_{index:05d}", "image": PIL.Image.fromarray(image), "label": label}

    def rewrite(self, rng: random.Random, path: pathlib.Path) -> str:
        """Rewrites a shard with one record changed, so that its checksums are valid."""
        from array_record.python import array_record_module
        from tensorflow_datasets.proto import tf_example_pb2

        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        at = rng.randrange(len(records))
        example = tf_example_pb2.Example.FromString(records[at])
        features = example.features.feature
        match rng.randrange(10):
            case 0:
                features["label"].int64_list.value[:] = rng.choice([[-1], [10], [2**62], [], [1, 2], [3]])
            case 1:
                ids = [[b""], [b"train_00001"], [b"train_00000 "], [b"\xff\n\x1b"], [b"x" * 10_000], [], [b"a", b"b"]]
                features["id"].bytes_list.value[:] = rng.choice(ids)
            case 2:
                name = rng.choice(["id", "label", "image"])
                features[name].Clear()
                if rng.random() < 0.7:
                    features[name].float_list.value[:] = [math.nan]
            case 3:
                features["image"].bytes_list.value[:] = rng.choice([[], [b"", b""]])
            case _:
                features["image"].bytes_list.value[0] = mutate_image(rng, features["image"].bytes_list.value[0])
        records[at] = example.SerializeToString()
        if rng.random() < 0.1:
            records[at] = mutate_bytes(rng, records[at])
        remove(path)
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return repr(records[at][:2000])


# A run's folder


@functools.cache
def trained_run() -> pathlib.Path:
    """The folder of a run of two steps; the cases damage it and mend it."""
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="alexnet_jax_fuzz_")) / "run"
    preset = recipes.PRESETS["cifar10-paper"].config
    with _captured():
        loop.train_and_evaluate(
            dataclasses.replace(
                preset,
                data=dataclasses.replace(preset.data, dataset="shapes"),
                schedule=dataclasses.replace(preset.schedule, epochs=1, batch_size=16),
                run=dataclasses.replace(preset.run, workdir=workdir, num_devices=1),
            ),
            shapes.load(train=32, validation=10, test=10),
        )
    return workdir


class RunFile:
    """One file of a run's folder, opened with `open_run`."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self.folder = trained_run()
        self.path = self.folder / name
        self.good = self.path.read_bytes()

    def mutated(self, rng: random.Random) -> bytes:
        return mutate_json(rng, json.loads(self.good))

    def case(self, rng: random.Random) -> Case:
        remove(self.path)
        shown = place(rng, self.path, self.mutated(rng))
        # Without its file, the folder is no run.
        return Case(self.load, (str(self.path), f"{self.folder} is not a run"), self.check, shown=shown)

    def load(self) -> Any:
        try:
            return alexnet_jax.open_run(self.folder)
        finally:
            remove(self.path)
            self.path.write_bytes(self.good)

    def check(self, run: alexnet_jax.Run) -> None:
        check_settings(run.config)
        info = run.dataset
        texts = (info.name, info.source, info.fingerprint, *info.class_names)
        require(all(isinstance(text, str) and errors.is_one_line(text) for text in texts), f"texts {texts}")
        require(len(info.class_names) == 10, f"{len(info.class_names)} class names")
        require(type(info.class_names) is tuple and len(set(info.class_names)) == 10, f"classes {info.class_names}")
        require(info.image_shape == (32, 32, 3) and type(info.image_shape) is tuple, f"shape {info.image_shape}")
        require(all(type(size) is int for size in info.image_shape), f"shape {info.image_shape}")
        require(isinstance(info.counts, dict), f"counts {info.counts}")
        for split, count in info.counts.items():
            require(split in ("train", "validation", "test") and type(count) is int and count > 0, f"{split}: {count}")
        basis, mean_image = run.statistics.basis, run.statistics.mean_image
        for name, array, shape in (
            ("mean", basis.mean, (3,)),
            ("eigenvalues", basis.eigenvalues, (3,)),
            ("eigenvectors", basis.eigenvectors, (3, 3)),
            ("mean_image", mean_image, (32, 32, 3)),
        ):
            require(array.shape == shape, f"{name} {array.shape}")
            require(array.dtype in (np.float32, np.float64), f"{name} of dtype {array.dtype}")
            require(np.isfinite(array).all(), f"{name} is not finite")
        require((basis.eigenvalues >= 0).all(), f"eigenvalues {basis.eigenvalues}")
        require(abs(basis.eigenvectors).max() <= 1.001, f"eigenvectors {basis.eigenvectors}")
        for levels in (basis.mean, mean_image):
            require(((levels >= 0) & (levels <= 255)).all(), "grey levels beyond 0 to 255")


class Statistics(RunFile):
    """`statistics.npz`."""

    @functools.cached_property
    def bomb(self) -> bytes:
        """Half a megabyte that unpacks to 512 MB."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mean_image.npy", "w") as file:
            file.write(_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (134217728,), }", 0))
            for _ in range(512):
                file.write(bytes(2**20))
        return buffer.getvalue()

    def mutated(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, self.good)
        with np.load(io.BytesIO(self.good)) as file:
            arrays = dict(file)
        members = {name: _npy_of(array) for name, array in arrays.items()}
        name = rng.choice(list(arrays))
        array = arrays[name]
        match rng.randrange(10):
            case 0:
                odd = rng.choice([math.nan, math.inf, -math.inf, -1.0, 1e300, 256.0, -0.0])
                changed = array.copy()
                with np.errstate(over="ignore"):
                    changed.reshape(-1)[rng.randrange(array.size)] = odd
                members[name] = _npy_of(changed)
            case 1:
                dtype = rng.choice(["f2", ">f8", "i8", "u1", "?", "c16", "S8", "U8", "M8[s]", "V8", "f4", "f8", "g"])
                with contextlib.suppress(TypeError, ValueError):
                    members[name] = _npy_of(array.astype(dtype))
            case 2:
                shapes = [(0,), (), (1, *array.shape), array.shape[:-1], (*array.shape, 1), (3, 3, 3), (10_000, 100)]
                members[name] = _npy_of(np.zeros(rng.choice(shapes)))
            case 3:
                del members[name]
            case 4:
                members[rng.choice(["x", "../../x", "mean_image\n", "", "\ud7ff"])] = members.pop(name)
            case 5:
                members[name] = _npy_of(np.array([{"a": 1}], object))
            case 6:
                shape = rng.choice(
                    ["(3", "(-1,)", "(2**99,)", "(1000000000000,)", "(3L,)", "(3.0,)", "'x'", "()", "None"]
                )
                descr = rng.choice(
                    ["'<f8'", "'|O'", "'<f99'", "[('a', '<f8')]", "__import__('os')", "'<f8' * 9", "None"]
                )
                header = (
                    f"{{'descr': {descr}, 'fortran_order': {rng.choice(['False', 'True', '1'])}, 'shape': {shape}, }}"
                )
                members[name] = _npy(rng.choice([header, header * 2000, "(" * 500, "\0", "{}"]), 24)
            case 7:
                members[name] = mutate_bytes(rng, members[name])
            case 8:
                return rng.choice(
                    [
                        self.bomb,
                        members[name],
                        pickle.dumps([1]),
                        b"",
                        b"PK\x05\x06" + bytes(18),
                        b"PK\x03\x04",
                        b"\x93NUMPY",
                    ]
                )
            case _:
                # Fields of the archive's headers: version, flags, method of compression.
                data = bytearray(_npz(members))
                for signature, shift in ((b"PK\x03\x04", 4), (b"PK\x01\x02", 6)):
                    at = data.find(signature) + shift + rng.choice([0, 2, 4])
                    data[at] = rng.choice([1, 8, 9, 12, 14, 93, 99, 255])
                return bytes(data)
        return _npz(members)


def _npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npy(header: str, size: int) -> bytes:
    """A .npy file of `size` zero bytes under any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(header), 65535)) + header[:65535].encode() + bytes(size)


def _npz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


class Metrics(RunFile):
    """`metrics.jsonl`, read as a resumed run does."""

    def mutated(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, self.good)
        lines = self.good.splitlines()
        at = rng.randrange(len(lines))
        if rng.random() < 0.8:
            lines[at] = mutate_json(rng, json.loads(lines[at]))
        else:
            lines.insert(at, rng.choice(ODD_TEXTS))
        return b"\n".join(lines) + rng.choice([b"\n", b"", b"\n\n", b"\r\n"])

    def case(self, rng: random.Random) -> Case:
        return dataclasses.replace(super().case(rng), names=(str(self.path),))

    def load(self) -> Any:
        try:
            records = log.read_jsonl(self.path)
            log.JsonlWriter(self.path, 1_000).close()
            return records
        finally:
            remove(self.path)
            self.path.write_bytes(self.good)

    def check(self, records: list[log.Record]) -> None:
        for record in records:
            require(isinstance(record, dict), f"record {record!r:.100}")
            for name, value in record.items():
                if name == "split":
                    require(value in ("train", "validation"), f"split {value!r:.100}")
                else:
                    require(type(value) in (int, float), f"{name} {value!r:.100}")
                    require(type(value) is float or abs(value) < 2**63, f"{name} of many digits")
            step, accuracy = record.get("step"), record.get("accuracy", 0)
            require(type(step) is int and step >= 0, f"step {step!r:.100}")
            require(0 <= accuracy <= 1, f"accuracy {accuracy!r:.100}")
            require("split" in record, "no split")
            require(record["split"] != "validation" or "accuracy" in record, "no accuracy")


# Command lines


def check_settings(settings: TrainConfig | EvalConfig) -> None:
    """Numbers are finite and no more than 32 bits, texts are one line."""
    for name, value in flat_items(settings).items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float):
                require(math.isfinite(part), f"{name} {part}")
            if type(part) is int:
                require(0 <= part < 2**32, f"{name} {part}")
            if isinstance(part, str | pathlib.Path):
                require(errors.is_one_line(str(part)), f"{name} {part!r:.100}")
    require(checks.validate(settings) == settings, "another value after a second validation")


WORDS = (
    *("", " ", "0", "1", "2", "-1", "128", "1e3", "1e-3", "1e400", "nan", "inf", "-inf", "0x10", "1_0", "٣", "９", "²"),
    *("None", "none", "null", "True", "false", "adam", "sgd", "shapes", "cifar10", "last", "best", "auto", "products"),
    *("\0", "\n", "a\nb", "a\rb", "\x1b[31m", "\ud800", "\u2028", "\u202e", "│ ─ ╭", "---", "--", "-", "=", "@file"),
    *("~", "/", "../..", "%s", "{x}", "$HOME", "`id`", "[red]x[/red]", "[/]", "😀", "a,b", "runs/x", "a b", "bash"),
    *("9" * 19, "9" * 5000, "x" * 5000, "-" * 500, "x" + "-" * 300, "é" * 300, "--help", "-h", "nowhere/x"),
    *("--tyro-print-completion", "--tyro-write-completion"),
)


class CommandLine:
    """Flags of train.py or eval.py."""

    def __init__(self, program: str, folder: pathlib.Path) -> None:
        self.train = program == "train"
        self.flags = flags_of(TrainConfig if self.train else EvalConfig)

    def case(self, rng: random.Random) -> Case:
        args = [rng.choice([*recipes.PRESETS, *WORDS])] if rng.random() < 0.4 else []
        if not self.train and rng.random() < 0.8:
            args = ["runs/x"]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 10])):
            args += self.some_flag(rng)
        names = [errors.shown(part) for arg in args for part in (arg, arg.split("=")[0])]
        names += ["preset"] if self.train and args and not args[0].startswith("-") else []
        names += [name.replace("_", "-") for name in names if name.startswith("--")]
        if not self.train:
            names += ["PATH", "'run'", "RUN", "OTHERS"]
        parse = cli.parse_train if self.train else cli.parse_eval
        load = functools.partial(parse, args)
        return Case(load, tuple(name for name in names if name), check_settings, shown=repr(args)[:2000])

    def some_flag(self, rng: random.Random) -> list[str]:
        flag, word = rng.choice(self.flags), rng.choice(WORDS)
        if rng.random() < 0.2:  # misspelled
            at = rng.randrange(len(flag))
            flag = flag[:at] + rng.choice(["", flag[at] * 2, "_", "-", "\ud800", "x" * 1000]) + flag[at + 1 :]
        match rng.randrange(8):
            case 0:
                return [flag]
            case 1:
                return [f"{flag}={word}"]
            case 2:
                return [word]
            case 3:
                return [flag.replace("-", "_").replace("__", "--", 1), word]
            case 4:
                return [flag, word] * 2
            case 5:
                return [flag, *rng.choices(WORDS, k=rng.choice([2, 5, 300]))]
            case 6:
                return [f"--no-{flag[2:]}"]
            case _:
                return [flag, word]


KINDS: dict[str, tuple[float, Callable[[pathlib.Path], Any]]] = {
    # Share of all cases, and what makes them.
    "binary": (0.12, Binary),
    "pickle": (0.20, Pickle),
    "archive": (0.05, Archive),
    "prepared": (0.10, Prepared),
    "config.json": (0.12, functools.partial(RunFile, "config.json")),
    "dataset.json": (0.08, functools.partial(RunFile, "dataset.json")),
    "statistics.npz": (0.09, functools.partial(Statistics, "statistics.npz")),
    "metrics.jsonl": (0.08, functools.partial(Metrics, "metrics.jsonl")),
    "train flags": (0.09, functools.partial(CommandLine, "train")),
    "eval flags": (0.07, functools.partial(CommandLine, "eval")),
}


def rng_of(seed: int, kind: str, number: int) -> random.Random:
    """The only source of a case's randomness."""
    return random.Random(f"{seed}/{kind}/{number}")


# The long form


def work(connection: Connection, seed: int, cases: list[tuple[str, int]]) -> None:
    """A process that takes the cases in turn and sends (event, ...) tuples."""
    with tempfile.TemporaryDirectory() as folder:
        makers = {}
        for number, kind in enumerate(dict.fromkeys(kind for kind, _ in cases)):
            (own := pathlib.Path(folder, str(number))).mkdir()
            makers[kind] = KINDS[kind][1](own)
            with contextlib.suppress(FaultError):
                judge(makers[kind].case(rng_of(seed, kind, -1)))  # imports what is imported late
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        connection.send(("ready", _peak_memory()))
        for kind, number in cases:
            connection.send(("start", kind, number))
            case = makers[kind].case(rng_of(seed, kind, number))
            start = time.perf_counter()
            try:
                accepted = judge(case)
            except FaultError as fault:
                connection.send(("fault", f"{fault}\n{case.shown[:600]}"))
                break
            connection.send(("done", kind, accepted, time.perf_counter() - start, _peak_memory()))
        if "metrics.jsonl" in makers or "config.json" in makers:
            shutil.rmtree(trained_run().parent)
    connection.send(("end",))


def _peak_memory() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stop(kind: str, number: int, seed: int, reason: str) -> None:
    """Ends the program with what reproduces the case."""
    command = f"python -m tests.stress.fuzz --seed {seed} --kind '{kind}' --first {number} --cases 1"
    sys.exit(f"\n{kind}, case {number}: {reason}\nAgain: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    options = parser.parse_args()

    shares = {options.kind: 1.0} if options.kind else {kind: share for kind, (share, _) in KINDS.items()}
    cases = [(kind, options.first + n) for kind, share in shares.items() for n in range(round(share * options.cases))]
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, options.seed, cases), daemon=True)
    process.start()
    theirs.close()

    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    slowest, peak, before = (0.0, ""), 0.0, 0.0
    running = ("the beginning", -1)
    with tqdm.tqdm(total=len(cases), unit=" cases", dynamic_ncols=True, disable=None) as bar:
        while True:
            try:
                message = connection.recv() if connection.poll(120) else ("fault", "no answer for 120 s")
            except EOFError:
                process.join()
                message = ("fault", f"the process ended with code {process.exitcode}")
            match message:
                case ("ready", before):
                    pass
                case ("start", kind, number):
                    running = kind, number
                case ("done", kind, accepted, seconds, peak):
                    counts[kind]["accepted" if accepted else "refused"] += 1
                    slowest = max(slowest, (seconds, kind))
                    bar.update()
                    bar.set_postfix_str(kind, refresh=False)
                case ("fault", reason):
                    process.kill()
                    bar.close()
                    stop(*running, options.seed, reason)
                case ("end",):
                    break
    process.join()

    from tests.stress import results_file

    figures = {
        "cases": len(cases),
        "failed": 0,
        "kinds": {
            kind: {"cases": count.total(), "accepted": count["accepted"], "refused": count["refused"]}
            for kind, count in counts.items()
        },
        "slowest_case": {"seconds": round(slowest[0], 2), "kind": slowest[1]},
        "memory_mb": {"before_the_first_case": round(before), "peak": round(peak)},
    }
    if not options.kind and not options.first:
        results_file.write(
            "fuzz", f"python -m tests.stress.fuzz --cases {options.cases} --seed {options.seed}", figures
        )
    else:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
