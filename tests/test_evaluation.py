import dataclasses
import json
import pathlib
import runpy
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

import alexnet_jax
from alexnet_jax import plots
from alexnet_jax.augment.crops import VIEWS
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.data import decode
from alexnet_jax.data.dataset import Split
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.inspection import classify, compare, evaluate, task
from alexnet_jax.inspection.scores import holm, mcnemar
from tests.tiny_runs import with_pictures

main = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "eval.py"))["main"]


@pytest.fixture(autouse=True)
def tiny_shapes(tiny, monkeypatch):
    """`load` gives the tiny data set instead of the whole `shapes`."""
    monkeypatch.setattr(task, "load", lambda config: tiny)


def test_ten_views_are_averaged_and_need_crops(tiny_run, tiny, tmp_path):
    results = evaluate.evaluate(EvalConfig(tiny_run, views=10, out=tmp_path / "ten"))
    assert results["views"] == 10
    with np.load(tmp_path / "ten" / "predictions.npz") as saved:
        probabilities = saved["probabilities"]
    run = alexnet_jax.open_run(tiny_run)
    views = [run.preprocessing.evaluation(tiny["test"].images, view) for view in VIEWS[10]]
    apply = jax.jit(lambda inputs: jax.nn.softmax(run.model.apply({"params": run.params}, inputs)))
    np.testing.assert_allclose(probabilities, np.mean([apply(view) for view in views], axis=0), atol=1e-5)
    ranks = (probabilities > probabilities[np.arange(70), tiny["test"].labels][:, None]).sum(axis=1)
    assert results["top5_accuracy"] == (ranks < 5).mean()
    plain = shutil.copytree(tiny_run, tmp_path / "plain")
    settings = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(settings | {"crop_padding": 0}))
    with pytest.raises(UsageError, match=r"--views 10: .* was trained without crops"):
        evaluate.evaluate(EvalConfig(plain, views=10))


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 64), (8, 100), (3, 1)])
def test_evaluation_is_exact_and_needs_no_other_flag(tiny_run, tiny, tiny_shapes, capsys, num_devices, batch_size):
    results = evaluate.evaluate(EvalConfig(tiny_run, batch_size=batch_size, num_devices=num_devices))
    split, run = tiny["test"], alexnet_jax.open_run(tiny_run)
    predicted = run.predict_class(split.images)
    assert results["count"] == 70
    assert results["correct"] == int((predicted == split.labels).sum())
    assert results["accuracy"] == results["correct"] / 70
    assert np.sum(results["confusion"]) == 70
    assert [row["count"] for row in results["per_class"]] == np.bincount(split.labels, minlength=10).tolist()
    assert json.loads((tiny_run / "eval" / "test.json").read_text()) == results
    with np.load(tiny_run / "eval" / "predictions.npz") as saved:
        np.testing.assert_array_equal(saved["predicted"], predicted)
        np.testing.assert_array_equal(saved["labels"], split.labels)
        np.testing.assert_allclose(saved["probabilities"], run.predict(split.images), atol=1e-5)
    assert f"test accuracy: {results['accuracy']:.4f}" in capsys.readouterr().out


def test_evaluation_of_another_split_does_not_overwrite_the_tests(tiny_run, tiny_shapes):
    evaluate.evaluate(EvalConfig(tiny_run))
    before = (tiny_run / "eval" / "predictions.npz").read_bytes()
    results = evaluate.evaluate(EvalConfig(tiny_run, split="validation", checkpoint="best"))
    assert results["count"] == 30
    assert (tiny_run / "eval" / "predictions.npz").read_bytes() == before


def test_evaluation_on_other_images_is_refused(tiny_run, tiny, monkeypatch):
    other = dataclasses.replace(tiny, splits={**tiny.splits, "test": tiny["validation"]})
    monkeypatch.setattr(task, "load", lambda config: other)
    with pytest.raises(AlexNetError, match="was not trained on the images"):
        evaluate.evaluate(EvalConfig(tiny_run))


