"""Small image folders to prepare."""

import io
import pathlib
from collections.abc import Mapping

import numpy as np
import PIL.Image

from alexnet_jax.data.prepare import PrepareConfig

WNIDS = ("n01440764", "n02007558", "n03000684")
SIZE = 16


def encoded(seed: int, width: int = 24, height: int = 20, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """An image file of smooth noise."""
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, channels)).astype(np.uint8)
    bands = [
        PIL.Image.fromarray(small[..., c]).resize((width, height), PIL.Image.Resampling.BILINEAR)
        for c in range(channels)
    ]
    image = PIL.Image.merge(mode, bands) if channels > 1 else bands[0]
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: pathlib.Path, contents: Mapping[str, bytes | str]) -> pathlib.Path:
    """Writes files by their paths in a folder."""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def make_folder(source: pathlib.Path, per_class: int = 4) -> pathlib.Path:
    """An image folder of three classes, with two validation images each in class folders."""
    return write(
        source,
        {
            f"{split}/{wnid}/{wnid}_{number}.JPEG": encoded(100 * label + number + first)
            for split, count, first in (("train", per_class, 0), ("val", 2, 50))
            for label, wnid in enumerate(WNIDS)
            for number in range(count)
        },
    )


def configure(source: pathlib.Path, out: pathlib.Path, **options) -> PrepareConfig:
    """Settings for a small preparation in one process."""
    return PrepareConfig(source, out, **{"workers": 1, "size": SIZE} | options)
