"""`hpc-ddpm estimate`: the planner's numbers as facts, and how they are printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hpc_ddpm.config import Config, list_presets, load_config
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.gpus import Gpu, find_gpu
from hpc_ddpm.model.planner import (
    DTYPES,
    FRAMEWORK_BYTES,
    GIB,
    POLICIES,
    USABLE,
    Planner,
    fixed_policy,
    plan_states,
)
from hpc_ddpm.model.trace import trace_forward
from launch.data_tables import print_json

SHARE_OF_PEAK = (0.15, 0.40)
"""Assumed share of the GPU's peak that a run reaches, pessimistic and optimistic: not measured."""


def estimate(config: Config, gpu: Gpu, world_size: int) -> dict[str, Any]:
    """All figures: sizes in GiB, times in hours, FLOPs in TFLOP.

    Raises:
        ConfigError: `training.global_batch` is not a multiple of micro batch x ranks.
    """
    config.training.accumulation(world_size)
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16" if gpu.has_bf16 else "fp32"
    planner = Planner(config, world_size, precision)
    budget = int(gpu.memory_gib * GIB)
    fits = {policy: planner.largest_micro_batch(policy, budget) for policy in POLICIES}
    micro_batch, policy = config.training.micro_batch, fixed_policy(config)
    plan = planner.plan(policy, micro_batch)
    checkpoint_gib = planner.parameters * 4 * (3 + len(config.training.ema_names)) / GIB  # masters, moments, averages
    return {
        "config": config.name,
        "precision": precision,
        "parameters": planner.parameters,
        "tflop_per_volume": {
            "forward": planner.trace("none").forward_flops / 1e12,
            "forward_backward": planner.trace("none").flops / 1e12,
            **{f"with_{name}": planner.trace(name).flops / 1e12 for name in POLICIES[1:]},
        },
        "policy": policy,
        "micro_batch": micro_batch,
        "memory_gib": {name: size / GIB for name, size in plan.parts().items()} | {"peak": plan.total / GIB},
        "host_gib": plan.host / GIB,
        "peak_gib_by_policy": {name: planner.plan(name, micro_batch).total / GIB for name in POLICIES},
        "largest_micro_batch": fits,
        "suggestion": _suggest(fits, config, world_size),
        "zero": _zero(planner, config, world_size, precision),
        "run": _run(planner, config, gpu, world_size, policy, precision),
        "disk_gib": {
            "checkpoint": checkpoint_gib,
            "kept_and_one_being_written": checkpoint_gib * (config.training.keep_checkpoints + 1),
        },
        "sampling": _sampling(planner, config, precision),
    }


def peak_gib(config: Config, world_size: int) -> float:
    """Memory of one rank at the peak of a training step, on a GPU that computes in bf16."""
    precision = "bf16" if config.training.precision == "auto" else config.training.precision
    planner = Planner(config, world_size, precision)
    return planner.plan(fixed_policy(config), config.training.micro_batch).total / GIB


