"""The network under DeepSpeed, its EMA, and its state in and out of checkpoints."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.checkpoint import MANIFEST, Piece, PieceReader, agree_on_latest, read_manifest
from hpc_ddpm.config import Config, TrainingConfig
from hpc_ddpm.device import resolve_precision
from hpc_ddpm.diffusion.gaussian import Model
from hpc_ddpm.distributed import Ranks, all_or_none
from hpc_ddpm.errors import CheckpointError
from hpc_ddpm.model.initial import initial_tensors
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.training.deepspeed_config import deepspeed_config, resolved_config
from hpc_ddpm.training.ema import Ema
from hpc_ddpm.training.finetune import Start, freeze, start_from
from hpc_ddpm.training.partitions import STATE_KEYS, Partition, own_part, whole_shape

SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
AS_STARTED = "resume with the configuration the run was started with"

Tensors = Iterable[tuple[str, tuple[int, ...], Callable[[int, int], torch.Tensor]]]
"""Name and shape of parameters, each with a function that reads elements `start .. start + numel` of it, flat."""


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
    """The network under DeepSpeed, with its EMA; everything a checkpoint needs, in and out.

    It starts at `checkpoint`, written at any world size and stage, or else at `training.init_from`, or at weights that
    follow from the seed.

    Raises:
        CheckpointError: the checkpoint, or what it starts from, is of another network or lacks a tensor.
        ConfigError: `training.freeze` names nothing, or everything.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, checkpoint: Path | None = None) -> None:
        training = config.training
        self.ranks = ranks
        self.training = training
        self.precision = resolve_precision(training.precision, device, config.training_depths)
        if ranks.is_main and device.type == "cuda" and (training.precision, self.precision) == ("auto", "fp32"):
            warnings.warn("precision=auto is fp32 here: bf16 needs an Ampere GPU and cuDNN 9.15", stacklevel=2)
        self.settings = deepspeed_config(training, ranks.world_size, self.precision)
        deepspeed = import_deepspeed(device)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes up the group that is there
        reader = None if checkpoint is None else PieceReader(checkpoint)
        start = _start(config, ranks) if reader is None and training.init_from else None
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # at stage 3 no rank ever holds the whole network
            sharded = deepspeed.zero.Init(config_dict_or_path=self.settings, enabled=training.zero_stage == 3)
            with sharded:
                network = build_unet(config).train()
            if reader is not None:
                _fill(network, _stored(reader), ranks.rank)
            else:
                _fill(network, _whole(start.tensors.items() if start else initial_tensors(config)), ranks.rank)
            freeze(network, training.freeze)
            kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
            parameters = [param for param in network.parameters() if param.requires_grad]
            # lr 0: should DeepSpeed take a step of its own to create the state, it must not move anything
            optimizer = kind(parameters, lr=0.0, betas=training.betas, weight_decay=training.weight_decay, fused=True)
            if training.zero_stage < 3:
                network = network.to(device)
            self.deepspeed, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=self.settings, dist_init_required=False
            )
        if training.compile and device.type == "cuda":
            self.deepspeed.compile(compile_kwargs={"dynamic": False})
        self._stage0_norm: torch.Tensor | None = None  # DeepSpeed computes none there without clipping
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # `has_failed` tells
        self.partition = Partition(self.deepspeed)
        self._frozen = {name: param for name, param in network.named_parameters() if not param.requires_grad}
        self.start_report = {
            **(start.report if start else {}),
            "parameters": sum(math.prod(whole_shape(param)) for param in network.parameters()),
            "frozen_parameters": sum(math.prod(whole_shape(param)) for param in self._frozen.values()),
        }
        self.partition.reset_state()
        self.ema = Ema(self.partition, training)
        if reader is not None:
            self._read(reader, read_manifest(reader.folder))

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """`settings` as DeepSpeed understood them."""
        return resolved_config(self.settings, self.deepspeed._config)

    def backward(self, loss: torch.Tensor) -> None:
        """One micro step; scaled by the accumulation, reduced over ranks at its end.

        A loss that is not finite makes every gradient NaN, here and with the reduction on all ranks.
        """
        self.deepspeed.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))

    def step(self, learning_rate: float) -> None:
        """After a micro step: at the end of the accumulation, one optimizer step.

        Where the global gradient norm is not finite, no rank takes it and nothing moves. DeepSpeed sees to that,
        except in fp32 at stage 0: there it is told that the accumulation goes on, with its gradients gone.
        """
        for group in self.partition.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.training.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
            gradients = [param.grad for param in self.deepspeed.module.parameters() if param.grad is not None]
            self._stage0_norm = torch.nn.utils.get_total_norm(gradients)
            if self.precision == "fp32" and not math.isfinite(self._stage0_norm):
                self.deepspeed.zero_grad()
                self.deepspeed.set_gradient_accumulation_boundary(False)
        self.deepspeed.step()
        self.deepspeed._is_gradient_accumulation_boundary = None  # again by the count of micro steps

    @property
    def has_stepped(self) -> bool:
        """Whether the last step moved the weights; the same on all ranks."""
        return bool(self.deepspeed.was_step_applied())

    @property
    def has_failed(self) -> bool:
        """Whether the last step was skipped and fp16's search for a loss scale does not explain it."""
        return not self.has_stepped and not (self._scaler and self._scaler.cur_scale > self._scaler.min_scale)

    @contextlib.contextmanager
    def averaged(self, name: str = "ema") -> Iterator[Model]:
        """Context in which the network holds one of its averages, in eval mode and without gradients; a collective.

        All ranks evaluate it equally often, as ZeRO-3 gathers the weights anew each time. Afterwards every weight is
        bitwise what it was.
        """
        average = self.ema.averages[name]
        self.partition.exchange(average)
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield self.deepspeed
        finally:
            self.deepspeed.train()
            self.partition.exchange(average)

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients before clipping."""
        norm = self._stage0_norm if self.training.zero_stage == 0 else self.deepspeed.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and what DeepSpeed would keep after the engine's end."""
        self.deepspeed.destroy()
        if self.training.zero_stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()
            for part in (self.deepspeed.optimizer, self.deepspeed):  # autograd's hooks hold both for good
                vars(part).clear()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of this engine's state, besides its tensors."""
        return {
            "optimizer_step": self.partition.num_steps,
            "ema_updates": self.ema.num_updates,
            "loss_scaler": {key: getattr(self._scaler, key) for key in SCALER_KEYS} if self._scaler else None,
            "precision": self.precision,
            "weights": ["master", *self.ema.averages],
            "zero_stage": self.training.zero_stage,
            "world_size": self.ranks.world_size,
        }

    def pieces(self) -> list[Piece]:
        """What this rank owns of weights, moments and averages; views into the live tensors."""
        if not self.partition.owned:
            return []
        return [*self._frozen_pieces(), *self._trained_pieces()]

    def _trained_pieces(self) -> Iterator[Piece]:
        return (
            Piece(kind, fragment.name, fragment.shape, fragment.start, self.partition.view(tensors, fragment))
            for kind, tensors in self._tensors().items()
            for fragment in self.partition.fragments
        )

    def _frozen_pieces(self) -> Iterator[Piece]:
        """Pieces of frozen weights and their averages, which are equal; whole on rank 0, or each rank's shard."""
        is_sharded = self.training.zero_stage == 3
        for name, parameter in self._frozen.items() if is_sharded or self.ranks.is_main else ():
            part, start = own_part(parameter, self.ranks.rank)
            for kind in ("master", *self.ema.averages):
                if part.numel():
                    yield Piece(kind, name, whole_shape(parameter), start, part.float())

    @property
    def _scaler(self) -> Any:
        """The object that holds the loss scale of fp16; without fp16, None."""
        if self.precision != "fp16":
            return None
        return self.deepspeed.optimizer.loss_scaler

    def _tensors(self) -> dict[str, list[torch.Tensor]]:
        """All that is saved, by kind, each laid out like the partition's flats."""
        moments = {key: self.partition.state(key) for key in STATE_KEYS}
        return {"master": self.partition.flats, **self.ema.averages, **moments}

    def _read(self, reader: PieceReader, facts: dict[str, Any]) -> None:
        """Load masters, moments and averages; `_fill` has loaded the network's (possibly half precision) weights."""
        if missing := [name for name in ("optimizer_step", "ema_updates") if name not in facts]:
            raise CheckpointError(f"{reader.folder}: its {MANIFEST} has no {missing[0]}; remove this checkpoint")
        self.partition.reset_state(step=facts["optimizer_step"])
        self.ema.num_updates = facts["ema_updates"]
        if self._scaler is not None:
            for key, value in facts["loss_scaler"].items():
                setattr(self._scaler, key, value)
        for kind, tensors in self._tensors().items():
            for fragment in self.partition.fragments:
                values = reader.read(kind, fragment.name, fragment.start, fragment.numel)
                self.partition.view(tensors, fragment).copy_(values)


