"""Learning-rate schedules and update rules."""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from alexnet_jax.config.settings import OptimizerConfig
from alexnet_jax.data.batches import updates_before


def step_schedule(learning_rate: float, drop_steps: Sequence[int], factor: float) -> optax.Schedule:
    """A rate that is multiplied by `factor` at each of `drop_steps` (updates made); constant if there are none."""
    return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(drop_steps, factor))


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Lowers the learning rate when validation stalls, as the paper's authors did by hand (section 5).

    Attributes:
      best: highest validation accuracy so far.
      stale: epochs since then.
      scale: factor on the schedule's rate.
    """

    best: float = -1.0
    stale: int = 0
    scale: float = 1.0

    def after(self, accuracy: float, patience: int, factor: float) -> "Plateau":
        """The state after an epoch; `patience` epochs without a better accuracy lower the rate by `factor`."""
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
      factor: the parameter's factor, as a function of its path in the tree and of updates made.
    """

    def init(params: Any) -> RateState:
        return RateState(jnp.int32(0), jnp.float32(1))

    def update(updates: Any, state: RateState, params: Any = None) -> tuple[Any, RateState]:
        rate = -schedule(state.count) * state.plateau_scale
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: rate * factor(path, state.count) * u, updates)
        return scaled, RateState(state.count + 1, state.plateau_scale)

    return optax.GradientTransformation(init, update)


def with_plateau_scale(opt_state: Any, scale: float) -> Any:
    """The optimizer's state with another plateau scale."""
    return optax.tree.set(opt_state, plateau_scale=jnp.float32(scale))


def is_bias(path: tuple[Any, ...]) -> bool:
    """Whether a path in a tree of parameters is that of a bias."""
    return bool(path) and getattr(path[-1], "key", None) == "bias"


def paper_sgd(
    rate: optax.GradientTransformation,
    momentum: float,
    weight_decay: float,
    decay_biases: bool = True,
    nesterov: bool = False,
    layer_decays: Mapping[str, float] = types.MappingProxyType({}),
) -> optax.GradientTransformation:
    """Stochastic gradient descent in the paper's form (section 5).

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    The rate is inside the momentum term (in PyTorch it is outside), so a lower rate takes effect gradually; the weight
    decay goes through the momentum and applies to every parameter, biases included. The 2012 program does not decay
    biases: `decay_biases=False`. `layer_decays` are the weight decays of layers with their own. With `nesterov`, the
    weights move by momentum * v + (what was added to v) instead.
    """
    # The mask selects everything. It is kept so that checkpoints have the same tree as when optax's own weight decay
    # was used here.
    decay = optax.masked(weight_decay_of(weight_decay, decay_biases, layer_decays), mask=True)
    return optax.chain(decay, rate, optax.trace(decay=momentum, nesterov=nesterov))


def weight_decay_of(
    weight_decay: float, decay_biases: bool, layer_decays: Mapping[str, float]
) -> optax.GradientTransformation:
    """Adds weight decay * parameter to each update, with the layer's decay in `layer_decays`, else `weight_decay`."""

    def add(updates: Any, params: Any) -> Any:
        def decayed(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
            if is_bias(path) and not decay_biases:
                return update
            return update + layer_decays.get(getattr(path[0], "key", "") if path else "", weight_decay) * param

        return jax.tree_util.tree_map_with_path(decayed, updates, params)

    return optax.stateless(add)


def muon_direction(momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """Muon's updates before the learning rate: each kernel's momentum, as a matrix with singular values near 1.

    A kernel [..., inputs, outputs] is treated as a matrix with a row for each output. The matrices are scaled to a root
    mean square of 0.2, as Adam's updates have (Liu et al., Muon is Scalable for LLM Training, 2025), and biases get
    Adam's (NAdam's with `nesterov`), so that one rate serves both. Three Newton-Schulz steps with AOL scaling (Boissin
    et al., Turbo-Muon, 2025) train `AlexNetSmall` as well as five without (71.3% and 70.8% after 3 epochs, one seed),
    at 1.2 times the speed on a CPU core (results/best-tried-cpu.jsonl). Source of Muon: Jordan et al., 2024.
    """

    def axes(params: Any) -> Any:
        def of(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            last = leaf.ndim - 1
            return None if is_bias(path) else optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

        return jax.tree_util.tree_map_with_path(of, params)

    rule = optax.contrib.muon(
        1.0,
        ns_steps=3,
        preconditioning="aol",
        beta=momentum,
        nesterov=nesterov,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=axes,
    )
    return optax.chain(rule, optax.scale(-1.0))


class AverageState(NamedTuple):
    """State of `averaging`.

    Attributes:
      count: int32 scalar, updates made.
      average: moving average of the parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    average: Any


def averaging(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; must be last in a chain, and changes no update.

        average <- d * average + (1 - d) * new parameters,  d = min(decay, (1 + t) / (10 + t))

    with t the updates made, so that the initial values are soon forgotten.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        average = jax.tree.map(lambda a, p, u: d * a + (1 - d) * (p + u), state.average, params, updates)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any, params: Any) -> Any:
    """The parameters to predict with: `params`, or their average if the optimizer's state keeps one.

    Layers that are not trained have no average. The state may be the plain dict that a checkpoint holds.
    """
    average = optax.tree.get(opt_state, "average")
    return params if average is None else {**params, **average}


def from_config(
    config: OptimizerConfig, steps_per_epoch: int, epochs: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that a configuration describes, and its learning rate as a function of updates made.

    A plateau's scale and the factors of biases and conv1 are not included in that rate. Adam has optax's defaults (beta
    0.9 and 0.999, epsilon 1e-8), which are also TensorFlow's, used by the original post.
    """
    if config.rate_schedule == "cosine":
        warmup = min(round(config.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch - 1)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else config.learning_rate, config.learning_rate, warmup, epochs * steps_per_epoch
        )
    else:
        drop_steps = [updates_before(epoch, steps_per_epoch) for epoch in config.drop_epochs]
        schedule = step_schedule(config.learning_rate, drop_steps, config.drop_factor)

    def factor(path: tuple[Any, ...], count: jax.Array) -> jax.Array | float:
        result: jax.Array | float = config.bias_rate if is_bias(path) else 1.0
        for epoch, slowdown in ((config.conv1_slow_epoch, 0.1), (config.conv1_stop_epoch, 0.0)):
            if epoch is not None and path and getattr(path[0], "key", None) == "conv1":
                result = jnp.where(count < updates_before(epoch, steps_per_epoch), 1.0, slowdown) * result
        return result

    rate = scale_by_rate(schedule, factor)
    if config.optimizer == "adam":
        rule = optax.chain(optax.scale_by_adam(), rate)
    elif config.optimizer == "muon":
        rule = optax.chain(
            muon_direction(config.momentum, config.nesterov),
            weight_decay_of(config.weight_decay, config.decay_biases, dict(config.layer_decays)),
            rate,
        )
    else:
        rule = paper_sgd(
            rate,
            config.momentum,
            config.weight_decay,
            config.decay_biases,
            config.nesterov,
            dict(config.layer_decays),
        )
    return (optax.chain(rule, averaging(config.average_decay)) if config.average_decay else rule), schedule
