import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hpc_ddpm.config import DiffusionConfig, SamplingConfig
from hpc_ddpm.diffusion import SAMPLERS, NoiseSource, Schedule, build_schedule, sample
from hpc_ddpm.diffusion.path import Level, build_path
from hpc_ddpm.diffusion.samplers import Options, ddim, ddpm, x_start_predictor
from hpc_ddpm.errors import ConfigError

COSINE = build_schedule(DiffusionConfig())
SILENT = Options(noise=torch.zeros)

# ---------------------------------------------------------------- cases with a known answer, B as samples


def mixture(weights: list[float], means: list[float], std: float) -> Callable[[Tensor, Level], Tensor]:
    """E[x_start | x_t] of a one-dimensional Gaussian mixture."""

    def expectation(x: Tensor, level: Level) -> Tensor:
        centres, scale = torch.tensor(means, dtype=x.dtype), level.alpha**2 * std**2 + level.sigma**2
        offsets = x[..., None] - level.alpha * centres
        share = torch.softmax(torch.tensor(weights).log() - offsets.square() / (2 * scale), -1)
        return (share * (centres + level.alpha * std**2 / scale * offsets)).sum(-1)

    return expectation


def run(
    name: str, path: list[Level], expectation: Callable[[Tensor, Level], Tensor], x: Tensor, eta: float = 0.0
) -> Tensor:
    levels = {level.timestep: level for level in path}
    generator = torch.Generator().manual_seed(1)
    options = Options(
        lambda shape: torch.randn(shape, generator=generator, dtype=x.dtype), eta, corrections=len(path) - 2
    )
    return SAMPLERS[name](lambda x, timestep: expectation(x, levels[timestep]), x, path, options)


