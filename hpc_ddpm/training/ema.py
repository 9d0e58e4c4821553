"""Exponential moving average of the weights, kept by each rank for its own fp32 elements."""

from __future__ import annotations

import torch

from hpc_ddpm.training.partitions import Partition


class Ema:
    """`average += (1 - decay) * (weights - average)`, elementwise, so it is the same however ZeRO shards.

    With `warmup` the n-th update uses min(decay, (1 + n) / (10 + n)): early weights are forgotten quickly.
    """

    def __init__(self, partition: Partition, decay: float, *, warmup: bool) -> None:
        self.partition = partition
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.averages = partition.clone()

    @torch.no_grad()
    def update(self) -> None:
        """Take the current master weights into the average."""
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        self.num_updates += 1
        for average, weights in zip(self.averages, self.partition.flats, strict=True):
            average.lerp_(weights.detach(), 1 - decay)
