"""Decoding: from the bytes of a picture to a square, for `prepare`, which stores ImageNet, and for eval.py --images.

Imports no JAX: many processes run this, and each would pay for it.
"""

import io
import os
import pathlib
import re
import warnings
from collections.abc import Callable

import msgpack
import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageChops
import PIL.ImageOps
import PIL.ImagePalette

# By content: ImageNet has a PNG that is named .JPEG. Pillow reads AVIF from 11.3 on, where it was built with the codec.
_AVIF = ("AVIF",) if "avif" in PIL.features.modules and PIL.features.check("avif") else ()
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", *_AVIF)
# Of pictures, also of kinds that can't be read here: a file of such a name is reported, not ignored.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "bmp", "dib", "gif", "webp", "tif", "tiff", "avif"),
        *("ppm", "pgm", "pbm", "pnm", "pfm", "heic", "heif", "hif", "jxl", "jp2", "j2k", "jpx", "psd", "svg"),
        *("tga", "ico", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
    )
)
JPEG_QUALITY = 95
MAX_BYTES = 512 * 1024**2  # of a file that is read as a picture
_HEAD = 64  # bytes that `kind` looks at
_KINDS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM....\0\0\0\0",
    "WEBP": rb"RIFF....WEBP",
    "camera raw": rb"II\*\0....CR|IIU\0|IIRO|IIRS|MMOR|FUJIFILMCCD-RAW",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6f]\s+[#\d]",
    "PAM": rb"P7\s",
    "colour PFM": rb"PF\s+\d",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "OpenEXR": rb"v/1\x01",
    "Radiance": rb"#\?R",
    "QOI": rb"qoif",
    "icon": rb"\0\0\x01\0",
}
_LITTER = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("__macosx", "icon\r", "@eadir", "#recycle", "@recycle", "lost+found", "__pycache__"),
    )
)


class PictureError(Exception):
    """A file is no picture that can be used; the message says why, in one line."""


def is_litter(name: str) -> bool:
    """Whether a system left a file or folder of this name, not the user: hidden ones, `Thumbs.db`, `@eaDir` .."""
    return name.startswith(".") or name.lower() in _LITTER


def files_in(folder: pathlib.Path, onerror: Callable[[OSError], object]) -> list[pathlib.Path]:
    """All files in a folder and its subfolders in the order of their paths, without litter.

    Symbolic links are followed, except to a folder that holds the link. A folder that is reached twice is read once.

    Args:
      folder: to be listed.
      onerror: called with the error of each folder that can't be listed.
    """
    found: list[pathlib.Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=onerror):
        entered = []
        for name in sorted(folders):
            inner = pathlib.Path(here, name)
            if not is_litter(name) and not is_loop(inner) and (place := os.path.realpath(inner)) not in seen:
                seen.add(place)
                entered.append(name)
        folders[:] = entered
        found += [pathlib.Path(here, name) for name in names if not is_litter(name)]
    return sorted(found, key=lambda path: path.parts)


def is_loop(folder: pathlib.Path) -> bool:
    """Whether a folder is a link to one that holds it."""
    return pathlib.Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder))


def kind(head: bytes) -> str | None:
    """What the first bytes of a file (64 are enough) say that it is: "JPEG", "HEIC" ..; None: no known picture."""
    if head[4:8] == b"ftyp":  # a container of pictures or of videos, which its brands tell apart
        brands = {head[i : i + 4] for i in (8, *range(16, min(len(head), int.from_bytes(head[:4])), 4))}
        for name, known in (("AVIF", b"avif avis"), ("HEIC", b"heic heix heim heis hevc hevx mif1 msf1")):
            if brands & set(known.split()):
                return name
        return "camera raw" if b"crx " in brands else None
    return next((name for name, signature in _KINDS.items() if re.match(signature, head, re.DOTALL)), None)


