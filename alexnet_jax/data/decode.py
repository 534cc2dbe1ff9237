"""Decoding: from the bytes of an image file to a square of RGB pixels.

Does not import JAX, because every process that prepares images would have to wait for it.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageChops
import PIL.ImageOps
import PIL.ImagePalette

from alexnet_jax.data.image_files import HEAD_BYTES, image_format

# Recognized by content: ImageNet has a PNG named .JPEG. Pillow reads AVIF from 11.3 on, if built with the codec.
_AVIF = ("AVIF",) if "avif" in PIL.features.modules and PIL.features.check("avif") else ()
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", *_AVIF)
MAX_BYTES = 512 * 1024**2  # of an image file
LONGEST = 100  # times the shorter side
_CONVERT = "convert it to 8 bits per channel"

# TIFF tags
_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _MAX_VALUE, _PLANAR, _COLOUR_MAP = 254, 258, 262, 281, 284, 320
_SAMPLE_FORMAT, _CHROMA_SUBSAMPLING, _REFERENCE_BLACK_WHITE, _DNG_VERSION = 339, 530, 532, 50706
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED, _FLOAT, _SEPARATE_PLANES = 0, 1, 2, 3, 2


class ImageError(Exception):
    """A file is not an image that can be decoded; the message gives the reason in one line."""


def decode(data: bytes, as_seen: bool = False) -> PIL.Image.Image:
    """Decodes a file to RGB, 8 bits per channel, whatever its suffix; only the first of several frames or pages.

    Greyscale is repeated in all three channels; CMYK is converted (and inverted if an Adobe marker says so). The alpha
    channel and the EXIF orientation are ignored, as by other programs that prepare ImageNet.

    If a channel has more than 8 bits, the upper 8 of the range that the file declares are kept: all 16 bits, the 12 of
    TIFF's BitsPerSample, the 2^n - 1 of TIFF's MaxSampleValue, the largest value in a PPM header. PNG's sBIT declares a
    range only if it is 16 for every channel, because PNG scales smaller ranges to all 16 bits.

    Images of unknown range are refused: floating point, signed and 32-bit numbers, which have no natural range, and
    16-bit numbers whose upper two bits are never used, because they may be 10, 12 or 14 bits of a sensor. An image of
    zeros is black in any range.

    Args:
      data: the file's contents.
      as_seen: apply the EXIF orientation and draw transparent images on white, as viewers do.

    Raises:
      ImageError: the file has none of FORMATS, is truncated, has an unknown range, or has more than twice
        `PIL.Image.MAX_IMAGE_PIXELS` (179 million) pixels.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF blocks and large images
            return _decode(data, as_seen)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ImageError(_reason(error, data)) from error


def _decode(data: bytes, as_seen: bool) -> PIL.Image.Image:
    image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    container = image.format  # lost in copies
    depth = _png_depth(image, data) if container == "PNG" else _depth(image)
    _rescale_metadata(image)
    image.load()
    if as_seen:
        image = PIL.ImageOps.exif_transpose(image)
    if depth.bits > 8:
        image = _upper_eight_bits(image, depth)
    if image.mode in ("P", "La"):
        image = image.convert({"P": "RGBA", "La": "LA"}[image.mode])  # Pillow converts La to nothing else
    if image.mode == "CMYK" and container in ("JPEG", "MPO") and "adobe" not in image.info:
        image = PIL.ImageChops.invert(image)  # Pillow inverts every CMYK JPEG, as Adobe's are
    if as_seen and image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _reason(error: Exception, data: bytes) -> str:
    """Why a file can't be decoded, in one line."""
    found = image_format(data[:HEAD_BYTES])
    if found is None:
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    if found not in FORMATS:
        return f"{found} is not supported: convert it to JPEG"
    if isinstance(error, PIL.Image.DecompressionBombError) and (number := re.search("[0-9]+", str(error))):
        most = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
        return f"it has {int(number[0]):,} pixels, more than {most:,}: scale it down"
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"a damaged {found}, or a kind of it that can't be decoded: {_CONVERT}"
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Depth(NamedTuple):
    """How an image's levels are stored.

    Attributes:
      bits: bits per channel.
      declared: whether the file declares that all of them are used.
      inverted: whether 0 is white.
    """

    bits: int
    declared: bool = False
    inverted: bool = False


def _depth(image: PIL.Image.Image) -> _Depth:
    """The depth of an image that is opened but not yet loaded, because loading discards this information.

    Raises:
      ImageError: the range is unknown, or Pillow would not read the stored levels.
    """
    coding, args = _tile(image)
    if image.format == "TIFF":
        return _tiff_depth(image.tag_v2, image.mode, coding)  # type: ignore[attr-defined]
    if image.mode == "F":
        raise ImageError(f"the range of its floating point numbers is unknown: {_CONVERT}")
    if image.format == "PPM":  # Pillow scales other largest values to 8 or 16 bits
        most = args[1] if isinstance(args, tuple) else 65535 if "16" in args else 255
        return _Depth(16 if most > 255 else 8, declared=most != 65535)
    return _Depth(8)


def _tile(image: PIL.Image.Image) -> tuple[str, Any]:
    """Pillow's decoder of an opened image and its arguments."""
    tiles = getattr(image, "tile", None)
    return (tiles[0][0], tiles[0][3]) if tiles else ("", "")


