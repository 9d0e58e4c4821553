"""A cohort of brains with lesions, made from the ICBM-152 template that nilearn ships.

Shapes: D H W = Z Y X of RAS+ voxels, 2 mm. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.files import write_json
from hpc_ddpm.sealed import read_json

Volume = NDArray[np.float32]

LABELS = {1: "csf", 2: "grey_matter", 3: "white_matter", 4: "lesion"}
RECIPE = 1
"""Raised whenever the same seed would give other voxels."""
VOXEL_MM = 2
GRID = (88, 104, 84)
"""(D, H, W) of every subject: the template's brain with a margin for what the deformations add."""


@dataclass(frozen=True)
class Template:
    """ICBM-152: T1 and tissue probabilities (D, H, W) in [0, 1], and where a subject's grid lies in it."""

    t1: Volume
    grey: Volume
    white: Volume
    deep: Volume
    """1 in tissue at least 12 mm below the brain's surface, where a lesion may be centred; else 0."""
    start: NDArray[np.int64]
    """(z, y, x) template voxel at a subject's voxel 0."""
    affine: NDArray[np.float64]
    """4x4, (x, y, z) voxel of a subject to RAS+ mm."""


def write_cohort(
    folder: Path, num_subjects: int = 24, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Write subjects as `mask/sub-001.nii.gz` (uint8, `LABELS`) and `t1/sub-001.nii.gz` (int16, any scale).

    Subject k depends on `seed` and k alone. Files that exist are kept, so a second call only completes.
    `progress(done, total)` is called after each subject. Returns the subject ids.

    Raises ConfigError if nilearn is missing, num_subjects < 1, or `folder` holds a cohort of another seed.
    """
    if num_subjects < 1:
        raise ConfigError(f"num_subjects={num_subjects}: a cohort needs at least 1 subject")
    folder = Path(folder)
    _claim(folder, seed)
    ids = [f"sub-{number:03d}" for number in range(1, num_subjects + 1)]
    for number, subject in enumerate(ids, start=1):
        mask_path, t1_path = (folder / kind / f"{subject}.nii.gz" for kind in ("mask", "t1"))
        if not (mask_path.exists() and t1_path.exists()):
            template = load_template()
            t1, labels = make_subject(template, seed, number)
            write_nifti(t1_path, t1, template.affine, dtype=np.int16)
            write_nifti(mask_path, labels, template.affine, dtype=np.uint8)
        if progress:
            progress(number, num_subjects)
    return ids


def _claim(folder: Path, seed: int) -> None:
    """Say in `cohort.json` what the folder holds, or refuse if it says otherwise."""
    wanted = {"recipe": RECIPE, "seed": seed}
    note = folder / "cohort.json"
    if not note.exists():
        write_json(note, wanted, indent=2)
        return
    found = read_json(note, dict[str, Any], "delete the folder or use another", ConfigError)
    if found != wanted:
        raise ConfigError(f"{folder} holds a cohort of {found}, asked for {wanted}; delete it or use another folder")


@functools.lru_cache(maxsize=1)
def load_template() -> Template:
    """Read the template at 2 mm from the installed nilearn; raises ConfigError if it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from nilearn import datasets
        except ImportError as error:
            raise ConfigError("the demo's brains need nilearn: pip install 'hpc_ddpm[demo]'") from error
        loaders = (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
        images = [load(resolution=VOXEL_MM) for load in loaders]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32).T for image in images)
    brain = t1 > 0.1
    deep = (grey + white > 0.9) & (ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1] * VOXEL_MM > 12)
    (spans,) = ndimage.find_objects(brain.astype(np.uint8))
    start = np.array([(span.start + span.stop - n) // 2 for span, n in zip(spans, GRID, strict=True)])
    affine = np.array(images[0].affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ start[::-1]
    return Template(t1, grey, white, deep.astype(np.float32), start, affine)


def make_subject(template: Template, seed: int, number: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw subject `number` of cohort `seed`: T1 (D, H, W) int16 from 0, labels (D, H, W) uint8."""
    rng = np.random.default_rng([seed, number])
    voxels = np.indices(GRID, dtype=np.float32)
    coordinates = _deform(rng, voxels) + template.start[:, None, None, None].astype(np.float32)
    blob = np.zeros(GRID, dtype=bool)
    eligible = np.argwhere(_warp(template.deep, coordinates) > 0.5)
    for centre in rng.choice(eligible, size=rng.integers(1, 4)):
        blob |= _grow_lesion(rng, voxels, centre, coordinates)
    t1, grey, white = (_warp(volume, coordinates) for volume in (template.t1, template.grey, template.white))
    labels = _label(t1 > 0.1, grey, white, blob)
    return _acquire(rng, t1, grey, white, labels), labels


def _deform(rng: np.random.Generator, voxels: Volume) -> Volume:
    """Where each voxel (3, D, H, W) comes from: a small affine map, and bumps of two widths."""
    centre = (np.array(GRID, dtype=np.float32) - 1) / 2
    offset = voxels - centre[:, None, None, None]
    turn = rng.normal(0, 0.03, (3, 3))
    matrix = np.diag(rng.uniform(0.99, 1.08, 3)) + (turn - turn.T) / 2 + rng.normal(0, 0.01, (3, 3))
    moved = np.tensordot(matrix, offset, axes=1)
    shift = centre + rng.normal(0, 0.5, 3)
    bumps = [2.0 * _smooth_field(rng, 26.0) + 0.8 * _smooth_field(rng, 11.0) for _ in range(3)]
    moved += shift[:, None, None, None] + np.stack(bumps) / VOXEL_MM
    return moved.astype(np.float32)


def _smooth_field(rng: np.random.Generator, width_mm: float) -> Volume:
    """Random field (D, H, W) of unit variance: white noise on knots `width_mm` apart, spread by Gaussians."""
    width = width_mm / VOXEL_MM
    knots = [np.arange(-2 * width, n + 2 * width, width) for n in GRID]
    field = rng.standard_normal([len(k) for k in knots])
    for n, k in zip(GRID, knots, strict=True):
        spread = np.exp(-0.5 * ((np.arange(n)[:, None] - k) / width) ** 2)
        field = np.tensordot(field, spread, axes=(0, 1))
    return (field / field.std()).astype(np.float32)


def _grow_lesion(
    rng: np.random.Generator, voxels: Volume, centre: NDArray[np.int64], coordinates: Volume
) -> NDArray[np.bool_]:
    """One irregular ellipsoid (D, H, W); pushes the tissue around it outwards, changing `coordinates`."""
    radius = rng.uniform(8.0, 15.0) / VOXEL_MM
    stretch = rng.uniform(0.7, 1.35, 3).astype(np.float32)
    offset = voxels - centre[:, None, None, None].astype(np.float32)
    distance = np.sqrt(np.square(offset / stretch[:, None, None, None]).sum(axis=0)) / np.float32(radius)
    coordinates -= np.float32(0.3) * offset * np.exp(-0.5 * np.square(distance))
    roughness = _smooth_field(rng, 8.0)
    return distance + np.float32(0.25) * (roughness - roughness[tuple(centre)]) < 1.0


def _warp(volume: Volume, coordinates: Volume) -> Volume:
    return ndimage.map_coordinates(volume, coordinates, order=1, output=np.float32)


def _label(brain: NDArray[np.bool_], grey: Volume, white: Volume, blob: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The likeliest tissue of every voxel; a lesion replaces grey and white matter, never CSF."""
    tissue = brain & (grey + white > 0.5)
    labels = brain.astype(np.uint8)
    labels[tissue] = np.where(white > grey, 3, 2)[tissue]
    labels[ndimage.binary_opening(blob & tissue)] = 4
    return labels


def _acquire(
    rng: np.random.Generator, t1: Volume, grey: Volume, white: Volume, labels: NDArray[np.uint8]
) -> NDArray[np.int16]:
    """What a scanner makes of the anatomy: tissue contrast, dark lesions, bias field, gain, Rician noise."""
    fluid = np.clip(1 - grey - white, 0, 1)
    signal = t1 + rng.normal(0, 0.02) * grey + rng.normal(0, 0.02) * white - rng.uniform(0.08, 0.18) * fluid
    texture = rng.uniform(0.30, 0.45) + 0.03 * _smooth_field(rng, 6.0)
    share = ndimage.gaussian_filter((labels == 4).astype(np.float32), 0.7)
    signal = np.clip(signal + share * (texture - signal), 0.02, None) ** np.exp(rng.normal(0, 0.1))
    signal *= np.exp(0.05 * _smooth_field(rng, 70.0))
    noise = rng.normal(0, 0.015, (2, *GRID))
    scan = rng.uniform(700, 1300) * np.hypot(signal + noise[0], noise[1])
    return np.where(labels > 0, np.rint(scan), 0).astype(np.int16)
