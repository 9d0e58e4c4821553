"""One real training step on this device: the most memory its tensors take, beside what the planner says."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hpc_ddpm.config import Config
from hpc_ddpm.device import resolve_precision
from hpc_ddpm.model.planner import DTYPES, GIB, POLICIES, with_policy
from hpc_ddpm.model.trace import example_batch, example_loss, release_gradients, trace_step
from hpc_ddpm.model.unet3d import build_unet


def measure_policies(config: Config, device: torch.device) -> dict[str, dict[str, Any]]:
    """Policy -> predicted and measured GiB of one volume's forward and backward, without weights and gradients."""
    dtype = DTYPES[resolve_precision(config.training.precision, device, config.training_depths)]
    rows = {}
    for policy in POLICIES:
        chosen = with_policy(config, policy)
        predicted, measured = trace_step(chosen, dtype, device.type).peak_bytes, measure_step(chosen, dtype, device)
        rows[policy] = {
            "predicted_gib": predicted / GIB,
            "measured_gib": measured / GIB,
            "ratio": predicted / measured,
        }
    return rows


def measure_step(config: Config, dtype: torch.dtype, device: torch.device) -> int:
    """Peak bytes that PyTorch's allocator hands out in one step of one volume, beyond the weights."""
    network = build_unet(config).train().to(device, dtype)
    release_gradients(network)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        example_loss(network, example_batch(config, config.data.training_shape, device)).backward()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        example_loss(network, example_batch(config, config.data.training_shape, device)).backward()
    return _peak(run)


def _peak(run: profile) -> int:
    """The highest sum of the CPU allocator's events."""
    assert run.profiler is not None and run.profiler.kineto_results is not None
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak
