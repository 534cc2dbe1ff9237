"""Sources of ImageNet in each layout: which images are found, with which labels, and what is refused."""

import bz2
import csv
import gzip
import io
import lzma
import pathlib
import pickle
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import scipy.io

from alexnet_jax.data.decode import ImageError
from alexnet_jax.data.imagenet_tfds import TfdsExample, TfdsSplit
from alexnet_jax.data.labels import ANNOTATIONS, DEVKIT, MAPPING, SOLUTION, WORDS
from alexnet_jax.data.sources import TRAIN_TAR, VALIDATION_TAR, Source, find
from alexnet_jax.errors import AlexNetError
from tests.image_folders import WNIDS, encoded, make_folder, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "imagenet")


def read(source: Source, split: str) -> list[tuple[bytes, int]]:
    return [example.read() for example in source.splits[split]]


def make_tars(folder: pathlib.Path, source: pathlib.Path) -> None:
    source.mkdir()
    with tarfile.open(source / TRAIN_TAR, "w") as outer:
        for wnid in reversed(WNIDS):  # the official one is not sorted
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in (folder / "train" / wnid).iterdir():
                    tar.add(path, path.name)
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = inner.tell()
            inner.seek(0)
            outer.addfile(info, inner)
    with tarfile.open(source / VALIDATION_TAR, "w") as tar:
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
def test_official_tars_give_the_same(folder, tmp_path, archived):
    source = tmp_path / "tars"
    make_tars(folder, source)
    make_devkit(tmp_path / DEVKIT / "data")
    if archived:
        with tarfile.open(source / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / DEVKIT, DEVKIT)
    else:
        (tmp_path / DEVKIT).rename(source / DEVKIT)
    expected, found = find(folder), find(source)
    assert read(found, "train") == read(expected, "train")
    assert sorted(read(found, "validation")) == sorted(read(expected, "validation"))
    assert [label for _, label in read(found, "validation")] == [0, 1, 2, 0, 1, 2]
    assert found.wnids == expected.wnids == list(WNIDS)
    assert found.words == dict(zip(WNIDS, ("tench", "crane", "saw"), strict=True))


def test_flat_validation_with_kaggles_solution(folder, tmp_path):
    source = tmp_path / "kaggle"
    (source / "val").mkdir(parents=True)
    (source / "train").symlink_to(folder / "train")
    (tmp_path / MAPPING).write_text("".join(f"{wnid} word {wnid[-1]}, other\n" for wnid in WNIDS))
    with (tmp_path / SOLUTION).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for number, path in enumerate(flat_validation(folder)):
            (source / "val" / f"v{number}.JPEG").write_bytes(path.read_bytes())
            writer.writerow([f"v{number}", f"{path.parent.name} 1 2 3 4"])
    found = find(source, tmp_path)
    assert sorted(read(found, "validation")) == sorted(read(find(folder), "validation"))
    assert found.words[WNIDS[1]] == f"word {WNIDS[1][-1]}, other"
    with pytest.raises(AlexNetError, match="val: its images have no labels: --labels must be a folder"):
        find(source)
    (source / "val" / "valprep.sh").write_text("mv")
    with pytest.raises(AlexNetError, match=f"{SOLUTION} has no class for valprep"):
        find(source, tmp_path)


def as_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


INNER = as_tar({"a.JPEG": encoded(1), "b.JPEG": encoded(2)})


def found_labels(source: Source) -> dict[str, str]:
    """Class of each validation image by the last part of its name."""
    return {p.name.rsplit("/", 1)[-1]: source.wnids[p.label] for p in source.splits["validation"]}


TRAIN = {f"train/{wnid}/{wnid}_0.JPEG": encoded(label) for label, wnid in enumerate(WNIDS)}
NUMBERED = {number: f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(14)}
TRUTH = {1: WNIDS[0], 2: WNIDS[1], 3: WNIDS[2], 4: WNIDS[0], 5: WNIDS[1], 6: WNIDS[2]}  # of `make_devkit`


