"""CIFAR-10 from its three sources, and what broken ones do: one line of error. For hostile ones see test_hostile.py.

Fabricated batches of 20 images stand for the published ones of 10,000. `CIFAR10_DIR=DIR` adds the real ones, from a
folder that holds both published layouts.
"""

import contextlib
import functools
import hashlib
import http.server
import importlib.abc
import io
import json
import os
import pathlib
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from alexnet_jax.datasets import cifar10
from alexnet_jax.datasets.dataset import Dataset
from alexnet_jax.errors import AlexNetError, UsageError

RECORDS = 20
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
SPLITS = {
    "train": slice(0, 4 * RECORDS),
    "validation": slice(4 * RECORDS, 5 * RECORDS),
    "test": slice(5 * RECORDS, None),
}

load = functools.partial(cifar10.load, records_per_batch=RECORDS)


# Fabricated data: images [120, 32, 32, 3] and labels [120] in the published order.
_rng = np.random.default_rng(0)
IMAGES = _rng.integers(0, 256, (6 * RECORDS, 32, 32, 3), np.uint8)
LABELS = _rng.integers(0, 10, 6 * RECORDS)


def planes(batch: str) -> np.ndarray:
    """uint8 [20, 3072], as published: all red, then all green, then all blue."""
    images = IMAGES[BATCHES.index(batch) * RECORDS :][:RECORDS]
    return np.stack([images[..., channel] for channel in range(3)], axis=1).reshape(RECORDS, 3072)


def labels(batch: str) -> list[int]:
    return LABELS[BATCHES.index(batch) * RECORDS :][:RECORDS].tolist()


def binary(batch: str) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels(batch), planes(batch), strict=True))


