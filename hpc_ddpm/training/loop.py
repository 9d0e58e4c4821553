"""The training loop. Run it again on the same directory and it goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.checkpoint import agree_on_latest, step_of
from hpc_ddpm.config import READING_SETTINGS, Config, DataConfig
from hpc_ddpm.data.dataset import Batch, Expand, VolumeDataset
from hpc_ddpm.data.loader import build_loader, copy_ahead
from hpc_ddpm.data.patches import PatchDataset, SampleBatches
from hpc_ddpm.data.pool import Progress
from hpc_ddpm.data.sampler import StepBatches
from hpc_ddpm.data.stage import stage
from hpc_ddpm.diffusion.gaussian import draw_training, training_loss
from hpc_ddpm.diffusion.schedules import Schedule, build_schedule
from hpc_ddpm.distributed import Ranks, StopFlag, all_or_none, all_reduce_mean
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import RunLog
from hpc_ddpm.training.engine import Engine, learning_rate
from hpc_ddpm.training.memory import settle_memory
from hpc_ddpm.training.saver import Saver

GIB = 2**30


@dataclass(frozen=True)
class TrainResult:
    """Where training stands when it returns."""

    step: int
    resumed_from: int
    stopped_by: int
    """Signal number, or 0 when all steps are done."""


def train(
    config: Config,
    run_dir: Path,
    ranks: Ranks,
    device: torch.device,
    on_log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    on_stage: Progress = lambda done, total: None,
) -> TrainResult:
    """Train to `config.training.num_steps`, or until a stop signal; all ranks call it inside a process group.

    Args:
        config: complete; `data.path` names the packed dataset.
        run_dir: takes metrics, TensorBoard files, `deepspeed.json`, the choice of `activation_checkpointing=auto`
            and checkpoints.
        ranks: as detected.
        device: of this rank.
        on_log: called on rank 0 after every step, with the numbers of the step where they were logged.
        on_stage: called with (shards, all shards) while shards are copied to `config.data.stage_dir`.

    Raises:
        ConfigError: the configuration contradicts the packed dataset or the number of ranks, or does not fit.
        CheckpointError: a checkpoint does not fit or cannot be written.
        ClusterError: no room for `config.data.stage_dir` or `config.data.cache`.
    """
    training = config.training
    root = run_dir / "checkpoints"
    folder = agree_on_latest(root, ranks)
    if folder is not None and step_of(folder) >= training.num_steps:
        return TrainResult(step_of(folder), step_of(folder), 0)
    config = config.model_copy(update={"data": agree_with_packed(config.data)})
    config = settle_memory(config, run_dir, ranks, device)
    dataset = VolumeDataset(all_or_none(partial(stage, config.data, on_stage)), "train")
    if config.data.cache == "ram":
        dataset.keep_in_ram()
    start = 0 if folder is None else step_of(folder)
    engine = Engine(config, ranks, device, folder)
    batches = StepBatches(
        len(dataset),
        config.seed,
        start,
        training.num_steps - start,
        training.global_batch,
        training.micro_batch,
        ranks.rank,
        ranks.world_size,
    )
    if ranks.is_main:
        settings = {"given": engine.settings, "resolved": engine.resolved_settings}
        write_json(run_dir / "deepspeed.json", settings, indent=2)
    log = RunLog(run_dir, is_main=ranks.is_main, start_step=start)
    meter = _Meter(training.global_batch, ranks, device)
    schedule = build_schedule(config.diffusion).to(device)
    saver = Saver(root, training, ranks, device)
    step, stopped_by = start, 0
    if config.data.patch_size:
        patches = PatchDataset(dataset, config.seed, config.data.training_shape)
        read = build_loader(patches, SampleBatches(batches), config.data.num_workers)
    else:
        read = build_loader(dataset, batches, config.data.num_workers)
    loader = copy_ahead(read, device)
    expand = Expand(config.data.labels, config.augment, config.seed)
    with StopFlag() as stop:
        while step < training.num_steps and not stopped_by:
            rate = learning_rate(training, step)
            losses = list(_micro_steps(engine, config, schedule, loader, expand, batches, step, rate, meter, device))
            if (step + 1) % training.ema_every_steps == 0:
                engine.ema.update()
            step += 1
            meter.add(step, torch.stack(losses).mean())
            stopped_by = stop.agreed(device)
            saver.poll()
            is_last = step == training.num_steps or bool(stopped_by)
            is_save = is_last or step % training.checkpoint_every_steps == 0
            if is_save or step % training.log_every_steps == 0:  # no step of a checkpoint is missing in the log
                extra = {"learning_rate": rate, "gradient_norm": engine.gradient_norm()}
                for logged_step, values in meter.flush(extra | {"checkpoint_stall_s": saver.take_stall_s()}):
                    log.scalars(logged_step, values)
                    on_log(logged_step, values)
            if is_save:
                facts = {"config_digest": config.digest(), **engine.facts()}
                background = training.async_checkpoints and not is_last
                saver.save(step, facts, engine.pieces(), background=background)
    saver.close()
    log.close()
    engine.close()
    return TrainResult(step, start, stopped_by if step < training.num_steps else 0)


def agree_with_packed(data: DataConfig) -> DataConfig:
    """The packed dataset's own description, with this run's reading settings.

    Raises:
        ConfigError: the run asks for other modalities, labels, size or intensities than were packed.
    """
    from hpc_ddpm.data.shards import open_packed

    if not data.path:
        raise ConfigError("no data: give --data PACKED (or data.path), a folder made by `hpc-ddpm pack`")
    packed = open_packed(data.path).data
    for name in ("modalities", "size", "orientation", "normalization", "labels"):
        found, wanted = getattr(packed, name), getattr(data, name)
        if found != wanted:
            raise ConfigError(
                f"data.{name}: {data.path} was packed with {_plain(found)}, this run asks for {_plain(wanted)}; "
                "train with the configuration it was packed with, or pack again"
            )
    return packed.model_copy(update={name: getattr(data, name) for name in READING_SETTINGS})


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else list(value) if isinstance(value, tuple) else value


def _micro_steps(
    engine: Engine,
    config: Config,
    schedule: Schedule,
    loader: Iterator[Batch],
    expand: Expand,
    batches: StepBatches,
    step: int,
    rate: float,
    meter: _Meter,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """One optimizer step; yields the detached loss of every micro step of this rank."""
    for micro_step in range(batches.accumulation):
        with meter.waiting():
            batch = next(loader)
        samples = batches.sample_indices(step, micro_step)
        x_start, condition = expand(batch["image"], batch["mask"], samples)
        draw = draw_training(config.seed, samples, x_start.shape[1:], config.diffusion, device)
        off_value = config.data.labels.off_value
        loss = training_loss(engine.deepspeed, x_start, condition, draw, schedule, config.diffusion, off_value).mean()
        engine.backward(loss)
        engine.step(rate)
        yield loss.detach()


class _Meter:
    """Losses of every step without a synchronisation in each, and where the time went between two logs."""

    def __init__(self, global_batch: int, ranks: Ranks, device: torch.device) -> None:
        self.global_batch, self.ranks, self.device = global_batch, ranks, device
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._wait_s = 0.0
        self._since = time.perf_counter()

    def waiting(self) -> _Meter:
        """Context in which time counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._wait_s += time.perf_counter() - self._entered

    def add(self, step: int, loss: torch.Tensor) -> None:
        """This rank's mean loss of one step."""
        self._losses.append((step, loss))

    def flush(self, extra: Mapping[str, float]) -> list[tuple[int, dict[str, float]]]:
        """Rows since the last flush, losses averaged over ranks; the last row carries the speed. A collective."""
        local = torch.stack([loss for _, loss in self._losses]).tolist()
        elapsed_s = time.perf_counter() - self._since
        *losses, wait_share = all_reduce_mean([*local, self._wait_s / elapsed_s], self.device)
        rows: list[tuple[int, dict[str, float]]] = [
            (step, {"loss": loss}) for (step, _), loss in zip(self._losses, losses, strict=True)
        ]
        step_time_s = elapsed_s / len(rows)
        volumes_per_s = self.global_batch / step_time_s
        rows[-1][1].update(
            extra,
            step_time_s=step_time_s,
            volumes_per_s=volumes_per_s,
            volumes_per_s_per_rank=volumes_per_s / self.ranks.world_size,
            data_wait_share=wait_share,
            memory_gib=peak_memory_gib(self.device),
        )
        self._losses, self._wait_s, self._since = [], 0.0, time.perf_counter()
        return rows


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