def _start(config: Config, ranks: Ranks) -> Start:
    """Start from a run that may still train: all ranks take the checkpoint that one of them has verified."""
    newest = agree_on_latest(Path(config.training.init_from) / "checkpoints", ranks)
    return all_or_none(partial(start_from, config, newest))


def _whole(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    for name, tensor in tensors:
        yield name, tuple(tensor.shape), partial(tensor.flatten().narrow, 0)


def _stored(reader: PieceReader) -> Tensors:
    for name, shape in reader.shapes.items():
        yield name, shape, partial(reader.read, "master", name)


def _fill(network: torch.nn.Module, tensors: Tensors, rank: int) -> None:
    """Give this rank's part of the network's parameters its values."""
    parameters = dict(network.named_parameters())
    for name, shape, read in tensors:
        expected = whole_shape(parameters[name]) if name in parameters else "absent"
        if shape != expected:
            raise CheckpointError(f"the checkpoint's '{name}' is {shape}, in this network {expected}; {AS_STARTED}")
        part, start = own_part(parameters.pop(name), rank)
        if part.numel():  # a small parameter does not reach the last ranks
            part.copy_(read(start, part.numel()))
    if parameters:
        raise CheckpointError(f"the checkpoint lacks '{next(iter(parameters))}' of this network; {AS_STARTED}")


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine to zero; `step` counts from 0."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
