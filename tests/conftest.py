"""Eight CPU devices for every test, strict ranks, and a data set small enough to train on in seconds."""

import dataclasses
import os
import signal

import jax
import platformdirs
import pytest

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
# The second flag is the one that --deterministic sets: it is part of the key under which compiled programs are kept.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_gpu_deterministic_ops=true")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes most of the tests' time: XLA optimizes nothing, and keeps what it has compiled for the next session,
# here and in the processes that tests start.
CACHE = str(platformdirs.user_cache_path("alexnet_jax") / "tests" / f"jax-{jax.__version__}")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
assert len(jax.devices()) == 8  # from here on no code under test can choose another number


@pytest.fixture(scope="session", autouse=True)
def no_pictures():  # type: ignore[no-untyped-def]
    """Training and evaluation draw nothing, except where a test calls them in `tiny_runs.with_pictures`."""
    from tests import tiny_runs

    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.draw_nothing(patch.setattr)
        yield


@pytest.fixture(scope="session")
def tiny():  # type: ignore[no-untyped-def]
    """Drawn shapes: 100 training, 30 validation, 70 test images."""
    from alexnet_jax.data import shapes

    return shapes.load(train=100, validation=30, test=70)


def train_an_epoch(workdir, tiny):  # type: ignore[no-untyped-def]
    """Trains with the paper's recipe; returns the folder."""
    from alexnet_jax.config.recipes import PRESETS
    from alexnet_jax.training import loop

    config = PRESETS["cifar10-paper"].config
    loop.train_and_evaluate(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, dataset="shapes"),
            schedule=dataclasses.replace(config.schedule, epochs=1, batch_size=16),
            run=dataclasses.replace(config.run, workdir=workdir, num_devices=1, log_every=3),
        ),
        tiny,
    )
    return workdir


@pytest.fixture(scope="session")
def small_run(tiny, tmp_path_factory):  # type: ignore[no-untyped-def]
    """The folder of AlexNetSmall after an epoch on `tiny`; eval/ may be written to."""
    return train_an_epoch(tmp_path_factory.mktemp("runs") / "small", tiny)


@pytest.fixture(scope="module")
def tiny_networks():  # type: ignore[no-untyped-def]
    """`--network small` is the tests' tiny network."""
    from alexnet_jax.network import build
    from tests.tiny_runs import TINY_NETWORKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "NETWORKS", TINY_NETWORKS)
        yield


@pytest.fixture(scope="module")
def tiny_run(tiny, tiny_networks, tmp_path_factory):  # type: ignore[no-untyped-def]
    """The folder of the tiny network after an epoch on `tiny`; eval/ may be written to."""
    return train_an_epoch(tmp_path_factory.mktemp("runs") / "tiny", tiny)
