"""The step of docs/data_parallelism.md with `jax.shard_map` is the step with `jax.pmap`."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from alexnet_jax.data.batches import batches, epoch_order
from alexnet_jax.distributed.devices import replicate
from alexnet_jax.training.state import create_state
from alexnet_jax.training.step import compile_train_step, train_step
from tests.tiny_runs import UPDATE, TinyNetwork, everything_on

pytestmark = pytest.mark.both_lines

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "data_parallelism.md"


@pytest.fixture(scope="module")
def compile_with_shard_map():
    """The function on the page."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "def compile_with_shard_map(" in block)
    names = {"jax": jax, "np": np}  # imported further up on the page
    exec(compile(block, PAGE.name, "exec"), names)
    return names["compile_with_shard_map"]


def train(compile_step, dataset, num_devices: int):
    """State and metrics after two calls of two steps, the last batch padded, and the instructions of a call."""
    model, devices = TinyNetwork(), jax.devices()[:num_devices]
    preprocess = everything_on(dataset["train"].images)
    step = functools.partial(train_step, model=model, optimizer=UPDATE, preprocess=preprocess)
    compiled = compile_step(step, devices, dataset.fetch)
    state = create_state(model, UPDATE, dataset.image_shape, jax.random.key(0))
    state, resident, key = replicate((state, dataset.resident(), jax.random.key(1)), devices)
    layout = batches(epoch_order(0, 0, 100), 16, num_devices)
    program = compiled.lower(state, resident, layout.part(0, 2), key).compile().as_text()
    metrics = []
    for first in (3, 5):
        state, sums = compiled(state, resident, layout.part(first, 2), key)
        metrics.append(jax.device_get(sums))
    return (
        jax.device_get(state),
        metrics,
        re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", program, re.MULTILINE),
    )


@pytest.mark.parametrize("num_devices", [1, 4])
def test_shard_map_gives_the_bits_and_the_program_of_pmap(tiny, compile_with_shard_map, num_devices):
    expected, expected_metrics, expected_program = train(compile_train_step, tiny, num_devices)
    state, metrics, program = train(compile_with_shard_map, tiny, num_devices)
    jax.tree.map(np.testing.assert_array_equal, expected, state)
    jax.tree.map(np.testing.assert_array_equal, expected_metrics, metrics)
    assert int(state.step) == 4
    assert sum(sums.count.sum() for sums in metrics) == 3 * 16 + 4
    assert ("all-reduce" in program) == (num_devices > 1)
    assert "dot" in program
    assert program == expected_program
