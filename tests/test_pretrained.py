"""Trainings that begin with given weights, layers that are not trained, and weights of others as runs."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import alexnet_jax
import train
from alexnet_jax import data
from alexnet_jax.config import cli
from alexnet_jax.config.checks import frozen_layers
from alexnet_jax.config.flags import flat_items, replace
from alexnet_jax.data import decode
from alexnet_jax.data.dataset import ArrayDataset, Split
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError
from alexnet_jax.exchange import convert, export, pretrained
from alexnet_jax.exchange.weights import load_weights
from alexnet_jax.inspection import evaluate
from alexnet_jax.inspection.classify import read_images
from alexnet_jax.inspection.extract import extract_features
from alexnet_jax.network import build
from alexnet_jax.training import features, loop
from alexnet_jax.training.features import Features, Head, input_of_head
from alexnet_jax.training.initial import Pretrained
from alexnet_jax.training.trainer import Trainer
from tests.foreign_weights import CLASSES, torchvision_state
from tests.tiny_runs import TINY_NETWORKS, comparable, make_config, train_until

RNG = np.random.default_rng(0)
FLAT = {"crop_padding": 0, "flip": False, "pca": "none", "pca_off_epoch": None}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run of the tiny network on the ten shapes."""
    folder = tmp_path_factory.mktemp("pretrained") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "NETWORKS", TINY_NETWORKS)
        loop.train_and_evaluate(make_config(folder, 1), tiny)
    return folder


def of_other_classes(tiny: ArrayDataset) -> ArrayDataset:
    """The shapes of two classes, under other names."""
    splits = {name: of_two(split) for name, split in tiny.splits.items()}
    return dataclasses.replace(tiny, class_names=("one", "two"), splits=splits)


def of_two(split: Split) -> Split:
    kept = split.labels < 2
    return Split(split.images[kept], split.labels[kept])


def enlarged(split: Split) -> Split:
    return Split(split.images.repeat(2, 1).repeat(2, 2), split.labels)


def changed(config, **settings):
    return replace(config, **settings)


def params_after(config, dataset, weights=None):
    loop.train_and_evaluate(config, dataset, weights)
    return alexnet_jax.open_run(config.workdir).params


def test_all_layers_but_the_last_are_taken_for_other_classes(source, tiny, tmp_path, capsys):
    weights, before = pretrained.load(source), alexnet_jax.open_run(source)
    dataset, config = of_other_classes(tiny), make_config(tmp_path / "run", 1)
    config = changed(config, init_from=source, learning_rate=1e-12, weight_decay=0.0)
    after = params_after(config, dataset, weights)
    assert f"weights  conv1, fc1 from {source} (step 7); drawn: logits\n" in capsys.readouterr().out
    for layer in ("conv1", "fc1"):
        np.testing.assert_allclose(after[layer]["kernel"], before.params[layer]["kernel"], atol=1e-8)
    assert after["logits"]["kernel"].shape == (20, 2)
    run = alexnet_jax.open_run(config.workdir)
    np.testing.assert_array_equal(run.statistics.mean_image, before.statistics.mean_image)  # on which they were trained
    assert not np.array_equal(dataset.statistics().mean_image, before.statistics.mean_image)


def test_the_last_layer_is_taken_too_for_the_same_classes(source, tiny, tmp_path):
    weights, before = pretrained.load(source), alexnet_jax.open_run(source)
    config = changed(make_config(tmp_path / "run", 1), init_from=source, learning_rate=1e-12, weight_decay=0.0)
    after = params_after(config, tiny, weights)
    np.testing.assert_allclose(after["logits"]["kernel"], before.params["logits"]["kernel"], atol=1e-8)


def test_a_stopped_run_goes_on_bit_for_bit(source, tiny, tmp_path):
    weights, dataset = pretrained.load(source), of_other_classes(tiny)
    whole, broken = (
        changed(make_config(tmp_path / name, 3), init_from=source, freeze=("conv1",)) for name in ("whole", "broken")
    )
    expected = params_after(whole, dataset, weights)
    with pytest.raises(StoppedError):
        train_until(broken, dataset, 4, 15, weights)
    loop.train_and_evaluate(broken, dataset, weights)
    assert comparable(broken.workdir) == comparable(whole.workdir)
    jax.tree.map(np.testing.assert_array_equal, alexnet_jax.open_run(broken.workdir).params, expected)


