"""The fastest settings of training among those that fit into the memory, found one dimension after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.planner import GIB, POLICIES, USABLE, MemoryPlan, Planner, plan_states

FINALISTS = 3
"""Candidates that are measured again, in turns: the first look may have been unlucky."""
ROUNDS = 2
CLOSE = 1.1
"""Times as slow as the fastest, that a finalist may be."""
WORSE = 1.05
"""Times as slow as the fastest so far: further along a dimension it will not get better."""
WORKERS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """What is searched."""

    zero_stage: int
    activation_checkpointing: str
    micro_batch: int
    channels_last: bool
    compile: bool
    num_workers: int

    def settings(self) -> dict[str, dict[str, Any]]:
        """As a configuration file has them."""
        return {
            "model": {"activation_checkpointing": self.activation_checkpointing, "channels_last": self.channels_last},
            "training": {"zero_stage": self.zero_stage, "micro_batch": self.micro_batch, "compile": self.compile},
            "data": {"num_workers": self.num_workers},
        }

    def overrides(self) -> list[str]:
        """As a command line has them."""
        sections = self.settings().items()
        return [f"{section}.{key}={value}" for section, values in sections for key, value in values.items()]


Measure = Callable[[Candidate], dict[str, Any]]
"""`samples_s`, the seconds per volume of each repeat, or `error`; and more columns."""
Space = dict[str, Sequence[Any]]
"""Values of each dimension, from the one to begin with; in the order in which they are searched."""


def search_space(config: Config, world_size: int, cores: int, *, is_gpu: bool) -> Space:
    """All that a configuration allows on so many ranks.

    Args:
        config: complete.
        world_size: ranks of a trial.
        cores: for each rank.
        is_gpu: whether torch.compile is worth a look.
    """
    training = config.training
    share = max(1, training.global_batch // world_size)
    is_sharded_only = training.offload_optimizer != "none" or training.precision == "fp16"
    stages = [3] if training.offload_parameters != "none" else [1, 2, 3] if is_sharded_only else [0, 1, 2, 3]
    return {
        "num_workers": [count for count in WORKERS if count <= max(1, cores)],
        "channels_last": (False, True),
        "compile": (False, True) if is_gpu else (False,),
        "micro_batch": [size for size in range(1, share + 1) if share % size == 0],
        "activation_checkpointing": POLICIES,
        "zero_stage": stages if world_size > 1 else [training.zero_stage],
    }


def tune(
    config: Config,
    planner: Planner,
    world_size: int,
    space: Space,
    budget: int,
    measure: Measure,
    *,
    is_exhaustive: bool = False,
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Search one dimension after the other from the configured settings, until a round finds nothing faster.

    A larger micro batch is tried with the checkpointing that recomputes least and fits. Along a dimension the search
    ends where it gets slower. The fastest are measured again in turns.

    Args:
        config: complete.
        planner: of it; what it predicts to need more than the usable share of the memory is not tried.
        world_size: ranks of a trial.
        space: from `search_space`, or a part of it.
        budget: bytes of memory of one rank.
        measure: runs a trial.
        is_exhaustive: try every combination instead.

    Returns:
        The fastest, and a row for each candidate that was looked at, with `error` where it did not fit or failed.

    Raises:
        ConfigError: nothing runs.
    """
    trials = _Trials(config, planner, world_size, budget, measure)
    best = _start(config, space)
    if is_exhaustive:
        everything = [replace(best, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
        best = min(everything, key=trials.cost)
    before = best if is_exhaustive else None
    while best != before:
        before = best
        for dimension in space:
            best = _along(dimension, space, best, trials)
    if math.isinf(trials.cost(best)):
        reasons = sorted({row["error"] for row in trials.rows.values()})
        raise ConfigError(f"none of {len(trials.rows)} settings runs on this device: {'; '.join(reasons[:3])}")
    return trials.final(), [_finished(row) for row in trials.rows.values()]


def _start(config: Config, space: Space) -> Candidate:
    """The configured settings, where the space has them."""
    training, model = config.training, config.model
    configured: dict[str, Any] = {
        "zero_stage": training.zero_stage,
        "activation_checkpointing": model.activation_checkpointing.replace("auto", POLICIES[0]),
        "micro_batch": training.micro_batch,
        "channels_last": model.channels_last,
        "compile": training.compile,
        "num_workers": config.data.num_workers,
    }
    known: dict[str, Any] = {
        key: value if value in space.get(key, [value]) else space[key][0] for key, value in configured.items()
    }
    return Candidate(**known)


def _along(dimension: str, space: Space, best: Candidate, trials: _Trials) -> Candidate:
    values = list(space[dimension])
    for value in values:
        candidate = replace(best, **{dimension: value})
        if dimension == "micro_batch":
            candidate = _least_recomputing(candidate, space, trials)
        cost = trials.cost(candidate)
        if cost < trials.cost(best):
            best = candidate
        is_further = values.index(value) > values.index(getattr(best, dimension))
        if is_further and WORSE * trials.cost(best) < cost < math.inf:
            break
    return best


def _least_recomputing(candidate: Candidate, space: Space, trials: _Trials) -> Candidate:
    """With the first checkpointing policy that runs; as it is where none does."""
    policies = space.get("activation_checkpointing", [candidate.activation_checkpointing])
    tried = (replace(candidate, activation_checkpointing=policy) for policy in policies)
    return next((each for each in tried if math.isfinite(trials.cost(each))), candidate)


class _Trials:
    """Each candidate is planned, and measured if it fits, once."""

    def __init__(self, config: Config, planner: Planner, world_size: int, budget: int, measure: Measure) -> None:
        self.config, self.planner, self.world_size = config, planner, world_size
        self.budget, self.measure = budget, measure
        self.rows: dict[Candidate, dict[str, Any]] = {}

    def cost(self, candidate: Candidate) -> float:
        """Median seconds per volume; infinite where it does not run."""
        if candidate not in self.rows:
            self.rows[candidate] = self._look(candidate)
        row = self.rows[candidate]
        return spread(row["samples_s"])["median"] if "samples_s" in row else math.inf

    def final(self) -> Candidate:
        """The fastest of the best, after more repeats."""
        ranked = sorted((each for each in self.rows if math.isfinite(self.cost(each))), key=self.cost)
        finalists = [each for each in ranked[:FINALISTS] if self.cost(each) <= CLOSE * self.cost(ranked[0])]
        for candidate in finalists * (ROUNDS if len(finalists) > 1 else 0):
            self.rows[candidate]["samples_s"] += self.measure(candidate).get("samples_s", [])
        return min(finalists, key=self.cost)

    def _look(self, candidate: Candidate) -> dict[str, Any]:
        plan, policy = self._plan(candidate), candidate.activation_checkpointing
        facts = {**asdict(candidate), "predicted_gib": plan.total / GIB}
        if plan.total > USABLE * self.budget:
            return facts | {"error": f"needs more than {USABLE:.0%} of {self.budget / GIB:.2f} GiB"}
        if candidate.micro_batch > self.planner.index_limit(policy):
            return facts | {"error": "a tensor has too many elements for 32-bit indices"}
        return facts | self.measure(candidate)

    def _plan(self, candidate: Candidate) -> MemoryPlan:
        training = self.config.training.model_copy(update={"zero_stage": candidate.zero_stage})
        planner = self.planner
        states = plan_states(planner.parameters, training, self.world_size, planner.precision, planner.device_type)
        policy = candidate.activation_checkpointing
        return MemoryPlan(policy, candidate.micro_batch, states, planner.trace(policy))


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    """With the speed in place of the samples."""
    samples = row.get("samples_s")
    kept = {key: value for key, value in row.items() if key != "samples_s"}
    return kept if not samples else kept | {"volumes_per_s": 1 / spread(samples)["median"], "repeats": len(samples)}
