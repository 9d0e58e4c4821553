"""Generated volumes on disk: one NIfTI per modality, the mask, and a sidecar that is written last.

    OUT/<modality>/<id>.nii.gz   OUT/mask/<id>.nii.gz   OUT/sidecar/<id>.json

A volume whose sidecar exists is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import write_json


def sidecar_path(out: Path, item_id: str) -> Path:
    """Where the record of one volume lies."""
    return out / "sidecar" / f"{item_id}.json"


def write_generated(
    out: Path,
    item_id: str,
    volume: NDArray[np.float32],
    mask: NDArray[np.uint8],
    affine: NDArray[np.float64],
    modalities: tuple[str, ...],
    record: dict[str, Any],
) -> None:
    """Write one volume (C, D, H, W) with its mask (D, H, W) and record; every file atomically.

    Raises:
        DataFormatError: the volume has NaN or infinity; nothing is written.
    """
    if not np.isfinite(volume).all():
        raise DataFormatError(
            f"{item_id}: the generated volume has NaN or infinite voxels; try precision fp32 or other weights"
        )
    for modality, channel in zip(modalities, volume, strict=True):
        path = out / modality / f"{item_id}.nii.gz"
        write_nifti(path, channel, affine, np.float32, compression_level=1)
    write_nifti(out / "mask" / f"{item_id}.nii.gz", mask, affine, np.uint8)
    write_json(sidecar_path(out, item_id), record, indent=2)
