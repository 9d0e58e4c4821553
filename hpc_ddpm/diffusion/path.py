"""The noise levels that a sampler visits.

Notation: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), rho = sigma / alpha, lambda = -ln rho. A path lists
its levels noisiest first; after its last one comes the clean volume (alpha = 1, sigma = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.diffusion.schedules import Schedule
from hpc_ddpm.errors import ConfigError

KARRAS_EXPONENT = 7


@dataclass(frozen=True)
class Level:
    """One point of the path."""

    timestep: int
    alpha_bar: float

    @property
    def alpha(self) -> float:
        """Signal scale."""
        return math.sqrt(self.alpha_bar)

    @property
    def sigma(self) -> float:
        """Noise scale."""
        return math.sqrt(1 - self.alpha_bar)

    @property
    def rho(self) -> float:
        """Noise in units of the signal: sigma of Karras et al. 2022."""
        return self.sigma / self.alpha

    @property
    def log_snr_half(self) -> float:
        """Lambda; infinite for the clean volume."""
        return math.inf if self.alpha_bar == 1 else 0.5 * (math.log(self.alpha_bar) - math.log1p(-self.alpha_bar))


CLEAN = Level(timestep=-1, alpha_bar=1.0)


def build_path(schedule: Schedule, num_levels: int, spacing: str = "quadratic") -> list[Level]:
    """`num_levels` levels from the last timestep to the first; all of them when num_levels = T.

    The spacing says where they should lie; each is rounded to a timestep, and those that would coincide move apart.

    Args:
        schedule: of training.
        num_levels: how many.
        spacing: quadratic (Song et al. 2021, appendix D.2): dense where little noise is left; uniform: even in the
            timestep; logsnr: even in lambda (Lu et al. 2022); karras: even in rho^(1/7) (Karras et al. 2022,
            equation 5).

    Raises:
        ConfigError: more levels than the chain has, or none.
    """
    T = schedule.num_timesteps
    if not 1 <= num_levels <= T:
        raise ConfigError(f"sampling.num_steps={num_levels}: choose 1..{T} (the model's diffusion.num_timesteps)")
    wanted = _SPACINGS[spacing](schedule, np.linspace(0, 1, num_levels)) if num_levels > 1 else np.array([T - 1])
    timesteps: list[int] = []
    for index, timestep in enumerate(wanted):
        lowest = timesteps[-1] + 1 if timesteps else 0
        timesteps.append(min(max(round(float(timestep)), lowest), T - num_levels + index))
    return [Level(timestep, float(schedule.alphas_cumprod[timestep])) for timestep in reversed(timesteps)]


Shares = NDArray[np.float64]
"""Rising from 0 (least noise) to 1."""


def _uniform(schedule: Schedule, shares: Shares) -> Shares:
    return shares * (schedule.num_timesteps - 1)


def _quadratic(schedule: Schedule, shares: Shares) -> Shares:
    return shares**2 * (schedule.num_timesteps - 1)


def _logsnr(schedule: Schedule, shares: Shares) -> Shares:
    return _even_in(np.log(_rhos(schedule)), shares)


def _karras(schedule: Schedule, shares: Shares) -> Shares:
    return _even_in(_rhos(schedule) ** (1 / KARRAS_EXPONENT), shares)


def _even_in(values: Shares, shares: Shares) -> Shares:
    """Fractional timesteps at which the rising `values` (T,) are evenly spaced."""
    return np.interp(values[0] + shares * (values[-1] - values[0]), values, np.arange(len(values)))


def _rhos(schedule: Schedule) -> Shares:
    values: Shares = (1 / schedule.snr).sqrt().cpu().numpy()
    return values


_SPACINGS: dict[str, Callable[[Schedule, Shares], Shares]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
}
