"""The score: a Dice with the background, or with what a segmenter sees."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_ddpm.config import load_config
from hpc_ddpm.data.fidelity import background_fidelity, dice
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.sampling.fidelity import build_fidelity, load_segmenter
from tests.sampling.conftest import QUICK

CPU = torch.device("cpu")


class Threshold(torch.nn.Module):
    """Head above -0.5, tumour above 0.5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-0.5 - x, torch.minimum(x + 0.5, 0.5 - x), x - 0.5], dim=1)


def save_segmenter(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Threshold()), str(path))
    return path


def head() -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((8, 10, 12), np.uint8)
    mask[1:6, 2:8, 3:11] = 1
    mask[2:4, 3:5, 4:6] = 2
    return np.array([-1, 0, 1], np.float32)[mask][None], mask


@pytest.mark.parametrize("axes", ["zyx", "xyz"])
@pytest.mark.parametrize("is_bundle", [False, True])
def test_segmenter(tmp_path: Path, axes: str, is_bundle: bool) -> None:
    path = tmp_path / "bundle" if is_bundle else tmp_path / "segmenter.ts"
    save_segmenter(path / "models" / "model.ts" if is_bundle else path)
    settings = [f"sampling.fidelity.segmenter={path}", f"sampling.fidelity.segmenter_axes={axes}"]
    found = build_fidelity(load_config(None, [*QUICK, *settings]).config, CPU)
    assert found is not None
    assert found[0] == "segmenter"
    volume, mask = head()
    assert found[1](volume, mask) == 1
    volume[0, 2:4, 3:5, 4:5] = 0  # half of the tumour
    head_dice = 2 * 232 / (232 + 236)
    assert found[1](volume, mask) == pytest.approx((head_dice + 2 / 3) / 2, abs=1e-3)


def test_a_segmenter_of_other_labels(tmp_path: Path) -> None:
    path = save_segmenter(tmp_path / "segmenter.ts")
    config = load_config(None, [*QUICK, "data.labels.names={1: head}", f"sampling.fidelity.segmenter={path}"]).config
    with pytest.raises(ConfigError, match="answers 3 channels, expected 1 or 2"):
        load_segmenter(config, CPU)(*head())


def test_background_oracle_only_where_the_mask_covers_the_brain() -> None:
    assert build_fidelity(load_config("brats_192").config, CPU) == ("background", background_fidelity)
    assert build_fidelity(load_config("whole_head_128").config, CPU) is None
    volume, mask = head()
    assert background_fidelity(volume, mask) == 1
    assert background_fidelity(np.full_like(volume, -1), mask) == 0
    assert dice(mask > 5, mask > 6) == 1


def test_background_oracle_on_the_real_case(shared_data: Path) -> None:
    """The real volume follows its mask, also with some noise; a mask shifted by 4 mm does not fit it."""
    case = shared_data / "brats2021"
    names = ("t1", "t1ce", "t2", "flair")
    volume = np.stack([read_nifti(case / name / f"BraTS2021_01306_{name}.nii.gz").data for name in names])
    mask = read_nifti(case / "seg" / "BraTS2021_01306_seg.nii.gz", dtype=np.uint8).data
    assert background_fidelity(volume, mask) > 0.999
    noisy = volume + np.random.default_rng(0).normal(0, 0.02, volume.shape).astype(np.float32)
    assert background_fidelity(noisy, mask) > 0.999
    assert background_fidelity(volume, np.roll(mask, 4, axis=1)) < 0.97
