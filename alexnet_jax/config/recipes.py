"""The presets."""

import dataclasses
import types
from collections.abc import Mapping

from alexnet_jax.config.settings import (
    AugmentationConfig,
    DataConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


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
