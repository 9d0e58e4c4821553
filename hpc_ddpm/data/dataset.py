"""Packed volumes as torch tensors, as stored; expansion to floats happens on the device. C D H W."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch.utils.data import Dataset

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.labels import one_hot
from hpc_ddpm.data.shards import INT16_SCALE, open_packed
from hpc_ddpm.errors import DataFormatError


class Item(TypedDict):
    """One volume."""

    image: torch.Tensor
    """(C, D, H, W) int16 or float32, as stored."""
    mask: torch.Tensor
    """(D, H, W) uint8."""
    index: int
    """Position in the split."""


class Batch(TypedDict):
    """B volumes."""

    image: torch.Tensor
    """(B, C, D, H, W) int16 or float32, as stored."""
    mask: torch.Tensor
    """(B, D, H, W) uint8."""
    index: torch.Tensor
    """(B,) int64, positions in the split."""


class VolumeDataset(Dataset[Item]):
    """The volumes of one split, one per item; works with fork and spawn.

    Raises:
        DataFormatError: not a packed dataset, or no subject in the split.
    """

    def __init__(self, packed_path: str | Path, split: str = "train") -> None:
        self.packed = open_packed(packed_path)
        self.subjects = self.packed.subjects(split)
        if not self.subjects:
            there = ", ".join(sorted({subject.split for subject in self.packed.subjects()}))
            raise DataFormatError(f"{packed_path}: no subject in split '{split}', found {there}; choose one of these")

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> Item:
        batch = self.new_batch([index])
        self.fill(batch, 0)
        return {"image": batch["image"][0], "mask": batch["mask"][0], "index": index}

    def new_batch(self, indices: Sequence[int], pin_memory: bool = False) -> Batch:
        """A batch with room for these volumes, to be read by `fill`.

        Args:
            indices: positions in the split.
            pin_memory: in page-locked memory, from which a GPU copies while the CPU goes on.
        """
        data = self.packed.data
        dtype = torch.int16 if data.storage_dtype == "int16" else torch.float32
        shape = len(indices), data.num_modalities, *data.spatial_shape
        return {
            "image": torch.empty(shape, dtype=dtype, pin_memory=pin_memory),
            "mask": torch.empty((len(indices), *data.spatial_shape), dtype=torch.uint8, pin_memory=pin_memory),
            "index": torch.tensor(indices),
        }

    def fill(self, batch: Batch, position: int) -> None:
        """Read the volume that `batch["index"][position]` names to its place in the batch; any thread may.

        Raises:
            DataFormatError: damaged; names shard and subject.
        """
        subject = self.subjects[int(batch["index"][position])]
        self.packed.read(subject.index, batch["image"][position].numpy(), batch["mask"][position].numpy())


class Expand:
    """Batches as stored to what the network sees, on their device.

    On a CPU the result lies in the same memory every time, as fresh memory would take longer than the work: it is
    valid until the next call. On a GPU PyTorch keeps freed memory at hand.
    """

    def __init__(self, labels: LabelsConfig) -> None:
        self.labels = labels
        self._image: torch.Tensor | None = None
        self._condition: torch.Tensor | None = None

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, C, D, H, W) float32 in [-1, 1] and condition (B, K, D, H, W) float32.

        Args:
            image: (B, C, D, H, W) int16 or float32.
            mask: (B, D, H, W) uint8.
        """
        volume = to_unit_range(image, self._image)
        condition = one_hot(mask, self.labels, out=self._condition)
        if image.device.type == "cpu":
            self._image, self._condition = volume if volume is not image else None, condition
        return volume, condition


def to_unit_range(image: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Stored values to float32 in [-1, 1], on the device of `image`.

    Args:
        image: any shape; int16, or float32, which is returned as it is.
        out: float32 tensor to fill, used if it has this shape; None allocates.
    """
    if image.dtype != torch.int16:
        return image
    if out is None or out.shape != image.shape:
        out = torch.empty_like(image, dtype=torch.float32)
    return out.copy_(image).div_(INT16_SCALE)
