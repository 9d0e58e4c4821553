"""Samplers: each a short function from noise to volume, with the noise of its steps passed in.

Notation: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = ln(alpha / sigma). A path lists the
levels to visit, noisiest first; after its last one comes the clean volume (alpha = 1, sigma = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_ddpm.config import SamplingConfig
from hpc_ddpm.diffusion.gaussian import Model, predict_x_start
from hpc_ddpm.diffusion.schedules import Schedule
from hpc_ddpm.errors import ConfigError

PredictXStart = Callable[[Tensor, int], Tensor]
"""(x_t (B, C, D, H, W), timestep) -> x_start, same shape."""
Noise = Callable[[Sequence[int]], Tensor]
"""Shape -> standard normal values, such as a NoiseSource."""
Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""


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
    def log_snr_half(self) -> float:
        """Lambda; infinite for the clean volume."""
        return math.inf if self.alpha_bar == 1 else 0.5 * (math.log(self.alpha_bar) - math.log1p(-self.alpha_bar))


CLEAN = Level(timestep=-1, alpha_bar=1.0)


@dataclass(frozen=True)
class Options:
    """What the samplers need besides the network and the path."""

    noise: Noise
    """Source of the noise of stochastic steps."""
    eta: float = 0.0
    """Stochasticity of ddim."""
    progress: Progress = lambda done, total: None


Sampler = Callable[[PredictXStart, Tensor, Sequence[Level], Options], Tensor]
"""From x at the path's first level to a clean volume."""


def build_path(schedule: Schedule, num_steps: int) -> list[Level]:
    """`num_steps` levels from the last timestep to the first; all of them when num_steps = T.

    Quadratic spacing (Song et al. 2021, appendix D.2), dense where little noise is left: on the cosine
    schedule it keeps fine detail that even spacing loses. Timesteps that would coincide move apart.

    Raises:
        ConfigError: more steps than the chain has, or none.
    """
    T = schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ConfigError(f"sampling.num_steps={num_steps}: choose 1..{T} (the model's diffusion.num_timesteps)")
    if num_steps == 1:
        return [_level(schedule, T - 1)]
    timesteps: list[int] = []
    for index in range(num_steps):
        even = round((T - 1) * (index / (num_steps - 1)) ** 2)
        timesteps.append(max(even, timesteps[-1] + 1 if timesteps else 0))
    return [_level(schedule, timestep) for timestep in reversed(timesteps)]


def _level(schedule: Schedule, timestep: int) -> Level:
    return Level(timestep, float(schedule.alphas_cumprod[timestep]))


def _steps(path: Sequence[Level], progress: Progress) -> Iterator[tuple[Level, Level]]:
    """(this level, next level) for each step; reports each step once its body has run."""
    for index, level in enumerate(path):
        yield level, path[index + 1] if index + 1 < len(path) else CLEAN
        progress(index + 1, len(path))


def ddpm(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, algorithm 2).

    A path with gaps uses the chain of the levels it has (Nichol & Dhariwal 2021, section 4).
    """
    for level, after in _steps(path, options.progress):
        beta = 1 - level.alpha_bar / after.alpha_bar
        to_x_start = beta * after.alpha / (1 - level.alpha_bar)
        to_x = (1 - after.alpha_bar) * math.sqrt(1 - beta) / (1 - level.alpha_bar)
        mean = to_x_start * predict(x, level.timestep) + to_x * x
        variance = beta * (1 - after.alpha_bar) / (1 - level.alpha_bar)
        x = mean + math.sqrt(variance) * options.noise(x.shape) if after is not CLEAN else mean
    return x


def ddim(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16): eta 0 follows the ODE, 1 is as noisy as ddpm."""
    for level, after in _steps(path, options.progress):
        x_start = predict(x, level.timestep)
        epsilon = (x - level.alpha * x_start) / level.sigma
        spread = options.eta * after.sigma / level.sigma * math.sqrt(1 - level.alpha_bar / after.alpha_bar)
        x = after.alpha * x_start + math.sqrt(after.sigma**2 - spread**2) * epsilon
        if spread > 0:
            x = x + spread * options.noise(x.shape)
    return x


