"""Initial weights as a function of (seed, module name), so that no rank needs the whole network to have its part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from hpc_ddpm.config import Config
from hpc_ddpm.model.unet3d import build_unet


def initial_tensors(config: Config) -> Iterator[tuple[str, Tensor]]:
    """Name and initial float32 value of every parameter that `config` describes; one layer is in memory at a time."""
    with torch.device("meta"):
        network = build_unet(config)
    for prefix, layer in network.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        layer.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{config.seed}/{prefix}".encode()).digest()[:4]))
            cast("nn.Linear", layer).reset_parameters()
        for name, parameter in layer.named_parameters(prefix, recurse=False):
            yield name, parameter.detach()
        layer.to_empty(device="meta", recurse=False)
