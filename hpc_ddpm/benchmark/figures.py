"""From seconds per volume to the figures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpc_ddpm.benchmark.device import Ceilings
from hpc_ddpm.benchmark.floor import fused_floor_s, list_operations
from hpc_ddpm.benchmark.record import table
from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config
from hpc_ddpm.model.planner import DTYPES, Planner

NOISY = 0.10
"""Spread (p90 - p10) / median from which on a comparison of single runs means little."""


def warm_up_length(samples: Sequence[float]) -> int:
    """How many samples at the start are slower than the rest: those before the first one that is no slower than the
    90th percentile of the second half. At most half of them."""
    half = len(samples) // 2
    if not half:
        return 0
    limit = spread(list(samples[half:]))["p90"]
    return next((index for index, value in enumerate(samples[:half]) if value <= limit), half)


def verdict(samples: Sequence[float]) -> str:
    """One sentence on what the spread of the samples allows."""
    found = spread(list(samples))
    width = (found["p90"] - found["p10"]) / found["median"]
    if len(samples) < 5:
        return f"{len(samples)} repeats are too few to compare"
    if width > NOISY:
        return f"the middle 80 % of {len(samples)} repeats spread over {width:.0%}: a smaller difference may be noise"
    return f"the middle 80 % of {len(samples)} repeats lie within {width:.1%}"


def make_row(
    what: str,
    config: Config,
    precision: str,
    samples_s: Sequence[float],
    ceilings: Ceilings,
    peak: float | None,
    *,
    excluded: int,
    price: float | None,
    joules_per_volume: float | None,
    policy: str = "none",
    **facts: Any,
) -> dict[str, Any]:
    """All figures of one run.

    Args:
        what: `train` or `sample`.
        config: that ran; its data section gives the shapes.
        precision: bf16, fp16 or fp32.
        samples_s: seconds per volume on one GPU (or CPU rank), one per repeat, warm-up left out.
        ceilings: of this device in this precision.
        peak: FLOP/s on the data sheet; None where unknown, then there is no MFU.
        excluded: repeats left out as warm-up.
        price: of a GPU-hour.
        joules_per_volume: by the GPU's own counter.
        policy: activation checkpointing that ran.
        facts: more columns.
    """
    seconds = spread(list(samples_s))
    per_s = 1 / seconds["median"]
    is_training = what == "train"
    passes = 1 if is_training else config.sampling.num_steps * (2 if config.sampling.guidance_scale != 1 else 1)
    operations = list_operations(config, DTYPES[precision], backward=is_training)
    model_flops = passes * sum(each.flops for each in operations)
    run_flops = Planner(config, 1, precision).trace(policy).flops if is_training else model_flops
    floor_s = passes * fused_floor_s(operations, ceilings)
    shape = config.data.training_shape if is_training else config.data.spatial_shape
    return {
        "what": what,
        "config": config.name,
        "precision": precision,
        "activation_checkpointing": policy if is_training else None,
        "channels_last": config.model.channels_last,
        **facts,
        "samples_s": list(samples_s),
        "warm_up_excluded": excluded,
        "verdict": verdict(samples_s),
        "seconds_per_volume": seconds,
        "volumes_per_s_per_gpu": per_s,
        "voxels_per_s_per_gpu": per_s * math.prod(shape) * config.data.num_modalities,
        "volumes_per_gpu_hour": 3600 * per_s,
        "tflop_per_volume": model_flops / 1e12,
        "flop_per_byte": model_flops / passes / sum(each.num_bytes for each in operations),
        "model_tflops": model_flops * per_s / 1e12,
        "mfu": peak and model_flops * per_s / peak,
        "hfu": peak and run_flops * per_s / peak,
        "of_matmul_ceiling": model_flops * per_s / ceilings["matmul_flops"],
        "of_fused_floor": floor_s * per_s,
        "fused_floor_s": floor_s,
        "ceiling_tflops": ceilings["matmul_flops"] / 1e12,
        "ceiling_gb_per_s": ceilings["copy_bytes_per_s"] / 1e9,
        "energy_j_per_volume": joules_per_volume,
        "cost_per_1000_volumes": price and 1000 * price * seconds["median"] / 3600,
    }


SHARES = {"mfu", "hfu", "of_matmul_ceiling", "of_fused_floor", "data_wait_share"}
SHARES |= {"communication_share", "host_overhead_share"}
DRAWN = {"samples_s", "memory_gib", "step_shares"}
"""Columns that are pictures in the page."""


def figures_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table: one line per figure, one column per run, headed by its name."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in DRAWN]
    lines = [[key.replace("_", " "), *(_cell(key, row.get(key)) for row in rows)] for key in keys]
    return table(["figure", *names], [line for line in lines if any(line[1:])])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return f"{value['median']:.4g} (p10 {value['p10']:.4g}, p90 {value['p90']:.4g})"
    if key in SHARES:
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
