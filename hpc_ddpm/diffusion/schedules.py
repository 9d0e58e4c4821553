"""Variance schedules in float64.

Notation of Ho et al. 2020 (arXiv 2006.11239): beta_t, alpha_bar_t = prod(1 - beta), t in 0..T-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hpc_ddpm.config import DiffusionConfig

MAX_BETA = 0.999
MIN_VARIANCE = 1e-20  # before the logarithm: the posterior variance at t = 0 is zero


@dataclass(frozen=True)
class Schedule:
    """Every quantity of the chain that depends on t alone: (T,) float64 tensors on one device."""

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    """Weight of x_start in the posterior mean (Ho et al. 2020, equation 7)."""
    posterior_mean_coef2: Tensor
    """Weight of x_t in the posterior mean."""

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """Derive everything from betas, (T,) in (0, 1)."""
        betas = betas.double()
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        return cls(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=previous,
            posterior_variance=betas * (1 - previous) / (1 - alphas_cumprod),
            posterior_mean_coef1=betas * previous.sqrt() / (1 - alphas_cumprod),
            posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (T,)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Logarithm of the posterior variance, at least ln 1e-20, (T,)."""
        return self.posterior_variance.clamp_min(MIN_VARIANCE).log()

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule on another device."""
        return Schedule(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def med_ddpm_buffers(self) -> dict[str, Tensor]:
        """The 13 float32 buffers of a Med-DDPM state_dict, in its order."""
        alpha_bar = self.alphas_cumprod
        buffers = {
            "betas": self.betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": self.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
            "posterior_variance": self.posterior_variance,
            "posterior_log_variance_clipped": self.posterior_log_variance_clipped,
            "posterior_mean_coef1": self.posterior_mean_coef1,
            "posterior_mean_coef2": self.posterior_mean_coef2,
            "posterior_mean_coef3": 1 - self.posterior_mean_coef2,
        }
        return {name: values.float() for name, values in buffers.items()}


def build_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that `diffusion.schedule` and `diffusion.num_timesteps` name, on the CPU."""
    return Schedule.from_betas(_BETAS[config.schedule](config.num_timesteps).clamp(0, MAX_BETA))


def _linear(T: int) -> Tensor:
    """1e-4..0.02 at T = 1000, scaled by 1000 / T to end equally noisy (Ho et al. 2020, section 4)."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)


def _cosine(T: int) -> Tensor:
    """alpha_bar = cos²((t/T + s)/(1 + s) π/2), s = 0.008 (Nichol & Dhariwal 2021, equation 17)."""
    s = 0.008
    time = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    return _betas_of(((time + s) / (1 + s) * math.pi / 2).cos().square())


def _sigmoid(T: int) -> Tensor:
    """alpha_bar falls as a sigmoid from -3 to 3 (Jabri et al. 2022, algorithm 1, tau = 1)."""
    curve = torch.linspace(-3, 3, T + 1, dtype=torch.float64).sigmoid()
    return _betas_of((curve[-1] - curve) / (curve[-1] - curve[0]))


def _betas_of(alpha_bar: Tensor) -> Tensor:
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


_BETAS = {"cosine": _cosine, "linear": _linear, "sigmoid": _sigmoid}
