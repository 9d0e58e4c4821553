"""The stages as one rank runs them: read the run directory, join the others, call the library, show progress."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ddpm.config import Config, load_config, with_overrides
from hpc_ddpm.distributed import TIMEOUT_S, Ranks, StopFlag, detect_ranks, process_group
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import writing_to
from hpc_ddpm.sealed import read_json
from hpc_ddpm.training.resume import CONFIG_FILE, check_resume, stored_config
from launch.progress import progress_bar, tell_steps
from launch.submit_checks import SEGMENTER

if TYPE_CHECKING:
    from hpc_ddpm.data.pack import PackReport

MAX_UNUSED = 40
"""Files without a partner that `pack` lists."""


def pack_stage(
    source: Path,
    out: Path,
    config: Config,
    num_workers: int | None,
    skip_bad: bool,
    overwrite: bool,
    show_progress: bool,
) -> int:
    """`hpc-ddpm pack`; returns the exit code: what is wrong with the data is the same on all ranks, and rank 0 says it.

    The ranks, or the tasks of an array, share the work through the folder `out`.
    """
    from hpc_ddpm.data.pack import pack
    from hpc_ddpm.data.team import default_workers, detect_team, wait_for_all

    ranks = detect_ranks()
    try:
        with progress_bar("packing", show=show_progress and ranks.is_main, unit="subjects") as update:
            report = pack(
                source,
                out,
                config.data,
                num_workers=default_workers(ranks) if num_workers is None else num_workers,
                skip_bad=skip_bad,
                overwrite=overwrite,
                progress=lambda done, total: update(done, total, ""),
                team=detect_team(ranks),
            )
    except DataFormatError:
        if ranks.is_main:
            raise
        wait_for_all(ranks)
        return 2
    wait_for_all(ranks)
    if ranks.is_main:
        _tell_packed(report, ranks)
    return 0


def _tell_packed(report: PackReport, ranks: Ranks) -> None:
    if not report.is_complete:
        print(f"packed {report.num_written} subjects; other tasks of the array finish the rest: {report.path}")
        return
    splits = ", ".join(f"{count} {name}" for name, count in report.splits.items())
    there = "" if report.num_written or ranks.world_size > 1 else " (all were there)"
    print(f"packed {report.num_subjects} subjects{there}: {splits}; {report.path}")
    if report.coding:
        print(report.coding)
    unused = [f"not paired: {entry}" for entry in report.unmatched]
    if len(unused) > MAX_UNUSED:
        unused = [*unused[:MAX_UNUSED], f"and {len(unused) - MAX_UNUSED} more; `hpc-ddpm data check --json` lists all"]
    for line in unused + [f"left out: {line}" for line in report.failures]:
        print(line, file=sys.stderr)
    if report.labels_never_found:
        print(f"no mask has the label {', '.join(report.labels_never_found)}: check the scheme", file=sys.stderr)


def train_stage(run_dir: Path, source: str | None, overrides: Sequence[str], show_progress: bool) -> int:
    """`hpc-ddpm train`; returns the exit code: 0 done, 128 + signal when stopped by one, from the first moment on."""
    with StopFlag() as stop:
        return _train(run_dir, source, overrides, show_progress, stop)


def _train(run_dir: Path, source: str | None, overrides: Sequence[str], show_progress: bool, stop: StopFlag) -> int:
    from hpc_ddpm.training.finetune import start_line
    from hpc_ddpm.training.loop import START_FILE, train
    from hpc_ddpm.training.profiling import FOLDER as PROFILE

    ranks = detect_ranks()
    config = resume_config(run_dir, source, overrides)
    timeout_s = max(TIMEOUT_S, config.training.hang_timeout_s)
    with writing_to(run_dir), process_group(ranks, timeout_s) as device:
        total = config.training.num_steps
        show = show_progress and ranks.is_main
        with progress_bar("staging", show=show) as staged, progress_bar("training", show=show, unit="steps") as update:
            result = train(
                config,
                run_dir,
                ranks,
                device,
                on_log=tell_steps(update, total),
                on_stage=lambda done, shards: staged(done, shards, ""),
                on_choice=_tell_choice,
                stop=stop,
            )
    if ranks.is_main:
        if config.training.profile_steps and (run_dir / PROFILE / "where.txt").is_file():
            print((run_dir / PROFILE / "where.txt").read_text(encoding="utf-8"))
        if config.training.init_from or config.training.freeze:
            print(start_line(read_json(run_dir / START_FILE, dict[str, Any], "remove it")))
        print(_outcome(result.step, total, result.resumed_from, result.stopped_by, run_dir))
    return 128 + result.stopped_by if result.stopped_by else 0


def _tell_choice(choice: Mapping[str, Any]) -> None:
    """What the planner chose for `activation_checkpointing=auto`, and why."""
    print(
        f"activation checkpointing: {choice['activation_checkpointing']}, predicted peak "
        f"{choice['predicted_peak_gib']:.2f} GiB of {choice['free_gib']:.2f} GiB free "
        f"({choice['usable_share']:.0%} usable)",
        flush=True,
    )


def _outcome(step: int, total: int, resumed_from: int, stopped_by: int, run_dir: Path) -> str:
    since = f" (went on from step {resumed_from})" if resumed_from else ""
    if stopped_by:
        name = signal.Signals(stopped_by).name
        return (
            f"stopped by {name} at step {step} of {total}{since}; checkpoint saved, the same command goes on: {run_dir}"
        )
    return f"trained to step {step}{since}: {run_dir}"


def training_settings(
    config: str | None, overrides: Sequence[str] | None, data: Path | None, init_from: Path | None
) -> tuple[str | None, list[str]]:
    """Configuration and settings that the options of `train` stand for; without --config, those of the run --from."""
    settings = [*(overrides or []), *([f"data.path={data.resolve()}"] if data else [])]
    if init_from:
        settings.append(f"training.init_from={init_from.resolve()}")
        stored = init_from / CONFIG_FILE
        if config is None and stored.is_file():
            config = str(stored)
            if not (init_from / "checkpoints").is_dir():
                settings.insert(0, f"{SEGMENTER}=")  # weights cannot name a program for this run
    return config, settings


def resume_config(run_dir: Path, source: str | None, overrides: Sequence[str]) -> Config:
    """The configuration to train with: as given, or as stored in the run with the given changes.

    Raises:
        ConfigError: the run directory holds another experiment.
    """
    stored = stored_config(run_dir)
    if stored is None or source is not None:
        wanted = load_config(source, overrides).config
    else:
        wanted = with_overrides(stored, overrides)
    check_resume(run_dir, wanted)
    return wanted


def demo_stage(out: Path, data: Path | None, num_ranks: int, overrides: Sequence[str], show_progress: bool) -> None:
    """`hpc-ddpm demo`."""
    from hpc_ddpm.demo.run import run_demo

    with progress_bar("brains", show=show_progress) as update:
        run_demo(
            out,
            data,
            num_ranks,
            overrides,
            say=lambda line: print(line, flush=True),
            on_cohort=lambda done, total: update(done, total, ""),
            quiet=not show_progress,
        )
