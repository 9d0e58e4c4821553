"""Starting from trained weights, with other labels or modalities, and with some of the weights frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from hpc_ddpm.config import Config, DataConfig, flatten_config
from hpc_ddpm.errors import CheckpointError, ConfigError
from hpc_ddpm.model.covariates import feature_names
from hpc_ddpm.model.initial import initial_tensors
from hpc_ddpm.model.unet3d import build_unet
from hpc_ddpm.weights import find_run_weights, read_weights

EMBEDDING = "covariate_embed."
INPUT, FEATURES = "input_blocks.0.0.weight", f"{EMBEDDING}0.weight"
CHANNEL_AXES = {INPUT: 1, FEATURES: 1, "out.2.weight": 0, "out.2.bias": 0}
"""Tensors that have an axis of modalities (the first also of labels) or of covariates' features, and which it is."""
SHAPELESS = (
    "model.num_groups",
    "model.head_channels",
    "model.time_max_period",
    "diffusion.schedule",
    "diffusion.num_timesteps",
    "diffusion.prediction_type",
)
"""Settings that change what a network computes, or what its answers mean, and no tensor's shape."""


@dataclass(frozen=True)
class Start:
    """Weights to start from, and what became of those that were found."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]


def start_from(config: Config, checkpoint: Path | None = None) -> Start:
    """The weights of `training.init_from` for the network of `config`.

    Modalities and labels are matched by name; where none is known and there are as many as before, in their order. A
    new one starts at zero: the network begins as the old one, and learns to see and to draw it. So do new covariates.

    Args:
        config: of the new run.
        checkpoint: a verified one, where `training.init_from` is a run; None looks for the newest.

    Raises:
        CheckpointError: no weights there, or their network or diffusion differs in more than modalities and labels.
    """
    source = Path(config.training.init_from)
    if source.suffix in {".pt", ".pth"}:
        raise CheckpointError(
            f"{source} has no configuration in it; import it first: hpc-ddpm weights import {source} --preset NAME"
        )
    weights = find_run_weights(source, checkpoint=checkpoint) if checkpoint else read_weights(source)
    old, new = weights.config.data, config.data
    _check_meaning(source, weights.config, config)
    _check_scales(source, old, new)
    images, labels = _match(new.modalities, old.modalities), _match(_labels(new), _labels(old))
    inputs = [*images, *(None if index is None else old.num_modalities + index for index in labels)]
    features = _places(feature_names(new.covariates), feature_names(old.covariates))
    is_added = bool(new.covariates) and not old.covariates
    state = {**weights.state_dict, **(_new_embedding(config) if is_added else {})}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build_unet(config).state_dict().items()}
    tensors, adapted = {}, []
    for name, shape in expected.items():
        found = state.get(name)
        if found is not None and name in CHANNEL_AXES and not (is_added and name == FEATURES):
            places = {INPUT: inputs, FEATURES: features}.get(name, images)
            if places != list(range(found.shape[CHANNEL_AXES[name]])):
                found = _adapt(found.float(), CHANNEL_AXES[name], places)
                adapted.append(name)
        if found is None or found.shape != shape:
            there = "absent" if found is None else list(found.shape)
            raise CheckpointError(
                f"training.init_from={source}: '{name}' is {there} there, {list(shape)} in this network; "
                f"only data.* may differ, set model.* as in {source / 'config.json'}"
            )
        tensors[name] = found.float()
    num_new = sum(name not in weights.state_dict for name in tensors)
    report = {
        "init_from": str(source),
        "kept_tensors": len(tensors) - len(adapted) - num_new,
        "adapted_tensors": adapted,
        "modalities": _describe(new.modalities, old.modalities, images),
        "labels": _describe(_labels(new), _labels(old), labels),
        "covariates": _describe([*new.covariates], [*old.covariates], _places([*new.covariates], [*old.covariates])),
    }
    return Start(tensors, report)


def start_line(report: dict[str, Any]) -> str:
    """The report of a start, or of what is frozen, as one line."""
    parts = []
    if "init_from" in report:
        channels = [
            f"{kind} {what} {', '.join(report[kind][what])}"
            for kind in ("modalities", "labels", "covariates")
            for what in ("kept", "new", "dropped")
            if report[kind][what]
        ]
        parts.append(
            f"started from {report['init_from']}: {report['kept_tensors']} tensors kept, "
            f"{len(report['adapted_tensors'])} adapted; {'; '.join(channels)}"
        )
    if report["frozen_parameters"]:
        parts.append(f"frozen: {report['frozen_parameters']:,} of {report['parameters']:,} parameters")
    return "; ".join(parts)


def freeze(network: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Take every parameter out of training that a pattern (`*`, `?`, `[...]`) names, itself or a module it is in.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        matched = {name for name in names if any(fnmatchcase(part, pattern) for part in _with_parents(name))}
        if not matched:
            there = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise ConfigError(
                f"training.freeze: '{pattern}' matches no parameter; modules are {there}, such as {names[0]}"
            )
        for name, parameter in network.named_parameters():
            if name in matched:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"training.freeze={list(patterns)} leaves nothing to train; freeze less")


def _with_parents(name: str) -> list[str]:
    """`a.b.c` -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _labels(data: DataConfig) -> tuple[str, ...]:
    return tuple(data.labels.names.values())


