"""Preparation of ImageNet from made pictures, easy and hard ones, in each layout."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

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
        assert complaint == "python -m alexnet_jax.prepare: SIGINT: stopped; the same command resumes\n"
    assert not (out / "dataset.json").exists()
    # A shard is finished when its statistics are written too; one without them is written again.
    finished = [out / path.stem for path in out.glob(".work/*.npz")]
    finished = {path: path.stat().st_mtime_ns for path in finished}
    assert finished
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
    out = capsys.readouterr().out
    assert f"{len(BROKEN) + 1} files were skipped" in out
    assert out.startswith("no validation images were found\n")
    assert f"{len(hard)} train images; no validation images\n" in out
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
        for number, path in enumerate(flat_validation(folder), 1):
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


def as_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


INNER = as_tar({"a.JPEG": picture(1), "b.JPEG": picture(2)})


def write(source: pathlib.Path, contents: dict[str, bytes | str]) -> pathlib.Path:
    for name, data in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return source


def found_labels(source: prepare.Source) -> dict[str, str]:
    """Class of each validation picture by the last part of its name."""
    return {p.name.rsplit("/", 1)[-1]: source.wnids[p.label] for p in source.splits["validation"]}


TRAIN = {f"train/{wnid}/{wnid}_0.JPEG": picture(label) for label, wnid in enumerate(WNIDS)}
NUMBERED = {number: f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(14)}
TRUTH = {1: WNIDS[0], 2: WNIDS[1], 3: WNIDS[2], 4: WNIDS[0], 5: WNIDS[1], 6: WNIDS[2]}  # of `make_devkit`


@pytest.mark.parametrize("layout", ["folder", "tar", "kaggle", "tiny"])
def test_validation_labels_go_by_the_name(layout, tmp_path, capsys):
    """With a picture missing and a file too many, as many as labels: by position most would be wrong."""
    source = write(tmp_path, TRAIN)
    make_devkit(source / prepare.DEVKIT / "data")
    names = {NUMBERED[n]: TRUTH[n] for n in (1, 2, 4, 5, 6)}
    if layout == "kaggle":
        rows = "".join(f"{NUMBERED[n][:-5]},{TRUTH[n]} 1 2 3 4 {TRUTH[n]} 5 6 7 8\n" for n in (6, 5, 4, 2, 1))
        write(source, {prepare.SOLUTION: "\ufeffImageId,PredictionString\n" + rows})
        shutil.rmtree(source / prepare.DEVKIT)
    files = dict.fromkeys(names, picture(1)) | {"Thumbs.db": b"x", "._" + NUMBERED[3]: b"x"}
    if layout == "tar":
        shutil.rmtree(source / "train")
        train = {f"train/{wnid}.tar": as_tar({"a.JPEG": picture(1)}) for wnid in WNIDS}
        write(
            source,
            {prepare.TRAIN_TAR: as_tar(train), prepare.VALIDATION_TAR: as_tar({f"v/{n}": files[n] for n in files})},
        )
    elif layout == "tiny":
        names = {f"val_{number}.JPEG": wnid for number, wnid in TRUTH.items() if number != 3}
        lines = "".join(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in TRUTH.items())
        write(source, {f"val/images/{name}": picture(1) for name in names} | {f"val/{prepare.ANNOTATIONS}": lines})
    else:
        write(source, {f"val/{name}": data for name, data in files.items()})
    found = prepare.find(source)
    assert found_labels(found) == names
    expected = [] if layout == "kaggle" else ["5 of the 6 pictures"]
    assert [note.split(": ")[1][: len("5 of the 6 pictures")] for note in found.notes] == expected


@pytest.mark.parametrize(
    "labels", [prepare.SOLUTION, prepare.DEVKIT, f"{prepare.DEVKIT}/data", "other", f"{prepare.DEVKIT}.tar.gz"]
)
def test_labels_may_be_the_file_or_the_devkit_itself(labels, tmp_path):
    source = write(tmp_path / "source", TRAIN | {f"val/{NUMBERED[1]}": b""})
    if labels == prepare.SOLUTION:
        write(tmp_path, {labels: f"{BOTH}{NUMBERED[1][:-5]},{TRUTH[1]} 1 2 3 4\n"})
    else:
        make_devkit(tmp_path / ("other" if labels == "other" else prepare.DEVKIT) / "data")
    if labels.endswith(".tar.gz"):
        with tarfile.open(tmp_path / labels, "w:gz") as tar:
            tar.add(tmp_path / prepare.DEVKIT, prepare.DEVKIT)
        shutil.rmtree(tmp_path / prepare.DEVKIT)
    assert found_labels(prepare.find(source, tmp_path / labels)) == {NUMBERED[1]: TRUTH[1]}


def test_labels_that_are_another_file(tmp_path):
    source = write(tmp_path, TRAIN | {"labels.csv": b""})
    with pytest.raises(AlexNetError, match=f"labels.csv: --labels takes a folder, {prepare.SOLUTION} or"):
        prepare.find(source, tmp_path / "labels.csv")


BOTH = "ImageId,PredictionString\n"
ANNOTATED = {f"val/{prepare.ANNOTATIONS}": f"a.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n", "val/images/a.JPEG": b""}
DEVKIT_TRUTH = f"{prepare.DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"val/photo.jpg": b""},
            "val: the devkit has no class for photo.jpg, only for ILSVRC2012_val_00000001 to .*06",
        ),
        ({f"val/{NUMBERED[0]}": b""}, "no class for ILSVRC2012_val_00000000.JPEG"),
        ({f"val/{NUMBERED[7]}": b""}, "no class for ILSVRC2012_val_00000007.JPEG"),
        ({"val/ILSVRC2012_val_00000001 (1).JPEG": b""}, r"no class for ILSVRC2012_val_00000001 \(1\).JPEG"),
        ({f"val/{NUMBERED[1]}": b"", "val/ILSVRC2012_val_00000001.png": b""}, "have one label: remove one"),
        ({f"val/{WNIDS[1]}/{NUMBERED[1]}": b""}, f"in the folder of {WNIDS[1]}, but the devkit says {WNIDS[0]}"),
        (
            {"val/a.JPEG": b"", prepare.SOLUTION: BOTH + "a,n5 1 2 3 4\n"},
            "a.JPEG is of class n5, which has no training",
        ),
        (
            {prepare.SOLUTION: BOTH + f"a,{WNIDS[0]}\na,{WNIDS[1]}\n"},
            f"class of a is {WNIDS[1]} here and {WNIDS[0]} else",
        ),
        (
            {prepare.SOLUTION: BOTH + f"{NUMBERED[1][:-5]},{WNIDS[1]}\n"},
            f"class of .*01 is {WNIDS[0]} here and {WNIDS[1]}",
        ),
        ({prepare.SOLUTION: BOTH + "a,n1 1 2 3 4 n2 1 2 3 4\n"}, "line 2 names 2 classes"),
        ({prepare.SOLUTION: BOTH + "a,\n"}, "line 2 names 0 classes"),
        ({DEVKIT_TRUTH: "3\n\n1\n"}, "line 2 of the devkit's truth"),
        ({DEVKIT_TRUTH: "3\n1\n4\n"}, "line 3 of the devkit's truth"),
        ({DEVKIT_TRUTH: "3\n1 2\n"}, "line 2 of the devkit's truth"),
        (ANNOTATED | {"val/images/b.JPEG": b""}, "val_annotations.txt has no class for b.JPEG"),
        (ANNOTATED | {f"val/{prepare.ANNOTATIONS}": "a.JPEG\tn1\na.JPEG\tn2\n"}, "class of a is n2 here and n1 else"),
        (ANNOTATED | {f"val/{prepare.ANNOTATIONS}": f"a.JPEG {WNIDS[0]}\n"}, "line 1 names no class"),
        ({"val/x/a.JPEG": b"", "validation/x/a.JPEG": b""}, "holds both val/ and validation/"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused(contents, message, tmp_path):
    make_devkit(tmp_path / prepare.DEVKIT / "data")
    with pytest.raises(AlexNetError, match=message) as caught:
        prepare.find(write(tmp_path, TRAIN | contents))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("twice", ["number", "wnid"])
def test_a_devkit_that_has_a_class_twice(twice, tmp_path):
    make_devkit(tmp_path / prepare.DEVKIT / "data")
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(1, WNIDS[0], "tench", 0), (1 if twice == "number" else 2, WNIDS[twice == "number"], "crane", 0)]
    scipy.io.savemat(tmp_path / prepare.DEVKIT / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    with pytest.raises(AlexNetError, match=r"the devkit's meta.mat has class . or .* twice"):
        prepare.find(write(tmp_path, TRAIN))


def test_a_folder_without_a_picture_is_no_class(tmp_path, capsys):
    """Wherever it sorts: it would change the labels of all others."""
    litter = {"@eaDir/a.JPEG": picture(1), "__MACOSX/a.JPEG": picture(1), "lost+found/x": b"", "Thumbs.db": b""}
    litter |= {".ipynb_checkpoints/a.JPEG": picture(1), "a/.DS_Store": b"", "b/c/Thumbs.db": b"", "z/notes.txt": b"x"}
    source = write(tmp_path / "source", TRAIN | {f"train/{name}": data for name, data in litter.items()})
    write(source, {f"val/{WNIDS[2]}/x.JPEG": picture(1), "val/m/desktop.ini": b"", "val/@eaDir/x.JPEG": picture(1)})
    (source / "train" / "empty").mkdir()
    description = prepare.prepare(configure(source, tmp_path / "out"))
    assert description["classes"] == list(WNIDS)
    assert description["counts"] == {"train": 3, "validation": 1}
    assert [label for _, label in contents(open_prepared(tmp_path / "out"), "validation")] == [2]
    out = capsys.readouterr().out
    assert "no class, as no picture was found: train/a, train/b, train/empty, train/z\n" in out
    assert "no file in val/m\n" in out
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in skipped] == ["train/z/notes.txt"]
    (source / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").write_bytes(b"no picture")
    assert prepare.find(source).wnids == [WNIDS[0], WNIDS[2]]


def test_subfolders_belong_to_their_class(tmp_path):
    source = write(tmp_path, TRAIN | {f"train/{WNIDS[1]}/sub/deeper/x.JPEG": picture(1)})
    (source / "train" / WNIDS[2] / "up").symlink_to("../..")
    found = prepare.find(source)
    names = [(p.name, p.label) for p in found.splits["train"]]
    assert names == [
        (f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG", 0),
        (f"train/{WNIDS[1]}/{WNIDS[1]}_0.JPEG", 1),
        (f"train/{WNIDS[1]}/sub/deeper/x.JPEG", 1),
        (f"train/{WNIDS[2]}/{WNIDS[2]}_0.JPEG", 2),
    ]
    assert found.notes == [f"files of subfolders belong to the class of the folder above: train/{WNIDS[1]}/sub/deeper"]
    (source / "train" / "self").symlink_to(".")
    with pytest.raises(AlexNetError, match="train/self: links to a folder that holds it"):
        prepare.find(source)


@pytest.mark.parametrize(
    ("contents", "unused"),
    [
        ({prepare.VALIDATION_TAR: b"x"}, prepare.VALIDATION_TAR),
        ({"val.zip": b"x", "ILSVRC2012_bbox_val.tgz": b"x", "LOC_val_solution.csv.bak": b"x"}, "val.zip"),
        ({"Val/a.JPEG": b"x", f"Validation/{WNIDS[0]}/a.JPEG": b"x"}, "Val, Validation"),
        ({f"valid/{WNIDS[0]}/a.JPEG": b"x", f"test/{WNIDS[1]}/a.JPEG": b"x", "val.txt": b"x"}, "test, valid"),
        ({"test/images/a.JPEG": b"x", "docs/a.txt": b"x", "trained/x": b"x"}, None),
    ],
)
def test_what_is_not_used_is_named(contents, unused, tmp_path):
    source = write(tmp_path, TRAIN | contents)
    (source / "valid_link").symlink_to("nothing")
    expected = [f"not used, as only train, val, validation are read: {unused}"] if unused else []
    assert prepare.find(source).notes == expected


def test_what_is_beside_the_official_tars_is_named(tmp_path):
    contents = {prepare.TRAIN_TAR: as_tar({f"{WNIDS[0]}.tar": INNER}), f"val/{WNIDS[0]}/a.JPEG": b"", "val.tar": b""}
    found = prepare.find(write(tmp_path, contents | {"train/x": b""}))
    assert found.notes == [
        f"not used, as only {prepare.TRAIN_TAR}, {prepare.VALIDATION_TAR} are read: train, val, val.tar"
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("images",), "train/images: the only class, with folders in it: move these to train/"),
        (("train",), "train/train: it holds folders, no images.* is .*/train the --source?"),
        (("train", "val"), "train/train: it holds folders, no images"),
        (("n1", "Valid"), "train/Valid: it holds folders, no images"),
    ],
)
def test_class_folders_one_level_too_deep(folders, message, tmp_path):
    deep = {name.replace("train/", f"train/{folder}/"): TRAIN[name] for name in TRAIN for folder in folders}
    with pytest.raises(AlexNetError, match=message):
        prepare.find(write(tmp_path, deep))


def test_a_class_may_be_called_train(tmp_path):
    """As in COCO; with its images in it it is a class."""
    assert prepare.find(write(tmp_path, {"train/train/a.JPEG": picture(1), **TRAIN})).wnids == [*WNIDS, "train"]


@pytest.mark.parametrize("layout", ["flat", "folders", "tar", "tiny"])
def test_validation_images_of_other_classes_are_left_out(layout, tmp_path):
    """Of the six validation images four are of classes that were not trained."""
    train = {name: data for name, data in TRAIN.items() if WNIDS[1] in name}
    make_devkit(tmp_path / prepare.DEVKIT / "data")
    if layout == "flat":
        val = {f"val/{NUMBERED[number]}": b"" for number in TRUTH}
    elif layout == "folders":
        val = {f"val/{wnid}/{NUMBERED[number]}": b"" for number, wnid in TRUTH.items()}
    elif layout == "tar":
        train = {prepare.TRAIN_TAR: as_tar({f"{WNIDS[1]}.tar": INNER})}
        val = {prepare.VALIDATION_TAR: as_tar({NUMBERED[number]: b"" for number in TRUTH})}
    else:
        val = {f"val/images/{NUMBERED[number]}": b"" for number in TRUTH}
        val[f"val/{prepare.ANNOTATIONS}"] = "".join(f"{NUMBERED[number]}\t{TRUTH[number]}\n" for number in TRUTH)
    found = prepare.find(write(tmp_path, train | val))
    assert found_labels(found) == {NUMBERED[2]: WNIDS[1], NUMBERED[5]: WNIDS[1]}
    assert [note.split(": ", 1)[1] for note in found.notes] == [
        f"left out 4 images of 2 classes without training images: {WNIDS[0]}, {WNIDS[2]}"
    ]


def test_tiny_imagenet(tmp_path):
    """Its words, its files of boxes, its folders `images`; its test pictures have no labels and are not read."""
    train = {f"train/{wnid}/images/{wnid}_{n}.JPEG": picture(n) for wnid in WNIDS for n in range(2)}
    boxes = {f"train/{wnid}/{wnid}_boxes.txt": f"{wnid}_0.JPEG\t0\t0\t62\t43\n" for wnid in WNIDS}
    lines = f"val_0.JPEG\t{WNIDS[2]}\t0\t32\t44\t62\nval_1.JPEG\t{WNIDS[0]}\t52\t55\t57\t59\n"
    words = f"n00000001\tentity\n{WNIDS[1]}\tred-backed sandpiper, dunlin\n"
    val = {"val/images/val_0.JPEG": picture(1), "val/images/val_1.JPEG": picture(2)}
    others = {"words.txt": words, "wnids.txt": "\n".join(WNIDS[::-1]), "test/images/test_0.JPEG": picture(3)}
    source = write(tmp_path / "tiny", train | boxes | val | others | {f"val/{prepare.ANNOTATIONS}": lines})
    found = prepare.find(source)
    assert found.wnids == list(WNIDS)
    assert found.words[WNIDS[1]] == "red-backed sandpiper, dunlin"
    assert [p.label for p in found.splits["train"]] == [0, 0, 1, 1, 2, 2]
    assert found_labels(found) == {"val_0.JPEG": WNIDS[2], "val_1.JPEG": WNIDS[0]}
    assert (found.outside["train"], found.notes) == ([], [])


def test_classes_of_a_tar_are_in_order_wherever_they_are_in_it(tmp_path):
    train = {f"z/{WNIDS[0]}.tar": INNER, f"a/{WNIDS[1]}.tar": INNER, f"._{WNIDS[0]}.tar": b"x"}
    train |= {f"{WNIDS[2]}.tar": as_tar({"x/b.JPEG": picture(2), "x/._b.JPEG": b"x"}), "n1.tar": as_tar({})}
    found = prepare.find(write(tmp_path, {prepare.TRAIN_TAR: as_tar(train)}))
    assert found.wnids == list(WNIDS)
    assert [p.name for p in found.splits["train"]][-1] == f"{WNIDS[2]}/x/b.JPEG"
    assert [p.label for p in found.splits["train"]] == [0, 0, 1, 1, 2]
    assert found.notes == [f"no class, as no picture was found: {prepare.TRAIN_TAR}/n1"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"n1.tar": "INNER", "README": b"x"}, "README in it is not named like a class"),
        ({"n1.tar": "INNER", "cats.tar": "INNER"}, "cats.tar in it is not named like a class"),
        ({"n1.tar": "INNER", "x/n1.tar": "INNER"}, "n1.tar is in it twice"),
        ({"n1.tar": "INNER", "n2.tar": None}, "n2.tar in it is no plain file"),
    ],
)
def test_tars_of_something_else(train, message, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in train.items():
            info, data = tarfile.TarInfo(name), INNER if data == "INNER" else data
            info.type, info.linkname = (tarfile.REGTYPE, "") if data else (tarfile.LNKTYPE, "n1.tar")
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    with pytest.raises(AlexNetError, match=message):
        prepare.find(write(tmp_path, {prepare.TRAIN_TAR: buffer.getvalue()}))
    same = INNER[: INNER.index(b"b.JPEG")] + INNER  # a.JPEG, and again a.JPEG and b.JPEG
    with pytest.raises(AlexNetError, match=r"a.JPEG is in it twice"):
        prepare.find(write(tmp_path, {prepare.TRAIN_TAR: as_tar({"n1.tar": same})}))


def test_an_example_of_tfds_without_a_label(monkeypatch):
    examples = [{"image": b"x", "label": 1}, {"image": b"x", "label": -1}]
    monkeypatch.setitem(prepare._tfds_sources, "folder/train", (examples, ["n2", "n1"], ["n1", "n2"]))
    assert prepare._bytes_of(prepare.Picture("a", -1, "folder/train", 0, -1)) == (b"x", 0)
    with pytest.raises(pictures.PictureError, match="it has no label: -1"):
        prepare._bytes_of(prepare.Picture("a", -1, "folder/train", 1, -1))


def test_a_data_set_of_tfds_that_has_no_classes(tmp_path, monkeypatch):
    info = types.SimpleNamespace(file_format=types.SimpleNamespace(value="array_record"), features={"image": 1})
    builder = types.SimpleNamespace(info=info, data_dir="folder")
    monkeypatch.setattr(prepare, "_tfds_builder", lambda folder: builder)
    with pytest.raises(AlexNetError, match="folder: its examples have no image and label"):
        prepare.find(write(tmp_path, {"dataset_info.json": b"{}"}))


def test_what_is_wrong_is_said(folder, prepared, tmp_path):
    with pytest.raises(UsageError, match="is prepared already"):
        prepare.prepare(configure(folder, prepared))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        prepare.prepare(configure(folder, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


A_PICTURE = {f"train/{WNIDS[0]}/a.JPEG": picture(1)}
SOLUTION_WITHOUT_COLUMN = {prepare.SOLUTION: b"ImageId\nv0\n", "val/v0.JPEG": b""}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "there is no such folder"),
        ({}, "holds neither train/"),
        ({"train/a/Thumbs.db": b"", "train/b/._x": b"", "train/x.JPEG": b""}, "no classes with pictures: they hold no"),
        ({"train/a\n/a.JPEG": picture(1)}, r"the name of class a\\n can't be printed: rename it"),
        ({"train/a.JPEG": b""}, "has no folders of classes"),
        (A_PICTURE | {f"val/{WNIDS[1]}/b.JPEG": b""}, "there is no such class"),
        (A_PICTURE | {"train/empty/Thumbs.db": b"", "val/empty/b.JPEG": b""}, "val/empty: there is no such class"),
        (A_PICTURE | SOLUTION_WITHOUT_COLUMN, f"{prepare.SOLUTION}: its first line must be .*, not ImageId$"),
        (A_PICTURE | {prepare.SOLUTION: b"ImageId;PredictionString\nv0;n1\n"}, "not ImageId;PredictionString"),
        (A_PICTURE | {prepare.SOLUTION: b""}, f"{prepare.SOLUTION}: its first line must be ImageId,PredictionString"),
        (A_PICTURE | {prepare.SOLUTION: b"\xff"}, f"{prepare.SOLUTION}: the validation labels can't be read"),
        (A_PICTURE | {prepare.MAPPING: b"\xff"}, f"{prepare.MAPPING}: the validation labels can't be read"),
        (A_PICTURE | {prepare.WORDS: b"\xff"}, f"{prepare.WORDS}: the validation labels can't be read"),
        (A_PICTURE | {f"{prepare.DEVKIT}/data/meta.mat": b"", DEVKIT_TRUTH: b"1"}, "data/meta.mat: the validation lab"),
        (A_PICTURE | {f"{prepare.DEVKIT}/data/meta.mat": b""}, "labels can't be read .FileNotFoundError"),
        (A_PICTURE | {f"{prepare.DEVKIT}.tar.gz": b"PK"}, f"{prepare.DEVKIT}.tar.gz: can't be read"),
        ({prepare.TRAIN_TAR: b""}, "can't be read"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER})[:-9000]}, "cut off after n1.tar"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER[:1024]})}, "cut off"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": b"x" * 1024 + INNER})}, "cut off at its beginning"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": INNER.replace(b"b.JPEG", b"B.JPEG")})}, "cut off after a.JPEG"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar": gzip.compress(INNER)})}, "n1.tar in it is compressed: unpack it"),
        ({prepare.TRAIN_TAR: as_tar({"n1.tar.bz2": bz2.compress(INNER)})}, "n1.tar.bz2 in it is compressed: unpack it"),
        ({prepare.TRAIN_TAR: lzma.compress(as_tar({"n1.tar": INNER}))}, f"{prepare.TRAIN_TAR}: it is compressed"),
        (
            {prepare.TRAIN_TAR: as_tar({"n1.tar": INNER}), prepare.VALIDATION_TAR: gzip.compress(INNER)},
            f"{prepare.VALIDATION_TAR}: it is compressed: unpack it",
        ),
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
    with pytest.raises(AlexNetError, match=r"none of its 1 files is a picture \(train/n1/a.JPEG: the file is empty"):
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
            label = tfds.features.ClassLabel(names=WNIDS[::-1])  # an order of its own
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
