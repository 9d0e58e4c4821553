"""The Python API: load a model, generate, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hpc_ddpm
from hpc_ddpm.diffusion import SAMPLERS
from hpc_ddpm.errors import CheckpointError, ConfigError, DataFormatError


@pytest.fixture(scope="module")
def model(weights: Path) -> torch.nn.Module:
    return hpc_ddpm.load_model(weights)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[4:12, 4:12, 4:12] = 1
    mask[7:9, 7:9, 7:9] = 2
    return mask


def test_the_model_is_a_network(model: torch.nn.Module) -> None:
    x_t, condition = torch.randn(2, 1, 16, 16, 16), torch.zeros(2, 2, 16, 16, 16)
    assert model(x_t, condition, torch.tensor([3, 40])).shape == x_t.shape


def test_a_volume_is_a_function_of_mask_and_seed(model: torch.nn.Module, mask: np.ndarray) -> None:
    one = hpc_ddpm.generate(model, mask, seed=3)
    assert one.shape == (1, 16, 16, 16)
    assert one.dtype == torch.float32
    assert one.abs().max() <= 1.01
    assert torch.equal(one, hpc_ddpm.generate(model, torch.from_numpy(mask), seed=3))
    assert not torch.equal(one, hpc_ddpm.generate(model, mask, seed=4))
    assert not torch.equal(one, hpc_ddpm.generate(model, np.zeros_like(mask), seed=3))
    both = hpc_ddpm.generate(model, np.stack([mask, mask]), seed=[4, 3])
    assert torch.allclose(both[1], one, atol=1e-4)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler(model: torch.nn.Module, mask: np.ndarray, sampler: str) -> None:
    seen: list[tuple[int, int]] = []
    volume = hpc_ddpm.generate(model, mask, sampler=sampler, num_steps=3, on_step=lambda *step: seen.append(step))
    assert torch.isfinite(volume).all()
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_masks_that_do_not_fit(model: torch.nn.Module, mask: np.ndarray) -> None:
    with pytest.raises(DataFormatError, match=r"labels \[7\]"):
        hpc_ddpm.generate(model, mask * 0 + 7)
    with pytest.raises(DataFormatError, match="fractional"):
        hpc_ddpm.generate(model, mask * 0.5)
    with pytest.raises(DataFormatError, match=r"found shape \(16, 16\)"):
        hpc_ddpm.generate(model, mask[0])
    with pytest.raises(DataFormatError, match="15"):
        hpc_ddpm.generate(model, mask[1:])


def test_settings_that_do_not_exist(model: torch.nn.Module, mask: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="sampler='euler'"):
        hpc_ddpm.generate(model, mask, sampler="euler")
    with pytest.raises(ConfigError, match=r"unknown setting 'sampling\.steps'"):
        hpc_ddpm.generate(model, mask, steps=3)
    with pytest.raises(ConfigError, match="condition_dropout"):
        hpc_ddpm.generate(model, mask, guidance_scale=2.0)


def test_seeds_must_match_the_masks(model: torch.nn.Module, mask: np.ndarray) -> None:
    with pytest.raises(DataFormatError, match="2 seeds for 1 mask"):
        hpc_ddpm.generate(model, mask, seed=[1, 2])


def test_nothing_at_the_path() -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        hpc_ddpm.load_model("nowhere")
