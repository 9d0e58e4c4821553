import pytest
import torch

from hpc_ddpm.config import DiffusionConfig
from hpc_ddpm.diffusion import TrainingDraw, build_schedule, training_loss
from hpc_ddpm.diffusion.gaussian import (
    blank_condition,
    diffusion_loss,
    drop_covariates,
    min_snr_weight,
    predict_epsilon,
    predict_x_start,
    q_posterior_mean_variance,
    q_sample,
    training_target,
)

SCHEDULE = build_schedule(DiffusionConfig())
TIMESTEPS = torch.tensor([0, 10, 128, 240])
TYPES = ["epsilon", "x_start", "v"]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return x_start, noise, q_sample(x_start, TIMESTEPS, noise, SCHEDULE)


def test_q_sample_keeps_unit_variance_in_all() -> None:
    alpha_bar = SCHEDULE.alphas_cumprod[TIMESTEPS]
    one = torch.ones(4, 1, 1, 1, 1, dtype=torch.float64)
    signal = q_sample(one, TIMESTEPS, 0 * one, SCHEDULE).flatten()
    noise = q_sample(0 * one, TIMESTEPS, one, SCHEDULE).flatten()
    torch.testing.assert_close(signal**2, alpha_bar)
    torch.testing.assert_close(noise**2, 1 - alpha_bar)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_target_gives_back_volume_and_noise(prediction_type: str, batch: tuple[torch.Tensor, ...]) -> None:
    x_start, noise, x_t = batch
    target = training_target(x_start, noise, TIMESTEPS, SCHEDULE, prediction_type)
    found = predict_x_start(target, x_t, TIMESTEPS, SCHEDULE, prediction_type)
    torch.testing.assert_close(found, x_start, rtol=1e-9, atol=1e-9)
    found = predict_epsilon(target, x_t, TIMESTEPS, SCHEDULE, prediction_type)
    torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)


def test_v_is_salimans_and_hos(batch: tuple[torch.Tensor, ...]) -> None:
    x_start, noise, _ = batch
    v = training_target(x_start, noise, TIMESTEPS, SCHEDULE, "v")
    alpha_bar = SCHEDULE.alphas_cumprod[128]
    torch.testing.assert_close(v[2], alpha_bar.sqrt() * noise[2] - (1 - alpha_bar).sqrt() * x_start[2])


def test_posterior_is_bayes_rule(batch: tuple[torch.Tensor, ...]) -> None:
    x_start, _, x_t = batch
    mean, variance, log_variance = q_posterior_mean_variance(x_start, x_t, TIMESTEPS, SCHEDULE)
    for row, t in enumerate(TIMESTEPS[1:].tolist(), start=1):
        beta, before = SCHEDULE.betas[t], SCHEDULE.alphas_cumprod[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)  # of x_t given x_{t-1}, and of x_{t-1} given x_start
        expected = ((1 - beta).sqrt() / beta * x_t[row] + before.sqrt() / (1 - before) * x_start[row]) / precision
        torch.testing.assert_close(mean[row], expected)
        torch.testing.assert_close(variance[row].flatten()[0], 1 / precision)
        torch.testing.assert_close(log_variance[row], variance[row].log())
    torch.testing.assert_close(mean[0], x_start[0])
    assert variance[0] == 0 and log_variance[0].exp().item() == pytest.approx(1e-20)


def test_losses_are_means_per_sample_in_float32() -> None:
    prediction = torch.tensor([[0.0, 0.5], [3.0, -1.0]], dtype=torch.bfloat16).view(2, 1, 1, 1, 2)
    target = torch.zeros_like(prediction)
    assert diffusion_loss(prediction, target, "l1").tolist() == [0.25, 2.0]
    assert diffusion_loss(prediction, target, "l2").tolist() == [0.125, 5.0]
    assert diffusion_loss(prediction, target, "huber").tolist() == [0.0625, 1.5]
    assert diffusion_loss(prediction, target, "l2").dtype == torch.float32