def short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def array_opcodes(pixels: bytes, rows: int = RECORDS, dtype: bytes = b"u1") -> bytes:
    """What NumPy 1 wrote in Python 2 for a uint8 array [rows, 3072]."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + short(b"b") + b"\x87Rq\x09"
        b"(K\x01M" + struct.pack("<H", rows) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0a" + short(dtype) + b"K\x00K\x01\x87R"
        b"q\x0b(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    )


def dict_opcodes(**items: bytes) -> bytes:
    """What Python 2 wrote for a dictionary, protocol 2, with opcodes for the values."""
    pairs = b"".join(short(key.encode()) + value for key, value in items.items())
    return b"\x80\x02}q\x01(" + short(b"batch_label") + short(b"a batch") + pairs + b"u."


def label_opcodes(values: list[int]) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def pickled(batch: str) -> bytes:
    return dict_opcodes(labels=label_opcodes(labels(batch)), data=array_opcodes(planes(batch).tobytes()))


def write_binary(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    for batch in BATCHES:
        (folder / f"{batch}.bin").write_bytes(binary(batch))
    return folder


def write_pickles(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    for batch in BATCHES:
        (folder / batch).write_bytes(pickled(batch))
    return folder


def assert_fabricated(dataset: Dataset) -> None:
    assert list(dataset.splits) == ["train", "validation", "test"]
    for name, rows in SPLITS.items():
        images, split_labels = dataset[name].images, dataset[name].labels
        assert images.dtype == np.uint8
        assert images.flags.c_contiguous
        assert split_labels.dtype == np.int32
        np.testing.assert_array_equal(images, IMAGES[rows])
        np.testing.assert_array_equal(split_labels, LABELS[rows])


def failure(data_dir: pathlib.Path | None, *named: object, **options: Any) -> str:
    """The one line with which loading fails."""
    with pytest.raises(AlexNetError) as caught:
        load(data_dir, **options)
    message = str(caught.value)
    assert message.isprintable(), message  # so there is no line break in it
    for text in named:
        assert str(text) in message
    return message


# The published layouts


@pytest.mark.parametrize(
    ("write", "name"), [(write_binary, "cifar-10-batches-bin"), (write_pickles, "cifar-10-batches-py")]
)
def test_published_layouts(write: Callable, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / name)
    for data_dir in (tmp_path, folder):
        dataset = load(data_dir)
        assert_fabricated(dataset)
        assert dataset.name == "cifar10"
        assert dataset.source == str(folder)
        assert dataset.class_names[0] == "airplane"
        assert dataset.class_names[9] == "truck"
    monkeypatch.chdir(folder)
    assert_fabricated(load(pathlib.Path()))


def test_binary_layout_is_preferred(tmp_path: pathlib.Path) -> None:
    write_pickles(tmp_path / "cifar-10-batches-py")
    folder = write_binary(tmp_path / "cifar-10-batches-bin")
    assert load(tmp_path).source == str(folder)


def test_published_layout_goes_before_a_prepared_copy(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    assert load(tmp_path).source == str(folder)


def test_default_places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    second = write_pickles(tmp_path / "tfds" / "cifar-10-batches-py")
    assert load(None).source == str(second)
    first = write_pickles(tmp_path / "data" / "cifar-10-batches-py")
    assert load(None).source == str(first)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:12_345]), "truncated: 12,345 bytes instead of 61,460"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "too long: 61,461 bytes instead of at most 61,460"),
        (lambda path: path.write_bytes(b""), "truncated: 0 bytes"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:3073] + b"\x0a" + path.read_bytes()[3074:]),
            "1 has label 10",
        ),
        (lambda path: path.unlink(), "missing"),
        (lambda path: (path.unlink(), path.mkdir()), "can't be read (Is a directory)"),
    ],
)
def test_broken_binary_batch(damage: Callable, words: str, tmp_path: pathlib.Path) -> None:
    path = write_binary(tmp_path / "cifar-10-batches-bin") / "data_batch_3.bin"
    damage(path)
    failure(tmp_path, path, words)


@pytest.mark.parametrize("name", ["data_batch_5", "test_batch"])
def test_missing_pickle(name: str, tmp_path: pathlib.Path) -> None:
    path = write_pickles(tmp_path / "cifar-10-batches-py") / name
    path.unlink()
    failure(tmp_path, path, "missing", "extract")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: pathlib.Path) -> None:
    path = write_binary(tmp_path / "cifar-10-batches-bin") / "data_batch_2.bin"
    path.chmod(0)
    failure(tmp_path, path, "Permission denied")
    tmp_path.chmod(0)
    try:
        failure(tmp_path, tmp_path, "rights")
    finally:
        tmp_path.chmod(0o700)


def test_missing_folder_is_no_place_for_a_download(tmp_path: pathlib.Path) -> None:
    typo = tmp_path / "cifra"
    failure(typo, typo, "no such folder")
    assert not typo.exists()
    typo.write_text("a file")
    failure(typo, typo, "no such folder")


# Pickles


def replace_batch(tmp_path: pathlib.Path, content: bytes, name: str = "data_batch_2") -> pathlib.Path:
    path = write_pickles(tmp_path / "cifar-10-batches-py") / name
    path.write_bytes(content)
    return path


def test_fabricated_pickle_is_one() -> None:
    content = pickle.loads(pickled("test_batch"), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], planes("test_batch"))
    assert content[b"labels"] == labels("test_batch")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickle_rewritten_by_python_3(protocol: int, tmp_path: pathlib.Path) -> None:
    content = {b"labels": labels("data_batch_2"), b"data": planes("data_batch_2"), b"filenames": [b"a.png"] * RECORDS}
    replace_batch(tmp_path, pickle.dumps(content, protocol))
    assert_fabricated(load(tmp_path))


GOOD_LABELS = label_opcodes(labels("data_batch_2"))
GOOD_DATA = array_opcodes(planes("data_batch_2").tobytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (pickled("data_batch_2")[:-1], "truncated"),
        (pickled("data_batch_2")[:30_000], "truncated"),
        (pickled("data_batch_2")[:50], "truncated"),
        (b"not a pickle", "truncated, or no pickle"),
        (b"\x80\x02N.", "not a dictionary"),
        (b"\x80\x02}.", "not a dictionary"),
        (dict_opcodes(data=GOOD_DATA), "b'labels'"),
        (dict_opcodes(labels=GOOD_LABELS, data=GOOD_LABELS), "b'data'"),
        (dict_opcodes(labels=GOOD_LABELS, data=array_opcodes(bytes(61_440), dtype=b"i1")), "dtype b'i1'"),
        (dict_opcodes(labels=GOOD_LABELS, data=array_opcodes(bytes(61_440), dtype=b"O8")), "dtype b'O8'"),
        (
            dict_opcodes(labels=GOOD_LABELS, data=array_opcodes(bytes(58_368), rows=19)),
            "shape (19, 3072) instead of (20",
        ),
        (dict_opcodes(labels=GOOD_LABELS, data=array_opcodes(bytes(58_368))), "cannot reshape"),
        (dict_opcodes(labels=label_opcodes([1] * 19), data=GOOD_DATA), "19 labels instead of 20"),
        (dict_opcodes(labels=label_opcodes([1] * 7 + [10] + [1] * 12), data=GOOD_DATA), "record 7 has label 10"),
        (dict_opcodes(labels=b"](" + 20 * b"J\xff\xff\xff\xff" + b"e", data=GOOD_DATA), "label -1"),
        (dict_opcodes(labels=b"](" + 20 * b"\x88" + b"e", data=GOOD_DATA), "record 0 has a bool as label"),
        (dict_opcodes(labels=b"](" + 20 * b"}" + b"e", data=GOOD_DATA), "record 0 has a dict as label"),
    ],
)
def test_broken_pickle(content: bytes, words: str, tmp_path: pathlib.Path) -> None:
    path = replace_batch(tmp_path, content)
    failure(tmp_path, path, words, "extract the published archive again")


def test_every_truncation_of_a_pickle(tmp_path: pathlib.Path) -> None:
    whole = pickled("data_batch_1")
    path = replace_batch(tmp_path, whole, "data_batch_1")
    ends = [*range(0, 300), *range(300, len(whole), 4_001), *range(len(whole) - 20, len(whole))]
    for end in ends:
        path.write_bytes(whole[:end])
        failure(tmp_path, path, "truncated")


def test_pickle_beyond_the_cap_is_not_read(tmp_path: pathlib.Path) -> None:
    path = replace_batch(tmp_path, b"")
    os.truncate(path, 64 * 1024**2 + 1)  # sparse
    failure(tmp_path, path, "67,108,865 bytes instead of at most 67,108,864")


def test_pickle_that_copies_a_string_again_and_again(tmp_path: pathlib.Path) -> None:
    text = b"X" + struct.pack("<I", 100_000) + bytes(100_000) + b"q\x00"
    copy = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    replace_batch(tmp_path, b"\x80\x02(" + text + copy * 1_000 + b"t.")
    failure(tmp_path, "encodes more bytes than it has")


# TensorFlow Datasets


class Server:
    """An archive on 127.0.0.1; `status` answers GET, and `before_get` runs before that."""

    def __init__(self, content: bytes):
        self.content = content
        self.status = 200
        self.requests: list[str] = []
        self.before_get: Callable[[], object] = lambda: None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(200)

            def do_GET(self) -> None:
                outer.before_get()
                self.answer(outer.status)
                if outer.status == 200:
                    self.wfile.write(outer.content)

            def answer(self, status: int) -> None:
                outer.requests.append(self.command)
                self.send_response(status)
                self.send_header("Content-Length", str(len(outer.content) if status == 200 else 0))
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/cifar-10-binary.tar.gz"

    def register(self, monkeypatch: pytest.MonkeyPatch, content: bytes | None = None) -> None:
        """Has TFDS expect the checksum of `content`, by default what is served."""
        from tensorflow_datasets.core import utils
        from tensorflow_datasets.core.download import checksums

        content = self.content if content is None else content
        info = checksums.UrlInfo(
            utils.Size(len(content)), hashlib.sha256(content).hexdigest(), "cifar-10-binary.tar.gz"
        )
        monkeypatch.setitem(checksums.get_all_url_infos(), self.url, info)


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    server = Server(content)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def archive() -> dict[str, bytes]:
    """As published: the batches in another order, among other files. And a file that would break out of a folder."""
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n", "../../evil": b"evil"}
    return files | {f"cifar-10-batches-bin/{batch}.bin": binary(batch) for batch in sorted(BATCHES, reverse=True)}


def files_under(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class NoTensorFlow(importlib.abc.MetaPathFinder):
    """Has the import of TensorFlow fail as it does where it isn't installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(tar(archive())) as served:
        served.register(monkeypatch)
        yield served


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """TFDS's data_dir after a download, which the tests only read."""
    root = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as monkeypatch, serving(tar(archive())) as served:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        served.register(monkeypatch)
        blocker = NoTensorFlow()
        sys.meta_path.insert(0, blocker)
        try:
            dataset = load(root, url=served.url)
        finally:
            sys.meta_path.remove(blocker)
    assert_fabricated(dataset)
    assert dataset.source == str(root / "cifar10" / "3.0.2")
    return root


