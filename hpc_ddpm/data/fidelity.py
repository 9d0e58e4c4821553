"""How well a volume follows its mask, without a trained network. C D H W.

Where the label scheme covers the whole brain (`labels.covers_foreground`), the mask is by its definition all that is
above background, so

    fidelity = Dice({some modality > -0.9}, {mask > 0})

The threshold lies 1/20 of the range [-1, 1] above the background, which is exactly -1 in the data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUND_BELOW = -0.9


def background_fidelity(volume: NDArray[np.float32], mask: NDArray[np.uint8]) -> float:
    """See the top of this file.

    Args:
        volume: (C, D, H, W) in about [-1, 1].
        mask: (D, H, W) labels.
    """
    return dice(volume.max(axis=0) > BACKGROUND_BELOW, mask > 0)


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|); 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
