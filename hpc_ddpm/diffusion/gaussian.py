"""The forward process, training targets and losses.

Shapes: B batch, C modalities, K labels, V covariates, D H W = Z Y X voxels. Notation of Ho et al. 2020
(arXiv 2006.11239); v of Salimans & Ho 2022 (arXiv 2202.00512): v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_ddpm.config import DiffusionConfig
from hpc_ddpm.diffusion.noise import mix64, sample_noise, uniform
from hpc_ddpm.diffusion.schedules import Schedule

Model = Callable[..., Tensor]
"""(x_t (B, C, D, H, W), condition (B, K, D, H, W), timesteps (B,)) -> (B, C, D, H, W).

Where there are covariates, a fourth argument (B, V), NaN where unknown; without it all are unknown.
"""

_TIMESTEP, _KEEP, _NOISE, _COVARIATE = 1, 2, 3, 4  # what a sample's key is used for


# ------------------------------------------------------------------------------------------ randomness


@dataclass(frozen=True)
class TrainingDraw:
    """What chance decides about a training batch."""

    timesteps: Tensor
    """(B,) int64 in 0..T-1."""
    noise: Tensor
    """(B, C, D, H, W) float32, standard normal."""
    keep: Tensor
    """(B,) bool: False where the condition is blanked, and covariates are unknown."""


def draw_training(
    seed: int,
    sample_indices: Sequence[int],
    volume_shape: Sequence[int],
    config: DiffusionConfig,
    device: torch.device | str = "cpu",
) -> TrainingDraw:
    """Timesteps, noise and condition dropout as functions of (seed, sample index) alone.

    Args:
        seed: of the run.
        sample_indices: the samples' numbers counted over the whole run and all ranks, for example
            step * global_batch + position; any integers below 2**64.
        volume_shape: (C, D, H, W).
        config: gives T and the dropout rate.
        device: where the tensors are made; timesteps and keep are the same on all.
    """
    T = config.num_timesteps
    timesteps = [mix64(seed, index, _TIMESTEP) * T >> 64 for index in sample_indices]
    keep = [uniform(seed, index, _KEEP) >= config.condition_dropout for index in sample_indices]
    seeds = [mix64(seed, index, _NOISE) for index in sample_indices]
    return TrainingDraw(
        timesteps=torch.tensor(timesteps, device=device),
        noise=sample_noise(volume_shape, seeds, device),
        keep=torch.tensor(keep, device=device),
    )


def drop_covariates(covariates: Tensor, seed: int, sample_indices: Sequence[int], rate: float) -> Tensor:
    """Covariates (B, V), each unknown (NaN) with chance `rate`: a function of (seed, sample index, covariate)."""
    drop = [
        [uniform(seed, index, _COVARIATE, number) < rate for number in range(covariates.shape[1])]
        for index in sample_indices
    ]
    return covariates.masked_fill(torch.tensor(drop, device=covariates.device), torch.nan)


# ----------------------------------------------------------------------------------------- the process


def q_sample(x_start: Tensor, timesteps: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """Draw x_t from q(x_t | x_start) with the given noise (Ho et al. 2020, equation 4)."""
    alpha, sigma = _alpha_sigma(schedule, timesteps, x_start)
    return alpha * x_start + sigma * noise


def q_posterior_mean_variance(
    x_start: Tensor, x_t: Tensor, timesteps: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (like x_t), variance and clipped log variance (B, 1, 1, 1, 1) of q(x_{t-1} | x_t, x_start).

    Ho et al. 2020, equations 6 and 7.
    """
    mean = (
        _at(schedule.posterior_mean_coef1, timesteps, x_t) * x_start
        + _at(schedule.posterior_mean_coef2, timesteps, x_t) * x_t
    )
    variance = _at(schedule.posterior_variance, timesteps, x_t)
    return mean, variance, _at(schedule.posterior_log_variance_clipped, timesteps, x_t)


