"""Comparing samplers: the measures on volumes with known answers, and a small grid end to end."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from typer.testing import CliRunner

import hpc_ddpm
from hpc_ddpm.config import load_config
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.files import writing_to
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.sampling.compare import Cell, _save_array, compare, gradient_rms, grid, mask_fit
from hpc_ddpm.weights import save_weights
from launch.sample_commands import sample_app
from tests.conftest import TINY

CELLS = [Cell("ddim", 2), Cell("heun", 3), Cell("dpmpp_2m", 2, "karras")]


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    config = load_config(None, [*TINY, "diffusion.num_timesteps=6", "sampling.num_steps=3"]).config
    torch.manual_seed(0)
    network = build_unet(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(tmp_path / "weights", network.state_dict(), config, {"source": "test"})
    return hpc_ddpm.load_model(tmp_path / "weights")


@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[4:12, 4:12, 4:12] = 1
    return {"a": mask, "b": np.roll(mask, 2, axis=0)}


def test_mask_fit_is_the_share_of_variance_that_the_labels_explain(masks: dict[str, np.ndarray]) -> None:
    mask, noise = masks["a"], np.random.default_rng(0).standard_normal((1, 16, 16, 16)).astype(np.float32)
    signal = np.where(mask == 1, 1.0, -1.0).astype(np.float32)[None]
    assert mask_fit(signal, mask) == pytest.approx(1)
    assert mask_fit(noise, mask) < 0.01
    assert mask_fit(signal + noise, mask) == pytest.approx(signal.var() / (signal.var() + 1), abs=0.05)
    assert mask_fit(np.zeros_like(signal), mask) == 1  # constant: nothing is left to explain


def test_blur_lowers_and_grain_raises_sharpness(masks: dict[str, np.ndarray]) -> None:
    generator = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(generator.standard_normal((1, 1, 16, 16, 16)), (0, 0, 1, 1, 1)).astype(np.float32)
    blurred = ndimage.gaussian_filter(volume, (0, 0, 1, 1, 1))
    grainy = volume + 0.2 * generator.standard_normal(volume.shape).astype(np.float32)
    assert gradient_rms(blurred) < 0.7 * gradient_rms(volume) < 0.7 * gradient_rms(grainy)


def test_a_grid_is_measured_once(
    model: torch.nn.Module, masks: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "compared"
    rows = compare(model, masks, out, CELLS[:1])
    first = json.loads((out / "table.json").read_text(encoding="utf-8"))
    chain, ode, other_noise, ddim = rows
    assert rows == first and (chain["rms_to_ddpm"], chain["sharpness"], ode["rms_to_ode"]) == (0, 1, 0)
    assert other_noise["rms_to_ddpm"] > 0 and ddim["rms_to_ode"] > 0
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")

    made: list[str] = []

    def watched(*args: Any, **settings: Any) -> torch.Tensor:
        made.append(f"{settings['sampler']}-{settings['num_steps']}")
        return hpc_ddpm.generate(*args, **settings)

    monkeypatch.setattr("hpc_ddpm.sampling.compare.generate", watched)
    grown = compare(model, masks, out, CELLS)
    assert made == ["heun-3", "heun-3", "dpmpp_2m-2", "dpmpp_2m-2"]  # both masks, new cells only
    assert grown[:4] == first and len((out / "table.md").read_text(encoding="utf-8").splitlines()) == 2 + 6
    with pytest.raises(ConfigError, match="another masks; choose another --out"):
        compare(model, {**masks, "b": masks["a"]}, out, CELLS)


def test_grids_that_cannot_be(model: torch.nn.Module, masks: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert grid(["ddim", "heun"], ["5", 10], ["karras"])[2] == Cell("heun", 5, "karras")
    with pytest.raises(ConfigError, match="--samplers has euler: choose from ddpm, ddim"):
        grid(["euler"], [5], ["uniform"])
    with pytest.raises(ConfigError, match="--steps has ten: give positive integers"):
        grid(["ddim"], ["ten"], ["uniform"])
    with pytest.raises(ConfigError, match=r"--steps 7: this model has diffusion\.num_timesteps=6"):
        compare(model, masks, tmp_path, [Cell("ddim", 7)])


def test_the_command_says_where_table_and_figure_are(
    model: torch.nn.Module, masks: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    write_nifti(tmp_path / "masks" / "case.nii.gz", masks["a"], np.eye(4), np.uint8)
    arguments = [tmp_path / "weights", "--out", tmp_path / "out", "--masks", tmp_path / "masks", "-q"]
    result = CliRunner().invoke(sample_app, ["compare", *map(str, arguments), "--samplers", "unipc", "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "| unipc | 2 | quadratic |" in result.output and (tmp_path / "out" / "figure.png").exists()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ClusterError, match="File too large"), writing_to(tmp_path):
            _save_array(tmp_path / "reference" / "a.npy", np.zeros((16, 16, 16), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any((tmp_path / "reference").iterdir())
