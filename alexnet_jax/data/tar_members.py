"""Members of a tar file, found without extracting them."""

import pathlib
import re
import tarfile
from typing import BinaryIO

from alexnet_jax.data.image_files import is_system_file
from alexnet_jax.errors import AlexNetError, shown

_COMPRESSED = re.compile(rb"\x1f\x8b|BZh.1AY&SY|\xfd7zXZ\0|PK\x03\x04|\x28\xb5\x2f\xfd")  # gz, bz2, xz, zip, zst


def tar_members(file: BinaryIO, path: pathlib.Path, start: int, end: int) -> list[tarfile.TarInfo]:
    """The files of the tar in bytes [start, end) of a file, sorted; their offsets count from the file's beginning.

    Raises:
      AlexNetError: the tar is damaged, compressed, or contains a file twice or anything other than files.
    """
    refuse_compressed(file, start, f"{path}: it")
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise AlexNetError(f"{path}: can't be read ({error})") from error
    # tarfile takes a damaged member, and a cut between two members, for the end.
    blocks = -(-members[-1].size // tarfile.BLOCKSIZE) if members else 0
    file.seek(members[-1].offset_data + blocks * tarfile.BLOCKSIZE if members else start)
    if file.read(2 * tarfile.BLOCKSIZE) != tarfile.NUL * 2 * tarfile.BLOCKSIZE or file.tell() > end:
        after = f"after {shown(members[-1].name)}" if members else "at its beginning"
        raise AlexNetError(f"{path}: the tar is damaged or was cut off {after}")
    found: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if member.isdir() or any(map(is_system_file, pathlib.PurePosixPath(member.name).parts)):
            continue
        if not member.isreg() or member.issparse():
            raise AlexNetError(f"{path}: {shown(member.name)} in it is not a regular file, but a link or the like")
        if found.setdefault(member.name, member) is not member:
            raise AlexNetError(f"{path}: contains {shown(member.name)} twice")
    return [found[name] for name in sorted(found)]


def refuse_compressed(file: BinaryIO, start: int, what: str) -> None:
    """Raises AlexNetError, with a message that begins with `what`, if the bytes from `start` on are compressed."""
    file.seek(start)
    if _COMPRESSED.match(file.read(10)):
        raise AlexNetError(f"{what} is compressed: decompress it first")