def test_results_that_cannot_be_written_are_printed(tiny_run, tmp_path, monkeypatch, capsys):
    """A run on a read-only medium, or of another user."""
    before = sorted(tiny_run.rglob("*"))
    monkeypatch.setattr(task.os, "access", lambda path, mode: tiny_run not in (path, *path.parents))
    results = evaluate.evaluate(EvalConfig(tiny_run))
    out, err = capsys.readouterr()
    assert f"test accuracy: {results['accuracy']:.4f}" in out
    assert "can't be written, so the results are only printed: to keep them, give another folder with --out" in err
    assert sorted(tiny_run.rglob("*")) == before
    with pytest.raises(AlexNetError, match="can't be written: give another folder with --out"):
        evaluate.evaluate(EvalConfig(tiny_run, report=True))
    with with_pictures():
        evaluate.evaluate(EvalConfig(tiny_run, out=tmp_path / "out"))
    assert {"test.json", "predictions.npz", "confusion.png", "kernels.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert capsys.readouterr().err == ""


def test_a_disk_that_fills_up_does_not_hide_the_results(tiny_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(AlexNetError, match="can't write"):
        evaluate.evaluate(EvalConfig(tiny_run, out=tmp_path / "file" / "out"))
    assert "test accuracy: " in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["imagenet", "cifar10"])
def test_data_that_has_moved_is_asked_for(tiny_run, tmp_path, monkeypatch, dataset):
    monkeypatch.undo()  # the real `load`
    run = shutil.copytree(tiny_run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    gone = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(settings | {"dataset": dataset, "data_dir": gone}))
    with pytest.raises(AlexNetError, match=f"the run's data was in {gone} .*: where is it now"):
        evaluate.evaluate(EvalConfig(run))


def test_runs_are_compared_on_the_same_images(tiny_run, tiny, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    opened = task.open_run

    def with_another_bias(path, checkpoint):
        run = opened(path, checkpoint)
        if path == other:
            run.params["logits"]["bias"] = run.params["logits"]["bias"] + np.eye(10, dtype=np.float32)[3]
        return run

    monkeypatch.setattr(task, "open_run", with_another_bias)
    draw, curves = plots.compared_curves, []
    monkeypatch.setattr(plots, "compared_curves", lambda *args: curves.append(args) or draw(*args))
    rows = compare.compare(EvalConfig(tiny_run, others=(other, tiny_run)))
    assert [row["name"] for row in rows] == ["tiny (1)", "other", "tiny (2)"]
    first, second = alexnet_jax.open_run(tiny_run), with_another_bias(other, "last")
    split = tiny["test"]
    right = [run.predict_class(split.images) == split.labels for run in (first, second)]
    assert rows[1]["against_first"]["first_only"] == int((right[0] & ~right[1]).sum())
    assert rows[1]["against_first"]["second_only"] == int((right[1] & ~right[0]).sum())
    assert rows[1]["against_first"]["difference"] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])
    assert rows[1]["against_first"]["p_value"] == mcnemar(*right).p_value
    assert rows[1]["against_first"]["p_holm"] == min(1, 2 * rows[1]["against_first"]["p_value"])
    assert rows[2]["against_first"]["p_holm"] == 1
    saved = json.loads((tiny_run / "eval" / "comparison.json").read_text())
    assert saved["runs"] == json.loads(json.dumps(rows))
    with PIL.Image.open(tiny_run / "eval" / "comparison.png") as drawn:
        drawn.load()
        assert drawn.format == "PNG"
    _, drawn_epochs = curves[0]
    assert drawn_epochs == dict.fromkeys(("tiny (1)", "other", "tiny (2)"), 7)  # 100 images in batches of 16
    out = capsys.readouterr().out
    assert "70 test images" in out
    assert "other" in out
    assert "McNemar" in out


