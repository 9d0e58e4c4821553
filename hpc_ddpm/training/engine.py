"""The DeepSpeed engine: its settings as a pure function of ours, and its state in and out of checkpoints."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.checkpoint import Piece, PieceReader, write_pieces
from hpc_ddpm.config import Config, TrainingConfig
from hpc_ddpm.distributed import Ranks, resolve_precision
from hpc_ddpm.errors import CheckpointError
from hpc_ddpm.training.ema import Ema
from hpc_ddpm.training.partitions import STATE_KEYS, Partition


def deepspeed_config(training: TrainingConfig, world_size: int, precision: str) -> dict[str, Any]:
    """Every value that matters, written out: DeepSpeed's defaults change between versions."""
    half = precision != "fp32"
    stage = training.zero_stage
    config: dict[str, Any] = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulation(world_size),
        "gradient_clipping": training.gradient_clip,
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "data_types": {
            "grad_accum_dtype": {"bf16": "bf16", "fp16": "fp16"}[precision] if half and stage == 0 else "fp32"
        },
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": training.reduce_bucket_size,
            "allgather_bucket_size": training.reduce_bucket_size,
            "overlap_comm": training.overlap_comm,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": training.reduce_bucket_size,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "sub_group_size": 10**9,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return config


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this device, quiet: its banner and per-step chatter would drown ours."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's, every step
    # its shared-memory all-reduce for CPUs is compiled at first use, for a minute; gloo serves as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """The network under DeepSpeed, with its EMA; everything a checkpoint needs, in and out."""

    def __init__(self, network: torch.nn.Module, config: Config, ranks: Ranks, device: torch.device) -> None:
        training = config.training
        self.ranks = ranks
        self.training = training
        self.precision = resolve_precision(training.precision, device)
        self.settings = deepspeed_config(training, ranks.world_size, self.precision)
        deepspeed = import_deepspeed(device)
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        parameters = [param for param in network.parameters() if param.requires_grad]
        # lr 0: should DeepSpeed take a step of its own to create the state, it must not move anything
        optimizer = kind(parameters, lr=0.0, betas=training.betas, weight_decay=training.weight_decay)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.deepspeed, *_ = deepspeed.initialize(
                model=network.to(device), optimizer=optimizer, config=self.settings, dist_init_required=False
            )
        self._stage0_norm: torch.Tensor | None = None  # DeepSpeed computes none there without clipping
        self.partition = Partition(self.deepspeed)
        self.partition.reset_state()
        self.ema = Ema(self.partition, training.ema_decay, warmup=training.ema_warmup)

    def backward(self, loss: torch.Tensor) -> None:
        """One micro step; scaled by the accumulation, reduced over ranks at its end."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> None:
        """After a micro step: at the end of the accumulation, one optimizer step."""
        for group in self.partition.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.training.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            gradients = [param.grad for param in self.deepspeed.module.parameters() if param.grad is not None]
            self._stage0_norm = torch.nn.utils.get_total_norm(gradients)
        self.deepspeed.step()

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients before clipping."""
        norm = self._stage0_norm if self.training.zero_stage == 0 else self.deepspeed.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()

    def _tensors(self) -> dict[str, list[torch.Tensor]]:
        """All that is saved, by kind, each laid out like the partition's flats."""
        moments = {key: self.partition.state(key) for key in STATE_KEYS}
        return {"master": self.partition.flats, "ema": self.ema.averages, **moments}

    def write(self, folder: Path) -> list[Path]:
        """This rank's pieces of weights, moments and EMA; the files written."""
        if not self.partition.owned:
            return []
        pieces = (
            Piece(kind, fragment.name, fragment.shape, fragment.start, self.partition.view(tensors, fragment))
            for kind, tensors in self._tensors().items()
            for fragment in self.partition.fragments
        )
        path = folder / f"pieces-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        write_pieces(path, pieces)
        return [path]

    def read(self, reader: PieceReader, facts: dict[str, Any]) -> None:
        """Take over weights, moments and EMA of a checkpoint written at any world size and stage.

        The network's own (possibly bf16) weights must already hold the checkpoint's `master` values.
        """
        self.partition.reset_state(step=facts["optimizer_step"])
        self.ema.num_updates = facts["ema_updates"]
        for fragment in self.partition.fragments:
            if reader.shapes.get(fragment.name) != fragment.shape:
                raise CheckpointError(
                    f"{reader.folder}: '{fragment.name}' is {reader.shapes.get(fragment.name, 'absent')} there but "
                    f"{fragment.shape} in this network; resume with the configuration the run was started with"
                )
            for kind, tensors in self._tensors().items():
                values = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                self.partition.view(tensors, fragment).copy_(values)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine to zero; `step` counts from 0."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
