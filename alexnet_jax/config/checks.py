"""Every refused value and combination of settings."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import pydantic

from alexnet_jax.config.flags import flag, flags_of
from alexnet_jax.config.settings import AugmentationConfig, EvalConfig, NetworkConfig, RunConfig, TrainConfig
from alexnet_jax.config.types import _FLAGS, C
from alexnet_jax.errors import UsageError, shown


def validate(config: C) -> C:
    """Checks every value's type and range, and that settings go together.

    Raises:
      UsageError: naming the flag.
    """
    return _from_nested(type(config), dataclasses.asdict(config), _FLAGS)  # type: ignore[call-overload]


def _from_nested(config_type: type[C], nested: Mapping[str, Any], context: str | None = None) -> C:
    try:
        config = pydantic.TypeAdapter(config_type).validate_python(nested, context=context)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        known = flags_of(config_type)
        # The innermost name: the path may begin with the class's, and `optimizer` is a class and a flag in it.
        name = [flag(part) for part in first["loc"] if isinstance(part, str) and flag(part) in known][-1]
        value = shown(first["input"]) or "''"
        raise UsageError(f"{name} {value}: {first['msg'].lower()}") from None
    if isinstance(config, TrainConfig):
        _check_together(config)
    if isinstance(config, EvalConfig):
        _check_eval(config)
    return config


def _check_processes(run: RunConfig) -> None:
    given = {"--coordinator": run.coordinator, "--num-processes": run.num_processes, "--process-id": run.process_id}
    missing = [name for name, value in given.items() if value is None]
    if not run.distributed and len(missing) < 3:
        raise UsageError(f"{', '.join(name for name in given if name not in missing)}: only with --distributed")
    if run.distributed and 0 < len(missing) < 3:
        raise UsageError(f"{', '.join(missing)} is missing: give all three, or none where JAX finds out by itself")
    if run.coordinator is not None and not re.fullmatch(r"\[?[\w.:-]+\]?:[0-9]{1,5}", run.coordinator):
        raise UsageError(f"--coordinator {shown(run.coordinator)}: HOST:PORT is needed")
    if run.process_id is not None and run.num_processes is not None and run.process_id >= run.num_processes:
        raise UsageError(
            f"--process-id {run.process_id}: with --num-processes {run.num_processes} it is less than that"
        )


def _check_together(config: TrainConfig) -> None:
    _check_processes(config.run)
    optimizer = config.optimizer
    if optimizer.optimizer == "adam" and (optimizer.momentum or optimizer.weight_decay):
        raise UsageError("--momentum and --weight-decay are for --optimizer sgd and muon; set both to 0 for adam")
    if list(optimizer.drop_epochs) != sorted(set(optimizer.drop_epochs)):
        raise UsageError(f"--drop-epochs must rise: {shown(' '.join(map(str, optimizer.drop_epochs)))}")
    if optimizer.optimizer == "adam" and (optimizer.nesterov or optimizer.layer_decays):
        raise UsageError("--nesterov and --layer-decays are for --optimizer sgd and muon")
    layers = [layer for layer, _ in optimizer.layer_decays]
    if len(set(layers)) < len(layers):
        raise UsageError(f"--layer-decays names a layer twice: {' '.join(layers)}")
    if optimizer.rate_schedule == "cosine" and (optimizer.drop_epochs or optimizer.plateau_patience):
        raise UsageError("--rate-schedule cosine: --drop-epochs and --plateau-patience are for drops")
    if optimizer.warmup_epochs and optimizer.rate_schedule != "cosine":
        raise UsageError("--warmup-epochs is for --rate-schedule cosine")
    if optimizer.warmup_epochs >= config.schedule.epochs:
        raise UsageError(
            f"--warmup-epochs {optimizer.warmup_epochs:g}: --epochs {config.schedule.epochs} are needed after"
        )
    _check_network(config.network)
    if optimizer.plateau_patience and optimizer.drop_epochs:
        raise UsageError("--plateau-patience and --drop-epochs: choose one")
    if optimizer.plateau_patience and config.data.train_on == "all":
        raise UsageError("--plateau-patience needs validation images: --train-on train")
    if config.data.dataset == "imagenet" and config.data.train_on == "all":
        raise UsageError("--train-on all is for cifar10 and shapes")
    if config.augmentation.crop_size and config.augmentation.crop_padding:
        raise UsageError("--crop-size and --crop-padding: choose one")
    if config.schedule.accumulate > 1 and config.run.deterministic:
        raise UsageError("--accumulate: --deterministic works in parts of its own")
    if config.run.parallelism == "hybrid":
        _check_hybrid(config)


def _check_hybrid(config: TrainConfig) -> None:
    if config.run.deterministic:
        raise UsageError("--parallelism hybrid: --deterministic has all weights on each device")
    if config.optimizer.optimizer == "muon":
        raise UsageError("--parallelism hybrid: --optimizer muon needs each kernel in one piece")
    if config.network.network.startswith("convnet-"):
        raise UsageError(
            f"--parallelism hybrid: --network {config.network.network} has no hidden dense layers to split"
        )


def _check_network(network: NetworkConfig) -> None:
    """Each option of a network is for those that have it."""
    default = NetworkConfig()
    convnet = network.network.startswith("convnet-")
    if network.network == "small":
        return
    for name in ("initial_bias", "pool_window", "conv1_stride", "dropout_after"):
        if getattr(network, name) != getattr(default, name):
            raise UsageError(f"{flag(name)} is for --network small")
    if network.lrn == "divided" or (network.lrn == "none" and not convnet):
        raise UsageError(f"--lrn {network.lrn}: --network {network.network} has its own")
    if convnet and network.dropout_rate:
        raise UsageError(
            f"--dropout-rate {network.dropout_rate:g}: --network {network.network} has no dropout: set it to 0"
        )
    if network.activation != "relu" and not convnet:
        raise UsageError("--activation is for --network small and convnet-...")


def _check_eval(config: EvalConfig) -> None:
    if config.images == ():
        raise UsageError("--images needs image files, or folders of them")
    if config.images and (config.others or config.report or config.split or config.data_dir):
        raise UsageError("--images is for one run, without --report, --split and --data-dir")
    if config.others and config.report:
        raise UsageError("--report is for one run: leave it out to compare several")


def check_views(views: int, augmentation: AugmentationConfig, run: pathlib.Path) -> None:
    """Raises UsageError unless a run that was trained with `augmentation` can be evaluated on so many views."""
    if views == 10 and not (augmentation.crop_size or augmentation.crop_padding):
        raise UsageError(f"--views 10: {run} was trained without crops; --views 2 adds the mirrored images")
