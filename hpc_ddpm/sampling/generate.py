"""Volumes from masks. A volume is a function of (weights, mask, covariates, seed, settings), whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from hpc_ddpm.config import Config, SamplingConfig, config_from_dict
from hpc_ddpm.data.covariates import to_numbers
from hpc_ddpm.data.labels import one_hot
from hpc_ddpm.diffusion.noise import NoiseSource
from hpc_ddpm.diffusion.samplers import sample
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.errors import DataFormatError


def generate(
    model: torch.nn.Module,
    mask: ArrayLike | torch.Tensor,
    *,
    seed: int | Sequence[int] = 0,
    covariates: Mapping[str, Any] | Sequence[Mapping[str, Any]] = MappingProxyType({}),
    on_step: Callable[[int, int], None] = lambda done, total: None,
    **settings: object,
) -> torch.Tensor:
    """New volumes for masks.

    Args:
        model: from `load_model`; decides device and precision, and carries its configuration.
        mask: (D, H, W) or (B, D, H, W) integer labels of the model's scheme; D, H, W = Z, Y, X.
        seed: one per mask, or one for the first (the following get seed + 1, ...).
        covariates: values by name, `{"age": 63, "sex": "F"}`, for all masks or one each; what is left out is unknown.
        on_step: called with (steps done, steps in all).
        settings: fields of the sampling section: sampler, num_steps, eta, guidance_scale, clip_x_start.

    Returns:
        (C, D, H, W) or (B, C, D, H, W) float32 in about [-1, 1], on the model's device.

    Raises:
        DataFormatError: labels or covariates that the model does not have, or a shape the network cannot take.
        ConfigError: an unknown sampler or setting.
    """
    config: Config = model.config  # type: ignore[assignment]
    sampling = _merge(config, settings)
    labels = torch.as_tensor(np.asarray(mask) if not isinstance(mask, torch.Tensor) else mask)
    is_single = labels.ndim == 3
    labels = labels[None] if is_single else labels
    _check_labels(labels, config)
    seeds = [seed + i for i in range(len(labels))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(labels):
        raise DataFormatError(f"{len(seeds)} seeds for {len(labels)} mask(s); give one each, or a single integer")
    device = next(model.parameters()).device
    condition = one_hot(labels.to(device=device, dtype=torch.uint8), config.data.labels)
    noise = NoiseSource(seeds, device)
    rows = [covariates] * len(seeds) if isinstance(covariates, Mapping) else covariates
    numbers = torch.tensor([to_numbers(row, config.data.covariates, "generate") for row in rows], device=device)
    with torch.inference_mode():
        volumes = sample(
            model,
            condition,
            noise((len(seeds), config.data.num_modalities, *labels.shape[1:])),
            build_schedule(config.diffusion),
            config.diffusion.prediction_type,
            sampling,
            noise=noise,
            off_value=config.data.labels.off_value,
            covariates=numbers if config.data.covariates else None,
            progress=on_step,
        )
    return volumes[0] if is_single else volumes


def _merge(config: Config, settings: dict[str, object]) -> SamplingConfig:
    tree = config.dump()
    tree["sampling"] |= settings
    return config_from_dict(tree, "generate").sampling


def _check_labels(labels: torch.Tensor, config: Config) -> None:
    if labels.ndim != 4:
        raise DataFormatError(f"a mask must be (D, H, W) or (B, D, H, W) labels, found shape {tuple(labels.shape)}")
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise DataFormatError("the mask has fractional labels; resample label volumes with nearest neighbour")
    names = config.data.labels.names
    unknown = sorted({int(value) for value in labels.unique()} - {0, *names})
    if unknown:
        raise DataFormatError(f"the mask has labels {unknown[:10]}, the model knows 0 and {dict(names)}")
