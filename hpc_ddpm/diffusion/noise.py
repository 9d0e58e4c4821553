"""Randomness that belongs to the sample, not to the rank or the batch it happens to be in.

Every draw comes from a 64-bit key mixed from integers such as (seed, sample index).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(*words: int) -> int:
    """Hash integers to 64 uniform bits; order matters.

    Each word is absorbed by addition to the state, followed by the SplitMix64 output function (Steele, Lea &
    Flood 2014, figure 16), a bijection in which every input bit changes every output bit half of the time.
    """
    state = 0
    for word in words:
        state = (state + (word & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def uniform(*words: int) -> float:
    """A number in [0, 1) with 53 random bits, from the hash of the words."""
    return (mix64(*words) >> 11) / (1 << 53)


class NoiseSource:
    """Standard normal noise where each sample of a batch draws from a stream of its own.

    A stream depends on its seed and the kind of device (CPU or accelerator), not on batch, order or rank. It
    is Philox keyed with all 64 bits: PyTorch's CPU generator would keep only the lower 32.
    """

    def __init__(self, sample_seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        build = _HostStream if self.device.type == "cpu" else _DeviceStream
        self._streams = [build(mix64(seed), self.device) for seed in sample_seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The streams' next values: float32 of `shape` = (B, ...), one stream per sample.

        Raises:
            ValueError: B is not the number of streams.
        """
        if shape[0] != len(self._streams):
            raise ValueError(f"noise for {shape[0]} samples asked of {len(self._streams)} streams")
        return torch.stack([stream(tuple(shape[1:])) for stream in self._streams])


class _HostStream:
    def __init__(self, key: int, device: torch.device) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))


class _DeviceStream:
    def __init__(self, key: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(key)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device)


def sample_noise(
    sample_shape: Sequence[int], sample_seeds: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """The first draw of each sample's stream: (B, *sample_shape) float32, B = len(sample_seeds)."""
    return NoiseSource(sample_seeds, device)((len(sample_seeds), *sample_shape))
