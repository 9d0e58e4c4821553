"""The fastest settings of a training step on this device, among those that fit into its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from hpc_ddpm.benchmark.device import time_calls
from hpc_ddpm.benchmark.gpu_check.setup import attempt
from hpc_ddpm.benchmark.step import PlainStep
from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.planner import GIB, POLICIES, USABLE, Planner

FINALISTS = 3
"""Candidates that are measured again, in turns: the first look may have been unlucky."""
ROUNDS = 3
Measure = Callable[[Config], list[float]]
"""Seconds of each of some steps of a configuration."""


@dataclass(frozen=True)
class Candidate:
    """What is searched."""

    activation_checkpointing: str
    channels_last: bool
    micro_batch: int

    def apply(self, config: Config) -> Config:
        """The configuration with these settings, one micro step per optimizer step."""
        model = {"activation_checkpointing": self.activation_checkpointing, "channels_last": self.channels_last}
        training = {"micro_batch": self.micro_batch, "global_batch": self.micro_batch}
        return config.model_copy(
            update={
                "model": config.model.model_copy(update=model),
                "training": config.training.model_copy(update=training),
            }
        )

    def settings(self) -> dict[str, dict[str, Any]]:
        """As a configuration file has them."""
        return {
            "model": {"activation_checkpointing": self.activation_checkpointing, "channels_last": self.channels_last},
            "training": {"micro_batch": self.micro_batch},
        }


def tune(
    config: Config,
    device: torch.device,
    precision: str,
    world_size: int,
    budget: int,
    *,
    measure: Measure | None = None,
    on_candidate: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Measure every checkpointing policy, layout and micro batch that fits, and the best of them again in turns.

    Args:
        config: complete; micro batches are divisors of each rank's share of its global batch.
        device: to measure on; one rank is measured.
        precision: bf16, fp16 or fp32.
        world_size: ranks that the settings are for.
        budget: bytes of memory; what the planner predicts to need more than its usable share is not tried.
        measure: None takes plain training steps on the device.
        on_candidate: called with (candidates done, all).

    Returns:
        The fastest, and a row for each candidate, with `error` where it did not fit or failed.

    Raises:
        ConfigError: nothing fits.
    """
    measure = measure or _steps(device, precision)
    planner = Planner(config, world_size, precision, device.type)
    share = max(1, config.training.global_batch // world_size)
    batches = [size for size in range(1, share + 1) if share % size == 0]
    everyone = [Candidate(*each) for each in product(POLICIES, (False, True), batches)]
    rows: dict[Candidate, dict[str, Any]] = {}
    for number, candidate in enumerate(everyone):
        rows[candidate] = _look(candidate, config, planner, budget, measure)
        on_candidate(number + 1, len(everyone))
    measured = sorted((each for each in everyone if "samples_s" in rows[each]), key=lambda each: _median(rows[each]))
    if not measured:
        reasons = sorted({row["error"] for row in rows.values()})
        raise ConfigError(f"none of {len(everyone)} settings runs on this device: {'; '.join(reasons[:3])}")
    for _, candidate in product(range(ROUNDS), measured[:FINALISTS]):
        again = _measured(candidate, config, measure)
        rows[candidate]["samples_s"] += again.get("samples_s", [])
    best = min(measured[:FINALISTS], key=lambda each: _median(rows[each]))
    return best, list(_finished(rows.values()))


def _look(candidate: Candidate, config: Config, planner: Planner, budget: int, measure: Measure) -> dict[str, Any]:
    plan = planner.plan(candidate.activation_checkpointing, candidate.micro_batch)
    facts = {**candidate.__dict__, "predicted_gib": plan.total / GIB}
    if plan.total > USABLE * budget:
        return facts | {"error": f"needs more than {USABLE:.0%} of {budget / GIB:.2f} GiB"}
    if candidate.micro_batch > planner.index_limit(candidate.activation_checkpointing):
        return facts | {"error": "a tensor has too many elements for 32-bit indices"}
    return facts | _measured(candidate, config, measure)


def _measured(candidate: Candidate, config: Config, measure: Measure) -> dict[str, Any]:
    """`samples_s`, seconds per volume; or `error`."""

    def per_volume() -> dict[str, Any]:
        return {"samples_s": [seconds / candidate.micro_batch for seconds in measure(candidate.apply(config))]}

    return attempt({}, per_volume)


def _steps(device: torch.device, precision: str) -> Measure:
    def measure(config: Config) -> list[float]:
        return time_calls(PlainStep(config, device, precision), device, budget_s=1.0, least=3, most=20)

    return measure


def _median(row: dict[str, Any]) -> float:
    return spread(row["samples_s"])["median"]


def _finished(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """With the speed in place of the samples."""
    for row in rows:
        samples = row.pop("samples_s", None)
        yield row if samples is None else row | {"volumes_per_s": 1 / spread(samples)["median"], "steps": len(samples)}
