"""Decoded volumes in memory, one copy per node, filled when a rank first needs a volume. C D H W.

The memory is a file without a name (memfd): the first rank of a node makes it, the others open it through /proc, and
the system frees it when the last process that holds it ends, however it ends. It holds, one after another:

    images (N, C, D, H, W), masks (N, D, H, W), and one byte per volume: 1 once both are written
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.shards import Array, Packed, Window
from hpc_ddpm.distributed import all_gather, all_or_none
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.host import free_memory

GIB = 2**30


class VolumeCache:
    """Volumes of a packed dataset, each decoded and checked once.

    Args:
        packed: read where a volume is not there yet.
        indices: the subjects that there is room for.
        memory: path that opens the memory, see `share_cache`.
    """

    def __init__(self, packed: Packed, indices: Sequence[int], memory: str) -> None:
        self._packed, self._indices = packed, indices
        self._slot = {index: slot for slot, index in enumerate(indices)}
        self._descriptor = os.open(memory, os.O_RDWR)
        weakref.finalize(self, os.close, self._descriptor)
        data, count = packed.data, len(indices)
        view = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        shape = (count, data.num_modalities, *data.spatial_shape)
        self._images = np.frombuffer(view, data.storage_dtype, math.prod(shape)).reshape(shape)
        self._masks = np.frombuffer(view, np.uint8, count * math.prod(data.size), self._images.nbytes)
        self._masks = self._masks.reshape(count, *data.spatial_shape)
        self._flags_begin = self._images.nbytes + self._masks.nbytes

    def __reduce__(self) -> tuple[type[VolumeCache], tuple[Packed, Sequence[int], str]]:
        return VolumeCache, (self._packed, self._indices, f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def read(self, index: int, image: Array | None = None, mask: Array | None = None) -> tuple[Array, Array]:
        """As `Packed.read`."""
        d, h, w = self._packed.data.spatial_shape
        return self.read_window(index, (slice(0, d), slice(0, h), slice(0, w)), image, mask)

    def read_window(
        self, index: int, window: Window, image: Array | None = None, mask: Array | None = None
    ) -> tuple[Array, Array]:
        """As `Packed.read_window`; the volume is checked as a whole."""
        slot = self._slot[index]
        if os.pread(self._descriptor, 1, self._flags_begin + slot) != b"\1":
            self._fill(slot, *self._packed.read(index))
        return _copy(self._images[slot][:, *window], image), _copy(self._masks[slot][window], mask)

    def _fill(self, slot: int, image: Array, mask: Array) -> None:
        self._write(image, slot * image.nbytes)
        self._write(mask, self._images.nbytes + slot * mask.nbytes)
        self._write(np.ones(1, np.uint8), self._flags_begin + slot)

    def _write(self, array: Array, offset: int) -> None:
        rest = array.data.cast("B")
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written


def _copy(part: Array, out: Array | None) -> Array:
    if out is None:
        return part.copy()
    np.copyto(out, part)
    return out


def share_cache(packed: Packed, indices: Sequence[int]) -> VolumeCache:
    """A cache that is one and the same for all ranks of a node; a collective.

    Raises:
        ClusterError: it does not fit into the free memory of some node, or ranks of a node cannot see each other.
    """
    all_or_none(partial(_require_memory, packed.data, len(indices)))
    descriptor = os.memfd_create("hpc_ddpm-cache")
    try:
        os.ftruncate(descriptor, size_bytes(packed.data, len(indices)))
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        offers = all_gather((machine, f"/proc/{os.getpid()}/fd/{descriptor}"))
        first = next(path for there, path in offers if there == machine)
        return all_or_none(partial(_open, packed, indices, first))
    finally:
        os.close(descriptor)  # by now all have opened it


def _open(packed: Packed, indices: Sequence[int], memory: str) -> VolumeCache:
    try:
        return VolumeCache(packed, indices, memory)
    except OSError as error:
        raise ClusterError(
            f"data.cache=ram: a rank on {socket.gethostname()} cannot open another's memory ({error}); start the ranks "
            "of a node in one container, or use data.cache=none"
        ) from None


def size_bytes(data: DataConfig, count: int) -> int:
    """Size of a cache of `count` volumes."""
    per_voxel = data.num_modalities * np.dtype(data.storage_dtype).itemsize + 1
    return count * (per_voxel * math.prod(data.size) + 1)


def _require_memory(data: DataConfig, count: int) -> None:
    needed, free = size_bytes(data, count), free_memory()
    if needed > free:
        raise ClusterError(
            f"data.cache=ram needs {needed / GIB:.2f} GiB for {count} volumes, {free / GIB:.2f} GiB of memory are free "
            f"on {socket.gethostname()}; use data.cache=none (with data.stage_dir, if reading is slow), or more memory"
        )
