"""Records of prepared shards: an image of S x S pixels and its label, in msgpack."""

import io

import msgpack
import numpy as np
import PIL.Image

from alexnet_jax.data.decode import ImageError

JPEG_QUALITY = 95


def encode_record(pixels: np.ndarray, label: int, name: str, store: str) -> bytes:
    """Encodes a record.

    Args:
      pixels: uint8 [S, S, 3].
      label: class index.
      name: name of the image file, for users who inspect a shard.
      store: "jpeg" (quality 95, no chroma subsampling) or "raw".
    """
    image = pixels.tobytes()
    if store == "jpeg":
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        image = buffer.getvalue()
    text = name.encode(errors="backslashreplace").decode()  # file names need not be UTF-8
    return msgpack.packb({"image": image, "label": label, "name": text})


def decode_record(record: bytes, size: int) -> tuple[np.ndarray, int]:
    """The pixels, uint8 [size, size, 3], and the label of a record.

    Raises:
      ImageError: the record is damaged.
    """
    try:
        fields = msgpack.unpackb(record)
        image, label = fields["image"], fields["label"]
        if len(image) == size * size * 3:  # raw: no JPEG of this size is nearly as long
            pixels = np.frombuffer(image, np.uint8).reshape(size, size, 3)
        else:
            pixels = np.asarray(PIL.Image.open(io.BytesIO(image)))
        if pixels.shape != (size, size, 3) or not isinstance(label, int):
            raise ValueError(f"{pixels.shape}, label {label!r}")
    except Exception as error:
        raise ImageError("a record is damaged") from error
    return pixels, label
