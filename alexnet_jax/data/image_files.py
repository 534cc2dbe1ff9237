"""Image files: which files of a folder are images, by their names and by their first bytes.

Does not import JAX, because every process that prepares images would have to wait for it.
"""

import errno
import os
import pathlib
import re
from collections.abc import Callable

# Includes formats that can't be decoded here: such a file is reported, not ignored.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "bmp", "dib", "gif", "webp", "tif", "tiff", "avif"),
        *("ppm", "pgm", "pbm", "pnm", "pfm", "heic", "heif", "hif", "jxl", "jp2", "j2k", "jpx", "psd", "svg"),
        *("tga", "ico", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
    )
)
HEAD_BYTES = 64  # that `image_format` looks at
_SIGNATURES = {
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
_SYSTEM_NAMES = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("__macosx", "icon\r", "@eadir", "#recycle", "@recycle", "lost+found", "__pycache__"),
    )
)


def is_system_file(name: str) -> bool:
    """Whether the name is that of a hidden file or folder, or of one that systems create: `Thumbs.db`, `@eaDir`."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def files_in(folder: pathlib.Path, onerror: Callable[[OSError], object]) -> list[pathlib.Path]:
    """All files in a folder and its subfolders, sorted by path, without system files.

    Follows symbolic links, except to a folder that contains the link. A folder that is reached twice is read once.

    Args:
      folder: the folder to list.
      onerror: called with the error of each folder that can't be listed.
    """
    found: list[pathlib.Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=onerror):
        entered = []
        for name in sorted(folders):
            inner = pathlib.Path(here, name)
            if not is_system_file(name) and not is_loop(inner) and (real := os.path.realpath(inner)) not in seen:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        found += [pathlib.Path(here, name) for name in names if not is_system_file(name)]
    return sorted(found, key=lambda path: path.parts)


def is_loop(folder: pathlib.Path) -> bool:
    """Whether a folder is a symbolic link to one that contains it."""
    return pathlib.Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder))


def image_format(head: bytes) -> str | None:
    """The image format that a file's first `HEAD_BYTES` bytes indicate ("JPEG", "HEIC"); None for anything else."""
    if head[4:8] == b"ftyp":  # a container of images or of videos; its brands tell which
        brands = {head[i : i + 4] for i in (8, *range(16, min(len(head), int.from_bytes(head[:4])), 4))}
        for name, known in (("AVIF", b"avif avis"), ("HEIC", b"heic heix heim heis hevc hevx mif1 msf1")):
            if brands & set(known.split()):
                return name
        return "camera raw" if b"crx " in brands else None
    return next((name for name, signature in _SIGNATURES.items() if re.match(signature, head, re.DOTALL)), None)


def looks_like_image(path: pathlib.Path) -> bool:
    """Whether a file's suffix or first bytes are those of an image, even of a format that can't be decoded here."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if not path.is_file():  # a pipe would wait for a writer
        return False
    try:
        with path.open("rb") as file:
            return image_format(file.read(HEAD_BYTES)) is not None
    except OSError:
        return True  # decoding it will report the error


def is_of_the_file(error: Exception) -> bool:
    """Whether a file that can't be read is to blame itself, not the disk, the network or the process (EIO, EMFILE)."""
    lasting = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return not isinstance(error, OSError) or error.errno in lasting