def test_an_exported_network_is_as_good(source):
    file = export.save(export.ExportConfig(source))
    one, two = pretrained.load(source), pretrained.load(file)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert (one.settings, one.class_names) == (two.settings, two.class_names)


def test_flags_adopt_the_network_and_its_input(source, tiny, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(data, "load", lambda config: tiny)
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args: given.extend(args))
    train.main(["quickstart", "--init-from", str(source), "--workdir", str(tmp_path), "--num-devices", "1"])
    config, _, weights = given
    assert config.augmentation.subtract_mean  # the quickstart's network does without
    assert config.network.init_from == source
    assert weights.settings["subtract_mean"] is True


def test_what_does_not_fit_is_refused_by_name(source, tiny, tmp_path):
    weights, config = pretrained.load(source), make_config(tmp_path / "run", 1)
    other = changed(config, subtract_mean=False)
    with pytest.raises(UsageError, match=r"--subtract-mean False: the weights of .* were trained with True"):
        loop.train_and_evaluate(other, tiny, weights)
    larger = dataclasses.replace(tiny, splits={name: enlarged(split) for name, split in tiny.splits.items()})
    with pytest.raises(UsageError, match=r"fc1's kernel is \[128, 20\] in .*, but \[512, 20\] here"):
        loop.train_and_evaluate(config, larger, weights)
    missing = dataclasses.replace(weights, params={"conv1": weights.params["conv1"]})
    with pytest.raises(UsageError, match=r"has no layer fc1"):
        loop.train_and_evaluate(changed(config, workdir=tmp_path / "other"), tiny, missing)
    with pytest.raises(AlexNetError, match="there is no such run or file"):
        pretrained.load(tmp_path / "nothing")
    (tmp_path / "file.pth").write_bytes(b"PK not a zip")
    with pytest.raises(AlexNetError, match="not an AlexNet of torchvision or Caffe"):
        pretrained.load(tmp_path / "file.pth")


def test_a_refused_training_leaves_no_run(source, tiny, tmp_path):
    larger = dataclasses.replace(tiny, splits={name: enlarged(split) for name, split in tiny.splits.items()})
    with pytest.raises(UsageError, match="fc1's kernel"):
        loop.train_and_evaluate(make_config(tmp_path / "run", 1), larger, pretrained.load(source))
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_without_the_weights_that_it_began_with(source, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda config: tiny)
    moved = tmp_path / "weights"
    shutil.copytree(source, moved)
    monkeypatch.chdir(tmp_path)
    flags = ["--workdir", "run", "--num-devices", "1", "--batch-size", "50", "--drop-epochs", "--epochs"]
    train.main(["quickstart", "--init-from", "weights", *flags, "1"])
    shutil.rmtree(moved)
    train.main(["quickstart", "--init-from", str(moved), *flags, "2"])
    assert "resumes after step" in capsys.readouterr().out
    with pytest.raises(UsageError, match="contains a run with --init-from"):
        train.main(["quickstart", "--init-from", "other", *flags, "2"])
    (tmp_path / "run" / "statistics.npz").unlink()  # has their mean image, which the training images do not tell
    with pytest.raises(AlexNetError, match=r"statistics\.npz is missing: copy it back"):
        train.main(["quickstart", "--init-from", str(moved), *flags, "2"])


@pytest.mark.parametrize("preset", ["folder", "quickstart", "cifar10", "cifar10-paper", "cifar10-best"])
@pytest.mark.parametrize("network", ["torchvision", "caffenet", "convnet-18pct", "small"])
def test_every_preset_takes_the_settings_of_every_network(preset, network):
    """Also those of which the network of the preset has other values, and this network none."""
    preset_of = {"small": "cifar10-best", "convnet-18pct": "cifar10-18pct"}.get(network, "cifar10-full")
    settings = flat_items(cli.parse_train([preset_of]))
    computed = {name: settings[name] for name in pretrained.COMPUTED} | {"network": network}
    size = 256 if network in ("torchvision", "caffenet") else 32
    crop = {"torchvision": 224, "caffenet": 227}.get(network)
    weights = Pretrained("x", computed, size, crop, {}, np.zeros((size, size, 3)), "square", None)
    for dataset in ("folder", "cifar10"):
        flags = [preset, "--dataset", dataset, "--init-from", "x"]
        if preset == "cifar10-best":
            flags += ["--train-on", "train"]
        config = cli.parse_train(flags, weights.settings_for(dataset))
        assert flat_items(config) | computed == flat_items(config)
        assert weights.settings_for(dataset).keys() <= set(pretrained.ADOPTED)


