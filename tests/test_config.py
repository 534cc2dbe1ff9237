import dataclasses
import json
import pathlib
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest

from alexnet_jax import cli, config, models
from alexnet_jax.config import PRESETS, AugmentationConfig, EvalConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from alexnet_jax.errors import UsageError
from alexnet_jax.export import ExportConfig
from alexnet_jax.prepare import PrepareConfig


def field_names(config_type) -> list[str]:
    names = []
    for field in dataclasses.fields(config_type):
        names += field_names(field.type) if dataclasses.is_dataclass(field.type) else [field.name]
    return names


def test_names_are_unique_across_the_nested_classes():
    names = field_names(TrainConfig)
    assert len(names) == len(set(names))
    assert set(names) >= config.RESUMABLE


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    preset = PRESETS[name].config
    assert preset.preset == name
    assert config.validate(preset) == preset
    assert config.from_json(json.loads(json.dumps(config.to_json(preset)))) == preset


def test_every_value_survives_json():
    changed = TrainConfig(
        augmentation=AugmentationConfig(pca_off_epoch=3, crop_padding=2),
        optimizer=OptimizerConfig("sgd", 0.02, (3, 5), 0.2, momentum=0.8, weight_decay=1e-4),
        run=config.RunConfig(workdir=pathlib.Path("a/b"), num_devices=2),
    )
    assert config.from_json(json.loads(json.dumps(config.to_json(changed)))) == changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0: input should be greater than 0"),
        ({"epochs": "many"}, "--epochs many: input should be a valid integer"),
        ({"pca": "rgb"}, "--pca rgb: input should be 'none', 'per-image'"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: input should be a finite number"),
        ({"dropout_rate": 1.0}, "--dropout-rate 1.0: input should be less than 1"),
        ({"drop_epochs": [1, -2]}, "--drop-epochs -2"),
        ({"drop_epochs": [20, 10]}, "--drop-epochs must rise: 20 10"),
        ({"momentum": 0.9}, "--momentum and --weight-decay are for --optimizer sgd"),
        ({"plateau_patience": 3, "drop_epochs": [5]}, "--plateau-patience and --drop-epochs: choose one"),
        ({"plateau_patience": 3, "train_on": "all"}, "--plateau-patience needs validation images"),
        ({"crop_size": 24, "crop_padding": 4}, "--crop-size and --crop-padding: choose one"),
        ({"accumulate": 2, "deterministic": True}, "--accumulate: --deterministic works in parts of its own"),
        ({"dataset": "imagenet", "train_on": "all"}, "--train-on all is for cifar10 and shapes"),
        ({"nesterov": True}, "--nesterov and --layer-decays are for --optimizer sgd and muon"),
        (
            {"optimizer": "sgd", "layer_decays": [["fc 1", 0.1]]},
            "--layer-decays fc 1: input should be 'conv1', 'conv2'",
        ),
        (
            {"optimizer": "sgd", "layer_decays": [["fc1", 0.1], ["fc1", 0.2]]},
            "--layer-decays names a layer twice: fc1 fc1",
        ),
        (
            {"optimizer": "sgd", "layer_decays": [["local3", 0.1]]},
            "--layer-decays local3: the layers of --network small are conv1, conv2, conv3,",
        ),
        (
            {"optimizer": "sgd", "network": "convnet-11pct", "dropout_rate": 0.0, "layer_decays": [["fc1", 0.1]]},
            "--layer-decays fc1: the layers of --network convnet-11pct are conv1, conv2, local3, local4, logits",
        ),
        ({"rate_schedule": "cosine", "drop_epochs": [5]}, "--rate-schedule cosine: --drop-epochs and --plateau"),
        ({"warmup_epochs": 1.0}, "--warmup-epochs is for --rate-schedule cosine"),
        ({"rate_schedule": "cosine", "warmup_epochs": 50.0}, "--warmup-epochs 50: --epochs 50 are needed after"),
        ({"network": "paper", "conv1_stride": 1}, "--conv1-stride is for --network small"),
        ({"network": "convnet-18pct", "dropout_after": "fc1"}, "--dropout-after is for --network small"),
        ({"network": "convnet-18pct"}, "--dropout-rate 0.5: --network convnet-18pct has no dropout: set it to 0"),
        ({"network": "convnet-11pct", "lrn": "divided"}, "--lrn divided: --network convnet-11pct has its own"),
        ({"network": "2012", "lrn": "none"}, "--lrn none: --network 2012 has its own"),
        ({"network": "caffe", "activation": "tanh"}, "--activation is for --network small and convnet-..."),
        ({"parallelism": "hybrid", "deterministic": True}, "--parallelism hybrid: --deterministic has all weights"),
        (
            {"parallelism": "hybrid", "optimizer": "muon"},
            "--parallelism hybrid: --optimizer muon needs each kernel in one piece",
        ),
        (
            {"parallelism": "hybrid", "network": "convnet-18pct", "dropout_rate": 0.0},
            "--parallelism hybrid: --network convnet-18pct has no hidden dense layers",
        ),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"a\nb" * 100: 1}, "unknown setting 'a\\nba\\nb"),
        ({"epochs": "3"}, "--epochs 3: input should be a valid integer"),
        ({"epochs": True}, "--epochs True: input should be a valid integer"),
        ({"epochs": 2**31}, "--epochs 2147483648: input should be less than"),
        ({"seed": 2**32}, "--seed 4294967296: input should be less than"),
        ({"flip": 1}, "--flip 1: input should be a valid boolean"),
        ({"data_dir": "a\nb"}, "--data-dir a\\nb: value error, a path without control characters is needed"),
        (
            {"data_url": "ftp://x"},
            "--data-url ftp://x: value error, an address that begins with http:// or https:// is",
        ),
        *(
            ({"data_url": url}, f"--data-url {url}: value error, a percent-encoded address, with the host")
            for url in ("https://host/données.tar.gz", "https://hôte/x")
        ),
        ({"preset": "../x"}, "--preset ../x: string should match pattern"),
    ],
)
def test_impossible_values_are_named(change, message):
    settings = config.to_json(PRESETS["cifar10"].config) | change
    with pytest.raises(UsageError) as error:
        config.from_json(settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_names_of_layers_are_those_of_the_parameters():
    for network in get_args(get_type_hints(config.NetworkConfig)["network"]):
        model = models.from_config(config.NetworkConfig(network=network), 10)
        images = jnp.zeros((1, *[models.input_size(config.NetworkConfig(network=network)) or 32] * 2, 3))
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        assert set(params) == set(config.layers_of(network)), network


def test_a_missing_setting_is_named():
    settings = config.to_json(PRESETS["cifar10"].config)
    del settings["batch_size"]
    with pytest.raises(UsageError, match="'batch_size' is missing"):
        config.from_json(settings)


def test_differing_settings():
    old = PRESETS["cifar10"].config
    longer = dataclasses.replace(old, schedule=ScheduleConfig(epochs=99))
    assert config.differing_settings(old, longer) == []
    other = dataclasses.replace(old, schedule=ScheduleConfig(epochs=99, seed=1))
    assert config.differing_settings(old, other) == ["seed"]


def test_runs_of_the_first_version_can_be_read():
    settings = config.to_json(PRESETS["cifar10"].config)
    for name in config.ADDED:
        del settings[name]
    assert config.from_json(settings) == PRESETS["cifar10"].config


def test_a_cosine_fixes_the_number_of_epochs():
    cosine = OptimizerConfig("sgd", rate_schedule="cosine")
    old = TrainConfig(optimizer=cosine)
    longer = TrainConfig(optimizer=cosine, schedule=ScheduleConfig(epochs=99))
    assert config.differing_settings(old, longer) == ["epochs"]


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
    found = config.validate(cli.parse(config_type, args, "", ""))
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == tmp_path / "x"


@pytest.mark.parametrize(
    ("config_type", "args", "message"),
    [
        (TrainConfig, ["--workdir", ""], "--workdir '': the path is empty"),
        (TrainConfig, ["--data-dir="], "--data-dir '': the path is empty"),
        (EvalConfig, [""], "--run '': the path is empty"),
        (EvalConfig, ["a", "b", ""], "--others '': the path is empty"),
        (EvalConfig, ["a", "--images", "b", ""], "--images '': the path is empty"),
        (ExportConfig, ["a", "--out", ""], "--out '': the path is empty"),
        (PrepareConfig, [*PREPARE, ""], "--out '': the path is empty"),
        (TrainConfig, ["--workdir=~no-such-user/x"], "--workdir ~no-such-user/x: there is no user 'no-such-user'"),
        (EvalConfig, ["~no-such-user"], "--run ~no-such-user: there is no user 'no-such-user'"),
    ],
)
def test_paths_that_are_none_are_named(config_type, args, message):
    with pytest.raises(UsageError) as error:
        config.validate(cli.parse(config_type, args, "", ""))
    assert str(error.value).lower().startswith(message)
    assert "\n" not in str(error.value)


def test_a_user_without_a_home_is_told(monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    with pytest.raises(UsageError, match=r"^~/x: this user has no home directory: give the full path$"):
        config.expanded("~/x")


def test_paths_in_a_config_file_stay_as_they_are():
    settings = config.to_json(TrainConfig()) | {"workdir": "~/x", "data_dir": "../data"}
    found = config.from_json(settings)
    assert (found.run.workdir, found.data.data_dir) == (pathlib.Path("~/x"), pathlib.Path("../data"))
