"""Bytes of a file that may be gzipped, whatever its name: no more of them than its header promises."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

from zlib_ng import zlib_ng

GZIP = b"\x1f\x8b"
MAX_RATIO = 1032
"""Most that deflate can compress: a file of n bytes unpacks to 1032 n bytes at most."""
SLACK = 2**22
"""Bytes behind the last voxel that are passed over: padding, FreeSurfer's tables of colours."""
GZIP_WINDOW = 31
"""For zlib: the largest window, in gzip's own format."""


def is_gzipped(path: Path) -> bool:
    """Whether its content begins as gzip does."""
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes, unpacked; fewer where the file is shorter."""
    if not is_gzipped(path):
        with path.open("rb") as file:
            return file.read(size)
    with gzip.open(path) as packed:
        return packed.read(size)


def check_size(path: Path, promised: int) -> None:
    """Compare what a header promises with the size of the file, before anything is allocated.

    Args:
        path: of the file.
        promised: bytes from the beginning of the content to the last voxel.

    Raises:
        EOFError: it cannot hold so much.
    """
    size = path.stat().st_size
    if is_gzipped(path):
        size *= MAX_RATIO
    if promised > size:
        raise EOFError(f"its header promises {promised} bytes, it holds {size} at most")


def unpack(path: Path, promised: int) -> io.BytesIO:
    """The content of a gzipped file, its checksums compared.

    Args:
        path: of the file.
        promised: as for `check_size`.

    Raises:
        EOFError: it ends before the last voxel.
        ValueError: it unpacks to more than was promised, or something else follows.
        zlib_ng.error: damaged.
    """
    check_size(path, promised)
    packed, limit, parts, size = path.read_bytes(), promised + SLACK, [], 0
    while packed:
        if not packed.startswith(GZIP):
            raise ValueError("something that is not gzip follows the volume")
        member = zlib_ng.decompressobj(GZIP_WINDOW)
        parts.append(member.decompress(packed, limit - size + 1))
        size += len(parts[-1])
        if size > limit:
            raise ValueError(f"it unpacks to more than the {promised} bytes that its header promises")
        if not member.eof:
            raise EOFError("its gzip stream ended before the end")
        packed = member.unused_data.lstrip(b"\0")
    if size < promised:
        raise EOFError(f"its header promises {promised} bytes, {size} found")
    return io.BytesIO(parts[0] if len(parts) == 1 else b"".join(parts))