@pytest.fixture
def copy(prepared: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A prepared data set for a test to damage."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return tmp_path / "tfds" / "cifar10" / "3.0.2"


CLOSED = "http://127.0.0.1:1/cifar-10-binary.tar.gz"


def test_prepared_copy_is_read_without_network(prepared: pathlib.Path) -> None:
    for data_dir in (prepared, prepared / "cifar10" / "3.0.2"):
        assert_fabricated(load(data_dir, url=CLOSED))


def test_default_place_of_a_prepared_copy(
    prepared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_fabricated(load(None, url=CLOSED))


def test_preparation_leaves_the_data_set_alone(prepared: pathlib.Path) -> None:
    assert [path.name for path in prepared.iterdir()] == ["cifar10"]
    assert [path.name for path in (prepared / "cifar10").iterdir()] == ["3.0.2"]
    assert not list(prepared.parent.rglob("evil"))


def test_official_builder_reads_what_was_prepared(prepared: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=prepared, file_format="array_record")
    assert type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
    assert builder.info.full_name == "cifar10/3.0.2"
    assert tuple(builder.info.features["label"].names) == cifar10.CLASS_NAMES
    for split, first, size in (("train", 0, 5 * RECORDS), ("test", 5 * RECORDS, RECORDS)):
        examples = list(builder.as_data_source(split))
        numbers = [int(example["id"].decode().removeprefix(f"{split}_")) for example in examples]
        assert sorted(numbers) == list(range(size))
        assert numbers != list(range(size))  # shuffled on disk: restoring the order is no idle step
        for number, example in zip(numbers, examples, strict=True):
            np.testing.assert_array_equal(example["image"], IMAGES[first + number])
            assert example["label"] == LABELS[first + number]


def test_download_to_the_default_place(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "new" / "tfds"))
    assert_fabricated(load(None, url=server.url))
    assert (tmp_path / "new" / "tfds" / "cifar10" / "3.0.2").is_dir()
    assert server.requests == ["HEAD", "GET"]
    output = capfd.readouterr()
    assert output.out == ""
    assert "it/s" not in output.err  # no progress bars, as this is no terminal
    assert_fabricated(load(None, url=server.url))
    assert server.requests == ["HEAD", "GET"]


def test_wrong_checksum(server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, server.content = server.content, server.content[:-1] + b"x"
    found = hashlib.sha256(server.content).hexdigest()
    failure(
        tmp_path, server.url, "isn't the published archive", hashlib.sha256(good).hexdigest(), found, url=server.url
    )
    assert files_under(tmp_path) == []
    server.content = good
    assert_fabricated(load(tmp_path, url=server.url))


def test_unregistered_checksum(tmp_path: pathlib.Path) -> None:
    with serving(tar(archive())) as server:
        failure(tmp_path, server.url, "checksums", url=server.url)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"cifar-10-batches-bin/test_batch.bin": b"short"}, "truncated: 5 bytes"),
        ({"cifar-10-batches-bin/test_batch.bin": bytes(100_000)}, "too long"),
        ({"cifar-10-batches-bin/test_batch.bin": b"\xff" * RECORDS * 3073}, "label 255"),
        ({}, "lacks data_batch_1, data_batch_2"),
    ],
)
def test_registered_archive_of_something_else(
    files: dict[str, bytes], words: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tar(files)) as server:
        server.register(monkeypatch)
        failure(tmp_path, server.url, words, url=server.url)
    assert files_under(tmp_path) == []


