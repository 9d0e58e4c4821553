"""Samplers: each a short function from noise to volume, with the noise of its steps passed in.

Notation and paths: see `path.py`. All but `heun` evaluate the network once per level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from hpc_ddpm.config import SamplingConfig
from hpc_ddpm.diffusion.gaussian import Model, predict_x_start
from hpc_ddpm.diffusion.path import CLEAN, Level, build_path
from hpc_ddpm.diffusion.schedules import Schedule

PredictXStart = Callable[[Tensor, int], Tensor]
"""(x_t (B, C, D, H, W), timestep) -> x_start, same shape."""
Noise = Callable[[Sequence[int]], Tensor]
"""Shape -> standard normal values, such as a NoiseSource."""
Progress = Callable[[int, int], None]
"""Called after each evaluation with (evaluations done, evaluations in all)."""


@dataclass(frozen=True)
class Options:
    """What the samplers need besides the network and the path."""

    noise: Noise
    """Source of the noise of stochastic steps."""
    eta: float = 0.0
    """Stochasticity of ddim."""
    corrections: int = 0
    """How many steps heun corrects: the last ones before the final step, which cannot be corrected."""


Sampler = Callable[[PredictXStart, Tensor, Sequence[Level], Options], Tensor]
"""From x at the path's first level to a clean volume."""


def _steps(path: Sequence[Level]) -> Iterator[tuple[Level, Level]]:
    """(this level, next level) for each step."""
    return pairwise([*path, CLEAN])


def ddpm(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, algorithm 2).

    A path with gaps uses the chain of the levels it has (Nichol & Dhariwal 2021, section 4).
    """
    for level, after in _steps(path):
        beta = 1 - level.alpha_bar / after.alpha_bar
        to_x_start = beta * after.alpha / (1 - level.alpha_bar)
        to_x = (1 - after.alpha_bar) * math.sqrt(1 - beta) / (1 - level.alpha_bar)
        mean = to_x_start * predict(x, level.timestep) + to_x * x
        variance = beta * (1 - after.alpha_bar) / (1 - level.alpha_bar)
        x = mean + math.sqrt(variance) * options.noise(x.shape) if after is not CLEAN else mean
    return x


def ddim(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16): eta 0 follows the ODE, 1 is as noisy as ddpm."""
    for level, after in _steps(path):
        x_start = predict(x, level.timestep)
        epsilon = _epsilon(x, x_start, level)
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
    for level, after in _steps(path):
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
    for level, after in _steps(path):
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


