"""The studies: each trains one preset with one thing changed at a time."""

import dataclasses
import types
from collections.abc import Mapping

Flags = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes:
      name: name of the row in tables.
      flags: flags of train.py, added after the study's own.
    """

    name: str
    flags: Flags = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """Training runs that are compared with one another.

    Attributes:
      question: the question that the study answers.
      preset: preset of train.py.
      flags: flags of train.py for every row; they make the study feasible on two CPU cores.
      variants: the rows; the first is what the others are compared with.
      views: numbers of views to test with.
      until: which accuracy of an epoch counts, "accuracy" (training) or "validation_accuracy", and the values whose
        first epoch the table reports.
      curves: the accuracy whose error the plot shows epoch by epoch; None: it shows differences of rows.
      published: results that others have published.
    """

    question: str
    preset: str
    flags: Flags
    variants: tuple[Variant, ...]
    views: tuple[int, ...] = (1,)
    until: tuple[str, tuple[float, ...]] | None = None
    curves: str | None = None
    published: str = ""


# The paper's schedule takes 30 epochs. Muon gets further in fewer: 71% on the validation images after three, where SGD
# with Nesterov's momentum had 68% after six.
MUON = (
    *("--optimizer", "muon", "--momentum", "0.9", "--nesterov", "--weight-decay", "0.1"),
    *("--rate-schedule", "cosine", "--warmup-epochs", "0.5", "--drop-epochs", "--pca-off-epoch", "None"),
    *("--epochs", "20", "--batch-size", "500"),
)
SHORT = (*MUON, "--learning-rate", "0.01")

# Without weight decay (the paper: "no regularization") and at a constant rate.
FIGURE_1 = ("--drop-epochs", "--weight-decay", "0.0", "--layer-decays", "--train-on", "train")

# What differs most between the epochs in which an image is seen.
REGULARIZED = ("--flip-schedule", "alternating", "--cutout", "8")

# cifar10-best before the study `search`: what short studies, and those that led to it, begin with.
LITTLE_REGULARIZATION = ("--weight-decay", "0.1", "--flip-schedule", "random", "--cutout", "0")
BEFORE_SEARCH = ("--average-decay", "0.99", *LITTLE_REGULARIZATION)

# The best of the study `search`, from which `longer` goes on.
WITH_WEIGHT_DECAY = ("--average-decay", "0.998", "--weight-decay", "0.8")

STUDIES: Mapping[str, Study] = types.MappingProxyType(
    {
        "tips": Study(
            "Which of the paper's techniques help on CIFAR-10?",
            "cifar10-paper",
            SHORT,
            (
                Variant("all techniques"),
                Variant("tanh for ReLU", ("--activation", "tanh")),
                Variant("no LRN", ("--lrn", "none")),
                Variant("pooling 2/2, not overlapping", ("--pool-window", "2")),
                Variant("no dropout", ("--dropout-rate", "0.0")),
                Variant("no crops", ("--crop-padding", "0")),
                Variant("no flips", ("--no-flip",)),
                Variant("no colour noise", ("--pca", "none")),
                Variant("biases begin at 1", ("--initial-bias", "1.0")),
                Variant("LRN's alpha divided by 5", ("--lrn", "divided")),
                Variant("dropout after fc1 only, as the original post's code", ("--dropout-after", "fc1")),
                Variant("colour noise of each image's own", ("--pca", "per-image")),
                Variant("colour noise by eigenvalues", ("--pca", "dataset-eigenvalue")),
            ),
        ),
        "relu": Study(
            "How much sooner do ReLUs reach 25% training error than tanh (paper, figure 1)?",
            "cifar10-18pct",
            (*FIGURE_1, "--epochs", "40"),
            (
                Variant("ReLU"),
                Variant("tanh", ("--activation", "tanh")),
                Variant("ReLU, rate 0.003", ("--learning-rate", "0.003")),  # the best of `rates`
                Variant("tanh, rate 0.003", ("--activation", "tanh", "--learning-rate", "0.003")),
            ),
            until=("accuracy", (0.40, 0.50, 0.60, 0.75)),
            curves="accuracy",
            published="tanh takes six times as many epochs to reach 75% (paper, figure 1)",
        ),
        "rates": Study(
            "At which rate does each activation learn fastest?",
            "cifar10-18pct",
            (*FIGURE_1, "--epochs", "5"),
            tuple(
                Variant(f"{name}, rate {rate}", (*flags, "--learning-rate", rate))
                for name, flags in (("ReLU", ()), ("tanh", ("--activation", "tanh")))
                for rate in ("0.001", "0.0003", "0.003")
            ),
            curves="accuracy",
        ),
        "lrn": Study(
            "What does LRN do where it normalizes, on grey levels 0..255?",
            "cifar10-paper",
            (*MUON, "--input-range", "255", "--learning-rate", "0.001"),  # at 0.01 it does not learn
            (Variant("with LRN"), Variant("without", ("--lrn", "none"))),
            curves="validation_accuracy",
        ),
        "post": Study("How accurate is the original post's program?", "cifar10", (), (Variant("cifar10"),)),
        "normalization": Study(
            "What does LRN do for the authors' network of section 3.3?",
            "cifar10-11pct",
            ("--epochs", "2", "--drop-epochs"),
            (Variant("with LRN"), Variant("without", ("--lrn", "none"))),
            views=(1, 10),
            published="test errors of 11% with LRN and 13% without (paper, section 3.3)",
        ),
        "time": Study(
            "How long does it take to reach an accuracy?",
            "cifar10-best",
            (*BEFORE_SEARCH, "--train-on", "train"),
            (Variant("2 epochs", ("--epochs", "2")), Variant("8 epochs", ("--epochs", "8"))),
            until=("validation_accuracy", (0.6436, 0.80, 0.85)),
            curves="validation_accuracy",
        ),
        "options": Study(
            "What does each option add to the recipe before the search?",
            "cifar10-best",
            (*BEFORE_SEARCH, "--train-on", "train", "--epochs", "8"),
            (
                Variant("before the search"),
                Variant("alternating flips", ("--flip-schedule", "alternating")),
                Variant("cutout of 8 pixels", ("--cutout", "8")),
                Variant("pooling 2/2, not overlapping", ("--pool-window", "2")),
                Variant("dropout 0.2", ("--dropout-rate", "0.2")),
            ),
            views=(1, 2, 6, 10),
            curves="validation_accuracy",
        ),
        "search": Study(
            "Which regularization does cifar10-best need in 24 epochs?",
            "cifar10-best",
            (*LITTLE_REGULARIZATION, "--average-decay", "0.998", "--train-on", "train", "--epochs", "24"),
            (
                Variant("before the search, average 0.998"),
                Variant("+ flips, cutout", REGULARIZED),
                Variant("+ flips, cutout, dropout 0.2", (*REGULARIZED, "--dropout-rate", "0.2")),
                Variant("+ flips, cutout, dropout 0.5", (*REGULARIZED, "--dropout-rate", "0.5")),
                Variant(
                    "+ flips, cutout, dropout 0.2, weight decay 0.2",
                    (*REGULARIZED, "--dropout-rate", "0.2", "--weight-decay", "0.2"),
                ),
                Variant("+ flips, cutout, weight decay 0.2", (*REGULARIZED, "--weight-decay", "0.2")),
                Variant("+ flips, cutout, weight decay 0.4", (*REGULARIZED, "--weight-decay", "0.4")),
                Variant("+ weight decay 0.2", ("--weight-decay", "0.2")),
                Variant("+ weight decay 0.4", ("--weight-decay", "0.4")),
                Variant("+ weight decay 0.8", ("--weight-decay", "0.8")),
                Variant("+ weight decay 1.6", ("--weight-decay", "1.6")),
            ),
            views=(1, 2, 6),
            curves="validation_accuracy",
        ),
        "longer": Study(
            "Which regularization pays in twice as many epochs?",
            "cifar10-best",
            (*LITTLE_REGULARIZATION, *WITH_WEIGHT_DECAY, "--train-on", "train", "--epochs", "48"),
            (
                Variant("weight decay 0.8"),
                Variant("+ flips, cutout", REGULARIZED),
                Variant("weight decay 1.6", ("--weight-decay", "1.6")),
            ),
            views=(1, 2, 6),
            curves="validation_accuracy",
        ),
        "best": Study(
            "How accurate does the original post's network get?",
            "cifar10-best",
            (),
            (
                Variant("cifar10-best"),
                Variant("12 epochs, before the search", ("--epochs", "12", *BEFORE_SEARCH)),
                Variant(
                    "12 epochs, conv1 with stride 1",
                    ("--epochs", "12", "--average-decay", "0.995", "--conv1-stride", "1"),
                ),
            ),
            views=(1, 2, 6, 10),
            published="64.36% (the original post); other AlexNets for 32x32 images: 74.74% "
            "(soapisnotfat/pytorch-cifar10, 200 epochs) and 77.22% (bearpaw/pytorch-classification, 164 epochs)",
        ),
    }
)
