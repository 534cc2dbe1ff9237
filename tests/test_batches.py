import numpy as np

from alexnet_jax.batches import batches, epoch_order, steps_per_epoch


def test_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert sorted(order) == list(range(1000))
        assert not np.array_equal(order, np.arange(1000))  # the first epoch too, unlike the seed's
    assert len({order.tobytes() for order in orders.values()}) == 9
    np.testing.assert_array_equal(epoch_order(2, 1, 1000), orders[2, 1])


def test_batches_cover_the_order_once_whatever_the_devices():
    images = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1)
    labels = np.arange(23, dtype=np.int32)
    order = epoch_order(0, 0, 23)
    for num_devices in (1, 2, 4):
        made = list(batches(images, labels, order, 8, num_devices))
        assert len(made) == steps_per_epoch(23, 8) == 3
        for batch in made:
            assert batch.images.shape == (num_devices, 8 // num_devices, 1, 1, 1)
            np.testing.assert_array_equal(batch.images.ravel(), batch.labels.ravel())
        seen = np.concatenate([batch.labels[batch.mask] for batch in made])
        np.testing.assert_array_equal(seen, order)


def test_batches_can_begin_in_the_middle():
    images, labels = np.zeros((23, 1, 1, 1), np.uint8), np.arange(23, dtype=np.int32)
    whole = list(batches(images, labels, np.arange(23), 8, 1))
    rest = list(batches(images, labels, np.arange(23), 8, 1, first=1))
    np.testing.assert_array_equal(np.stack([b.labels for b in rest]), np.stack([b.labels for b in whole[1:]]))
