"""Checks of values and of combinations of settings.

`from_settings` makes the checks that need only the settings, for flags and config.json alike. `check_training` and
`check_views` make those that also need the data, the devices or a run, before anything is computed or written.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from alexnet_jax.config.flags import C, argument, fields, flag, flat_items
from alexnet_jax.config.settings import (
    AugmentationConfig,
    DataConfig,
    EvalConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from alexnet_jax.config.types import FROM_FLAGS
from alexnet_jax.errors import UsageError, shown

# --deterministic divides every batch into this many parts, whose gradients are added in a fixed order.
MICRO_BATCHES = 8
ALL_BUT_HEAD = "all-but-head"  # what --freeze calls all layers but the last


def from_settings(config_type: type[C], settings: Mapping[str, Any], context: str | None = None) -> C:
    """A configuration with these settings, given by flat name; checks types, ranges and combinations.

    Raises:
      UsageError: a setting is refused; the message names its flag.
    """
    try:
        config = pydantic.TypeAdapter(config_type).validate_python(_nested(config_type, settings), context=context)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        arguments = {field.name: argument(field) for field in fields(config_type)}
        # The innermost name: the path may begin with that of a class, and `optimizer` is both a class and a setting in
        # it.
        name = [arguments[part] for part in first["loc"] if part in arguments][-1]
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{name} {shown(first['input']) or repr('')}: {reason[0].lower()}{reason[1:]}") from None
    if isinstance(config, TrainConfig):
        _check_train(config)
    if isinstance(config, EvalConfig):
        _check_eval(config)
    return config


def validate(config: C) -> C:
    """Checks a configuration made from flags, as `from_settings` does, and expands `~` in its paths."""
    return from_settings(type(config), flat_items(config), FROM_FLAGS)


def _nested(config_type: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: _nested(field.type, settings) if dataclasses.is_dataclass(field.type) else settings[field.name]
        for field in dataclasses.fields(config_type)
    }


def _check_train(config: TrainConfig) -> None:
    optimizer, data, run = config.optimizer, config.data, config.run
    _check_processes(run)
    _check_optimizer(optimizer, config.schedule.epochs)
    _check_network(config.network)
    if data.train_on == "all" and optimizer.plateau_patience:
        raise UsageError("--plateau-patience needs validation images: set --train-on train")
    if data.train_on == "all" and data.dataset in ("imagenet", "folder"):
        raise UsageError("--train-on all is for --dataset cifar10, cifar100 and shapes")
    for option in ("image_size", "validation_share"):
        if data.dataset != "folder" and getattr(data, option) != getattr(DataConfig(), option):
            raise UsageError(f"{flag(option)} is for --dataset folder")
    if data.scaling != "square" and data.dataset in ("cifar10", "cifar100", "shapes"):
        raise UsageError("--scaling is for --dataset folder")
    if config.network.init_from and config.network.init_from == config.run.workdir:
        raise UsageError(f"--init-from {config.run.workdir} is also --workdir: choose another folder for the run")
    if config.augmentation.flip_schedule == "alternating" and not config.augmentation.flip:
        raise UsageError("--flip-schedule alternating needs --flip")
    if config.augmentation.crop_size and config.augmentation.crop_padding:
        raise UsageError("--crop-size and --crop-padding: choose one")
    if run.deterministic and config.schedule.accumulate > 1:
        raise UsageError(f"--accumulate and --deterministic, which has {MICRO_BATCHES} parts of its own: choose one")
    if run.parallelism == "hybrid":
        if run.deterministic:
            raise UsageError("--parallelism hybrid: --deterministic needs all weights on each device")
        if optimizer.optimizer == "muon":
            raise UsageError("--parallelism hybrid: --optimizer muon needs each kernel in one piece")


def _check_processes(run: RunConfig) -> None:
    flags = {"--coordinator": run.coordinator, "--num-processes": run.num_processes, "--process-id": run.process_id}
    given = [name for name, value in flags.items() if value is not None]
    missing = [name for name in flags if name not in given]
    if given and not run.distributed:
        raise UsageError(f"{', '.join(given)}: only with --distributed")
    if given and missing:
        raise UsageError(f"missing: {', '.join(missing)}: give all three, or none if JAX can discover the processes")
    if run.coordinator is not None and not re.fullmatch(r"\[?[\w.:-]+\]?:[0-9]{1,5}", run.coordinator):
        raise UsageError(f"--coordinator {shown(run.coordinator)}: must be HOST:PORT")
    if run.process_id is not None and run.num_processes is not None and run.process_id >= run.num_processes:
        raise UsageError(f"--process-id {run.process_id} must be less than --num-processes {run.num_processes}")


def _check_optimizer(optimizer: OptimizerConfig, epochs: int) -> None:
    if optimizer.optimizer == "adam" and (optimizer.momentum or optimizer.weight_decay):
        raise UsageError("--momentum and --weight-decay are for --optimizer sgd and muon; set both to 0 for adam")
    if optimizer.optimizer == "adam" and (optimizer.nesterov or optimizer.layer_decays):
        raise UsageError("--nesterov and --layer-decays are for --optimizer sgd and muon")
    decayed = [layer for layer, _ in optimizer.layer_decays]
    if len(set(decayed)) < len(decayed):
        raise UsageError(f"--layer-decays names a layer twice: {shown(' '.join(decayed))}")
    if list(optimizer.drop_epochs) != sorted(set(optimizer.drop_epochs)):
        raise UsageError(
            f"--drop-epochs {shown(' '.join(map(str, optimizer.drop_epochs)))}: each must be later than the one before"
        )
    if optimizer.rate_schedule == "cosine" and (optimizer.drop_epochs or optimizer.plateau_patience):
        raise UsageError("--drop-epochs and --plateau-patience are for --rate-schedule drops")
    if optimizer.warmup_epochs and optimizer.rate_schedule != "cosine":
        raise UsageError("--warmup-epochs is for --rate-schedule cosine")
    if optimizer.warmup_epochs >= epochs:
        raise UsageError(
            f"--warmup-epochs {optimizer.warmup_epochs:g} must be less than --epochs {epochs}: add --warmup-epochs 0"
        )
    if optimizer.plateau_patience and optimizer.drop_epochs:
        raise UsageError("--plateau-patience and --drop-epochs: choose one")


def _check_network(network: NetworkConfig) -> None:
    """Refuses options that the network does not have."""
    name, convnet = network.network, network.network.startswith("convnet-")
    if name != "small":
        for option in ("initial_bias", "pool_window", "conv1_stride", "dropout_after"):
            if getattr(network, option) != getattr(NetworkConfig(), option):
                raise UsageError(f"{flag(option)} is for --network small")
        if network.lrn == "divided" or (network.lrn == "none" and not convnet):
            raise UsageError(f"--lrn {network.lrn}: not available for --network {name}: leave the flag out")
        if network.activation != "relu" and not convnet:
            raise UsageError("--activation is for --network small and convnet-...")
    if convnet and network.dropout_rate:
        raise UsageError(f"--dropout-rate {network.dropout_rate:g}: --network {name} has no dropout: set it to 0")


def _check_eval(config: EvalConfig) -> None:
    if config.images == ():
        raise UsageError("--images needs image files, or folders of them")
    if config.images and (config.others or config.report or config.split or config.data_dir):
        raise UsageError("--images is for one run, without --report, --split and --data-dir")
    if (config.features or config.layer) and not config.images:
        raise UsageError("--features and --layer need --images: files, or folders of them")
    if config.features and (config.views > 1 or config.out):
        raise UsageError("--features writes one file, of one view: leave out --views and --out")
    if config.layer and not config.features:
        raise UsageError("--layer needs --features: the file to write")
    if config.others and config.report:
        raise UsageError("--report is for one run: leave it out to compare several")


def check_training(
    config: TrainConfig,
    *,
    image_shape: Sequence[int],
    has_validation: bool,
    source: str,
    num_devices: int,
    network_input: int | None,
    layers: Sequence[str],
) -> None:
    """Checks that the settings suit the data, the devices and the network.

    Args:
      config: validated.
      image_shape: (H, W, C) of the stored images.
      has_validation: whether the data set has a validation split.
      source: where the data comes from, for messages.
      num_devices: of all processes together.
      network_input: side of the images that the network takes; None: it adapts to any.
      layers: names of the network's layers.

    Raises:
      UsageError: they don't; the message names the flag.
    """
    if config.data.scaling != "square" and config.data.dataset == "imagenet":
        raise UsageError("--scaling is for --dataset folder: ImageNet was scaled when it was prepared")
    _check_batch(config, num_devices)
    _check_image_size(config, image_shape, network_input)
    _check_layers(config, layers)
    data_dir = config.data.data_dir
    if config.data.dataset == "folder" and data_dir and config.workdir.resolve().is_relative_to(data_dir.resolve()):
        raise UsageError(
            f"--workdir {config.workdir} is in --data-dir: the run's pictures would become training images"
        )
    if config.optimizer.plateau_patience and not has_validation:
        raise UsageError(f"--plateau-patience needs validation images; {source} has none")


def _check_batch(config: TrainConfig, num_devices: int) -> None:
    batch_size, parts = config.schedule.batch_size, config.schedule.accumulate
    if config.run.deterministic and MICRO_BATCHES % num_devices:
        raise UsageError(f"--deterministic runs on 1, 2, 4 or 8 devices, not on {num_devices}: set --num-devices")
    if config.run.deterministic and batch_size % MICRO_BATCHES:
        raise UsageError(f"--deterministic: --batch-size {batch_size} can't be divided by {MICRO_BATCHES}")
    if batch_size % num_devices:
        raise UsageError(
            f"--batch-size {batch_size} can't be divided among {num_devices} devices: change it or --num-devices"
        )
    share = batch_size // num_devices
    if share % parts:
        raise UsageError(f"--accumulate {parts} can't divide the {share} images of each device")


def _check_image_size(config: TrainConfig, image_shape: Sequence[int], network_input: int | None) -> None:
    augmentation, smallest = config.augmentation, min(image_shape[:2])
    stored = "x".join(map(str, image_shape[:2]))
    if (augmentation.crop_size or 0) > smallest:
        raise UsageError(f"--crop-size {augmentation.crop_size}: the images are {stored}; set at most {smallest}")
    if augmentation.crop_padding >= smallest:
        raise UsageError(
            f"--crop-padding {augmentation.crop_padding}: the images are {stored}; set at most {smallest - 1}"
        )
    window = augmentation.crop_size or smallest
    if augmentation.cutout > window:
        raise UsageError(f"--cutout {augmentation.cutout}: the images are {window} pixels wide; set at most {window}")
    if network_input is None:
        return
    side = augmentation.enlarge_to or augmentation.crop_size
    given, taken = f"{side}x{side}" if side else stored, f"{network_input}x{network_input}"
    if given != taken:
        option = "--crop-size" if smallest > network_input else "--enlarge-to"
        raise UsageError(
            f"--network {config.network.network} takes images of {taken}, not {given}: set {option} {network_input}"
        )


def _check_layers(config: TrainConfig, layers: Sequence[str]) -> None:
    network = config.network.network
    for layer, _ in config.optimizer.layer_decays:
        if layer not in layers:
            raise UsageError(
                f"--layer-decays {shown(layer)}: the layers of --network {network} are {', '.join(layers)}"
            )
    for layer in config.optimizer.freeze:
        if layer not in (*layers, ALL_BUT_HEAD):
            raise UsageError(
                f"--freeze {shown(layer)}: the layers of --network {network} are {', '.join(layers)}; {ALL_BUT_HEAD} "
                "is short for all but the last"
            )
    frozen = frozen_layers(config.optimizer.freeze, layers)
    if len(frozen) == len(layers):
        raise UsageError("--freeze names every layer: there is nothing left to train")
    for layer, _ in config.optimizer.layer_decays:
        if layer in frozen:
            raise UsageError(f"--layer-decays {layer}: --freeze keeps this layer as it is")
    if "conv1" in frozen and (config.optimizer.conv1_slow_epoch, config.optimizer.conv1_stop_epoch) != (None, None):
        raise UsageError("--conv1-slow-epoch and --conv1-stop-epoch: --freeze keeps conv1 as it is")
    if config.run.parallelism == "hybrid" and "fc1" not in layers:
        raise UsageError(f"--parallelism hybrid: --network {network} has no hidden dense layers to split")


def frozen_layers(freeze: Sequence[str], layers: Sequence[str]) -> tuple[str, ...]:
    """The layers that --freeze names, in the network's order."""
    named = {*freeze, *layers[:-1]} if ALL_BUT_HEAD in freeze else set(freeze)
    return tuple(layer for layer in layers if layer in named)


def check_views(views: int, augmentation: AugmentationConfig, run: pathlib.Path) -> None:
    """Raises UsageError unless a run that was trained with `augmentation` can be evaluated on this many views."""
    if views > 2 and not (augmentation.crop_size or augmentation.crop_padding):
        raise UsageError(f"--views {views}: {run} was trained without crops; --views 2 adds the mirrored images")