def test_runs_on_other_images_are_not_compared(tiny_run, tiny, monkeypatch, tmp_path):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    turned = dataclasses.replace(tiny, splits={**tiny.splits, "test": _turned(tiny["test"])})
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"fingerprint": turned.fingerprint()}))
    datasets = iter([tiny, turned])
    monkeypatch.setattr(task, "load", lambda config: next(datasets))
    with pytest.raises(AlexNetError, match=r"tiny and .*other can't be compared"):
        compare.compare(EvalConfig(tiny_run, others=(other,)))


def test_runs_that_share_only_the_evaluated_split_are_compared(tiny_run, tiny, monkeypatch, tmp_path):
    """With --train-on all, the training images differ, and so does the fingerprint."""
    other, merged = shutil.copytree(tiny_run, tmp_path / "other"), tiny.train_on_all()
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"fingerprint": merged.fingerprint()}))
    datasets = iter([tiny, merged])
    monkeypatch.setattr(task, "load", lambda config: next(datasets))
    monkeypatch.setattr(task, "COMPARED_AT_ONCE", 30)
    first, second = compare.compare(EvalConfig(tiny_run, others=(other,)))
    assert first["accuracy"] == second["accuracy"]


def test_a_split_that_is_not_there_is_named(tiny_run, tiny, monkeypatch):
    monkeypatch.setattr(task, "load", lambda config: dataclasses.replace(tiny, splits={**tiny.splits}))
    monkeypatch.setattr(type(tiny), "counts", {"train": 100, "test": 70})
    with pytest.raises(AlexNetError, match="has no split 'validation'; it has train, test"):
        evaluate.evaluate(EvalConfig(tiny_run, split="validation"))


def _turned(split):
    return Split(np.ascontiguousarray(split.images[:, ::-1]), split.labels)


def test_names_are_as_short_as_they_can_be(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "run"]
    assert compare.shortest_names(paths) == ["a/run", "b/run (1)", "b/run (2)"]
    assert compare.shortest_names(paths[:1]) == ["run"]


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


