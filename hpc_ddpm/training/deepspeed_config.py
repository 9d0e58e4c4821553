"""DeepSpeed's settings as a pure function of ours, and what DeepSpeed made of them."""

from __future__ import annotations

from typing import Any

from hpc_ddpm.config import TrainingConfig


def deepspeed_config(training: TrainingConfig, world_size: int, precision: str) -> dict[str, Any]:
    """Every value that matters, written out: DeepSpeed's defaults change between versions."""
    half = precision != "fp32"
    stage = training.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": training.reduce_bucket_size,
        "allgather_bucket_size": training.reduce_bucket_size,
        "overlap_comm": training.overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "use_multi_rank_bucket_allreduce": True,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": training.reduce_bucket_size,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": training.max_live_parameters,
            "stage3_max_reuse_distance": training.max_live_parameters,
            "sub_group_size": training.max_live_parameters,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": False,
        }
    if training.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True, "ratio": 1.0}
    if training.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulation(world_size),
        "gradient_clipping": training.gradient_clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": precision if half and stage == 0 else "fp32"},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True, "immediate_grad_update": False},
        "fp16": {
            "enabled": precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def resolved_config(given: dict[str, Any], resolved: Any) -> dict[str, Any]:
    """What DeepSpeed made of `given`: the same keys, with the values in its own configuration object."""
    sections = {
        "bf16": resolved.bfloat16_config,
        "fp16": resolved.float16_config,
        "zero_optimization": resolved.zero_config,
    }
    named = {
        "gradient_accumulation_steps": resolved.gradient_accumulation_steps,
        "communication_data_type": {"torch.float32": "fp32"}[str(resolved.communication_data_type)],
        "data_types": {"grad_accum_dtype": resolved.grad_accum_dtype},
    }
    result = {}
    for key in given:
        if key in sections:
            values = sections[key].model_dump(mode="json", by_alias=True)
            result[key] = {name: _common(given[key][name], values[name]) for name in given[key]}
        else:
            result[key] = named[key] if key in named else getattr(resolved, key)
    return result


def _common(given: Any, resolved: Any) -> Any:
    """The resolved value; of a section, the entries that were given."""
    return {name: resolved[name] for name in given} if isinstance(given, dict) else resolved
