"""A folder of the user's own images."""

import errno
import pathlib
import re
import shutil
import sys
import unicodedata

import numpy as np
import platformdirs
import pytest
from PIL import Image

import alexnet_jax
import eval
import train
from alexnet_jax import data
from alexnet_jax.config import cli
from alexnet_jax.config.settings import DataConfig
from alexnet_jax.data import image_folder, prepare, shapes
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.inspection.classify import classify_images
from alexnet_jax.inspection.evaluate import evaluate
from alexnet_jax.network import build
from alexnet_jax.runs import shipped
from alexnet_jax.training import loop
from tests.tiny_runs import TINY_NETWORKS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))  # its modules import one another

import ship


def write(root, names, count, first=0):
    """Drawn shapes as PNG files, `count` in each class's folder."""
    split = shapes.load(train=10 * (first + count), validation=0, test=0)["train"]
    for label, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(np.flatnonzero(split.labels == label)[first:]):
            Image.fromarray(split.images[index]).save(folder / f"{first + number:03d}.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write(root, ("Katze", "狗", "ёж"), 30)
    return root


@pytest.fixture
def own(source, tmp_path):
    return shutil.copytree(source, tmp_path / "own")


def load(root, image_size=32, validation_share=0.2):
    return image_folder.load(root, image_size, validation_share)


def test_pixels_labels_and_names(own):
    dataset = load(own)
    assert dataset.class_names == ("Katze", "ёж", "狗")
    assert sum(dataset.counts.values()) == 90
    assert 5 < dataset.counts["validation"] < 35
    stored = {
        np.asarray(Image.open(path)).tobytes(): name for name in dataset.class_names for path in (own / name).iterdir()
    }
    for split in dataset.splits.values():
        assert [stored[image.tobytes()] for image in split.images] == [dataset.class_names[i] for i in split.labels]


def test_what_is_held_out_stays_so_when_images_are_added(own):
    before = load(own)
    write(own, ("Katze", "狗", "ёж"), 10, first=30)
    (own / "Katze" / "deeper").mkdir()
    (own / "Katze" / "000.png").rename(own / "Katze" / "deeper" / "000.png")  # another name: perhaps another side
    after = load(own)
    sides = [{image.tobytes() for image in dataset["train"].images} for dataset in (before, after)]
    moved = np.asarray(Image.open(own / "Katze" / "deeper" / "000.png")).tobytes()
    for image in before["validation"].images:
        assert image.tobytes() == moved or image.tobytes() not in sides[1]
    assert len(after["train"]) + len(after["validation"]) == 120


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_given_splits_are_taken(own, tmp_path, name):
    root = tmp_path / "split"
    root.mkdir()
    own.rename(root / "train")
    write(root / name, ("Katze", "狗"), 5, first=30)
    dataset = load(root)
    split = "test" if name == "test" else "validation"
    assert dataset.counts == {"train": 90, split: 10}
    assert "held out" not in dataset.source


def test_a_run_from_first_to_last(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    flags = ["folder", "--data-dir", str(own), "--workdir", str(tmp_path / "run"), "--num-devices", "1"]
    flags += ["--optimizer", "sgd", "--learning-rate", "1e-3", "--epochs"]
    config = cli.parse_train([*flags, "2", "--rate-schedule", "drops", "--warmup-epochs", "0"])
    loop.train_and_evaluate(config, data.load(config.data))
    assert "20% of the names held out for validation" in capsys.readouterr().out
    run = alexnet_jax.open_run(tmp_path / "run")
    assert run.class_names == ("Katze", "ёж", "狗")
    evaluate(cli.parse_eval([str(tmp_path / "run")]))
    assert (tmp_path / "run" / "eval" / "validation.json").exists()
    photo = next((own / "狗").iterdir())
    (row,) = classify_images(cli.parse_eval([str(tmp_path / "run"), "--images", str(photo)]))
    assert {entry["class"] for entry in row["top"]} == set(run.class_names)
    (own / "Katze" / "000.png").unlink()
    with pytest.raises((AlexNetError, UsageError), match=r"data set|images"):
        loop.train_and_evaluate(config, data.load(config.data))


def test_broken_files_are_left_out_and_named(own, capsys):
    (own / "Katze" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (own / "Katze" / "empty.png").write_bytes(b"")
    (own / "Katze" / "notes.txt").write_text("no image")
    (own / "nothing").mkdir()
    shutil.copy(own / "Katze" / "000.png", own / "loose.png")
    dataset = load(own)
    err = capsys.readouterr().err
    assert sum(dataset.counts.values()) == 90
    for words in ("broken.jpg: left out: ", "empty.png: left out: the file is empty", "1 folder(s) without images"):
        assert words in err, words
    assert "1 image(s) in no class's folder are left out: loose.png" in err
    assert "notes.txt" not in err


def test_few_unequal_and_copied_images_are_reported(own, tmp_path, capsys):
    for path in sorted((own / "Katze").iterdir())[2:]:
        path.unlink()
    root = tmp_path / "split"
    root.mkdir()
    own.rename(root / "train")
    shutil.copytree(root / "train" / "狗", root / "val" / "狗")
    load(root)
    err = capsys.readouterr().err
    assert "1 class(es) with fewer than 10 images to train on: Katze 2" in err
    assert "the classes are unequal: 30 images of 狗, 2 of Katze" in err
    assert "30 of the 30 images for validation are also among those to train on" in err


def test_links_to_a_folder_above_end(own):
    (own / "Katze" / "loop").symlink_to(own)
    (own / "back").symlink_to(own.parent)
    assert load(own).class_names == ("Katze", "ёж", "狗")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: [shutil.rmtree(root / name) for name in ("狗", "ёж")], "has images of one class, Katze"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "has no images in folders"),
        (lambda root: shutil.copytree(root / "Katze", root / "KATZE"), "KATZE and Katze differ only in case"),
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: (shutil.rmtree(root), root.write_text("")), "is a file"),
    ],
    ids=["one class", "no images", "two cases", "missing", "a file"],
)
def test_what_is_no_folder_of_classes_is_refused(own, change, message):
    change(own)
    with pytest.raises(AlexNetError, match=message):
        load(own)


