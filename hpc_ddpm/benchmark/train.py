"""The training loop itself, timed by its own log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.benchmark.device import Energy, device_name, measure_ceilings
from hpc_ddpm.benchmark.figures import make_row, warm_up_length
from hpc_ddpm.config import Config
from hpc_ddpm.device import resolve_precision
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.model.gpus import peak_flops
from hpc_ddpm.model.planner import DTYPES, GIB, Planner
from hpc_ddpm.sealed import read_json
from hpc_ddpm.training.loop import train
from hpc_ddpm.training.memory import CHOICE_FILE
from hpc_ddpm.training.profiling import FOLDER as PROFILE
from hpc_ddpm.training.profiling import WHERE_FILE

LEAST_WARM_UP = {"cuda": 20, "cpu": 2}
"""Steps that never count."""
PROFILED = 2
"""Steps after those that count, which tell where the time goes: a profiler slows them."""


def bench_train(
    config: Config,
    run_dir: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    repeats: int,
    steps_per_repeat: int,
    price: float | None = None,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train from scratch in `run_dir` and return the figures (on rank 0); all ranks call it inside a process group.

    One checkpoint is saved half way, in the background where the configuration says so; repeats during which it stalled
    training do not count as step time.

    Args:
        config: complete; `data.path` names the packed dataset. Steps, logging and checkpoints are set here.
        run_dir: empty.
        ranks: as detected.
        device: of this rank.
        repeats: samples that count, at most: warm-up is detected and left out.
        steps_per_repeat: optimizer steps in each.
        price: of a GPU-hour.
        on_repeat: called on rank 0 with (repeats done, all with warm-up).

    Raises:
        ConfigError: see `train`.
    """
    precision = resolve_precision(config.training.precision, device, config.training_depths)
    warm_up = -(-LEAST_WARM_UP[device.type] // steps_per_repeat)
    total = warm_up + repeats
    changes = {
        "num_steps": total * steps_per_repeat + PROFILED,
        "profile_steps": (total * steps_per_repeat + 1, total * steps_per_repeat + PROFILED),
        "log_every_steps": steps_per_repeat,
        "validate_every_steps": 0,
        "preview_every_steps": 0,
        "checkpoint_every_steps": (warm_up + repeats // 2) * steps_per_repeat,
        "keep_checkpoints": 1,
    }
    config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    ceilings = measure_ceilings(device, DTYPES[precision])
    logs: list[Mapping[str, float]] = []
    energy, joules = Energy(device, ranks.local_world_size), None

    def on_log(step: int, values: Mapping[str, float]) -> None:
        nonlocal energy, joules
        if "step_time_s" not in values or len(logs) == total:
            return
        logs.append(values)
        if len(logs) == warm_up:
            energy = Energy(device, ranks.local_world_size)
        joules = energy.joules()  # before the last checkpoint is written
        on_repeat(len(logs), total)

    train(config, run_dir, ranks, device, on_log=on_log)
    if not ranks.is_main:
        return {}
    policy = _policy(config, run_dir)
    counted, excluded = choose_counted(logs, warm_up)
    per_rank = config.training.global_batch / ranks.world_size
    where = read_json(run_dir / PROFILE / WHERE_FILE, dict[str, Any], "measure again")
    shares = {part: seconds / where["wall_s"] for part, seconds in where["parts_s"].items()}
    plan = Planner(config, ranks.world_size, precision, device.type).plan(policy, config.training.micro_batch)
    return make_row(
        "train",
        config,
        precision,
        [values["step_time_s"] / per_rank for values in counted],
        ceilings,
        peak_flops(device_name(device), precision),
        excluded=excluded,
        price=price,
        joules_per_volume=joules and joules / (repeats * steps_per_repeat * per_rank),
        policy=policy,
        device=device_name(device),
        world_size=ranks.world_size,
        zero_stage=config.training.zero_stage,
        micro_batch=config.training.micro_batch,
        global_batch=config.training.global_batch,
        data_wait_share=sum(values["data_wait_share"] for values in counted) / len(counted),
        communication_share=shares["communication"],
        host_overhead_share=shares["other"],
        step_shares=shares,
        checkpoint_stall_s=sum(values["checkpoint_stall_s"] for values in logs),
        peak_memory_gib=logs[-1]["memory_gib"],
        peak_reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None,
        predicted_peak_gib=plan.total / GIB,
        memory_gib={name: size / GIB for name, size in plan.parts().items()},
    )


def choose_counted(logs: list[Mapping[str, float]], warm_up: int) -> tuple[list[Mapping[str, float]], int]:
    """The repeats that count: not of the warm-up, as given or as detected, and with no checkpoint in the way.

    Returns:
        Those (if a checkpoint was in the way of all, all after the warm-up), and how many the warm-up took.
    """
    after = logs[warm_up:]
    detected = warm_up_length([values["step_time_s"] for values in after])
    settled = after[detected:]
    undisturbed = [values for values in settled if not values["checkpoint_stall_s"]]
    return undisturbed or settled, warm_up + detected


def _policy(config: Config, run_dir: Path) -> str:
    policy = config.model.activation_checkpointing
    if policy != "auto":
        return policy
    chosen: str = read_json(run_dir / CHOICE_FILE, dict[str, Any], "measure again")["activation_checkpointing"]
    return chosen