def _suggest(fits: dict[str, int], config: Config, world_size: int) -> dict[str, Any] | None:
    """The least recompute that fits, and the largest micro batch with it that divides the work of a rank."""
    per_rank = max(1, config.training.global_batch // world_size)
    for policy, most in fits.items():
        if most:
            batch = max(size for size in range(1, min(most, per_rank) + 1) if per_rank % size == 0)
            return {"activation_checkpointing": policy, "micro_batch": batch}
    return None


def _zero(planner: Planner, config: Config, world_size: int, precision: str) -> dict[str, Any]:
    """What each ZeRO stage holds for the states, beside what the volumes take."""
    sizes = {}
    for stage in range(4):
        training = config.training.model_copy(update={"zero_stage": stage})
        states = plan_states(planner.parameters, training, world_size, precision)
        sizes[f"stage_{stage}"] = (
            states.weights + states.masters + states.moments + states.ema + states.gradients
        ) / GIB
    plan = planner.plan(fixed_policy(config), config.training.micro_batch)
    return {"states_gib": sizes, "volumes_gib": (plan.saved + plan.temporary + plan.workspace) / GIB}


def _run(
    planner: Planner, config: Config, gpu: Gpu, world_size: int, policy: str, precision: str
) -> dict[str, Any] | None:
    """Time from an assumed share of the GPU's peak."""
    peak = gpu.fp32_tflops if precision == "fp32" else gpu.half_tflops
    if not peak:
        return None
    training = config.training
    volumes_per_s = [share * peak * 1e12 / planner.trace(policy).flops for share in SHARE_OF_PEAK]
    volumes = training.num_steps * training.global_batch
    return {
        "steps": training.num_steps,
        "volumes": volumes,
        "assumed_share_of_peak": SHARE_OF_PEAK,
        "volumes_per_s_per_gpu": volumes_per_s,
        "gpu_hours": [volumes / rate / 3600 for rate in reversed(volumes_per_s)],
        "hours": [volumes / rate / 3600 / world_size for rate in reversed(volumes_per_s)],
    }


def _sampling(planner: Planner, config: Config, precision: str) -> dict[str, Any]:
    forward = trace_forward(config, DTYPES[precision])
    width, batch = (4 if precision == "fp32" else 2), config.sampling.batch_size
    memory = FRAMEWORK_BYTES + planner.parameters * width + batch * (forward.peak_bytes + forward.workspace_bytes)
    passes = config.sampling.num_steps * (2 if config.sampling.guidance_scale != 1 else 1)
    return {"batch_size": batch, "memory_gib": memory / GIB, "tflop_per_volume": passes * forward.flops / 1e12}


# ------------------------------------------------------------------------------------------------ printing


def estimate_command(
    source: str | None, overrides: Sequence[str], gpu_name: str, world_size: int, *, measure: bool, as_json: bool
) -> None:
    """Compute and print."""
    if source is None or "=" in source:
        raise ConfigError(
            f"no configuration: give a preset or a YAML file first, for example `hpc-ddpm estimate whole_head_128`; "
            f"presets: {', '.join(list_presets())}"
        )
    config = load_config(source, overrides).config
    facts: dict[str, Any] = {"gpu": gpu_name, "gpus": world_size, **estimate(config, find_gpu(gpu_name), world_size)}
    if measure:
        from hpc_ddpm.device import local_device
        from hpc_ddpm.distributed import Ranks
        from launch.measure import measure_policies

        facts["measured"] = measure_policies(config, local_device(Ranks()))
    if as_json:
        print_json(facts)
    else:
        _print(facts, find_gpu(gpu_name))


def _print(facts: dict[str, Any], gpu: Gpu) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    flops = facts["tflop_per_volume"]
    console.print(
        f"[bold]{facts['config']}[/]: {facts['parameters'] / 1e6:.1f} M parameters, {facts['precision']}, "
        f"{facts['gpus']} x {facts['gpu']} ({gpu.memory_gib:g} GiB)\n"
        f"per volume: {flops['forward']:.2f} TFLOP forward, {flops['forward_backward']:.2f} with backward\n"
    )
    _print_policies(console, facts)
    _print_parts(console, facts)
    _print_words(console, facts)


def _print_policies(console: Console, facts: dict[str, Any]) -> None:
    table = _table(
        "checkpointing", "TFLOP run", f"peak GiB at micro batch {facts['micro_batch']}", "largest micro batch"
    )
    for policy, peak in facts["peak_gib_by_policy"].items():
        flops = facts["tflop_per_volume"]
        run = flops["forward_backward"] if policy == "none" else flops[f"with_{policy}"]
        most = facts["largest_micro_batch"][policy]
        mark = "  <- configured" if policy == facts["policy"] else ""
        table.add_row(f"{policy}{mark}", f"{run:.2f}", f"{peak:.2f}", str(most) if most else "does not fit")
    console.print(table, "")


def _print_parts(console: Console, facts: dict[str, Any]) -> None:
    table = _table("memory of one rank", "GiB")
    for name, size in facts["memory_gib"].items():
        table.add_row(name.replace("_", " "), f"{size:.3f}", style="bold" if name == "peak" else None)
    console.print(table, "")
    if facts["host_gib"]:
        console.print(f"offloaded by one rank: {facts['host_gib']:.3f} GiB of host memory\n")
    if "measured" in facts:
        table = _table("tensors of one volume's step", "predicted GiB", "measured GiB", "ratio")
        for policy, row in facts["measured"].items():
            table.add_row(policy, *(f"{row[key]:.3f}" for key in ("predicted_gib", "measured_gib", "ratio")))
        console.print(table, "")


def _print_words(console: Console, facts: dict[str, Any]) -> None:
    suggestion, zero, run, sampling = (facts[key] for key in ("suggestion", "zero", "run", "sampling"))
    if suggestion:
        console.print(
            f"suggested: model.activation_checkpointing={suggestion['activation_checkpointing']} "
            f"training.micro_batch={suggestion['micro_batch']} ({USABLE:.0%} of the memory at most)"
        )
    else:
        console.print("[bold red]nothing fits[/]: use a larger GPU, a smaller data.size or fewer base_channels")
    states = zero["states_gib"]
    saves = states["stage_0"] - min(states.values())
    console.print(
        f"ZeRO: weights, gradients and optimizer take {', '.join(f'{size:.2f}' for size in states.values())} GiB at "
        f"stages 0, 1, 2, 3; volumes take {zero['volumes_gib']:.2f} GiB and no stage reduces them: at best ZeRO saves "
        f"{max(0.0, saves):.2f} GiB here"
    )
    if run:
        low, high = run["assumed_share_of_peak"]
        console.print(
            f"time (an estimate, assuming {low:.0%} to {high:.0%} of the GPU's peak): "
            f"{_range(run['volumes_per_s_per_gpu'])} volumes/s/GPU; "
            f"{run['steps']:,} steps = {run['volumes']:,} volumes: "
            f"{_range(run['gpu_hours'])} GPU-hours, {_range(run['hours'])} hours"
        )
    disk = facts["disk_gib"]
    console.print(
        f"checkpoint: {disk['checkpoint']:.2f} GiB each; {disk['kept_and_one_being_written']:.2f} GiB of disk for "
        "those kept and one being written\n"
        f"sampling: {sampling['memory_gib']:.2f} GiB at batch {sampling['batch_size']}, "
        f"{sampling['tflop_per_volume']:.1f} TFLOP per volume"
    )


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in values)


def _table(*headers: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    return table
