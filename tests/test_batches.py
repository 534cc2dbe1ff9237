import numpy as np
import pytest

from alexnet_jax.data.batches import batches, epoch_order, steps_per_epoch


def test_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert sorted(order) == list(range(1000))
        assert not np.array_equal(order, np.arange(1000))  # the first epoch too, unlike the seed's
    assert len({order.tobytes() for order in orders.values()}) == 9
    np.testing.assert_array_equal(epoch_order(2, 1, 1000), orders[2, 1])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 23, 24])
def test_batches_cover_the_order_once_whatever_the_devices(num_devices, count):
    order = epoch_order(0, 0, count)
    made = batches(order, 8, num_devices)
    assert made.indices.shape == made.mask.shape == (num_devices, steps_per_epoch(count, 8), 8 // num_devices)
    # Batch by batch, the devices' shares one after the other.
    index, mask = (a.swapaxes(0, 1).ravel() for a in made)
    np.testing.assert_array_equal(index[mask], order)
    assert mask.tolist() == [True] * count + [False] * (len(mask) - count)
    assert set(index[~mask]) <= {order[(count - 1) // 8 * 8]}


def test_a_part_of_the_batches():
    whole = batches(np.arange(23), 8, 2)
    part = whole.part(1, 2)
    np.testing.assert_array_equal(part.indices, whole.indices[:, 1:3])
    np.testing.assert_array_equal(part.mask, whole.mask[:, 1:3])
