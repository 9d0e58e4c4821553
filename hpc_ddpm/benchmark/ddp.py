"""The reference beside ZeRO: the same loop, network, data and optimizer through plain DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from hpc_ddpm.benchmark.step import MasterAdam
from hpc_ddpm.checkpoint import Piece
from hpc_ddpm.config import Config
from hpc_ddpm.device import resolve_precision
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.initial import initial_tensors
from hpc_ddpm.model.planner import DTYPES
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.training.ema import Ema
from hpc_ddpm.training.engine import Engine


class DdpEngine(Engine):
    """What the training loop asks of an engine, by DDP with its own defaults; masters, moments and averages are whole.

    In bf16 its gradients are reduced in bf16, half the bytes of ours. It saves nothing.

    Raises:
        ConfigError: fp16, whose loss scaling it has not.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, checkpoint: Path | None = None) -> None:
        self.ranks, self.training = ranks, config.training
        self.precision = resolve_precision(config.training.precision, device, config.training_depths)
        if self.precision == "fp16":
            raise ConfigError("DDP, the reference, has no loss scaling: set training.precision to bf16 or fp32")
        self.settings = {"zero_optimization": "none: DistributedDataParallel"}
        self.start_report: dict[str, Any] = {}
        network = build_unet(config)
        network.load_state_dict(dict(initial_tensors(config)))
        network = network.to(device, DTYPES[self.precision]).train()
        self.optimizer = MasterAdam(network.parameters(), config.training, self.precision)
        self.deepspeed = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
        self.accumulation, self._micro_step = config.training.accumulation(ranks.world_size), 0
        self.ema = Ema(self, config.training)  # type: ignore[arg-type]  # it has `flats` and `clone`, as a partition has
        self._choose_sync()

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """DDP has no others."""
        return self.settings

    @property
    def flats(self) -> list[torch.Tensor]:
        """The fp32 masters."""
        return self.optimizer.masters

    def clone(self) -> list[torch.Tensor]:
        """Copies of the masters, for an average over time."""
        return [master.detach().clone() for master in self.flats]

    def _choose_sync(self) -> None:
        """As `no_sync` does: gradients are reduced in the last micro step only."""
        self.deepspeed.require_backward_grad_sync = self._micro_step == self.accumulation - 1

    def backward(self, loss: torch.Tensor) -> None:
        """One micro step."""
        (loss / self.accumulation).backward()

    def step(self, learning_rate: float) -> None:
        """At the end of the accumulation, one optimizer step."""
        self._micro_step = (self._micro_step + 1) % self.accumulation
        self._choose_sync()
        if self._micro_step:
            return
        for group in self.optimizer.adam.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.deepspeed.zero_grad()

    @property
    def has_stepped(self) -> bool:
        """It knows no bad steps."""
        return True

    @property
    def has_failed(self) -> bool:
        """It knows no bad steps."""
        return False

    def gradient_norm(self) -> float:
        """As clipped; not a number without clipping."""
        return float(self.optimizer.norm)

    def close(self) -> None:
        """Nothing is held."""

    def facts(self) -> dict[str, Any]:
        """Facts for a checkpoint; there are none, because it holds no tensors."""
        return {}

    def pieces(self) -> list[Piece]:
        """None."""
        return []
