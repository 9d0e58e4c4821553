"""Where the memory of a run goes, what fits, and the checkpointing policy that `auto` stands for.

Activations come from a trace of the real network (`model/trace.py`); weights, gradients and optimizer states
are arithmetic on what DeepSpeed allocates (0.19, counted at every stage; see `docs/planning.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from hpc_ddpm.config import Config, TrainingConfig
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.trace import Trace, count_parameters, trace_step

GIB = 2**30
POLICIES = ("none", "norm", "block", "full")
"""From least to most recomputed."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FRAMEWORK_BYTES = int(0.75 * GIB)
"""CUDA context and libraries, or PyTorch and DeepSpeed in a CPU process; about."""
USABLE = 0.9
"""Share of the memory that a plan may fill: kernels and the allocator need the rest."""
MAX_NUMEL = 2**31
"""Kernels with 32-bit indices cannot address a tensor of this many elements."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank that do not depend on the volumes."""

    weights: int
    masters: int
    """fp32 weights that the optimizer updates."""
    moments: int
    """Both of Adam's."""
    ema: int
    gradients: int
    """Accumulated and on their way to the other ranks."""
    optimizer_step: int
    """Temporary tensors of the optimizer step; activations are gone by then."""
    host: int = 0
    """In the host's memory, beside all other figures (`training.offload_optimizer`, `offload_parameters`)."""


