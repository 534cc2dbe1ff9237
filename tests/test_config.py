import dataclasses
import json
import pathlib

import pytest

from alexnet_jax import files
from alexnet_jax.config import checks, cli, config_json, flags
from alexnet_jax.config.recipes import PRESETS
from alexnet_jax.config.settings import (
    AugmentationConfig,
    EvalConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from alexnet_jax.data.prepare import PrepareConfig
from alexnet_jax.errors import UsageError
from alexnet_jax.exchange.export import ExportConfig

pytestmark = pytest.mark.both_lines


def test_names_are_unique_across_the_nested_classes():
    names = [field.name for field in flags.fields(TrainConfig)]
    assert len(names) == len(set(names)) == len(flags.flat_items(TrainConfig()))


def test_settings_are_replaced_by_their_flat_names():
    changed = flags.replace(TrainConfig(), epochs=3, preset="mine", flip=True)
    assert flags.flat_items(changed) == flags.flat_items(TrainConfig()) | {"epochs": 3, "preset": "mine", "flip": True}
    with pytest.raises(TypeError, match="colour"):
        flags.replace(TrainConfig(), colour="red")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    preset = PRESETS[name].config
    assert preset.preset == name
    assert checks.validate(preset) == preset
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(preset)))) == preset


def test_every_value_survives_json():
    changed = TrainConfig(
        augmentation=AugmentationConfig(pca_off_epoch=3, crop_padding=2),
        optimizer=OptimizerConfig("sgd", 0.02, (3, 5), 0.2, momentum=0.8, weight_decay=1e-4),
        run=RunConfig(workdir=pathlib.Path("a/b"), num_devices=2),
    )
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(changed)))) == changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0: input should be greater than 0"),
        ({"epochs": "many"}, "--epochs many: input should be a valid integer"),
        ({"pca": "rgb"}, "--pca rgb: input should be 'none', 'per-image'"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: input should be a finite number"),
        ({"dropout_rate": 1.0}, "--dropout-rate 1.0: input should be less than 1"),
        ({"drop_epochs": [1, -2]}, "--drop-epochs -2"),
        ({"drop_epochs": [20, 10]}, "--drop-epochs 20 10: each must be later than the one before"),
        ({"momentum": 0.9}, "--momentum and --weight-decay are for --optimizer sgd"),
        ({"plateau_patience": 3, "drop_epochs": [5]}, "--plateau-patience and --drop-epochs: choose one"),
        ({"plateau_patience": 3, "train_on": "all"}, "--plateau-patience needs validation images"),
        ({"flip_schedule": "alternating"}, "--flip-schedule alternating needs --flip"),
        ({"cutout": -1}, "--cutout -1: "),
        ({"crop_size": 24, "crop_padding": 4}, "--crop-size and --crop-padding: choose one"),
        (
            {"accumulate": 2, "deterministic": True},
            "--accumulate and --deterministic, which has 8 parts of its own: choose one",
        ),
        ({"dataset": "imagenet", "train_on": "all"}, "--train-on all is for --dataset cifar10, cifar100 and shapes"),
        ({"nesterov": True}, "--nesterov and --layer-decays are for --optimizer sgd and muon"),
        (
            {"optimizer": "sgd", "layer_decays": [["fc1", 0.1], ["fc1", 0.2]]},
            "--layer-decays names a layer twice: fc1 fc1",
        ),
        ({"process_id": 1}, "--process-id: only with --distributed"),
        (
            {"rate_schedule": "cosine", "drop_epochs": [5]},
            "--drop-epochs and --plateau-patience are for --rate-schedule drops",
        ),
        ({"warmup_epochs": 1.0}, "--warmup-epochs is for --rate-schedule cosine"),
        ({"rate_schedule": "cosine", "warmup_epochs": 50.0}, "--warmup-epochs 50 must be less than --epochs 50"),
        ({"network": "paper", "conv1_stride": 1}, "--conv1-stride is for --network small"),
        ({"network": "convnet-18pct", "dropout_after": "fc1"}, "--dropout-after is for --network small"),
        ({"network": "convnet-18pct"}, "--dropout-rate 0.5: --network convnet-18pct has no dropout: set it to 0"),
        ({"network": "convnet-11pct", "lrn": "divided"}, "--lrn divided: not available for --network convnet-11pct"),
        ({"network": "2012", "lrn": "none"}, "--lrn none: not available for --network 2012"),
        ({"network": "caffe", "activation": "tanh"}, "--activation is for --network small and convnet-..."),
        ({"parallelism": "hybrid", "deterministic": True}, "--parallelism hybrid: --deterministic needs all weights"),
        (
            {"parallelism": "hybrid", "optimizer": "muon"},
            "--parallelism hybrid: --optimizer muon needs each kernel in one piece",
        ),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"a\nb" * 100: 1}, "unknown setting 'a\\nba\\nb"),
        ({"epochs": "3"}, "--epochs 3: input should be a valid integer"),
        ({"epochs": True}, "--epochs True: input should be a valid integer"),
        ({"epochs": 2**31}, "--epochs 2147483648: input should be less than"),
        ({"seed": 2**32}, "--seed 4294967296: input should be less than"),
        ({"flip": 1}, "--flip 1: input should be a valid boolean"),
        ({"data_dir": "a\nb"}, "--data-dir a\\nb: must be a path without control characters"),
        (
            {"data_url": "ftp://x"},
            "--data-url ftp://x: must be an address that begins with http:// or https://",
        ),
        *(
            ({"data_url": url}, f"--data-url {url}: must be percent-encoded, with the host")
            for url in ("https://host/données.tar.gz", "https://hôte/x")
        ),
        ({"preset": "../x"}, "--preset ../x: string should match pattern"),
    ],
)
def test_impossible_values_are_named(change, message):
    settings = config_json.to_json(PRESETS["cifar10"].config) | change
    with pytest.raises(UsageError) as error:
        config_json.from_json(settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_setting_is_named():
    settings = config_json.to_json(PRESETS["cifar10"].config)
    del settings["batch_size"]
    with pytest.raises(UsageError, match="'batch_size' is missing"):
        config_json.from_json(settings)


def test_differing_settings():
    old = PRESETS["cifar10"].config
    longer = dataclasses.replace(old, schedule=ScheduleConfig(epochs=99))
    assert config_json.differing_settings(old, longer) == []
    other = dataclasses.replace(old, schedule=ScheduleConfig(epochs=99, seed=1))
    assert config_json.differing_settings(old, other) == ["seed"]


# The properties that marks in the annotations of settings.py promise.
MAY_CHANGE = {
    *("preset", "data_dir", "data_url", "epochs", "workdir", "num_devices", "steps_per_call", "eval_batch_size"),
    *("log_every", "eval_every", "checkpoint_every", "tensorboard", "compilation_cache", "stall_steps"),
    *("loader_workers", "distributed", "coordinator", "num_processes", "process_id", "peer_timeout", "parallelism"),
}
PER_PROCESS = {"data_dir", "data_url", "workdir", "coordinator", "process_id", "loader_workers", "compilation_cache"}


@pytest.mark.parametrize("name", flags.flat_items(TrainConfig()))
def test_what_may_change_when_a_run_is_resumed(name):
    changed = flags.replace(TrainConfig(), **{name: "another value"})
    assert config_json.differing_settings(TrainConfig(), changed) == ([] if name in MAY_CHANGE else [name])


def test_the_settings_in_which_processes_must_agree():
    shared = flags.flat_items(TrainConfig()).keys() - PER_PROCESS
    assert flags.shared_settings(TrainConfig(preset="mine")).items() >= {"--preset": "mine", "--seed": 0}.items()
    assert flags.shared_settings(TrainConfig()).keys() == {flags.flag(name) for name in shared}


def test_a_cosine_fixes_the_number_of_epochs():
    cosine = OptimizerConfig("sgd", rate_schedule="cosine")
    old = TrainConfig(optimizer=cosine)
    longer = TrainConfig(optimizer=cosine, schedule=ScheduleConfig(epochs=99))
    assert config_json.differing_settings(old, longer) == ["epochs"]


PREPARE = ["--source", "a", "--out"]


@pytest.mark.parametrize(
    ("config_type", "args", "path"),
    [
        (TrainConfig, ["--workdir=~/x"], "run.workdir"),
        (TrainConfig, ["--data-dir=~/x"], "data.data_dir"),
        (EvalConfig, ["~/x"], "run"),
        (EvalConfig, ["a", "~/x"], "others.0"),
        (EvalConfig, ["a", "--images", "~/x"], "images.0"),
        (ExportConfig, ["a", "--out=~/x"], "out"),
        (PrepareConfig, [*PREPARE, "~/x"], "out"),
    ],
)
def test_the_home_directory_is_put_in(tmp_path, monkeypatch, config_type, args, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = cli.parse(config_type, args, "")
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == tmp_path / "x"


@pytest.mark.parametrize(
    ("config_type", "args", "message"),
    [
        (TrainConfig, ["--workdir", ""], "--workdir '': the path is empty"),
        (TrainConfig, ["--data-dir="], "--data-dir '': the path is empty"),
        (EvalConfig, [""], "RUN '': the path is empty"),
        (EvalConfig, ["a", "b", ""], "OTHERS '': the path is empty"),
        (EvalConfig, ["a", "--images", "b", ""], "--images '': the path is empty"),
        (ExportConfig, ["a", "--out", ""], "--out '': the path is empty"),
        (PrepareConfig, [*PREPARE, ""], "--out '': the path is empty"),
        (TrainConfig, ["--workdir=~no-such-user/x"], "--workdir ~no-such-user/x: there is no user 'no-such-user'"),
        (EvalConfig, ["~no-such-user"], "RUN ~no-such-user: there is no user 'no-such-user'"),
    ],
)
def test_paths_that_are_none_are_named(config_type, args, message):
    with pytest.raises(UsageError) as error:
        cli.parse(config_type, args, "")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_user_without_a_home_gets_one_line(monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    with pytest.raises(UsageError, match=r"^~/x: this user has no home directory: give the full path$"):
        files.expanded("~/x")


def test_paths_in_a_config_file_stay_as_they_are():
    settings = config_json.to_json(TrainConfig()) | {"workdir": "~/x", "data_dir": "../data"}
    found = config_json.from_json(settings)
    assert (found.run.workdir, found.data.data_dir) == (pathlib.Path("~/x"), pathlib.Path("../data"))


def check_training(**changed):
    facts = {
        "image_shape": (32, 32, 3),
        "has_validation": True,
        "source": "DIR",
        "num_devices": 2,
        "network_input": None,
        "layers": ("conv1", "fc1", "logits"),
    }
    known = {name: changed.pop(name) for name in facts if name in changed}
    checks.check_training(flags.replace(TrainConfig(), **changed), **facts | known)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 12, "accumulate": 3},
        {"deterministic": True, "batch_size": 8, "num_devices": 8},
        {"crop_size": 32},
        {"crop_padding": 31},
        {"cutout": 32},
        {"network": "paper", "network_input": 227, "enlarge_to": 227},
        {"network": "paper", "network_input": 227, "image_shape": (256, 256, 3), "crop_size": 227},
        {"plateau_patience": 3},
        {"layer_decays": (("fc1", 0.1),), "parallelism": "hybrid"},
    ],
)
def test_what_suits_data_and_devices(settings):
    check_training(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "num_devices": 4}, "--batch-size 10 can't be divided among 4 devices"),
        ({"batch_size": 12, "accumulate": 4}, "--accumulate 4 can't divide the 6 images of each device"),
        ({"deterministic": True, "batch_size": 12}, "--deterministic: --batch-size 12 can't be divided by 8"),
        (
            {"deterministic": True, "num_devices": 3, "batch_size": 24},
            "--deterministic runs on 1, 2, 4 or 8 devices, not",
        ),
        ({"crop_size": 33}, "--crop-size 33: the images are 32x32; set at most 32"),
        ({"crop_size": 33, "image_shape": (40, 32, 3)}, "--crop-size 33: the images are 40x32; set at most 32"),
        ({"cutout": 25, "crop_size": 24}, "--cutout 25: the images are 24 pixels wide; set at most 24"),
        ({"crop_padding": 28, "image_shape": (28, 28, 3)}, "--crop-padding 28: the images are 28x28; set at most 27"),
        (
            {"network": "paper", "network_input": 227},
            "--network paper takes images of 227x227, not 32x32: set --enlarge-to",
        ),
        (
            {"network": "2012", "network_input": 224, "image_shape": (256, 256, 3), "crop_size": 227},
            "--network 2012 takes images of 224x224, not 227x227: set --crop-size 224",
        ),
        (
            {"network": "paper", "network_input": 227, "image_shape": (227, 300, 3)},
            "--network paper takes images of 227x227, not 227x300: set --enlarge-to 227",
        ),
        (
            {"layer_decays": (("fc 1", 0.1),)},
            "--layer-decays fc 1: the layers of --network small are conv1, fc1, logits",
        ),
        (
            {"network": "convnet-18pct", "parallelism": "hybrid", "layers": ("conv1", "logits")},
            "--parallelism hybrid: --network convnet-18pct has no hidden dense layers",
        ),
        ({"plateau_patience": 3, "has_validation": False}, "--plateau-patience needs validation images; DIR has none"),
    ],
)
def test_what_does_not_suit_data_or_devices_is_named(settings, message):
    with pytest.raises(UsageError) as error:
        check_training(**settings)
    assert message in str(error.value)


def test_many_views_need_crops():
    for views, augmentation in [(2, {}), (10, {"crop_padding": 4}), (10, {"crop_size": 24})]:
        checks.check_views(views, AugmentationConfig(**augmentation), pathlib.Path("runs/x"))
    for views in (6, 10):
        with pytest.raises(UsageError, match=rf"^--views {views}: runs/x was trained without crops"):
            checks.check_views(views, AugmentationConfig(), pathlib.Path("runs/x"))
