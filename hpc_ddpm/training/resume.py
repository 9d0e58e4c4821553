"""What a resumed run may change, and what would make it another experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc_ddpm.config import Config, TrainingConfig, config_from_dict, flatten_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.sealed import read_json

CONFIG_FILE = "config.json"
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
    "training.hang_timeout_s",
    "training.max_live_parameters",
    "training.offload_optimizer",
    "training.offload_parameters",
    "training.allow_batch_change",
    "training.max_bad_steps",
    "training.max_rollbacks",
}
"""Settings that a resumed run may change; sampling.* too. All others would make it another experiment."""


def stored_config(run_dir: Path) -> Config | None:
    """What the run was last trained with; None where it has not begun.

    Raises:
        ConfigError: no JSON, or settings that this version does not know.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None
    tree = read_json(path, dict[str, Any], "put it back, or choose another --out", ConfigError)
    return config_from_dict(tree, str(path))


def check_resume(run_dir: Path, wanted: Config) -> None:
    """Refuse settings that would change the loss curve of a run that has begun.

    Raises:
        ConfigError: the run directory holds another experiment, or of another batch size without
            `training.allow_batch_change`.
    """
    stored = stored_config(run_dir)
    if stored is None:
        return
    before, after = flatten_config(stored), flatten_config(wanted)
    differing = [key for key in after if json.dumps(before[key]) != json.dumps(after[key])]  # also in order
    fixed = [key for key in differing if key not in MAY_CHANGE and not key.startswith("sampling.")]
    if wanted.training.lr_schedule == "cosine" and "training.num_steps" in differing:
        fixed.append("training.num_steps")  # every learning rate depends on it
    if fixed == ["training.global_batch"]:
        if not wanted.training.allow_batch_change:
            raise ConfigError(_batch_change(run_dir, stored.training, wanted.training))
    elif fixed:
        shown = "; ".join(f"{key} {before[key]} -> {after[key]}" for key in fixed[:3])
        raise ConfigError(f"{run_dir} was started with other settings: {shown}; choose another --out or keep them")


def check_data(checkpoint: Path, packed: str | Path) -> None:
    """Refuse to go on from a checkpoint with other volumes, which would come in another order.

    Args:
        checkpoint: folder of a complete one.
        packed: folder of the dataset.

    Raises:
        ConfigError: the train split has other subjects or voxels.
    """
    from hpc_ddpm.checkpoint import read_manifest
    from hpc_ddpm.data.shards import open_packed

    digest = open_packed(packed).digest("train")
    if read_manifest(checkpoint).get("data_digest", digest) != digest:
        raise ConfigError(
            f"{checkpoint} was trained on other volumes than data.path has in its train split; give the same dataset, "
            f"or begin another run with --from {checkpoint.parent.parent}"
        )


def _batch_change(run_dir: Path, before: TrainingConfig, after: TrainingConfig) -> str:
    from hpc_ddpm.checkpoint import step_dirs, step_of

    step = max((step_of(path) for path in step_dirs(run_dir / "checkpoints")), default=0)
    return (
        f"training.global_batch {before.global_batch} -> {after.global_batch} changes the loss curve: {run_dir} saw "
        f"{step} steps x {before.global_batch} = {step * before.global_batch} volumes and would go on as if "
        f"after {step} x {after.global_batch} = {step * after.global_batch}; keep {before.global_batch} "
        "(= micro_batch x accumulation x ranks, any micro_batch), or set training.allow_batch_change=true"
    )