def _tiff_depth(tags: Any, mode: str, coding: str) -> _Depth:
    bits, types = max(tags.get(_BITS, (1,))), set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    most = max(tags.get(_MAX_VALUE, (0,)))
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if tags.get(_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in tags:
        raise ImageError("its first page is a preview, as in a camera's raw file: convert it to JPEG")
    if types != {_UNSIGNED} or bits > 16:
        numbers = "floating point" if _FLOAT in types else "signed" if _SIGNED in types else f"{bits}-bit"
        raise ImageError(f"the range of its {numbers} numbers is unknown: {_CONVERT}")
    if tags.get(_PLANAR) == _SEPARATE_PLANES and bits != 8 and coding == "raw":  # Pillow would read 8 bits
        raise ImageError(f"{bits} bits in separate planes can't be decoded: {_CONVERT}")
    if mode == "YCbCr" and (
        tags.get(_CHROMA_SUBSAMPLING, (1, 1)) != (1, 1)
        or [*map(int, tags.get(_REFERENCE_BLACK_WHITE, ()))] not in ([], [0, 255, 128, 255, 128, 255])
    ):
        raise ImageError("this kind of YCbCr can't be decoded: convert it to RGB")
    if bits == 16 and 255 < most < 65535 and (most & (most + 1)) == 0:  # 2^n - 1
        return _Depth(int(most).bit_length(), True, inverted)
    return _Depth(bits, bits == 12, inverted)


def _png_depth(image: PIL.Image.Image, png: bytes) -> _Depth:
    """The depth of a PNG. It is declared if sBIT, a chunk before the pixels, is 16 for every channel."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(png[25], 0)  # by the colour type
    start = 8
    while (name := png[start + 4 : start + 8]) not in (b"sBIT", b"IDAT", b""):
        start += 12 + int.from_bytes(png[start : start + 4])
    length = int.from_bytes(png[start : start + 4])
    declared = name == b"sBIT" and png[start + 8 : start + 8 + length] == b"\x10" * channels
    return _Depth(16 if ";16" in _tile(image)[1] else 8, declared)


def _rescale_metadata(image: PIL.Image.Image) -> None:
    """Scales a PNG's transparent level and a TIFF's palette like the pixels after loading."""
    stored = _tile(image)[1]
    if image.format == "PNG" and "transparency" in image.info:
        level = image.info["transparency"]
        if stored in ("L;2", "L;4"):
            image.info["transparency"] = level * {"L;2": 85, "L;4": 17}[stored]
        elif stored == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in level)
    if image.format == "TIFF" and image.mode in ("P", "PA"):
        colours = image.tag_v2[_COLOUR_MAP]  # type: ignore[attr-defined]
        if max(colours) < 256:  # 8 bits, as libtiff reads it, although TIFF specifies 16
            image.palette = PIL.ImagePalette.raw("RGB;L", bytes(colours))


def _upper_eight_bits(image: PIL.Image.Image, depth: _Depth) -> PIL.Image.Image:
    """Reduces greyscale of 9 to 16 bits to its upper 8; checks the range of colours, which Pillow has already reduced.

    Raises:
      ImageError: the levels exceed the declared range, or the range is unknown.
    """
    levels = np.asarray(image)
    grey = image.mode.startswith("I")
    if not grey and image.mode.endswith(("A", "a")):
        levels = levels[..., :-1]
    largest = int(levels.max()) << (0 if grey else 8)
    if not grey and depth.bits != 16:  # Pillow has kept 8 bits, the upper of which are empty
        raise ImageError(f"{depth.bits}-bit colours stored in 16 bits can't be decoded: {_CONVERT}")
    if largest >> depth.bits:
        raise ImageError(f"it has values above the {depth.bits} bits that it declares: {_CONVERT}")
    if not depth.declared and 0 < largest < 1 << (depth.bits - 2):
        raise ImageError(
            f"it stores {depth.bits} bits per channel but uses less than a quarter of their range, so there may be "
            f"fewer: {_CONVERT}"
        )
    if not grey:
        return image
    levels = levels.astype(np.uint16)  # in native byte order
    white = (1 << depth.bits) - 1 if depth.inverted else 0
    scaled = PIL.Image.fromarray(((levels ^ white) >> (depth.bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(PIL.Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def central_square(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Scales the shorter side of an RGB image to `size` and takes the central square (paper, section 2).

    Both happen in one operation: only the central square is resampled, with a bicubic filter as wide as the scale
    requires.

    Returns:
      uint8 [size, size, 3], grey levels.
    """
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box))


def central_square_bilinear(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The same, as torchvision's transforms do it: the whole image is scaled, with a bilinear filter, and then cropped.

    The longer side is rounded down to whole pixels.

    Raises:
      ImageError: the image is so long that scaling the whole of it would take too much memory.
    """
    short = min(image.size)
    if max(image.size) > LONGEST * short:
        raise ImageError(f"it has {image.width} x {image.height} pixels: more than {LONGEST} times as long as wide")
    width, height = (size * side // short for side in image.size)
    scaled = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def stretched(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The whole image, stretched to a square with a bilinear filter, as Caffe's programs prepare ImageNet."""
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR))


SCALINGS: Mapping[str, Callable[[PIL.Image.Image, int], np.ndarray]] = MappingProxyType(
    {"square": central_square, "torchvision": central_square_bilinear, "caffe": stretched}
)
