"""Every setting of the toolkit, typed, with where its value came from. No torch here: `--help` stays fast."""

from hpc_ddpm.config.loading import (
    Loaded,
    config_from_dict,
    did_you_mean,
    flatten_config,
    list_presets,
    load_config,
    presets_dir,
    read_yaml,
)
from hpc_ddpm.config.sections import (
    READING_SETTINGS,
    AugmentConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    FidelityConfig,
    LabelsConfig,
    ModelConfig,
    OutputConfig,
    SamplingConfig,
    Section,
    TrainingConfig,
)

__all__ = [
    "READING_SETTINGS",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "FidelityConfig",
    "LabelsConfig",
    "Loaded",
    "ModelConfig",
    "OutputConfig",
    "SamplingConfig",
    "Section",
    "TrainingConfig",
    "config_from_dict",
    "did_you_mean",
    "flatten_config",
    "list_presets",
    "load_config",
    "presets_dir",
    "read_yaml",
]
