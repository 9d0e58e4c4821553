"""ZeRO stages and plain DDP on the same ranks, a few steps each in turn: the training loop's own step."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_ddpm.benchmark.ddp import DdpEngine
from hpc_ddpm.benchmark.device import synchronize
from hpc_ddpm.benchmark.timing import take_turns
from hpc_ddpm.config import Config
from hpc_ddpm.data.agreement import agree_with_packed
from hpc_ddpm.data.dataset import VolumeDataset
from hpc_ddpm.data.loader import build_loader
from hpc_ddpm.data.stage import stage
from hpc_ddpm.diffusion.schedules import Schedule, build_schedule
from hpc_ddpm.distributed import Ranks, StopFlag, all_gather, all_or_none
from hpc_ddpm.model.planner import GIB
from hpc_ddpm.sealed import read_json
from hpc_ddpm.training.engine import Engine
from hpc_ddpm.training.feed import Feed
from hpc_ddpm.training.loop import advance
from hpc_ddpm.training.meter import Meter
from hpc_ddpm.training.profiling import WHERE_FILE, Profiler
from hpc_ddpm.training.saver import Saver

DDP = "ddp"
CONTESTANTS = (DDP, "zero0", "zero1", "zero2", "zero3")
PROFILED = 2
"""Steps of each that tell where the time goes, after those that count."""
STALL_STEPS = 3
"""At most so many steps during which a checkpoint may hold training up."""
READS = 8
"""Micro batches of each rank that are read without training."""


@dataclass
class Runner:
    """A contestant in the middle of its training."""

    name: str
    config: Config
    engine: Engine
    feed: Feed
    schedule: Schedule
    ranks: Ranks
    device: torch.device
    step: int = 0

    def turn(self, steps: int) -> dict[str, float]:
        """So many optimizer steps; seconds of each, share of waiting for data, last loss. A collective."""
        dist.barrier()
        synchronize(self.device)
        meter = Meter(self.config.training.global_batch, self.ranks, self.device)
        for _ in range(steps):
            advance(self.engine, self.feed, self.config, self.schedule, self.step, meter)
            self.step += 1
        _, last = meter.flush({})[-1]
        return {"step_s": last["step_time_s"], "data_wait_share": last["data_wait_share"], "loss": last["loss"]}


def race(
    config: Config,
    contestants: Sequence[str],
    folder: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    repeats: int,
    steps: int,
    warm_up: int,
) -> list[dict[str, Any]]:
    """Let the contestants take turns and return, on rank 0, a row for each; all ranks call it inside a process group.

    Their weights, moments and averages are in memory at the same time, activations are not.

    Args:
        config: complete, of this number of ranks; `data.path` names the packed dataset.
        contestants: of CONTESTANTS.
        folder: that all ranks see, for checkpoints.
        ranks: as detected.
        device: of this rank.
        repeats: turns that count, after one of the same length that does not.
        steps: of a turn.
        warm_up: steps before all turns.

    Returns:
        `contestant`, `step_s` and `data_wait_share` of every turn, `loss` of the last (the same for all, to rounding),
        `shares` of a step by part, `checkpoint_gib` and `checkpoint_stall_s` of one save in the background, `read_s` of
        a volume without training.

    Raises:
        ConfigError: see `train`.
    """
    total = warm_up + (repeats + 1) * steps + PROFILED + STALL_STEPS
    config = config.model_copy(
        update={
            "data": agree_with_packed(config.data),
            "training": config.training.model_copy(update={"num_steps": total}),
        }
    )
    dataset = VolumeDataset(all_or_none(partial(stage, config.data)), "train")
    if config.data.cache == "ram":
        dataset.keep_in_ram()
    read_s = _read_s(config, dataset)
    with StopFlag() as stop:
        runners = [_start(name, config, dataset, ranks, device, stop) for name in contestants]
        for runner in runners:
            runner.turn(warm_up)
        turns = {runner.name: partial(runner.turn, steps) for runner in runners}
        counted = take_turns(turns, repeats)
        rows = []
        for runner in runners:
            found = {
                "step_s": [turn["step_s"] for turn in counted[runner.name]],
                "data_wait_share": [turn["data_wait_share"] for turn in counted[runner.name]],
                "loss": counted[runner.name][-1]["loss"],
                "shares": _shares(runner),
                "read_s": read_s,
                **_checkpoint(runner, folder / runner.name),
            }
            rows.append({"contestant": runner.name, **found})
            runner.engine.close()
    return rows if ranks.is_main else []


def _start(
    name: str, config: Config, dataset: VolumeDataset, ranks: Ranks, device: torch.device, stop: StopFlag
) -> Runner:
    if name != DDP:
        changes = {"zero_stage": int(name.removeprefix("zero"))}
        config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    engine = (DdpEngine if name == DDP else Engine)(config, ranks, device)
    feed = Feed(config, dataset, 0, 0, ranks, device, stop)
    return Runner(name, config, engine, feed, build_schedule(config.diffusion).to(device), ranks, device)


def _read_s(config: Config, dataset: VolumeDataset) -> float:
    """Seconds until the next volume is there, where all ranks read at once and do nothing else."""
    size = config.training.micro_batch
    batches = [[(number * size + each) % len(dataset) for each in range(size)] for number in range(READS + 1)]
    reads = iter(build_loader(dataset, batches, config.data.num_workers))
    next(reads)
    dist.barrier()
    began = time.perf_counter()
    for _ in reads:
        pass
    return max(all_gather((time.perf_counter() - began) / (READS * size)))


def _shares(runner: Runner) -> dict[str, float]:
    """Share of each part in the time of a profiled step, on rank 0; empty on the other ranks."""
    with tempfile.TemporaryDirectory() as folder:
        steps = (1, PROFILED) if runner.ranks.is_main else None
        profiler = Profiler(steps, Path(folder), runner.engine.deepspeed.module, runner.device)
        meter = Meter(runner.config.training.global_batch, runner.ranks, runner.device)
        for number in range(1, PROFILED + 1):
            with profiler.step(number):
                advance(runner.engine, runner.feed, runner.config, runner.schedule, runner.step, meter)
            runner.step += 1
        if not runner.ranks.is_main:
            return {}
        where = read_json(Path(folder) / WHERE_FILE, dict[str, Any], "measure again")
    return {part: seconds / where["wall_s"] for part, seconds in where["parts_s"].items()}


def _checkpoint(runner: Runner, folder: Path) -> dict[str, float]:
    """How long one save in the background holds the next steps up; nothing of DDP, which saves nothing."""
    if runner.name == DDP:
        return {}
    if runner.ranks.is_main:
        folder.mkdir(parents=True)
    saver = Saver(folder / "checkpoints", runner.config.training, runner.ranks, runner.device)
    saver.save(runner.step, runner.engine.facts(), runner.engine.pieces(), background=True)
    for _ in range(STALL_STEPS):
        runner.turn(1)
        saver.poll()
    stall_s = saver.take_stall_s()
    saver.finish()
    saver.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if runner.ranks.is_main else 0
    dist.barrier()
    if runner.ranks.is_main:
        shutil.rmtree(folder)
    return {"checkpoint_stall_s": stall_s, "checkpoint_gib": size / GIB}
