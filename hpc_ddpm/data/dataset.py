"""Packed volumes as torch tensors, as stored; expansion to floats happens on the device. C D H W."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch
from torch.utils.data import Dataset

from hpc_ddpm.data.cache import VolumeCache, share_cache
from hpc_ddpm.data.shards import INT16_SCALE, Array, Packed, Window, open_packed
from hpc_ddpm.errors import DataFormatError


class Item(TypedDict):
    """One volume."""

    image: torch.Tensor
    """(C, D, H, W) int16 or float32, as stored."""
    mask: torch.Tensor
    """(D, H, W) uint8."""
    index: int
    """Position in the split."""


class VolumeDataset(Dataset[Item]):
    """The volumes of one split, one per item; works with fork and spawn.

    Raises:
        DataFormatError: not a packed dataset, or no subject in the split.
    """

    def __init__(self, packed_path: str | Path, split: str = "train") -> None:
        self.packed = open_packed(packed_path)
        self._source: Packed | VolumeCache = self.packed
        self.subjects = self.packed.subjects(split)
        if not self.subjects:
            there = ", ".join(sorted({subject.split for subject in self.packed.subjects()}))
            raise DataFormatError(f"{packed_path}: no subject in split '{split}', found {there}; choose one of these")

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> Item:
        return _item(*self._source.read(self.subjects[index].index), index)

    def crop(self, index: int, window: Window) -> Item:
        """A part of a volume."""
        return _item(*self._source.read_window(self.subjects[index].index, window), index)

    def keep_in_ram(self) -> None:
        """Decode every volume once and keep it, for all ranks of the node; a collective.

        Raises:
            ClusterError: not enough memory.
        """
        self._source = share_cache(self.packed, [subject.index for subject in self.subjects])


def _item(image: Array, mask: Array, index: int) -> Item:
    return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "index": index}


def to_unit_range(image: torch.Tensor) -> torch.Tensor:
    """Stored values to float32 in [-1, 1], on the device of `image`; any shape, int16 or float32."""
    return image.float() / INT16_SCALE if image.dtype == torch.int16 else image
