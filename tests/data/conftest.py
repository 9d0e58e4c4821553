from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.phantom import write_phantoms

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no shared/data beside the checkout: the real volumes are not published with the code")
    return SHARED.resolve()


@pytest.fixture
def tiny() -> Callable[..., DataConfig]:
    """A configuration of 8 x 10 x 12 voxels and labels 1, 2."""

    def build(**changes: Any) -> DataConfig:
        return DataConfig(**{"size": (8, 10, 12), **changes})

    return build


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write a constant-free random image, or the array given, as a NIfTI file."""

    def build(path: Path, data: Any = None, shape: Any = (12, 10, 8), affine: Any = None, seed: int = 0) -> Path:
        if data is None:
            data = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
        write_nifti(path, np.asarray(data), np.eye(4) if affine is None else affine)
        return path

    return build


@pytest.fixture
def box_mask() -> np.ndarray:
    """(D, H, W) = (12, 10, 8): a head (1) with a tumour (2)."""
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[2:10, 2:8, 1:7] = 1
    mask[4:6, 4:6, 3:5] = 2
    return mask


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """Six phantom pairs of 8 x 10 x 12 voxels with one modality."""
    return write_phantoms(tmp_path / "heads", 6, (8, 10, 12), labels=LabelsConfig())