def test_failing_server_is_given_up(server: Server, tmp_path: pathlib.Path) -> None:
    server.status = 503
    start = time.monotonic()
    failure(tmp_path, server.url, "503", url=server.url)
    assert time.monotonic() - start < 10
    assert server.requests == ["HEAD"] + ["GET"] * 4
    assert files_under(tmp_path) == []


def test_two_processes_prepare_at_once(server: Server, prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    server.before_get = lambda: shutil.copytree(prepared / "cifar10", tmp_path / "cifar10", dirs_exist_ok=True)
    assert_fabricated(load(tmp_path, url=server.url))
    assert server.requests == ["HEAD", "GET"]


def test_no_network(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    failure(tmp_path, tmp_path, "127.0.0.1:1 can't be reached", "refused", "--data-dir", "quickstart", url=CLOSED)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    failure(None, tmp_path / "data", tmp_path / "tfds", "cifar-10-batches-py", "cifar-10-batches-bin", url=CLOSED)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - start < 5


def test_name_look_up_that_hangs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: over.wait(20))
    monkeypatch.setattr(cifar10, "_PROBE_SECONDS", 0.2)
    start = time.monotonic()
    failure(tmp_path, "www.cs.toronto.edu can't be reached (no answer in 0.2 s)")
    assert time.monotonic() - start < 5
    over.set()


def test_server_that_never_answers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "_PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        failure(tmp_path, "can't be reached", url=f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar.gz")


def test_archive_that_is_gone(tmp_path: pathlib.Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as gone:
        thread = threading.Thread(target=gone.handle_request)
        thread.start()
        failure(tmp_path, "can't be reached", "404", url=f"http://127.0.0.1:{gone.server_port}/x.tar.gz")
        thread.join()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "gone", "no information", "information cut"])
