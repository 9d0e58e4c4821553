"""Packed volumes as torch tensors, as stored; expansion to floats happens on the device. C D H W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch.utils.data import Dataset

from hpc_ddpm.config import AugmentConfig, CovariateConfig, DataConfig, LabelsConfig
from hpc_ddpm.data.augment import augment
from hpc_ddpm.data.buffers import empty
from hpc_ddpm.data.cache import VolumeCache, share_cache
from hpc_ddpm.data.labels import one_hot
from hpc_ddpm.data.shards import INT16_SCALE, Packed, Window, open_packed
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
    """(B,) int64, positions in the split (of crops: samples of the run)."""


class VolumeDataset(Dataset[Item]):
    """The volumes of one split, one per item; works with fork and spawn.

    Raises:
        DataFormatError: not a packed dataset, or no subject in the split.
    """

    def __init__(self, packed_path: str | Path, split: str = "train") -> None:
        self.packed = open_packed(packed_path)
        self.source: Packed | VolumeCache = self.packed
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
        """A batch with room for these volumes, to be read by `fill`; see `new_batch`."""
        return new_batch(self.packed.data, self.packed.data.spatial_shape, indices, pin_memory)

    def fill(self, batch: Batch, position: int) -> None:
        """Read the volume that `batch["index"][position]` names to its place in the batch; any thread may.

        Raises:
            DataFormatError: damaged; names shard and subject.
        """
        subject = self.subjects[int(batch["index"][position])]
        self.source.read(subject.index, batch["image"][position].numpy(), batch["mask"][position].numpy())

    def fill_crop(self, batch: Batch, position: int, index: int, window: Window) -> None:
        """As `fill`, with a part of the volume `index`."""
        image, mask = batch["image"][position].numpy(), batch["mask"][position].numpy()
        self.source.read_window(self.subjects[index].index, window, image, mask)

    def covariates(self, wanted: Mapping[str, CovariateConfig]) -> torch.Tensor:
        """(N, V) float32 of the split, see `Packed.covariates`; also its errors."""
        of_all = self.packed.covariates(wanted)
        return torch.from_numpy(of_all[[subject.index for subject in self.subjects]]).float()

    def keep_in_ram(self) -> None:
        """Decode every volume once and keep it, for all ranks of the node; a collective.

        Raises:
            ClusterError: not enough memory.
        """
        self.source = share_cache(self.packed, [subject.index for subject in self.subjects])


def new_batch(data: DataConfig, shape: tuple[int, int, int], indices: Sequence[int], pin_memory: bool) -> Batch:
    """Memory for a batch.

    Args:
        data: decides channels and dtype.
        shape: (D, H, W) of each volume.
        indices: what the volumes are, for the dataset that fills it.
        pin_memory: in page-locked memory, from which a GPU copies while the CPU goes on.
    """
    dtype = torch.int16 if data.storage_dtype == "int16" else torch.float32
    image = (len(indices), data.num_modalities, *shape)
    allocate = partial(torch.empty, pin_memory=True) if pin_memory else empty
    return {
        "image": allocate(image, dtype=dtype),
        "mask": allocate((len(indices), *shape), dtype=torch.uint8),
        "index": torch.tensor(indices),
    }


class Expand:
    """Batches as stored to what the network sees, on their device.

    On a CPU the result lies in the same memory every time, as fresh memory would take longer than the work: it is
    valid until the next call. On a GPU PyTorch keeps freed memory at hand.
    """

    def __init__(self, labels: LabelsConfig, augmentation: AugmentConfig | None = None, seed: int = 0) -> None:
        self.labels, self.augmentation, self.seed = labels, augmentation, seed
        self._image: torch.Tensor | None = None
        self._condition: torch.Tensor | None = None

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, samples: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, C, D, H, W) float32 in [-1, 1] and condition (B, K, D, H, W) float32.

        Args:
            image: (B, C, D, H, W) int16 or float32.
            mask: (B, D, H, W) uint8.
            samples: number of each sample in the run, which decides how it is augmented.
        """
        stored, volume = image, to_unit_range(image, self._image)
        if volume is not stored and stored.device.type == "cpu":
            self._image = volume
        if self.augmentation:
            volume, mask = augment(volume, mask, samples, self.seed, self.augmentation)
        condition = one_hot(mask, self.labels, out=self._condition)
        if stored.device.type == "cpu":
            self._condition = condition
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
        out = empty(image.shape, torch.float32, image.device)
    return out.copy_(image).div_(INT16_SCALE)