def looks_like_picture(path: pathlib.Path) -> bool:
    """Whether a file is a picture by its suffix or by its first bytes, also of a kind that can't be read here."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if not path.is_file():  # a pipe would wait for a writer
        return False
    try:
        with path.open("rb") as file:
            return kind(file.read(_HEAD)) is not None
    except OSError:
        return True  # reading it will say what is wrong


def decode(data: bytes, as_seen: bool = False) -> PIL.Image.Image:
    """A picture in RGB, 8 bits a channel, whatever the file's name says that it is; the first frame or page of several.

    Greyscale is repeated, CMYK converted (inverted where an Adobe marker says so). An alpha channel is dropped, and a
    note of the camera (EXIF) that the picture should be turned is ignored, as other programs that prepare ImageNet do.

    Of more than 8 bits the upper 8 of the range that the file states are taken: of all 16 bits, of the 12 in TIFF's
    BitsPerSample, of 2^n - 1 in TIFF's MaxSampleValue, of the largest value in a PPM's header. PNG's sBIT states a
    range if it says 16 for every channel; else it changes nothing, as the format scales such values to all 16 bits.
    What can't be told is refused: floating point, signed and
    32-bit numbers, which have no range of their own, and 16 bits of which the upper two are never used, as they may be
    10, 12 or 14 bits of a sensor. A picture that is all 0 is black in any range.

    Args:
      data: the file's contents.
      as_seen: turn the picture as its EXIF note says and lay it on white where it is transparent, as viewers do.

    Raises:
      PictureError: none of FORMATS, a truncated one, one whose range can't be told, or more than twice
        `PIL.Image.MAX_IMAGE_PIXELS` (179 million).
    """
    if not data:
        raise PictureError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF blocks and large pictures
            image: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            container = image.format  # a copy has none
            bits, stated = _stored_bits(image)
            stated = stated or (container == "PNG" and _states_16_bits(data))
            if container == "PNG" and "transparency" in image.info:
                image.info["transparency"] = _transparent_level(image)
            if container == "TIFF" and image.mode in ("P", "PA"):
                colours = image.tag_v2[320]  # type: ignore[attr-defined]  # ColorMap
                if max(colours) < 256:  # 8 bits, as libtiff takes it, though the format has 16
                    image.palette = PIL.ImagePalette.raw("RGB;L", bytes(colours))
            inverted = container == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]  # WhiteIsZero
            image.load()
            if as_seen:
                image = PIL.ImageOps.exif_transpose(image)
            if bits > 8:
                image = _upper_eight_bits(image, bits, stated, inverted)
            if image.mode == "P":
                image = image.convert("RGBA")
            if image.mode == "La":
                image = image.convert("LA")
            if image.mode == "CMYK" and container in ("JPEG", "MPO") and "adobe" not in image.info:
                image = PIL.ImageChops.invert(image)  # Pillow takes every CMYK JPEG for one of Adobe's
            if as_seen and image.has_transparency_data:
                layer = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
            return image.convert("RGB")
    except (MemoryError, PictureError):
        raise  # memory: the machine's fault
    except Exception as error:  # Pillow's readers raise errors of many kinds
        found = kind(data[:_HEAD])
        if found is None:
            reason = f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        elif found not in FORMATS:
            reason = f"{found} pictures can't be read here: convert them to JPEG"
        elif isinstance(error, PIL.Image.DecompressionBombError) and (number := re.search("[0-9]+", str(error))):
            most = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
            reason = f"it has {int(number[0]):,} pixels, more than {most:,}: scale it down"
        elif isinstance(error, PIL.UnidentifiedImageError):
            reason = f"it is a damaged {found}, or of a kind that can't be read here: convert it to 8 bits a channel"
        else:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PictureError(reason) from error


def _stored_bits(image: PIL.Image.Image) -> tuple[int, bool]:
    """How many bits a channel has, and whether the file states it beyond the type in which they are stored.

    Args:
      image: opened, not loaded: loading forgets how it is stored.

    Raises:
      PictureError: the range can't be told, or Pillow would read something else than what is stored.
    """
    coding, _, _, args = image.tile[0] if getattr(image, "tile", None) else ("", None, 0, "")  # type: ignore[attr-defined]
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, types, most = max(tags.get(258, (1,))), set(tags.get(339, (1,))), max(tags.get(281, (0,)))
        if tags.get(254, 0) & 1 or 50706 in tags:  # NewSubfileType, DNGVersion
            raise PictureError("its first page is a preview, as in a camera's raw file: convert it to JPEG")
        if types != {1} or bits > 16:
            type_ = "floating point" if 3 in types else "signed" if 2 in types else f"{bits}-bit"
            raise PictureError(f"the range of its {type_} numbers can't be told: convert it to 8 bits a channel")
        if tags.get(284) == 2 and bits != 8 and coding == "raw":  # Pillow reads planes as if they had 8 bits
            raise PictureError(f"{bits} bits in separate planes can't be read: convert it to 8 bits a channel")
        if image.mode == "YCbCr" and (
            tags.get(530, (1, 1)) != (1, 1) or [*map(int, tags.get(532, ()))] not in ([], [0, 255, 128, 255, 128, 255])
        ):
            raise PictureError("this kind of YCbCr can't be read: convert it to RGB")
        if bits == 16 and 255 < most < 65535 and (most & (most + 1)) == 0:  # 2^n - 1
            return int(most).bit_length(), True
        return bits, bits == 12
    if image.mode == "F":
        raise PictureError("the range of its floating point numbers can't be told: convert it to 8 bits a channel")
    if image.format == "PPM":  # Pillow scales what has another largest value to 8 or 16 bits
        most = args[1] if isinstance(args, tuple) else 65535 if "16" in args else 255
        return (16 if most > 255 else 8), most != 65535
    return (16 if image.format == "PNG" and ";16" in args else 8), False


def _states_16_bits(png: bytes) -> bool:
    """Whether a PNG's sBIT, a chunk before the pixels, says that all 16 bits of every channel are used."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(png[25], 0)  # by the colour type
    start = 8
    while (name := png[start + 4 : start + 8]) not in (b"sBIT", b"IDAT", b""):
        start += 12 + int.from_bytes(png[start : start + 4])
    length = int.from_bytes(png[start : start + 4])
    return name == b"sBIT" and png[start + 8 : start + 8 + length] == b"\x10" * channels


