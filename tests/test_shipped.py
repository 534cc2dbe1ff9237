"""Networks that come with the package: made by benchmarks/ship.py, opened by name, never written to."""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.config import cli
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import shapes
from alexnet_jax.data.dataset import Split
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.exchange import export, pretrained
from alexnet_jax.inspection import task
from alexnet_jax.inspection.evaluate import evaluate
from alexnet_jax.network import build
from alexnet_jax.runs import shipped

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import one another

import ship  # noqa: E402

pytestmark = pytest.mark.usefixtures("tiny_networks")
SOURCE = "shapes (drawn for a test)"
NETWORKS = build.NETWORKS


def accuracy(run, dataset):
    return (run.predict_class(dataset["test"].images) == dataset["test"].labels).mean()


@pytest.fixture(scope="module")
def trained(tiny_run):
    """A run of the tiny network on the ten shapes."""
    settings = json.loads((tiny_run / "config.json").read_text()) | {"data_dir": "/somewhere/else"}
    (tiny_run / "config.json").write_text(json.dumps(settings))
    return alexnet_jax.open_run(tiny_run)


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """The folder of `trained`, shipped as "tiny", in a working directory without files."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return ship.write_files(trained, "tiny", SOURCE)


def test_a_shipped_run_is_opened_by_its_name(folder, trained, tiny):
    run = alexnet_jax.open_run("tiny")
    assert run.folder.path == folder.path
    assert run.step == trained.step
    assert (run.config.data.data_dir, run.dataset.source) == (None, SOURCE)
    assert trained.config.data.data_dir is not None
    assert list(run.params) == list(trained.params)
    for leaf, original in zip(jax.tree.leaves(run.params), jax.tree.leaves(trained.params), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, np.float32(np.float16(original)))
    images = tiny.splits["test"].images
    np.testing.assert_allclose(run.predict(images), trained.predict(images), atol=5e-3)


def test_a_setting_that_came_later_has_its_default(folder, trained):
    settings = json.loads(folder.config.read_text())
    del settings["cutout"]
    folder.config.write_text(json.dumps(settings))
    shipped.write(folder, trained.step, trained.params)
    assert alexnet_jax.open_run("tiny").config.augmentation.cutout == 0


@pytest.mark.parametrize("name", ["weights.safetensors", "statistics.npz", "config.json", "dataset.json"])
def test_a_changed_file_is_refused(folder, name):
    path = folder.path / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AlexNetError, match=rf"{name} is not what was saved .*: install alexnet_jax again"):
        alexnet_jax.open_run("tiny")


@pytest.mark.parametrize("text", ["", "{}", '{"step": 1, "files": 2}', '{"step": 1, "files": {"config.json": 3}}'])
def test_a_damaged_manifest_is_refused(folder, text):
    (folder.path / "manifest.json").write_text(text)
    with pytest.raises(AlexNetError, match=r"manifest\.json.*: install alexnet_jax again"):
        alexnet_jax.open_run("tiny")


@pytest.mark.parametrize("name", ["weights.safetensors", "statistics.npz", "config.json", "manifest.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder.path / name).unlink()
    with pytest.raises(AlexNetError, match=rf"{name}.*: install alexnet_jax again"):
        alexnet_jax.open_run("tiny")


def test_a_folder_of_that_name_takes_precedence(folder):
    pathlib.Path("tiny").mkdir()
    with pytest.raises(AlexNetError, match=r"tiny is not a run: it has no config\.json"):
        alexnet_jax.open_run("tiny")


def test_a_file_of_that_name_does_not(folder):
    pathlib.Path("tiny").touch()
    assert alexnet_jax.open_run("tiny").folder.path == folder.path


def test_it_is_opened_by_any_path(folder, trained, tmp_path, monkeypatch):
    pathlib.Path("link").symlink_to(folder.path)
    monkeypatch.chdir(folder.path.parent)
    for path in ("tiny", folder.path, tmp_path / "work" / "link"):
        assert alexnet_jax.open_run(path).step == trained.step


def test_an_unknown_name_lists_the_shipped_ones(folder):
    with pytest.raises(AlexNetError, match=r"large: there is no such folder \(tiny comes with the package\)"):
        alexnet_jax.open_run("large")


def test_it_has_one_checkpoint(folder, trained):
    assert alexnet_jax.open_run("tiny", trained.step).step == trained.step
    with pytest.raises(AlexNetError, match="use last"):
        alexnet_jax.open_run("tiny", "best")


def test_nothing_is_written_to_the_package(folder, trained, tiny, monkeypatch, capsys):
    monkeypatch.setattr(task, "load", lambda config: tiny)
    before = sorted(shipped.FOLDER.rglob("*"))
    config = EvalConfig(run=pathlib.Path("tiny"))
    results = evaluate(config)
    assert "test accuracy" in capsys.readouterr().out
    assert results["accuracy"] == accuracy(alexnet_jax.open_run("tiny"), tiny)
    with pytest.raises(AlexNetError, match="give another folder with --out"):
        evaluate(dataclasses.replace(config, report=True))
    for path in ("tiny", folder.path):
        with pytest.raises(UsageError, match="with --out"):
            export.save(export.ExportConfig(run=pathlib.Path(path)))
    evaluate(dataclasses.replace(config, out=pathlib.Path("results")))
    export.save(export.ExportConfig(run=pathlib.Path("tiny"), out=pathlib.Path("tiny.safetensors")))
    assert sorted(shipped.FOLDER.rglob("*")) == before
    assert pathlib.Path("results/test.json").is_file()


def test_another_copy_of_the_data_is_accepted_with_a_warning(folder, monkeypatch, capsys):
    monkeypatch.setattr(task, "load", lambda config: shapes.load(train=100, validation=30, test=60))
    assert evaluate(EvalConfig(run=pathlib.Path("tiny"), out=pathlib.Path("results")))["count"] == 60
    assert f"tiny was trained on {SOURCE}, not on the images from" in capsys.readouterr().err


def test_copies_of_the_data_are_told_apart(folder, tiny, monkeypatch):
    """A run on one copy is not compared with the shipped network on another."""
    images = tiny["test"].images.copy()
    images[-1, 0, 0, 0] ^= 1
    other = dataclasses.replace(tiny, splits={**tiny.splits, "test": Split(images, tiny["test"].labels)})
    tasks = []
    for dataset in (tiny, other, other):
        monkeypatch.setattr(task, "load", lambda config, dataset=dataset: dataset)
        tasks.append(task.open_task(pathlib.Path("tiny"), EvalConfig(run=pathlib.Path("tiny"))))
    assert not tasks[0].has_same_images(tasks[1])
    assert tasks[1].has_same_images(tasks[2])


def test_the_folder_of_the_weights_is_not_that_of_the_run(folder):
    with pytest.raises(UsageError, match="--init-from tiny is also --workdir"):
        cli.parse_train(["quickstart", "--init-from", "tiny", "--workdir", "tiny"])


def test_a_training_can_begin_with_it(folder, trained):
    weights = pretrained.load(pathlib.Path("tiny"))
    np.testing.assert_array_equal(weights.params["logits"]["bias"], np.float16(trained.params["logits"]["bias"]))


def test_a_folder_is_not_shipped_twice(folder, trained):
    with pytest.raises(UsageError, match="exists already"):
        ship.write_files(trained, "tiny", SOURCE)


def test_the_script_makes_a_card_with_measured_accuracies(trained, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "load", lambda config: tiny)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(ship, "VIEWS", (1, 2))
    monkeypatch.setattr(ship, "describe_device", lambda: {"name": "A processor"})
    ship.main([str(trained.folder.path), "--name", "tiny", "--source", SOURCE])
    ours, theirs = (accuracy(run, tiny) for run in (alexnet_jax.open_run(tmp_path / "tiny"), trained))
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "import alexnet_jax\n\nrun = " in card
    assert max(map(len, card.splitlines())) <= 120
    assert f"| 1 | {ours:.2%} | {theirs:.2%} |" in card
    assert "A processor" in card
    assert "/somewhere/else" not in "".join(path.read_text("latin-1") for path in (tmp_path / "tiny").iterdir())


CARD = (ROOT / "alexnet_jax" / "pretrained" / "cifar10-best" / "README.md").read_text("utf-8")


def test_the_shipped_network_is_small_and_names_no_path():
    (folder,) = shipped.FOLDER.iterdir()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(map(len, files.values())) < 6_000_000
    assert max(len(data) for name, data in files.items() if name != "weights.safetensors") < 20_000
    assert json.loads(files["config.json"])["data_dir"] is None
    assert not any(re.search(rb'"/\w', data) for name, data in files.items() if name.endswith(("json", "jsonl", "md")))


def test_the_shipped_network_computes_what_it_did_when_it_was_shipped(monkeypatch):
    """No later change of a default, of the preprocessing or of a layer may change its predictions."""
    y, x = np.mgrid[:32, :32]
    image = np.stack([8 * x, 8 * y, 4 * (x + y)], axis=-1).astype(np.uint8)
    monkeypatch.setattr(build, "NETWORKS", NETWORKS)
    logits = alexnet_jax.open_run("cifar10-best").logits(image[None])[0]
    recorded = [1.7886, -1.0483, 1.0476, 1.4933, -0.6526, 0.9993, -0.5233, -1.2299, -0.6510, -1.2545]
    np.testing.assert_allclose(logits, recorded, atol=1e-3)


def test_the_cards_accuracy_is_that_of_the_recorded_run():
    rows = [json.loads(line) for line in (ROOT / "results" / "ablation-best-cpu.jsonl").read_text("utf-8").splitlines()]
    (row,) = (row for row in rows if (row["variant"], row["seed"]) == ("cifar10-best", 2))
    for views, figures in row["test"].items():
        assert re.search(rf"^\| {views} \| \d\d\.\d\d% \| {figures['accuracy']:.2%} \|$", CARD, re.MULTILINE), views
