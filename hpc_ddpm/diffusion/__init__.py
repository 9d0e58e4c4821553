"""The mathematics of diffusion: schedules, training targets and samplers, without networks or devices."""

from hpc_ddpm.diffusion.gaussian import TrainingDraw, draw_training, training_loss
from hpc_ddpm.diffusion.noise import NoiseSource, mix64, sample_noise
from hpc_ddpm.diffusion.samplers import SAMPLERS, sample
from hpc_ddpm.diffusion.schedules import Schedule, build_schedule

__all__ = [
    "SAMPLERS",
    "NoiseSource",
    "Schedule",
    "TrainingDraw",
    "build_schedule",
    "draw_training",
    "mix64",
    "sample",
    "sample_noise",
    "training_loss",
]