def _transparent_level(image: PIL.Image.Image) -> object:
    """The level or colour that a PNG says is transparent, scaled as Pillow scales the pixels."""
    level, stored = image.info["transparency"], image.tile[0][3]  # type: ignore[attr-defined]
    if stored in ("L;2", "L;4"):
        return level * {"L;2": 85, "L;4": 17}[stored]
    return tuple(value >> 8 for value in level) if stored == "RGB;16B" else level


def _upper_eight_bits(image: PIL.Image.Image, bits: int, stated: bool, inverted: bool) -> PIL.Image.Image:
    """Greyscale of 9 to 16 bits cut to the upper 8; colours, which Pillow has cut so, checked for their range."""
    levels = np.asarray(image)
    grey = image.mode.startswith("I")
    if not grey and image.mode.endswith(("A", "a")):
        levels = levels[..., :-1]
    largest = int(levels.max()) << (0 if grey else 8)
    if not grey and bits != 16:  # of these 8 bits the upper are empty
        raise PictureError(f"{bits}-bit colours stored in 16 bits can't be read: convert it to 8 bits a channel")
    if largest >> bits:
        raise PictureError(f"it has values above the {bits} bits that it states: convert it to 8 bits a channel")
    if not stated and 0 < largest < 1 << (bits - 2):
        raise PictureError(
            f"it stores {bits} bits a channel and uses less than a quarter of their range, so they may be fewer: "
            "convert it to 8 bits a channel"
        )
    if not grey:
        return image
    levels = levels.astype(np.uint16)  # a copy in this machine's byte order
    scaled = PIL.Image.fromarray(((levels ^ ((1 << bits) - 1 if inverted else 0)) >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(PIL.Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


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
      name: of the file, to show.
      store: "jpeg" (quality 95, colours at full resolution) or "raw".
    """
    image = pixels.tobytes()
    if store == "jpeg":
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        image = buffer.getvalue()
    text = name.encode(errors="backslashreplace").decode()  # some names of files are no UTF-8
    return msgpack.packb({"image": image, "label": label, "name": text})


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
