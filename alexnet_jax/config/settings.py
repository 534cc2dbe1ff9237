"""All settings, as frozen dataclasses from which the flags and config.json are derived.

Field names are unique across the nested classes, because flags and config.json are flat: `optimizer.learning_rate` is
`--learning-rate` and "learning_rate". A setting's docstring is the help text of its flag, and its first paragraph is
what --help prints.
"""

import dataclasses
import pathlib
from typing import Annotated, Literal

import pydantic
import tyro

from alexnet_jax.config.types import (
    Bool,
    Checkpoint,
    FiniteFloat,
    Fraction,
    ImageSize,
    Mark,
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

    dataset: Literal["cifar10", "cifar100", "shapes", "folder", "imagenet"] = "cifar10"
    """Images to train on.

    `cifar10`: from --data-dir, else downloaded. `cifar100`: from --data-dir. `shapes`: drawn in memory, needs no files.
    `folder`: your own, with a folder of images for each class in --data-dir. `imagenet`: streamed from --data-dir,
    which `python -m alexnet_jax.data.prepare imagenet` has written."""
    data_dir: Annotated[Path | None, Mark.MAY_CHANGE, Mark.PER_PROCESS] = None
    """An archive of CIFAR-10, a folder with the archive or its batches, of your own images or of prepared ImageNet.

    For CIFAR-10: cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or a folder with one of them, with data_batch_1 and
    the other batches, or with a TFDS cifar10/3.0.2. Unset: ./data, then TFDS's own folder, then a download to the
    user's cache directory."""
    data_url: Annotated[WebAddress | None, Mark.MAY_CHANGE, Mark.PER_PROCESS, Mark.RARE] = None
    """Where to download CIFAR-10 from: a copy of one of the two published archives; its SHA-256 is checked. Unset: the
    environment variable ALEXNET_JAX_DATA_URL, then the authors' host, which is slow."""
    image_size: Annotated[ImageSize, Mark.RARE] = 32
    """For `folder`: side in pixels to which each image is scaled."""
    scaling: Annotated[Literal["square", "torchvision", "caffe"], Mark.RARE] = "square"
    """For `folder` and eval.py --images: how an image becomes square.

    `square`: its central square is scaled, bicubic. `torchvision`: the same, but bilinear, as in torchvision's
    transforms. `caffe`: it is stretched."""
    validation_share: Annotated[Fraction, Mark.RARE] = 0.2
    """For `folder`: share of the images that is held out for validation, by a hash of their names, where there are no
    folders for validation and testing."""
    train_on: Annotated[Literal["train", "all"], Mark.RARE] = "train"
    """`train`: CIFAR's first 40,000 images, and the last 10,000 validate. `all`: all 50,000, without validation."""
    loader_workers: Annotated[NonNegativeInt, Mark.MAY_CHANGE, Mark.PER_PROCESS, Mark.RARE] = 0
    """Processes that decode prepared images; 0: threads of this process."""


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of the training images, with new random draws in each epoch."""

    crop_padding: Annotated[int, pydantic.Field(ge=0, lt=32, strict=True)] = 0
    """Pixels of padding on each side before a random crop; 0: no crops."""
    crop_mode: Annotated[Literal["reflect", "zero"], Mark.RARE] = "reflect"
    """Content of the padding.

    `reflect`: the mirrored image; `zero`: 0 (after --subtract-mean: the mean)."""
    crop_size: PositiveInt | None = None
    """Side of the window cut out of larger images at random (in evaluation: the centre)."""
    flip: Bool = False
    """Mirror images left to right at random."""
    flip_schedule: Annotated[Literal["random", "alternating"], Mark.RARE] = "random"
    """When --flip mirrors an image: with probability 1/2, or in every second epoch, so that two epochs show it both
    ways."""
    cutout: Annotated[NonNegativeInt, Mark.RARE] = 0
    """Side of a square, at a random place in each image, that is filled with the mean; 0: none."""
    subtract_mean: Annotated[Bool, Mark.RARE] = False
    """Subtract the training set's mean image (the paper); otherwise the network's input is in [0, 1] (the original
    post)."""
    input_range: Annotated[Literal[1, 255], Mark.RARE] = 1
    """Range to which the grey levels are scaled: 0..1 (the original post) or 0..255 (the paper, the 2012 program)."""
    enlarge_to: Annotated[PositiveInt | None, Mark.RARE] = None
    """Side to which images are enlarged on the device, as the last step, for networks that need larger images."""
    pca: Literal["none", "per-image", "dataset-std", "dataset-eigenvalue"] = "none"
    """PCA colour noise.

    `per-image`: along each image's own axes (the original post). Along those of the training set, scaled by standard
    deviations (`dataset-std`, the 2012 program) or by eigenvalues (`dataset-eigenvalue`)."""
    pca_std: Annotated[NonNegativeFloat, Mark.RARE] = 0.1
    """Standard deviation of the colour noise's coefficients."""
    pca_off_epoch: Annotated[NonNegativeInt | None, Mark.RARE] = None
    """First epoch (from 0) without colour noise."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Which network is trained."""

    network: Literal[
        "small",
        "paper",
        "2012",
        "caffe",
        "caffenet",
        "one-column",
        "torchvision",
        "convnet-18pct",
        "convnet-11pct",
    ] = "small"
    """The network.

    `small`: the original post's, for 32x32 images. `convnet-...`: the authors' for CIFAR-10. The others are variants of
    the ImageNet network (docs/networks.md)."""
    activation: Annotated[Literal["relu", "tanh"], Mark.RARE] = "relu"
    """Activation function, for `small` and `convnet-...`.

    The paper compares the two (section 3.1)."""
    lrn: Annotated[Literal["own", "divided", "none"], Mark.RARE] = "own"
    """Local response normalization: the network's own (`small`: the paper's, alpha as printed). For `small`: `divided`,
    alpha divided by the window's size (2012). For `small` and `convnet-...`: `none`."""
    pool_window: Annotated[Literal[2, 3], Mark.RARE] = 3
    """Side of the max pooling windows in `small`, whose stride is 2: windows of 3 overlap (section 3.4), windows of 2
    do not."""
    conv1_stride: Annotated[Literal[1, 2], Mark.RARE] = 2
    """Stride of conv1 in `small`.

    With 1, fc1 has four times the weights."""
    dropout_rate: Fraction = 0.5
    """Probability of dropping an output of a hidden dense layer in training.

    0 for `convnet-...`, which have none."""
    dropout_after: Annotated[Literal["both", "fc1"], Mark.RARE] = "both"
    """Hidden dense layers of `small` that dropout follows.

    `fc1` is the mistake in the original post's program."""
    init_from: Path | None = None
    """Begin with the weights of a run, or of torchvision's or Caffe's AlexNet.

    A run's folder, cifar10-best, a .safetensors, .pth or .caffemodel. The last layer is drawn anew unless it has the
    same classes. The network, its input and the size of the images are those of the weights."""
    initial_bias: Annotated[FiniteFloat | None, Mark.RARE] = None
    """Initial value of every bias, for `small`. Unset: 1 (the original post). The other networks have their own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation.

    Parameters and loss are float32."""
    matmul_precision: Annotated[Literal["default", "highest"], Mark.RARE] = "default"
    """Precision of float32 convolutions and dense layers.

    `default` is TF32 on GPUs since Ampere: factors of 11 significant bits, relative errors of 1e-3. `highest` is
    float32 everywhere."""
    convolution: Annotated[Literal["auto", "direct", "products"], Mark.RARE] = "auto"
    """`direct` (XLA's), `products` (matrix products, faster on CPUs, rounding 1e-5), `auto`: products on a CPU."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """Update rule.

    `adam` (the original post); `sgd` with momentum and weight decay in the paper's form; `muon`: kernels by
    orthogonalized momentum, biases by Adam."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate at the start."""
    drop_epochs: tuple[PositiveInt, ...] = ()
    """Epochs after which the rate is multiplied by --drop-factor."""
    drop_factor: Annotated[PositiveFloat, Mark.RARE] = 0.1
    """Factor on the rate at each of --drop-epochs, or by --plateau-patience."""
    plateau_patience: Annotated[PositiveInt | None, Mark.RARE] = None
    """Number of epochs without a better validation accuracy after which the rate is multiplied by --drop-factor."""
    rate_schedule: Annotated[Literal["drops", "cosine"], Mark.RARE] = "drops"
    """`drops`: constant except for the drops above. `cosine`: falls to 0 at the end of the last epoch."""
    warmup_epochs: Annotated[NonNegativeFloat, Mark.RARE] = 0.0
    """Epochs in which the rate rises from 0, for `cosine`."""
    momentum: Fraction = 0.0
    """Momentum, for sgd and muon."""
    nesterov: Annotated[Bool, Mark.RARE] = False
    """Nesterov's momentum, for sgd and muon."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, for sgd (goes through the momentum) and muon (does not)."""
    decay_biases: Annotated[Bool, Mark.RARE] = True
    """Whether the weight decay applies to biases, too (the paper's text); it does not in the 2012 program."""
    layer_decays: Annotated[tuple[tuple[str, NonNegativeFloat], ...], Mark.RARE] = ()
    """Layers with another weight decay, and its value: `--layer-decays local3 0.004 logits 0.01`."""
    bias_rate: Annotated[PositiveFloat, Mark.RARE] = 1.0
    """Factor on the learning rate of biases; 2 in the 2012 program."""
    freeze: tuple[str, ...] = ()
    """Layers that keep their initial weights, or all-but-head.

    Where only the last layer is trained, without augmentation and dropout, its inputs are computed once."""
    conv1_slow_epoch: Annotated[NonNegativeInt | None, Mark.RARE] = None
    """First epoch (from 0) in which conv1 learns at a tenth of the rate."""
    conv1_stop_epoch: Annotated[NonNegativeInt | None, Mark.RARE] = None
    """First epoch (from 0) in which conv1's rate is 0."""
    label_smoothing: Annotated[Fraction, Mark.RARE] = 0.0
    """Share of a label that is spread evenly over all classes."""
    average_decay: Annotated[Fraction, Mark.RARE] = 0.0
    """Validate and test with a moving average of the weights; the value is the share of the old average in each
    update."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Number of epochs, batch size and seed."""

    epochs: Annotated[PositiveInt, Mark.MAY_CHANGE] = 50
    """Passes over the training images; may be increased when a run is resumed."""
    batch_size: PositiveInt = 128
    """Images per update, over all devices together."""
    accumulate: Annotated[PositiveInt, Mark.RARE] = 1
    """Parts into which each device divides its share of a batch, computed one after another: less memory, the same
    update."""
    seed: Seed = 0
    """Determines initial weights, order of the images and every random draw."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where the training runs, and what it writes."""

    # The rounding depends on num_devices, parallelism and steps_per_call: a run resumes bit for bit if all three stay.
    workdir: Annotated[Path | None, Mark.MAY_CHANGE, Mark.PER_PROCESS] = None
    """Folder of the run; a run that is already there is resumed. Unset: runs/PRESET.

    It receives the settings, metrics, checkpoints and plots."""
    num_devices: Annotated[PositiveInt | None, Mark.MAY_CHANGE] = None
    """Devices over which each batch is divided. Unset: all, or 1 on a CPU.

    A CPU can be split into any number. With --distributed: number of devices per process."""
    distributed: Annotated[Bool, Mark.MAY_CHANGE, Mark.RARE] = False
    """Train in several processes, on one machine or many, each with a share of every batch. Under Slurm, Open MPI and
    Cloud TPU, JAX discovers the processes itself; elsewhere set the next three flags."""
    coordinator: Annotated[str | None, Mark.MAY_CHANGE, Mark.PER_PROCESS, Mark.RARE] = None
    """HOST:PORT of the first process, the same in all."""
    num_processes: Annotated[PositiveInt | None, Mark.MAY_CHANGE, Mark.RARE] = None
    """Number of processes."""
    process_id: Annotated[NonNegativeInt | None, Mark.MAY_CHANGE, Mark.PER_PROCESS, Mark.RARE] = None
    """Number of this process, from 0."""
    peer_timeout: Annotated[PositiveInt, Mark.MAY_CHANGE, Mark.RARE] = 20
    """With --distributed: seconds of silence after which another process counts as lost, and this one exits."""
    steps_per_call: Annotated[PositiveInt | None, Mark.MAY_CHANGE, Mark.RARE] = None
    """Steps that the devices take in one call from the host. Unset: 25, or 1 on a CPU (where more is slower). A call
    ends where something is logged or validated; it is 1 step where images are streamed."""
    eval_batch_size: Annotated[PositiveInt, Mark.MAY_CHANGE, Mark.RARE] = 500
    """Images per step of validation; does not change the results."""
    log_every: Annotated[PositiveInt, Mark.MAY_CHANGE] = 100
    """Steps between lines of the log and of metrics.jsonl, counted from the beginning of each epoch."""
    eval_every: Annotated[NonNegativeInt, Mark.MAY_CHANGE, Mark.RARE] = 0
    """Steps between validations, counted from the beginning of each epoch; 0: only at its end."""
    checkpoint_every: Annotated[PositiveInt, Mark.MAY_CHANGE] = 5
    """Epochs between checkpoints; the last and the best are always kept."""
    tensorboard: Annotated[Bool, Mark.MAY_CHANGE, Mark.RARE] = False
    """Also write TensorBoard event files (needs the extra `tensorboard`)."""
    compilation_cache: Annotated[Bool, Mark.MAY_CHANGE, Mark.PER_PROCESS, Mark.RARE] = True
    """Keep compiled programs in the user's cache directory, so that the next start is faster."""
    deterministic: Annotated[Bool, Mark.RARE] = False
    """Compute the same bits on 1, 2, 4 and 8 devices of the same kind; slower. Needs a --batch-size divisible by 8."""
    parallelism: Annotated[Literal["data", "hybrid"], Mark.MAY_CHANGE, Mark.RARE] = "data"
    """`data`: all weights on each device, gradients are summed. `hybrid`: the same for convolutions, while each device
    has a part of the dense layers and activations are exchanged: less to transfer, unless batches are in the
    thousands."""
    stall_steps: Annotated[NonNegativeInt, Mark.MAY_CHANGE, Mark.RARE] = 1000
    """Steps after which a loss no better than guessing causes a warning that names the likely cause; 0: never."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run."""

    preset: tyro.conf.Suppress[Annotated[str, pydantic.Field(pattern=r"^[\w.-]{1,100}$"), Mark.MAY_CHANGE]] = "cifar10"
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

    With several runs, compare them on the same images. With --images, classify images of your own.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, train.py's --workdir, or cifar10-best, which comes with the package."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """More runs, each compared with the first on the same images.

    One table, curves, and McNemar's test for each."""
    images: tuple[Path, ...] | None = None
    """Classify these image files, or folders of them; eval/images.png shows the results.

    Prints the top 5 classes of each."""
    features: Path | None = None
    """Instead of classifying them, write a layer's outputs for --images to this .npz file."""
    layer: Annotated[str | None, Mark.RARE] = None
    """Layer, or operation after it, for --features: "fc2", "conv5 pool". Unset: the input of the last layer."""
    report: Bool = False
    """Also write eval/report.html, one page with curves, mistakes and kernels.

    It also has feature maps, calibration and settings, and needs no network connection. For splits other than test, the
    file is report-SPLIT.html."""
    split: Literal["test", "validation", "train"] | None = None
    """Images to evaluate on.

    Unset: test, or validation where the data set has no test images."""
    checkpoint: Checkpoint = "last"
    """`last`, `best` (highest validation accuracy) or a step."""
    data_dir: Path | None = None
    """Where the data is now, if it has moved since the training."""
    batch_size: Annotated[PositiveInt, Mark.RARE] = 500
    """Images per step; does not change the results."""
    out: Path | None = None
    """Folder for results and plots. Unset: RUN/eval; for cifar10-best, none."""
    views: Literal[1, 2, 6, 10] = 1
    """Number of views of each image over which the probabilities are averaged.

    1: the centre. 2: also mirrored. 6: centre and two shifts by a pixel, each also mirrored. 10: corners and centre,
    each also mirrored."""
    num_devices: Annotated[PositiveInt | None, Mark.RARE] = None
    """Devices to use; does not change the results."""
    compilation_cache: Annotated[Bool, Mark.RARE] = True
    """Keep compiled programs in the user's cache directory, so that the next start is faster."""