def smooth_path(num_steps: int) -> list[Level]:
    """Even in lambda from -2 to 7: the setting of the solvers' convergence theorems."""
    return [
        Level(index, 1 / (1 + math.exp(-2 * lam))) for index, lam in enumerate(np.linspace(-2, 7, num_steps).tolist())
    ]


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 2), ("heun", 2), ("deis", 2), ("ipndm", 2)]
)
def test_error_falls_with_the_solvers_order(name: str, order: int) -> None:
    """One Gaussian: the ODE keeps (x - alpha mean) / std(x_t), so its end is known exactly."""
    mean, std = 0.3, 0.5
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for num_steps in (32, 64, 128):
        path = smooth_path(num_steps)
        start = path[0]
        exact = mean + std * (x - start.alpha * mean) / math.sqrt(start.alpha**2 * std**2 + start.sigma**2)
        errors.append((run(name, path, mixture([1.0], [mean], std), x) - exact).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes[-1] == pytest.approx(1, abs=0.15) if order == 1 else slopes[-1] > 1.7, (errors, slopes)


def test_better_solvers_need_fewer_steps() -> None:
    case = mixture([0.3, 0.7], [-0.6, 0.4], 0.15)
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    exact = run("unipc", smooth_path(600), case, x)
    errors = {
        name: (run(name, smooth_path(24), case, x) - exact).abs().mean() for name in ("ddim", "dpmpp_2m", "unipc")
    }
    assert errors["unipc"] < errors["dpmpp_2m"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize(
    ("name", "num_steps", "eta"),
    [("ddpm", 250, 0), ("ddpm", 100, 0), ("ddim", 100, 1), ("ddim", 100, 0.5), ("ddim", 100, 0),
     ("dpmpp_2m", 20, 0), ("unipc", 20, 0), ("unipc", 10, 0), ("deis", 20, 0), ("ipndm", 20, 0), ("heun", 20, 0)],
)  # fmt: skip
def test_moments_of_a_mixture_on_the_cosine_schedule(name: str, num_steps: int, eta: float) -> None:
    weights, means, std = [0.3, 0.7], [-0.5, 0.4], 0.1
    x_T = torch.randn(6_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = run(name, build_path(COSINE, num_steps), mixture(weights, means, std), x_T, eta)
    is_left = x < -0.05
    assert is_left.double().mean().item() == pytest.approx(0.3, abs=0.03)
    for found, mean in ((x[is_left], -0.5), (x[~is_left], 0.4)):
        assert found.mean().item() == pytest.approx(mean, abs=0.02)
        assert found.std().item() == pytest.approx(std, rel=0.2)


# ------------------------------------------------------------------------------ the same steps as others


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """Some smooth epsilon."""
    return (0.9 + 0.1 * (timesteps / 300).view(-1, 1, 1, 1, 1)) * torch.tanh(1.2 * x)


PEERS = {
    "ddpm": (DDPMScheduler, {"clip_sample": True, "variance_type": "fixed_small"}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "unipc": (
        UniPCMultistepScheduler,
        {"final_sigmas_type": "zero", "solver_type": "bh2", "solver_order": 2},
    ),
    "deis": (DEISMultistepScheduler, {"solver_order": 3, "lower_order_final": False}),
}
ENDS_EARLIER = {"deis"}  # diffusers stops it at the first timestep, not at the clean volume


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize(("schedule", "num_steps"), [("linear", 10), ("linear", 25), ("cosine", 25)])
@pytest.mark.parametrize("name", list(PEERS))
def test_steps_are_those_of_diffusers(name: str, schedule: str, num_steps: int) -> None:
    """On an evenly spaced ("trailing") path, the one that diffusers can take; all timesteps for ddpm."""
    ours = build_schedule(DiffusionConfig(schedule=schedule))
    kind, settings = PEERS[name]
    betas = ours.betas.float().numpy()
    theirs = kind(num_train_timesteps=250, trained_betas=betas, timestep_spacing="trailing", **settings)
    theirs.set_timesteps(250 if name == "ddpm" else num_steps)
    timesteps = [int(timestep) for timestep in theirs.timesteps]

    x_T = x = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    visited = []
    for timestep in timesteps:
        visited.append(x)
        step = {"generator": torch.Generator().manual_seed(timestep)} if name in ("ddpm", "ddim") else {}
        epsilon = network(x, torch.full((2,), timestep))
        x = theirs.step(epsilon, timestep, x, **step).prev_sample
    visited += [] if name in ENDS_EARLIER else [x]

    order = iter(timesteps)
    options = Options(noise=lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(next(order))))
    path = [Level(timestep, float(ours.alphas_cumprod[timestep])) for timestep in timesteps]
    predict = x_start_predictor(
        lambda x, condition, t: network(x, t), torch.zeros(2, 1, 4, 4, 4), ours, "epsilon", clip=name == "ddpm"
    )
    assert_same_course(name, predict, x_T, path, options, visited)


def assert_same_course(
    name: str,
    predict: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    path: list[Level],
    options: Options,
    expected: list[Tensor],
) -> None:
    """Every x at which the network is evaluated, and the result where `expected` has it too, is the same."""
    seen: list[Tensor] = []

    def watched(x: Tensor, timestep: int) -> Tensor:
        seen.append(x)
        return predict(x, timestep)

    seen.append(SAMPLERS[name](watched, x_T, path, options))
    assert len(seen) - len(expected) in (0, 1)
    for found, truth in zip(seen, expected, strict=False):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-5 * truth.abs().max().item())


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_heun_is_that_of_diffusers() -> None:
    """Theirs moves x / alpha."""
    ours = build_schedule(DiffusionConfig(schedule="linear"))
    theirs = HeunDiscreteScheduler(250, trained_betas=ours.betas.float().numpy(), timestep_spacing="trailing")
    theirs.set_timesteps(10)
    x_T = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scaled, visited = x_T * (theirs.sigmas[0] ** 2 + 1).sqrt(), []
    for timestep in theirs.timesteps:
        visited.append(theirs.scale_model_input(scaled, timestep))
        scaled = theirs.step(network(visited[-1], timestep.expand(2)), timestep, scaled).prev_sample
    path = [Level(int(timestep), float(ours.alphas_cumprod[int(timestep)])) for timestep in theirs.timesteps[::2]]
    predict = x_start_predictor(
        lambda x, condition, t: network(x, t), torch.zeros(2, 1, 4, 4, 4), ours, "epsilon", clip=False
    )
    assert_same_course("heun", predict, x_T, path, Options(torch.zeros, corrections=9), [*visited, scaled])


def test_ipndm_is_that_of_diffusers() -> None:
    """On the schedule that it brings, where the network answers v; both start a little after its alpha = 0."""
    theirs = IPNDMScheduler()
    theirs.set_timesteps(16)
    theirs.betas = theirs.betas.double()
    theirs.betas[0] = 0.999
    theirs.alphas = (1 - theirs.betas**2).sqrt()
    path = [Level(index, float(alpha) ** 2) for index, alpha in enumerate(theirs.alphas[:-1])]
    x_T = x = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visited = []
    for timestep in theirs.timesteps:
        visited.append(x)
        x = theirs.step(0.5 * torch.tanh(x), timestep, x).prev_sample

    def predict(x: Tensor, index: int) -> Tensor:
        return path[index].alpha * x - path[index].sigma * 0.5 * torch.tanh(x)

    assert_same_course("ipndm", predict, x_T, path, SILENT, visited)


def test_ddpm_at_every_timestep_is_the_posterior_chain() -> None:
    path = build_path(COSINE, 250)
    assert [level.timestep for level in path] == list(range(249, -1, -1))
    level, after = path[100], path[101]
    x, x_start = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    two_steps = [Level(level.timestep, level.alpha_bar), Level(after.timestep, after.alpha_bar)]
    answers = iter([x_start, None])
    seen = []

    def predict(x: Tensor, timestep: int) -> Tensor:
        seen.append(x)
        answer = next(answers)
        return x if answer is None else answer

    ddpm(predict, x, two_steps, Options(noise=lambda shape: torch.ones(shape, dtype=torch.float64)))
    t = level.timestep
    mean = COSINE.posterior_mean_coef1[t] * x_start + COSINE.posterior_mean_coef2[t] * x
    torch.testing.assert_close(seen[1], mean + COSINE.posterior_variance[t].sqrt(), rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------- paths, guidance, errors


@pytest.mark.parametrize("spacing", ["quadratic", "uniform", "logsnr", "karras"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 20, 33, 250])
def test_paths_start_at_the_noisiest_timestep_and_fall(num_steps: int, spacing: str) -> None:
    timesteps = [level.timestep for level in build_path(COSINE, num_steps, spacing)]
    assert len(timesteps) == num_steps and timesteps[0] == 249 and (timesteps[-1] == 0 or num_steps == 1)
    assert all(later < earlier for earlier, later in pairwise(timesteps))


def test_spacings_are_even_in_what_they_name() -> None:
    schedule = build_schedule(DiffusionConfig(schedule="linear", num_timesteps=1000))
    measures: dict[str, Callable[[Level], float]] = {
        "uniform": lambda level: level.timestep,
        "quadratic": lambda level: math.sqrt(level.timestep),
        "logsnr": lambda level: level.log_snr_half,
        "karras": lambda level: level.rho ** (1 / 7),
    }
    for spacing, measure in measures.items():
        gaps = np.diff([measure(level) for level in build_path(schedule, 8, spacing)])
        assert gaps.std() < 0.1 * abs(gaps.mean()), (spacing, gaps)


@pytest.mark.parametrize("num_steps", [0, 251])
def test_too_many_or_no_steps(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampling.num_steps={num_steps}: choose 1\.\.250"):
        build_path(COSINE, num_steps)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_few_steps_stay_finite_and_clamped(name: str, num_steps: int) -> None:
    seen: list[tuple[int, int]] = []
    evaluations: list[int] = []

    def model(x: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        evaluations.append(int(timesteps[0]))
        return 0.9 * x

    volumes = sample(
        model,
        torch.zeros(2, 1, 4, 4, 4),
        NoiseSource([1, 2])((2, 1, 4, 4, 4)),
        COSINE,
        "epsilon",
        SamplingConfig(sampler=name, num_steps=num_steps),
        noise=NoiseSource([3, 4]),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert volumes.isfinite().all() and volumes.abs().max() <= 1 and volumes.dtype == torch.float32
    assert seen == [(step + 1, num_steps) for step in range(num_steps)]
    assert len(evaluations) == num_steps  # one network evaluation per step


@pytest.mark.parametrize("clip", [False, True])
def test_guidance_moves_from_the_blank_answer_through_the_conditioned_one(clip: bool) -> None:
    def model(x: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        return condition.mean(1, keepdim=True)

    condition, x = torch.full((1, 2, 2, 2, 2), 0.5), torch.zeros(1, 1, 2, 2, 2)
    answers = {}
    for scale in (0.0, 1.0, 3.0):
        predict = x_start_predictor(
            model, condition, COSINE, "x_start", clip=clip, guidance_scale=scale, off_value=-0.25
        )
        answers[scale] = predict(x, 100).mean().item()
    assert answers == pytest.approx({0.0: -0.25, 1.0: 0.5, 3.0: 1.0 if clip else 2.0})


def test_guidance_only_inside_its_interval() -> None:
    def model(x: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        return condition

    condition, x = torch.full((1, 1, 2, 2, 2), 0.25), torch.zeros(1, 1, 2, 2, 2)
    predict = x_start_predictor(model, condition, COSINE, "x_start", guidance_scale=3.0, guidance_interval=(0.2, 0.6))
    found = {timestep: predict(x, timestep).mean().item() for timestep in (0, 49, 50, 149, 150, 249)}
    assert found == {0: 0.25, 49: 0.25, 50: 0.75, 149: 0.75, 150: 0.25, 249: 0.25}
    with pytest.raises(ValueError, match="guidance_interval"):
        SamplingConfig(guidance_interval=(0.6, 0.2))


def test_ddim_without_noise_ignores_the_source() -> None:
    def refuse(shape: object) -> Tensor:
        raise AssertionError

    ddim(lambda x, timestep: 0.5 * x, torch.ones(3), build_path(COSINE, 5), Options(noise=refuse, eta=0.0))


def test_any_schedule_object_will_do() -> None:
    schedule = Schedule.from_betas(torch.full((8,), 0.2))
    assert [level.timestep for level in build_path(schedule, 4)] == [7, 3, 1, 0]


def test_guidance_contrasts_given_covariates_with_unknown_ones() -> None:
    seen: list[tuple[float, ...]] = []

    def model(x: Tensor, condition: Tensor, at: Tensor, covariates: Tensor | None = None) -> Tensor:
        seen.append((float(condition.max()), *([] if covariates is None else covariates.flatten().tolist())))
        return x

    condition, covariates = torch.ones(1, 1, 4, 4, 4), torch.tensor([[63.0, 1.0]])
    predict = x_start_predictor(model, condition, COSINE, "x_start", guidance_scale=3.0, covariates=covariates)
    predict(torch.zeros(1, 1, 4, 4, 4), 20)
    assert seen == [(1.0, 63.0, 1.0), (0.0,)]
