"""The loss on held-out volumes, by timestep: with fixed timesteps and noise, the same at any number of ranks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from hpc_ddpm.config import Config
from hpc_ddpm.data.dataset import Expand
from hpc_ddpm.diffusion.gaussian import Model, TrainingDraw, training_loss
from hpc_ddpm.diffusion.noise import mix64, sample_noise
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.training.engine import Engine
from hpc_ddpm.training.held_out import HeldOut, HeldOutVolume

NUM_BUCKETS = 5
_TIMESTEP, _NOISE = 11, 12  # what a key is used for


class Validation:
    """Measures the loss of every volume at one timestep in each of NUM_BUCKETS equal ranges.

    Raises:
        DataFormatError: the val split is empty.
    """

    def __init__(self, config: Config, packed: Path, ranks: Ranks, device: torch.device) -> None:
        self.config, self.device = config, device
        self.volumes = HeldOut(packed, config.training.validation_volumes, config.data.covariates, ranks, device)
        self.schedule = build_schedule(config.diffusion).to(device)
        self._expand = Expand(config.data.labels)
        T = config.diffusion.num_timesteps
        edges = [bucket * T // NUM_BUCKETS for bucket in range(NUM_BUCKETS + 1)]
        self.buckets = [range(low, high) for low, high in pairwise(edges) if low < high]

    def measure(self, engine: Engine) -> dict[str, float]:
        """`val_loss`, the mean over all, and `val_loss_t0_49` and so on for the ranges; a collective."""
        table = torch.zeros(len(self.volumes), len(self.buckets), dtype=torch.float64, device=self.device)
        with engine.averaged() as network:
            for volume in self.volumes.mine():
                losses = self._losses(network, volume)
                if not volume.is_spare:
                    table[volume.number] = losses
        dist.all_reduce(table)  # every entry has one summand that is not zero, so the sum is exact
        by_bucket = table.cpu().mean(0).tolist()
        names = [f"val_loss_t{bucket[0]}_{bucket[-1]}" for bucket in self.buckets]
        return {"val_loss": sum(by_bucket) / len(by_bucket), **dict(zip(names, by_bucket, strict=True))}

    def _losses(self, network: Model, volume: HeldOutVolume) -> torch.Tensor:
        x_start, condition = self._expand(volume.image, volume.mask)
        losses: list[torch.Tensor] = []
        off_value = self.config.data.labels.off_value
        for number, bucket in enumerate(self.buckets):
            key = (self.config.seed, volume.position, number)
            timestep = bucket[mix64(*key, _TIMESTEP) * len(bucket) >> 64]
            draw = TrainingDraw(
                timesteps=torch.tensor([timestep], device=self.device),
                noise=sample_noise(x_start.shape[1:], [mix64(*key, _NOISE)], self.device),
                keep=torch.tensor([True], device=self.device),
            )
            losses += training_loss(
                network, x_start, condition, draw, self.schedule, self.config.diffusion, off_value, volume.covariates
            )
        return torch.stack(losses)
