"""A generated volume on disk: NIfTI, BIDS or a packed row, and a sidecar that is written last.

    OUT/<modality>/<id>.nii.gz   OUT/mask/<id>.nii.gz   OUT/sidecar/<id>.json

A volume whose sidecar exists is complete. Volumes C D H W, masks D H W.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import Config, OutputConfig
from hpc_ddpm.data.geometry import restore
from hpc_ddpm.data.labels import to_brats_raw
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.files import atomic_path, write_json
from hpc_ddpm.sampling.bids import bids_stem
from hpc_ddpm.sampling.masks import Mask
from hpc_ddpm.sampling.packed import write_packed_row
from hpc_ddpm.sampling.plan import Item

Array = NDArray[Any]
MASK = "mask"
COMPRESSED = {"float32": 0.9, "int16": 0.75, "uint8": 0.5}
"""Share of its bytes that gzip leaves of a noisy volume, about."""
MASK_BYTES = 20_000


def write_outputs(
    out: Path, item: Item, volume: NDArray[np.float32], mask: Mask, config: Config, scratch: Path
) -> dict[str, Any]:
    """Write one volume in all formats of `sampling.output`; every file atomically.

    Args:
        out: folder of the set.
        item: which one it is.
        volume: (C, D, H, W), as generated.
        mask: what it was generated from.
        config: of the model, with its sampling section.
        scratch: folder for unfinished files.

    Returns:
        For the sidecar: `files`, path in `out` -> sha256, and `packed`, checksums of the row, where there is one.
    """
    output, record = config.sampling.output, {}
    if {"nifti", "bids"} & set(output.formats):
        record["files"] = _write_images(out, item, volume, mask, config, scratch)
    if "packed" in output.formats:
        record["packed"] = write_packed_row(out, item, volume, mask, config.data, scratch)
    return record


def voxels_sha256(volume: NDArray[np.float32]) -> str:
    """SHA-256 of the float32 voxels as generated, in C order, as hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(volume).data).hexdigest()


def estimate_bytes(config: Config) -> int:
    """About what one volume takes on disk, in all its formats."""
    output, voxels = config.sampling.output, config.data.num_modalities * math.prod(config.data.size)
    image = voxels * np.dtype(output.dtype).itemsize * (COMPRESSED[output.dtype] if output.compression_level else 1)
    row = voxels * np.dtype(config.data.storage_dtype).itemsize * COMPRESSED[config.data.storage_dtype]
    sizes = {"nifti": image, "bids": image, "packed": row}
    return int(sum(sizes[name] + MASK_BYTES for name in output.formats))


def encode(channel: NDArray[np.float32], output: OutputConfig) -> tuple[Array, tuple[float, float] | None]:
    """Values as `sampling.output` wants them, and the (slope, offset) that integers need.

    Integers and the ranges `unit` and `zero_one` are clipped.
    """
    if output.value_range == "model" and output.dtype == "float32":
        return channel, None
    unit = np.clip(channel, -1, 1)
    low = 0.0 if output.value_range == "zero_one" else -1.0
    if output.dtype == "int16":  # zero stays zero
        steps = (unit + 1) / 2 if low == 0 else unit
        return np.rint(steps * 32767).astype(np.int16), (1 / 32767, 0.0)
    if output.dtype == "uint8":
        return np.rint((unit + 1) / 2 * 255).astype(np.uint8), ((1 - low) / 255, low)
    return (unit + 1) / 2 if low == 0 else unit, None


def _write_images(
    out: Path, item: Item, volume: NDArray[np.float32], mask: Mask, config: Config, scratch: Path
) -> dict[str, str]:
    output, geometry, labels = config.sampling.output, mask.geometry, mask.labels
    if output.mask_coding == "brats_raw":
        labels = to_brats_raw(labels, config.data.labels)
    affine = geometry.file_affine if output.original_grid else geometry.affine
    files: dict[str, str] = {}
    for role, channel in zip((*config.data.modalities, MASK), (*volume, labels), strict=True):
        placed = restore(channel, geometry) if output.original_grid else channel
        values, scale = (placed, None) if role == MASK else encode(placed, output)
        first, *others = _paths(item, role, output)
        write_nifti(
            out / first,
            values,
            affine,
            compression_level=output.compression_level,
            scale=scale,
            like=mask.file,
            scratch=scratch,
        )
        for other in others:
            with atomic_path(out / other, scratch=scratch) as temporary:
                shutil.copyfile(out / first, temporary)
        files |= dict.fromkeys((first, *others), file_sha256(out / first))
        if "bids" in output.formats and role != MASK:
            files |= _describe(out, item, role, scratch)
    return files


def _paths(item: Item, role: str, output: OutputConfig) -> list[str]:
    """Where the image of a role goes, in the output folder."""
    paths = {"nifti": f"{role}/{item.id}.nii.gz", "bids": f"{bids_stem(item, role)}.nii.gz"}
    return [path for name, path in paths.items() if name in output.formats]


def _describe(out: Path, item: Item, role: str, scratch: Path) -> dict[str, str]:
    """The JSON beside an image of the BIDS tree."""
    name = f"{bids_stem(item, role)}.json"
    about = {
        "Description": f"Synthetic {role}, generated from the mask {item.mask_id}; no patient was scanned.",
        "VolumeId": item.id,
        "Sources": [f"{bids_stem(item, MASK).removeprefix('bids/')}.nii.gz"],
    }
    write_json(out / name, about, indent=2, scratch=scratch, is_sealed=False)
    return {name: file_sha256(out / name)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