def test_numbers_are_not_taken_for_the_names_of_classes(source):
    run = alexnet_jax.open_run(source)
    numbers = dataclasses.replace(run.dataset, class_names=pretrained.numbered(10))
    assert pretrained.of_run(dataclasses.replace(run, dataset=numbers), "x").class_names is None


def test_the_digest_is_that_of_the_weights(source):
    weights = pretrained.load(source)
    assert weights.digest() == pretrained.load(source).digest()
    conv1 = {name: array + (name == "bias") for name, array in weights.params["conv1"].items()}
    assert dataclasses.replace(weights, params=weights.params | {"conv1": conv1}).digest() != weights.digest()


def test_frozen_layers_keep_their_weights_and_have_no_moments(tiny, tmp_path):
    config = make_config(tmp_path / "run", 1)
    trainer = Trainer(changed(config, freeze=("conv1",)), tiny, jax.devices()[:1])
    drawn = trainer.params()
    assert "conv1" not in str(jax.tree_util.tree_leaves_with_path(trainer.shapes.opt_state))
    assert "fc1" in str(jax.tree_util.tree_leaves_with_path(trainer.shapes.opt_state))
    after = params_after(changed(config, freeze=("conv1",), average_decay=0.5), tiny)
    np.testing.assert_array_equal(after["conv1"]["kernel"], drawn["conv1"]["kernel"])
    for layer in ("fc1", "logits"):
        assert not np.array_equal(after[layer]["kernel"], drawn[layer]["kernel"])


def test_the_others_are_updated_as_if_none_were_frozen(tiny, tmp_path):
    base = make_config(tmp_path / "run", 1, num_devices=1)
    trainers = [Trainer(changed(base, freeze=freeze), tiny, jax.devices()[:1]) for freeze in ((), ("conv1",))]
    for trainer in trainers:
        next(iter(loop.take_steps(trainer)))
    free, frozen = (trainer.params() for trainer in trainers)
    for layer in ("fc1", "logits"):
        np.testing.assert_allclose(frozen[layer]["kernel"], free[layer]["kernel"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("conv7",), r"--freeze conv7: the layers of --network small are conv1, fc1, logits; all-but-head is short"),
        (("conv1", "fc1", "logits"), "--freeze names every layer"),
    ],
)
def test_layers_that_can_not_be_frozen(tiny, tmp_path, freeze, message):
    with pytest.raises(UsageError, match=message):
        loop.train_and_evaluate(changed(make_config(tmp_path / "run", 1), freeze=freeze), tiny)


def test_all_but_head_is_short_for_the_layers_below():
    assert frozen_layers(("all-but-head",), ("conv1", "fc1", "logits")) == ("conv1", "fc1")
    assert frozen_layers(("fc1", "conv1"), ("conv1", "fc1", "logits")) == ("conv1", "fc1")


@pytest.mark.parametrize("devices", [1, 2])
def test_features_that_stay_the_same_are_computed_once(tiny, tmp_path, monkeypatch, devices):
    config = changed(make_config(tmp_path / "once", 2, num_devices=devices), freeze=("all-but-head",), **FLAT)
    config = changed(config, dropout_rate=0.0, learning_rate=0.1, drop_epochs=())
    computed = []
    compute = Features.of

    def of(*args):
        computed.append(compute(*args))
        return computed[-1]

    monkeypatch.setattr(Features, "of", of)
    once = params_after(config, tiny)
    assert len(computed) == 1
    monkeypatch.setattr(features, "MOST_BYTES", 0)  # there is no memory for them
    again = params_after(changed(config, workdir=tmp_path / "again"), tiny)
    assert len(computed) == 1
    one, two = comparable(tmp_path / "once"), comparable(tmp_path / "again")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-5)
    assert [r["accuracy"] for r in one] == [r["accuracy"] for r in two]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), once, again)


@pytest.mark.parametrize(
    "changes",
    [{"crop_padding": 2}, {"flip": True}, {"dropout_rate": 0.5}, {"freeze": ("conv1",)}, {"deterministic": True}],
)
def test_features_that_change_are_not_kept(tiny, tmp_path, changes):
    settings = {"freeze": ("all-but-head",), "dropout_rate": 0.0} | FLAT
    trainer = Trainer(changed(make_config(tmp_path, 1), **(settings | changes)), tiny, jax.devices()[:1])
    assert trainer.keep_features() is False