def training_target(
    x_start: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule, prediction_type: str
) -> Tensor:
    """What the network should answer, (B, C, D, H, W): noise, x_start or v."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "x_start":
        return x_start
    alpha, sigma = _alpha_sigma(schedule, timesteps, x_start)
    return alpha * noise - sigma * x_start


def predict_x_start(output: Tensor, x_t: Tensor, timesteps: Tensor, schedule: Schedule, prediction_type: str) -> Tensor:
    """The clean volume that a network's output implies (Ho et al. 2020, equation 15; Salimans & Ho, D)."""
    if prediction_type == "x_start":
        return output
    if prediction_type == "epsilon":
        inverse = 1 / schedule.alphas_cumprod
        return _at(inverse.sqrt(), timesteps, x_t) * x_t - _at((inverse - 1).sqrt(), timesteps, x_t) * output
    alpha, sigma = _alpha_sigma(schedule, timesteps, x_t)
    return alpha * x_t - sigma * output


def predict_epsilon(output: Tensor, x_t: Tensor, timesteps: Tensor, schedule: Schedule, prediction_type: str) -> Tensor:
    """The noise that a network's output implies."""
    if prediction_type == "epsilon":
        return output
    alpha, sigma = _alpha_sigma(schedule, timesteps, x_t)
    if prediction_type == "x_start":
        return (x_t - alpha * output) / sigma
    return sigma * x_t + alpha * output


def _alpha_sigma(schedule: Schedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = schedule.alphas_cumprod
    return _at(alpha_bar.sqrt(), timesteps, like), _at((1 - alpha_bar).sqrt(), timesteps, like)


def _at(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """(T,) values at (B,) timesteps, shaped to multiply `like` and in its dtype."""
    return values[timesteps].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


# ---------------------------------------------------------------------------------------------- losses


def training_loss(
    model: Model,
    x_start: Tensor,
    condition: Tensor,
    draw: TrainingDraw,
    schedule: Schedule,
    config: DiffusionConfig,
    off_value: float = 0.0,
    covariates: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, (B,) float32 (Ho et al. 2020, equation 14, for any target and distance).

    Args:
        model: the network.
        x_start: (B, C, D, H, W) clean volumes in [-1, 1].
        condition: (B, K, D, H, W) label channels.
        draw: timesteps, noise and which conditions to keep.
        schedule: on the device of x_start.
        config: prediction type, loss and weighting.
        off_value: what a blank condition holds (`data.labels.off_value`).
        covariates: (B, V), NaN where unknown; None where the network has none.
    """
    timesteps = draw.timesteps
    x_t = q_sample(x_start, timesteps, draw.noise, schedule)
    extra = () if covariates is None else (torch.where(draw.keep[:, None], covariates, torch.nan),)
    output = model(x_t, blank_condition(condition, draw.keep, off_value), timesteps, *extra)
    target = training_target(x_start, draw.noise, timesteps, schedule, config.prediction_type)
    loss = diffusion_loss(output, target, config.loss)
    if config.min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(timesteps, schedule, config.prediction_type, config.min_snr_gamma)


def blank_condition(condition: Tensor, keep: Tensor, off_value: float) -> Tensor:
    """The condition, with every channel at `off_value` where `keep` (B,) is False."""
    return torch.where(keep.view(-1, *[1] * (condition.dim() - 1)), condition, off_value)


def diffusion_loss(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    """Mean l1, l2 or huber (threshold 1) distance of each sample, (B,) float32."""
    distance = _DISTANCES[loss](prediction.float(), target.float(), reduction="none")
    return distance.flatten(1).mean(1)


_DISTANCES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


def min_snr_weight(timesteps: Tensor, schedule: Schedule, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-gamma weight of each sample, (B,) float32 (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(SNR, gamma) on the x_start scale, divided by SNR for epsilon and by SNR + 1 for v.
    """
    snr = schedule.snr[timesteps]
    divisor = {"x_start": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[prediction_type]
    return (snr.clamp_max(gamma) / divisor).float()
