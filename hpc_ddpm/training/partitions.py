"""Which part of which fp32 tensor this rank owns, at every ZeRO stage, in one form.

The optimizer, the EMA and the checkpoint all work on these fragments, so none of them knows about stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of parameter `name`, from `start` of its flat view, at `offset` of an optimizer tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: int
    """Index into `Partition.flats`."""
    offset: int


class Partition:
    """This rank's fp32 master tensors (`flats`) and the parameters' fragments in them.

    At stages 1 to 3 every element belongs to exactly one rank; at stage 0 all ranks hold everything and rank 0
    counts as the owner (`owned`).
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        names = {id(param): name for name, param in engine.module.named_parameters()}
        stage = engine.zero_optimization_stage()
        self.owned = stage > 0 or engine.global_rank == 0
        self._refresh: Callable[[], None]
        # DeepSpeed keeps the fp32 masters in another class at each stage and precision. Attributes tell them apart.
        if stage == 3:
            self.flats, found = _stage3(engine.optimizer, names)
            self._refresh = partial(_refresh_stage3, engine.optimizer)
        elif hasattr(engine.optimizer, "bf16_groups"):
            self._refresh = engine.optimizer.update_lp_params
            self.flats = engine.optimizer.fp32_groups_flat_partition
            found = _mapped(engine.optimizer.bf16_groups, names)
        elif hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
            self._refresh = engine.optimizer.update_lp_params
            self.flats = engine.optimizer.single_partition_of_fp32_groups
            found = _mapped(engine.optimizer.bit16_groups, names)
        else:
            self.flats, found = _stage0(engine, names)
            self._refresh = partial(_refresh_stage0, engine.optimizer)
        self.fragments: list[Fragment] = list(found)

    def view(self, tensors: list[torch.Tensor], fragment: Fragment) -> torch.Tensor:
        """The fragment's elements in a list of tensors laid out like `flats`; a 1-D view."""
        return tensors[fragment.flat].detach().view(-1).narrow(0, fragment.offset, fragment.numel)

    def clone(self) -> list[torch.Tensor]:
        """Copies of the flats, for an average over time."""
        return [flat.detach().clone() for flat in self.flats]

    @torch.no_grad()
    def exchange(self, tensors: list[torch.Tensor]) -> None:
        """Swap the masters with tensors laid out like `flats`, and round them into the network; a collective."""
        for flat, other in zip(self.flats, tensors, strict=True):
            kept = flat.detach().clone()
            flat.copy_(other)
            other.copy_(kept)
        self._refresh()

    def state(self, key: str) -> list[torch.Tensor]:
        """An optimizer moment (`exp_avg`, `exp_avg_sq`), laid out like `flats`."""
        return [self.optimizer.state[flat][key] for flat in self.flats]

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken; fp16 overflows skip some."""
        return int(self.optimizer.state[self.flats[0]]["step"])

    def reset_state(self, step: int = 0) -> None:
        """Zero moments and this step count, whatever DeepSpeed's initialisation left behind."""
        for flat in self.flats:
            fresh = {"step": torch.tensor(float(step), device=flat.device)}
            self.optimizer.state[flat] = fresh | {key: torch.zeros_like(flat.detach()) for key in STATE_KEYS}


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter of the network, sharded by ZeRO-3 or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_part(parameter: torch.nn.Parameter, rank: int) -> tuple[torch.Tensor, int]:
    """Flat view of what this rank holds of a parameter of the network, and where it starts in the whole.

    That is all of it, or its ZeRO-3 shard.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach().view(-1), 0
    start = shard.numel() * rank
    numel = max(0, min(shard.numel(), parameter.ds_numel - start))  # type: ignore[attr-defined]  # the rest is padding
    return shard.detach().view(-1)[:numel], start


def _mapped(groups: list[list[Any]], names: dict[int, str]) -> Iterator[Fragment]:
    """Fragments at stages 1 and 2, and of the bf16 optimizer.

    DeepSpeed flattens a group of parameters, divides it evenly among the ranks, and so may cut a parameter in two. It
    links each parameter to its part on this rank by `_hp_mapping`, which is None if this rank owns nothing of it.
    """
    for index, group in enumerate(groups):
        for param in group:
            mapping = param._hp_mapping
            if mapping is not None:
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(names[id(param)], tuple(param.shape), part.start, part.numel, index, place.start)


def _stage3(optimizer: Any, names: dict[int, str]) -> tuple[list[torch.Tensor], Iterator[Fragment]]:
    """Masters and fragments at stage 3, where each parameter by itself is padded and divided evenly among all ranks."""

    def fragments() -> Iterator[Fragment]:
        for group in optimizer.fp16_groups:
            for param in group:
                index, offset, length = optimizer.grad_position[optimizer.get_param_id(param)]
                start = length * torch.distributed.get_rank()
                numel = min(length, math.prod(param.ds_shape) - start)  # the last rank's part may be padding
                if numel > 0:
                    yield Fragment(names[id(param)], tuple(param.ds_shape), start, numel, index, offset)

    return optimizer.fp32_partitioned_groups_flat, fragments()


def _stage0(engine: Any, names: dict[int, str]) -> tuple[list[torch.Tensor], Iterator[Fragment]]:
    """Masters and fragments at stage 0: one whole tensor per parameter, the same on every rank."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):  # half precision: fp32 copies beside the network's parameters
        pairs = [
            pair
            for groups in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for pair in zip(*groups, strict=True)
        ]
    else:
        pairs = [(param, param) for group in wrapper.param_groups for param in group["params"]]
    fragments = (
        Fragment(names[id(param)], tuple(param.shape), 0, param.numel(), index, 0)
        for index, (param, _) in enumerate(pairs)
    )
    return [master for _, master in pairs], fragments


def _refresh_stage3(optimizer: Any) -> None:
    """Do what ends DeepSpeed's step: copy masters into shards, and gather the small parameters, which stay whole."""
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _refresh_stage0(wrapper: Any) -> None:
    """Copy masters into the network's half precision parameters; in fp32 both are the same tensors."""
    if hasattr(wrapper, "fp32_groups"):
        for halves, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                half.copy_(master)
