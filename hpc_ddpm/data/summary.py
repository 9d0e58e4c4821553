"""What a packed dataset holds, in numbers: the subject table, totals, and the facts of one subject."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.pictures import picture
from hpc_ddpm.data.covariates import to_values
from hpc_ddpm.data.nifti import axis_codes, ras_voxel_size_mm, turn_to_ras, voxel_size_mm
from hpc_ddpm.data.shards import SPLITS, Packed, open_packed, read_column, read_index
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import atomic_path, writing_to

PICTURE_HEIGHT = 320


def list_subjects(path: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """One row per subject, sorted by id: id, split, shard, row, and `voxels` of every label name.

    Raises:
        DataFormatError: not a packed dataset, or a shard that cannot be read.
    """
    path = Path(path)
    index = read_index(path)
    names = list(index.config.labels.names.values())
    voxels = read_column(path, index, "label_voxels")
    rows = zip(index.id, index.split.tolist(), index.shard.tolist(), index.row.tolist(), voxels.tolist(), strict=True)
    return [
        {
            "id": subject,
            "split": SPLITS[code],
            "shard": index.shards[shard]["file"],
            "row": row,
            "voxels": dict(zip(names, counts, strict=True)),
        }
        for subject, code, shard, row, counts in rows
        if split in (None, SPLITS[code])
    ]


def summarise(path: str | Path) -> dict[str, Any]:
    """Totals of a packed dataset, as plain values.

    Returns:
        `subjects`, `splits`, `shards`, `size_bytes`, `size` (X, Y, Z), `storage_dtype`, `orientation`, `labels`
        (name -> subjects that have it, voxels, share of all voxels), `intensities` (modality -> smallest, median and
        largest of what became -1 and 1), `covariates` (name -> smallest, median and largest, or subjects by value),
        `voxel_sizes_mm` and `original_sizes` (value -> subjects), `left_out`.

    Raises:
        DataFormatError: as `list_subjects`.
    """
    path = Path(path)
    index = read_index(path)
    data = index.config
    affines, shapes = read_column(path, index, "affine"), read_column(path, index, "original_shape")
    intensity = read_column(path, index, "intensity")
    splits = Counter(SPLITS[code] for code in index.split.tolist())
    return {
        "subjects": len(index.id),
        "splits": {name: splits[name] for name in SPLITS if splits[name]},
        "shards": len(index.shards),
        "size_bytes": sum(entry["size_bytes"] for entry in index.shards),
        "size": list(data.size),
        "storage_dtype": data.storage_dtype,
        "orientation": data.orientation,
        "labels": _label_histogram(read_column(path, index, "label_voxels"), data),
        "intensities": {
            modality: {"low": _spread(intensity[:, channel, 0]), "high": _spread(intensity[:, channel, 1])}
            for channel, modality in enumerate(data.modalities)
        },
        "covariates": _covariate_histogram(open_packed(path)),
        "voxel_sizes_mm": _counts([_by(voxel_size_mm(affine)) for affine in affines]),
        "original_sizes": _counts([_by(shape) for shape in shapes]),
        "left_out": len(index.left_out),
    }


def describe_subject(packed: Packed, index: int) -> dict[str, Any]:
    """Facts of one subject, as plain values."""
    subject, geometry = packed.subjects()[index], packed.geometry(index)
    intensity = packed.intensity(index).tolist()
    counts = packed.label_voxels(index).tolist()
    return {
        "id": subject.id,
        "split": subject.split,
        "size": list(packed.data.size),
        "voxel_size_mm": list(voxel_size_mm(packed.affine(index))),
        "orientation": axis_codes(packed.affine(index)),
        "original_size": list(geometry.original_shape),
        "original_voxel_size_mm": list(voxel_size_mm(geometry.file_affine)),
        "original_orientation": axis_codes(geometry.file_affine),
        "intensities": dict(zip(packed.data.modalities, intensity, strict=True)),
        "voxels": dict(zip(packed.data.labels.names.values(), counts, strict=True)),
        "covariates": to_values(packed.covariates(packed.data.covariates)[index].tolist(), packed.data.covariates),
    }


def draw_subject(packed: Packed, index: int, path: Path) -> None:
    """Write a PNG: axial, coronal and sagittal plane of every modality, with the outlines of the mask.

    Raises:
        DataFormatError: the subject is damaged, or `path` is not called .png.
    """
    if path.suffix.lower() != ".png":
        raise DataFormatError(f"{path}: pictures are written as .png; give such a name")
    image, mask = packed.read(index)
    affine = packed.affine(index)
    turned = [turn_to_ras(volume, affine) for volume in image]
    outlined = turn_to_ras(mask, affine)
    pixels = picture(turned, outlined, ras_voxel_size_mm(affine), packed.data.labels, PICTURE_HEIGHT)
    with writing_to(path.parent), atomic_path(path) as temporary:
        temporary.write_bytes(pixels)


def find_subject(path: str | Path, subject: str) -> tuple[Packed, int]:
    """The open dataset, and where the subject is in it.

    Raises:
        DataFormatError: not a packed dataset, or no such subject; names the nearest ones.
    """
    packed = open_packed(path)
    ids = {entry.id: entry.index for entry in packed.subjects()}
    if subject not in ids:
        near = difflib.get_close_matches(subject, ids, n=3) or list(ids)[:3]
        raise DataFormatError(
            f"{path}: no subject {subject}; nearest of {len(ids)}: {', '.join(near)}; `hpc-ddpm data ls` lists all"
        )
    return packed, ids[subject]


def _label_histogram(voxels: NDArray[np.int64], data: DataConfig) -> dict[str, dict[str, float]]:
    total = voxels.shape[0] * int(np.prod(data.size))
    return {
        name: {
            "subjects": int((voxels[:, channel] > 0).sum()),
            "voxels": int(voxels[:, channel].sum()),
            "share": float(voxels[:, channel].sum() / total),
        }
        for channel, name in enumerate(data.labels.names.values())
    }


def _covariate_histogram(packed: Packed) -> dict[str, dict[str, Any]]:
    covariates = packed.data.covariates
    rows = [to_values(row, covariates) for row in packed.covariates(covariates).tolist()]
    found = {}
    for name, covariate in covariates.items():
        known = [row[name] for row in rows if name in row]
        numbers = {} if covariate.values or not known else {"low_median_high": _spread(np.array(known))}
        counts = {value: known.count(value) for value in covariate.values}
        found[name] = {**numbers, **counts, "unknown": len(rows) - len(known)}
    return found


def _spread(values: NDArray[Any]) -> list[float]:
    return [float(values.min()), float(np.median(values)), float(values.max())]


def _counts(values: Sequence[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _by(numbers: Any) -> str:
    return "x".join(f"{number:.4g}" for number in numbers)
