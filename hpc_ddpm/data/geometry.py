"""Where packed voxels lie in the file they came from, and the way there and back. D H W.

A file's volume is oriented, resampled to a voxel size where one is set, and fitted to one size. Shapes, sizes and
starts are (X, Y, Z). Positions follow voxel centres: sample i of a grid of step s lies at (i + 0.5) s - 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.data.nifti import Affine, Shape3, oriented_grid, to_file_order, voxel_size_mm

Array = NDArray[Any]
Box = tuple[Shape3, Shape3]
"""First voxel, and the one behind the last."""


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
    voxel_size_mm: tuple[float, float, float] | None = None
    """(X, Y, Z) to which it is resampled before the fit."""
    start: Shape3 | None = None
    """Where crop_pad begins in the resampled volume, negative where it pads; None is around the middle."""

    @property
    def file_affine(self) -> Affine:
        """`original_affine` as an array (4, 4)."""
        return np.array(self.original_affine, dtype=np.float64)

    @property
    def oriented(self) -> tuple[Shape3, Affine]:
        """Shape (X, Y, Z) and affine after orientation."""
        return oriented_grid(self.original_shape, self.file_affine, self.orientation)

    @property
    def resampled(self) -> tuple[Shape3, Affine]:
        """Shape (X, Y, Z) and affine after orientation and resampling, before the fit."""
        shape, affine = self.oriented
        x, y, z = (max(1, round(side / step)) for side, step in zip(shape, self.steps, strict=True))
        return (x, y, z), affine @ _step_affine(self.steps)

    @property
    def steps(self) -> tuple[float, ...]:
        """Resampled voxel size in oriented voxels, X, Y, Z."""
        if self.voxel_size_mm is None:
            return 1.0, 1.0, 1.0
        sides = voxel_size_mm(self.oriented[1])
        return tuple(wanted / side for wanted, side in zip(self.voxel_size_mm, sides, strict=True))

    @property
    def affine(self) -> Affine:
        """Affine of the packed volume: (4, 4), from X, Y, Z voxels to mm."""
        shape, affine = self.resampled
        if self.fit == "resize":
            return affine @ _step_affine(_ratios(shape, self.size))
        shift = np.eye(4)
        shift[:3, 3] = self.crop_start
        return affine @ shift

    @property
    def crop_start(self) -> Shape3:
        """`start`, also where it is around the middle."""
        return self.start or _start_around(((0, 0, 0), self.resampled[0]), self.size)

    def around(self, box: Box) -> Geometry:
        """This, with crop_pad around the middle of a box of the resampled volume."""
        return self._starting(_start_around(box, self.size))

    def placed(self, affine: Affine) -> Geometry:
        """This, with crop_pad where the affine of the packed volume says."""
        if self.fit != "crop_pad":
            return self
        x, y, z = np.rint(np.linalg.solve(self.resampled[1], affine)[:3, 3]).astype(int).tolist()
        return self._starting((x, y, z))

    def _starting(self, start: Shape3) -> Geometry:
        return self if start == self.crop_start else replace(self, start=start)


def resample(volume: Array, geometry: Geometry) -> Array:
    """(D, H, W) as oriented to the voxel size of `geometry`; integers nearest, floats linearly and antialiased."""
    return _resample(volume, geometry.steps, geometry.resampled[0])


def fit(volume: Array, geometry: Geometry, fill: float) -> Array:
    """(D, H, W) as resampled to `geometry.size`; `fill` where crop_pad pads."""
    if geometry.fit == "resize":
        return _resample(volume, _ratios(geometry.resampled[0], geometry.size), geometry.size)
    return _crop_or_pad(volume, geometry.crop_start, geometry.size, fill)


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
    shape, _ = geometry.resampled
    if geometry.fit == "resize":
        volume = _resample(volume, _ratios(geometry.size, shape), shape)
    else:
        x, y, z = geometry.crop_start
        volume = _crop_or_pad(volume, (-x, -y, -z), shape, fill)
    steps = tuple(1 / step for step in geometry.steps)
    oriented = _resample(volume, steps, geometry.oriented[0])
    return to_file_order(oriented, geometry.file_affine, geometry.orientation)


def _resample(volume: Array, steps: tuple[float, ...], shape: Shape3) -> Array:
    """Samples `steps` apart; when shrinking, floats after scikit-image's Gaussian, sigma (step - 1) / 2."""
    if volume.shape == shape[::-1] and set(steps) == {1.0}:
        return volume
    scale, is_label = np.array(steps[::-1]), volume.dtype.kind in "iub"
    if not is_label and scale.max() > 1:
        volume = ndimage.gaussian_filter(volume, np.maximum(scale - 1, 0) / 2, mode="nearest")
    order, offset = 0 if is_label else 1, 0.5 * scale - 0.5
    sampled: Array = ndimage.affine_transform(volume, scale, offset, shape[::-1], order=order, mode="nearest")
    return sampled


def _crop_or_pad(volume: Array, start: Shape3, size: Shape3, fill: float) -> Array:
    spans = list(zip(start[::-1], size[::-1], volume.shape, strict=True))
    inside = [(max(first, 0), min(first + target, source)) for first, target, source in spans]
    result = np.full(size[::-1], fill, volume.dtype)
    place = tuple(slice(low - first, high - first) for (low, high), (first, _, _) in zip(inside, spans, strict=True))
    result[place] = volume[tuple(slice(low, high) for low, high in inside)]
    return result


def _start_around(box: Box, size: Shape3) -> Shape3:
    """Where `size` voxels around a box begin; an odd voxel goes in front, as in the published BraTS crops."""
    lengths = [(low, high - low, target) for low, high, target in zip(*box, size, strict=True)]
    margins = [(low, (abs(side - target) + 1) // 2, side >= target) for low, side, target in lengths]
    x, y, z = (low + margin if is_cut else low - margin for low, margin, is_cut in margins)
    return x, y, z


def _ratios(source: Shape3, target: Shape3) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(source, target, strict=True))


def _step_affine(steps: tuple[float, ...]) -> Affine:
    """(4, 4), voxels of a grid of these steps to voxels of the grid it samples; both cover one field of view."""
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = 0.5 * np.array(steps) - 0.5
    return affine
