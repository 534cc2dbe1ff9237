"""Streams of a prepared data set, and the whole sequence: train, stop, resume, evaluate."""

import collections
import contextlib
import dataclasses
import json
import shutil
import signal

import grain
import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import data, runtime
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import DataConfig, EvalConfig
from alexnet_jax.data import prepare
from alexnet_jax.data.batches import Batch, batches, epoch_order
from alexnet_jax.data.dataset import Placement
from alexnet_jax.data.streamed import open_prepared
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError
from alexnet_jax.inspection import evaluate
from alexnet_jax.network import build
from alexnet_jax.training import loop
from tests.image_folders import configure, make_folder
from tests.stress import process_faults
from tests.tiny_runs import TINY_NETWORKS, assert_same_run, train_until, with_pictures

SIDE = 36


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """21 training and 6 validation images of three classes, in shards of 8."""
    folder = tmp_path_factory.mktemp("imagenet")
    make_folder(folder / "source", per_class=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "RECORDS_PER_SHARD", 8)
        prepare.prepare(configure(folder / "source", folder / "out", size=SIDE, store="raw"))
    return folder / "out"


def stack(stream):
    return [tuple(np.array(array) for array in batch) for batch in stream]


def assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def epoch(folder, number=1, num_devices=2, rows=slice(None), first=0, workers=0):
    """The batches of 8 of an epoch, each over `num_devices` devices."""
    calls = open_prepared(folder, workers).calls(3, number, 8, Placement(num_devices, rows), first, lambda batch: 1)
    return (Batch(*(array[:, 0] for array in call)) for call in calls)


@pytest.fixture(scope="module")
def whole(prepared):
    """An epoch of batches of 8 on 2 devices: 8, 8, and 5 with padding."""
    return stack(epoch(prepared))


def test_the_order_is_that_of_the_epoch(prepared, whole):
    dataset = open_prepared(prepared)
    in_order = [
        (image, label)
        for batch in dataset.batches("train", 1, Placement(1, slice(None)))
        for image, label in zip(batch.images[0], batch.labels[0], strict=True)
    ]
    assert len(in_order) == 21
    layout = batches(epoch_order(3, 1, 21), 8, 2)
    for number, (images, labels, mask) in enumerate(whole):
        np.testing.assert_array_equal(mask, layout.mask[:, number])
        for place in np.ndindex(mask.shape):
            image, label = in_order[layout.indices[place[0], number, place[1]]]
            np.testing.assert_array_equal(images[place], image)
            assert labels[place] == label
    assert whole[-1][2].sum() == 5
    with contextlib.suppress(StopIteration):
        other = next(epoch(prepared, 2))
        assert not np.array_equal(other.images, whole[0][0])


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_a_stream_goes_on_at_any_batch(prepared, whole, first):
    assert_equal(stack(epoch(prepared, first=first)), whole[first:])


