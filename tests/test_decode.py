"""Images of unusual kinds: each is decoded correctly, or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from alexnet_jax.data import decode

ROWS, COLUMNS = np.mgrid[0:16, 0:32]
GREY = (ROWS * 8 + COLUMNS * 4).clip(0, 255).astype(np.uint8)
COLOURS = np.stack([GREY, 255 - GREY, (COLUMNS * 8).astype(np.uint8)], -1)
GREY16, COLOURS16 = GREY.astype(np.uint16) * 257, COLOURS.astype(np.uint16) * 257
GREY12, COLOURS12 = ((x.astype(np.uint32) * 4095 // 255).astype(np.uint16) for x in (GREY, COLOURS))
OPAQUE16 = np.full((16, 32, 1), 65535, np.uint16)
SHORT, LONG = 3, 4  # types of TIFF's tags
WHITE, FORMAT, SUBFILE, LARGEST, PLANES, ALPHA = 262, 339, 254, 281, 284, 338


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(levels: np.ndarray, colour_type: int, bits: int = 16, *more: bytes) -> bytes:
    """A PNG of any depth; `levels` of fewer than 8 bits are packed."""
    height, width = levels.shape[0], levels.shape[1] * 8 // bits if bits < 8 else levels.shape[1]
    rows = levels.astype(">u2" if bits == 16 else np.uint8)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(levels: np.ndarray, order: str = "<", bits: int = 0, **tags: int | tuple[int, ...]) -> bytes:
    """An uncompressed TIFF; `bits` of a greyscale sample if levels are packed; more tags by the names above."""
    channels = levels.shape[2] if levels.ndim == 3 else 1
    data = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[int, ...]] = {
        **{256: (32,), 257: (16,), 258: (bits or levels.dtype.itemsize * 8,) * channels, 259: (1,)},
        **{
            WHITE: (1 if channels < 3 else 2,),
            273: (0,),
            277: (channels,),
            278: (16,),
            279: (len(data),),
            PLANES: (1,),
        },
        FORMAT: ({"u": 1, "i": 2, "f": 3}[levels.dtype.kind],) * channels,
    }
    entries |= {globals()[name]: value if isinstance(value, tuple) else (value,) for name, value in tags.items()}
    table, extra, begin = b"", b"", 8 + 2 + 12 * len(entries) + 4
    size = sum(4 * len(values) for values in entries.values() if len(values) > 1)
    for tag, values in sorted((entries | {273: (begin + size,)}).items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        table += struct.pack(f"{order}HHI", tag, LONG, len(values))
        table += packed if len(values) == 1 else struct.pack(f"{order}I", begin + len(extra))
        extra += packed if len(values) > 1 else b""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return start + table + struct.pack(f"{order}I", 0) + extra + data


def colour_map(scale: int) -> bytes:
    """A TIFF whose palette holds 8-bit colours times `scale`, for levels 0 to 15."""
    image = PIL.Image.fromarray(GREY // 16)
    image.putpalette(MAP.tobytes())
    data = saved(image, "TIFF")
    stored = np.zeros((3, 256), "<u2")
    stored[:, :16] = MAP.T
    assert data.count((stored * 256).tobytes()) == 1
    return data.replace((stored * 256).tobytes(), (stored * scale).tobytes())


def pnm(head: str, levels: np.ndarray) -> bytes:
    return head.encode() + levels.tobytes()


def saved(image: PIL.Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def packed12(levels: np.ndarray) -> np.ndarray:
    first, second = levels[:, 0::2].astype(int), levels[:, 1::2].astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).reshape(16, -1).astype(np.uint8)


def lab() -> PIL.Image.Image:
    neutral = PIL.Image.new("L", (32, 16), 128)
    return PIL.Image.merge("LAB", [PIL.Image.new("L", (32, 16), 255), neutral, neutral])


MAP = np.random.default_rng(1).integers(0, 256, (16, 3)).astype(np.uint8)
PALETTE = PIL.Image.fromarray(GREY // 32 * 32).convert("P")
SIGNIFICANT = chunk(b"sBIT", b"\x10")  # 16 bits of each level
FLOATS = (GREY / 255).astype(np.float32)
READ = {
    "png16": (png(GREY16, 0), GREY),
    "png16 black": (png(GREY16 * 0, 0), GREY * 0),
    "png16 sBIT": (png(GREY16, 0, 16, chunk(b"sBIT", b"\x0c")), GREY),
    "png16 sBIT, dark": (png(GREY16 // 16, 0, 16, chunk(b"gAMA", b"\0\0\xb1\x8f"), SIGNIFICANT), GREY // 16),
    "png16 sBIT, dark RGB": (png(COLOURS16 // 16, 2, 16, chunk(b"sBIT", b"\x10" * 3)), COLOURS // 16),
    "png16 sBIT, dark LA": (png(np.dstack([GREY16 // 16, OPAQUE16]), 4, 16, chunk(b"sBIT", b"\x10\x10")), GREY // 16),
    "png16 RGB": (png(COLOURS16, 2), COLOURS),
    "png16 LA": (png(np.dstack([GREY16, OPAQUE16]), 4), GREY),
    "png16 RGBA": (png(np.dstack([COLOURS16, OPAQUE16]), 6), COLOURS),
    "png1": (png(np.packbits(GREY > 99, axis=1), 0, 1), (GREY > 99) * np.uint8(255)),
    "tiff16": (tiff(GREY16), GREY),
    "tiff16 big endian": (tiff(GREY16, ">"), GREY),
    "tiff16 white is 0": (tiff(65535 - GREY16, WHITE=0), GREY),
    "tiff16 deflate, white is 0": (saved(65535 - GREY16, "TIFF", compression="tiff_deflate", tiffinfo={262: 0}), GREY),
    "tiff16 that declares 12": (tiff(GREY12, LARGEST=4095), GREY),
    "tiff16 that declares 12, white is 0": (tiff(4095 - GREY12, LARGEST=4095, WHITE=0), GREY),
    "tiff12": (tiff(packed12(GREY12), bits=12), GREY),
    "tiff16 RGB": (tiff(COLOURS16), COLOURS),
    "tiff16 RGB big endian": (tiff(COLOURS16, ">"), COLOURS),
    "tiff16 RGBA": (tiff(np.dstack([COLOURS16, OPAQUE16]), ALPHA=2), COLOURS),
    "tiff16 CMYK": (tiff(np.dstack([65535 - COLOURS16, OPAQUE16 * 0]), WHITE=5), COLOURS),
    "tiff8 CMYK": (tiff(np.dstack([255 - COLOURS, GREY[..., None] * 0]), WHITE=5), COLOURS),
    "tiff8 white is 0": (tiff(255 - GREY, WHITE=0), GREY),
    "tiff8 La": (tiff(np.dstack([GREY, GREY * 0 + 255]), ALPHA=1), GREY),
    "tiff8 YCbCr": (saved(PIL.Image.fromarray(COLOURS).convert("YCbCr"), "TIFF"), COLOURS),
    "tiff8 LAB": (saved(lab(), "TIFF"), GREY * 0 + 255),
    **{f"tiff palette times {scale}": (colour_map(scale), MAP[GREY // 16]) for scale in (1, 256, 257)},
    "tiff black palette": (colour_map(0), COLOURS * 0),
    "tiff pages": (saved(COLOURS, "TIFF", save_all=True, append_images=[PIL.Image.new("RGB", (9, 9))]), COLOURS),
    "gif frames": (saved(PALETTE, "GIF", save_all=True, append_images=[PIL.Image.new("P", (32, 16))]), GREY // 32 * 32),
    "webp frames": (
        saved(COLOURS, "WEBP", lossless=True, save_all=True, append_images=[PIL.Image.new("RGB", (32, 16))]),
        COLOURS,
    ),
    "ppm": (saved(COLOURS, "PPM"), COLOURS),
    "pgm to 100": (pnm("P5\n32 16\n100\n", (GREY.astype(int) * 100 // 255).astype(np.uint8)), GREY),
    "pgm12": (pnm("P5\n32 16\n4095\n", GREY12.astype(">u2")), GREY),
    "pgm12 dark": (pnm("P5\n32 16\n4095\n", (GREY12 // 8).astype(">u2")), GREY // 8),
    "pgm16": (pnm("P5\n32 16\n65535\n", GREY16.astype(">u2")), GREY),
    "ppm16": (pnm("P6\n32 16\n65535\n", COLOURS16.astype(">u2")), COLOURS),
    "ppm12": (pnm("P6\n32 16\n4095\n", COLOURS12.astype(">u2")), COLOURS),
    "pgm text": (b"P2\n32 16\n65535\n" + b" ".join(b"%d" % level for level in GREY16.ravel()) + b"\n", GREY),
}


@pytest.mark.parametrize("name", READ)
def test_unusual_kinds_are_decoded_correctly(name):
    data, expected = READ[name]
    expected = np.repeat(expected[..., None], 3, axis=2) if expected.ndim == 2 else expected
    tolerance = 3 if name in ("tiff8 YCbCr", "pgm to 100") else 1  # colours converted twice, 100 levels
    for as_seen in (False, True):
        got = np.asarray(decode.decode(data, as_seen))
        np.testing.assert_allclose(got.astype(int), expected, atol=tolerance)


FLOATING, SIGNED, FEWER = "range of its floating point", "range of its signed numbers", "may be fewer"
REFUSED = {
    "float 0 to 1": (tiff(FLOATS), FLOATING),
    "float 0 to 255": (tiff(FLOATS * 255), FLOATING),
    "float negative": (tiff(FLOATS - 0.5), FLOATING),
    "float NaN": (tiff(FLOATS * np.float32("nan")), FLOATING),
    "float infinity": (tiff(FLOATS + np.float32("inf")), FLOATING),
    "float deflate": (saved(FLOATS, "TIFF", compression="tiff_deflate"), FLOATING),
    "float64": (tiff(FLOATS.astype(np.float64)), "damaged TIFF, or a kind of it that can't be decoded"),
    "float RGB": (tiff((COLOURS / 255).astype(np.float32)), "damaged TIFF, or a kind of it that can't be decoded"),
    "float PFM": (pnm("Pf\n32 16\n-1.0\n", FLOATS), FLOATING),
    "int8": (tiff((GREY // 2).astype(np.int8)), SIGNED),
    "int16": (tiff(GREY16.astype(np.int16)), SIGNED),
    "int16 big endian": (tiff(GREY16.astype(np.int16), ">"), SIGNED),
    "int32": (tiff(GREY.astype(np.int32) << 23), SIGNED),
    "uint32": (tiff(GREY16.astype(np.uint32) * 65537), "range of its 32-bit"),
    "png12 in 16": (png(GREY12, 0), FEWER),
    "png8 in 16": (png(GREY, 0), FEWER),
    "png14 in 16": (png(GREY12 << 2, 0), FEWER),
    "png12 in 16, sBIT": (png(GREY12, 0, 16, chunk(b"sBIT", b"\x0c")), FEWER),
    "png12 in 16, sBIT of one channel": (png(COLOURS12, 2, 16, SIGNIFICANT), FEWER),
    "png12 in 16, sBIT of 16, 16, 12": (png(COLOURS12, 2, 16, chunk(b"sBIT", b"\x10\x10\x0c")), FEWER),
    "png12 in 16, sBIT in a text": (png(GREY12, 0, 16, chunk(b"tEXt", b"a\0" + SIGNIFICANT)), FEWER),
    "200 megapixels": (
        pnm("P5\n20000 10000\n255\n", GREY),
        "it has 200,000,000 pixels, more than 178,956,970: scale it down",
    ),
    "200 megapixels, BMP": (
        saved(GREY, "BMP").replace(struct.pack("<II", 32, 16), struct.pack("<II", 20000, 10000)),
        "it has 200,000,000 pixels, more than 178,956,970: scale it down",
    ),
    "png12 in 16 RGB": (png(COLOURS12, 2), FEWER),
    "png12 in 16 LA": (png(np.dstack([GREY12, OPAQUE16]), 4), FEWER),
    "tiff12 in 16": (tiff(GREY12), FEWER),
    "tiff12 in 16, largest value": (tiff(GREY12, LARGEST=3000), FEWER),
    "tiff12 in 16 RGB": (tiff(COLOURS12), FEWER),
    "tiff12 in 16 RGB that declares it": (tiff(COLOURS12, LARGEST=(4095,) * 3), "12-bit colours"),
    "tiff16 above what it declares": (tiff(GREY16, LARGEST=4095), "values above the 12 bits"),
    "tiff16 in planes": (tiff(COLOURS16, PLANES=2), "separate planes"),
    "pgm12 in 16": (pnm("P5\n32 16\n65535\n", GREY12.astype(">u2")), FEWER),
    "preview of a raw file": (tiff(COLOURS, SUBFILE=1), "first page is a preview"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported: convert it to JPEG"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not supported"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0mp42isom", "not a JPEG, PNG"),
    "text": (b"P3 is a processor", "not a JPEG, PNG"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("as_seen", [False, True])
def test_unknown_ranges_are_refused(name, as_seen):
    data, reason = REFUSED[name]
    with pytest.raises(decode.ImageError, match=reason) as caught:
        decode.decode(data, as_seen)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("AVIF" not in decode.FORMATS, reason="this Pillow has no AVIF codec")
def test_avif():
    got = np.asarray(decode.decode(saved(COLOURS, "AVIF", quality=95)))
    assert np.abs(got.astype(int) - COLOURS).mean() < 4


@pytest.mark.parametrize(
    ("data", "clear"),
    [
        (png(GREY16, 0, 16, chunk(b"tRNS", struct.pack(">H", GREY16[8, 8]))), np.equal(GREY, GREY[8, 8])),
        (png(COLOURS16, 2, 16, chunk(b"tRNS", struct.pack(">3H", *map(int, COLOURS16[8, 8])))), None),
        (png(np.full((16, 16), 0x0F, np.uint8), 0, 4, chunk(b"tRNS", b"\0\0")), COLUMNS % 2 == 0),
        (png(np.full((16, 16), 0x0A, np.uint8), 0, 4, chunk(b"tRNS", b"\0\x0a")), COLUMNS % 2 == 1),
        (png(np.full((16, 8), 0b00100010, np.uint8), 0, 2, chunk(b"tRNS", b"\0\2")), COLUMNS % 2 == 1),
    ],
    ids=["grey 16", "RGB 16", "black 4", "grey 4", "grey 2"],
)
def test_a_transparent_level_is_white_at_any_depth(data, clear):
    clear = np.equal(COLOURS, COLOURS[8, 8]).all(axis=2) if clear is None else clear
    seen, plain = (np.asarray(decode.decode(data, as_seen)) for as_seen in (True, False))
    np.testing.assert_array_equal((seen == 255).all(axis=2), clear | (plain == 255).all(axis=2))
    np.testing.assert_array_equal(seen[~clear], plain[~clear])


def test_the_central_square_is_scaled():
    """As scaling the shorter side and cropping, in two steps, except for rounding."""
    noise = np.random.default_rng(1).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    image = PIL.Image.fromarray(noise).resize((500, 375), PIL.Image.Resampling.BILINEAR)
    scaled = np.asarray(image.resize((341, 256), PIL.Image.Resampling.BICUBIC))[:, 42:298].astype(int)
    square = decode.central_square(image, 256)
    assert (square.shape, square.dtype) == ((256, 256, 3), np.uint8)
    assert np.abs(scaled - square).mean() < 1


@pytest.mark.parametrize("size", [(1, 1), (9000, 30), (3, 4000)])
def test_any_aspect_ratio_gives_a_square(size):
    square = decode.central_square(PIL.Image.new("RGB", size, (200, 100, 50)), 16)
    np.testing.assert_array_equal(square, np.full((16, 16, 3), (200, 100, 50)))
