"""A few volumes of the val split that training evaluates, divided among the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_ddpm.config import CovariateConfig
from hpc_ddpm.data.dataset import VolumeDataset
from hpc_ddpm.distributed import Ranks, all_or_none


class HeldOutVolume(NamedTuple):
    """One volume on the device of the rank."""

    number: int
    """Position among the volumes that are used; the same at any number of ranks."""
    is_spare: bool
    """Whether another rank has this volume too, so that these results must not be used."""
    position: int
    """Position in the split."""
    image: torch.Tensor
    """(1, C, D, H, W) as stored."""
    mask: torch.Tensor
    """(1, D, H, W) uint8."""
    covariates: torch.Tensor | None = None
    """(1, V), NaN where unknown; None where the network has none."""


class HeldOut:
    """At most `limit` volumes of the val split, spread evenly over it, with these covariates.

    Raises:
        DataFormatError: the val split is empty.
    """

    def __init__(
        self,
        packed: Path,
        limit: int,
        covariates: Mapping[str, CovariateConfig],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.dataset, self.ranks, self.device = VolumeDataset(packed, "val"), ranks, device
        self._covariates = self.dataset.covariates(covariates).to(device) if covariates else None
        total = len(self.dataset)
        self.positions = [number * total // min(limit, total) for number in range(min(limit, total))]

    def __len__(self) -> int:
        return len(self.positions)

    def mine(self) -> Iterator[HeldOutVolume]:
        """The volumes of this rank; equally many on every rank, because ZeRO-3 needs all of them. A collective.

        Raises:
            DataFormatError: damaged; on all ranks.
        """
        for turn in range(math.ceil(len(self) / self.ranks.world_size)):
            turn_number = turn * self.ranks.world_size + self.ranks.rank
            number = turn_number % len(self)
            item = all_or_none(partial(self.dataset.__getitem__, self.positions[number]))
            image, mask = item["image"][None].to(self.device), item["mask"][None].to(self.device)
            position = self.positions[number]
            covariates = None if self._covariates is None else self._covariates[position, None]
            yield HeldOutVolume(number, turn_number >= len(self), position, image, mask, covariates)
