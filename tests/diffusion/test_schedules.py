import json
import math
from pathlib import Path

import pytest
import torch

from hpc_ddpm.config import DiffusionConfig
from hpc_ddpm.diffusion import build_schedule

FIGURES = json.loads((Path(__file__).parents[1] / "model" / "med_ddpm_figures.json").read_text())["buffers"]
PLACES = (0, 1, 2, 60, 124, 125, 200, 247, 248, 249)


def test_buffers_are_med_ddpms() -> None:
    buffers = build_schedule(DiffusionConfig()).med_ddpm_buffers()
    assert list(buffers) == list(FIGURES)
    for name, values in buffers.items():
        *expected, total = FIGURES[name]
        assert values.dtype == torch.float32 and values.shape == (250,)
        assert [values[place].item() for place in PLACES] == pytest.approx(expected, rel=1e-7, abs=0), name
        assert values.double().sum().item() == pytest.approx(total, rel=1e-7), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("T", [10, 250, 1000])
def test_signal_falls_from_nearly_all_to_nearly_none(schedule: str, T: int) -> None:
    built = build_schedule(DiffusionConfig(schedule=schedule, num_timesteps=T))
    alphas_cumprod = built.alphas_cumprod
    assert built.num_timesteps == T and alphas_cumprod.dtype == torch.float64
    assert (alphas_cumprod.diff() < 0).all() and 0 < alphas_cumprod[-1] < 1e-2 < 0.9 < alphas_cumprod[0] < 1
    torch.testing.assert_close(built.snr, alphas_cumprod / (1 - alphas_cumprod))


def test_curves_are_the_papers() -> None:
    T = 1000
    cosine, linear, sigmoid = (
        build_schedule(DiffusionConfig(schedule=name, num_timesteps=T)) for name in ("cosine", "linear", "sigmoid")
    )
    s = 0.008
    expected = (math.cos((0.5 + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2
    assert cosine.alphas_cumprod[499].item() == pytest.approx(expected, rel=1e-12)
    assert linear.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert sigmoid.alphas_cumprod[499].item() == pytest.approx(0.5, rel=1e-12)


def test_a_shorter_linear_chain_ends_as_noisy() -> None:
    long, short = (build_schedule(DiffusionConfig(schedule="linear", num_timesteps=T)) for T in (1000, 250))
    assert short.alphas_cumprod[-1].log().item() == pytest.approx(long.alphas_cumprod[-1].log().item(), rel=0.03)


def test_moving_keeps_every_value() -> None:
    schedule = build_schedule(DiffusionConfig())
    moved = schedule.to("cpu")
    assert all(torch.equal(vars(schedule)[name], vars(moved)[name]) for name in vars(schedule))
    assert schedule.to("meta").betas.is_meta
