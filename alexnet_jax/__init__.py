"""AlexNet in JAX and Flax. `alexnet_jax.open_run(path)` opens a finished run."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # Late, because it imports JAX and Flax, and `train.py --help` should not wait for them.
    if name in ("Run", "open_run"):
        from alexnet_jax.inspection import run

        return getattr(run, name)
    if name == "load_weights":
        from alexnet_jax.exchange import weights

        return weights.load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