def deis(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """DEIS of order 3: epsilon as a polynomial in ln rho, integrated exactly (Zhang & Chen 2023, equation 14).

    Deterministic; the last step has order 1.
    """
    return _from_earlier_epsilons(predict, x, path, order=3, weigh=_deis_weights)


def _deis_weights(levels: Sequence[Level], after: Level) -> list[float]:
    """Integral over rho of each Lagrange polynomial through the levels; with u = ln rho, d rho = e^u du."""
    nodes = [-level.log_snr_half for level in levels]
    start, end = nodes[0], -after.log_snr_half
    weights = []
    for node in nodes:
        factors = (Polynomial([-other, 1]) / (node - other) for other in nodes if other != node)
        basis = math.prod(factors, start=Polynomial([1]))
        integral = basis - basis.deriv() + basis.deriv(2)  # times e^u; the nodes are at most three
        weights.append(float(math.exp(end) * integral(end) - math.exp(start) * integral(start)))
    return weights


def ipndm(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """iPNDM: Adams-Bashforth of order 4 in epsilon, as if steps were equal (Zhang & Chen 2023, section 4).

    Deterministic; the last step has order 1.
    """
    return _from_earlier_epsilons(predict, x, path, order=4, weigh=_ipndm_weights)


def _ipndm_weights(levels: Sequence[Level], after: Level) -> list[float]:
    return [(after.rho - levels[0].rho) * weight for weight in _ADAMS_BASHFORTH[len(levels) - 1]]


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _from_earlier_epsilons(
    predict: PredictXStart,
    x: Tensor,
    path: Sequence[Level],
    order: int,
    weigh: Callable[[Sequence[Level], Level], list[float]],
) -> Tensor:
    """Solve d(x / alpha) = epsilon d rho with the weights of the last `order` epsilons, newest first."""
    levels: list[Level] = []
    epsilons: list[Tensor] = []
    for level, after in _steps(path):
        x_start = predict(x, level.timestep)
        if after is CLEAN:
            return x_start
        levels = [level, *levels[: order - 1]]
        epsilons = [_epsilon(x, x_start, level), *epsilons[: order - 1]]
        x = after.alpha / level.alpha * x
        for weight, epsilon in zip(weigh(levels, after), epsilons, strict=True):
            x = x + after.alpha * weight * epsilon
    raise AssertionError("a path has at least one level")


def heun(predict: PredictXStart, x: Tensor, path: Sequence[Level], options: Options) -> Tensor:
    """EDM's Heun method without churn: the ODE of x / alpha in rho (Karras et al. 2022, algorithm 1).

    A corrected step evaluates the network twice.
    """
    for index, (level, after) in enumerate(_steps(path)):
        x_start = predict(x, level.timestep)
        if after is CLEAN:
            return x_start
        slope = _epsilon(x, x_start, level)
        scale, step = after.alpha / level.alpha, after.alpha * (after.rho - level.rho)
        euler = scale * x + step * slope
        if len(path) - 1 - index <= options.corrections:
            slope = (slope + _epsilon(euler, predict(euler, after.timestep), after)) / 2
        x = scale * x + step * slope
    raise AssertionError("a path has at least one level")


def _epsilon(x: Tensor, x_start: Tensor, level: Level) -> Tensor:
    return (x - level.alpha * x_start) / level.sigma


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "heun": heun,
}


def num_levels(sampler: str, num_steps: int) -> int:
    """Levels that use exactly `num_steps` evaluations.

    heun leaves its first step uncorrected (and, to use an odd number up, the second): at the rho of almost pure
    noise, in the thousands for the cosine schedule, a mean of two slopes is worse than the first alone.
    """
    return min(num_steps, (num_steps + 3) // 2) if sampler == "heun" else num_steps


def x_start_predictor(
    model: Model,
    condition: Tensor,
    schedule: Schedule,
    prediction_type: str,
    *,
    clip: bool = True,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    off_value: float = 0.0,
    covariates: Tensor | None = None,
) -> PredictXStart:
    """The network as a function (x_t, timestep) -> x_start.

    Args:
        model: the network.
        condition: (B, K, D, H, W).
        schedule: on the device of the condition.
        prediction_type: what the network answers.
        clip: clamp x_start to [-1, 1].
        guidance_scale: w of u + w (c - u) with the answers u to a blank condition, all covariates unknown, and c to
            the given ones (Ho & Salimans 2022, in Imagen's form); 1 evaluates the network once.
        guidance_interval: where to guide, as shares of the last timestep; elsewhere w = 1 (Kynkäänniemi et al. 2024,
            arXiv 2404.07724, equation 5).
        off_value: value of a blank condition.
        covariates: (B, V), NaN where unknown; None where the network has none.
    """
    blank, extra = torch.full_like(condition, off_value), () if covariates is None else (covariates,)
    low, high = (share * (schedule.num_timesteps - 1) for share in guidance_interval)

    def predict(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((len(x),), timestep, device=x.device)
        output = model(x, condition, timesteps, *extra)
        if guidance_scale != 1 and low <= timestep <= high:
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
    covariates: Tensor | None = None,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Generate clean volumes, (B, C, D, H, W) float32.

    Args:
        model: the network, in eval mode.
        condition: (B, K, D, H, W).
        x_T: (B, C, D, H, W) float32 standard normal noise.
        schedule: of training; moved to the device of x_T.
        prediction_type: what the network answers.
        config: sampler, steps, spacing, eta, guidance, clipping.
        noise: for samplers that draw on the way.
        off_value: of a blank condition, for guidance.
        covariates: (B, V), NaN where unknown; None where the network has none.
        progress: called after each evaluation; a guided one counts once.

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
        guidance_interval=config.guidance_interval,
        off_value=off_value,
        covariates=covariates,
    )
    path = build_path(schedule, num_levels(config.sampler, config.num_steps), config.spacing)
    options = Options(noise, config.eta, corrections=config.num_steps - len(path))
    return SAMPLERS[config.sampler](_counted(predict, config.num_steps, progress), x_T, path, options)


def _counted(predict: PredictXStart, total: int, progress: Progress) -> PredictXStart:
    done = count(1)

    def counted(x: Tensor, timestep: int) -> Tensor:
        x_start = predict(x, timestep)
        progress(next(done), total)
        return x_start

    return counted
