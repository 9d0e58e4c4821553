"""The training loop. Run it again on the same directory and it goes on where it stopped."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import record_function

from hpc_ddpm.checkpoint import agree_on_latest, step_of
from hpc_ddpm.config import Config, TrainingConfig
from hpc_ddpm.data.agreement import agree_with_packed
from hpc_ddpm.data.dataset import VolumeDataset
from hpc_ddpm.data.pool import Progress
from hpc_ddpm.data.stage import stage
from hpc_ddpm.diffusion.gaussian import training_loss
from hpc_ddpm.diffusion.schedules import Schedule, build_schedule
from hpc_ddpm.distributed import Ranks, StopFlag, all_or_none
from hpc_ddpm.files import write_json, writing_to
from hpc_ddpm.runlog import RunLog, provenance
from hpc_ddpm.training.engine import Engine, learning_rate
from hpc_ddpm.training.faults import Fault
from hpc_ddpm.training.feed import Feed
from hpc_ddpm.training.guards import DivergedError, SpikeDetector, StepGuard, count_rollbacks, roll_back
from hpc_ddpm.training.memory import OnChoice, settle_memory
from hpc_ddpm.training.meter import Meter
from hpc_ddpm.training.previews import Previews
from hpc_ddpm.training.profiling import DATA, OPTIMIZER, Profiler
from hpc_ddpm.training.profiling import FOLDER as PROFILE
from hpc_ddpm.training.resume import CONFIG_FILE, check_data, check_resume
from hpc_ddpm.training.saver import Saver
from hpc_ddpm.training.validation import Validation
from hpc_ddpm.training.watchdog import Watchdog
from hpc_ddpm.workers.sole import Sole, sole_owner

START_FILE = "start.json"
STATE = ".train"
"""Folder in the run directory that exists while a process trains."""
OnLog = Callable[[int, Mapping[str, float]], None]


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
    on_log: OnLog = lambda step, values: None,
    on_stage: Progress = lambda done, total: None,
    on_choice: OnChoice = lambda choice: None,
    stop: StopFlag | None = None,
) -> TrainResult:
    """Train to `config.training.num_steps`, or until a stop signal; all ranks call it inside a process group.

    Args:
        config: complete; `data.path` names the packed dataset.
        run_dir: takes `config.json`, `provenance.json`, metrics, TensorBoard files, previews, `deepspeed.json`,
            `start.json`, the choice of `activation_checkpointing=auto` and checkpoints.
        ranks: as detected.
        device: of this rank.
        on_log: called after every step, with no numbers; where steps are logged, with those of each since the last log.
        on_stage: called with (shards, all shards) while shards are copied to `config.data.stage_dir`.
        on_choice: called on rank 0 with what `activation_checkpointing=auto` stands for, before training takes memory.
        stop: one that has been listening already.

    Raises:
        ConfigError: the configuration contradicts the run, the packed dataset or the number of ranks, or does not fit.
        CheckpointError: a checkpoint does not fit or cannot be written.
        ClusterError: no room for `config.data.stage_dir` or `config.data.cache`.
        DataFormatError: a volume is damaged; on all ranks.
        TrainingError: the loss diverged, and again after `max_rollbacks` roll-backs.
    """
    training = config.training
    wanted = config
    with ExitStack() as stack:
        sole = all_or_none(partial(_open_run, run_dir, config, ranks, stack))
        folder = agree_on_latest(run_dir / "checkpoints", ranks)
        start = step_of(folder) if folder else 0
        if start >= training.num_steps:
            return TrainResult(start, start, 0)
        config = config.model_copy(update={"data": agree_with_packed(config.data)})
        if folder:
            all_or_none(partial(check_data, folder, config.data.path))
        config = settle_memory(config, run_dir, ranks, device, on_choice)
        dataset = VolumeDataset(all_or_none(partial(stage, config.data, on_stage)), "train")
        if config.data.cache == "ram":
            dataset.keep_in_ram()
        run = Run(run_dir, wanted, ranks, device, stop or stack.enter_context(StopFlag()), sole, on_log)
        while True:
            try:
                step, stopped_by = _train_from(folder, config, dataset, run)
                return TrainResult(step, start, stopped_by if step < training.num_steps else 0)
            except DivergedError as error:
                diverged = error.with_traceback(None)  # whose frames hold the engine
            free_engine(device)
            folder = roll_back(run_dir, diverged, training, ranks)


@dataclass(frozen=True)
class Run:
    """What stays the same over all roll-backs."""

    folder: Path
    wanted: Config
    """The configuration as the user asked for it."""
    ranks: Ranks
    device: torch.device
    stop: StopFlag
    sole: Sole | None
    """Rank 0's proof that no other process trains in this run directory; None on other ranks."""
    on_log: OnLog


