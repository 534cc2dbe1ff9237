"""Configuration: frozen dataclasses that generate the command line, their validation, the presets, JSON.

Field names are unique across the nested classes, because flags and config.json are flat: `optimizer.learning_rate` is
`--learning-rate` and "learning_rate".
"""

import dataclasses
import os
import pathlib
import re
import reprlib
import types
import unicodedata
import urllib.parse
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
import tyro

from alexnet_jax.errors import UsageError

C = TypeVar("C")


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with the home directory in place of a leading `~` or `~user`.

    Raises:
      UsageError: that is not known.
    """
    try:
        return pathlib.Path(path).expanduser()
    except (RuntimeError, KeyError, ValueError):
        user = pathlib.Path(path).parts[0][1:]
        what = f"there is no user {user!r}" if user else "this user has no home directory"
        raise UsageError(f"{shown(path)}: {what}: give the full path") from None


def _not_empty(path: object) -> object:
    if path == "":
        raise pydantic_core.PydanticCustomError("empty_path", "the path is empty: give one, or leave the flag out")
    return path


def _usable(path: pathlib.Path, info: pydantic.ValidationInfo) -> pathlib.Path:
    if not is_one_line(str(path)):
        raise ValueError("a path without control characters is needed")
    try:
        return expanded(path) if info.context == _FLAGS else path  # what config.json holds was expanded before
    except UsageError as error:
        raise pydantic_core.PydanticCustomError("home", str(error).split(": ", 1)[1]) from None


def web_address(url: str) -> str:
    """The address of a file on the web, as it is given.

    Raises:
      ValueError: it is none.
    """
    parts = urllib.parse.urlsplit(url)  # ValueError for half an IPv6 address
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("an address that begins with http:// or https:// is needed")
    if not url.isascii():
        raise ValueError("a percent-encoded address, with the host name in its xn-- form, is needed")
    if parts.username is not None:
        raise ValueError("an address without user name and password is needed")
    return url


# Strict, as config.json would otherwise be read with "3" and true for numbers. Steps are counted in 32 bits, and JAX
# drops the bits of a seed beyond 32.
_INT_END = 2**31
PositiveInt = Annotated[int, pydantic.Field(gt=0, lt=_INT_END, strict=True)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0, lt=_INT_END, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32, strict=True)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False, strict=True)]
FiniteFloat = Annotated[float, pydantic.Field(allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1, strict=True)]
Bool = Annotated[bool, pydantic.Field(strict=True)]
LayerName = Literal[
    "conv1", "conv2", "conv3", "conv4", "conv5", "local3", "local4", "fc1", "fc2", "logits"
]  # fmt: skip
Path = Annotated[
    pathlib.Path,
    pydantic.BeforeValidator(_not_empty),
    pydantic.AfterValidator(_usable),
    # From the command line as text until it is validated: pathlib.Path("") would be the working directory.
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: args[0],
        is_instance=lambda value: isinstance(value, str | pathlib.Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
WebAddress = Annotated[str, pydantic.AfterValidator(web_address)]
_FLAGS = "flags"  # the context of a validation


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    dataset: Literal["cifar10", "shapes", "imagenet"] = "cifar10"
    """`cifar10`: from --data-dir, else downloaded. `shapes`: drawn on the spot, needs nothing. `imagenet`: streamed
    from --data-dir, which `python -m alexnet_jax.prepare imagenet` has made."""
    data_dir: Path | None = None
    """CIFAR-10 as you have it: cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or a folder with one of them, with
    data_batch_1 and the other batches, or with a TFDS cifar10/3.0.2. Unset: ./data, then TFDS's own, then a download to
    the user's cache directory."""
    data_url: WebAddress | None = None
    """Where to download CIFAR-10 from: a copy of one of the two published archives, which is checked. Unset: the
    environment variable ALEXNET_JAX_DATA_URL, then the authors' host, which is slow."""
    train_on: Literal["train", "all"] = "train"
    """CIFAR-10: `train`: 40,000 images (batches 1-4), batch 5 validates; `all`: 50,000, and nothing validates."""
    loader_workers: NonNegativeInt = 0
    """Processes that decode the images of `imagenet`; 0: threads of this one."""


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """What is done to training images, anew at each visit."""

    crop_padding: Annotated[int, pydantic.Field(ge=0, lt=32, strict=True)] = 0
    """Pixels to pad on each side before a random crop back to the image's size; 0: no crops."""
    crop_mode: Literal["reflect", "zero"] = "reflect"
    """What the padding holds: the mirrored image, or 0 (after --subtract-mean: the mean)."""
    crop_size: PositiveInt | None = None
    """Side of the window cut out of larger images: at random in training, the centre in testing (224 in the paper)."""
    flip: Bool = False
    """Mirror images left to right at random."""
    subtract_mean: Bool = False
    """Subtract the training set's mean image (the paper); else the network's input is in [0, 1] (the seed)."""
    input_range: Literal[1, 255] = 1
    """What grey levels are scaled to: 0..1 (the seed) or 0..255 (the paper and the 2012 program)."""
    enlarge_to: PositiveInt | None = None
    """Side to which images are enlarged on the device, last of all, for networks that need larger ones."""
    pca: Literal["none", "per-image", "dataset-std", "dataset-eigenvalue"] = "none"
    """PCA colour noise: an image's own (the seed), the training set's by standard deviations (2012) or eigenvalues."""
    pca_std: NonNegativeFloat = 0.1
    """Standard deviation of the noise's coefficients."""
    pca_off_epoch: NonNegativeInt | None = None
    """First epoch (from 0) without colour noise."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network."""

    network: Literal[
        "small", "paper", "2012", "caffe", "one-column", "torchvision", "convnet-18pct", "convnet-11pct"
    ] = "small"
    """`small`: the seed's, for 32x32 images. `convnet-...`: the authors' for CIFAR-10. The others are variants of the
    ImageNet network (docs/networks.md)."""
    activation: Literal["relu", "tanh"] = "relu"
    """After each hidden layer, for `small` and `convnet-...`; the paper compares the two (section 3.1)."""
    lrn: Literal["own", "divided", "none"] = "own"
    """Local response normalization: the network's own (`small`: the paper's, alpha as printed). For `small`: `divided`,
    alpha by the window's size (2012). For `small` and `convnet-...`: `none`."""
    pool_window: Literal[2, 3] = 3
    """Side of the windows of max pooling in `small`, which lie 2 apart: 3 overlap (section 3.4), 2 do not."""
    conv1_stride: Literal[1, 2] = 2
    """Distance between the windows of conv1 in `small`; with 1 fc1 grows fourfold."""
    dropout_rate: Fraction = 0.5
    """Probability that an output of the two hidden dense layers is dropped in training; 0 for `convnet-...`, which have
    none."""
    dropout_after: Literal["both", "fc1"] = "both"
    """Hidden dense layers of `small` that dropout follows; `fc1` is the mistake in the seed's program."""
    initial_bias: FiniteFloat | None = None
    """Start value of every bias, for `small`. Unset: 1 (the seed). The others have their own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters and loss are float32."""
    convolution: Literal["auto", "direct", "products"] = "auto"
    """`direct` (XLA's), `products` (matrix products, faster on CPUs, rounding 1e-5), `auto`: products on a CPU."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """`adam` (the seed); `sgd` with momentum and weight decay in the paper's form; `muon`: kernels by orthogonalized
    momentum, biases by Adam."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate at the start."""
    drop_epochs: tuple[PositiveInt, ...] = ()
    """Epochs after which the rate is multiplied by --drop-factor."""
    drop_factor: PositiveFloat = 0.1
    """Factor on the rate at each of --drop-epochs, or by --plateau-patience."""
    plateau_patience: PositiveInt | None = None
    """Epochs without a better validation accuracy after which the rate is multiplied by --drop-factor."""
    rate_schedule: Literal["drops", "cosine"] = "drops"
    """`drops`: constant, but for the drops above. `cosine`: falls to 0 at the last epoch's end."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs in which the rate rises from 0, for `cosine`."""
    momentum: Fraction = 0.0
    """For sgd and muon."""
    nesterov: Bool = False
    """Nesterov's momentum, for sgd and muon."""
    weight_decay: NonNegativeFloat = 0.0
    """For sgd (goes through the momentum) and muon (does not)."""
    decay_biases: Bool = True
    """Whether the weight decay applies to biases, too (the paper's text); the 2012 program spares them."""
    layer_decays: tuple[tuple[LayerName, NonNegativeFloat], ...] = ()
    """Other weight decays for some layers: `--layer-decays local3 0.004 logits 0.01`."""
    bias_rate: PositiveFloat = 1.0
    """Factor on the learning rate of biases; 2 in the 2012 program."""
    conv1_slow_epoch: NonNegativeInt | None = None
    """First epoch (from 0) in which conv1 learns at a tenth of the rate."""
    conv1_stop_epoch: NonNegativeInt | None = None
    """First epoch (from 0) in which conv1's rate is 0."""
    label_smoothing: Fraction = 0.0
    """Share of a label that is spread evenly over all classes."""
    average_decay: Fraction = 0.0
    """Validate and test with a moving average of the weights: of each update, this share of the old average stays."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How long, in what portions, from which seed."""

    epochs: PositiveInt = 50
    """Passes over the training images. May grow when a run is resumed."""
    batch_size: PositiveInt = 128
    """Images an update, over all devices together."""
    accumulate: PositiveInt = 1
    """Parts in which each device works off its share of a batch, one after another: less memory, the same update."""
    seed: Seed = 0
    """Decides the initial weights, the order of the images and every random draw."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where it runs, and what it writes."""

    workdir: Path | None = None
    """Folder of the run: config, metrics, checkpoints, pictures. Unset: runs/PRESET. Resumes if a run is there."""
    num_devices: PositiveInt | None = None
    """Devices to spread each batch over; with --distributed those of each process. Unset: all; on a CPU any number can
    be had, one is the default."""
    distributed: Bool = False
    """Train in several processes, on one machine or many, each with a share of every batch. Who they are JAX finds out
    under Slurm, Open MPI and on Cloud TPU; elsewhere the next three flags say it."""
    coordinator: str | None = None
    """HOST:PORT of the first process, the same in all."""
    num_processes: PositiveInt | None = None
    """How many processes there are."""
    process_id: NonNegativeInt | None = None
    """Which of them this is, from 0."""
    peer_timeout: PositiveInt = 20
    """With --distributed: seconds without a word from another process after which this one leaves."""
    steps_per_call: PositiveInt | None = None
    """Steps that the devices take before the host hears of them. Unset: 25, on a CPU 1 (more is slower there).
    Never more than --log-every or --eval-every; 1 where images are streamed."""
    eval_batch_size: PositiveInt = 500
    """Images a step of evaluation."""
    log_every: PositiveInt = 100
    """Steps between lines of the log and of metrics.jsonl."""
    eval_every: NonNegativeInt = 0
    """Steps between validations within an epoch; 0: only at each epoch's end."""
    checkpoint_every: PositiveInt = 5
    """Epochs between checkpoints; the last and the best on validation are kept besides."""
    tensorboard: Bool = False
    """Write TensorBoard event files too (needs the extra `tensorboard`)."""
    compilation_cache: Bool = True
    """Keep compiled programs in the user's cache directory, so that the next start is faster."""
    deterministic: Bool = False
    """Compute the same bits on 1, 2, 4 and 8 devices of a kind; slower. Needs a --batch-size divisible by 8."""
    parallelism: Literal["data", "hybrid"] = "data"
    """`data`: all weights on each device, gradients are added up. `hybrid`: so for the convolutions, while each device
    has a part of the dense layers and activations are exchanged: less to move, unless batches are in the thousands."""
    stall_steps: NonNegativeInt = 1000
    """Steps after which a loss that is still that of guessing gets a warning with its likely causes; 0: never."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run."""

    preset: tyro.conf.Suppress[Annotated[str, pydantic.Field(pattern=r"^[\w.-]{1,100}$")]] = "cifar10"
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()

    @property
    def workdir(self) -> pathlib.Path:
        """The run's folder, `runs/PRESET` unless set."""
        return self.run.workdir or pathlib.Path("runs") / self.preset


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate a trained network: accuracy, cross entropy, confusion matrix, first-layer kernels.

    With several runs, compare them on the same images. With --images, classify pictures of your own.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """More runs, each to be compared with the first on the same images: one table, curves, McNemar's test."""
    images: tuple[Path, ...] | None = None
    """Pictures, or folders of them, to classify: the top 5 of each, and a sheet in the run's eval/images.png."""
    report: Bool = False
    """Also write eval/report.html (report-SPLIT.html of other images than test): one page with curves, the images
    behind the confusion matrix, kernels, feature maps, calibration and settings, which needs no network."""
    split: Literal["test", "validation", "train"] | None = None
    """Images to evaluate on. Unset: test, or validation where the data set has no test images."""
    checkpoint: str = "last"
    """`last`, `best` (highest validation accuracy) or a step."""
    data_dir: Path | None = None
    """Where the data is, if no longer where the run found it."""
    batch_size: PositiveInt = 500
    """Images a step; does not change the results."""
    out: Path | None = None
    """Folder for results and pictures. Unset: RUN/eval."""
    views: Literal[1, 2, 10] = 1
    """Views of each image whose probabilities are averaged: centre; and mirrored; corners and centre, each mirrored."""
    num_devices: PositiveInt | None = None
    """Devices to use; does not change the results."""
    compilation_cache: Bool = True
    """Keep compiled programs in the user's cache directory, so that the next start is faster."""


