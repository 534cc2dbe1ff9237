"""Eight CPU devices for every test, strict ranks, and a data set small enough to train on in seconds."""

import os
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same programs; the folder is new for each session and shared by its workers.
CACHE = os.environ.setdefault("ALEXNET_JAX_TEST_CACHE", tempfile.mkdtemp(prefix="alexnet_jax_test_"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
assert len(jax.devices()) == 8  # from here on no code under test can choose another number


@pytest.fixture(scope="session")
def tiny():  # type: ignore[no-untyped-def]
    """Drawn shapes: 100 training, 30 validation, 70 test images."""
    from alexnet_jax.datasets import shapes

    return shapes.load(train=100, validation=30, test=70)