@pytest.mark.parametrize("layout", ["folder", "tar", "kaggle", "tiny"])
def test_validation_labels_follow_from_the_name(layout, tmp_path):
    """One image is missing and one file too many: by position, most labels would be wrong."""
    source = write(tmp_path, TRAIN)
    make_devkit(source / DEVKIT / "data")
    names = {NUMBERED[n]: TRUTH[n] for n in (1, 2, 4, 5, 6)}
    if layout == "kaggle":
        rows = "".join(f"{NUMBERED[n][:-5]},{TRUTH[n]} 1 2 3 4 {TRUTH[n]} 5 6 7 8\n" for n in (6, 5, 4, 2, 1))
        write(source, {SOLUTION: "\ufeffImageId,PredictionString\n" + rows})
        shutil.rmtree(source / DEVKIT)
    files = dict.fromkeys(names, encoded(1)) | {"Thumbs.db": b"x", "._" + NUMBERED[3]: b"x"}
    if layout == "tar":
        shutil.rmtree(source / "train")
        train = {f"train/{wnid}.tar": as_tar({"a.JPEG": encoded(1)}) for wnid in WNIDS}
        write(
            source,
            {TRAIN_TAR: as_tar(train), VALIDATION_TAR: as_tar({f"v/{n}": files[n] for n in files})},
        )
    elif layout == "tiny":
        names = {f"val_{number}.JPEG": wnid for number, wnid in TRUTH.items() if number != 3}
        lines = "".join(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in TRUTH.items())
        write(source, {f"val/images/{name}": encoded(1) for name in names} | {f"val/{ANNOTATIONS}": lines})
    else:
        write(source, {f"val/{name}": data for name, data in files.items()})
    found = find(source)
    assert found_labels(found) == names
    expected = [] if layout == "kaggle" else ["5 of the 6 images"]
    assert [note.split(": ")[1][: len("5 of the 6 images")] for note in found.notes] == expected


@pytest.mark.parametrize("labels", [SOLUTION, DEVKIT, f"{DEVKIT}/data", "other", f"{DEVKIT}.tar.gz"])
def test_labels_may_be_the_file_or_the_devkit_itself(labels, tmp_path):
    source = write(tmp_path / "source", TRAIN | {f"val/{NUMBERED[1]}": b""})
    if labels == SOLUTION:
        write(tmp_path, {labels: f"{BOTH}{NUMBERED[1][:-5]},{TRUTH[1]} 1 2 3 4\n"})
    else:
        make_devkit(tmp_path / ("other" if labels == "other" else DEVKIT) / "data")
    if labels.endswith(".tar.gz"):
        with tarfile.open(tmp_path / labels, "w:gz") as tar:
            tar.add(tmp_path / DEVKIT, DEVKIT)
        shutil.rmtree(tmp_path / DEVKIT)
    assert found_labels(find(source, tmp_path / labels)) == {NUMBERED[1]: TRUTH[1]}


def test_labels_that_are_another_file(tmp_path):
    source = write(tmp_path, TRAIN | {"labels.csv": b""})
    with pytest.raises(AlexNetError, match=f"--labels .*labels.csv: must be a folder, {SOLUTION} or"):
        find(source, tmp_path / "labels.csv")