@pytest.mark.parametrize("inside", ["runs/folder", "Katze/run"])
def test_a_run_among_the_images_is_refused(own, inside, monkeypatch):
    """Its pictures would be images to train on."""
    monkeypatch.chdir(own)
    with pytest.raises(UsageError, match=f"--workdir {inside} is in --data-dir: the run's pictures would"):
        train.main(["folder", "--data-dir", ".", "--workdir", inside])
    assert load(own).class_names == ("Katze", "ёж", "狗")


def test_a_class_may_be_called_train(own):
    (own / "狗").rename(own / "train")
    assert load(own).class_names == ("Katze", "train", "ёж")


def test_splits_without_classes_are_not_taken_for_classes(own):
    shutil.rmtree(own / "ёж")
    (own / "狗").rename(own / "train")
    (own / "Katze").rename(own / "val")
    with pytest.raises(AlexNetError, match="train and val look like splits, not classes: name them train, val and"):
        load(own)


@pytest.mark.parametrize(
    "names",
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "VAL"), ("train_images", "test_images"), ("x-valid",)],
)
def test_splits_in_another_spelling_are_not_taken_for_classes(own, tmp_path, names):
    for name in names:
        shutil.copytree(own, tmp_path / "root" / name)
    with pytest.raises(AlexNetError, match="look like splits, not classes"):
        load(tmp_path / "root")


def test_names_that_only_contain_a_splits_are_classes(own):
    (own / "狗").rename(own / "trainers")
    (own / "ёж").rename(own / "train")
    (own / "Katze").rename(own / "contest")
    assert load(own).class_names == ("contest", "train", "trainers")


def test_a_dataset_json_of_ones_own(own):
    (own / "dataset.json").write_text('{"labels": []}')
    assert load(own).counts == {"train": 72, "validation": 18}


def test_images_to_test_on_without_classes_are_not_read(own, tmp_path, capsys):
    root = tmp_path / "split"
    shutil.copytree(own, root / "train")
    shutil.copytree(own / "Katze", root / "test")
    assert set(load(root).counts) == {"train", "validation"}
    assert "test: not read, because it has no folder of images for each class" in capsys.readouterr().err


