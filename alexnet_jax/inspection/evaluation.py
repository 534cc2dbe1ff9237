"""What a run answered on a split."""

import dataclasses
from typing import Any

import numpy as np

from alexnet_jax.data.dataset import Dataset
from alexnet_jax.inspection.run import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A run and the images that it is to be asked about.

    Attributes:
      run: the opened run.
      dataset: the data.
      split: its name.
    """

    run: Run
    dataset: Dataset
    split: str

    def has_same_images(self, other: "Question") -> bool:
        """Whether both ask about the same images in the same order."""
        if self.split != other.split or self.run.class_names != other.run.class_names:
            return False
        return self.dataset.fingerprint() == other.dataset.fingerprint()


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation(Question):
    """What a run's network answered on every image of the split.

    Attributes:
      logits: float32 [N, classes]; with several views logarithms of their mean probabilities.
      labels: int [N].
      results: what `eval/<split>.json` holds.
    """

    logits: np.ndarray
    labels: np.ndarray
    results: dict[str, Any]
