"""Eight CPU devices for every test, strict ranks, and a data set small enough to train on in seconds."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny():  # type: ignore[no-untyped-def]
    """Drawn shapes: 100 training, 30 validation, 70 test images."""
    from alexnet_jax.datasets import shapes

    return shapes.load(train=100, validation=30, test=70)
