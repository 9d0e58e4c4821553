"""From a subject's files to what is packed: oriented, fitted to one size, intensities in [-1, 1].

C D H W with D, H, W = Z, Y, X. Shapes and sizes in configuration and metadata are (X, Y, Z).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.intensity import normalize
from hpc_ddpm.data.labels import add_foreground, brats_raw_labels, check_present, remap_labels
from hpc_ddpm.data.nifti import Affine, Shape3, Volume, oriented_grid, read_nifti, to_file_order
from hpc_ddpm.errors import DataFormatError

Array = NDArray[Any]

# ---------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """How a packed volume lies in the grid of the file it came from; enough to put it back."""

    original_shape: Shape3
    """(X, Y, Z) of the file."""
    original_affine: tuple[tuple[float, ...], ...]
    """4 rows of 4, X, Y, Z voxels of the file to mm."""
    orientation: str
    fit: str
    size: Shape3
    """(X, Y, Z) as packed."""

    @property
    def file_affine(self) -> Affine:
        """`original_affine` as an array (4, 4)."""
        return np.array(self.original_affine, dtype=np.float64)

    @property
    def oriented(self) -> tuple[Shape3, Affine]:
        """Shape (X, Y, Z) and affine after orientation, before the fit."""
        return oriented_grid(self.original_shape, self.file_affine, self.orientation)

    @property
    def affine(self) -> Affine:
        """Of the packed volume: (4, 4), X, Y, Z voxels to mm."""
        shape, affine = self.oriented
        return affine @ _fit_affine(shape, self.size, self.fit)


def restore(volume: Array, geometry: Geometry, fill: float | None = None) -> Array:
    """Put a packed-size volume or mask back on the grid of the subject's file; write it with `file_affine`.

    Args:
        volume: (D, H, W) of `geometry.size`; integers are resampled nearest, floats linearly.
        geometry: of the subject.
        fill: outside the packed field of view; None is 0 for integers and -1 for floats.

    Returns:
        (D, H, W) in the order of the file, of `original_shape`.
    """
    if fill is None:
        fill = 0 if volume.dtype.kind in "iub" else -1.0
    shape, _ = geometry.oriented
    return to_file_order(_fit(volume, shape, geometry.fit, fill), geometry.file_affine, geometry.orientation)


def _fit(volume: Array, size: Shape3, fit: str, fill: float) -> Array:
    """(D, H, W) to `size` (X, Y, Z) by centre crop/pad or resampling; the caller has checked `exact`."""
    for axis, target in enumerate(reversed(size)):
        if volume.shape[axis] == target:
            continue
        if fit == "crop_pad":
            volume = _crop_or_pad(volume, axis, target, fill)
        elif volume.dtype.kind in "iub":
            volume = _resample_nearest(volume, axis, target)
        else:
            volume = _resample_linear(volume, axis, target)
    return np.ascontiguousarray(volume)


def _margin(source: int, target: int) -> int:
    """Voxels cut (or added) before the volume; an odd one goes in front, as in the published BraTS crops."""
    return (abs(source - target) + 1) // 2


def _crop_or_pad(volume: Array, axis: int, target: int, fill: float) -> Array:
    source = volume.shape[axis]
    before = _margin(source, target)
    if source > target:
        return volume[(slice(None),) * axis + (slice(before, before + target),)]
    widths = [(0, 0)] * volume.ndim
    widths[axis] = (before, target - source - before)
    return np.pad(volume, widths, constant_values=fill)


def _resample_nearest(volume: Array, axis: int, target: int) -> Array:
    return volume.take(np.floor(_sources(volume.shape[axis], target) + 0.5).astype(int), axis)


def _resample_linear(volume: Array, axis: int, target: int) -> Array:
    """Linear between voxel centres; when shrinking, after scikit-image's Gaussian, sigma (factor - 1) / 2."""
    source = volume.shape[axis]
    if source > target:
        volume = gaussian_filter1d(volume, (source / target - 1) / 2, axis, mode="nearest")
    position = np.clip(_sources(source, target), 0, source - 1)
    lower = np.floor(position).astype(int)
    upper = np.minimum(lower + 1, source - 1)
    weight = (position - lower).astype(volume.dtype).reshape([-1 if i == axis else 1 for i in range(volume.ndim)])
    return volume.take(lower, axis) * (1 - weight) + volume.take(upper, axis) * weight


def _sources(source: int, target: int) -> NDArray[np.float64]:
    """Positions in the source grid of the target's voxel centres; both cover the same field of view."""
    return np.linspace(0.5, target - 0.5, target) * (source / target) - 0.5


def _fit_affine(shape: Shape3, size: Shape3, fit: str) -> Affine:
    """(4, 4), packed voxels to oriented voxels, X, Y, Z."""
    affine = np.eye(4)
    for axis, (source, target) in enumerate(zip(shape, size, strict=True)):
        if fit == "resize":
            affine[axis, axis] = source / target
            affine[axis, 3] = 0.5 * source / target - 0.5
        else:
            affine[axis, 3] = _margin(source, target) * (1 if source >= target else -1)
    return affine