def plan_states(
    parameters: int, training: TrainingConfig, world_size: int, precision: str, device_type: str = "cuda"
) -> States:
    """What DeepSpeed and the averages allocate on each of `world_size` ranks; on CPUs, offloading changes nothing."""
    stage, is_half = training.zero_stage, precision != "fp32"
    shard = world_size if stage else 1
    width = 2 if is_half else 4
    buckets = 2 * 4 * min(training.reduce_bucket_size, parameters)
    can_offload = device_type != "cpu"
    is_optimizer_away = can_offload and stage > 0 and training.offload_optimizer == "cpu"
    are_weights_away = can_offload and stage == 3 and training.offload_parameters == "cpu"

    def size(bytes_per_parameter: float) -> int:
        return int(parameters * bytes_per_parameter)

    # layers stay gathered until backward is done, or until there are too many
    is_gathered = stage == 3 and (world_size > 1 or are_weights_away)
    gathered = width * min(parameters, training.max_live_parameters) if is_gathered else 0
    weights = size(width / shard if stage == 3 else width)
    masters, moments = size(4 / shard if stage or is_half else 0), size(8 / shard)
    ema = size(4 / shard) * len(training.ema_names)
    gradients = {
        0: width,
        1: 6 if precision == "bf16" and not is_optimizer_away else 4 + 4 / shard,
        2: 4 / shard,
        3: 4 / shard,
    }[stage]
    step = {0: 5 if is_half else 1, 1: 8 / shard, 2: 8 / shard, 3: 12 / shard}[stage]
    host = 0
    if is_optimizer_away:  # with gradients, and what is copied back to the GPU; averages are of the masters
        host = masters + moments + ema + size((8 if stage == 3 else 4 + width) / shard)
        masters = moments = ema = step = 0
        gradients = {1: 4 + 4 / shard if is_half else 4, 2: 4 / shard if is_half else 0, 3: 0}[stage]
    if are_weights_away:
        host, weights = host + weights, 0
    return States(
        weights=weights + gathered,
        masters=masters,
        moments=moments,
        ema=ema,
        gradients=size(gradients) + (buckets if stage else 0),
        optimizer_step=size(step),
        host=host,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank at its fullest, by part, for one checkpointing policy and micro batch."""

    policy: str
    micro_batch: int
    states: States
    trace: Trace

    @property
    def saved(self) -> int:
        """Batch and activations between forward and backward."""
        return self.micro_batch * self.trace.saved_bytes

    @property
    def temporary(self) -> int:
        """What backward adds on top at its fullest: gradients of activations, recomputed blocks."""
        return self.micro_batch * (self.trace.peak_bytes - self.trace.saved_bytes)

    @property
    def workspace(self) -> int:
        """Workspace of the largest convolution."""
        return self.micro_batch * self.trace.workspace_bytes

    @property
    def host(self) -> int:
        """States and activations that are offloaded to the host's memory, beside all other figures."""
        return self.states.host + self.micro_batch * self.trace.host_bytes

    @property
    def total(self) -> int:
        """Peak of a training step."""
        states = self.states
        held = states.weights + states.masters + states.moments + states.ema + states.gradients
        return FRAMEWORK_BYTES + held + max(self.saved + self.temporary + self.workspace, states.optimizer_step)

    def parts(self) -> dict[str, int]:
        """Name -> bytes, in the order of a table."""
        parts = {"framework": FRAMEWORK_BYTES, **asdict(self.states)}
        del parts["host"]
        return parts | {"saved": self.saved, "temporary": self.temporary, "workspace": self.workspace}


class Planner:
    """Plans for one configuration on one kind of device; each policy is traced once."""

    def __init__(self, config: Config, world_size: int, precision: str, device_type: str = "cuda") -> None:
        self.config, self.precision, self.device_type = config, precision, device_type
        self.parameters = count_parameters(config)
        self.states = plan_states(self.parameters, config.training, world_size, precision, device_type)
        self._traces: dict[str, Trace] = {}

    def trace(self, policy: str) -> Trace:
        """One volume's step under this policy."""
        if policy not in self._traces:
            config = with_policy(self.config, policy)
            self._traces[policy] = trace_step(config, DTYPES[self.precision], self.device_type)
        return self._traces[policy]

    def plan(self, policy: str, micro_batch: int) -> MemoryPlan:
        """Memory by part."""
        return MemoryPlan(policy, micro_batch, self.states, self.trace(policy))

    def largest_micro_batch(self, policy: str, budget: int) -> int:
        """Most volumes that fit into `budget` bytes with the safety margin and 32-bit indices; 0 where none does."""
        fixed = self.plan(policy, 0).total
        per_volume = self.trace(policy).peak_bytes + self.trace(policy).workspace_bytes
        step = self.states.optimizer_step  # in `fixed`, but not at the same time as the activations
        fitting = int((USABLE * budget - fixed + step) // per_volume) if fixed <= USABLE * budget else 0
        return max(0, min(fitting, self.index_limit(policy)))

    def index_limit(self, policy: str) -> int:
        """Largest micro batch whose every tensor has fewer than 2^31 elements."""
        return (MAX_NUMEL - 1) // self.trace(policy).largest_numel

    def check_indexing(self) -> None:
        """Raises ConfigError where a tensor would be too large for 32-bit indices."""
        policy, micro_batch = fixed_policy(self.config), self.config.training.micro_batch
        limit, numel, data = self.index_limit(policy), self.trace(policy).largest_numel, self.config.data
        if micro_batch > limit:
            raise ConfigError(
                f"training.micro_batch={micro_batch} makes a tensor of {micro_batch * numel:,} elements, kernels index "
                f"fewer than 2^31 = {MAX_NUMEL:,}; set training.micro_batch={limit} or less"
                if limit
                else f"one volume of {list(data.patch_size or data.size)} makes a tensor of {numel:,} elements, "
                f"kernels index fewer than 2^31 = {MAX_NUMEL:,}; reduce data.size or model.base_channels"
            )

    def choose_policy(self, budget: int) -> MemoryPlan:
        """The plan that recomputes least and fits into `budget` bytes with the safety margin.

        Raises:
            ConfigError: none fits.
        """
        micro_batch = self.config.training.micro_batch
        plans = []
        for policy in POLICIES:
            plans.append(self.plan(policy, micro_batch))
            if plans[-1].total <= USABLE * budget:
                return plans[-1]
        least = min(plans, key=lambda plan: plan.total)
        raise ConfigError(
            f"training.micro_batch={micro_batch} needs {least.total / GIB:.1f} GiB with activation checkpointing "
            f"'{least.policy}', {budget / GIB:.1f} GiB are free ({USABLE:.0%} usable); lower training.micro_batch, "
            "data.size or model.base_channels, or use a larger device" + self._way_out()
        )

    def _way_out(self) -> str:
        """What else a GPU's user can do when nothing fits."""
        is_left = self.device_type != "cpu" and self.config.model.offload_activations == "none"
        return ", or set model.offload_activations=cpu" if is_left else ""


def with_policy(config: Config, policy: str) -> Config:
    """The same configuration with this activation checkpointing."""
    return config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": policy})})


def fixed_policy(config: Config) -> str:
    """The configured policy, `none` where it is still to be chosen."""
    policy = config.model.activation_checkpointing
    return "none" if policy == "auto" else policy


def record(plan: MemoryPlan, budget: int) -> Mapping[str, Any]:
    """A choice as stored in the run directory, sizes in GiB."""
    sizes = {name: round(size / GIB, 3) for name, size in plan.parts().items()}
    return {
        "activation_checkpointing": plan.policy,
        "micro_batch": plan.micro_batch,
        "free_gib": round(budget / GIB, 3),
        "usable_share": USABLE,
        "predicted_peak_gib": round(plan.total / GIB, 3),
        "parts_gib": cast("Mapping[str, Any]", sizes),
        "host_gib": round(plan.host / GIB, 3),
    }
