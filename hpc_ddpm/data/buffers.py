"""Memory for volumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """As `torch.empty`; on a CPU in NumPy's memory, which asks for huge pages: filling it takes less time."""
    if device is not None and device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    array = np.empty(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(array).view(dtype).view(*shape)
