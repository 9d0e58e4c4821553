"""Before training takes memory: refuse what cannot be indexed, and choose the checkpointing that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_ddpm.config import Config
from hpc_ddpm.device import give_back_freed_memory, resolve_precision
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.files import write_json
from hpc_ddpm.host import free_memory
from hpc_ddpm.model.planner import MAX_NUMEL, Planner, record, with_policy

CHOICE_FILE = "activation_checkpointing.json"
OnChoice = Callable[[Mapping[str, Any]], None]


def settle_memory(
    config: Config, run_dir: Path, ranks: Ranks, device: torch.device, on_choice: OnChoice = lambda choice: None
) -> Config:
    """The configuration with `activation_checkpointing=auto` replaced by the least recompute that fits; a collective.

    All ranks plan with the smallest free memory among them, so they choose alike. Rank 0 stores the choice and its
    numbers as `activation_checkpointing.json` in the run directory, and tells `on_choice`.

    Raises:
        ConfigError: nothing fits, or a tensor would be too large for 32-bit indices.
    """
    is_auto = config.model.activation_checkpointing == "auto"
    if not is_auto and _is_far_below_index_limit(config):
        return config
    precision = resolve_precision(config.training.precision, device, config.training_depths)
    planner = Planner(config, ranks.world_size, precision, device.type)
    planner.check_indexing()
    if not is_auto:
        return config
    if device.type == "cpu":
        give_back_freed_memory()  # the plan counts tensors
    smallest = torch.tensor(_free_on(device, ranks), dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    plan = planner.choose_policy(int(smallest))
    if ranks.is_main:
        choice = record(plan, int(smallest))
        write_json(run_dir / CHOICE_FILE, choice, indent=2)
        on_choice(choice)
    return with_policy(config, plan.policy)


def _is_far_below_index_limit(config: Config) -> bool:
    """Estimate without a trace: twice the widest level at full resolution together with its skip."""
    widest = config.model.base_channels * max(config.model.channel_multipliers)
    voxels = math.prod(config.data.training_shape)
    return config.training.micro_batch * voxels * 4 * widest < MAX_NUMEL


def _free_on(device: torch.device, ranks: Ranks) -> int:
    """Bytes this rank may use: free on its GPU, or its share of what the node leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // ranks.local_world_size
