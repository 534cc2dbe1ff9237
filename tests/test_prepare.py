"""Preparation of ImageNet from made pictures, easy and hard ones, in each layout."""

import csv
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import PIL.Image
import PIL.ImageChops
import pytest
import scipy.io

from alexnet_jax import files, pictures, prepare
from alexnet_jax.datasets.imagenet import ImageNet, open_prepared
from alexnet_jax.errors import AlexNetError, UsageError

ROOT = pathlib.Path(__file__).parent.parent
WNIDS = ("n01440764", "n02007558", "n03000684")
SIZE = 16


def picture(seed: int, width: int = 24, height: int = 20, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """Smooth noise."""
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels)).astype(np.uint8)
    bands = [
        PIL.Image.fromarray(small[..., c]).resize((width, height), PIL.Image.Resampling.BILINEAR)
        for c in range(channels)
    ]
    image = PIL.Image.merge(mode, bands) if channels > 1 else bands[0]
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(source: pathlib.Path, per_class: int = 4) -> pathlib.Path:
    """An image folder: three classes, validation in class folders."""
    for split, count in (("train", per_class), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            folder = source / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                data = picture(100 * label + number + (50 if split == "val" else 0))
                (folder / f"{wnid}_{number}.JPEG").write_bytes(data)
    return source


def configure(source: pathlib.Path, out: pathlib.Path, **options) -> prepare.PrepareConfig:
    return prepare.PrepareConfig(source, out, **{"workers": 1, "size": SIZE} | options)


def contents(dataset: ImageNet, split: str) -> list[tuple[bytes, int]]:
    return [
        (image.tobytes(), int(label))
        for batch in dataset.stream(split, 0, None, 2, 1)
        for image, label in zip(batch.images[batch.mask], batch.labels[batch.mask], strict=True)
    ]


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


def test_what_is_written(prepared):
    assert sorted(path.name for path in prepared.iterdir()) == [
        "dataset.json",
        "prepare.lock",
        "skipped.jsonl",
        "statistics.npz",
        *(f"train-{i:05d}-of-00003.array_record" for i in range(3)),
        *(f"validation-{i:05d}-of-00002.array_record" for i in range(2)),
    ]


def test_every_picture_is_there_with_its_label(folder, prepared):
    dataset = open_prepared(prepared)
    assert dataset.class_names == WNIDS
    assert {name: len(shards) for name, shards in dataset.splits.items()} == {"train": 12, "validation": 6}
    assert [len(s.paths) for s in dataset.splits.values()] == [3, 2]
    expected = [
        (pictures.central_square(pictures.decode(path.read_bytes()), SIZE).tobytes(), label)
        for label, wnid in enumerate(WNIDS)
        for path in sorted((folder / "train" / wnid).iterdir())
    ]
    assert contents(dataset, "train") == expected
    dataset.verify()


def test_statistics_equal_numpys(prepared):
    dataset = open_prepared(prepared)
    images = np.stack([np.frombuffer(data, np.uint8) for data, _ in contents(dataset, "train")]).astype(np.float64)
    statistics, pixels = dataset.statistics(), images.reshape(-1, 3)
    np.testing.assert_allclose(statistics.mean_image.ravel(), images.mean(axis=0), rtol=1e-6)
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    np.testing.assert_allclose(statistics.basis.mean, pixels.mean(axis=0))
    np.testing.assert_allclose(statistics.basis.eigenvalues, values[::-1], rtol=1e-9)
    np.testing.assert_allclose(np.abs((statistics.basis.eigenvectors * vectors[:, ::-1]).sum(axis=0)), 1)


def test_a_stopped_preparation_goes_on_to_the_same(folder, prepared, tmp_path, monkeypatch):
    """In two processes, too: neither changes a byte."""
    monkeypatch.setattr(prepare, "RECORDS_PER_SHARD", 5)
    write_shards = prepare._write_shards

    def killed(shards, config):
        write_shards(shards[:2], config)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write_shards", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(configure(folder, tmp_path / "out", store="raw"))
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert len(finished) == 2
    with pytest.raises(AlexNetError, match="holds no prepared ImageNet"):
        open_prepared(tmp_path / "out")
    monkeypatch.setattr(prepare, "_write_shards", write_shards)
    with pytest.raises(UsageError, match="stopped preparation with other settings"):
        prepare.prepare(configure(folder, tmp_path / "out", store="jpeg"))
    prepare.prepare(configure(folder, tmp_path / "out", store="raw", workers=2))
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())  # not written again
    assert contents_of(tmp_path / "out") == contents_of(prepared)