def test_two_forms_of_one_name_are_refused(own):
    (own / "Katze").rename(own / unicodedata.normalize("NFC", "é"))
    (own / "狗").rename(own / unicodedata.normalize("NFD", "é"))
    with pytest.raises(AlexNetError, match="has two folders é in different Unicode forms"):
        load(own)


def test_a_split_with_loose_images_is_refused(own, tmp_path):
    root = tmp_path / "split"
    root.mkdir()
    own.rename(root / "train")
    shutil.copy(root / "train" / "Katze" / "000.png", root / "train" / "000.png")
    with pytest.raises(AlexNetError, match="has images beside folders of images"):
        load(root)


def test_an_unknown_class_to_validate_on_is_refused(own, tmp_path):
    root = tmp_path / "split"
    root.mkdir()
    own.rename(root / "train")
    write(root / "val", ("Hund",), 2)
    with pytest.raises(AlexNetError, match="class Hund has no folder in"):
        load(root)


def test_too_many_classes_or_pixels_are_refused(own, monkeypatch):
    with pytest.raises(UsageError, match="--validation-share 0"):
        load(own, validation_share=0.0)
    monkeypatch.setattr(image_folder, "MOST_CLASSES", 2)
    with pytest.raises(AlexNetError, match="has 3 classes; at most 2"):
        load(own)


def test_tiny_imagenet_is_named(own, tmp_path):
    root = tmp_path / "tiny"
    root.mkdir()
    own.rename(root / "train")
    write(root / "val", ("images",), 2)
    (root / "val" / "val_annotations.txt").write_text("000.png\tKatze\t0\t0\t31\t31\n")
    with pytest.raises(AlexNetError, match=r"has its labels in val_annotations\.txt \(Tiny ImageNet\): use python -m"):
        load(root)


def test_a_huge_file_is_left_out(own, capsys):
    with (own / "Katze" / "huge.tif").open("wb") as file:
        file.write(b"II*\0")
        file.truncate(2 * 2**30)
    assert sum(load(own).counts.values()) == 90
    assert "huge.tif: left out: it has 2,147,483,648 bytes, more than 536,870,912" in capsys.readouterr().err


def test_many_images_are_prepared_once_and_streamed(own, monkeypatch, tmp_path, capsys):
    small = load(own)
    monkeypatch.setattr(image_folder, "MOST_BYTES", 10_000)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    large = load(own)
    assert "90 images don't fit into memory: they are scaled once" in capsys.readouterr().out
    assert (large.name, large.class_names, large.counts) == ("folder", small.class_names, small.counts)
    stored = large.examples("train", np.arange(small.counts["train"]))
    np.testing.assert_array_equal(stored.labels, small["train"].labels)
    assert np.abs(stored.images.astype(int) - small["train"].images).mean() < 4  # JPEG
    (shards,) = (path.parent for path in (tmp_path / "alexnet_jax" / "folders").glob("*/dataset.json"))
    before = (shards / "dataset.json").stat().st_mtime_ns
    assert load(own).fingerprint() == large.fingerprint()
    assert (shards / "dataset.json").stat().st_mtime_ns == before
    for damage in (
        lambda: next(shards.glob("train-*")).unlink(),
        lambda: (shards / "statistics.npz").unlink(),
        lambda: (shards / "dataset.json").write_text("{"),
    ):
        damage()
        assert load(own).fingerprint() == large.fingerprint()
        assert "prepare it again; this is done again now" in capsys.readouterr().err
    moved = own.rename(tmp_path / "moved")
    assert load(moved).fingerprint() == large.fingerprint()
    moved.rename(own)
    (own / "Katze" / "000.png").touch()  # the image may be another one
    load(own)
    assert len(list((tmp_path / "alexnet_jax" / "folders").glob("*/dataset.json"))) == 3
    with pytest.raises(UsageError, match=r"--image-size 64: .* was prepared with 32; give --image-size 32"):
        load(shards, image_size=64)
    with pytest.raises(UsageError, match=r"--scaling caffe: .* was prepared with square; give --scaling square"):
        image_folder.load(shards, 32, 0.2, "caffe")
    with pytest.raises(UsageError, match=r"--validation-share 0\.5: .* was prepared with 0\.2"):
        load(shards, validation_share=0.5)
    with pytest.raises(UsageError, match="contains a prepared folder data set: use --dataset folder"):
        data.load(DataConfig(dataset="imagenet", data_dir=shards))


