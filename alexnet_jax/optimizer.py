"""Learning-rate schedules and update rules."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.config import OptimizerConfig


def step_schedule(learning_rate: float, drop_steps: Sequence[int], factor: float) -> optax.Schedule:
    """A rate that is multiplied by `factor` at each of `drop_steps` (updates made); constant where there are none."""
    return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(drop_steps, factor))


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Lowers the learning rate when validation stalls, as the paper's authors did by hand (section 5).

    Attributes:
      best: highest validation accuracy so far.
      stale: epochs since.
      scale: factor on the schedule's rate.
    """

    best: float = -1.0
    stale: int = 0
    scale: float = 1.0

    def after(self, accuracy: float, patience: int, factor: float) -> "Plateau":
        """After another epoch with this accuracy: `patience` epochs without a better one lower the rate by `factor`."""
        if accuracy > self.best:
            return Plateau(accuracy, 0, self.scale)
        if self.stale + 1 < patience:
            return Plateau(self.best, self.stale + 1, self.scale)
        return Plateau(self.best, 0, self.scale * factor)


class RateState(NamedTuple):
    """State of `scale_by_rate`.

    Attributes:
      count: int32 scalar, updates made.
      plateau_scale: float32 scalar; `with_plateau_scale` sets it.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it; tuples have a method of that name
    plateau_scale: jax.Array


def scale_by_rate(
    schedule: optax.Schedule,
    factor: Callable[[tuple[Any, ...], jax.Array], jax.Array | float] = lambda path, count: 1.0,
) -> optax.GradientTransformation:
    """Multiplies updates by -(the schedule's rate) * (the plateau's scale) * (the parameter's factor).

    Args:
      schedule: rate as a function of updates made.
      factor: of a parameter's path in the tree and the updates made.
    """

    def init(params: Any) -> RateState:
        return RateState(jnp.int32(0), jnp.float32(1))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        rate = -schedule(state.count) * state.plateau_scale
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: rate * factor(path, state.count) * u, updates)
        return scaled, RateState(state.count + 1, state.plateau_scale)

    return optax.GradientTransformation(init, update)


def with_plateau_scale(opt_state: Any, scale: float) -> Any:
    """The optimizer's state with another scale from a plateau."""
    return optax.tree.set(opt_state, plateau_scale=jnp.float32(scale))


def is_bias(path: tuple[Any, ...]) -> bool:
    """Whether a path in a tree of parameters is a bias's."""
    return bool(path) and getattr(path[-1], "key", None) == "bias"


def paper_sgd(
    rate: optax.GradientTransformation, momentum: float, weight_decay: float, decay_biases: bool = True
) -> optax.GradientTransformation:
    """Stochastic gradient descent as the paper prints it (section 5).

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    The rate stands inside the momentum term (PyTorch's stands outside), so a lowered rate takes effect gradually; the
    weight decay goes through the momentum and applies to every parameter, biases included. The 2012 program decays no
    biases: `decay_biases=False`.
    """

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decay_biases or not is_bias(path), params)

    return optax.chain(optax.add_decayed_weights(weight_decay, decays), rate, optax.trace(decay=momentum))


def from_config(config: OptimizerConfig, steps_per_epoch: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that a configuration describes, and its learning rate as a function of updates made.

    A plateau's scale and the factors of biases and conv1 come on top of that rate. Adam has optax's defaults (beta 0.9
    and 0.999, epsilon 1e-8), which are TensorFlow's in the seed.
    """
    drop_steps = [epoch * steps_per_epoch for epoch in config.drop_epochs]
    schedule = step_schedule(config.learning_rate, drop_steps, config.drop_factor)

    def factor(path: tuple[Any, ...], count: jax.Array) -> jax.Array | float:
        result: jax.Array | float = config.bias_rate if is_bias(path) else 1.0
        for epoch, slowdown in ((config.conv1_slow_epoch, 0.1), (config.conv1_stop_epoch, 0.0)):
            if epoch is not None and path and getattr(path[0], "key", None) == "conv1":
                result = jnp.where(count < epoch * steps_per_epoch, 1.0, slowdown) * result
        return result

    rate = scale_by_rate(schedule, factor)
    if config.optimizer == "adam":
        return optax.chain(optax.scale_by_adam(), rate), schedule
    return paper_sgd(rate, config.momentum, config.weight_decay, config.decay_biases), schedule
