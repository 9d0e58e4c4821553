"""Data order as a pure function: which volume each global sample is, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from hpc_ddpm.errors import ConfigError


def dataset_index(seed: int, sample_index: int, num_samples: int) -> int:
    """Which of `num_samples` volumes the `sample_index`-th draw of a training run is.

    Every epoch (num_samples draws in a row) has its own permutation, a function of (seed, epoch).
    """
    epoch, position = divmod(sample_index, num_samples)
    return int(_permutation(seed, epoch, num_samples)[position])


def sample_rng(seed: int, sample_index: int, purpose: int) -> np.random.Generator:
    """Random numbers of the `sample_index`-th draw of a run for one purpose (1, 2, ...), the same on every rank."""
    return np.random.Generator(np.random.PCG64([seed, sample_index, purpose]))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


class StepBatches(Sampler[list[int]]):
    """The micro batches of one rank for steps start_step .. start_step + num_steps - 1, in order.

    Micro step `a` of step `s` is the global samples s*global_batch + a*world_size*micro_batch +
    rank*micro_batch + i, i < micro_batch: every world size sees the same samples in a step.

    Raises:
        ConfigError: global_batch is not a multiple of micro_batch * world_size.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        start_step: int,
        num_steps: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ConfigError(
                f"training.global_batch={global_batch} is not a multiple of micro_batch x ranks = "
                f"{micro_batch} x {world_size}; change one of them"
            )
        self.num_samples, self.seed = num_samples, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    @property
    def accumulation(self) -> int:
        """Micro steps per step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def sample_indices(self, step: int, micro_step: int) -> range:
        """The global samples of this rank in one micro step; seeds of timestep and noise come from them."""
        first = step * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.start_step + self.num_steps):
            for micro_step in range(self.accumulation):
                samples = self.sample_indices(step, micro_step)
                yield [dataset_index(self.seed, sample, self.num_samples) for sample in samples]

    def __len__(self) -> int:
        return self.num_steps * self.accumulation