def test_prepared_folders_are_checked_like_others(own, tmp_path, capsys):
    (own / "Katze" / "broken.png").write_bytes(b"\x89PNG\r\n broken")
    prepare.main(["folder", "--source", str(own), "--out", str(tmp_path / "out"), "--size", "32"])
    assert "broken.png: left out:" in capsys.readouterr().err
    for path in (own / "狗").iterdir():
        path.write_bytes(b"\x89PNG\r\n broken")
    with pytest.raises(AlexNetError, match="class 狗 has no image to train on"):
        prepare.main(["folder", "--source", str(own), "--out", str(tmp_path / "other"), "--size", "32"])


def test_a_disk_that_fails_ends_the_reading(own, tmp_path, monkeypatch):
    """A file that can't be read for a moment must not be missing from the data set for good."""
    failing = sorted((own / "Katze").iterdir())[0]

    def read_bytes(path, limit):
        if path == failing:
            raise OSError(errno.EIO, "Input/output error")
        return path.read_bytes()

    monkeypatch.setattr(image_folder, "read_bytes", read_bytes)
    with pytest.raises(AlexNetError, match=r"000\.png: can't be read now \(Input/output error\): repeat the command"):
        load(own)


def test_a_folder_is_prepared_by_hand(own, tmp_path):
    prepare.main(["folder", "--source", str(own), "--out", str(tmp_path / "out"), "--size", "32", "--store", "raw"])
    large, small = load(tmp_path / "out"), load(own)
    assert (large.name, large.counts) == ("folder", small.counts)
    stored = large.examples("validation", np.arange(small.counts["validation"]))
    np.testing.assert_array_equal(stored.images, small["validation"].images)
    with pytest.raises(UsageError, match=r"prepare imagenet, or python -m alexnet_jax\.data\.prepare folder"):
        prepare.main(["cifar10"])


def test_the_commands_of_the_page_run(own, tiny, tmp_path, monkeypatch, capsys):
    """On few images, with a tiny network, and weights of the same."""
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    monkeypatch.chdir(tmp_path)
    own.rename("pictures")
    shutil.copy(next((tmp_path / "pictures" / "狗").iterdir()), "photo.png")
    best = cli.parse_train(
        ["cifar10-best", "--dataset", "shapes", "--epochs", "1", "--batch-size", "50", "--num-devices", "1"]
    )
    loop.train_and_evaluate(best, tiny.train_on_all())
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")  # a network like this one comes with the package
    ship.write_files(alexnet_jax.open_run("runs/cifar10-best"), "cifar10-best", "shapes")
    page = (pathlib.Path(__file__).parent.parent / "docs" / "your-own-images.md").read_text("utf-8")
    commands = re.findall(r"^\$ python (\S+)\.py (.+)$", page, re.MULTILINE)
    assert len(commands) >= 6
    for script, flags in commands:
        {"train": train.main, "eval": eval.main}[script]([*flags.split(), "--num-devices", "1"])
    out = capsys.readouterr().out
    assert "weights  conv1, fc1 from cifar10-best (step 3); drawn: logits" in out
    assert "frozen   conv1, fc1\n" in out
    assert alexnet_jax.open_run("runs/head").class_names == ("Katze", "ёж", "狗")


def test_the_folder_must_be_given():
    with pytest.raises(UsageError, match="--dataset folder needs --data-dir"):
        data.load(DataConfig("folder"))
    with pytest.raises(UsageError, match="--image-size is for --dataset folder"):
        cli.parse_train(["quickstart", "--image-size", "64"])
    with pytest.raises(UsageError, match="--train-on all is for"):
        cli.parse_train(["folder", "--train-on", "all"])
