"""Collectives of the sizes that training uses: time, bandwidth, and the latency and bandwidth of a ring behind them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from hpc_ddpm.benchmark.device import device_name, synchronize
from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config
from hpc_ddpm.distributed import Ranks, all_gather
from hpc_ddpm.model.unet3d import build_unet

FP32 = 4
SMALLEST = 1024
"""Bytes; what comes above grows by the factor STEP until the whole gradient."""
STEP = 8
LEAST_CALLS, BUDGET_S = 5, 0.4
"""Fewest calls of each collective at each size, and the seconds that these calls may take together."""
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Ring:
    """Time of collectives as rings of point-to-point messages have it."""

    latency_s: float
    """Time that one message takes beside its bytes."""
    bytes_per_s: float
    """Speed of one link; infinite where the size of messages made no difference."""

    def seconds(self, operation: str, num_bytes: float, ranks: int) -> float:
        """One collective over `num_bytes`: of the tensor that a rank has before a reduction or after a gather."""
        hops, share = ring_work(operation, ranks)
        return hops * self.latency_s + share * num_bytes / self.bytes_per_s


def ring_work(operation: str, ranks: int) -> tuple[int, float]:
    """Messages one after the other, and how much of the tensor passes each link."""
    passes = 2 if operation == "all_reduce" else 1
    return passes * (ranks - 1), passes * (ranks - 1) / ranks


def fit_ring(rows: Iterable[Mapping[str, Any]]) -> Ring:
    """Latency and bandwidth that fit measured collectives best: least squares of relative errors, none below zero."""
    work = [(*ring_work(row["operation"], row["ranks"]), row["bytes"], row["seconds"]["median"]) for row in rows]
    matrix = np.array([[hops / seconds, share * size / seconds] for hops, share, size, seconds in work])
    scale = matrix.max(axis=0)  # the columns differ by ten orders of magnitude
    (latency, per_byte), _ = nnls(matrix / scale, np.ones(len(work)))
    per_byte /= scale[1]
    return Ring(float(latency / scale[0]), float(1 / per_byte) if per_byte else float("inf"))


def gradient_bytes(config: Config) -> int:
    """Bytes of the gradients of all parameters, which are reduced in fp32."""
    with torch.device("meta"):
        return FP32 * sum(parameter.numel() for parameter in build_unet(config).parameters())


def message_sizes(config: Config) -> list[int]:
    """Bytes: powers of STEP, one bucket of gradients, all gradients."""
    total = gradient_bytes(config)
    bucket = min(FP32 * config.training.reduce_bucket_size, total)
    ladder = [SMALLEST * STEP**power for power in range(20) if SMALLEST * STEP**power < total]
    return sorted({*ladder, bucket, total})


def bench_comm(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    sizes: Sequence[int] | None = None,
    on_size: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time all-reduce, reduce-scatter and all-gather of fp32; all ranks call it inside a process group of two or more.

    Args:
        config: complete; its network and `training.reduce_bucket_size` give the sizes.
        ranks: as detected.
        device: of this rank.
        sizes: bytes; None is `message_sizes`.
        on_size: called on rank 0 with (sizes done, all sizes).

    Returns:
        A row for each operation and size, on all ranks alike: `seconds` is of the slowest rank; `algorithm_gb_per_s`
        is bytes over time, `bus_gb_per_s` what passes each link of a ring (as nccl-tests count).
    """
    sizes = message_sizes(config) if sizes is None else sizes
    bucket = min(FP32 * config.training.reduce_bucket_size, gradient_bytes(config))
    rows = []
    for number, size in enumerate(sizes):
        for operation in OPERATIONS:
            seconds = _measure(operation, size, ranks, device)
            median = seconds["median"]
            rows.append(
                {
                    "operation": operation,
                    "ranks": ranks.world_size,
                    "bytes": size,
                    "is_bucket": size == bucket,
                    "seconds": seconds,
                    "algorithm_gb_per_s": size / median / 1e9,
                    "bus_gb_per_s": ring_work(operation, ranks.world_size)[1] * size / median / 1e9,
                    "device": device_name(device),
                }
            )
        if ranks.is_main:
            on_size(number + 1, len(sizes))
    ring = fit_ring(rows)
    return [row | {"ring_fit_s": ring.seconds(row["operation"], row["bytes"], row["ranks"])} for row in rows]


def _measure(operation: str, size: int, ranks: Ranks, device: torch.device) -> Any:
    """Spread of the seconds of calls in a row, of the rank with the slowest median."""
    count = -(-size // FP32 // ranks.world_size)
    whole, part = (torch.zeros(length, device=device) for length in (count * ranks.world_size, count))
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
    }
    first = [_timed(calls[operation], device) for _ in range(2)][-1]
    number = max(LEAST_CALLS, min(50, int(BUDGET_S / max(all_gather(first)))))
    return max(all_gather(spread([_timed(calls[operation], device) for _ in range(number)])), key=lambda s: s["median"])


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began
