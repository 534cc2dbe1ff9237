"""Configuration: frozen dataclasses that generate the command line, their validation, the presets, JSON.

Field names are unique across the nested classes, because flags and config.json are flat: `optimizer.learning_rate` is
`--learning-rate` and "learning_rate".
"""

import dataclasses
import pathlib
from typing import Annotated, Literal

import pydantic
import tyro

from alexnet_jax.config.types import (
    Bool,
    FiniteFloat,
    Fraction,
    LayerName,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Seed,
    WebAddress,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    dataset: Literal["cifar10", "shapes", "imagenet"] = "cifar10"
    """`cifar10`: from --data-dir, else downloaded. `shapes`: drawn on the spot, needs nothing. `imagenet`: streamed
    from --data-dir, which `python -m alexnet_jax.data.prepare imagenet` has made."""
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
