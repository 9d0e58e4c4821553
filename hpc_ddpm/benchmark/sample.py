"""Mass generation itself, timed: masks read, volumes computed, checked and written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_ddpm.benchmark.device import Energy, device_name, measure_ceilings
from hpc_ddpm.benchmark.figures import make_row, warm_up_length
from hpc_ddpm.data.team import detect_team
from hpc_ddpm.distributed import Ranks, all_gather
from hpc_ddpm.model.gpus import peak_flops
from hpc_ddpm.model.planner import GIB
from hpc_ddpm.sampling.masks import find_packed_masks
from hpc_ddpm.sampling.run import run_sampling
from hpc_ddpm.training.meter import peak_memory_gib
from hpc_ddpm.weights import Model


def bench_sample(
    model: Model,
    work: Path,
    ranks: Ranks,
    *,
    repeats: int,
    volumes: int,
    price: float | None = None,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Generate sets of `volumes` per rank, one after the other, and return the figures (on rank 0).

    Args:
        model: on its device and in its precision; `data.path` of its configuration names a packed dataset, whose
            first mask is used.
        work: empty; the sets are removed as they are done.
        ranks: as detected; inside a process group.
        repeats: sets that count, at most: one comes before, and more warm-up is detected.
        volumes: of each set, per rank.
        price: of a GPU-hour.
        on_repeat: called with (sets done, all sets).
    """
    parameter = next(model.parameters())
    device, precision = parameter.device, "bf16" if parameter.dtype == torch.bfloat16 else "fp32"
    model.config = model.config.model_copy(
        update={"sampling": model.config.sampling.model_copy(update={"replicas": volumes * ranks.world_size})}
    )
    masks = find_packed_masks(model.config.data.path)[:1]
    weights = {"path": "benchmark", "sha256": model.sha256, "provenance": model.provenance}
    ceilings = measure_ceilings(device, parameter.dtype)
    team = detect_team(ranks)
    samples: list[float] = []
    energy = Energy(device, ranks.local_world_size)
    for number in range(repeats + 1):
        if number == 1:
            energy = Energy(device, ranks.local_world_size)
        out = work / f"set{number}"
        report = run_sampling(model, out, weights, masks, team=replace(team, run=f"{team.run}{number}"))
        reports = all_gather((report.generated, report.seconds))
        generated, seconds = sum(count for count, _ in reports), max(seconds for _, seconds in reports)
        samples.append(seconds * ranks.world_size / generated)
        if ranks.is_main:
            shutil.rmtree(out)
            on_repeat(number + 1, repeats + 1)
        dist.barrier()
    if not ranks.is_main:
        return {}
    joules = energy.joules()
    excluded = 1 + warm_up_length(samples[1:])
    sampling = model.config.sampling
    return make_row(
        "sample",
        model.config,
        precision,
        samples[excluded:],
        ceilings,
        peak_flops(device_name(device), precision),
        excluded=excluded,
        price=price,
        joules_per_volume=joules and joules / (repeats * volumes),
        device=device_name(device),
        world_size=ranks.world_size,
        sampler=sampling.sampler,
        num_steps=sampling.num_steps,
        batch_size=1 if sampling.exact else sampling.batch_size,
        compiled=sampling.compile and device.type == "cuda",
        peak_memory_gib=peak_memory_gib(device),
        peak_reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None,
    )