def contents_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prepare.lock"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_goes_on_after_a_signal(number, tmp_path):
    """Real processes; a shard holds 1,000 pictures, so there are that many and some."""
    source, out = tmp_path / "source" / "train" / WNIDS[0], tmp_path / "out"
    source.mkdir(parents=True)
    data = picture(1, 160, 120)
    for index in range(2500):
        (source / f"{index:04d}.JPEG").write_bytes(data)
    flags = ["--source", str(tmp_path / "source"), "--size", "64", "--workers", "2", "--out"]
    args = [sys.executable, "-m", "alexnet_jax.prepare", "imagenet", *flags]
    with subprocess.Popen([*args, str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(out.glob(".work/*.npz")):
            time.sleep(0.002)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=30)  # also waits for the workers, which hold stderr
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert complaint == "python -m alexnet_jax.prepare: SIGINT: stopped; the same command goes on\n"
    assert not (out / "dataset.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    prepare.main(["imagenet", *flags, str(out)])
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert len(open_prepared(out).splits["train"]) == 2500


def test_a_worker_that_is_killed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_shard", die)
    with pytest.raises(AlexNetError, match="a worker was killed"):
        prepare.prepare(configure(folder, tmp_path / "out"))


def die(out: str, shard: prepare.Shard) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_shards_that_were_damaged_meanwhile_are_made_again(folder, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "RECORDS_PER_SHARD", 5)
    finish, out = prepare._finish, tmp_path / "out"
    monkeypatch.setattr(prepare, "_finish", lambda *_: {})
    prepare.prepare(configure(folder, out, store="raw"))
    damaged = sorted(out.glob("*.array_record"))
    damaged[0].write_bytes(b"short")
    damaged[1].unlink()
    (out / ".work" / f"{damaged[2].name}.npz").write_bytes(b"PK")
    monkeypatch.setattr(prepare, "_finish", finish)
    prepare.prepare(configure(folder, out, store="raw"))
    assert contents_of(out) == contents_of(prepared)


def test_two_at_once(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        files.locked(tmp_path / "out" / "prepare.lock", ""),
        pytest.raises(AlexNetError, match=f"process {os.getpid()} prepares pictures there"),
    ):
        prepare.prepare(configure(folder, tmp_path / "out"))


def test_jpeg_is_close_and_smaller(folder, prepared, tmp_path):
    prepare.prepare(configure(folder, tmp_path / "out"))
    raw, jpeg = (contents(open_prepared(path), "train") for path in (prepared, tmp_path / "out"))
    assert [label for _, label in raw] == [label for _, label in jpeg]
    differences = [
        np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)
        for (a, _), (b, _) in zip(raw, jpeg, strict=True)
    ]
    assert 0 < np.abs(differences).mean() < 2


def hard_pictures() -> dict[str, bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    deep = io.BytesIO()
    PIL.Image.fromarray(np.full((20, 24), 0x8000, np.uint16)).save(deep, "PNG")
    marked = picture(1, mode="CMYK")  # Pillow writes Adobe's marker
    start = marked.index(b"\xff\xee")
    unmarked = marked[:start] + marked[start + 2 + int.from_bytes(marked[start + 2 : start + 4], "big") :]
    palette = io.BytesIO()
    PIL.Image.new("P", (20, 20), 1).save(palette, "PNG", transparency=b"\x00\x80")
    return {
        "cmyk": marked,
        "cmyk_not_adobes": unmarked,
        "grey": picture(2, mode="L"),
        "png": picture(3, kind="PNG"),
        "alpha": picture(4, mode="RGBA", kind="PNG"),
        "palette": palette.getvalue(),
        "sixteen_bits": deep.getvalue(),
        "exif": picture(5, exif=exif),
        "damaged_exif": picture(6, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
        "one_pixel": picture(7, 1, 1),
        "wide": picture(8, 9000, 30),
        "tall": picture(9, 3, 4000),
    }


BROKEN = {
    "truncated": picture(10, 200, 200)[:-900],
    "empty": b"",
    "no_picture": b"<html>404</html>",
    "half_a_header": picture(11)[:10],
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n(/tmp/x) (w) file",  # Pillow would run Ghostscript
}


def test_hard_pictures_are_taken_and_broken_ones_listed(tmp_path, capsys):
    hard = hard_pictures()
    train = tmp_path / "source" / "train" / WNIDS[0]
    train.mkdir(parents=True)
    for name, data in {**hard, **BROKEN}.items():
        (train / f"{name}.JPEG").write_bytes(data)
    (train.parent / "list.txt").write_text("a\n")
    prepare.prepare(configure(tmp_path / "source", tmp_path / "out", store="raw"))
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {pathlib.Path(entry["file"]).stem for entry in skipped} == {"list", *BROKEN}
    assert all(entry["reason"] and "\n" not in entry["reason"] and "0x" not in entry["reason"] for entry in skipped)
    assert f"{len(BROKEN) + 1} files were skipped" in capsys.readouterr().out
    images = dict(zip(sorted(hard), contents(open_prepared(tmp_path / "out"), "train"), strict=True))
    pixels = {name: np.frombuffer(data, np.uint8).reshape(SIZE, SIZE, 3) for name, (data, _) in images.items()}
    assert np.ptp(pixels["grey"], axis=2).max() == 0
    np.testing.assert_array_equal(pixels["sixteen_bits"], 0x80)
    reference = PIL.Image.open(io.BytesIO(hard["exif"])).convert("RGB")  # Pillow does not turn it either
    np.testing.assert_array_equal(pixels["exif"], pictures.central_square(reference, SIZE))
    ink = PIL.Image.open(io.BytesIO(hard["cmyk"]))  # Pillow takes each for one of Adobe's, whose numbers are inverted
    for name, image in {"cmyk": ink, "cmyk_not_adobes": PIL.ImageChops.invert(ink)}.items():
        np.testing.assert_array_equal(pixels[name], pictures.central_square(image.convert("RGB"), SIZE))


def test_the_square_is_the_scaled_pictures_middle():
    """Shorter side to `size`, then the middle, as two steps do it but for rounding."""
    image = PIL.Image.open(io.BytesIO(picture(1, 500, 375)))
    scaled = np.asarray(image.resize((341, 256), PIL.Image.Resampling.BICUBIC))[:, 42:298].astype(int)
    ours = pictures.central_square(image, 256).astype(int)
    assert np.abs(scaled - ours).mean() < 1


def make_tars(folder: pathlib.Path, source: pathlib.Path) -> None:
    source.mkdir()
    with tarfile.open(source / prepare.TRAIN_TAR, "w") as outer:
        for wnid in reversed(WNIDS):  # the official one is in no order of ours
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in (folder / "train" / wnid).iterdir():
                    tar.add(path, path.name)
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = inner.tell()
            inner.seek(0)
            outer.addfile(info, inner)
    with tarfile.open(source / prepare.VALIDATION_TAR, "w") as tar:
        for number, path in enumerate(flat_validation(folder)):
            tar.add(path, f"ILSVRC2012_val_{number:08d}.JPEG")


def flat_validation(folder: pathlib.Path) -> list[pathlib.Path]:
    """In an order that mixes the classes: labels 0, 1, 2, 0, 1, 2."""
    return [folder / "val" / wnid / f"{wnid}_{number}.JPEG" for number in range(2) for wnid in WNIDS]


def make_devkit(data: pathlib.Path) -> None:
    """Numbers the classes in an order of its own, and has inner nodes of the hierarchy, like the real one."""
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(3, WNIDS[0], "tench", 0), (1, WNIDS[1], "crane", 0), (2, WNIDS[2], "saw", 0), (4, "n00000001", "thing", 3)]
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n3\n1\n2\n")


@pytest.mark.parametrize("archived", [False, True])
def test_official_tars_give_the_same(folder, prepared, tmp_path, archived):
    source = tmp_path / "tars"
    make_tars(folder, source)
    make_devkit(tmp_path / prepare.DEVKIT / "data")
    if archived:
        with tarfile.open(source / f"{prepare.DEVKIT}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / prepare.DEVKIT, prepare.DEVKIT)
    else:
        (tmp_path / prepare.DEVKIT).rename(source / prepare.DEVKIT)
    prepare.prepare(configure(source, tmp_path / "out", store="raw"))
    expected, got = open_prepared(prepared), open_prepared(tmp_path / "out")
    assert contents(got, "train") == contents(expected, "train")
    assert sorted(contents(got, "validation")) == sorted(contents(expected, "validation"))
    assert [label for _, label in contents(got, "validation")] == [0, 1, 2, 0, 1, 2]
    assert got.class_names == (f"tench ({WNIDS[0]})", f"crane ({WNIDS[1]})", f"saw ({WNIDS[2]})")


def test_flat_validation_with_kaggles_solution(folder, prepared, tmp_path):
    source = tmp_path / "kaggle"
    (source / "val").mkdir(parents=True)
    (source / "train").symlink_to(folder / "train")
    (tmp_path / prepare.MAPPING).write_text("".join(f"{wnid} word {wnid[-1]}, other\n" for wnid in WNIDS))
    with (tmp_path / prepare.SOLUTION).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for number, path in enumerate(flat_validation(folder)):
            (source / "val" / f"v{number}.JPEG").write_bytes(path.read_bytes())
            writer.writerow([f"v{number}", f"{path.parent.name} 1 2 3 4"])
    prepare.prepare(configure(source, tmp_path / "out", store="raw", labels=tmp_path))
    got = open_prepared(tmp_path / "out")
    assert sorted(contents(got, "validation")) == sorted(contents(open_prepared(prepared), "validation"))
    assert got.class_names[1] == f"word {WNIDS[1][-1]}, other ({WNIDS[1]})"
    with pytest.raises(AlexNetError, match="no labels for its pictures"):
        prepare.find(source)
    (source / "val" / "valprep.sh").write_text("mv")
    with pytest.raises(AlexNetError, match=f"{prepare.SOLUTION} has no class for valprep"):
        prepare.find(source, tmp_path)


def test_what_is_wrong_is_said(folder, prepared, tmp_path):
    with pytest.raises(UsageError, match="is prepared already"):
        prepare.prepare(configure(folder, prepared))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        prepare.prepare(configure(folder, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def as_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


INNER = as_tar({"a.JPEG": picture(1), "b.JPEG": picture(2)})
A_PICTURE = {f"train/{WNIDS[0]}/a.JPEG": picture(1)}
SOLUTION_WITHOUT_COLUMN = {prepare.SOLUTION: b"ImageId\nv0\n", "val/v0.JPEG": b""}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "there is no such folder"),
        ({}, "holds neither train/"),
        ({"train/a.JPEG": b""}, "has no folders of classes"),
        (A_PICTURE | {f"val/{WNIDS[1]}/b.JPEG": b""}, "there is no such class"),
        (A_PICTURE | SOLUTION_WITHOUT_COLUMN, "labels can't be read .KeyError"),
        (A_PICTURE | {f"{prepare.DEVKIT}/data/meta.mat": b""}, "labels can't be read .FileNotFoundError"),
        (A_PICTURE | {f"{prepare.DEVKIT}.tar.gz": b"PK"}, f"{prepare.DEVKIT}.tar.gz: can't be read"),
        ({prepare.TRAIN_TAR: b""}, "can't be read"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER})[:-9000]}, "cut off after n1.tar"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER[:1024]})}, "cut off"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": b"x" * 1024 + INNER})}, "cut off at its beginning"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER.replace(b"b.JPEG", b"B.JPEG")})}, "cut off after a.JPEG"),
        ({"dataset_info.json": b"{"}, "TFDS can't read it"),
    ],
)
def test_bad_sources(contents, message, tmp_path):
    for name, data in (contents or {}).items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    if contents is not None:
        (tmp_path / "source").mkdir(exist_ok=True)
    with pytest.raises(AlexNetError, match=message) as caught:
        prepare.find(tmp_path / "source")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_no_picture_is_whole(tmp_path):
    (tmp_path / "source" / "train" / "n1").mkdir(parents=True)
    (tmp_path / "source" / "train" / "n1" / "a.JPEG").write_bytes(b"")
    with pytest.raises(AlexNetError, match="none of its 1 training files is a picture"):
        prepare.prepare(configure(tmp_path / "source", tmp_path / "out"))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "which data set?"),
        (["imagenet", "--sourc", "x", "--out", "y"], 2, "--sourc"),
        (["imagenet", "--source", "{tmp}/nothing", "--out", "{tmp}/y"], 1, "there is no such folder"),
        (["imagenet", "--source", "x", "--out", "y", "--size", "0"], 2, "--size 0"),
    ],
)
def test_the_command_fails_in_one_line(tmp_path, args, code, message):
    command = [sys.executable, "-m", "alexnet_jax.prepare", *(arg.format(tmp=tmp_path) for arg in args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif("IMAGENET_SAMPLE" not in os.environ, reason="IMAGENET_SAMPLE names no tar of an image folder")
def test_real_pictures(tmp_path):
    with tarfile.open(os.environ["IMAGENET_SAMPLE"]) as tar:
        tar.extractall(tmp_path / "sample", filter="data")
    description = prepare.prepare(prepare.PrepareConfig(tmp_path / "sample", tmp_path / "out"))
    assert description["counts"] == {"train": 1000}
    assert description["skipped"] == 0
    # The 2012 set's deviations are 121.78, 37.09 and 19.72 grey levels.
    deviations = np.sqrt(open_prepared(tmp_path / "out").statistics().basis.eigenvalues)
    np.testing.assert_allclose(deviations, [121.78, 37.09, 19.72], rtol=0.2)


def test_tfds_imagenet_gives_the_same(folder, prepared, tmp_path):
    """Prepared as array_record by a builder of that name, as TFDS's own does it."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=list(WNIDS))
            image = tfds.features.Image(encoding_format="jpeg")
            features = {"file_name": tfds.features.Text(), "image": image, "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {name: self._examples(split) for name, split in (("train", "train"), ("validation", "val"))}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, split):
            for path in sorted((folder / split).glob("*/*")):
                yield path.name, {"file_name": path.name, "image": path.read_bytes(), "label": path.parent.name}

    builder = Imagenet2012(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    prepare.prepare(configure(tmp_path / "tfds", tmp_path / "out", store="raw"))
    expected, got = open_prepared(prepared), open_prepared(tmp_path / "out")
    for split in ("train", "validation"):
        assert sorted(contents(got, split)) == sorted(contents(expected, split))
