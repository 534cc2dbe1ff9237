"""AlexNet in JAX and Flax.

The names here are the public ones. They are imported on first use: JAX and Flax take longer to import than
`train.py --help` should.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_jax.augment.pca import pca_noise
    from alexnet_jax.exchange.weights import load_weights
    from alexnet_jax.inspection.run import Run, open_run
    from alexnet_jax.network.alexnet import AlexNet
    from alexnet_jax.network.layers import max_pool
    from alexnet_jax.network.lrn import local_response_norm
    from alexnet_jax.network.small import AlexNetSmall

__all__ = [
    "AlexNet",
    "AlexNetSmall",
    "Run",
    "__version__",
    "load_weights",
    "local_response_norm",
    "max_pool",
    "open_run",
    "pca_noise",
]
__version__ = "0.2.0"

_MODULES = {
    "AlexNet": "network.alexnet",
    "AlexNetSmall": "network.small",
    "Run": "inspection.run",
    "load_weights": "exchange.weights",
    "local_response_norm": "network.lrn",
    "max_pool": "network.layers",
    "open_run": "inspection.run",
    "pca_noise": "augment.pca",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