@pytest.fixture
def folder(tiny, tmp_path):
    """Image files of every kind, all of test image 0 except the broken ones."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    image = PIL.Image.fromarray(tiny["test"].images[0])
    image.save(folder / "a.png")
    image.resize((96, 96), PIL.Image.Resampling.NEAREST).save(folder / "large.bmp")
    image.convert("L").save(folder / "grey.png")
    wide = PIL.Image.new("RGB", (50, 32), "red")
    wide.paste(image, (9, 0))
    wide.save(folder / "wide.png")
    turned = image.transpose(PIL.Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turned clockwise by a quarter for viewing
    turned.save(folder / "deeper" / "camera.png", exif=exif)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "deeper" / "clear.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def test_images_are_classified_as_they_are_displayed(tiny_run, tiny, folder, monkeypatch, capsys):
    read = {}
    found = classify.read_images
    monkeypatch.setattr(
        classify,
        "read_images",
        lambda *args: (read.setdefault(path.name, (path, pixels)) for path, pixels in found(*args)),
    )
    draw, sheets, drawn = plots.predictions, [], []

    def spy(*args):
        sheets.append(args)
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(plots, "predictions", spy)
    with pytest.raises(AlexNetError, match=r"^2 of 8 could not be read as an image; the first is .*nothing.png$"):
        classify.classify_images(EvalConfig(tiny_run, images=(folder / "nothing.png", folder)))
    original = tiny["test"].images[0]
    for name in ("a.png", "wide.png", "camera.png"):
        np.testing.assert_array_equal(read[name][1], original)
    assert np.abs(read["large.bmp"][1].astype(int) - original).mean() < 8
    grey = read["grey.png"][1]
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (read["clear.png"][1] == 255).all()
    saved = json.loads((tiny_run / "eval" / "images.json").read_text())
    rows = {row["file"].rsplit("/", 1)[1]: row["top"] for row in saved["images"]}
    assert set(rows) == {"a.png", "camera.png", "clear.png", "grey.png", "large.bmp", "wide.png"}
    expected = alexnet_jax.open_run(tiny_run).predict(original[None])[0]
    assert [entry["probability"] for entry in rows["a.png"]] == pytest.approx(sorted(expected)[:-6:-1], abs=1e-5)
    assert rows["a.png"][0]["class"] == tiny.class_names[expected.argmax()]
    (images, names, tops) = sheets[0]
    assert names == [row["file"].rsplit("/", 1)[1] for row in saved["images"]]
    for pixels, name, top in zip(images, names, tops, strict=True):
        np.testing.assert_array_equal(pixels, read[name][1])
        assert top == [(entry["class"], entry["probability"]) for entry in rows[name]]
    with PIL.Image.open(tiny_run / "eval" / "images.png") as sheet:
        assert sheet.size == tuple(round(200 * inches) for inches in drawn[0].get_size_inches())
    output = capsys.readouterr()
    assert "warning: skipped" in output.err
    assert "broken.jpg: not a JPEG" in output.err
    assert "warning: 1 other file is not an image (notes.txt)\n" in output.err
    assert output.out.count("%") == 5 * 6


def test_images_come_in_batches(tiny_run, folder):
    (folder / "broken.jpg").unlink()
    alone = classify.classify_images(EvalConfig(tiny_run, images=(folder,), batch_size=1))
    together = classify.classify_images(EvalConfig(tiny_run, images=(folder,), batch_size=4, num_devices=2))
    assert [row["file"] for row in alone] == [row["file"] for row in together]
    for one, other in zip(alone, together, strict=True):
        assert [e["probability"] for e in one["top"]] == pytest.approx(
            [e["probability"] for e in other["top"]], abs=1e-5
        )


@pytest.fixture
def album(tiny, tmp_path):
    """A folder with the files that phones and computers create."""
    folder = tmp_path / "album"
    (folder / "sub" / "@eaDir").mkdir(parents=True)
    image = PIL.Image.fromarray(tiny["test"].images[0])
    for name, kind in {"猫.png": "PNG", "c.ppm": "PPM", "no_suffix": "PNG", "sub/wrong.txt": "GIF"}.items():
        image.save(folder / name, kind)
    for number in range(5):
        (folder / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for name in ("._a.png", "Thumbs.db", ".DS_Store", "sub/desktop.ini", "sub/@eaDir/a.png"):
        (folder / name).write_bytes(b"litter")
    for name in ("IMG_0.AAE", "IMG_0.MOV", "notes.txt", "sub/z"):
        (folder / name).write_bytes(b"\0\0\0\x14ftypqt  ")
    (folder / "sub" / "up").symlink_to("..")
    return folder


def test_what_is_in_a_folder_is_tried_by_content(album, tiny, capsys):
    found, broken = classify.find_images((album,))
    read = dict(classify.read_images(found, 32, broken))
    assert {path.relative_to(album).as_posix() for path in read} == {"猫.png", "c.ppm", "no_suffix", "sub/wrong.txt"}
    for path, pixels in read.items():
        if path.suffix != ".txt":  # a GIF has a palette
            np.testing.assert_array_equal(pixels, tiny["test"].images[0])
    assert [path.name for path in broken] == [f"IMG_{number}.HEIC" for number in range(5)]
    reason = "HEIC is not supported: convert it to JPEG"
    assert capsys.readouterr().err.splitlines() == [
        "warning: 4 other files are not images (IMG_0.AAE, IMG_0.MOV, notes.txt, ...)",
        *(f"warning: skipped {album}/IMG_{number}.HEIC: {reason}" for number in range(3)),
        f"warning: skipped 2 more: {reason}",
    ]


def test_a_folder_without_images_is_named_once(album, capsys):
    empty = album / "sub" / "@eaDir" / "empty"
    empty.mkdir()
    (empty / "loop.png").symlink_to("loop.png")
    named = (album / "notes.txt", album / "nothing", empty, album / "sub" / "@eaDir")
    found, broken = classify.find_images(named)
    assert list(classify.read_images(found, 32, broken)) == []
    assert [path.name for path in broken] == ["nothing", "notes.txt", "loop.png", "a.png", "loop.png"]
    (empty / "loop.png").unlink()
    assert classify.find_images((empty,)) == ([], [empty])
    assert "empty: there is no image in this folder" in capsys.readouterr().err


def test_without_a_readable_image_nothing_is_written(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AlexNetError, match="1 of 1 could not be read"):
        classify.classify_images(EvalConfig(run, images=(tmp_path / "empty",)))
    assert not (run / "eval").exists()


@pytest.mark.parametrize("mode", ["LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_what_is_displayed(mode, tmp_path):
    levels = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    image = PIL.Image.fromarray(levels)
    image = PIL.Image.fromarray(levels.astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.save(path)
    seen = np.asarray(decode.decode(path.read_bytes(), as_seen=True))
    assert seen.shape == (32, 32, 3)
    expected = levels if mode != "1" else np.asarray(PIL.Image.fromarray(levels).convert("1").convert("L"))
    np.testing.assert_allclose(seen, np.repeat(expected[..., None], 3, axis=2), atol=1)


@pytest.mark.parametrize("as_seen", [False, True])
def test_cmyk_without_adobes_marker_is_not_inverted(as_seen, tmp_path):
    PIL.Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    data = (tmp_path / "red.jpg").read_bytes()
    start = data.index(b"\xff\xee")  # Pillow writes the marker, and values that are inverted with it
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    stripped = data[:start] + data[start + 2 + length :]
    with_marker, without = (np.asarray(decode.decode(d, as_seen))[0, 0] for d in (data, stripped))
    np.testing.assert_allclose(with_marker, [255, 0, 0], atol=3)
    np.testing.assert_allclose(without, [0, 0, 0], atol=3)  # the values as they stand: with full black


def test_names_that_no_file_can_have_are_skipped(tiny_run, folder, capsys):
    (folder / "broken.jpg").unlink()
    with pytest.raises(AlexNetError, match="1 of 7 could not be read"):
        classify.classify_images(EvalConfig(tiny_run, images=(folder.parent / ("x" * 300), folder)))
    assert "File name too long" in capsys.readouterr().err


def test_bad_input_is_found_before_anything_is_predicted_or_written(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text("nonsense\n\n")
    monkeypatch.setattr(task, "predict_split", lambda *args: pytest.fail("predicted"))
    (tmp_path / "photo.png").touch()
    with pytest.raises(
        AlexNetError, match=r"photo\.png is a file, not a run's folder; eval\.py takes images by --images"
    ):
        compare.compare(EvalConfig(run, others=(tmp_path / "photo.png",)))
    with pytest.raises(AlexNetError, match="there is no such folder"):
        compare.compare(EvalConfig(run, others=(tmp_path / "nothing",)))
    with pytest.raises(AlexNetError, match="line 1 is not a record"):
        compare.compare(EvalConfig(run, others=(damaged,)))
    with pytest.raises(AlexNetError, match="line 1 is not a record"):
        evaluate.evaluate(EvalConfig(damaged, report=True))
    assert not (run / "eval").exists()
    assert not (damaged / "eval").exists()


def test_flags_choose_the_command(monkeypatch):
    called = []
    for module, name in ((evaluate, "evaluate"), (compare, "compare"), (classify, "classify_images")):
        monkeypatch.setattr(module, name, lambda config, name=name: called.append(name))
    for flags in (["run"], ["run", "other", "third"], ["run", "--images", "a.png", "folder"], ["run", "--report"]):
        main(flags)
    assert called == ["evaluate", "compare", "classify_images", "evaluate"]