def test_min_snr_weighs_the_same_volume_error_alike(batch: tuple[torch.Tensor, ...]) -> None:
    """One and the same error in x_start costs min(SNR, gamma) times its square, whatever is predicted."""
    x_start, noise, x_t = batch
    wrong = x_start + 0.1 * noise.flip(0)
    expected = SCHEDULE.snr[TIMESTEPS].clamp_max(5) * (wrong - x_start).square().flatten(1).mean(1)
    for prediction_type in TYPES:
        target = training_target(x_start, noise, TIMESTEPS, SCHEDULE, prediction_type)
        alpha_bar = SCHEDULE.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1, 1)
        implied_noise = (x_t - alpha_bar.sqrt() * wrong) / (1 - alpha_bar).sqrt()
        answers = {"epsilon": implied_noise, "x_start": wrong, "v": None}
        answers["v"] = alpha_bar.sqrt() * implied_noise - (1 - alpha_bar).sqrt() * wrong
        squared = (answers[prediction_type] - target).square().flatten(1).mean(1)
        weight = min_snr_weight(TIMESTEPS, SCHEDULE, prediction_type, gamma=5.0)
        torch.testing.assert_close((weight * squared).double(), expected, rtol=1e-4, atol=0)


def test_blank_condition_is_off_everywhere() -> None:
    condition = torch.rand(3, 2, 2, 2, 2)
    blanked = blank_condition(condition, torch.tensor([True, False, True]), -1.0)
    assert torch.equal(blanked[::2], condition[::2]) and (blanked[1] == -1).all()


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_training_loss_puts_the_pieces_together(prediction_type: str, gamma: float | None) -> None:
    config = DiffusionConfig(prediction_type=prediction_type, loss="l2", min_snr_gamma=gamma)
    x_start, noise, condition = (
        torch.rand(4, 1, 2, 2, 2),
        torch.randn(4, 1, 2, 2, 2),
        torch.rand(4, 2, 2, 2, 2),
    )
    draw = TrainingDraw(TIMESTEPS, noise, torch.tensor([True, True, False, True]))
    seen: dict[str, torch.Tensor] = {}

    def model(x_t: torch.Tensor, given: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.update(x_t=x_t, condition=given, timesteps=timesteps)
        return torch.zeros_like(x_t)

    loss = training_loss(model, x_start, condition, draw, SCHEDULE, config, off_value=-1.0)
    target = training_target(x_start, noise, TIMESTEPS, SCHEDULE, prediction_type)
    weight = 1.0 if gamma is None else min_snr_weight(TIMESTEPS, SCHEDULE, prediction_type, gamma)
    torch.testing.assert_close(loss, weight * target.square().flatten(1).mean(1))
    assert torch.equal(seen["x_t"], q_sample(x_start, TIMESTEPS, noise, SCHEDULE))
    assert (seen["condition"][2] == -1).all() and torch.equal(seen["condition"][:2], condition[:2])
    assert torch.equal(seen["timesteps"], TIMESTEPS)


def test_a_dropped_condition_takes_its_covariates_along() -> None:
    x_start, condition, covariates = torch.rand(3, 1, 2, 2, 2), torch.rand(3, 2, 2, 2, 2), torch.rand(3, 2)
    draw = TrainingDraw(torch.tensor([1, 2, 3]), torch.randn(3, 1, 2, 2, 2), torch.tensor([True, False, True]))
    seen: list[torch.Tensor] = []

    def model(x_t: torch.Tensor, given: torch.Tensor, at: torch.Tensor, covariates: torch.Tensor) -> torch.Tensor:
        seen.append(covariates)
        return torch.zeros_like(x_t)

    training_loss(model, x_start, condition, draw, SCHEDULE, DiffusionConfig(), covariates=covariates)
    assert seen[0][1].isnan().all() and torch.equal(seen[0][[0, 2]], covariates[[0, 2]])


def test_covariates_are_dropped_each_by_itself() -> None:
    covariates = torch.rand(2000, 2)
    dropped = drop_covariates(covariates, 5, range(2000), 0.3).isnan()
    assert dropped.float().mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.04)
    assert dropped.all(1).float().mean() == pytest.approx(0.09, abs=0.03)
    assert torch.equal(drop_covariates(covariates[:3], 5, [7, 1999, 0], 0.3).isnan(), dropped[[7, 1999, 0]])
    assert torch.equal(drop_covariates(covariates, 5, range(2000), 0.0), covariates)