BOTH = "ImageId,PredictionString\n"
ANNOTATED = {f"val/{ANNOTATIONS}": f"a.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n", "val/images/a.JPEG": b""}
DEVKIT_TRUTH = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"


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
        ({f"val/{NUMBERED[1]}": b"", "val/ILSVRC2012_val_00000001.png": b""}, "have the same label: remove one"),
        (
            {f"val/{WNIDS[1]}/{NUMBERED[1]}": b""},
            f"in the folder of {WNIDS[1]}, but its class in the devkit is {WNIDS[0]}",
        ),
        (
            {"val/a.JPEG": b"", SOLUTION: BOTH + "a,n5 1 2 3 4\n"},
            "a.JPEG is of class n5, which has no training",
        ),
        (
            {SOLUTION: BOTH + f"a,{WNIDS[0]}\na,{WNIDS[1]}\n"},
            f"class of a is {WNIDS[1]} here and {WNIDS[0]} else",
        ),
        (
            {SOLUTION: BOTH + f"{NUMBERED[1][:-5]},{WNIDS[1]}\n"},
            f"class of .*01 is {WNIDS[0]} here and {WNIDS[1]}",
        ),
        ({SOLUTION: BOTH + "a,n1 1 2 3 4 n2 1 2 3 4\n"}, "line 2 has 2 classes"),
        ({SOLUTION: BOTH + "a,\n"}, "line 2 has 0 classes"),
        ({DEVKIT_TRUTH: "3\n\n1\n"}, "ground_truth.txt: line 2 is not the number of a class"),
        ({DEVKIT_TRUTH: "3\n1\n4\n"}, "ground_truth.txt: line 3 is not the number of a class"),
        ({DEVKIT_TRUTH: "3\n1 2\n"}, "ground_truth.txt: line 2 is not the number of a class"),
        (ANNOTATED | {"val/images/b.JPEG": b""}, "val_annotations.txt has no class for b.JPEG"),
        (ANNOTATED | {f"val/{ANNOTATIONS}": "a.JPEG\tn1\na.JPEG\tn2\n"}, "class of a is n2 here and n1 else"),
        (ANNOTATED | {f"val/{ANNOTATIONS}": f"a.JPEG {WNIDS[0]}\n"}, "line 1 has no class"),
        ({"val/x/a.JPEG": b"", "validation/x/a.JPEG": b""}, "contains both val/ and validation/"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused(contents, message, tmp_path):
    make_devkit(tmp_path / DEVKIT / "data")
    with pytest.raises(AlexNetError, match=message) as caught:
        find(write(tmp_path, TRAIN | contents))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("twice", ["number", "wnid"])
def test_a_devkit_that_has_a_class_twice(twice, tmp_path):
    make_devkit(tmp_path / DEVKIT / "data")
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(1, WNIDS[0], "tench", 0), (1 if twice == "number" else 2, WNIDS[twice == "number"], "crane", 0)]
    scipy.io.savemat(tmp_path / DEVKIT / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    with pytest.raises(AlexNetError, match=r"meta.mat: contains class . or .* twice"):
        find(write(tmp_path, TRAIN))


def test_a_folder_without_an_image_is_not_a_class(tmp_path):
    """Wherever it sorts: it would change the labels of all others."""
    extra = {"@eaDir/a.JPEG": encoded(1), "__MACOSX/a.JPEG": encoded(1), "lost+found/x": b"", "Thumbs.db": b""}
    extra |= {".ipynb_checkpoints/a.JPEG": encoded(1), "a/.DS_Store": b"", "b/c/Thumbs.db": b"", "z/notes.txt": b"x"}
    source = write(tmp_path, TRAIN | {f"train/{name}": data for name, data in extra.items()})
    write(source, {f"val/{WNIDS[2]}/x.JPEG": encoded(1), "val/m/desktop.ini": b"", "val/@eaDir/x.JPEG": encoded(1)})
    (source / "train" / "empty").mkdir()
    found = find(source)
    assert found.wnids == list(WNIDS)
    assert [example.label for example in found.splits["train"]] == [0, 1, 2]
    assert [example.label for example in found.splits["validation"]] == [2]
    assert found.notes == [
        "not a class, because it contains no image: train/a, train/b, train/empty, train/z",
        "no files in val/m",
    ]
    assert [name for name, _ in found.skipped["train"]] == ["train/z/notes.txt"]
    (source / "train" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG").write_bytes(b"not an image")
    assert find(source).wnids == [WNIDS[0], WNIDS[2]]


def test_subfolders_belong_to_their_class(tmp_path):
    source = write(tmp_path, TRAIN | {f"train/{WNIDS[1]}/sub/deeper/x.JPEG": encoded(1)})
    (source / "train" / WNIDS[2] / "up").symlink_to("../..")
    found = find(source)
    names = [(p.name, p.label) for p in found.splits["train"]]
    assert names == [
        (f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG", 0),
        (f"train/{WNIDS[1]}/{WNIDS[1]}_0.JPEG", 1),
        (f"train/{WNIDS[1]}/sub/deeper/x.JPEG", 1),
        (f"train/{WNIDS[2]}/{WNIDS[2]}_0.JPEG", 2),
    ]
    assert found.notes == [f"images in subfolders belong to the class of the folder above: train/{WNIDS[1]}/sub/deeper"]
    (source / "train" / "self").symlink_to(".")
    with pytest.raises(AlexNetError, match="train/self: a link to a folder that contains it"):
        find(source)


@pytest.mark.parametrize(
    ("contents", "unused"),
    [
        ({VALIDATION_TAR: b"x"}, VALIDATION_TAR),
        ({"val.zip": b"x", "ILSVRC2012_bbox_val.tgz": b"x", "LOC_val_solution.csv.bak": b"x"}, "val.zip"),
        ({"Val/a.JPEG": b"x", f"Validation/{WNIDS[0]}/a.JPEG": b"x"}, "Val, Validation"),
        ({f"valid/{WNIDS[0]}/a.JPEG": b"x", f"test/{WNIDS[1]}/a.JPEG": b"x", "val.txt": b"x"}, "test, valid"),
        ({"test/images/a.JPEG": b"x", "docs/a.txt": b"x", "trained/x": b"x"}, None),
    ],
)
def test_what_is_not_used_is_named(contents, unused, tmp_path):
    source = write(tmp_path, TRAIN | contents)
    (source / "valid_link").symlink_to("nothing")
    expected = [f"not used, because only train, val, validation are read: {unused}"] if unused else []
    assert find(source).notes == expected


def test_what_is_beside_the_official_tars_is_named(tmp_path):
    contents = {TRAIN_TAR: as_tar({f"{WNIDS[0]}.tar": INNER}), f"val/{WNIDS[0]}/a.JPEG": b"", "val.tar": b""}
    found = find(write(tmp_path, contents | {"train/x": b""}))
    assert found.notes == [f"not used, because only {TRAIN_TAR}, {VALIDATION_TAR} are read: train, val, val.tar"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("images",), "train/images: the only class, and it has subfolders: move them to train/"),
        (("train",), "train/train: contains folders instead of images.* should --source be .*/train?"),
        (("train", "val"), "train/train: contains folders instead of images"),
        (("n1", "Valid"), "train/Valid: contains folders instead of images"),
    ],
)
def test_class_folders_one_level_too_deep(folders, message, tmp_path):
    deep = {name.replace("train/", f"train/{folder}/"): TRAIN[name] for name in TRAIN for folder in folders}
    with pytest.raises(AlexNetError, match=message):
        find(write(tmp_path, deep))


def test_a_class_may_be_called_train(tmp_path):
    """As in COCO: it contains images, so it is a class."""
    assert find(write(tmp_path, {"train/train/a.JPEG": encoded(1), **TRAIN})).wnids == [*WNIDS, "train"]


@pytest.mark.parametrize("layout", ["flat", "folders", "tar", "tiny"])
def test_validation_images_of_other_classes_are_left_out(layout, tmp_path):
    """Of the six validation images four are of classes that were not trained."""
    train = {name: data for name, data in TRAIN.items() if WNIDS[1] in name}
    make_devkit(tmp_path / DEVKIT / "data")
    if layout == "flat":
        val = {f"val/{NUMBERED[number]}": b"" for number in TRUTH}
    elif layout == "folders":
        val = {f"val/{wnid}/{NUMBERED[number]}": b"" for number, wnid in TRUTH.items()}
    elif layout == "tar":
        train = {TRAIN_TAR: as_tar({f"{WNIDS[1]}.tar": INNER})}
        val = {VALIDATION_TAR: as_tar({NUMBERED[number]: b"" for number in TRUTH})}
    else:
        val = {f"val/images/{NUMBERED[number]}": b"" for number in TRUTH}
        val[f"val/{ANNOTATIONS}"] = "".join(f"{NUMBERED[number]}\t{TRUTH[number]}\n" for number in TRUTH)
    found = find(write(tmp_path, train | val))
    assert found_labels(found) == {NUMBERED[2]: WNIDS[1], NUMBERED[5]: WNIDS[1]}
    assert [note.split(": ", 1)[1] for note in found.notes] == [
        f"left out 4 images of 2 classes without training images: {WNIDS[0]}, {WNIDS[2]}"
    ]


def test_tiny_imagenet(tmp_path):
    """Its words, box files and `images` folders are understood; its test images have no labels and are not read."""
    train = {f"train/{wnid}/images/{wnid}_{n}.JPEG": encoded(n) for wnid in WNIDS for n in range(2)}
    boxes = {f"train/{wnid}/{wnid}_boxes.txt": f"{wnid}_0.JPEG\t0\t0\t62\t43\n" for wnid in WNIDS}
    lines = f"val_0.JPEG\t{WNIDS[2]}\t0\t32\t44\t62\nval_1.JPEG\t{WNIDS[0]}\t52\t55\t57\t59\n"
    words = f"n00000001\tentity\n{WNIDS[1]}\tred-backed sandpiper, dunlin\n"
    val = {"val/images/val_0.JPEG": encoded(1), "val/images/val_1.JPEG": encoded(2)}
    others = {"words.txt": words, "wnids.txt": "\n".join(WNIDS[::-1]), "test/images/test_0.JPEG": encoded(3)}
    source = write(tmp_path / "tiny", train | boxes | val | others | {f"val/{ANNOTATIONS}": lines})
    found = find(source)
    assert found.wnids == list(WNIDS)
    assert found.words[WNIDS[1]] == "red-backed sandpiper, dunlin"
    assert [p.label for p in found.splits["train"]] == [0, 0, 1, 1, 2, 2]
    assert found_labels(found) == {"val_0.JPEG": WNIDS[2], "val_1.JPEG": WNIDS[0]}
    assert (found.skipped["train"], found.notes) == ([], [])


def test_classes_of_a_tar_are_in_order_wherever_they_are_in_it(tmp_path):
    train = {f"z/{WNIDS[0]}.tar": INNER, f"a/{WNIDS[1]}.tar": INNER, f"._{WNIDS[0]}.tar": b"x"}
    train |= {f"{WNIDS[2]}.tar": as_tar({"x/b.JPEG": encoded(2), "x/._b.JPEG": b"x"}), "n1.tar": as_tar({})}
    found = find(write(tmp_path, {TRAIN_TAR: as_tar(train)}))
    assert found.wnids == list(WNIDS)
    assert [p.name for p in found.splits["train"]][-1] == f"{WNIDS[2]}/x/b.JPEG"
    assert [p.label for p in found.splits["train"]] == [0, 0, 1, 1, 2]
    assert found.notes == [f"not a class, because it contains no image: {TRAIN_TAR}/n1"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"n1.tar": "INNER", "README": b"x"}, "README in it is not named like a class"),
        ({"n1.tar": "INNER", "cats.tar": "INNER"}, "cats.tar in it is not named like a class"),
        ({"n1.tar": "INNER", "x/n1.tar": "INNER"}, "contains n1.tar twice"),
        ({"n1.tar": "INNER", "n2.tar": None}, "n2.tar in it is not a regular file"),
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
        find(write(tmp_path, {TRAIN_TAR: buffer.getvalue()}))
    same = INNER[: INNER.index(b"b.JPEG")] + INNER  # a.JPEG, and again a.JPEG and b.JPEG
    with pytest.raises(AlexNetError, match=r"contains a.JPEG twice"):
        find(write(tmp_path, {TRAIN_TAR: as_tar({"n1.tar": same})}))


