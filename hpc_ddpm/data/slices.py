"""What of a volume is worth showing: three planes, colours, grey window, similarity. No drawing here.

Shapes: C D H W, with D, H, W = Z, Y, X.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

CALM = ("#4c78b8", "#46a49a", "#e9dfc3", "#9a86d6", "#7fb35c", "#c98bb0", "#5fb4d8", "#b39b6b")
ACCENT = "#ff6a3d"
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """One held-out mask and what was made of it."""

    id: str
    mask: NDArray[np.uint8]
    """(D, H, W) labels; 0 is background."""
    real: NDArray[np.float32] | None
    """(C, D, H, W), the scale of `synthetic`; None for a mask without a volume."""
    synthetic: NDArray[np.float32]
    """(C, D, H, W)."""
    voxel_size_mm: tuple[float, float, float]
    """(x, y, z)."""
    modality_names: Sequence[str]
    """C names."""
    similarity: float | None = None
    """Correlation of `synthetic` with `real`, if known."""
    orientation: str = "RAS"
    """Where the x, y, z voxel axes point, as axis codes such as LPS: the pictures are turned to RAS+."""

    def to_ras(self) -> Case:
        """The case with x, y, z pointing right, anterior, superior; axes move and flip, values stay."""
        codes = self.orientation[::-1]
        order = [next(axis for axis in range(3) if codes[axis] in pair) for pair in ("SI", "AP", "RL")]
        flips = tuple(place - 3 for place, axis in enumerate(order) if codes[axis] in "IPL")

        def turn(volume: NDArray[Any]) -> NDArray[Any]:
            return np.flip(np.moveaxis(volume, [axis - 3 for axis in order], [-3, -2, -1]), flips)

        z, y, x = (self.voxel_size_mm[::-1][axis] for axis in order)
        return Case(
            self.id, turn(self.mask), None if self.real is None else turn(self.real), turn(self.synthetic),
            (x, y, z), self.modality_names, self.similarity,
        )  # fmt: skip


class Correlation(NamedTuple):
    """Pearson correlation of two volumes; nan where one of them is constant."""

    inside: float
    """Over the voxels with mask > 0."""
    overall: float
    """Over all voxels."""


def voxel_correlation(real: NDArray[Any], synthetic: NDArray[Any], mask: NDArray[Any]) -> Correlation:
    """Mean over channels of the Pearson correlation of (C, D, H, W) volumes; inside is mask (D, H, W) > 0."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(real, synthetic, strict=True)]
    inside = np.mean([_pearson(a[mask > 0], b[mask > 0]) for a, b in pairs])
    return Correlation(float(inside), float(np.mean([_pearson(a, b) for a, b in pairs])))


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if not a.size:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def crop_to_mask(case: Case, margin_mm: float = 8.0) -> Case:
    """The case cut to the box of mask > 0 and a margin, where its mask is not empty."""
    if not case.mask.any():
        return case
    (spans,) = ndimage.find_objects((case.mask > 0).astype(np.uint8))
    margins = [math.ceil(margin_mm / mm) for mm in case.voxel_size_mm[::-1]]
    z, y, x = (slice(max(s.start - m, 0), s.stop + m) for s, m in zip(spans, margins, strict=True))
    real = None if case.real is None else case.real[:, z, y, x]
    return replace(case, mask=case.mask[z, y, x], real=real, synthetic=case.synthetic[:, z, y, x])


def orthogonal_slices(volume: NDArray[Any], centre: tuple[int, int, int]) -> tuple[NDArray[Any], ...]:
    """Axial (H, W), coronal (D, W), sagittal (D, H) planes of an RAS+ (D, H, W) volume through (z, y, x).

    Row 0 is the top of the picture: anterior (axial) or superior; column 0 is the patient's left, in the
    sagittal plane posterior.
    """
    z, y, x = centre
    return volume[z, ::-1], volume[::-1, y], volume[::-1, :, x]


def plane_sizes_mm(shape: tuple[int, ...], voxel_size_mm: tuple[float, float, float]) -> list[tuple[float, float]]:
    """(width, height) in mm of the three planes of a volume of shape (..., D, H, W)."""
    depth, height, width = (n * mm for n, mm in zip(shape[-3:], voxel_size_mm[::-1], strict=True))
    return [(width, height), (width, depth), (height, depth)]


def labels_by_size(masks: Iterable[NDArray[np.uint8]]) -> list[int]:
    """The labels (not 0) present in the masks, the most voluminous first."""
    counts = sum((np.bincount(mask.ravel(), minlength=256) for mask in masks), np.zeros(256, dtype=np.int64))
    counts[0] = 0
    return [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]


def lesion_centre(mask: NDArray[np.uint8]) -> tuple[int, int, int]:
    """(z, y, x) in the largest piece of the rarest label, where its planes show the most of it."""
    labels = labels_by_size([mask])
    if not labels:
        depth, height, width = mask.shape
        return depth // 2, height // 2, width // 2
    pieces, _ = ndimage.label(mask == labels[-1])
    sizes = np.bincount(pieces.ravel())
    piece = pieces == 1 + np.argmax(sizes[1:])
    z, y, x = (int(np.argmax(piece.sum(axis=axes))) for axes in ((1, 2), (0, 2), (0, 1)))
    return z, y, x


def outlined_labels(mask: NDArray[np.uint8]) -> list[int]:
    """The labels small enough for an outline to help: the rarest, and all below 5 % of the mask."""
    labels = labels_by_size([mask])
    counts = np.bincount(mask.ravel(), minlength=256)
    return [label for label in labels if counts[label] < 0.05 * counts[1:].sum() or label == labels[-1]]


def label_colours(n: int) -> list[RGB]:
    """`n` distinct colours, RGB in 0..1, for labels in falling order of volume: calm ones, an accent last."""
    calm = [_rgb(colour) for colour in CALM[: max(n - 1, 1)]]
    spare = [colorsys.hsv_to_rgb((0.12 + 0.618034 * k) % 1, 0.55, 0.85) for k in range(n - 1 - len(calm))]
    return [*calm, *spare, _rgb(ACCENT)][:n]


def _rgb(colour: str) -> RGB:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def grey_window(case: Case, channel: int) -> tuple[float, float]:
    """What is shown black and white: percentile 1 of the real (else synthetic) volume, 99.5 of its inside."""
    reference = (case.synthetic if case.real is None else case.real)[channel]
    inside = reference[case.mask > 0] if case.mask.any() else reference
    low, high = np.percentile(reference, 1), np.percentile(inside, 99.5)
    return float(low), float(max(high, low + 1e-6))
