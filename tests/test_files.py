"""One-line reasons; locks; files that several processes write; .npz files."""

import concurrent.futures
import errno
import os
import pathlib
import zipfile

import numpy as np
import portalocker.portalocker
import pytest

from alexnet_jax import files
from alexnet_jax.errors import AlexNetError, reason

OTHERWISE = "is training there; wait for it"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "x.npz"), "No such file"),
        (OSError("it is not a regular file"), "it is not a regular file"),
        (ValueError(" two\n  lines \x1b[0m"), r"two lines \x1b[0m"),
        (KeyError(), "KeyError"),
        (ValueError("a" * 200 + "b" * 200), "a" * 100 + "..." + "b" * 100),
    ],
)
def test_the_reason_of_an_error_is_one_line(error, expected):
    assert reason(error) == expected


def lock_that_fails(monkeypatch, number):
    def fail(file, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(portalocker.portalocker, "LOCKER", fail)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capfd, number):
    lock_that_fails(monkeypatch, number)
    with files.locked(tmp_path / "train.lock", OTHERWISE):
        assert (tmp_path / "train.lock").read_text() == f"{os.getpid()}\n"
    line = capfd.readouterr().err
    assert line.startswith(f"warning: {tmp_path}: its file system has no locks ({os.strerror(number)}): ")
    assert "no other process" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK])
@pytest.mark.parametrize(
    ("content", "owner"), [(b"123\n", "process 123"), (b"", "another process"), (b"\xff\n\n1", "another process")]
)
def test_a_lock_that_is_held_names_its_owner_if_it_can(tmp_path, monkeypatch, number, content, owner):
    (tmp_path / "train.lock").write_bytes(content)
    lock_that_fails(monkeypatch, number)
    with pytest.raises(AlexNetError) as error:
        files.locked(tmp_path / "train.lock", OTHERWISE)
    assert str(error.value) == f"{tmp_path}: {owner} {OTHERWISE}"
    assert (tmp_path / "train.lock").read_bytes() == content


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_can_not_be_written_is_not_one_that_is_held(tmp_path, monkeypatch, number):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(AlexNetError) as error:
        files.locked(tmp_path / "train.lock", OTHERWISE)
    assert str(error.value) == (
        f"can't write {tmp_path / 'train.lock'}: {os.strerror(number)}; choose a folder that this user may write to"
    )


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    contents = [bytes([n]) * 20_000 for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: files.write_atomically(tmp_path / "test.json", data), contents * 3))
    assert (tmp_path / "test.json").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["test.json"]


def test_what_belongs_together_stays_together(tmp_path):
    """Two evaluations: the results of one beside the predictions of the other would be a wrong number."""

    def write(n: int) -> None:
        files.write_together(tmp_path, {"predictions.npz": bytes([n]) * 50_000, "test.json": bytes([n])})

    (tmp_path / ".test.json.0123456789abcdef.tmp").write_text("left by a process that was killed")
    (tmp_path / ".notes.tmp").write_text("somebody else's")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert (tmp_path / "predictions.npz").read_bytes() == (tmp_path / "test.json").read_bytes() * 50_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".alexnet_jax.lock",
        ".notes.tmp",
        "predictions.npz",
        "test.json",
    ]


def test_npz_files_come_back(tmp_path):
    arrays = {"mean": np.arange(3.0), "mean_image": np.ones((2, 2, 3), np.float32)}
    (tmp_path / "x.npz").write_bytes(files.npz_bytes(**arrays))
    found = files.read_npz(tmp_path / "x.npz", 10_000)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_npz_files_are_bounded_and_hold_no_objects(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(files.npz_bytes(a=np.zeros(1000)))
    with pytest.raises(OSError, match="more than 500"):
        files.read_npz(path, 500)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:  # a bomb
        file.writestr("a.npy", bytes(1_000_000))
    assert path.stat().st_size < 5_000
    with pytest.raises(ValueError, match="unpacks to more than 500,000"):
        files.read_npz(path, 500_000)
    path.write_bytes(files.npz_bytes(a=np.array([{}], object)))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        files.read_npz(path, 500_000)
    with zipfile.ZipFile(path, "w") as file:  # NumPy returns the bytes of such a file
        file.writestr("a.npy", b"no array")
    with pytest.raises(ValueError, match="a is not an array"):
        files.read_npz(path, 500_000)


def test_damaged_npz_files_raise_value_error(tmp_path):
    path, data = tmp_path / "x.npz", files.npz_bytes(a=np.arange(20.0))
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"."):
            files.read_npz(path, 10_000)
    for place in range(30, 200):
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        try:
            found = files.read_npz(path, 10_000)
        except ValueError:
            continue
        np.testing.assert_array_equal(found.get("a", np.arange(20.0)), np.arange(20.0))  # only names are unchecked
