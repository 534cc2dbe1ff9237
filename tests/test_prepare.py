"""Preparation of ImageNet: output, resuming, refusals."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageChops
import pytest

from alexnet_jax import files
from alexnet_jax.data import prepare, shards
from alexnet_jax.data.decode import central_square, decode
from alexnet_jax.data.records import decode_record
from alexnet_jax.data.sources import Example
from alexnet_jax.data.streamed import open_prepared
from alexnet_jax.errors import AlexNetError, UsageError
from tests.image_folders import SIZE, WNIDS, configure, encoded, make_folder, write

ROOT = pathlib.Path(__file__).parent.parent


def images(dataset, split: str) -> tuple[np.ndarray, list[int]]:
    """All images of a split, uint8 [N, S, S, 3], and their labels, in order."""
    found = dataset.examples(split, np.arange(dataset.description["counts"][split]))
    return found.images, found.labels.tolist()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prepare.lock"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "imagenet")


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "raw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "RECORDS_PER_SHARD", 5)
        prepare.prepare(configure(folder, out, store="raw"))
    return out


def test_the_folder_has_these_files(prepared):
    assert sorted(path.name for path in prepared.iterdir()) == [
        "dataset.json",
        "prepare.lock",
        "skipped.jsonl",
        "statistics.npz",
        *(f"train-{i:05d}-of-00003.array_record" for i in range(3)),
        *(f"validation-{i:05d}-of-00002.array_record" for i in range(2)),
    ]


def test_every_image_is_there_with_its_label(folder, prepared):
    dataset = open_prepared(prepared)
    assert dataset.class_names == WNIDS
    for split, name in (("train", "train"), ("validation", "val")):
        paths = [path for wnid in WNIDS for path in sorted((folder / name / wnid).iterdir())]
        found, labels = images(dataset, split)
        np.testing.assert_array_equal(found, [central_square(decode(path.read_bytes()), SIZE) for path in paths])
        assert labels == [WNIDS.index(path.parent.name) for path in paths]
    dataset.verify()


def test_statistics_equal_numpys(prepared):
    dataset = open_prepared(prepared)
    statistics, train = dataset.statistics(), images(dataset, "train")[0].astype(np.float64)
    pixels = train.reshape(-1, 3)
    np.testing.assert_allclose(statistics.mean_image, train.mean(axis=0), rtol=1e-6)
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    np.testing.assert_allclose(statistics.basis.mean, pixels.mean(axis=0))
    np.testing.assert_allclose(statistics.basis.eigenvalues, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs((statistics.basis.eigenvectors * vectors[:, ::-1]).sum(axis=0)), 1)


def kill_at_the_last(shard: shards.Shard) -> None:
    """A worker that is killed, as for lack of memory, when it comes to the last shard."""
    if shard.path.name.startswith("validation-00001"):
        os.kill(os.getpid(), signal.SIGKILL)
    shards.write_shard(shard)


def test_a_resumed_preparation_equals_one_that_was_not_stopped(folder, prepared, tmp_path, monkeypatch):
    """Whatever was damaged in between, and with any number of workers: no byte differs."""
    out = tmp_path / "out"
    monkeypatch.setattr(prepare, "RECORDS_PER_SHARD", 5)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", kill_at_the_last)
        with pytest.raises(AlexNetError, match=r"a worker process was killed.* resumes"):
            prepare.prepare(configure(folder, out, store="raw"))
    with pytest.raises(AlexNetError, match="contains no prepared images"):
        open_prepared(out)
    with pytest.raises(UsageError, match="contains a stopped preparation with other settings"):
        prepare.prepare(configure(folder, out, store="jpeg"))
    whole, short, missing, unreported = sorted(out.glob("*.array_record"))
    short.write_bytes(b"short")
    missing.unlink()
    (out / ".work" / f"{unreported.name}.npz").write_bytes(b"PK")
    written = whole.stat().st_mtime_ns
    prepare.prepare(configure(folder, out, store="raw", workers=2))
    assert whole.stat().st_mtime_ns == written
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_resumes_after_a_signal(number, tmp_path):
    """The second of four shards takes half a minute unless its slow image is replaced; the signal arrives during that
    time."""
    source, out = write(tmp_path, {"fast": encoded(1), "copy": encoded(1)}) / "source", tmp_path / "out"
    PIL.Image.new("L", (4000, 4000)).save(tmp_path / "slow", "PNG")  # takes a tenth of a second
    folder = source / "train" / WNIDS[0]
    folder.mkdir(parents=True)
    for index in range(3001):
        slow = 1000 <= index < 1300
        (folder / f"{index:04d}.JPEG").symlink_to(tmp_path / ("slow" if slow else "fast"))
    flags = ["--source", str(source), "--size", "16", "--workers", "1", "--out", str(out)]
    args = [sys.executable, "-m", "alexnet_jax.data.prepare", "imagenet", *flags]
    with subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None and not list(out.glob(".work/*.npz")):
            time.sleep(0.01)
        if number == signal.SIGINT:  # a terminal sends it to the worker, too, which finishes its shard
            os.killpg(process.pid, number)
            (tmp_path / "copy").replace(tmp_path / "slow")
        else:
            process.send_signal(number)
        _, complaint = process.communicate(timeout=60)  # also waits for the worker, which holds stderr
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert complaint == "python -m alexnet_jax.data.prepare: SIGINT: stopped; the same command resumes\n"
    assert not (out / "dataset.json").exists()
    finished = {out / path.stem: (out / path.stem).stat().st_mtime_ns for path in out.glob(".work/*.npz")}
    assert len(finished) >= 2 if number == signal.SIGINT else len(finished) == 1
    write(tmp_path, {"slow": encoded(1)})
    prepare.main(["imagenet", *flags])
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert open_prepared(out).description["counts"] == {"train": 3001}


def test_two_at_once(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        files.locked(tmp_path / "out" / "prepare.lock", ""),
        pytest.raises(AlexNetError, match=f"process {os.getpid()} is preparing images there"),
    ):
        prepare.prepare(configure(folder, tmp_path / "out"))


def unusual_images() -> dict[str, bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    deep, palette = io.BytesIO(), io.BytesIO()
    PIL.Image.fromarray(np.full((20, 24), 0x8000, np.uint16)).save(deep, "PNG")
    PIL.Image.new("P", (20, 20), 1).save(palette, "PNG", transparency=b"\x00\x80")
    marked = encoded(1, mode="CMYK")  # Pillow writes Adobe's marker
    start = marked.index(b"\xff\xee")
    unmarked = marked[:start] + marked[start + 2 + int.from_bytes(marked[start + 2 : start + 4], "big") :]
    return {
        "alpha": encoded(4, mode="RGBA", kind="PNG"),
        "cmyk": marked,
        "cmyk_not_adobes": unmarked,
        "damaged_exif": encoded(6, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
        "exif": encoded(5, exif=exif),
        "grey": encoded(2, mode="L"),
        "palette": palette.getvalue(),
        "png": encoded(3, kind="PNG"),
        "sixteen_bits": deep.getvalue(),
    }


BROKEN = {
    "truncated": encoded(10, 200, 200)[:-900],
    "empty": b"",
    "not_an_image": b"<html>404</html>",
    "half_a_header": encoded(11)[:10],
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n(/tmp/x) (w) file",  # Pillow would run Ghostscript
}


def test_unusual_images_are_decoded_and_broken_ones_skipped(tmp_path):
    from array_record.python import array_record_module

    unusual = unusual_images()
    write(tmp_path, unusual | BROKEN | {".work/plan.json": b""})
    examples = [Example(name, 7, str(tmp_path / name)) for name in (*unusual, *BROKEN, "missing")]
    shard = shards.Shard(tmp_path / "train-0.array_record", examples, SIZE, "raw")
    shards.write_shard(shard)
    assert shard.is_finished()
    result = shard.result()
    assert [name for name, _ in result.skipped] == [*BROKEN, "missing"]
    assert all(reason and "\n" not in reason and "0x" not in reason for _, reason in result.skipped)
    reader = array_record_module.ArrayRecordReader(str(shard.path))
    pixels = {name: decode_record(reader.read([row])[0], SIZE)[0] for row, name in enumerate(unusual)}
    assert reader.num_records() == result.records == len(unusual)
    assert np.ptp(pixels["grey"], axis=2).max() == 0
    np.testing.assert_array_equal(pixels["sixteen_bits"], 0x80)
    reference = PIL.Image.open(io.BytesIO(unusual["exif"])).convert("RGB")  # Pillow does not rotate it either
    np.testing.assert_array_equal(pixels["exif"], central_square(reference, SIZE))
    ink = PIL.Image.open(io.BytesIO(unusual["cmyk"]))  # Pillow reads both as Adobe's, whose numbers are inverted
    for name, image in {"cmyk": ink, "cmyk_not_adobes": PIL.ImageChops.invert(ink)}.items():
        np.testing.assert_array_equal(pixels[name], central_square(image.convert("RGB"), SIZE))


def test_a_disk_that_fails_ends_the_preparation(tmp_path):
    """A file that can't be read for a moment must not be missing from the data set for good."""

    class Failing(NamedTuple):
        name: str = "cat.jpg"

        def read(self):
            raise OSError(errno.EIO, "Input/output error")

    shard = shards.Shard(tmp_path / "train-0.array_record", [Failing()], SIZE, "raw")
    with pytest.raises(OSError, match=r"cat\.jpg: Input/output error"):
        shards.write_shard(shard)
    assert not shard.is_finished()


