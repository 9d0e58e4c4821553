"""Procedural heads with labels, for tests and benchmarks: ellipsoids, noise, a contrast per modality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.labels import outer_label
from hpc_ddpm.data.nifti import Affine, Shape3, write_nifti

FIELD_OF_VIEW_MM = 192.0
CONTRAST_SEED = 7


def make_phantom(
    size: Shape3, seed: int, subject: int, num_modalities: int, labels: LabelsConfig
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One head; a function of its arguments.

    Args:
        size: (X, Y, Z) in voxels.
        seed: of the cohort.
        subject: number in the cohort.
        num_modalities: C.
        labels: the outer ellipsoid is the foreground label or one called head or brain, else the first; every
            other label is a small ellipsoid inside.

    Returns:
        Image (C, D, H, W) float32 in about [0, 1000] with background 0, and mask (D, H, W) uint8.
    """
    rng = np.random.default_rng([seed, subject])
    shape = size[::-1]
    radii = rng.uniform(0.65, 0.85, 3)
    mask = np.zeros(shape, np.uint8)
    outer = outer_label(labels) or next(iter(labels.names))
    mask[_ellipsoid(shape, rng.uniform(-0.05, 0.05, 3), radii)] = outer
    for label in labels.names:
        if label != outer:
            mask[_ellipsoid(shape, rng.uniform(-0.35, 0.35, 3), rng.uniform(0.16, 0.28, 3))] = label
    noise = gaussian_filter(rng.standard_normal((num_modalities, *shape)), (0, 2, 2, 2))
    texture = 1 + 0.1 * noise / noise.std()
    contrast = np.random.default_rng([CONTRAST_SEED, num_modalities]).uniform(200, 900, (num_modalities, 256))
    contrast[:, 0] = 0
    return np.maximum(contrast[:, mask] * texture, 0).astype(np.float32), mask


def write_phantoms(
    folder: str | Path,
    num_subjects: int,
    size: Shape3,
    seed: int = 0,
    modalities: Sequence[str] = ("t1",),
    labels: LabelsConfig | None = None,
) -> Path:
    """Write a `tree` of NIfTI pairs: mask/ and one folder per modality, head_0000.nii.gz and on.

    Args:
        folder: created where missing.
        num_subjects: how many; the first ones do not depend on it.
        size: (X, Y, Z) in voxels, over a field of view of 192 mm.
        seed: of the cohort.
        modalities: folder names.
        labels: None is head and tumour.

    Returns:
        `folder`.
    """
    folder, labels = Path(folder), labels or LabelsConfig()
    affine = phantom_affine(size)
    for subject in range(num_subjects):
        image, mask = make_phantom(size, seed, subject, len(modalities), labels)
        name = f"head_{subject:04d}.nii.gz"
        write_nifti(folder / "mask" / name, mask, affine, compression_level=1)
        for modality, volume in zip(modalities, image, strict=True):
            write_nifti(folder / modality / name, np.rint(volume), affine, np.int16, compression_level=1)
    return folder


def phantom_affine(size: Shape3) -> Affine:
    """RAS, centred on the origin, 192 mm along every axis."""
    affine = np.diag([*(FIELD_OF_VIEW_MM / side for side in size), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


def _ellipsoid(shape: tuple[int, ...], centre: NDArray[Any], radii: NDArray[Any]) -> NDArray[np.bool_]:
    """Inside of an ellipsoid, in coordinates that run from -1 to 1 along every axis."""
    axes = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij", sparse=True)
    squares = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)]
    return sum(squares) < 1
