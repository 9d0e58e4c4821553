"""Looking at volumes roughly: small versions, and how alike two of them are. D H W."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BINS = 24


def shrink(volume: Array, side: int) -> NDArray[np.float32]:
    """Block means, at most `side` voxels along every axis."""
    for axis, length in enumerate(volume.shape):
        starts = np.arange(min(side, length)) * length // min(side, length)
        sums = np.add.reduceat(volume, starts, axis=axis, dtype=np.float32)
        counts = np.diff(starts, append=length).astype(np.float32)
        volume = sums / counts.reshape([-1 if i == axis else 1 for i in range(volume.ndim)])
    return volume


def subsample(volume: Array, side: int) -> Array:
    """Single voxels, at most `side` along every axis: for labels."""
    for axis, length in enumerate(volume.shape):
        count = min(side, length)
        volume = volume.take((np.arange(count) * 2 + 1) * length // (2 * count), axis)
    return volume


def mutual_information(one: Array, other: Array) -> float:
    """Normalised, 0 (unrelated) to 1 (one tells the other), of volumes of one shape.

    (H(A) + H(B)) / H(A, B) - 1, Studholme et al. 1999, equation 8, shifted; does not depend on the contrasts.
    """
    joint = np.histogram2d(one.ravel(), other.ravel(), BINS)[0] / one.size
    both = _entropy(joint)
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / both - 1 if both else 0.0


def mirrored_axis(one: Array, other: Array) -> tuple[int, float, float] | None:
    """The axis along which `other` fits `one` clearly better when mirrored, and both likenesses; else None."""
    plain = mutual_information(one, other)
    mirrored = [mutual_information(one, np.flip(other, axis)) for axis in range(3)]
    axis = int(np.argmax(mirrored))
    if mirrored[axis] < 0.1 or mirrored[axis] < 1.15 * plain:
        return None
    return axis, mirrored[axis], plain


def correlation(one: Array, other: Array) -> float:
    """Pearson's; 0 where one of them is constant."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
