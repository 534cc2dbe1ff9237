"""From the bytes of any picture to a square: for `prepare`, which stores ImageNet, and for eval.py --images.

Imports no JAX: many processes run this, and each would pay for it.
"""

import io
import warnings

import msgpack
import numpy as np
import PIL.Image
import PIL.ImageChops
import PIL.ImageOps

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # by content: ImageNet has a PNG that is named .JPEG
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
JPEG_QUALITY = 95


class PictureError(Exception):
    """A file is no picture that can be used; the message says why, in one line."""


def decode(data: bytes, as_seen: bool = False) -> PIL.Image.Image:
    """A picture in RGB, 8 bits a channel, whatever the file's name says that it is.

    Greyscale is repeated, CMYK converted (inverted where an Adobe marker says so), 16 bits cut to the upper 8. An alpha
    channel is dropped, and a note of the camera (EXIF) that the picture should be turned is ignored, as other programs
    that prepare ImageNet do.

    Args:
      data: the file's contents.
      as_seen: turn the picture as its EXIF note says and lay it on white where it is transparent, as viewers do.

    Raises:
      PictureError: none of FORMATS, a truncated one, or more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million).
    """
    if not data:
        raise PictureError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF blocks and large pictures
            image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            kind = image.format  # a copy has none
            image.load()
            if as_seen:
                image = PIL.ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16 bits; Pillow would cut off what is above 255
                levels: np.ndarray = np.asarray(image).astype(np.int64)
                image = PIL.Image.fromarray((levels >> (8 if levels.max() > 255 else 0)).astype(np.uint8))
            if image.mode == "P":
                image = image.convert("RGBA")
            if image.mode == "CMYK" and kind == "JPEG" and "adobe" not in image.info:
                image = PIL.ImageChops.invert(image)  # Pillow takes every CMYK JPEG for one of Adobe's
            if as_seen and image.has_transparency_data:
                layer = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
            return image.convert("RGB")
    except MemoryError:
        raise  # the machine's fault
    except PIL.UnidentifiedImageError:
        raise PictureError(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise PictureError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def central_square(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Scales the shorter side to `size` and takes the central square (paper, section 2).

    Both in one: the central square of the picture is scaled, bicubic with a filter as wide as the scale asks for.

    Args:
      image: RGB.
      size: side of the square.

    Returns:
      uint8 [size, size, 3], grey levels.
    """
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box))


def encode(pixels: np.ndarray, label: int, name: str, store: str) -> bytes:
    """A record of a shard.

    Args:
      pixels: uint8 [S, S, 3].
      label: class index.
      name: of the file, for a person.
      store: "jpeg" (quality 95, colours at full resolution) or "raw".
    """
    image = pixels.tobytes()
    if store == "jpeg":
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        image = buffer.getvalue()
    return msgpack.packb({"image": image, "label": label, "name": name})


def read(record: bytes, size: int) -> tuple[np.ndarray, int]:
    """Pixels, uint8 [size, size, 3], and label of a record.

    Raises:
      PictureError: it is damaged.
    """
    try:
        fields = msgpack.unpackb(record)
        image, label = fields["image"], fields["label"]
        if len(image) == size * size * 3:  # raw; no JPEG of this size comes near
            pixels = np.frombuffer(image, np.uint8).reshape(size, size, 3)
        else:
            pixels = np.asarray(PIL.Image.open(io.BytesIO(image)))
        if pixels.shape != (size, size, 3) or not isinstance(label, int):
            raise ValueError(f"it holds {pixels.shape}, label {label!r}")
    except Exception as error:
        raise PictureError("a record is damaged") from error
    return pixels, label
