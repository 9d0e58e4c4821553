"""The planner's counts against PyTorch's counter, a formula of our own, and the allocator of a real step."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpc_ddpm.config import Config, TrainingConfig, load_config
from hpc_ddpm.device import has_onednn
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model import build_unet
from hpc_ddpm.model.attention import AttentionBlock, TokenLinear
from hpc_ddpm.model.planner import GIB, POLICIES, MemoryPlan, Planner, plan_states, with_policy
from hpc_ddpm.model.trace import example_batch, example_loss, trace_forward, trace_step
from launch.measure import measure_step

SMALL = ["model.base_channels=16", "model.num_groups=8"]
CONFIGS = {
    "whole_head_128": load_config("whole_head_128").config,
    "brats_192": load_config("brats_192").config,
    "heads": load_config("heart_mri", [*SMALL, "model.attention_factors=[1,4]", "model.head_channels=8"]).config,
}


@functools.cache
def planned(preset: str) -> Planner:
    """Each policy is traced once for all tests."""
    return Planner(CONFIGS[preset], 1, "bf16")


def analytic_flops(config: Config) -> tuple[int, int]:
    """Forward, and forward with backward: 2 per multiply-add of every convolution, linear layer and attention."""
    with torch.device("meta"):
        network = build_unet(config)
    first = network.input_blocks[0][0], network.time_embed[0]  # their inputs need no gradient
    forward = total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal forward, total
        if isinstance(module, AttentionBlock):
            B, channels, *sides = output.shape
            products, factor = 4 * B * channels * math.prod(sides) ** 2, 3
        elif isinstance(module, TokenLinear | nn.Linear):
            products, factor = 2 * inputs[0].numel() * module.weight.shape[0], 3
        elif isinstance(module, nn.Conv3d):
            products, factor = 2 * output.numel() * module.weight[0].numel(), 3
        else:
            return
        forward += products
        total += products * (factor - (module in first))

    for module in network.modules():
        module.register_forward_hook(count)
    x_start, _, condition, timesteps = example_batch(config, config.data.training_shape, torch.device("meta"))
    network(x_start, condition, timesteps)
    return forward, total


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_layers_and_of_pytorchs_counter(name: str) -> None:
    config, trace = CONFIGS[name], planned(name).trace("none")
    assert (trace.forward_flops, trace.flops) == analytic_flops(config)
    with torch.device("meta"):
        network = build_unet(config)
    with FlopCounterMode(display=False) as counter:
        example_loss(network, example_batch(config, config.data.training_shape, torch.device("meta"))).backward()
    assert counter.get_total_flops() == trace.flops
    assert trace_forward(config, torch.bfloat16).flops == trace.forward_flops


@pytest.mark.parametrize(("preset", "forward", "step"), [("whole_head_128", 5.54, 16.59), ("brats_192", 21.26, 63.63)])
def test_flops_of_the_presets(preset: str, forward: float, step: float) -> None:
    trace = planned(preset).trace("none")
    assert trace.forward_flops / 1e12 == pytest.approx(forward, abs=0.005)
    assert trace.flops / 1e12 == pytest.approx(step, abs=0.005)


@pytest.mark.parametrize("name", ["brats_192", "heads"])
def test_each_policy_keeps_less_and_peaks_lower_and_computes_no_less(name: str) -> None:
    traces = [planned(name).trace(policy) for policy in POLICIES]
    for less, more in itertools.pairwise(traces):
        assert less.saved_bytes > more.saved_bytes
        assert less.peak_bytes > more.peak_bytes
        assert less.flops <= more.flops


@pytest.mark.parametrize("policy", ["block", "full"])
def test_what_is_offloaded_is_on_the_host_and_not_on_the_gpu(policy: str) -> None:
    def plan(place: str) -> MemoryPlan:
        settings = [f"model.activation_checkpointing={policy}", f"model.offload_activations={place}"]
        return Planner(load_config("whole_head_128", settings).config, 1, "bf16").plan(policy, 2)

    here, there = plan("none"), plan("cpu")
    assert here.host == 0
    assert there.host >= here.saved - there.saved > 0.25 * here.saved
    assert there.total < here.total
    assert there.trace.flops == here.trace.flops


@pytest.mark.parametrize(("preset", "limit"), [("whole_head_128", 7), ("brats_192", 3)])
def test_what_cannot_be_indexed_is_refused(preset: str, limit: int) -> None:
    Planner(load_config(preset, [f"training.micro_batch={limit}"]).config, 1, "bf16").check_indexing()
    too_many = load_config(preset, [f"training.micro_batch={limit + 1}"]).config
    with pytest.raises(ConfigError, match=rf"micro_batch={limit + 1} makes .*set training.micro_batch={limit} or less"):
        Planner(too_many, 1, "bf16").check_indexing()


def test_auto_recomputes_the_least_that_fits() -> None:
    planner = planned("brats_192")
    totals = {policy: planner.plan(policy, 1).total for policy in POLICIES}
    for policy, total in totals.items():
        assert planner.choose_policy(int(total / 0.9) + 2).policy == policy
    with pytest.raises(ConfigError, match=r"micro_batch=1 needs 14\.\d GiB .* 'full', 8\.0 GiB are free"):
        planner.choose_policy(8 * GIB)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    planner = planned("brats_192")
    budget = 50 * GIB
    most = planner.largest_micro_batch("norm", budget)
    assert most == 2
    assert planner.plan("norm", most).total <= 0.9 * budget < planner.plan("norm", most + 1).total
    assert planner.largest_micro_batch("none", 4 * GIB) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_masters_moments_and_ema(stage: int) -> None:
    training = TrainingConfig(zero_stage=stage)
    alone, four = (plan_states(1_000_000, training, ranks, "bf16") for ranks in (1, 4))
    assert (alone.masters, alone.moments, alone.ema) == (4_000_000, 8_000_000, 4_000_000)
    assert (four.masters, four.moments, four.ema) == (1_000_000, 2_000_000, 1_000_000)


OFFLOADS = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "weights", "gradients", "host"),
    [  # bytes per parameter on one rank of two, counted in DeepSpeed 0.19.8
        (1, "bf16", OFFLOADS[0], 2, 4 + 2, 2 + 4 + 2 + 2 + 1),
        (1, "fp32", OFFLOADS[0], 4, 4, 2 + 4 + 2 + 2 + 2),
        (2, "bf16", OFFLOADS[0], 2, 2, 2 + 4 + 2 + 2 + 1),
        (3, "bf16", OFFLOADS[0], 1 + 1, 0, 2 + 4 + 2 + 2 + 2),
        (3, "bf16", OFFLOADS[1], 0 + 1, 0, 2 + 4 + 2 + 2 + 2 + 1),
    ],
)
def test_offloaded_states_are_on_the_host(
    stage: int, precision: str, offload: dict, weights: int, gradients: int, host: int
) -> None:
    training = TrainingConfig(zero_stage=stage, reduce_bucket_size=1, max_live_parameters=500_000, **offload)
    states = plan_states(1_000_000, training, 2, precision)
    assert (states.masters, states.moments, states.ema, states.optimizer_step) == (0, 0, 0, 0)
    assert (states.weights, states.gradients, states.host) == (weights * 10**6, gradients * 10**6 + 8, host * 10**6)
    without = training.model_copy(update={"offload_optimizer": "none", "offload_parameters": "none"})
    at_home = plan_states(1_000_000, without, 2, precision, "cpu")
    assert at_home == plan_states(1_000_000, training, 2, precision, "cpu")
    assert at_home.host == 0


def test_auto_counts_what_training_offloads() -> None:
    settings = [
        *SMALL,
        "model.channel_multipliers=[1,8]",
        "model.attention_factors=[]",
        "training.zero_stage=3",
        "data.size=[8,8,8]",
    ]
    offload = [f"training.{key}={value}" for key, value in OFFLOADS[1].items()]
    here, there = (
        Planner(load_config("whole_head_128", [*settings, *more]).config, 1, "bf16") for more in ([], offload)
    )
    plan = there.plan("none", 1)
    budget = int(plan.total / 0.9) + 2
    assert plan.host == there.states.host > 0
    assert there.choose_policy(budget).policy == "none"
    with pytest.raises(ConfigError, match="GiB are free"):
        here.choose_policy(budget)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said where oneDNN is switched off
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "depth"),
    [
        (["data.size=[32,32,32]"], 32),
        (["data.size=[48,48,32]", "model.num_res_blocks=2", "data.modalities=[t1,t2]"], 48),
        (["data.size=[32,32,32]", "model.channels_last=true", "model.attention_factors=[8]"], 32),
    ],
    ids=["whole_head", "brats", "channels_last"],
)
def test_predicted_peaks_are_within_15_percent_of_the_allocators(
    settings: list[str], depth: int, dtype: torch.dtype, policy: str
) -> None:
    """Where bf16 is emulated, a step of these sizes takes a minute: there, the network and the volumes are tiny."""
    is_emulated = dtype == torch.bfloat16 and not has_onednn(dtype)
    size = f"data.size=[{depth // 2},12,12]" if is_emulated else settings[0]
    tiny = ["model.base_channels=8", "model.num_groups=4", "model.channel_multipliers=[1,2]"] if is_emulated else []
    factors = ["model.attention_factors=[2]"] if is_emulated and "channels_last" in str(settings) else []
    config = with_policy(load_config(None, [*SMALL, *settings, *tiny, *factors, size]).config, policy)
    trace = trace_step(config, dtype, "cpu")
    copies = trace.workspace_bytes if dtype == torch.bfloat16 else 0  # fp32 ones are not PyTorch's
    with torch.backends.mkldnn.flags(enabled=not is_emulated):
        measured = measure_step(config, dtype, torch.device("cpu"))
    assert trace.peak_bytes + copies == pytest.approx(measured, rel=0.15)