# Settings that may differ when a run is resumed: they change no draw and no batch. (Devices, parallelism and steps in a
# call change the rounding: a run goes on bit for bit with the same of all three.)
RESUMABLE = frozenset(
    {
        "preset", "data_dir", "data_url", "epochs", "workdir", "num_devices", "steps_per_call", "eval_batch_size",
        "log_every", "eval_every", "checkpoint_every", "tensorboard", "compilation_cache",
        "stall_steps", "loader_workers", "distributed", "coordinator", "num_processes", "process_id",
        "peer_timeout", "parallelism",
    }
)  # fmt: skip

# Settings in which the processes of one training may differ.
OWN = frozenset({"data_dir", "data_url", "workdir", "coordinator", "process_id", "loader_workers", "compilation_cache"})

# Settings that runs of the first version don't have. Their defaults are what it did.
ADDED = frozenset(
    {
        "activation", "lrn", "pool_window", "conv1_stride", "dropout_after", "rate_schedule", "warmup_epochs",
        "nesterov", "layer_decays", "label_smoothing", "average_decay", "distributed", "coordinator", "num_processes",
        "process_id", "peer_timeout", "parallelism", "data_url",
    }
)  # fmt: skip


def is_one_line(text: str) -> bool:
    """Whether a text can stand in a line of output: no control characters, no halves of UTF-16 pairs."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def shown(value: object, limit: int = 100) -> str:
    """A value as part of a message of one line: cut in the middle, with escapes for what can't be printed."""
    text = str(value) if isinstance(value, str | int | float | pathlib.Path) else reprlib.repr(value)
    text = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def flat_items(config: Any) -> dict[str, Any]:
    """All settings of a (nested) configuration by their flat names."""
    items: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items |= flat_items(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return items


def flag(name: str) -> str:
    """The flag of a setting: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def flags_of(config_type: Any) -> list[str]:
    """Every flag that a (nested) configuration class generates."""
    flags = []
    for field in dataclasses.fields(config_type):
        flags += flags_of(field.type) if dataclasses.is_dataclass(field.type) else [flag(field.name)]
    return flags


def validate(config: C) -> C:
    """Checks every value's type and range, and that settings go together.

    Raises:
      UsageError: naming the flag.
    """
    return _from_nested(type(config), dataclasses.asdict(config), _FLAGS)  # type: ignore[call-overload]


def to_json(config: TrainConfig) -> dict[str, Any]:
    """All settings as a flat, JSON-ready dict."""
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flat_items(config).items()
    }


def from_json(settings: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Keys that this version doesn't know are refused; `ADDED` ones may be missing.

    Raises:
      UsageError: naming the setting that is missing, unknown or has an impossible value.
    """
    nested: dict[str, Any] = {}
    known = set()
    for field in dataclasses.fields(TrainConfig):
        names = [f.name for f in dataclasses.fields(field.type)] if isinstance(field.type, type) else None
        known |= set(names or [field.name])
        if missing := [name for name in names or [field.name] if name not in {*settings, *ADDED}]:
            raise UsageError(f"setting {missing[0]!r} is missing")
        given = {name: settings[name] for name in names or [field.name] if name in settings}
        nested |= {field.name: given} if names else given
    if unknown := sorted(set(settings) - known):
        raise UsageError(f"unknown setting '{shown(unknown[0])}'")
    return _from_nested(TrainConfig, nested)


def differing_settings(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Names of the settings that forbid `new` to go on with a run of `old`."""
    new_items = flat_items(new)
    # A schedule to the last epoch's end hangs on where that is.
    may_differ = RESUMABLE - {"epochs"} if old.optimizer.rate_schedule == "cosine" else RESUMABLE
    return [n for n, value in flat_items(old).items() if n not in may_differ and new_items[n] != value]


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
    return config


def layers_of(network: str) -> tuple[str, ...]:
    """Names of a network's layers, in order."""
    match network:
        case "convnet-18pct":
            return ("conv1", "conv2", "conv3", "logits")
        case "convnet-11pct":
            return ("conv1", "conv2", "local3", "local4", "logits")
        case _:
            return ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "logits")


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
    own = layers_of(config.network.network)
    if others := [layer for layer in layers if layer not in own]:
        raise UsageError(
            f"--layer-decays {others[0]}: the layers of --network {config.network.network} are {', '.join(own)}"
        )
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


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
      summary: what it is, in a line.
      measured: test accuracy and cost, with data, hardware and number of seeds; raw results are in results/.
    """

    summary: str
    measured: str
    config: TrainConfig


_COPY = "CIFAR-10 (JPEG-coded copy)"
_NOT_TO_THE_END = "not trained to the end: that takes a GPU"
_BEGUN = "not trained to the end; its first epochs are in docs/results.md"
_EPOCH = "22 s of training an epoch on 2 cores"

PRESETS: Mapping[str, Preset] = types.MappingProxyType(
    {
        "cifar10": Preset(
            "the seed's program on CIFAR-10",
            f"{_COPY}: 64.20% and 65.80% after 14 epochs (2 seeds), 64.57% after 50 (1 seed); {_EPOCH}",
            TrainConfig(augmentation=AugmentationConfig(pca="per-image")),
        ),
        "cifar10-paper": Preset(
            "the seed's network, trained as the paper trains: SGD, crops, flips, PCA noise, mean image",
            f"{_COPY}: 77.92% after 30 epochs (1 seed); {_EPOCH}",
            TrainConfig(
                preset="cifar10-paper",
                augmentation=AugmentationConfig(
                    crop_padding=4, flip=True, subtract_mean=True, pca="dataset-std", pca_off_epoch=20
                ),
                # At this rate the seed's biases of 1 drive the loss to ln(10) within 100 updates, and it stays there.
                network=NetworkConfig(initial_bias=0.0),
                optimizer=OptimizerConfig(
                    optimizer="sgd", learning_rate=0.01, drop_epochs=(20, 26), momentum=0.9, weight_decay=5e-4
                ),
                schedule=ScheduleConfig(epochs=30),
            ),
        ),
        "cifar10-best": Preset(
            "the seed's network as accurate as 12 epochs make it: Muon, cosine, label smoothing, averaged weights",
            f"{_COPY}: 80.06%, with --views 2 81.78% (means of 3 seeds); 80 s an epoch on one core",
            TrainConfig(
                preset="cifar10-best",
                data=DataConfig(train_on="all"),
                augmentation=AugmentationConfig(crop_padding=4, flip=True, subtract_mean=True),
                network=NetworkConfig(initial_bias=0.0, dropout_rate=0.0),
                optimizer=OptimizerConfig(
                    optimizer="muon",
                    learning_rate=0.01,
                    rate_schedule="cosine",
                    warmup_epochs=0.5,
                    momentum=0.9,
                    nesterov=True,
                    weight_decay=0.1,
                    label_smoothing=0.1,
                    average_decay=0.99,
                ),
                schedule=ScheduleConfig(epochs=12, batch_size=500),
            ),
        ),
        "cifar10-18pct": Preset(
            "the authors' four-layer network of cuda-convnet, 18% test error without augmentation",
            _BEGUN,
            TrainConfig(
                preset="cifar10-18pct",
                data=DataConfig(train_on="all"),
                augmentation=AugmentationConfig(subtract_mean=True, input_range=255),
                network=NetworkConfig(network="convnet-18pct", dropout_rate=0.0),
                optimizer=OptimizerConfig(
                    optimizer="sgd",
                    drop_epochs=(120, 130),
                    momentum=0.9,
                    weight_decay=0.004,
                    decay_biases=False,
                    layer_decays=(("logits", 1.0),),
                    bias_rate=2.0,
                ),
                schedule=ScheduleConfig(epochs=140),
            ),
        ),
        "cifar10-11pct": Preset(
            "the authors' network with locally connected layers, 11% test error (10 views) after 520 epochs",
            _BEGUN,
            TrainConfig(
                preset="cifar10-11pct",
                data=DataConfig(train_on="all"),
                augmentation=AugmentationConfig(crop_size=24, flip=True, subtract_mean=True, input_range=255),
                network=NetworkConfig(network="convnet-11pct", dropout_rate=0.0),
                optimizer=OptimizerConfig(
                    optimizer="sgd",
                    drop_epochs=(500, 510),
                    momentum=0.9,
                    decay_biases=False,
                    layer_decays=(("local3", 0.004), ("local4", 0.004), ("logits", 0.01)),
                    bias_rate=2.0,
                ),
                schedule=ScheduleConfig(epochs=520),
            ),
        ),
        "cifar10-full": Preset(
            "the paper's ImageNet network on CIFAR-10, images enlarged to 227x227 on the device",
            _NOT_TO_THE_END,
            TrainConfig(
                preset="cifar10-full",
                augmentation=AugmentationConfig(
                    crop_padding=4, flip=True, subtract_mean=True, input_range=255, enlarge_to=227, pca="dataset-std"
                ),
                network=NetworkConfig(network="paper"),
                optimizer=OptimizerConfig(
                    optimizer="sgd", learning_rate=0.01, drop_epochs=(20, 26), momentum=0.9, weight_decay=5e-4
                ),
                schedule=ScheduleConfig(epochs=30),
            ),
        ),
        "imagenet-paper": Preset(
            "the paper's network and recipe on ImageNet; the rate falls when validation stalls",
            _NOT_TO_THE_END,
            TrainConfig(
                preset="imagenet-paper",
                data=DataConfig(dataset="imagenet"),
                augmentation=AugmentationConfig(
                    crop_size=227, flip=True, subtract_mean=True, input_range=255, pca="dataset-std"
                ),
                network=NetworkConfig(network="paper"),
                optimizer=OptimizerConfig(
                    optimizer="sgd", learning_rate=0.01, plateau_patience=5, momentum=0.9, weight_decay=5e-4
                ),
                schedule=ScheduleConfig(epochs=90),
                run=RunConfig(checkpoint_every=1),
            ),
        ),
        "imagenet-2012": Preset(
            "the program that was run in 2012 (run 145) on ImageNet: its network, rates and epochs",
            _NOT_TO_THE_END,
            TrainConfig(
                preset="imagenet-2012",
                data=DataConfig(dataset="imagenet"),
                augmentation=AugmentationConfig(
                    crop_size=224, flip=True, subtract_mean=True, input_range=255, pca="dataset-std", pca_off_epoch=67
                ),
                network=NetworkConfig(network="2012"),
                optimizer=OptimizerConfig(
                    optimizer="sgd",
                    learning_rate=0.01,
                    drop_epochs=(25, 51, 79),
                    momentum=0.9,
                    weight_decay=5e-4,
                    decay_biases=False,
                    bias_rate=2.0,
                    conv1_slow_epoch=67,
                    conv1_stop_epoch=72,
                ),
                schedule=ScheduleConfig(epochs=91),
                run=RunConfig(checkpoint_every=1),
            ),
        ),
        "quickstart": Preset(
            "the seed's network on drawn shapes, no data needed",
            "98.30% (1 seed); under a minute on 2 cores",
            TrainConfig(
                preset="quickstart",
                data=DataConfig(dataset="shapes"),
                augmentation=AugmentationConfig(flip=True),
                network=NetworkConfig(initial_bias=0.0),
                optimizer=OptimizerConfig(drop_epochs=(3,)),
                schedule=ScheduleConfig(epochs=4, batch_size=64),
            ),
        ),
    }
)
DEFAULT_PRESET = "cifar10"
