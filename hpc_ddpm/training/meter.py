"""Losses of every step without a synchronisation in each, and where the time went between two logs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hpc_ddpm.distributed import Ranks, all_reduce_mean

GIB = 2**30
Row = tuple[int, dict[str, float]]
"""A step and its numbers."""


class Meter:
    """Collects the losses of this rank until they are logged, and measures the speed."""

    def __init__(self, global_batch: int, ranks: Ranks, device: torch.device) -> None:
        self.global_batch, self.ranks, self.device = global_batch, ranks, device
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._wait_s = 0.0
        self._apart_s: Counter[str] = Counter()
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which time counts as waiting for data."""
        began = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - began

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Context in which time does not count as training; it is logged under `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the training that is still under way is not part of it
        began = time.perf_counter()
        yield
        self._apart_s[name] += time.perf_counter() - began  # type: ignore[assignment]  # a Counter of seconds

    def add(self, step: int, loss: torch.Tensor) -> None:
        """This rank's mean loss of one step."""
        self._losses.append((step, loss))

    def flush(self, extra: Mapping[str, float]) -> list[Row]:
        """Rows since the last flush, losses averaged over ranks; the last row carries the speed. A collective."""
        local = torch.stack([loss for _, loss in self._losses]).tolist()
        elapsed_s = time.perf_counter() - self._since - sum(self._apart_s.values())
        *losses, wait_share = all_reduce_mean([*local, self._wait_s / elapsed_s], self.device)
        rows: list[Row] = [(step, {"loss": loss}) for (step, _), loss in zip(self._losses, losses, strict=True)]
        step_time_s = elapsed_s / len(rows)
        volumes_per_s = self.global_batch / step_time_s
        rows[-1][1].update(
            extra,
            step_time_s=step_time_s,
            volumes_per_s=volumes_per_s,
            volumes_per_s_per_rank=volumes_per_s / self.ranks.world_size,
            data_wait_share=wait_share,
            memory_gib=peak_memory_gib(self.device),
            **self._apart_s,
        )
        self._losses, self._wait_s, self._since = [], 0.0, time.perf_counter()
        self._apart_s.clear()
        return rows


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
