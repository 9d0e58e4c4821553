"""From a subject's files to what is packed: oriented, of one voxel size and size, intensities in [-1, 1].

C D H W with D, H, W = Z, Y, X. Shapes and sizes in configuration and metadata are (X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.coding import BRATS_BRAIN, resolve_labels
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.foreground import Inside, above_background, box_around, brain, head, is_body
from hpc_ddpm.data.geometry import Geometry, fit, resample
from hpc_ddpm.data.hooks import hooked
from hpc_ddpm.data.intensity import background, normalize
from hpc_ddpm.data.labels import add_foreground, check_present, needs_a_look, remap_labels
from hpc_ddpm.data.nifti import Affine, Volume, read_nifti, voxel_size_mm
from hpc_ddpm.errors import DataFormatError

Array = NDArray[Any]
Image = NDArray[np.float32]
Mask = NDArray[np.uint8]
MAX_INTENSITY = 1e30
"""Largest absolute intensity; beyond it, comparing voxels could overflow single precision."""
MAX_RESAMPLED = 2**30
"""Voxels to which data.voxel_size_mm may bring a volume that has fewer."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """One subject as it is packed."""

    image: Image
    """(C, D, H, W) in [-1, 1]."""
    mask: Mask
    """(D, H, W), values of the label scheme."""
    affine: Affine
    geometry: Geometry
    intensity: Image
    """(C, 2): the intensities that became -1 and 1."""


def prepare(subject: Subject, config: DataConfig) -> Prepared:
    """Read, check and fit one subject.

    Raises:
        DataFormatError: a file is missing, damaged, or not what the configuration says; names the file.
    """
    config = _resolve(config)
    file, labels, geometry = _read_mask(subject.mask, config, subject.images[config.modalities[0]])
    image = np.empty((config.num_modalities, *config.spatial_shape), np.float32)
    intensity = np.empty((config.num_modalities, 2), np.float32)
    shown: list[Inside | None] = []
    for channel, modality in enumerate(config.modalities):
        path = subject.images[modality]
        with hooked(path, subject.id, modality, config) as image_file:
            raw = resample(_read_image(image_file, path, file, subject.mask, config), geometry)
        if channel == 0:
            geometry = _placed(geometry, labels, raw, config)
            is_brain = shows_brain(labels, raw, config)
        if config.labels.foreground_label is not None:
            shown.append(above_background(raw))
        image[channel], intensity[channel] = _normalize_and_fit(raw, labels, geometry, config, path)
    mask = fit(labels, geometry, 0)
    if shown:
        inside = fit(brain(shown, subject.images[config.modalities[0]]), geometry, 0)
        add_foreground(mask, inside, config.labels, subject.mask)
    check_present(mask, config.labels, subject.mask, is_brain)
    return Prepared(image, mask, geometry.affine, geometry, intensity)


def prepare_mask(path: str | Path, config: DataConfig, images: Sequence[Path] = ()) -> tuple[Mask, Affine, Geometry]:
    """Read, check and fit a mask by itself, or with the images beside it.

    Args:
        path: of the mask.
        config: its `modalities` do not matter here.
        images: of the same subject and grid, in order; read where the scheme takes its foreground label from them.

    Returns:
        (D, H, W) uint8, its affine (X, Y, Z voxels to mm), and its geometry.

    Raises:
        DataFormatError: as `prepare`; also where labels that come from the images are missing.
    """
    path, config = Path(path), _resolve(config)
    file, labels, geometry = _read_mask(path, config, images[0] if images else None)
    shown: list[Inside | None] = []
    first: Image | None = None
    for image in images if config.labels.foreground_label is not None else ():
        raw = resample(_read_image(image, image, file, path, config), geometry)
        first = raw if first is None else first
        shown.append(above_background(raw))
    geometry = _placed(geometry, labels, first, config)
    mask = fit(labels, geometry, 0)
    if shown:
        add_foreground(mask, fit(brain(shown, images[0]), geometry, 0), config.labels, path)
    check_present(mask, config.labels, path)
    return mask, geometry.affine, geometry


def shows_brain(labels: Mask, image: Image, config: DataConfig) -> bool | None:
    """Whether label 4 of a BraTS scheme is the brain of the image; None for other schemes, or where it is not clear."""
    if not needs_a_look(config.labels):
        return None
    some = labels[::2, ::2, ::2]
    inside = above_background(image[::2, ::2, ::2])
    return None if inside is None else is_body(some == BRATS_BRAIN, some > 0, inside)


def grid_distance(one: Volume, other: Volume) -> float:
    """Largest distance between the corners of two grids of one shape, in voxels of the finer axis."""
    ends = np.array(np.meshgrid(*[(0, side - 1) for side in one.data.shape[::-1]])).reshape(3, -1)
    apart = (one.affine - other.affine) @ np.vstack([ends, np.ones(8)])
    voxel = np.linalg.norm(one.affine[:3, :3], axis=0).min()
    return float(np.linalg.norm(apart[:3], axis=0).max() / voxel)


def _resolve(config: DataConfig) -> DataConfig:
    """The settings with the label scheme that the coding of the masks implies."""
    return config.model_copy(update={"labels": resolve_labels(config.labels, config.layout)})


def _read_mask(path: Path, config: DataConfig, image: Path | None) -> tuple[Volume, Mask, Geometry]:
    """The file, its labels after resampling, and the geometry with the fit around the middle."""
    file = read_nifti(path, config.orientation, dtype=None, beside=image)
    rows = tuple(tuple(float(value) for value in row) for row in file.file_affine)
    geometry = Geometry(file.file_shape, rows, config.orientation, config.fit, config.size, config.voxel_size_mm)
    found = geometry.resampled[0]
    if math.prod(found) > max(MAX_RESAMPLED, math.prod(file.file_shape)):
        raise DataFormatError(
            f"{path}: {_by(file.file_shape)} voxels of {_by(voxel_size_mm(file.file_affine))} mm found, which "
            f"data.voxel_size_mm would make {_by(found)}; correct the units or the affine in its header",
            "bad-affine",
        )
    if config.fit == "exact" and found != config.size:
        raise DataFormatError(
            f"{path}: {found} voxels found, data.size={list(config.size)} expected by data.fit=exact; "
            "use data.fit=crop_pad or data.fit=resize",
            "size-mismatch",
        )
    return file, resample(remap_labels(file.data, config.labels, path), geometry), geometry


def _read_image(file: Path, path: Path, mask: Volume, mask_path: Path, config: DataConfig) -> Image:
    """The voxels of `file`, which is what the hooks made of the image at `path`."""
    image, shown = read_nifti(file, config.orientation), path if file == path else f"{path}: after data.hooks"
    if image.data.shape != mask.data.shape or grid_distance(image, mask) > 0.1:
        kind = "grid-affine" if image.data.shape == mask.data.shape else "grid-shape"
        raise DataFormatError(
            f"{shown}: its grid {_grid(image)} is not that of its mask {mask_path}: {_grid(mask)}; "
            f"{_way_out(image, mask)}",
            kind,
        )
    if not -MAX_INTENSITY < float(image.data.min()) <= float(image.data.max()) < MAX_INTENSITY:
        bad = int(image.data.size - (np.abs(image.data) < MAX_INTENSITY).sum())
        raise DataFormatError(
            f"{shown}: {bad} voxels are NaN or infinite, or beyond {MAX_INTENSITY:g}, numbers expected; "
            "repair the image",
            "not-finite",
        )
    return image.data


def _way_out(image: Volume, mask: Volume) -> str:
    """Advice for the user when two grids differ."""
    if image.file_shape == mask.file_shape and np.array_equal(mask.file_affine, np.eye(4)):
        return (
            "its affine is the identity, as tools write it that drop the place: if voxel by voxel they match (look at "
            "both), copy the affine of the image into the mask"
        )
    return "resample one onto the other (mask: nearest neighbour)"


def _placed(geometry: Geometry, labels: Mask, image: Image | None, config: DataConfig) -> Geometry:
    """The geometry with its crop around the head, if the settings ask for that."""
    if config.crop_center == "volume":
        return geometry
    return geometry.around(box_around(head(labels, image, config.labels)))


def _normalize_and_fit(
    raw: Image, labels: Mask, geometry: Geometry, config: DataConfig, path: Path
) -> tuple[Image, Array]:
    """Med-DDPM scales BraTS volumes after the crop; all other ways see the whole volume."""
    if config.normalization == "med_ddpm_brats":
        return normalize(fit(raw, geometry, float(raw.min())), config, path)
    inside = head(labels, raw, config.labels) if config.normalization == "zscore" else None
    volume, intensity = normalize(raw, config, path, inside)
    return fit(volume, geometry, background(volume, config)), intensity


def _by(sides: Sequence[float]) -> str:
    return "x".join(f"{side:g}" for side in sides)


def _grid(file: Volume) -> str:
    x, y, z = file.data.shape[::-1]
    rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in file.affine[:3])
    return f"{x}x{y}x{z} [{rows}]"
