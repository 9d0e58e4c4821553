"""What a run says of its data against what was packed."""

from __future__ import annotations

from typing import Any

from hpc_ddpm.config import READING_SETTINGS, DataConfig, LabelsConfig
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError

GEOMETRY = ("size", "orientation", "voxel_size_mm", "fit", "crop_center")
"""A run prepares masks by its own settings when it samples."""
AS_PACKED = ("modalities", *GEOMETRY, "normalization", "labels")
INTENSITIES = {"percentile": ("low", "high"), "window": ("low", "high"), "zscore": ("zscore_clip",)}
"""What else matters, by normalization."""


def agree_with_packed(data: DataConfig) -> DataConfig:
    """The packed dataset's own description, with this run's reading settings and covariates, which may be fewer.

    How the masks were coded that were packed says nothing of those that the run samples for.

    Raises:
        ConfigError: the run asks for other modalities, labels, geometry, intensities or covariates than were packed.
    """
    if not data.path:
        raise ConfigError("no data: give --data PACKED (or data.path), a folder made by `hpc-ddpm pack`")
    dataset = open_packed(data.path)
    packed = dataset.data
    for name in (*AS_PACKED, *INTENSITIES.get(packed.normalization, ())):
        found, wanted = _meaning(getattr(packed, name)), _meaning(getattr(data, name))
        if found != wanted:
            raise ConfigError(
                f"data.{name}: {data.path} was packed with {_plain(found)}, this run asks for {_plain(wanted)}; "
                "train with the configuration it was packed with, or pack again"
            )
    dataset.check_covariates(data.covariates)
    own = (*READING_SETTINGS, "covariates")
    labels = packed.labels.model_copy(update={"coding": data.labels.coding})
    return packed.model_copy(update={"labels": labels, **{name: getattr(data, name) for name in own}})


def _meaning(value: Any) -> Any:
    """Without how the masks were coded on disk, which packing may have found out by itself."""
    return value.model_copy(update={"coding": "auto"}) if isinstance(value, LabelsConfig) else value


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else list(value) if isinstance(value, tuple) else value
