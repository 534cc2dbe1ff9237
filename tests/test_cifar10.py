"""CIFAR-10 from its sources; broken sources cause an error of one line. For hostile pickles see test_hostile.py.

Fabricated batches of 20 images replace the published ones of 10,000. `CIFAR10_DIR=DIR` adds the real ones, from a
folder that contains both published layouts.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.abc
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from alexnet_jax import data
from alexnet_jax.config.settings import DataConfig
from alexnet_jax.data import cifar10, cifar10_download, cifar10_files
from alexnet_jax.data.cifar10_files import BINARY, PICKLES
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.errors import AlexNetError, UsageError
from tests import python_2

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


def pickled(batch: str, **items: object) -> bytes:
    """As Python 2 wrote it, in protocol 2, with other `items`."""
    content = {"batch_label": "a batch", "labels": labels(batch), "data": planes(batch)}
    return python_2.dumps(content | items)


def write_batches(folder: pathlib.Path, layout: cifar10_files.Layout) -> pathlib.Path:
    folder.mkdir(parents=True)
    for batch in BATCHES:
        (folder / f"{batch}{layout.suffix}").write_bytes(pickled(batch) if layout == PICKLES else binary(batch))
    return folder


def write_binary(folder: pathlib.Path) -> pathlib.Path:
    return write_batches(folder, BINARY)


def write_pickles(folder: pathlib.Path) -> pathlib.Path:
    return write_batches(folder, PICKLES)


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


@pytest.mark.parametrize("layout", [BINARY, PICKLES])
def test_published_layouts(layout, tmp_path, monkeypatch):
    folder = write_batches(tmp_path / layout.folder, layout)
    for data_dir in (tmp_path, folder):
        dataset = load(data_dir)
        assert_fabricated(dataset)
        assert dataset.name == "cifar10"
        assert dataset.source == str(folder)
        assert dataset.class_names[0] == "airplane"
        assert dataset.class_names[9] == "truck"
    monkeypatch.chdir(folder)
    assert_fabricated(load(pathlib.Path()))


def test_default_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    second = write_pickles(tmp_path / "tfds" / "cifar-10-batches-py")
    assert load(None).source == str(second)
    first = write_pickles(tmp_path / "data" / "cifar-10-batches-py")
    assert load(None).source == str(first)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (binary("data_batch_3")[:12_345], "truncated: 12,345 bytes instead of 61,460"),
        (binary("data_batch_3") + b"\0", "too long: 61,461 bytes instead of 61,460"),
        (b"", "truncated: 0 bytes"),
        (binary("data_batch_3")[:3073] + b"\x0a" + binary("data_batch_3")[3074:], "1 has label 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer"),
        (None, "missing"),
    ],
)
def test_broken_binary_batch(content, words, tmp_path):
    path = write_binary(tmp_path / "cifar-10-batches-bin") / "data_batch_3.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    failure(tmp_path, path, words, "; extract the published archive again")
    path.unlink(missing_ok=True)
    path.mkdir()
    failure(tmp_path, path, "can't be read (Is a directory)")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda records: records.__setitem__(5, records[0]), "test_batch is a copy of data_batch_1"),
        (lambda records: records.__setitem__(1, records[0]), "data_batch_2 is a copy of data_batch_1"),
        (lambda records: records[2][:10].fill(0), "the training batches have 10 image(s) with all pixels 0"),
        (lambda records: records[5][7, 1:].fill(0), "the test batch has 1 image(s) with all pixels 0"),
        (
            lambda records: records[3][0, :1].fill(9),
            "training batches have 9 images of class airplane instead of 10",
        ),
        (lambda records: records[5][0, :1].fill(9), "the test batch has 1 images of class airplane instead of 2"),
    ],
)
def test_full_size_copy_that_is_not_cifar10(damage, words, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS_PER_BATCH", RECORDS)  # so that the fabricated batches count as full
    folder = write_binary(tmp_path / "cifar-10-batches-bin")
    records = [np.frombuffer(bytearray(binary(batch)), np.uint8).reshape(RECORDS, 3073) for batch in BATCHES]

    def write() -> None:
        for batch, content in zip(BATCHES, records, strict=True):
            (folder / f"{batch}.bin").write_bytes(content.tobytes())

    for batch in records:
        batch[:, 0] = np.arange(RECORDS) % 10  # as published, each class has the same number
    write()
    assert len(load(folder)["train"]) == 4 * RECORDS
    damage(records)
    write()
    failure(folder, folder, words, "the copy is damaged or is not CIFAR-10; download or extract the published archive")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = write_binary(tmp_path / "cifar-10-batches-bin") / "data_batch_2.bin"
    path.chmod(0)
    failure(tmp_path, path, "Permission denied")
    tmp_path.chmod(0)
    try:
        failure(tmp_path, tmp_path, "rights")
    finally:
        tmp_path.chmod(0o700)


def test_missing_folder_is_no_place_for_a_download(tmp_path):
    typo = tmp_path / "cifra"
    failure(typo, typo, "no such file or folder")
    assert not typo.exists()


def test_folder_of_batches_under_any_name(tmp_path):
    folder = write_pickles(tmp_path / "my copy")
    assert load(folder).source == str(folder)
    for batch in BATCHES:
        (folder / f"{batch}.bin").write_bytes(binary(batch))
        (folder / batch).write_bytes(b"a pickle that is not read")
    assert_fabricated(load(folder))
    (folder / "data_batch_1.bin").unlink()
    failure(folder, folder / "data_batch_1.bin", "missing")


# Pickles


def replace_batch(tmp_path: pathlib.Path, content: bytes, name: str = "data_batch_2") -> pathlib.Path:
    path = write_pickles(tmp_path / "cifar-10-batches-py") / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickle_rewritten_by_python_3(protocol, tmp_path):
    content = {b"labels": labels("data_batch_2"), b"data": planes("data_batch_2"), b"filenames": [b"a.png"] * RECORDS}
    replace_batch(tmp_path, pickle.dumps(content, protocol))
    assert_fabricated(load(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"not a pickle", "truncated, or no pickle"),
        (b"\x80\x02N.", "not a dictionary"),
        (b"\x80\x02}.", "not a dictionary"),
        (python_2.dumps({"data": planes("data_batch_2")}), "b'labels'"),
        (pickled("data_batch_2", data=[1]), "b'data'"),
        (pickled("data_batch_2", data=planes("data_batch_2").astype(np.int8)), "an array of dtype i1"),
        (pickled("data_batch_2", data=planes("data_batch_2").astype(np.float32)), "b'data' is float32 of"),
        (pickled("data_batch_2", data=np.array([1], object)), "b'data'"),
        (pickled("data_batch_2", data=planes("data_batch_2")[:19]), "shape (19, 3072) instead of uint8 of (20"),
        (pickled("data_batch_2").replace(b"K\x14M\x00\x0c", b"K\x15M\x00\x0c"), "cannot reshape"),
        (pickled("data_batch_2", labels=[1] * 19), "19 labels instead of 20"),
        (pickled("data_batch_2", labels=[1] * 7 + [10] + [1] * 12), "record 7 has label 10"),
        (pickled("data_batch_2", labels=[-1] * 20), "label -1"),
        (pickled("data_batch_2", labels=[0] * 19 + [2**500]), "record 19 has label 32733"),
        (pickled("data_batch_2", labels=[True] * 20), "record 0 has a bool as label"),
        (pickled("data_batch_2", labels=[{} for _ in range(20)]), "record 0 has a dict as label"),
    ],
)
def test_broken_pickle(content, words, tmp_path):
    path = replace_batch(tmp_path, content)
    failure(tmp_path, path, words, "extract the published archive again")


def test_every_truncation_of_a_pickle(tmp_path):
    whole = pickled("data_batch_1")
    path = replace_batch(tmp_path, whole, "data_batch_1")
    ends = [*range(0, 300), *range(300, len(whole), 4_001), *range(len(whole) - 20, len(whole))]
    for end in ends:
        path.write_bytes(whole[:end])
        failure(tmp_path, path, "truncated")


def test_pickle_beyond_the_cap_is_not_read(tmp_path):
    path = replace_batch(tmp_path, b"")
    os.truncate(path, 64 * 1024**2 + 1)  # sparse
    failure(tmp_path, path, "67,108,865 bytes instead of at most 67,108,864")


def test_pickle_that_copies_a_string_again_and_again(tmp_path):
    text = b"X" + struct.pack("<I", 100_000) + bytes(100_000) + b"q\x00"
    copy = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    replace_batch(tmp_path, b"\x80\x02(" + text + copy * 1_000 + b"t.")
    failure(tmp_path, "encodes more bytes than it has")


# Archives


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def published(layout: cifar10_files.Layout, folder: str = "") -> dict[str, bytes]:
    """As published: the batches in another order, among other files. And a file that would break out of a folder."""
    files = {f"{layout.folder}/readme.html": b"<html>\n", "../../evil": b"evil"}
    content = binary if layout.suffix else pickled
    return files | {
        f"{folder or layout.folder}/{batch}{layout.suffix}": content(batch) for batch in sorted(BATCHES, reverse=True)
    }


BINARY_TAR, PICKLES_TAR = (tar(published(layout)) for layout in (BINARY, PICKLES))
BINARY_ARCHIVE, PICKLES_ARCHIVE = (gzip.compress(content, 1, mtime=0) for content in (BINARY_TAR, PICKLES_TAR))


def files_under(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python.tar", "photos", "data (1).tgz"])
@pytest.mark.parametrize("content", [BINARY_ARCHIVE, PICKLES_ARCHIVE, BINARY_TAR, PICKLES_TAR])
def test_archive(content, name, tmp_path):
    path = tmp_path / "archives" / name
    path.parent.mkdir()
    path.write_bytes(content)
    for data_dir in [path] if name == "photos" else [path, path.parent]:
        dataset = load(data_dir)
        assert_fabricated(dataset)
        assert dataset.source == str(path)
    assert files_under(tmp_path) == [f"archives/{name}"]


def test_archive_with_an_upper_case_suffix(tmp_path):
    path = tmp_path / "CIFAR-10-BINARY.TAR"
    path.write_bytes(BINARY_TAR)
    assert_fabricated(load(tmp_path))


@pytest.mark.parametrize("name", ["cifar-10-python/cifar-10-batches-py", "my copy"])
def test_batches_one_folder_deeper(name, tmp_path):
    """As Kaggle and Keras store them."""
    folder = write_pickles(tmp_path / "data" / name)
    assert load(tmp_path / "data").source == str(folder)
    other = write_binary(tmp_path / "data" / "other")
    failure(
        tmp_path / "data", "several of its folders contain batches of CIFAR-10", name, "other", "give --data-dir one"
    )
    (tmp_path / "data" / "a.tar").write_bytes(BINARY_TAR)
    assert load(tmp_path / "data").source == str(tmp_path / "data" / "a.tar")
    assert load(other).source == str(other)


@pytest.mark.parametrize("folder", [".", "/", "../..", "a/b/cifar-10-batches-bin", "./cifar-10-batches-py"])
def test_archive_with_other_folders_in_it(folder, tmp_path):
    path = tmp_path / "archive"
    link = header("link", 100, type=tarfile.SYMTYPE)  # whatever its size: it has no data
    files = {f"{folder}/._data_batch_1.bin": b"macOS"} | published(BINARY, folder)
    path.write_bytes(link + tar(files))
    assert_fabricated(load(path))
    path.write_bytes(tar(published(BINARY, folder) | {f"other/{batch}": b"not read" for batch in BATCHES}))
    assert_fabricated(load(path))


def test_order_of_what_a_folder_holds(tmp_path):
    """Whatever comes later in the documented order is broken: it must not be read."""
    for name in (
        "one folder deeper",
        "a.tgz",
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
        "cifar10/3.0.2",
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        ".",
    ):
        path = tmp_path / name
        if name == "cifar10/3.0.2":
            path.mkdir(parents=True)
            failure(tmp_path, path, "damaged or incomplete")
        elif path.suffix in (".gz", ".tgz"):
            path.write_bytes(PICKLES_ARCHIVE)
            assert load(tmp_path).source == str(path)
            path.write_bytes(b"\x1f\x8bbroken")
        else:
            for batch in BATCHES:
                path.mkdir(exist_ok=True)
                (path / batch).write_bytes(pickled(batch))
            assert load(tmp_path).source == str(path)
            (path / "data_batch_1").write_bytes(b"broken")


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BINARY_ARCHIVE[:200_000], "truncated; delete it and download it again"),
        (BINARY_ARCHIVE[:-1], "truncated; delete it and download it again"),  # all batches are in it
        (BINARY_ARCHIVE[:5], "truncated"),
        (BINARY_TAR[:200_000], "truncated"),
        (BINARY_ARCHIVE[:-8] + bytes(4) + BINARY_ARCHIVE[-4:], "damaged"),  # the checksum
        (damaged(BINARY_ARCHIVE, 150_000), "damaged"),
        (damaged(BINARY_TAR, 512 * 2 + 100), "damaged"),  # a header
        (gzip.compress(b"a text"), "truncated"),
        (gzip.compress(b"no archive " * 100), "damaged, or not a tar archive"),
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS"),
        (b"PK\3\4" + bytes(1000), "a zip file"),
        (bytes(10_000), "neither a gzip nor a tar file"),
        (gzip.compress(tar({})), "not an archive of CIFAR-10"),
        (
            tar({"cifar-10-batches-bin/test_batch.bin": b"short"}),
            "test_batch.bin: truncated: 5 bytes instead of 61,460",
        ),
        (tar({"x/test_batch.bin": bytes(100_000)}), "test_batch.bin: too long: 100,000 bytes instead of 61,"),
        (tar({"x/test_batch.bin": b"\xff" * RECORDS * 3073}), "test_batch.bin: record 0 has label 255"),
        (tar({"x/test_batch": b"\x80\x02cos\nsystem\n."}), "test_batch: truncated, or no pickle"),
        (tar({"x/data_batch_2.bin": binary("data_batch_2")}), "lacks data_batch_1, data_batch_3, data_batch_4, data_b"),
        (tar({"cifar-100-python/train": b"x", "cifar-100-python/test": b"x"}), "CIFAR-100"),
        (tar({"a/train": b"x", "a/test": b"x", "a/meta": b"x"}), "CIFAR-100"),
        (tar({"a/train.bin": bytes(3074 * 4)}), "CIFAR-100"),
        (tar({"cifar-10-batches-mat/data_batch_1.mat": b"x"}), "the MATLAB version"),
        (tar({"x/data_batch_1.bin": bytes(3074 * RECORDS)}), "as CIFAR-100 has"),
        (tar({"x/data_batch_1": python_2.dumps({"fine_labels": [1]})}), "CIFAR-100's labels"),
        (tar({f"{n}/data_batch_1.bin": binary("data_batch_1") for n in "xy"}), "lacks data_batch_2"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # gzip writes the time
)
def test_broken_archive(content, words, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(content)
    for data_dir in (path, tmp_path):
        failure(data_dir, path, words)
    assert files_under(tmp_path) == [path.name]


def test_every_truncation_of_an_archive(tmp_path):
    path = tmp_path / "archive"
    ends = [
        *range(2, 40),
        *range(40, len(BINARY_ARCHIVE), 40_009),
        *range(len(BINARY_ARCHIVE) - 12, len(BINARY_ARCHIVE)),
    ]
    for end in ends:
        path.write_bytes(BINARY_ARCHIVE[:end])
        failure(path, path, "truncated")


def header(name: str, size: int, **fields: Any) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def headers(**fields: Any) -> bytes:
    """Of all batches."""
    return b"".join(header(f"cifar-10-batches-bin/{batch}.bin", 0, **fields) for batch in BATCHES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            headers(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "not an archive of CIFAR-10",
        ),
        (headers(type=tarfile.LNKTYPE, linkname="../../x"), "not an archive of CIFAR-10"),
        (
            headers(type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            "not an archive of CIFAR-10",
        ),
        (headers(type=tarfile.FIFOTYPE), "not an archive of CIFAR-10"),
        (header("data_batch_1.bin", 2**40), "too long: 1,099,511,627,776 bytes"),
        (header("data_batch_1", 2**40), "too long"),
        (header("data_batch_1.bin", -1), "no size"),
        (header("x", 2**40) + bytes(10_000), "truncated"),
        (header("x", 0, type=tarfile.GNUTYPE_SPARSE), "sparse"),
        (header("x", 2**33, type=tarfile.XHDTYPE), "truncated"),  # tarfile would try to read 8 GB
        (header("x", 2**33, type=tarfile.GNUTYPE_LONGNAME), "truncated"),
        (header("x", 0) * 10_001, "more than 10,000 members"),
        (tar({"data_batch_1.bin": binary("data_batch_1")})[:62_464] * 2, "data_batch_1.bin twice"),
        (header("x\n\x1b[31m/data_batch_1.bin", 0), r"x\n\x1b[31m/data_batch_1.bin: truncated"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, functools.partial(gzip.compress, compresslevel=1)])
def test_hostile_archive(content, words, pack, tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(pack(content))
    failure(path, path, words)
    assert files_under(tmp_path) == ["archive"]


def test_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("alexnet_jax.data.cifar10_files.MAX_ARCHIVE_BYTES", 4_000_000)
    path = tmp_path / "archive"
    for zeros in (tar({"x": bytes(5_000_000)} | published(BINARY)), BINARY_TAR + bytes(5_000_000)):
        path.write_bytes(gzip.compress(zeros, 1))
        failure(path, path, "it unpacks to more than 4,000,000 bytes")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train", "test", "meta"], "this is CIFAR-100"),
        (["cifar-100-python/train"], "this is CIFAR-100"),
        (["cifar-100-binary.tar.gz"], "this is CIFAR-100"),
        (["train.bin"], "this is CIFAR-100"),
        (["data_batch_1.mat"], "the MATLAB version"),
        (["cifar-10-batches-mat/x"], "the MATLAB version"),
        (["cifar-10-python.tar.gz.part"], "an unfinished download"),
        (["Unconfirmed cifar.crdownload"], "an unfinished download"),
        (["CIFAR.TAR.GZ.PART"], "an unfinished download"),
        (["cifar-10-batches-py.zip", "x"], "(it has cifar-10-batches-py.zip, which is not read: unpack it if it is"),
        (["cifar\n10.tar.gz"], "contains no CIFAR-10"),
        (["cifar10-copy.tar.gz"], "neither a gzip nor a tar file"),
        (["train/a.png", "test/a.png"], "contains no CIFAR-10"),
        (["other.tar.gz", "train.txt"], "contains no CIFAR-10"),
        ([], "contains no CIFAR-10, neither data_batch_1 nor one of cifar-10-batches-bin"),
    ],
)
def test_folder_of_something_else(names, words, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 3074)
    failure(tmp_path, tmp_path, words)
    assert len(files_under(tmp_path)) == len(names)  # --data-dir is no place for a download


def test_file_that_is_no_archive(tmp_path):
    batch = write_binary(tmp_path / "batches") / "data_batch_1.bin"
    failure(batch, batch, "one of six batches; set --data-dir to its folder")
    train = tmp_path / "train.bin"
    train.write_bytes(bytes(3074))
    failure(train, train, "CIFAR-100")
    os.mkfifo(tmp_path / "pipe")
    failure(tmp_path / "pipe", "it is not a regular file")


# A download


class Server:
    """An archive on 127.0.0.1.

    Attributes:
      content: what is served, in the name of any file.
      acts: kinds of the next answers, one each; later ones are good. See `Handler.do_GET`.
      ranges: the Range header of each request.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.acts: list[str] = []
        self.ranges: list[str | None] = []
        self.over = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content, requested = outer.content, self.headers["Range"]
                outer.ranges.append(requested)
                act = outer.acts.pop(0) if outer.acts else "good"
                start = int(requested.removeprefix("bytes=").removesuffix("-")) if requested else 0
                rest = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
                everything = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
                match act:
                    case "redirect":
                        self.send(302, b"", Location="/elsewhere/x.tar.gz")
                    case "redirect for ever":
                        outer.acts.append(act)
                        self.send(302, b"", Location=self.path)
                    case "silence":
                        outer.over.wait(5)
                    case "page":
                        self.send(200, b"<html>log in</html>", None)
                    case "no length":
                        self.send(200, content, None)
                    case "endless":
                        self.send(200, content + bytes(1_000_000), None)
                    case "chunked":
                        self.send_chunked(content)
                    case "no range, chunked, cut":
                        self.send_chunked(content[: len(content) // 2])
                    case "compressed again":
                        self.send_chunked(gzip.compress(content))
                    case "other length":
                        self.send(200, content[:1000])
                    case "label":
                        self.send(200, content, **{"Content-Encoding": "gzip"})
                    case "wrong range":
                        self.send(206, content, **everything)
                    case "good" | "cut" if start:
                        self.send(206, content[start:], cut=act == "cut", **rest)
                    case "good" | "cut" | "no range" | "no range, cut":
                        self.send(200, content, cut=act.endswith("cut"))
                    case _:
                        self.send(int(act), b"")

            def send_chunked(self, body: bytes) -> None:
                chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                self.send(200, chunks, None, **{"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"})

            def send(
                self, status: int, body: bytes, length: int | None = -1, cut: bool = False, **headers: str
            ) -> None:
                self.send_response(status)
                if length is not None:
                    self.send_header("Content-Length", str(len(body) if length < 0 else length))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has left
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/cifar-10-binary.tar.gz"

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, *contents: bytes) -> None:
    names = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
    archives = [
        cifar10_download.Published(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in zip(names, contents, strict=False)
    ]
    monkeypatch.setattr(cifar10_download, "PUBLISHED", tuple(archives))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An isolated environment: the cache, the default places, the published archives; no proxy and no waiting."""
    world = tmp_path_factory.mktemp("world")
    monkeypatch.chdir(world)
    monkeypatch.setenv("TFDS_DATA_DIR", str(world / "tfds"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("ALEXNET_JAX_DATA_URL", raising=False)
    monkeypatch.setattr(cifar10_download, "cache_folder", lambda: world / "cache")
    monkeypatch.setattr(cifar10_download, "PAUSE_SECONDS", 0.0)
    publish(monkeypatch, BINARY_ARCHIVE, PICKLES_ARCHIVE)
    return world / "cache"


@pytest.fixture
def server():
    with Server(BINARY_ARCHIVE).running() as running:
        yield running


def partial_of(cache: pathlib.Path, url: str) -> pathlib.Path:
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"


CLOSED = "http://127.0.0.1:1/cifar-10-binary.tar.gz"
HALF = len(BINARY_ARCHIVE) // 2
REST = f"bytes={HALF}-"


@pytest.mark.parametrize("content", [BINARY_ARCHIVE, PICKLES_ARCHIVE])
def test_download(content, server, cache, capfd):
    server.content = content
    dataset = load(None, url=server.url)
    assert_fabricated(dataset)
    name = "cifar-10-binary.tar.gz" if content == BINARY_ARCHIVE else "cifar-10-python.tar.gz"
    assert dataset.source == str(cache / name)
    assert files_under(cache) == [name, "download.lock"]
    output = capfd.readouterr()
    assert output.out == ""
    assert "if you have cifar-10-python.tar.gz, stop and use --data-dir FILE; `python train.py quick" in output.err
    assert re.search(r"CIFAR-10: \S+ of 3\d\dk, \S+B/s, \S+ left\n", output.err)  # no bar, as this is no terminal
    assert_fabricated(load(None, url=CLOSED))
    assert server.ranges == [None]


def test_slow_host_is_named_as_such(server, monkeypatch, capfd):
    monkeypatch.setattr(cifar10_download, "URL", server.url)
    assert_fabricated(load(None))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "--data-dir" in line]
    assert "127.0.0.1" in line
    assert "is slow (about 70 kB/s, 40 minutes): if you have cifar-10-python.tar.gz" in line


@pytest.mark.parametrize(
    ("acts", "ranges"),
    [
        (["redirect"], [None, None]),
        (["no length"], [None]),
        (["endless"], [None]),
        (["label"], [None]),
        (["chunked"], [None]),
        (["cut"], [None, REST]),
        (["cut", "redirect"], [None, REST, REST]),
        (["cut", "no range"], [None, REST]),
        (["cut", "page", "416"], None),
        (["cut", "416"], [None, REST, None]),
        (["cut", "wrong range"], [None, REST, None]),
        (["cut", "500", "503", "404"], [None, REST, REST, REST, REST]),
        (["cut", "no range", "cut", "cut"], [None, REST]),
    ],
)
def test_download_with_faults(acts, ranges, server, cache, tmp_path):
    server.acts = list(acts)
    if "page" in acts:  # of a network that asks to log in: what is there is kept
        failure(None, server.url, "not a gzip file (it begins with <html>log in</html>)", url=server.url)
        assert partial_of(cache, server.url).stat().st_size == HALF
    assert_fabricated(load(None, url=server.url))
    assert files_under(cache) == ["cifar-10-binary.tar.gz", "download.lock"]
    assert ranges is None or server.ranges == ranges


@pytest.mark.parametrize(
    ("acts", "words"),
    [
        (["404"], "can't be reached (HTTP Error 404: Not Found)"),
        (["403"], "403"),
        (["500"], "500"),
        (["416"], "416"),
        (["page"], "not a gzip file (it begins with <html>"),
        (["other length"], "1,000 bytes instead of"),
        (["compressed again"], "isn't the published archive"),
        (["redirect for ever"], "can't be reached (HTTP Error 302"),
        (["wrong range"], "a part of the file that was not requested"),
        (["silence"], "no answer in 0.1 s"),
    ],
)
def test_download_that_fails_at_once(acts, words, server, cache, monkeypatch):
    if acts == ["silence"]:
        monkeypatch.setattr(cifar10_download, "ANSWER_SECONDS", 0.1)
    server.acts = list(acts)
    failure(None, words, url=server.url)
    assert files_under(cache) == ["download.lock"]


def test_download_that_is_cut_off_again_and_again(server, cache, monkeypatch):
    server.acts = ["cut"] * 20
    message = failure(None, server.url, "cut off", "0.4 MB are in", "the same command resumes", url=server.url)
    partial = partial_of(cache, server.url)
    assert str(partial) in message
    assert len(server.ranges) == cifar10_download.ATTEMPTS
    assert len(BINARY_ARCHIVE) * 0.96 < partial.stat().st_size < len(BINARY_ARCHIVE)
    # Attempts that make progress are not counted.
    monkeypatch.setattr(cifar10_download, "PROGRESS_BYTES", 1)
    partial.unlink()
    server.acts = ["cut"] * 12
    assert_fabricated(load(None, url=server.url))


def test_what_a_former_process_left_is_resumed(server, cache):
    cache.mkdir()
    partial_of(cache, server.url).write_bytes(BINARY_ARCHIVE[:HALF])
    partial_of(cache, "http://elsewhere/").write_bytes(b"another archive")
    assert_fabricated(load(None, url=server.url))
    assert server.ranges == [REST]
    assert files_under(cache) == ["cifar-10-binary.tar.gz", "download.lock"]


LONG = len(BINARY_ARCHIVE) - 1000  # bytes that are stored


@pytest.mark.parametrize(
    ("act", "correct"),
    [
        ("no range, cut", 10),
        *itertools.product(("no range, cut", "no range, chunked, cut"), (HALF, HALF + 1000, LONG)),
    ],
)
def test_response_without_the_range_shortens_nothing_that_it_does_not_contradict(act, correct, server, cache):
    cache.mkdir()
    partial_of(cache, server.url).write_bytes(BINARY_ARCHIVE[:correct].ljust(LONG, b"x"))
    server.acts = [act, "no range"]
    assert_fabricated(load(None, url=server.url))
    # Only what the response contradicts is replaced, by the half that arrives.
    assert server.ranges == [f"bytes={LONG}-", f"bytes={LONG}-" if correct >= HALF else REST]
    assert (cache / "cifar-10-binary.tar.gz").read_bytes() == BINARY_ARCHIVE


@pytest.mark.parametrize("surplus", [b"", b"x", b"x" * 100_000])
def test_what_a_former_process_left_complete(surplus, server, cache):
    cache.mkdir()
    partial_of(cache, server.url).write_bytes(BINARY_ARCHIVE + surplus)
    server.acts = ["no range"]
    assert_fabricated(load(None, url=server.url))
    assert len(server.ranges) == bool(surplus)
    assert (cache / "cifar-10-binary.tar.gz").read_bytes() == BINARY_ARCHIVE


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("act", ["good", "no length"])
def test_wrong_bytes(act, resumed, server, cache):
    server.content = damaged(BINARY_ARCHIVE, 10)
    if resumed:  # a part of an archive that the host has since replaced
        server.content = BINARY_ARCHIVE
        cache.mkdir()
        partial_of(cache, server.url).write_bytes(damaged(BINARY_ARCHIVE, 10)[:HALF])
    server.acts = [act]
    if act == "no length":
        server.content = server.content.ljust(len(PICKLES_ARCHIVE) + 100, b"x")
    if act == "good" or not resumed:
        message = failure(None, server.url, "isn't the published archive (SHA-256 ", "it was deleted", url=server.url)
        assert hashlib.sha256(BINARY_ARCHIVE).hexdigest() in message
        assert hashlib.sha256(damaged(BINARY_ARCHIVE, 10)).hexdigest() in message or act == "no length"
        assert files_under(cache) == ["download.lock"]
        server.content = BINARY_ARCHIVE
    assert_fabricated(load(None, url=server.url))


def test_damaged_archive_in_the_cache(server, cache, capfd):
    cache.mkdir()
    path = cache / "cifar-10-binary.tar.gz"
    path.write_bytes(damaged(BINARY_ARCHIVE, HALF))
    assert_fabricated(load(None, url=server.url))
    assert f"warning: {path} is damaged: deleted\n" in capfd.readouterr().err
    assert path.read_bytes() == BINARY_ARCHIVE


def test_several_at_once_download_once(server, cache, capfd):
    server.acts = ["cut"]
    results: list[Dataset] = []
    threads = [threading.Thread(target=lambda: results.append(load(None, url=server.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for dataset in results:
        assert_fabricated(dataset)
    assert len(results) == 4
    assert server.ranges == [None, REST]
    assert "another process is downloading CIFAR-10: waiting for it" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_while_downloading(number, server, cache, monkeypatch, capfd):
    """As in one of our programs, whose handlers differ from Python's."""
    pieces = itertools.count()

    def update(bar: object, size: int) -> None:
        if next(pieces) == 1:
            os.kill(os.getpid(), number)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cifar10_download.tqdm.tqdm, "update", update)
    monkeypatch.setattr(os, "_exit", leave)
    before = signal.signal(number, lambda number, frame: None)
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            load(None, url=server.url)
    finally:
        signal.signal(number, before)
    partial = partial_of(cache, server.url)
    words = (
        f"{signal.Signals(number).name}: stopped; the downloaded part is in {partial}, and the same command resumes\n"
    )
    assert capfd.readouterr().err.count(words) == 1
    arrived = partial.stat().st_size
    assert 0 < arrived < len(BINARY_ARCHIVE)
    assert_fabricated(load(None, url=server.url))
    assert server.ranges == [None, f"bytes={arrived}-"]


@pytest.mark.parametrize("fault", ["no home", "no folder", "full", "full later"])
def test_no_room_for_a_download(fault, server, cache, monkeypatch):
    match fault:
        case "no home":
            monkeypatch.setattr(cifar10_download, "cache_folder", lambda: pathlib.Path("~/.cache"))
            words = "there is no home directory"
        case "no folder":
            cache.write_text("a file")
            words = "File exists"
        case "full":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
            words = "0.4 MB are needed, 0.0 MB are free"
        case _:
            cache.mkdir()
            partial_of(cache, server.url).symlink_to("/dev/full")
            words = "No space left on device"
    failure(None, words, f"get {server.url} by other means and give --data-dir FILE", url=server.url)
    assert fault != "no home" or not pathlib.Path("~").exists()


def test_no_network(cache):
    world = cache.parent
    failure(
        None,
        *(world / "data", world / "tfds", "127.0.0.1:1 can't be reached (Connection refused)"),
        *("--data-dir with cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar-10-batches-bin", "quickstart"),
        url=CLOSED,
    )
    assert files_under(world) == ["cache/download.lock"]


def test_name_look_up_that_hangs(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: over.wait(20))
    monkeypatch.setattr(cifar10_download, "ANSWER_SECONDS", 0.1)
    failure(None, "www.cs.toronto.edu can't be reached (no answer in 0.1 s)")
    over.set()


def test_proxy_and_tls_that_fail(server, monkeypatch):
    failure(None, "can't be reached (", "SSL", url=server.url.replace("http:", "https:"))
    monkeypatch.setenv("https_proxy", server.url)
    failure(None, "example.org can't be reached (Tunnel connection failed: 501", url="https://example.org/x.tar.gz")


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "127.0.0.1:1", "http://user:secret@127.0.0.1:1/"])
def test_proxy_that_is_down_is_named(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    message = failure(
        None, "example.org can't be reached (", "refused, through the proxy 127.0.0.1:1", url="http://example.org/x"
    )
    assert "secret" not in message
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "proxy" not in failure(None, "127.0.0.1:1 can't be reached (Connection refused)", url=CLOSED)


def test_proxy_that_fails_later_is_named(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.acts = ["cut", *["503"] * 20]
    host = server.url.split("/")[2]
    failure(None, "keeps failing (HTTP Error 503", f", through the proxy {host}", url="http://example.org/x.tar.gz")


def test_mirror_in_the_environment(server, monkeypatch):
    monkeypatch.setenv("ALEXNET_JAX_DATA_URL", f"{server.url}?token=secret")
    server.acts = ["page"]
    assert "secret" not in failure(None, server.url)
    with pytest.raises(AlexNetError, match=r"127\.0\.0\.1:1 can't be reached"):  # --data-url takes precedence
        data.load(DataConfig(data_url=CLOSED))
    assert_fabricated(load(None))
    for url in (
        "ftp://host/x",
        "/data/cifar-10-python.tar.gz",
        "http://",
        "http://a\nb/",
        "http://user:word@host/",
        "http://host/é",
    ):
        monkeypatch.setenv("ALEXNET_JAX_DATA_URL", url)
        shutil.rmtree(cifar10_download.cache_folder(), ignore_errors=True)
        with pytest.raises(UsageError, match=r"^ALEXNET_JAX_DATA_URL .*: must be "):
            load(None)


# TensorFlow Datasets


class NoTensorFlow(importlib.abc.MetaPathFinder):
    """Makes the import of TensorFlow fail, as if it were not installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")


def prepare(root: pathlib.Path, number_of: Callable[[int], int] = lambda index: index) -> None:
    """Writes TFDS's `cifar10/3.0.2` without TensorFlow, as former versions of this program did."""
    import tensorflow_datasets as tfds

    from alexnet_jax.data import cifar10_tfds

    def examples(split: str, rows: slice) -> Iterator:
        for index, (image, label) in enumerate(zip(IMAGES[rows], LABELS[rows].tolist(), strict=True)):
            key = f"{split}_{number_of(index):05d}"
            yield index, {"id": key, "image": PIL.Image.fromarray(image), "label": label}

    class Builder(cifar10_tfds.Cifar10, skip_registration=True):
        name = "cifar10"

        def _split_generators(self, dl_manager: object) -> Any:
            train = examples("train", slice(0, 5 * RECORDS))
            return {"train": train, "test": examples("test", slice(5 * RECORDS, None))}

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        Builder(data_dir=root).download_and_prepare(file_format="array_record", download_config=config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """TFDS's data_dir with a prepared copy, which the tests only read."""
    root = tmp_path_factory.mktemp("tfds")
    prepare(root)
    blocker = NoTensorFlow()
    sys.meta_path.insert(0, blocker)
    try:
        dataset = load(root)
    finally:
        sys.meta_path.remove(blocker)
    assert_fabricated(dataset)
    assert dataset.source == str(root / "cifar10" / "3.0.2")
    return root


@pytest.fixture
def copy(prepared, tmp_path):
    """A prepared data set for a test to damage."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return tmp_path / "tfds" / "cifar10" / "3.0.2"


def test_prepared_copy_is_read_without_network(prepared):
    for data_dir in (prepared, prepared / "cifar10", prepared / "cifar10" / "3.0.2"):
        assert_fabricated(load(data_dir))


def test_default_place_of_a_prepared_copy(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert_fabricated(load(None, url=CLOSED))


def test_official_builder_reads_what_was_prepared(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=prepared, file_format="array_record")
    assert type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
    assert builder.info.full_name == "cifar10/3.0.2"
    numbers = [int(example["id"].decode().removeprefix("train_")) for example in builder.as_data_source("train")]
    assert sorted(numbers) == list(range(5 * RECORDS))
    assert numbers != list(range(5 * RECORDS))  # shuffled on disk: restoring the order is no idle step


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "gone", "no information", "information cut"])
def test_damaged_prepared_copy(damage, copy):
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
    failure(copy.parents[1], copy, "damaged or incomplete", "delete")


def test_prepared_copy_of_another_size(copy):
    failure(copy.parents[1], copy, "train has 100 images instead of 50,000", records_per_batch=10_000)


def test_prepared_copy_with_repeated_ids(tmp_path):
    prepare(tmp_path, lambda index: index // 2)
    failure(tmp_path, "repeated or unknown")


def test_prepared_copy_that_needs_tensorflow(copy, server, monkeypatch):
    path = copy / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    failure(copy.parents[1], copy, "tfrecord instead of array_record", "--data-dir")
    # In the default place, it is ignored.
    for shard in copy.glob("*.array_record*"):
        shard.rename(copy / shard.name.replace("array_record", "tfrecord"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(copy.parents[1]))
    assert_fabricated(load(None, url=server.url))


@pytest.mark.parametrize("package", ["array_record.python", "tensorflow_datasets"])
def test_prepared_copy_without_the_packages(package, prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "alexnet_jax.data.cifar10_tfds", raising=False)
    monkeypatch.delattr("alexnet_jax.data.cifar10_tfds", raising=False)
    failure(prepared, prepared, "needs the packages tensorflow-datasets and array_record", "--data-dir")


def test_published_layout_does_not_import_tfds(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin")
    code = (
        "import pathlib, sys; from alexnet_jax.data import cifar10; "
        f"cifar10.load(pathlib.Path({str(tmp_path)!r}), records_per_batch={RECORDS}); "
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The real data


@pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR names no folder with both published layouts")
def test_real_data_is_the_same_from_every_source(tmp_path, monkeypatch):
    folder = pathlib.Path(os.environ["CIFAR10_DIR"])
    from_binary = cifar10.load(folder / "cifar-10-batches-bin")
    assert {name: split.images.shape for name, split in from_binary.splits.items()} == {
        "train": (40_000, 32, 32, 3),
        "validation": (10_000, 32, 32, 3),
        "test": (10_000, 32, 32, 3),
    }
    assert from_binary["train"].labels[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile
    assert cifar10.load(folder / "cifar-10-batches-py").fingerprint() == from_binary.fingerprint()
    contents = []
    for layout in cifar10_files.LAYOUTS:
        names = [f"{layout.folder}/{batch}{layout.suffix}" for batch in BATCHES]
        contents.append(gzip.compress(tar({name: (folder / name).read_bytes() for name in names}), 1))
        path = tmp_path / layout.folder
        path.write_bytes(contents[-1])
        assert cifar10.load(path).fingerprint() == from_binary.fingerprint()
    publish(monkeypatch, *contents)
    with Server(contents[1]).running() as server:
        assert cifar10.load(None, url=server.url).fingerprint() == from_binary.fingerprint()


def test_without_a_home_directory_there_is_no_default_folder(monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    assert cifar10.default_tfds_folder() == []  # not a folder named "~"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/x")
    with pytest.raises(UsageError, match=r"^TFDS_DATA_DIR=~/x: this user has no home directory"):
        cifar10.default_tfds_folder()