def dpmpp_2m(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): deterministic.

    The last step has order 1: lambda of the clean volume is infinite.
    """
    before: tuple[Level, Tensor] | None = None
    for level, after in _steps(path, options.progress):
        x_start = predict(x, level.timestep)
        direction = x_start
        if before is not None and after is not CLEAN:
            ratio = (after.log_snr_half - level.log_snr_half) / (level.log_snr_half - before[0].log_snr_half)
            direction = x_start + 0.5 * ratio * (x_start - before[1])
        x = after.sigma / level.sigma * x + _phi(level, after) * direction
        before = level, x_start
    return x


def unipc(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """UniPC of order 2, B(h) = e^h - 1, data prediction (Zhao et al. 2023, algorithms 5 and 6).

    Each evaluation first corrects the x that it was made at, then predicts the next: one per step.
    Deterministic.
    """
    history: list[tuple[Level, Tensor]] = []  # the last two levels with their x_start
    corrected = x
    for level, after in _steps(path, options.progress):
        x_start = predict(x, level.timestep)
        if history:
            corrected = _unipc_update(corrected, history, level, x_start)
        history = [*history[-1:], (level, x_start)]
        x = _unipc_update(corrected, history, after, None)
    return x


def _unipc_update(x: Tensor, history: Sequence[tuple[Level, Tensor]], after: Level, x_start: Tensor | None) -> Tensor:
    """From x at the newest level of `history` to `after`; corrector where x_start at `after` is known.

    With h the step in lambda, r the earlier level's place in units of h, and D the scaled differences, the
    weights solve sum_m rho_m r_m^(n-1) = b_n (equation 11); a single weight is 1/2.
    """
    level, newest = history[-1]
    phi = _phi(level, after)
    update = after.sigma / level.sigma * x + phi * newest
    if after is CLEAN:
        return update
    h = after.log_snr_half - level.log_snr_half
    earlier_weight, later_weight = 0.5, 0.5
    if len(history) == 2:
        r = (history[0][0].log_snr_half - level.log_snr_half) / h
        if x_start is not None:
            earlier_weight, later_weight = _unipc_weights(h, r)
        update = update + phi * earlier_weight / r * (history[0][1] - newest)
    if x_start is not None:
        update = update + phi * later_weight * (x_start - newest)
    return update


def _unipc_weights(h: float, r: float) -> tuple[float, float]:
    """rho of the corrector at places r and 1: rho_1 + rho_2 = b_1, rho_1 r + rho_2 = b_2."""
    phi_1 = -math.expm1(-h) / h  # (1 - e^-h) / h
    b_1 = (1 - phi_1) / (h * phi_1)
    b_2 = 2 * (0.5 - (1 - phi_1) / h) / (h * phi_1)
    first = (b_1 - b_2) / (1 - r)
    return first, b_1 - first


def _phi(level: Level, after: Level) -> float:
    """alpha' (1 - e^-h), the exact weight of a constant x_start over the step."""
    return after.alpha - after.sigma * level.alpha / level.sigma


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "unipc": unipc}


def x_start_predictor(
    model: Model,
    condition: Tensor,
    schedule: Schedule,
    prediction_type: str,
    *,
    clip: bool = True,
    guidance_scale: float = 1.0,
    off_value: float = 0.0,
) -> PredictXStart:
    """The network as a function (x_t, timestep) -> x_start.

    Args:
        model: the network.
        condition: (B, K, D, H, W).
        schedule: on the device of the condition.
        prediction_type: what the network answers.
        clip: clamp x_start to [-1, 1].
        guidance_scale: w of u + w (c - u) with the answers u to a blank condition and c to the given one
            (Ho & Salimans 2022, in Imagen's form); 1 evaluates the network once.
        off_value: value of a blank condition.
    """
    blank = torch.full_like(condition, off_value)

    def predict(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((len(x),), timestep, device=x.device)
        output = model(x, condition, timesteps)
        if guidance_scale != 1:
            output = torch.lerp(model(x, blank, timesteps), output, guidance_scale)
        x_start = predict_x_start(output, x, timesteps, schedule, prediction_type)
        return x_start.clamp(-1, 1) if clip else x_start

    return predict


@torch.no_grad()
def sample(
    model: Model,
    condition: Tensor,
    x_T: Tensor,
    schedule: Schedule,
    prediction_type: str,
    config: SamplingConfig,
    *,
    noise: Noise,
    off_value: float = 0.0,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Generate clean volumes, (B, C, D, H, W) float32.

    Args:
        model: the network, in eval mode.
        condition: (B, K, D, H, W).
        x_T: (B, C, D, H, W) float32 standard normal noise.
        schedule: of training; moved to the device of x_T.
        prediction_type: what the network answers.
        config: sampler, steps, eta, guidance, clipping.
        noise: for samplers that draw on the way.
        off_value: of a blank condition, for guidance.
        progress: called after each step.

    Raises:
        ConfigError: more steps than timesteps.
    """
    predict = x_start_predictor(
        model,
        condition,
        schedule.to(x_T.device),
        prediction_type,
        clip=config.clip_x_start,
        guidance_scale=config.guidance_scale,
        off_value=off_value,
    )
    path = build_path(schedule, config.num_steps)
    return SAMPLERS[config.sampler](predict, x_T, path, Options(noise, config.eta, progress))
