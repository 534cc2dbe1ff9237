"""CIFAR-100: the published files, small, and what may be in their place."""

import io
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from alexnet_jax import data
from alexnet_jax.config.settings import DataConfig
from alexnet_jax.data import cifar10, cifar100
from alexnet_jax.errors import AlexNetError, UsageError
from tests import python_2

RECORDS = {"train": 500, "test": 100}
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (count, 3072), np.uint8) for name, count in RECORDS.items()}
FINE = {name: RNG.permutation(np.arange(count) % 100) for name, count in RECORDS.items()}
ROWS = {name: np.column_stack([FINE[name] // 5, FINE[name], PIXELS[name]]).astype(np.uint8) for name in RECORDS}
BINARY = {f"cifar-100-binary/{name}.bin": rows.tobytes() for name, rows in ROWS.items()}
PICKLED = {
    f"cifar-100-python/{name}": pickle.dumps(
        {b"data": PIXELS[name], b"fine_labels": FINE[name].tolist(), b"coarse_labels": (FINE[name] // 5).tolist()}, 2
    )
    for name in RECORDS
}
PUBLISHED = {
    f"cifar-100-python/{name}": python_2.dumps(
        {"data": PIXELS[name], "fine_labels": FINE[name].tolist(), "filenames": ["a.png"]}
    )
    for name in RECORDS
}


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def extract(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("files", [BINARY, PICKLED, PUBLISHED], ids=["binary", "python 3", "python 2"])
@pytest.mark.parametrize("form", ["folder", "inner folder", "archive", "tar", "named archive"])
def test_all_forms_give_the_same(files, form, tmp_path):
    place = tmp_path
    if "folder" in form:
        extract(tmp_path, files)
        place = tmp_path / next(iter(files)).split("/")[0] if form == "inner folder" else tmp_path
    else:
        name = {"archive": f"{next(iter(files)).split('/')[0]}.tar.gz", "tar": "x.tar", "named archive": "x.bin"}[form]
        place = tmp_path if form == "archive" else tmp_path / name
        (tmp_path / name).write_bytes(tar(files, "w" if form == "tar" else "w:gz"))
    dataset = cifar100.load(place, RECORDS)
    assert dataset.counts == {"train": 400, "validation": 100, "test": 100}
    planes = PIXELS["train"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(dataset["validation"].images, planes[400:])
    np.testing.assert_array_equal(dataset["train"].labels, FINE["train"][:400])
    np.testing.assert_array_equal(dataset["test"].labels, FINE["test"])


def test_the_class_names_are_those_of_the_archive():
    assert len(set(cifar100.CLASS_NAMES)) == 100
    assert list(cifar100.CLASS_NAMES) == sorted(cifar100.CLASS_NAMES)
    assert [cifar100.CLASS_NAMES[i] for i in (0, 1, 19, 49, 99)] == [
        "apple", "aquarium_fish", "cattle", "mountain", "worm"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.bin": b"x" * 3074, "test.bin": b"x"}, r"train\.bin: it has 3,074 bytes instead of 1,537,000"),
        ({"train": pickle.dumps({b"data": 1}), "test": b"x"}, "not a dictionary with an array"),
        ({"train": b"\x80\x02broken", "test": b"x"}, "truncated, or no pickle of CIFAR-100"),
        ({"train.bin": BINARY["cifar-100-binary/train.bin"]}, r"test\.bin: can't be read"),
        ({"train.bin": bytes(3074 * 500), "test.bin": bytes(3074 * 100)}, "train does not have 5 images of each class"),
        ({"train.bin": b"\xff" * 3074 * 500, "test.bin": b""}, "record 0 has label 255 instead of 0 to 99"),
        ({"cifar-100-binary.tar.gz": tar(BINARY)[:5000]}, "truncated"),
        ({"cifar-100-binary.tar.gz": tar({"x/train.bin": BINARY["cifar-100-binary/train.bin"]})}, "it lacks test"),
        ({"cifar-100-python.tar": b"<html>"}, "this is a web page"),
        ({"cifar-100-python.tar.gz": b"damaged" * 100}, "this is neither a gzip nor a tar file; use cifar-100"),
        ({"readme": b""}, "contains no CIFAR-100"),
    ],
)
def test_what_is_not_cifar_100_is_refused(files, message, tmp_path):
    extract(tmp_path, files)
    with pytest.raises(AlexNetError, match=message):
        cifar100.load(tmp_path, RECORDS)


def test_the_one_is_not_taken_for_the_other(tmp_path):
    extract(tmp_path, PUBLISHED)
    with pytest.raises(AlexNetError, match="--dataset cifar100 reads"):
        cifar10.load(tmp_path / "cifar-100-python")
    with pytest.raises(UsageError, match="--dataset cifar100 needs --data-dir"):
        data.load(DataConfig(dataset="cifar100"))
    with pytest.raises(AlexNetError, match="no such file or folder"):
        data.load(DataConfig(dataset="cifar100", data_dir=tmp_path / "nothing"))
