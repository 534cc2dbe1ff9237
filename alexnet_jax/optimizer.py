"""Learning-rate schedules and update rules."""

from collections.abc import Sequence

import optax

from alexnet_jax.config import OptimizerConfig


def step_schedule(learning_rate: float, drop_steps: Sequence[int], factor: float) -> optax.Schedule:
    """A rate that is multiplied by `factor` at each of `drop_steps` (updates made); constant where there are none."""
    return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(drop_steps, factor))


def adam(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam with optax's defaults (beta 0.9 and 0.999, epsilon 1e-8), which are TensorFlow's in the seed."""
    return optax.adam(schedule)


def paper_sgd(schedule: optax.Schedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """Stochastic gradient descent as the paper prints it (section 5).

        v <- momentum * v - weight_decay * lr * w - lr * gradient
        w <- w + v

    The rate stands inside the momentum term (PyTorch's stands outside), so a lowered rate takes effect gradually; the
    weight decay goes through the momentum and applies to every parameter, biases included.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
        optax.trace(decay=momentum),
    )


def from_config(config: OptimizerConfig, steps_per_epoch: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that a configuration describes, and its learning rate as a function of updates made."""
    drop_steps = [epoch * steps_per_epoch for epoch in config.drop_epochs]
    schedule = step_schedule(config.learning_rate, drop_steps, config.drop_factor)
    if config.optimizer == "adam":
        return adam(schedule), schedule
    return paper_sgd(schedule, config.momentum, config.weight_decay), schedule