def test_damaged_prepared_copy(damage: str, copy: pathlib.Path) -> None:
    (shard,) = copy.glob("cifar10-train.array_record*")
    content = shard.read_bytes()
    match damage:
        case "truncated":
            shard.write_bytes(content[: len(content) // 2])
        case "empty":
            shard.write_bytes(b"")
        case "flipped":
            shard.write_bytes(
                content[:100_000] + bytes(byte ^ 255 for byte in content[100_000:100_064]) + content[100_064:]
            )
        case "gone":
            shard.unlink()
        case "no information":
            (copy / "dataset_info.json").unlink()
        case "information cut":
            (copy / "dataset_info.json").write_text("{")
    failure(copy.parents[1], copy, "damaged or incomplete", "delete", url=CLOSED)


def test_prepared_copy_of_another_size(copy: pathlib.Path) -> None:
    failure(copy.parents[1], copy, "train has 100 images instead of 50,000", records_per_batch=10_000, url=CLOSED)


def test_prepared_copy_with_repeated_ids(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alexnet_jax.datasets import cifar10_tfds

    with monkeypatch.context() as patch:
        patch.setattr(cifar10_tfds, "_example_id", lambda split, index: f"{split}_{index // 2:05d}")
        cifar10_tfds.prepare(tmp_path, url=server.url, records_per_batch=RECORDS)
    failure(tmp_path, "repeated or unknown", url=CLOSED)


def test_prepared_copy_that_needs_tensorflow(copy: pathlib.Path) -> None:
    path = copy / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    failure(copy.parents[1], copy, "tfrecord instead of array_record", "--data-dir", url=CLOSED)


def test_published_layout_does_not_import_tfds(tmp_path: pathlib.Path) -> None:
    write_binary(tmp_path / "cifar-10-batches-bin")
    code = (
        "import pathlib, sys; from alexnet_jax.datasets import cifar10; "
        f"cifar10.load(pathlib.Path({str(tmp_path)!r}), records_per_batch={RECORDS}); "
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The real data


@pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR names no folder with both published layouts")
def test_real_data_is_the_same_from_every_source(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = pathlib.Path(os.environ["CIFAR10_DIR"])
    folder = published / "cifar-10-batches-bin"
    content = tar({f"cifar-10-batches-bin/{batch}.bin": (folder / f"{batch}.bin").read_bytes() for batch in BATCHES})
    from_binary = cifar10.load(folder)
    assert {name: split.images.shape for name, split in from_binary.splits.items()} == {
        "train": (40_000, 32, 32, 3),
        "validation": (10_000, 32, 32, 3),
        "test": (10_000, 32, 32, 3),
    }
    assert from_binary["train"].labels[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile
    assert cifar10.load(published / "cifar-10-batches-py").fingerprint() == from_binary.fingerprint()
    with serving(content) as server:
        server.register(monkeypatch)
        assert cifar10.load(tmp_path, url=server.url).fingerprint() == from_binary.fingerprint()


def test_without_a_home_directory_a_download_goes_to_data(monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    assert cifar10._default_tfds_dir() == []  # not a folder named "~"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/x")
    with pytest.raises(UsageError, match=r"^TFDS_DATA_DIR=~/x: this user has no home directory"):
        cifar10._default_tfds_dir()