def _match(new: Sequence[str], old: Sequence[str]) -> list[int | None]:
    """For every new name, where it was before."""
    if not set(new) & set(old) and len(new) == len(old):
        return list(range(len(old)))
    return _places(new, old)


def _places(new: Sequence[str], old: Sequence[str]) -> list[int | None]:
    return [old.index(name) if name in old else None for name in new]


def _check_meaning(source: Path, old: Config, new: Config) -> None:
    before, after = flatten_config(old), flatten_config(new)
    differing = [key for key in SHAPELESS if before[key] != after[key]]
    if differing:
        shown = "; ".join(f"{key} {before[key]} -> {after[key]}" for key in differing)
        raise CheckpointError(
            f"training.init_from={source} would compute something else with other settings: {shown}; keep those it was "
            "trained with, or train without --from"
        )


def _check_scales(source: Path, old: DataConfig, new: DataConfig) -> None:
    for name in set(old.covariates) & set(new.covariates):
        before, after = old.covariates[name], new.covariates[name]
        if (before.mean, before.std) != (after.mean, after.std) and not before.values and not after.values:
            raise CheckpointError(
                f"training.init_from={source} knows {name} by mean {before.mean:g} and std {before.std:g}, "
                f"data.covariates says {after.mean:g} and {after.std:g}; keep those of the old network"
            )


def _new_embedding(config: Config) -> dict[str, torch.Tensor]:
    """Embedding of covariates for weights that had none; as in a new network, it adds nothing at first."""
    return {name: tensor for name, tensor in initial_tensors(config) if name.startswith(EMBEDDING)}


def _adapt(tensor: torch.Tensor, axis: int, places: Sequence[int | None]) -> torch.Tensor:
    """The tensor with these channels of its old ones along an axis; zero where there is none."""
    shape = list(tensor.shape)
    shape[axis] = len(places)
    result = torch.zeros(shape)
    for index, place in enumerate(places):
        if place is not None:
            result.select(axis, index).copy_(tensor.select(axis, place))
    return result


def _describe(new: Sequence[str], old: Sequence[str], places: Sequence[int | None]) -> dict[str, list[str]]:
    pairs = list(zip(new, places, strict=True))
    kept = [name if name == old[place] else f"{name} (was {old[place]})" for name, place in pairs if place is not None]
    dropped = [name for index, name in enumerate(old) if index not in places]
    return {"kept": kept, "new": [name for name, place in pairs if place is None], "dropped": dropped}
