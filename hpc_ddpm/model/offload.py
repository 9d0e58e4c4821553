"""Saved activations in host memory until backward needs them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16
"""Elements; what is smaller stays: a transfer would cost more than the memory is worth."""
Saved = tuple[torch.device | None, Tensor]
"""Where a tensor was, and its copy in host memory; None and the tensor itself where it stayed."""


def saved_on_host() -> saved_tensors_hooks:
    """Context in which what autograd saves goes from a GPU to page-locked host memory, and comes back in backward.

    Like `torch.autograd.graph.save_on_cpu(pin_memory=True)`, but it keeps the memory format, and leaves small tensors
    and those of the CPU where they are. Copies are queued like kernels; the host does not wait for them.
    """
    return saved_tensors_hooks(_pack, _unpack)


def _pack(x: Tensor) -> Saved:
    if _stays(x):
        return None, x
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return x.device, host.copy_(x, non_blocking=True)


def _unpack(saved: Saved) -> Tensor:
    device, tensor = saved
    return tensor if device is None else torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _stays(x: Tensor) -> bool:
    return x.is_cpu or x.numel() < SMALLEST
