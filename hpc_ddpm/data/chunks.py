"""The volumes of an open shard, past HDF5's filters: one read, one decode into the caller's buffer, one CRC-32.

HDF5 itself decodes under one lock, into memory of its own, and adds a slow checksum. Here threads read at the same
time: reading, decoding and checking all release the GIL. What the kernel already holds in its page cache is not read
but taken from a memory map, which is faster; what it has to fetch is read, which is faster and fails with an error
instead of a signal (docs/benchmarks/data.md).

A shard must keep its bytes while it is open: one that is cut or overwritten in place under the map ends the process
with SIGBUS. A shard that is replaced by another file (rename) is safe, and so is one that is deleted.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import dataclass
from typing import Any

import cramjam
import h5py
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

FLETCHER32, LZ4, ZSTD = 3, 32004, 32015
FLETCHER32_BYTES = 4
READ_BYTES = 1 << 18
"""Asked for at once. Linux reads ahead of many small reads, but not of one large one (docs/benchmarks/data.md)."""
MAPPED_BYTES = 1 << 22
"""Checked and copied at once from a memory map."""
MADV_POPULATE_READ = 22
"""Linux 5.14: fill in the map's page table now. A page that cannot be had is an OSError, not a SIGBUS at its use."""
VOLUMES = ("image", "mask")
UNDECODABLE = (OSError, ValueError, KeyError, RuntimeError, struct.error, cramjam.DecompressionError)

_thread = threading.local()


def crc32(volume: NDArray[Any]) -> int:
    """CRC-32 of a C-contiguous array's bytes, the one of zlib, gzip and PNG."""
    return zlib_ng.crc32(volume.data)


class OpenShard:
    """One shard, open in this process for all its threads; it closes when nobody holds it any more."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self._descriptor: int = file.id.get_vfd_handle()
        self._layout = {name: _Layout.of(file[name]) for name in VOLUMES}

    def read(self, name: str, row: int, out: NDArray[Any]) -> list[int]:
        """Fill `out` with a row of image or mask; the CRC-32 of each of its volumes.

        Args:
            name: image or mask.
            row: of the shard.
            out: C-contiguous, of the row's shape and dtype.

        Raises:
            UNDECODABLE: what is stored cannot be decoded to this shape and dtype.
        """
        layout, chunks = self._layout[name], self.file[name].id
        volumes = out if name == "image" else out[None]
        if not layout.is_whole:
            self.file[name].read_direct(out, np.s_[row])
            return [crc32(volume) for volume in volumes]
        if (volumes.shape[1:], out.dtype) != (layout.shape, layout.dtype):
            raise ValueError(f"{volumes.shape[1:]} {out.dtype} wanted, {layout.shape} {layout.dtype} stored")
        checksums = []
        for channel, volume in enumerate(volumes):
            where = (row, channel, 0, 0, 0) if name == "image" else (row, 0, 0, 0)
            stored = chunks.get_chunk_info_by_coord(where)
            if stored.byte_offset is None:
                raise ValueError("nothing stored")
            filters = [code for i, code in enumerate(layout.filters) if not stored.filter_mask >> i & 1]
            checksums.append(self._decode(stored.byte_offset, stored.size, filters, memoryview(volume).cast("B")))
        return checksums

    def _decode(self, offset: int, size: int, filters: list[int], out: memoryview) -> int:
        """One chunk; its CRC-32. Its Fletcher-32, at the end, is not looked at: the CRC-32 is of what was decoded."""
        if filters[-1:] == [FLETCHER32]:
            filters, size = filters[:-1], size - FLETCHER32_BYTES
        if not filters and len(out) != size:
            raise ValueError("wrong size")
        data = self._map(offset, size)
        if data and not filters:
            return _copy(data, out)
        data = data or self._read(offset, _scratch(size) if filters else out)
        if filters == [LZ4]:
            _decode_lz4(data, out)
        elif filters == [ZSTD]:
            if cramjam.zstd.decompress_into(data, out) != len(out):
                raise ValueError("wrong size")
        elif filters:
            raise ValueError(f"HDF5 filters {filters} are not of this format")
        return zlib_ng.crc32(out)

    def _read(self, offset: int, out: memoryview) -> memoryview:
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done : done + READ_BYTES]], offset + done)
            if not count:
                raise ValueError("wrong size")
            done += count
        return out

    def _map(self, offset: int, size: int) -> memoryview | None:
        """A part of the file, without a copy; None if it is not in the page cache or nobody can tell."""
        if not (_is_cached(self._descriptor, offset) and _is_cached(self._descriptor, offset + size - 1)):
            return None
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._descriptor, skipped + size, access=mmap.ACCESS_READ, offset=offset - skipped)
        try:
            mapped.madvise(MADV_POPULATE_READ)
        except OSError:
            return None  # an older kernel; or a page is lost, which reading will say
        return memoryview(mapped)[skipped:]


@dataclass(frozen=True)
class _Layout:
    """How a dataset's volumes are stored."""

    is_whole: bool
    """One volume per chunk; smaller chunks are left to HDF5."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    filters: list[int]
    """HDF5's codes, in the order of writing."""

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> _Layout:
        plan = dataset.id.get_create_plist()
        filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
        is_whole = (dataset.chunks or ())[-3:] == dataset.shape[-3:]
        return cls(is_whole, dataset.shape[-3:], dataset.dtype, filters)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without waiting for a disk or a network; False also where the system cannot say."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):
        return False


def _copy(data: memoryview, out: memoryview) -> int:
    """The CRC-32 of `data`, copied to `out`. NumPy copies, since it releases the GIL."""
    checksum = 0
    source, target = np.frombuffer(data, np.uint8), np.frombuffer(out, np.uint8)
    for begin in range(0, len(source), MAPPED_BYTES):
        part = slice(begin, begin + MAPPED_BYTES)
        checksum = zlib_ng.crc32(source[part].data, checksum)
        target[part] = source[part]
    return checksum


def _decode_lz4(data: memoryview, out: memoryview) -> None:
    """HDF5's LZ4: the decoded size (8 bytes, big-endian) and that of a block (4); then blocks, each after its size (4).

    A block that would not shrink is stored as it is.
    """
    total, block = struct.unpack_from(">QI", data)
    if total != len(out) or not block:
        raise ValueError("wrong size")
    position = 12
    for begin in range(0, total, block):
        (size,) = struct.unpack_from(">I", data, position)
        position += 4
        source, target = data[position : position + size], out[begin : begin + block]
        if size == len(target):
            target[:] = source
        elif cramjam.lz4.decompress_block_into(source, target) != len(target):
            raise ValueError("wrong size")
        position += size
    if position != len(data):
        raise ValueError("wrong size")


def _scratch(size: int) -> memoryview:
    """This thread's buffer for compressed bytes."""
    buffer = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _thread.buffer = np.empty(size, np.uint8)
    return buffer.data[:size]
