"""Records of prepared shards."""

import msgpack
import numpy as np
import PIL.Image
import pytest

from alexnet_jax.data.decode import ImageError
from alexnet_jax.data.records import decode_record, encode_record

NOISE = np.random.default_rng(1).integers(0, 256, (5, 5, 3)).astype(np.uint8)
PIXELS = np.asarray(PIL.Image.fromarray(NOISE).resize((48, 48), PIL.Image.Resampling.BILINEAR))


def test_raw_is_exact_and_jpeg_is_close_and_smaller():
    raw, jpeg = (encode_record(PIXELS, 3, "a.JPEG", store) for store in ("raw", "jpeg"))
    pixels, label = decode_record(raw, 48)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert label == 3
    pixels, label = decode_record(jpeg, 48)
    assert 0 < np.abs(pixels.astype(int) - PIXELS).mean() < 2
    assert label == 3
    assert len(jpeg) < len(raw) / 2


def test_a_name_that_is_not_utf8_is_escaped():
    record = encode_record(PIXELS, 3, "caf\udce9.JPEG", "raw")
    assert msgpack.unpackb(record)["name"] == "caf\\udce9.JPEG"


@pytest.mark.parametrize(
    "record", [b"", encode_record(PIXELS, 3, "a", "jpeg")[:-9], encode_record(PIXELS[1:], 3, "a", "raw")]
)
def test_a_damaged_record_is_refused(record):
    with pytest.raises(ImageError, match="a record is damaged"):
        decode_record(record, 48)
