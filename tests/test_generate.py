"""The Python API: load a model, generate, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hpc_ddpm
from hpc_ddpm.config import load_config
from hpc_ddpm.diffusion import SAMPLERS
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import CheckpointError, ConfigError, DataFormatError
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.sampling.plan import build_plan, share
from hpc_ddpm.sampling.run import masks_from_files, run_sampling
from hpc_ddpm.sampling.write import write_generated
from hpc_ddpm.weights import save_weights
from tests.conftest import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    config = load_config(None, TINY).config
    torch.manual_seed(0)
    network = build_unet(config)
    for parameter in network.parameters():  # zero-initialised layers would make every volume alike
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("weights") / "weights"
    save_weights(folder, network.state_dict(), config, {"source": "test"})
    return hpc_ddpm.load_model(folder)


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


def test_plan_grows_without_changing(model: torch.nn.Module) -> None:
    small, large = build_plan(["a", "b"], 1, seed=5), build_plan(["a", "b", "c"], 3, seed=5)
    assert {item.id: item for item in small}.items() <= {item.id: item for item in large}.items()
    assert len({item.seed for item in large}) == 9
    assert build_plan(["a"], 1, seed=6)[0].seed != small[0].seed
    parts = [share(large, Ranks(rank, 4)) for rank in range(4)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in large)


def test_a_nan_volume_is_not_written(tmp_path: Path, mask: np.ndarray) -> None:
    volume = np.full((1, 16, 16, 16), np.nan, np.float32)
    with pytest.raises(DataFormatError, match="NaN"):
        write_generated(tmp_path, "x", volume, mask, np.eye(4), ("t1",), {})
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
def test_real_masks_keep_their_affine(shared_data: Path, tmp_path: Path) -> None:
    """Both real cases: the generated volume lies where its mask lies in the world."""
    import nibabel

    for source, preset, size in (("whole_head", "whole_head_128", 32), ("brats2021", "brats_192", 48)):
        overrides = [
            "model.base_channels=8",
            "model.num_groups=8",
            "model.attention_factors=[]",
            "data.fit=resize",
        ]
        overrides += [
            f"data.size=[{size},{size},{size}]",
            "sampling.sampler=dpmpp_2m",
            "sampling.num_steps=2",
        ]
        config = load_config(preset, overrides).config
        save_weights(tmp_path / source, build_unet(config).state_dict(), config, {})
        model = hpc_ddpm.load_model(tmp_path / source)
        masks = masks_from_files(shared_data / source, config)
        out = tmp_path / f"{source}-out"
        report = run_sampling(model, masks, out, Ranks(), {})
        assert report.generated == len(masks) > 0
        for path in (out / "mask").iterdir():
            folder = "mask" if source == "whole_head" else "seg"
            name = path.name.replace("_r000", "" if source == "whole_head" else "_seg")
            made, real = nibabel.load(path), nibabel.load(shared_data / source / folder / name)
            label = 1 if source == "whole_head" else 4
            centres = []
            for image in (made, real):
                voxels = np.argwhere(np.asarray(image.dataobj) == label).mean(axis=0)
                centres.append(nibabel.affines.apply_affine(image.affine, voxels))
            assert np.linalg.norm(centres[0] - centres[1]) < 1.5, (source, centres)


def test_nothing_at_the_path() -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        hpc_ddpm.load_model("nowhere")
