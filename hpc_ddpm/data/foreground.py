"""What is not background: of an image by itself, and of a subject with its mask. D H W."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.geometry import Box
from hpc_ddpm.data.labels import outer_label

Array = NDArray[Any]
Inside = NDArray[np.bool_]


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


def head(mask: NDArray[np.uint8], image: NDArray[np.float32] | None, labels: LabelsConfig) -> Inside:
    """The head (or other body part) of a subject.

    It is what the mask labels, where its scheme has a head or brain; else the foreground of the image is added.

    Args:
        mask: (D, H, W), values of the scheme; the foreground label is not added yet.
        image: on the same grid; None: the mask alone says.
        labels: the scheme.
    """
    inside = mask > 0
    if image is None or (outer_label(labels) is not None and labels.foreground_label is None):
        return inside
    return inside | (foreground(image) if labels.foreground_label is None else image > image.min())


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