def _open_run(run_dir: Path, wanted: Config, ranks: Ranks, stack: ExitStack) -> Sole | None:
    check_resume(run_dir, wanted)
    if not ranks.is_main:
        return None
    with writing_to(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(sole_owner(run_dir / STATE, "train", partial(_refusal, run_dir)))


def _refusal(run_dir: Path, holder: str) -> str:
    return f"{run_dir}: {holder} trains here already; wait for it, end it, or choose another --out"


def free_engine(device: torch.device) -> None:
    """Give back the memory of an engine that was closed: it lies in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _train_from(folder: Path | None, config: Config, dataset: VolumeDataset, run: Run) -> tuple[int, int]:
    """Go on from a checkpoint, or begin; returns the step where training ended, and the signal that ended it or 0."""
    training, run_dir, ranks, device, stop = config.training, run.folder, run.ranks, run.device, run.stop
    step = start = step_of(folder) if folder else 0
    stopped_by = 0
    schedule = build_schedule(config.diffusion).to(device)
    guard = StepGuard(training.max_bad_steps, start, tell=ranks.is_main)
    spikes, fault = SpikeDetector(), Fault(ranks)
    packed = dataset.packed.path
    digests = {"config_digest": config.digest(), "data_digest": dataset.packed.digest("train")}
    validation, previews = None, None
    if training.validate_every_steps:
        validation = all_or_none(partial(Validation, config, packed, ranks, device))
    if training.preview_every_steps:
        previews = all_or_none(partial(Previews, config, packed, run_dir, ranks, device))
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(run_dir, ranks.rank, training.hang_timeout_s))
        engine = stack.enter_context(closing(Engine(config, ranks, device, folder)))
        if ranks.is_main:
            write_json(run_dir / CONFIG_FILE, run.wanted.dump(), indent=2)  # not before all else has agreed to it
            write_json(run_dir / "provenance.json", provenance() | {"world_size": ranks.world_size}, indent=2)
            settings = {"given": engine.settings, "resolved": engine.resolved_settings}
            write_json(run_dir / "deepspeed.json", settings, indent=2)
            if folder is None:
                write_json(run_dir / START_FILE, engine.start_report, indent=2)
        log = stack.enter_context(closing(RunLog(run_dir, is_main=ranks.is_main, start_step=start)))
        saver = stack.enter_context(closing(Saver(run_dir / "checkpoints", training, ranks, device, run.sole)))
        steps = training.profile_steps if ranks.is_main else None
        profiler = stack.enter_context(closing(Profiler(steps, run_dir / PROFILE, engine.deepspeed.module, device)))
        feed = Feed(config, dataset, start, count_rollbacks(run_dir, ranks), ranks, device, stop)
        meter = Meter(training.global_batch, ranks, device)
        while step < training.num_steps and not stopped_by:
            with profiler.step(step - start + 1):
                advance(engine, feed, config, schedule, step, meter, fault)
            step += 1
            if run.sole:
                with stop.failing():
                    run.sole.check_quickly()
            stopped_by = stop.agreed(device)
            saver.poll()
            try:
                guard.saw(step, is_bad=engine.has_failed)
            except DivergedError:
                saver.finish()
                raise
            watchdog.beat(f"step {step}")
            seen = {} if stopped_by else _look(engine, validation, previews, training, step, log, meter)
            is_last = step == training.num_steps or bool(stopped_by)
            is_save = is_last or (step % training.checkpoint_every_steps == 0 and not guard.bad_in_a_row)
            if is_save or seen or step % training.log_every_steps == 0:  # no step of a checkpoint is missing in the log
                extra = seen | {
                    "learning_rate": learning_rate(training, step - 1),
                    "gradient_norm": engine.gradient_norm(),
                    "skipped_steps": guard.take_skipped(),
                    "checkpoint_stall_s": saver.take_stall_s(),
                }
                for logged_step, values in meter.flush(extra):
                    if ranks.is_main:
                        values |= spikes.watch(logged_step, values["loss"])
                    with stop.failing(), writing_to(run_dir):
                        log.scalars(logged_step, values)
                    run.on_log(logged_step, values)
            else:
                run.on_log(step, {})
            if is_save:
                watchdog.beat(f"step {step}, before a checkpoint")
                facts = {**digests, **engine.facts()}
                background = training.async_checkpoints and not is_last
                saver.save(step, facts, engine.pieces(), background=background)
        stop.agreed(device)  # nothing has failed on any rank
    return step, stopped_by


def advance(
    engine: Engine,
    feed: Feed,
    config: Config,
    schedule: Schedule,
    step: int,
    meter: Meter,
    fault: Fault | None = None,
) -> None:
    """Optimizer step `step`, counted from 0: micro steps, averages, and this rank's mean loss into the meter."""
    losses, rate = [], learning_rate(config.training, step)
    off_value = config.data.labels.off_value
    for micro_step in range(feed.accumulation):
        with record_function(DATA):
            with meter.waiting():
                batch = feed.read()
            x_start, condition, draw, covariates = feed.prepare(batch, step, micro_step)
        losses_of_samples = training_loss(
            engine.deepspeed, x_start, condition, draw, schedule, config.diffusion, off_value, covariates
        )
        loss = losses_of_samples.mean()
        if fault is not None:
            loss = fault.harm(loss, step + 1)
        engine.backward(loss)
        with record_function(OPTIMIZER):
            engine.step(rate)
        losses.append(loss.detach())
    if engine.has_stepped and (step + 1) % config.training.ema_every_steps == 0:
        engine.ema.update()
    meter.add(step + 1, torch.stack(losses).mean())


def _look(
    engine: Engine,
    validation: Validation | None,
    previews: Previews | None,
    training: TrainingConfig,
    step: int,
    log: RunLog,
    meter: Meter,
) -> dict[str, float]:
    """Validate and sample, where this step is due; what came of it."""
    seen: dict[str, float] = {}
    if validation and step % training.validate_every_steps == 0:
        with meter.apart("validation_s"):
            seen |= validation.measure(engine)
    if previews and step % training.preview_every_steps == 0:
        with meter.apart("preview_s"):
            seen |= previews.make(engine, step, log)
    return seen
