"""A model of a step beyond the GPUs that one has: compute, a ring of measured latency and bandwidth, data, checkpoints.

    step(n) = volumes * compute + k * collectives(n) + waiting for data + stall(n) / steps between checkpoints

Compute is the step of the smallest point. `k`, how much of the collectives no computation hides, is fitted to the
measured points of each engine. Data come at the rate at which the largest point could read them; a checkpoint is copied
by all ranks at the rate of the largest point. A network that no measured point has crossed is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hpc_ddpm.benchmark.comm import FP32, Ring, gradient_bytes
from hpc_ddpm.benchmark.scaling.curve import config_at
from hpc_ddpm.benchmark.scaling.race import DDP
from hpc_ddpm.benchmark.timing import Spread
from hpc_ddpm.config import Config

DDP_BUCKET = 25 * 2**20
"""Bytes; the default of PyTorch."""
DOUBLINGS = 4
"""Beyond the largest measured point."""
Row = dict[str, Any]


def collectives_s(contestant: str, config: Config, precision: str, ring: Ring, gpus: int) -> float:
    """Seconds of all collectives of one optimizer step, one after the other; `config` is that for `gpus` GPUs."""
    gradients = gradient_bytes(config)
    weights = gradients if precision == "fp32" else gradients // 2
    micro_steps = config.training.accumulation(gpus)
    bucket = FP32 * config.training.reduce_bucket_size

    def seconds(operation: str, num_bytes: int, most: int) -> float:
        full, rest = divmod(num_bytes, most)
        return full * ring.seconds(operation, most, gpus) + (ring.seconds(operation, rest, gpus) if rest else 0.0)

    if contestant == DDP:
        return seconds("all_reduce", weights, DDP_BUCKET)
    if contestant == "zero0":
        return seconds("all_reduce", gradients, bucket)
    reduce, gather = seconds("reduce_scatter", gradients, bucket), seconds("all_gather", weights, bucket)
    if contestant == "zero3":
        return micro_steps * (reduce + 2 * gather)
    return (micro_steps if contestant == "zero2" else 1) * reduce + gather


class StepModel:
    """The model of one engine, fitted to measured rows of it; at least one of them has several GPUs."""

    def __init__(self, rows: Sequence[Row], config: Config, mode: str, precision: str, ring: Ring) -> None:
        self.config, self.mode, self.precision, self.ring = config, mode, precision, ring
        self.base, self.largest = rows[0], rows[-1]
        self.compute_s = self.base["seconds_per_volume"]["median"]
        self.exposed = self._fit(rows)

    def _fit(self, rows: Iterable[Row]) -> float:
        """Least squares of the relative errors of the step time; not below zero."""
        above = below = 0.0
        for row in rows:
            step_s = self._volumes(row["gpus"]) * row["seconds_per_volume"]["median"]
            added, whole = step_s - self._volumes(row["gpus"]) * self.compute_s, self._collectives_s(row["gpus"])
            above, below = above + added * whole / step_s**2, below + (whole / step_s) ** 2
        return max(0.0, above / below) if below else 0.0

    def _volumes(self, gpus: int) -> float:
        return config_at(self.config, gpus, self.mode).training.global_batch / gpus

    def _collectives_s(self, gpus: int) -> float:
        """More than at the base."""
        at, base = (
            collectives_s(
                self.base["contestant"], config_at(self.config, each, self.mode), self.precision, self.ring, each
            )
            for each in (gpus, self.base["gpus"])
        )
        return at - base

    def seconds_per_volume(self, gpus: int, *, with_checkpoints: bool = False) -> float:
        """On one of so many GPUs."""
        volumes = self._volumes(gpus)
        step_s = volumes * self.compute_s + self.exposed * self._collectives_s(gpus)
        step_s = max(step_s, volumes * self.largest["read_s"])
        if with_checkpoints:
            stall_s = self.largest["checkpoint_stall_s"] * self.largest["gpus"] / gpus
            step_s += stall_s / self.config.training.checkpoint_every_steps
        return step_s / volumes


def predict(rows: Sequence[Row], config: Config, mode: str, precision: str, ring: Ring, per_node: int) -> list[Row]:
    """Rows for more GPUs than were measured; the measured rows get `prediction_error`, of the time of a volume.

    The largest point also gets `held_out_error`: what the model says of it when it was fitted without that point.
    """
    predicted: list[Row] = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name]
        if len(own) < 2:
            continue
        model = StepModel(own, config, mode, precision, ring)
        for row in own[1:]:
            row["prediction_error"] = _error(model, row)
        if len(own) > 2:
            own[-1]["held_out_error"] = _error(StepModel(own[:-1], config, mode, precision, ring), own[-1])
        for gpus in (own[-1]["gpus"] * 2**power for power in range(1, DOUBLINGS + 1)):
            if mode == "strong" and config.training.global_batch % (gpus * config.training.micro_batch):
                break
            seconds = model.seconds_per_volume(gpus, with_checkpoints=True)
            efficiency = model.compute_s / seconds
            even: Spread = {"median": efficiency, "p10": efficiency, "p90": efficiency}
            predicted.append(
                {
                    "kind": "predicted",
                    "gpus": gpus,
                    "nodes": -(-gpus // per_node),
                    "contestant": name,
                    "volumes_per_s": gpus / seconds,
                    "volumes_per_s_per_gpu": 1 / seconds,
                    "efficiency": even,
                    "exposed_share_of_collectives": model.exposed,
                }
            )
    return predicted


def _error(model: StepModel, row: Row) -> float:
    measured: float = row["seconds_per_volume"]["median"]
    return model.seconds_per_volume(row["gpus"]) / measured - 1
