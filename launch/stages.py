"""The stages as one rank runs them: read the run directory, join the others, call the library, show progress."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ddpm.config import Config, TrainingConfig, config_from_dict, flatten_config, load_config
from hpc_ddpm.distributed import Ranks, detect_ranks, process_group
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import write_json, writing_to
from hpc_ddpm.runlog import provenance
from launch.progress import progress_bar, training_note

if TYPE_CHECKING:
    from hpc_ddpm.data.pack import PackReport

MAY_CHANGE = {
    "name",
    "data.path",
    "data.num_workers",
    "data.cache",
    "data.stage_dir",
    "model.activation_checkpointing",
    "model.offload_activations",
    "model.channels_last",
    "training.num_steps",
    "training.micro_batch",
    "training.zero_stage",
    "training.reduce_bucket_size",
    "training.overlap_comm",
    "training.log_every_steps",
    "training.profile_steps",
    "training.validate_every_steps",
    "training.validation_volumes",
    "training.preview_every_steps",
    "training.preview_volumes",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.async_checkpoints",
    "training.max_live_parameters",
    "training.offload_optimizer",
    "training.offload_parameters",
    "training.allow_batch_change",
    "training.max_bad_steps",
    "training.max_rollbacks",
}
"""Settings that a resumed run may change; sampling.* too. All others would make it another experiment."""


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
        with progress_bar("packing", show=show_progress and ranks.is_main) as update:
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
    for line in [f"not paired: {entry}" for entry in report.unmatched] + [
        f"left out: {line}" for line in report.failures
    ]:
        print(line, file=sys.stderr)
    if report.labels_never_found:
        print(f"no mask has the label {', '.join(report.labels_never_found)}: check the scheme", file=sys.stderr)


def train_stage(run_dir: Path, source: str | None, overrides: Sequence[str], show_progress: bool) -> int:
    """`hpc-ddpm train`; returns the exit code: 0 done, 128 + signal when stopped by one."""
    from hpc_ddpm.training.finetune import start_line
    from hpc_ddpm.training.loop import START_FILE, train
    from hpc_ddpm.training.profiling import FOLDER as PROFILE

    ranks = detect_ranks()
    config = resume_config(run_dir, source, overrides)
    with writing_to(run_dir), process_group(ranks) as device:
        if ranks.is_main:
            write_json(run_dir / "config.json", config.dump(), indent=2)
            write_json(run_dir / "provenance.json", provenance() | {"world_size": ranks.world_size}, indent=2)
        total = config.training.num_steps
        show = show_progress and ranks.is_main
        with progress_bar("staging", show=show) as staged, progress_bar("training", show=show) as update:
            result = train(
                config,
                run_dir,
                ranks,
                device,
                on_log=lambda step, values: update(step, total, training_note(values)),
                on_stage=lambda done, shards: staged(done, shards, ""),
                on_choice=_tell_choice,
            )
    if ranks.is_main:
        if config.training.profile_steps and (run_dir / PROFILE / "where.txt").is_file():
            print((run_dir / PROFILE / "where.txt").read_text(encoding="utf-8"))
        if config.training.init_from or config.training.freeze:
            print(start_line(json.loads((run_dir / START_FILE).read_text(encoding="utf-8"))))
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


def resume_config(run_dir: Path, source: str | None, overrides: Sequence[str]) -> Config:
    """The configuration to train with: as given, or as stored in the run with the given changes.

    Raises:
        ConfigError: the run directory holds another experiment.
    """
    stored_path = run_dir / "config.json"
    if not stored_path.is_file():
        return load_config(source, overrides).config
    stored = config_from_dict(json.loads(stored_path.read_text(encoding="utf-8")), str(stored_path))
    wanted = load_config(source, overrides).config if source is not None else with_overrides(stored, overrides)
    before, after = flatten_config(stored), flatten_config(wanted)
    differing = [key for key in after if before[key] != after[key]]
    fixed = [key for key in differing if key not in MAY_CHANGE and not key.startswith("sampling.")]
    if fixed == ["training.global_batch"]:
        if wanted.training.allow_batch_change:
            return wanted
        raise ConfigError(_batch_change(run_dir, stored.training, wanted.training))
    if fixed:
        shown = "; ".join(f"{key} {before[key]} -> {after[key]}" for key in fixed[:3])
        raise ConfigError(f"{run_dir} was started with other settings: {shown}; choose another --out or keep them")
    return wanted


def with_overrides(stored: Config, overrides: Sequence[str]) -> Config:
    """A stored configuration with `section.key=value` changes.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    changes = load_config(None, overrides)
    given = {key: flatten_config(changes.config)[key] for key in changes.origins}
    return config_from_dict(_with(stored.dump(), given), "command line")


def _batch_change(run_dir: Path, before: TrainingConfig, after: TrainingConfig) -> str:
    from hpc_ddpm.checkpoint import step_dirs, step_of

    step = max((step_of(path) for path in step_dirs(run_dir / "checkpoints")), default=0)
    return (
        f"training.global_batch {before.global_batch} -> {after.global_batch} changes the loss curve: {run_dir} saw "
        f"{step} steps x {before.global_batch} = {step * before.global_batch} volumes and would go on as if "
        f"after {step} x {after.global_batch} = {step * after.global_batch}; keep {before.global_batch} "
        "(= micro_batch x accumulation x ranks, any micro_batch), or set training.allow_batch_change=true"
    )


def _with(tree: dict[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]  # type: ignore[assignment]
        node[leaf] = value
    return tree


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
