"""Consumers of the training loop's calls: sums and speed, stalls."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from alexnet_jax.errors import AlexNetError, warn
from alexnet_jax.training import health
from alexnet_jax.training.state import StepMetrics


class Call(NamedTuple):
    """A call of the train step, launched but perhaps not finished.

    Attributes:
      step: updates made after it.
      epoch: the epoch that it belongs to, from 0.
      batches: batches of this epoch after it.
      ends_epoch: whether it is the epoch's last.
      images: examples in its batches, in all processes.
      metrics: metrics of its steps, on the devices.
    """

    step: int
    epoch: int
    batches: int
    ends_epoch: bool
    images: int
    metrics: StepMetrics


@dataclasses.dataclass
class Totals:
    """Sums over examples; means are taken only when they are reported.

    Attributes:
      loss: sum of cross entropies (nats).
      correct: examples classified correctly.
      count: examples.
    """

    loss: float = 0.0
    correct: int = 0
    count: int = 0


class Stopwatch:
    """Wall-clock seconds, without the time spent in `paused()`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Resets the time to 0."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the restart, pauses excluded."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the `with` block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin


class Meter:
    """Sums and speed since the last line of the log.

    The sums of a call are fetched when the next call has been launched, so that the devices never wait for the host.

    Attributes:
      totals: sums of all calls fetched so far; stored in checkpoints.
      watch: runs while the devices train.
    """

    def __init__(self, totals: Totals, refused: Callable[[int, float], AlexNetError]) -> None:
        """Continues with `totals`; `refused(step, loss)` is the error for an update that was not taken."""
        self.totals, self.watch = totals, Stopwatch()
        self._refused, self._images = refused, 0
        self._pending: Call | None = None

    def add(self, call: Call) -> None:
        """Records a call, and fetches the sums of the previous one.

        Raises:
          AlexNetError: its loss or gradient was not finite.
        """
        self.fetch()
        self._pending = call
        self._images += call.images

    def fetch(self) -> None:
        """Fetches the sums of the last call, if not done yet; raises as `add` does."""
        if self._pending is None:
            return
        call, self._pending = self._pending, None
        metrics = jax.device_get(call.metrics)
        first = call.step - len(metrics.loss) + 1
        for index, loss in enumerate(metrics.loss):
            if not metrics.finite[index]:
                raise self._refused(first + index, float(loss))
            self.totals.loss += float(loss)
            self.totals.correct += int(metrics.correct[index])
            self.totals.count += int(metrics.count[index])

    def report(self) -> dict[str, float]:
        """Means and speed since the last report."""
        self.fetch()
        totals, seconds = self.totals, self.watch.seconds()
        means = {
            "loss": totals.loss / totals.count,
            "accuracy": totals.correct / totals.count,
            "images_per_second": round(self._images / seconds, 1),
        }
        self.totals, self._images = Totals(), 0
        return means


class StallWatch:
    """Warns once if the mean loss of two reports after `after_step` is that of guessing, ln(classes).

    Attributes:
      after_step: number of steps; 0: never.
      num_classes: number of classes.
    """

    def __init__(self, after_step: int, num_classes: int) -> None:
        self.after_step, self.num_classes = after_step, num_classes
        self._warned = False
        self._before: tuple[int, Any] | None = None

    def check(
        self, step: int, loss: float, params: Callable[[], Any], dead: Callable[[Any], dict[str, float]] | None
    ) -> None:
        """Records a report.

        Args:
          step: step at which the report was made.
          loss: its mean cross entropy.
          params: returns the parameters as NumPy arrays; several processes call it at the same steps.
          dead: returns each layer's share of dead units. None: this process does not warn.
        """
        guessing = math.log(self.num_classes)
        if not self.after_step or step < self.after_step or self._warned or abs(loss / guessing - 1) > 0.01:
            self._before = None
        elif self._before is None:
            self._before = step, params()
        else:
            (start, before), after = self._before, params()
            self._before, self._warned = None, True
            if dead is not None:
                ratios = {name: r / (step - start) for name, r in health.update_ratios(before, after).items()}
                cause = health.diagnosis(dead(after), ratios)
                warn(f"after {step:,} steps the loss is {loss:.3f}, no better than guessing: {cause}")


def refused_update(step: int, loss: float, steps_per_epoch: int, checkpoints: list[int]) -> AlexNetError:
    """The error for an update that was not taken."""
    epoch, batch = divmod(step - 1, steps_per_epoch)
    what = "the gradient contains Inf or NaN" if np.isfinite(loss) else f"the loss is {loss}"
    return AlexNetError(
        f"{what} at step {step:,} (epoch {epoch + 1}, batch {batch + 1} of {steps_per_epoch:,}); the update was not "
        f"taken. Try a lower --learning-rate; existing checkpoints: {checkpoints or 'none'}"
    )