def test_worker_processes_change_nothing(prepared, whole):
    assert_equal(stack(epoch(prepared, workers=2)), whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_make_up_the_whole(prepared, processes):
    everything = stack(epoch(prepared, num_devices=2 * processes))
    shares = [stack(epoch(prepared, num_devices=2 * processes, rows=slice(2 * i, 2 * i + 2))) for i in range(processes)]
    assert_equal(
        [tuple(np.concatenate(x) for x in zip(*parts, strict=True)) for parts in zip(*shares, strict=True)], everything
    )


def damage(folder, how):
    shard = folder / "train-00001-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "shorter":
        shard.write_bytes(content[:-1])
    elif how == "flipped":
        content[len(content) // 16] ^= 0xFF  # within the first records
        shard.write_bytes(content)
    elif how == "description":
        (folder / "dataset.json").write_text("{")
    elif how == "statistics":
        (folder / "statistics.npz").write_bytes(b"PK\x03\x04")


@pytest.mark.parametrize("how", ["missing", "shorter", "flipped", "description", "statistics"])
def test_damage_is_named(prepared, tmp_path, how):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    damage(folder, how)
    name = {"description": "dataset.json", "statistics": "statistics.npz"}.get(how, "train-00001-of-00003.array_record")

    def use():
        dataset = open_prepared(folder)
        dataset.statistics()
        dataset.verify()

    with pytest.raises(AlexNetError, match=name) as error:
        use()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_names_a_damaged_shard(prepared, tmp_path, workers):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    damage(folder, "flipped")
    with pytest.raises(AlexNetError, match=r"train-00001-of-00003\.array_record is damaged"):
        stack(epoch(folder, workers=workers))


def make_config(prepared, workdir, epochs=2, **run):
    """The small network on windows of 32 pixels; 3 steps an epoch."""
    base = PRESETS["imagenet-2012"].config
    return dataclasses.replace(
        base,
        data=DataConfig("imagenet", prepared),
        augmentation=dataclasses.replace(base.augmentation, crop_size=32, input_range=1),
        network=dataclasses.replace(base.network, network="small"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4, conv1_slow_epoch=1),
        schedule=dataclasses.replace(base.schedule, epochs=epochs, batch_size=8),
        run=dataclasses.replace(base.run, **{"workdir": workdir, "num_devices": 2, "log_every": 1} | run),
    )


def test_the_whole_way(prepared, tmp_path, monkeypatch, capsys):
    """Trained, stopped in the middle of an epoch and resumed, evaluated with 10 views."""
    monkeypatch.setattr(build, "NETWORKS", TINY_NETWORKS)
    dataset = data.load(DataConfig("imagenet", prepared))
    with with_pictures():
        loop.train_and_evaluate(make_config(prepared, tmp_path / "whole"), dataset)
    with pytest.raises(StoppedError):
        train_until(make_config(prepared, tmp_path / "broken"), dataset, 5, signal.SIGTERM)
    loop.train_and_evaluate(make_config(prepared, tmp_path / "broken"), dataset)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")

    results = evaluate.evaluate(EvalConfig(tmp_path / "whole", views=10, num_devices=4, batch_size=3))
    assert (results["split"], results["count"], results["views"]) == ("validation", 6, 10)
    assert json.loads((tmp_path / "whole" / "eval" / "validation.json").read_text()) == results
    assert results["top5_accuracy"] == 1.0  # of three classes
    one = evaluate.evaluate(EvalConfig(tmp_path / "whole"))
    run = alexnet_jax.open_run(tmp_path / "whole")
    stream = dataset.batches("validation", 6, Placement(1, slice(None)))
    images, labels, _ = (array[0] for array in next(stream))
    assert one["correct"] == int((run.predict_class(images) == labels).sum())
    assert {p.name for p in (tmp_path / "whole" / "plots").iterdir()} == {
        "portraits.png",
        "pca_noise.png",
        "curves.png",
    }
    with pytest.raises(AlexNetError, match="has no split 'test'"):
        evaluate.evaluate(EvalConfig(tmp_path / "whole", split="test"))


@pytest.mark.stress
def test_processes_train_on_streams_like_one(prepared, tmp_path):
    """Two processes, each of which reads its share, then one: bit for bit like one from the first to the last."""
    flags = ["imagenet-2012", "--data-dir", str(prepared), "--network", "small", "--crop-size", "32", "--input-range"]
    flags += ["1", "--batch-size", "8", "--learning-rate", "1e-4", "--log-every", "1", "--deterministic", "--epochs"]
    worker = "import train\nfrom alexnet_jax.config import cli\ncli.run(train.main)"
    for name, epochs, processes, devices, more in (
        ("one", 3, 1, 2, ()),
        ("two", 1, 2, 1, ()),
        ("two", 2, 2, 2, ("--loader-workers", "1")),
        ("two", 3, 1, 1, ()),
    ):
        running = process_faults.start(tmp_path / name, processes, devices, [*flags, str(epochs), *more], worker)
        process_faults.finish(running)
    assert process_faults.is_like(tmp_path / "two", tmp_path / "one")


def test_sizes_that_do_not_fit_are_refused(prepared, tmp_path):
    dataset = open_prepared(prepared)
    config = make_config(prepared, tmp_path / "run")
    larger = dataclasses.replace(config, augmentation=dataclasses.replace(config.augmentation, crop_size=37))
    with pytest.raises(UsageError, match="--crop-size 37: the images are 36x36"):
        loop.train_and_evaluate(larger, dataset)
    full = dataclasses.replace(config, network=dataclasses.replace(config.network, network="2012"))
    with pytest.raises(UsageError, match="--network 2012 takes images of 224x224, not 32x32: set --enlarge-to 224"):
        loop.train_and_evaluate(full, dataset)
    with pytest.raises(UsageError, match="--dataset imagenet needs --data-dir"):
        data.load(DataConfig("imagenet"))


def test_too_little_shared_memory_is_told_before_a_process_starts(prepared, monkeypatch):
    """Two batches of 8 and one of 5 for each worker, which is all that there is to load."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(runtime, "SHARED_MEMORY", prepared)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3 * 8 * SIDE * SIDE * 3 - 1))
    with pytest.raises(AlexNetError, match=r"^--loader-workers 2 needs 0 MB of shared memory, but .* --shm-size"):
        next(epoch(prepared, workers=2))
    next(epoch(prepared))


def test_a_loader_that_is_killed_is_one_line(prepared, monkeypatch):
    class Loader:
        batch = to_iter_dataset = mp_prefetch = lambda self, *args: self

        def __iter__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search the logs")

    monkeypatch.setattr(grain.MapDataset, "source", lambda examples: Loader())
    with pytest.raises(
        AlexNetError, match=r"^--loader-workers 2: a worker process was killed; memory or /dev/shm is too"
    ):
        next(epoch(prepared, workers=2))