# ---------------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True, eq=False)
class Prepared:
    """One subject as it is packed."""

    image: NDArray[np.float32]
    """(C, D, H, W) in [-1, 1]."""
    mask: NDArray[np.uint8]
    """(D, H, W), values of the label scheme."""
    affine: Affine
    geometry: Geometry
    intensity: NDArray[np.float32]
    """(C, 2): the intensities that became -1 and 1."""


def prepare(subject: Subject, config: DataConfig) -> Prepared:
    """Read, check and fit one subject.

    Raises:
        DataFormatError: a file is missing, damaged, or not what the configuration says; names the file.
    """
    config = _resolve(config)
    file, geometry = _read_mask(subject.mask, config)
    mask = _fit(remap_labels(file.data, config.labels, subject.mask), config.size, config.fit, 0)
    image = np.empty((config.num_modalities, *config.spatial_shape), np.float32)
    intensity = np.empty((config.num_modalities, 2), np.float32)
    for channel, modality in enumerate(config.modalities):
        path = subject.images[modality]
        raw = _read_image(path, file, subject.mask, config)
        image[channel], intensity[channel] = _fit_and_normalize(raw, config, path)
        if channel == 0:
            add_foreground(mask, _foreground(raw, config), config.labels)
    check_present(mask, config.labels, subject.mask)
    return Prepared(image, mask, geometry.affine, geometry, intensity)


def prepare_mask(path: str | Path, config: DataConfig) -> tuple[NDArray[np.uint8], Affine, Geometry]:
    """Read, check and fit a mask by itself.

    Returns:
        (D, H, W) uint8, its affine (X, Y, Z voxels to mm), and its geometry.

    Raises:
        DataFormatError: as `prepare`; also where labels that come from the images are missing.
    """
    path, config = Path(path), _resolve(config)
    file, geometry = _read_mask(path, config)
    mask = _fit(remap_labels(file.data, config.labels, path), config.size, config.fit, 0)
    check_present(mask, config.labels, path)
    return mask, geometry.affine, geometry


def grid_distance(one: Volume, other: Volume) -> float:
    """Largest distance between the corners of two grids of one shape, in voxels of the finer axis."""
    ends = np.array(np.meshgrid(*[(0, side - 1) for side in one.data.shape[::-1]])).reshape(3, -1)
    apart = (one.affine - other.affine) @ np.vstack([ends, np.ones(8)])
    voxel = np.linalg.norm(one.affine[:3, :3], axis=0).min()
    return float(np.linalg.norm(apart[:3], axis=0).max() / voxel)


def _resolve(config: DataConfig) -> DataConfig:
    """With the label scheme that raw BraTS files imply."""
    if config.layout != "brats_raw":
        return config
    return config.model_copy(update={"labels": brats_raw_labels(config.labels)})


def _read_mask(path: Path, config: DataConfig) -> tuple[Volume, Geometry]:
    file = read_nifti(path, config.orientation, dtype=None)
    rows = tuple(tuple(float(value) for value in row) for row in file.file_affine)
    _check_size(file, config, path)
    return file, Geometry(file.file_shape, rows, config.orientation, config.fit, config.size)


def _read_image(path: Path, mask: Volume, mask_path: Path, config: DataConfig) -> NDArray[np.float32]:
    file = read_nifti(path, config.orientation)
    if file.data.shape != mask.data.shape or grid_distance(file, mask) > 0.1:
        raise DataFormatError(
            f"{path}: its grid {_grid(file)} is not that of its mask {mask_path}: {_grid(mask)}; "
            "resample one onto the other (mask: nearest neighbour)"
        )
    if not np.isfinite(file.data).all():
        bad = int(file.data.size - np.isfinite(file.data).sum())
        raise DataFormatError(f"{path}: {bad} voxels are NaN or infinite, numbers expected; repair the image")
    return file.data


def _check_size(file: Volume, config: DataConfig, path: Path) -> None:
    found = file.data.shape[::-1]
    if config.fit == "exact" and found != config.size:
        raise DataFormatError(
            f"{path}: {found} voxels found, data.size={list(config.size)} expected by data.fit=exact; "
            "use data.fit=crop_pad or data.fit=resize"
        )


def _fit_and_normalize(raw: NDArray[np.float32], config: DataConfig, path: Path) -> tuple[NDArray[np.float32], Array]:
    """Med-DDPM scales BraTS volumes after the crop; all other ways see the whole volume and pad with -1."""
    if config.normalization == "med_ddpm_brats":
        return normalize(_fit(raw, config.size, config.fit, float(raw.min())), config, path)
    volume, intensity = normalize(raw, config, path)
    return _fit(volume, config.size, config.fit, -1.0), intensity


def _foreground(raw: NDArray[np.float32], config: DataConfig) -> NDArray[np.bool_]:
    """(D, H, W) as packed: where the modality is above its minimum."""
    if config.fit == "resize":
        return _fit(raw > raw.min(), config.size, config.fit, 0)
    cropped = _fit(raw, config.size, config.fit, float(raw.min()))
    return cropped > cropped.min()


def _grid(file: Volume) -> str:
    x, y, z = file.data.shape[::-1]
    rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in file.affine[:3])
    return f"{x}x{y}x{z} [{rows}]"
