"""Shards of prepared images, each written by one worker process together with its pixel sums."""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from alexnet_jax.data.decode import SCALINGS, ImageError, decode
from alexnet_jax.data.image_files import is_of_the_file
from alexnet_jax.data.imagenet_tfds import TfdsExample
from alexnet_jax.data.records import decode_record, encode_record
from alexnet_jax.data.sources import Example
from alexnet_jax.data.statistics import pixel_sums
from alexnet_jax.errors import reason
from alexnet_jax.files import sync, write_atomically


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """The contents of a finished shard.

    Attributes:
      records: number of images.
      bytes: length of the file.
      sha256: hash of the file.
      skipped: (file, reason) for each file that could not be decoded.
    """

    records: int
    bytes: int
    sha256: str
    skipped: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write.

    Attributes:
      path: path of its file.
      examples: in order.
      size: side S of the squares.
      store: "jpeg" or "raw".
      scaling: a key of `decode.SCALINGS`.
      as_seen: as for `decode.decode`.
    """

    path: pathlib.Path
    examples: Sequence[Example | TfdsExample]
    size: int
    store: str
    scaling: str = "square"
    as_seen: bool = False

    @property
    def result_path(self) -> pathlib.Path:
        """The file with the result and the sums. It is written last, so if it exists, the shard is complete."""
        return self.path.parent / ".work" / f"{self.path.name}.npz"

    def result(self) -> ShardResult:
        """The result of a finished shard."""
        with np.load(self.result_path) as file:
            return ShardResult(**json.loads(file["result"].item()))

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """`pixel_sums` of the images in a finished shard."""
        with np.load(self.result_path) as file:
            return file["total"], file["products"]

    def is_finished(self) -> bool:
        """Whether the shard and its result are complete."""
        try:
            return self.path.stat().st_size == self.result().bytes
        except Exception:  # missing, or a damaged archive, which raises errors of many kinds
            return False


def write_shard(shard: Shard) -> None:
    """Writes a shard, then its result."""
    from array_record.python import array_record_module

    temporary = shard.result_path.with_name(f"{shard.path.name}.tmp")
    writer = array_record_module.ArrayRecordWriter(
        str(temporary), "group_size:1,uncompressed"
    )  # JPEG can't be compressed further
    total, products = np.zeros((shard.size, shard.size, 3), np.int64), np.zeros((3, 3), np.int64)
    records, skipped = 0, []
    for example in shard.examples:
        try:
            data, label = example.read()
            pixels = SCALINGS[shard.scaling](decode(data, as_seen=shard.as_seen), shard.size)
        except (ImageError, OSError) as error:
            if not is_of_the_file(error):
                raise OSError(f"{example.name}: {reason(error)}") from error
            skipped.append((example.name, reason(error)))
            continue
        record = encode_record(pixels, label, example.name, shard.store)
        writer.write(record)
        stored, _ = decode_record(record, shard.size)  # as training will see it
        image_total, image_products = pixel_sums(stored[None])
        total += image_total
        products += image_products
        records += 1
    writer.close()
    sync(temporary)
    contents = temporary.read_bytes()
    temporary.replace(shard.path)
    sync(shard.path.parent)
    result = ShardResult(records, len(contents), hashlib.sha256(contents).hexdigest(), skipped)
    buffer = io.BytesIO()
    np.savez(buffer, total=total, products=products, result=json.dumps(vars(result)))
    write_atomically(shard.result_path, buffer.getvalue())
