"""What is not background: of an image by itself, and of a subject with its mask. D H W."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.geometry import Box
from hpc_ddpm.data.labels import outer_label
from hpc_ddpm.errors import DataFormatError

Array = NDArray[Any]
Inside = NDArray[np.bool_]
EVEN, FAINT = 0.05, 1e-3
"""Shares of the range of an image: how far the background may vary, and what is too little to tell."""
MIN_BACKGROUND = 0.5
"""Share of the border that must be background."""
MAX_REACH = 0.1
"""Share of the border that a body may reach if it has values on both sides of the background."""
MAX_FAINT, MAX_BELOW = 0.01, 0.01
"""Shares of the voxels above the background: so many faint voxels, and so many below it, are still chance."""
MIN_PIECE = 0.01
"""Share of the largest piece: a smaller piece counts as noise."""
BODY = 0.3, 0.5
"""Shares of the brain in the image: a label below the first is not the body; from the second on, it is."""
MIN_SURFACE, MIN_BODY = 0.95, 0.1
"""Shares of the surface of all labels, and of the field of view, that a label of the whole body takes up."""
ALIKE, UNLIKE = 0.8, 0.5
"""Dice of two modalities that show one brain, and of two that do not."""


def foreground(volume: NDArray[np.float32]) -> Inside:
    """Inside of what is brighter than the background: Otsu's threshold (1979), holes filled."""
    volume = np.minimum(volume, np.percentile(volume, 98))  # hot voxels would stretch the histogram
    counts, edges = np.histogram(volume, 128)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    mass = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / below[-1] - mass) ** 2 / (below * (below[-1] - below))
    threshold = edges[1:][int(np.nanargmax(np.where(np.isfinite(between), between, -1)))]
    return np.asarray(ndimage.binary_fill_holes(volume > threshold), bool)


def above_background(volume: NDArray[np.float32]) -> Inside | None:
    """Inside of what differs from the background, which is the value of the border; None where the border has none.

    Where the background is even, that is every voxel above it, as Med-DDPM has it. Where it is not, or where values
    lie on both sides of it (z-scores), small pieces count as noise, and holes are filled.

    Args:
        volume: (D, H, W), finite; a skull-stripped brain, or another body on an even background.
    """
    border = np.concatenate([np.take(volume, [0, -1], axis).ravel() for axis in range(3)])
    level = np.float32(np.median(border))
    step = 1 if volume.size < 2**18 else 3
    some = np.abs(volume[::step, ::step, ::step] - level)
    spread = float(np.percentile(some, 99)) or float(np.abs(volume - level).max())
    noise = np.abs(border - level)
    noise = noise[noise <= EVEN * spread]
    if noise.size < MIN_BACKGROUND * border.size:
        return None
    tolerance = max(FAINT * spread, 2 * float(np.percentile(noise, 99)))
    above, below = volume > level + np.float32(tolerance), volume < level - np.float32(tolerance)
    is_one_sided = np.count_nonzero(below) <= MAX_BELOW * np.count_nonzero(above)
    clear, every = (above, volume > level) if is_one_sided else (above | below, volume != level)
    is_even = np.count_nonzero(every) <= (1 + MAX_FAINT) * np.count_nonzero(clear)
    if not clear.any():
        return None
    if is_one_sided:
        return every if is_even else _solid(clear)
    inside = _solid(every if is_even else clear)
    return inside if _reach(inside) <= MAX_REACH else None


def brain(shown: Sequence[Inside | None], path: Path) -> Inside:
    """The brain of a subject by what `above_background` says of each of its images.

    It is that of the first image, or where that one has no background, what most others show.

    Args:
        shown: one for each modality, in order, all of one shape (D, H, W).
        path: of the first image, for messages.

    Raises:
        DataFormatError: no image has a background, or the first shows another body than all others.
    """
    clear = [inside for inside in shown if inside is not None]
    if not clear:
        raise DataFormatError(
            f"{path}: the brain cannot be told from the background: the border of the image is not one even value; "
            "give images without skull in a wider field of view, or masks that label the brain",
            "brain-unclear",
        )
    first, others = shown[0], clear if shown[0] is None else clear[1:]
    if first is None:
        return _most(others)
    if len(others) > 1:
        usual = _most(others)
        if _dice(first, usual) < UNLIKE and all(_dice(inside, usual) > ALIKE for inside in others):
            raise DataFormatError(
                f"{path}: {int(first.sum())} voxels differ from its background, {int(usual.sum())} in the other "
                "modalities; take the skull off all of them, or give masks that label the brain",
                "brain-unclear",
            )
    return first


def is_body(region: Inside, labelled: Inside, inside: Inside | None) -> bool | None:
    """Whether a label is that of the whole body around the others; None where that cannot be told.

    Args:
        region: (D, H, W), the label.
        labelled: all labels.
        inside: what the image shows; None: the mask alone has to do.
    """
    if inside is not None and inside.any():
        share = float((region & inside).sum() / inside.sum())
        return True if share >= BODY[1] else False if share < BODY[0] else None
    surface = labelled & ~ndimage.binary_erosion(labelled)
    outside = float(region[surface].mean()) if surface.any() else 0.0
    is_large = labelled.mean() >= MIN_BODY and 2 * int(region.sum()) >= int(labelled.sum())
    return True if outside >= MIN_SURFACE and is_large else False if outside < BODY[1] else None


def _most(shown: Sequence[Inside]) -> Inside:
    return np.asarray(2 * np.sum(shown, axis=0, dtype=np.uint8) > len(shown))


def _dice(one: Inside, other: Inside) -> float:
    total = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * int(np.count_nonzero(one & other)) / max(total, 1)


def _solid(inside: Inside) -> Inside:
    """Without specks and holes."""
    pieces, count = ndimage.label(inside)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes((sizes >= max(MIN_PIECE * sizes.max(), 1))[pieces]), bool)


def _reach(inside: Inside) -> float:
    """Share of the border that is inside."""
    return float(np.mean(np.concatenate([np.take(inside, [0, -1], axis).ravel() for axis in range(3)])))


def head(mask: NDArray[np.uint8], image: NDArray[np.float32] | None, labels: LabelsConfig) -> Inside:
    """The head (or other body part) of a subject.

    It is what the mask labels, where its scheme has a head or brain; else the foreground of the image is added: what
    is above its background where the foreground has a label (a brain without skull), otherwise by Otsu.

    Args:
        mask: (D, H, W), values of the scheme; the foreground label is not added yet.
        image: on the same grid; None: the mask alone says.
        labels: the scheme.
    """
    inside = mask > 0
    if image is None or (outer_label(labels) is not None and labels.foreground_label is None):
        return inside
    shown = None if labels.foreground_label is None else above_background(image)
    return inside | (foreground(image) if shown is None else shown)


def box_around(inside: Inside) -> Box:
    """(X, Y, Z) box around the largest connected piece, so that specks do not count; all where there is none."""
    pieces, count = ndimage.label(inside)
    if not count:
        return (0, 0, 0), _xyz(inside.shape)
    largest = int(np.bincount(pieces.ravel())[1:].argmax())
    spans = ndimage.find_objects(pieces)[largest]
    return _xyz([span.start for span in spans]), _xyz([span.stop for span in spans])


def _xyz(zyx: Any) -> tuple[int, int, int]:
    z, y, x = (int(value) for value in zyx)
    return x, y, z