@pytest.mark.parametrize("name", ["small", "convnet-18pct", "convnet-11pct"])
def test_the_head_of_every_network_is_a_dense_layer(name, monkeypatch):
    monkeypatch.undo()
    config = dataclasses.replace(make_config("x").network, network=name, dropout_rate=0.0)
    model, images = build.from_config(config, 10), RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    kept = jax.jit(functools.partial(input_of_head, model))(params, images)
    logits = Head(10, model.dtype, model.precision).apply({"params": params}, kept)
    np.testing.assert_allclose(logits, jax.jit(model.apply)({"params": params}, images), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    safetensors.numpy.save_file(torchvision_state(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_weights_of_others_become_a_run(foreign, tmp_path, monkeypatch):
    monkeypatch.undo()  # the network is torchvision's
    names = [f"name {number}" for number in range(CLASSES)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    convert.main([str(foreign), "--out", str(tmp_path / "run"), "--class-names", str(tmp_path / "names.txt")])
    run = alexnet_jax.open_run(tmp_path / "run")
    assert run.class_names == tuple(names)
    assert (run.dataset.name, run.dataset.counts, run.config.data.dataset) == ("folder", {}, "folder")
    images = RNG.integers(0, 256, (2, 256, 256, 3), np.uint8)
    expected = load_weights(foreign).logits(images[:, 16:240, 16:240])
    np.testing.assert_allclose(run.logits(images), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    photo = tmp_path / "photo.png"
    PIL.Image.fromarray(images[0, :, :200]).save(photo)
    extract_features(
        cli.parse_eval([str(tmp_path / "run"), "--images", str(photo), "--features", str(tmp_path / "features.npz")])
    )
    square = decode.central_square_bilinear(PIL.Image.open(photo), 256)[None]
    with np.load(tmp_path / "features.npz") as saved:
        assert str(saved["layer"]) == "fc2 activation"
        assert saved["files"].tolist() == [str(photo)]
        np.testing.assert_allclose(saved["features"], run.features(square, "fc2 activation"), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="exists already"):
        convert.main([str(foreign), "--out", str(tmp_path / "run")])
    adopted = pretrained.load(tmp_path / "run").settings_for("folder")
    assert (adopted["image_size"], adopted["crop_size"], adopted["scaling"]) == (256, 224, "torchvision")


def test_converted_weights_are_evaluated_by_the_names_of_their_classes(source, tmp_path):
    """The folder's classes are in alphabetical order, the outputs are not."""
    names = ["zebra", "yak", "cat", "dog", "emu", "ant", "bee", "ox", "cow", "eel"]
    shutil.copytree(source, tmp_path / "run")
    for name, entries in (
        ("dataset.json", {"name": "folder", "class_names": names, "counts": {}}),  # as convert.py writes it
        ("config.json", {"dataset": "folder"}),
    ):
        file = tmp_path / "run" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    run = alexnet_jax.open_run(tmp_path / "run")
    images = RNG.integers(0, 256, (20, 32, 32, 3), np.uint8)
    predicted = run.predict_class(images)[:10]
    for number, image in enumerate(images):
        folder = tmp_path / "own" / ("train" if number < 10 else "val") / names[number % 10]
        folder.mkdir(parents=True)
        PIL.Image.fromarray(image).save(folder / f"{number}.png")
    flags = [str(tmp_path / "run"), "--data-dir", str(tmp_path / "own"), "--split", "train", "--num-devices", "1"]
    results = evaluate.evaluate(cli.parse_eval(flags))
    assert results["correct"] == int((predicted == np.arange(10)).sum())
    assert len(set(predicted)) > 1
    for row in results["per_class"]:
        assert row["predicted"] == int((predicted == names.index(row["class"])).sum())
    for split in ("train", "val"):
        (tmp_path / "own" / split / "yak").rename(tmp_path / "own" / split / "gnu")
    with pytest.raises(AlexNetError, match=r"has other classes than .*: gnu is only in"):
        evaluate.evaluate(cli.parse_eval(flags))


def test_a_npy_needs_a_variant(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UsageError, match="does not tell Caffe's AlexNet from CaffeNet"):
        pretrained.load(tmp_path / "x.npy")


def test_an_image_like_a_thread_is_left_out(tmp_path, capsys):
    PIL.Image.new("RGB", (40_000, 1)).save(tmp_path / "thread.png")
    assert list(read_images([tmp_path / "thread.png"], 256, [], "torchvision")) == []
    assert "more than 100 times as long as wide" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\nb\n", "has 2 lines; the network has 7 outputs"), ("a\nb\nc\nd\na\nf\ng", "a is on lines 1 and 5"),
     ("a\n\nc\nd\ne\nf\ng", "line 2 is empty")],
)  # fmt: skip
def test_class_names_that_are_not_those_of_the_outputs(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        convert.read_class_names(tmp_path / "names.txt", 7)


TORCHVISIONS = """
import sys, numpy as np, torch, torchvision
from PIL import Image
network = torchvision.models.alexnet().eval()
torch.save(network.state_dict(), sys.argv[1])
transform = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
with torch.no_grad():
    inputs = torch.stack([transform(Image.open(path).convert("RGB")) for path in sys.argv[3:]])
    np.savez(sys.argv[2], inputs=inputs.permute(0, 2, 3, 1), logits=network(inputs))
"""


def test_photographs_have_the_logits_of_torchvisions_own_program(tmp_path, monkeypatch):
    """Its transforms and its network, whose weights are random, on JPEG files of several shapes."""
    pytest.importorskip("torchvision")
    monkeypatch.undo()
    photographs = sorted(map(str, photographs_in(tmp_path)))
    subprocess.run(
        [sys.executable, "-c", TORCHVISIONS, str(tmp_path / "x.pth"), str(tmp_path / "x.npz"), *photographs], check=True
    )
    convert.main([str(tmp_path / "x.pth"), "--out", str(tmp_path / "run")])
    run = alexnet_jax.open_run(tmp_path / "run")
    pixels = np.stack(
        [image for _, image in read_images([pathlib.Path(path) for path in photographs], 256, [], "torchvision")]
    )
    with np.load(tmp_path / "x.npz") as theirs:
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose((pixels[:, 16:240, 16:240] / 255 - mean) / std, theirs["inputs"], atol=1e-5)
        np.testing.assert_allclose(run.logits(pixels), theirs["logits"], atol=1e-4)


def photographs_in(folder):
    """20 JPEGs of the tar that IMAGENET_SAMPLE names, else drawn ones."""
    if sample := os.environ.get("IMAGENET_SAMPLE"):
        with tarfile.open(sample) as tar:
            members = [member for member in tar if member.name.lower().endswith("jpeg")][::50]
            tar.extractall(folder / "photographs", members, filter="data")
        return [path for path in (folder / "photographs").rglob("*") if path.is_file()]
    paths = []
    for number, size in enumerate([(500, 375), (375, 500), (333, 500), (300, 300), (200, 150)]):
        image = PIL.Image.fromarray(RNG.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            size, PIL.Image.Resampling.BICUBIC
        )
        image.save(path := folder / f"{number}.jpeg")
        paths.append(path)
    return paths


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (256, 256), (90, 61), (640, 427)])
def test_torchvisions_scaling(size):
    """The same pixels as Resize(256) and CenterCrop(224), which are written here with Pillow."""
    image = PIL.Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))
    short, long = sorted(size)
    scaled = (256, int(256 * long / short)) if size[0] <= size[1] else (int(256 * long / short), 256)
    whole = np.asarray(image.resize(scaled, PIL.Image.Resampling.BILINEAR))
    top, left = (round((side - 224) / 2) for side in whole.shape[:2])
    window = decode.central_square_bilinear(image, 256)[16:240, 16:240]
    np.testing.assert_array_equal(window, whole[top : top + 224, left : left + 224])


def test_features_of_no_image(source, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no image")
    flags = [str(source), "--images", str(tmp_path / "photo.png"), "--features", str(tmp_path / "x.npz")]
    with pytest.raises(AlexNetError, match="no image could be read"):
        extract_features(cli.parse_eval(flags))
    with pytest.raises(UsageError, match="--layer fc9: the layers and operations are conv1, fc1, logits"):
        extract_features(cli.parse_eval([*flags, "--layer", "fc9"]))
    assert not (tmp_path / "x.npz").exists()
    with pytest.raises(UsageError, match="--features writes one file, of one view"):
        cli.parse_eval([*flags, "--views", "10"])
    with pytest.raises(UsageError, match="--features and --layer need --images"):
        cli.parse_eval([str(source), "--features", "x.npz"])