def test_skipped_files_are_listed_and_counted(tmp_path, capsys):
    train = {"a.JPEG": encoded(1), "b.JPEG": b""}
    source = write(tmp_path / "source", {f"train/{WNIDS[0]}/{name}": data for name, data in train.items()})
    write(source, {"train/list.txt": b"a", "train/notes/x.txt": b"x"})
    prepare.prepare(configure(source, tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["split"], line["file"]) for line in lines] == [
        ("train", f"train/{WNIDS[0]}/b.JPEG"),
        ("train", "train/notes/x.txt"),
        ("train", "train/list.txt"),
    ]
    out = capsys.readouterr().out
    assert out.startswith("not a class, because it contains no image: train/notes\nno validation images were found\n")
    assert ": 1 train images; no validation images\n" in out
    assert "skipped 3 files; the reasons are in" in out


def test_folders_with_something_else_are_refused(folder, prepared, tmp_path):
    with pytest.raises(UsageError, match="is already prepared"):
        prepare.prepare(configure(folder, prepared))
    mine = write(tmp_path, {"thesis.tex": "x"})
    with pytest.raises(UsageError, match="is not empty"):
        prepare.prepare(configure(folder, mine))
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "the name of the data set is missing"),
        (["imagenet", "--sourc", "x", "--out", "y"], 2, "--sourc"),
        (["imagenet", "--source", "x", "--out", "y", "--size", "0"], 2, "--size 0"),
        (["imagenet", "--source", "nothing", "--out", "y"], 1, "nothing: there is no such folder"),
    ],
)
def test_bad_flags_are_refused(args, code, message):
    with pytest.raises(AlexNetError, match=message) as caught:
        prepare.main(args)
    assert caught.value.exit_code == code


def test_the_command_fails_in_one_line(tmp_path):
    command = [sys.executable, "-m", "alexnet_jax.data.prepare", "imagenet", "--source", "nothing", "--out", "y"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "python -m alexnet_jax.data.prepare: nothing: there is no such folder\n"


@pytest.mark.skipif("IMAGENET_SAMPLE" not in os.environ, reason="IMAGENET_SAMPLE names no tar of an image folder")
def test_real_images(tmp_path):
    with tarfile.open(os.environ["IMAGENET_SAMPLE"]) as tar:
        tar.extractall(tmp_path / "sample", filter="data")
    description = prepare.prepare(prepare.PrepareConfig(tmp_path / "sample", tmp_path / "out"))
    assert description["counts"] == {"train": 1000}
    assert description["skipped"] == 0
    # The 2012 set's deviations are 121.78, 37.09 and 19.72 grey levels.
    deviations = np.sqrt(open_prepared(tmp_path / "out").statistics().basis.eigenvalues)
    np.testing.assert_allclose(deviations, [121.78, 37.09, 19.72], rtol=0.2)