def test_an_example_of_tfds_without_a_label(monkeypatch):
    split = TfdsSplit("folder", "train")
    monkeypatch.setattr(TfdsSplit, "examples", [{"image": b"x", "label": 1}, {"image": b"x", "label": -1}])
    monkeypatch.setattr(TfdsSplit, "labels", [1, 0])
    assert TfdsExample("a", split, 0).read() == (b"x", 0)
    with pytest.raises(ImageError, match="it has no label: -1"):
        TfdsExample("a", split, 1).read()


def test_a_data_set_of_tfds_that_has_no_classes(tmp_path, monkeypatch):
    info = types.SimpleNamespace(file_format=types.SimpleNamespace(value="array_record"), features={"image": 1})
    builder = types.SimpleNamespace(info=info, data_dir="folder")
    (tmp_path / "features.json").write_text("{}")
    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", lambda folder: builder)
    with pytest.raises(AlexNetError, match="folder: its examples have no image and label"):
        find(write(tmp_path, {"dataset_info.json": b"{}"}))


ONE_IMAGE = {f"train/{WNIDS[0]}/a.JPEG": encoded(1)}
SOLUTION_WITHOUT_COLUMN = {SOLUTION: b"ImageId\nv0\n", "val/v0.JPEG": b""}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "there is no such folder"),
        ({}, "contains neither train/"),
        (
            {"train/a/Thumbs.db": b"", "train/b/._x": b"", "train/x.JPEG": b""},
            "has no classes with images: they contain no files",
        ),
        ({"train/a\n/a.JPEG": encoded(1)}, r"the name of class a\\n can't be printed: rename it"),
        ({"train/a.JPEG": b""}, "contains no folders of classes"),
        ({"train/n1/a.JPEG": b""}, r"none of the 1 files is an image \(train/n1/a.JPEG: the file is empty\)"),
        (ONE_IMAGE | {f"val/{WNIDS[1]}/b.JPEG": b""}, f"val/{WNIDS[1]}: neither this nor any other folder is a class"),
        (ONE_IMAGE | {"train/empty/Thumbs.db": b"", "val/empty/b.JPEG": b""}, "val/empty: neither this nor any"),
        (ONE_IMAGE | SOLUTION_WITHOUT_COLUMN, f"{SOLUTION}: the first line must be .*, not ImageId$"),
        (ONE_IMAGE | {SOLUTION: b"ImageId;PredictionString\nv0;n1\n"}, "not ImageId;PredictionString"),
        (ONE_IMAGE | {SOLUTION: b""}, f"{SOLUTION}: the first line must be ImageId,PredictionString"),
        (ONE_IMAGE | {SOLUTION: b"\xff"}, f"{SOLUTION}: can't be read"),
        (ONE_IMAGE | {MAPPING: b"\xff"}, f"{MAPPING}: can't be read"),
        (ONE_IMAGE | {WORDS: b"\xff"}, f"{WORDS}: can't be read"),
        (ONE_IMAGE | {f"{DEVKIT}/data/meta.mat": b"", DEVKIT_TRUTH: b"1"}, "data/meta.mat: can't be read"),
        (ONE_IMAGE | {f"{DEVKIT}/data/meta.mat": b""}, "ground_truth.txt: can't be read .FileNotFoundError"),
        (ONE_IMAGE | {f"{DEVKIT}.tar.gz": b"PK"}, f"{DEVKIT}.tar.gz: can't be read"),
        ({TRAIN_TAR: b""}, "can't be read"),
        ({TRAIN_TAR: as_tar({"n1.tar": INNER})[:-9000]}, "cut off after n1.tar"),
        ({TRAIN_TAR: as_tar({"n1.tar": INNER[:1024]})}, "cut off"),
        ({TRAIN_TAR: as_tar({"n1.tar": b"x" * 1024 + INNER})}, "cut off at its beginning"),
        ({TRAIN_TAR: as_tar({"n1.tar": INNER.replace(b"b.JPEG", b"B.JPEG")})}, "cut off after a.JPEG"),
        ({TRAIN_TAR: as_tar({"n1.tar": gzip.compress(INNER)})}, "n1.tar in it is compressed: decompress it first"),
        (
            {TRAIN_TAR: as_tar({"n1.tar.bz2": bz2.compress(INNER)})},
            "n1.tar.bz2 in it is compressed: decompress it first",
        ),
        ({TRAIN_TAR: lzma.compress(as_tar({"n1.tar": INNER}))}, f"{TRAIN_TAR}: it is compressed"),
        (
            {TRAIN_TAR: as_tar({"n1.tar": INNER}), VALIDATION_TAR: gzip.compress(INNER)},
            f"{VALIDATION_TAR}: it is compressed: decompress it first",
        ),
        ({"dataset_info.json": b"{"}, "TFDS can't read it"),
    ],
)
def test_unusable_sources_are_refused_in_one_line(contents, message, tmp_path):
    if contents is not None:
        (tmp_path / "source").mkdir()
        write(tmp_path / "source", contents)
    with pytest.raises(AlexNetError, match=message) as caught:
        find(tmp_path / "source")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_tfds_imagenet_gives_the_same(folder, tmp_path):
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
    expected, found = find(folder), pickle.loads(pickle.dumps(find(tmp_path / "tfds")))  # as worker processes get it
    assert found.wnids == list(WNIDS)
    for split in ("train", "validation"):
        assert sorted(read(found, split)) == sorted(read(expected, split))
    # TFDS would import what features.json names.
    (features,) = (tmp_path / "tfds").rglob("features.json")
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.text", "this.text"))
    with pytest.raises(AlexNetError, match=r"names this\.text.*, which is not TFDS's"):
        find(tmp_path / "tfds")
    assert "this" not in sys.modules
