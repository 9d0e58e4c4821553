"""The least time that a network's arithmetic and memory traffic can take on a device with known ceilings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hpc_ddpm.benchmark.device import Ceilings
from hpc_ddpm.config import Config
from hpc_ddpm.model.planner import with_policy
from hpc_ddpm.model.trace import example_loss
from hpc_ddpm.model.unet3d import build_unet


@dataclass(frozen=True)
class Operation:
    """One convolution or matrix product, forward or backward."""

    flops: int
    num_bytes: int
    """Every operand read once, every result written once."""


def list_operations(config: Config, dtype: torch.dtype, *, backward: bool) -> list[Operation]:
    """The operations of one volume, as PyTorch dispatches them for a GPU; nothing is recomputed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            network = build_unet(with_policy(config, "none"))
    finally:
        torch.set_default_dtype(before)
    data = config.data
    shape = data.training_shape if backward else data.spatial_shape
    channels = (data.num_modalities, data.num_modalities, data.num_labels)
    x_start, noise, condition = (torch.zeros(1, count, *shape, device="meta") for count in channels)
    batch = (x_start, noise, condition, torch.zeros(1, dtype=torch.long, device="meta"))
    with _Operations() as seen, torch.set_grad_enabled(backward):
        loss = example_loss(network, batch)
        if backward:
            loss.backward()
    return seen.operations


def fused_floor_s(operations: Iterable[Operation], ceilings: Ceilings) -> float:
    """Seconds, if each operation ran at the ceiling that binds it and all else were fused into these operations."""
    flops, copy = ceilings["matmul_flops"], ceilings["copy_bytes_per_s"]
    return sum(max(each.flops / flops, each.num_bytes / copy) for each in operations)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            tensors = (value for value in tree_iter((args, kwargs, out)) if isinstance(value, Tensor))
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
            self.operations.append(Operation(flops, sum(tensor.nbytes for tensor in tensors)))
        return out
