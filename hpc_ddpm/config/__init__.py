"""Every setting of the toolkit, typed, with where its value came from. No torch here: `--help` stays fast."""

from hpc_ddpm.config.keys import did_you_mean
from hpc_ddpm.config.loading import (
    Loaded,
    config_from_dict,
    flatten_config,
    list_presets,
    load_config,
    presets_dir,
    with_overrides,
)
from hpc_ddpm.config.sections import (
    READING_SETTINGS,
    AugmentConfig,
    Config,
    CovariateConfig,
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
from hpc_ddpm.config.yaml_text import read_yaml

__all__ = [
    "READING_SETTINGS",
    "AugmentConfig",
    "Config",
    "CovariateConfig",
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
    "with_overrides",
]
