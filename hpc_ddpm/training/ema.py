"""Exponential moving averages of the weights, kept by each rank for its own fp32 elements."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpc_ddpm.config import TrainingConfig
from hpc_ddpm.training.partitions import Partition

Decay = Callable[[int], float]
"""Share of the old average that the n-th update keeps, n counted from 0."""


class Ema:
    """`average += (1 - decay) * (weights - average)`, elementwise, so it is the same however ZeRO shards.

    One average per name of `training.ema_names`, each laid out like the partition's flats.
    """

    def __init__(self, partition: Partition, training: TrainingConfig) -> None:
        self.partition = partition
        self.decays = ema_decays(training)
        self.num_updates = 0
        self.averages = {name: partition.clone() for name in self.decays}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current master weights into every average."""
        for name, averages in self.averages.items():
            share = 1 - self.decays[name](self.num_updates)
            for average, weights in zip(averages, self.partition.flats, strict=True):
                average.lerp_(weights.detach(), share)
        self.num_updates += 1


def ema_decays(training: TrainingConfig) -> dict[str, Decay]:
    """The decay of every average of `training.ema_names`."""
    decays = (training.ema_decay, *training.ema_extra_decays)
    constant = [constant_decay(decay, warmup=training.ema_warmup) for decay in decays]
    power = [power_decay(sigma) for sigma in training.ema_power_sigmas]
    return dict(zip(training.ema_names, [*constant, *power], strict=True))


def constant_decay(decay: float, *, warmup: bool) -> Decay:
    """`decay`; with `warmup` at most (1 + n) / (10 + n), so that early weights are forgotten quickly."""
    return lambda n: min(decay, (1 + n) / (10 + n)) if warmup else decay


def power_decay(sigma: float) -> Decay:
    """(1 - 1/t)^(gamma + 1) at update t = n + 1: a profile of relative width `sigma` at any time.

    Karras et al. 2024 (arXiv 2312.02696), equation 3.
    """
    gamma = power_gamma(sigma)
    return lambda n: (1 - 1 / (n + 1)) ** (gamma + 1)


def power_gamma(sigma: float) -> float:
    """The gamma > 0 with sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, section 3.1).

    The right side falls from 1/12, so bisection finds it.
    """
    low, high = 0.0, 1.0
    while _width(high) > sigma:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _width(middle) > sigma else (low, middle)
    return low


def _width(gamma: float) -> float:
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)
