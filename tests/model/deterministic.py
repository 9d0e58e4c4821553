"""Weights and inputs as exact formulas of their index, so that stored figures need no stored tensors."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def uniform(shape: Sequence[int], stream: int) -> Tensor:
    """float32 in [-1, 1) with 24 bits, from an integer hash of the flat index."""
    z = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(stream << 40)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        z = (z ^ (z >> np.uint64(33))) * np.uint64(factor)
    z ^= z >> np.uint64(33)
    return torch.from_numpy(((z >> np.uint64(40)) / 2.0**23 - 1).astype(np.float32).reshape(tuple(shape)))


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Every tensor from its place in the state dict; matrices scaled by fan-in, norm weights about one."""
    for index, (key, tensor) in enumerate(network.state_dict().items()):
        values = uniform(tensor.shape, index + 1)
        if tensor.dim() > 1:
            values *= math.sqrt(3 / tensor[0].numel())
        else:
            values *= 0.2
            if key.endswith("weight"):
                values += 1
        tensor.copy_(values)


def inputs(num_modalities: int, num_labels: int, size: Sequence[int], timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, condition, timesteps) of one volume."""
    x_t = 1.7 * uniform((1, num_modalities, *size), 1000)
    condition = (uniform((1, num_labels, *size), 1001) > 0).float()
    return x_t, condition, torch.tensor([timestep])
