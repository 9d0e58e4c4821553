"""Generated volumes read back from whichever format they were written in."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.nifti import Affine, read_nifti
from hpc_ddpm.data.shards import INT16_SCALE, Packed, open_packed
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.sampling.bids import bids_stem
from hpc_ddpm.sampling.packed import PACKED
from hpc_ddpm.sampling.plan import Item, item_of
from hpc_ddpm.sampling.write import MASK


class Generated(NamedTuple):
    """One volume of a set."""

    image: NDArray[np.float32]
    """(C, D, H, W)."""
    mask: NDArray[np.uint8]
    """(D, H, W)."""
    affine: Affine


def read_generated(out: Path, record: dict[str, Any], data: DataConfig) -> Generated:
    """The volume of a sidecar.

    Args:
        out: folder of the set.
        record: the sidecar.
        data: of the model.

    Raises:
        DataFormatError: a file is missing or damaged, or the packed dataset is not published yet.
    """
    if not record.get("files"):
        return _read_packed(out, record["id"])
    item = item_of(record)
    volumes = [read_nifti(out / _path(record, item, modality)) for modality in data.modalities]
    mask = read_nifti(out / _path(record, item, MASK), dtype=np.uint8)
    return Generated(np.stack([volume.data for volume in volumes]), mask.data, mask.affine)


def _path(record: dict[str, Any], item: Item, role: str) -> str:
    plain = f"{role}/{item.id}.nii.gz"
    return plain if plain in record["files"] else f"{bids_stem(item, role)}.nii.gz"


def _read_packed(out: Path, item_id: str) -> Generated:
    packed, index = _open(out / PACKED)
    if item_id not in index:
        raise DataFormatError(f"{out / PACKED}: {item_id} is in no shard yet; let the workers finish")
    image, mask = packed.read(index[item_id])
    return Generated(unit_range(image), mask, packed.affine(index[item_id]))


def unit_range(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Packed voxels, int16 or float32, as float32 in [-1, 1]."""
    return np.asarray(stored / np.float32(INT16_SCALE) if stored.dtype == np.int16 else stored, np.float32)


@lru_cache(maxsize=2)
def _open(path: Path) -> tuple[Packed, dict[str, int]]:
    packed = open_packed(path)
    return packed, {subject.id: subject.index for subject in packed.subjects()}
