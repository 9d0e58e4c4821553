"""How fast is this device, and what fits? Every figure for one GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hpc_ddpm.benchmark.device import device_name, exact_fp32, measure_ceilings, synchronize, time_calls
from hpc_ddpm.benchmark.gpu_check.correctness import BANDS
from hpc_ddpm.benchmark.gpu_check.setup import (
    LAYOUTS,
    OFFLOADED,
    Row,
    Setup,
    attempt,
    check,
    milliseconds,
    relative_error,
)
from hpc_ddpm.benchmark.step import PlainStep, random_network, synthetic_batch
from hpc_ddpm.benchmark.timing import spread
from hpc_ddpm.config import Config, SamplingConfig
from hpc_ddpm.diffusion.gaussian import Model
from hpc_ddpm.diffusion.noise import NoiseSource
from hpc_ddpm.diffusion.samplers import sample
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.host import free_memory
from hpc_ddpm.model.gpus import peak_flops
from hpc_ddpm.model.planner import GIB, POLICIES
from hpc_ddpm.model.trace import trace_forward

EVALUATIONS = 20


def ceilings(setup: Setup) -> Iterator[Row]:
    """Matrix product and copy, as far as this device goes; the peak of its data sheet beside them."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with exact_fp32():
            found = measure_ceilings(setup.device, dtype, budget_s=setup.budget_s / 3)
        peak = peak_flops(device_name(setup.device), name)
        yield {
            "name": name,
            "matmul_tflops": found["matmul_flops"] / 1e12,
            "data_sheet_tflops": peak and peak / 1e12,
            "copy_gb_per_s": found["copy_bytes_per_s"] / 1e9,
        }


def conv3d(setup: Setup) -> Iterator[Row]:
    """The convolution that most FLOPs are in, bf16, beside float32 on the same device: error, rate, kernel."""
    channels, side = (64, 128) if setup.is_full else (8, 16)
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, channels, *[side] * 3, generator=random).bfloat16().to(setup.device) for _ in range(2))
    weight = (torch.randn(channels, channels, 3, 3, 3, generator=random) / (27 * channels) ** 0.5).bfloat16()
    weight = weight.to(setup.device)
    tflop = 2 * 27 * channels**2 * side**3 / 1e12
    with exact_fp32():
        expected = {name: call() for name, call in _passes(x.float(), weight.float(), grad.float()).items()}
    for (layout, memory_format), is_searched in itertools.product(LAYOUTS.items(), (False, True)):
        torch.backends.cudnn.benchmark = is_searched
        inputs = (x.contiguous(memory_format=memory_format), weight, grad.contiguous(memory_format=memory_format))
        for name, call in _passes(*inputs).items():
            times = milliseconds(time_calls(call, setup.device, budget_s=setup.budget_s / 5))
            facts = {"layout": layout, "cudnn_benchmark": is_searched, **times, "tflops": tflop / times["ms"] * 1e3}
            facts["kernels"] = kernel_names(call, setup.device)
            yield check(name, relative_error(call(), expected[name]), BANDS["conv"], **facts)


def _passes(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Callable[[], Tensor]]:
    def backward(which: int) -> Tensor:
        mask = [position == which for position in range(3)]
        three = [1] * 3
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, three, three, three, False, [0] * 3, 1, mask)
        result: Tensor = found[which]
        return result

    return {
        "forward": partial(F.conv3d, x, weight, padding=1),
        "input gradient": partial(backward, 0),
        "weight gradient": partial(backward, 1),
    }


def kernel_names(call: Callable[[], object], device: torch.device, most: int = 3) -> list[str]:
    """The kernels (on a CPU: the operations) in which a call spends its time, longest first; none without a tracer."""
    is_gpu = device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as run:
            call()
            synchronize(device)
    except RuntimeError:
        return []
    events = [event for event in run.key_averages() if _self_time(event, is_gpu) > 0]
    events.sort(key=lambda event: -_self_time(event, is_gpu))
    return [event.key[:120] for event in events[:most]]


def conv_kernels(config: Config, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those of a 3x3x3 convolution at full resolution, forward and backward: most of the network's FLOPs."""
    memory_format = LAYOUTS["channels_last" if config.model.channels_last else "contiguous"]
    channels = config.model.base_channels

    def call() -> None:
        layer = torch.nn.Conv3d(channels, channels, 3, padding=1, device=device, dtype=dtype)
        x = torch.zeros(1, channels, *config.data.training_shape, device=device, dtype=dtype, requires_grad=True)
        layer(x.contiguous(memory_format=memory_format)).sum().backward()

    return kernel_names(call, device)


def _self_time(event: Any, is_gpu: bool) -> float:
    return float(event.self_device_time_total if is_gpu else event.self_cpu_time_total)


# ------------------------------------------------------------------------------------------ training steps


def steps(setup: Setup, preset: str) -> Iterator[Row]:
    """bf16 with every checkpointing policy, and offloaded; float32 with the first that fits; then variants."""
    rows = []
    for policy in POLICIES:
        rows.append(_step_row(setup, preset, "bf16", policy))
        yield rows[-1]
    yield _step_row(setup, preset, "bf16", "block", is_offloaded=True)
    fastest = min(rows, key=lambda row: row.get("ms", float("inf")))["policy"]
    yield _step_row(setup, preset, "bf16", fastest, layout="channels_last")
    yield _step_row(setup, preset, "bf16", fastest, micro_batch=2)
    try:
        fitting = setup.planner(preset, "fp32").choose_policy(_free(setup.device)).policy
    except ConfigError:
        fitting = "full"
    with exact_fp32():
        yield _step_row(setup, preset, "fp32", fitting)
    for layout in LAYOUTS:
        yield _step_row(setup, preset, "bf16", fastest, layout=layout, is_searched=True)


def compiled_steps(setup: Setup, preset: str) -> Iterator[Row]:
    """torch.compile with the policy that recomputes least and fits, in both layouts."""
    policy = setup.planner(preset, "bf16").choose_policy(_free(setup.device)).policy
    for layout in setup.compiled_layouts:
        yield _step_row(setup, preset, "bf16", policy, layout=layout, backend=_backend(setup.device))


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _backend(device: torch.device) -> str:
    """On a CPU only the capture is tried: its code generator would need a compiler and a minute."""
    return "inductor" if device.type == "cuda" else "eager"


def _step_row(
    setup: Setup,
    preset: str,
    precision: str,
    policy: str,
    *,
    layout: str = "contiguous",
    micro_batch: int = 1,
    is_searched: bool = False,
    is_offloaded: bool = False,
    backend: str | None = None,
) -> Row:
    offload = OFFLOADED if is_offloaded else ()
    overrides = [f"model.activation_checkpointing={policy}", f"model.channels_last={layout == 'channels_last'}"]
    overrides += [*offload, f"training.micro_batch={micro_batch}", f"training.global_batch={micro_batch}"]
    config, device = setup.preset(preset, *overrides), setup.device

    def measure() -> Row:
        torch.backends.cudnn.benchmark = is_searched
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = PlainStep(config, device, precision, backend)
        times = time_calls(step, device, budget_s=setup.budget_s, warm_up=setup.warm_up, least=3, most=20)
        volumes_per_s = micro_batch / spread(times)["median"]
        planner = setup.planner(preset, precision, *offload)
        peak = peak_flops(device_name(device), precision)
        model_flops, run_flops = (volumes_per_s * planner.trace(each).flops for each in ("none", policy))
        plan = planner.plan(policy, micro_batch)
        return {
            **milliseconds(times),
            "volumes_per_s": volumes_per_s,
            "model_tflops": model_flops / 1e12,
            "mfu": peak and model_flops / peak,
            "hfu": peak and run_flops / peak,
            **_memory_of(step, device, plan.saved + plan.temporary + plan.workspace),
        }

    facts = {
        "name": f"{preset} training step",
        "precision": precision,
        "policy": policy,
        "offloaded": is_offloaded,
        "layout": layout,
        "micro_batch": micro_batch,
        "cudnn_benchmark": is_searched,
        "compiled": backend,
    }
    return attempt(facts, measure)


def _memory_of(step: PlainStep, device: torch.device, predicted: int) -> Row:
    """Peak of one more forward and backward beyond what is held, beside the planner's; the whole peak too."""
    if device.type != "cuda":
        return {"peak_gib": None, "activations_gib": None, "predicted_gib": predicted / GIB}
    whole = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step.loss().backward()
    gradients = sum(weight.nbytes for weight in step.optimizer.weights)
    activations = torch.cuda.max_memory_allocated(device) - before - gradients
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "peak_gib": whole / GIB,
        "reserved_gib": reserved / GIB,
        "activations_gib": activations / GIB,
        "predicted_gib": predicted / GIB,
        "predicted_over_measured": predicted / activations,
    }


# ------------------------------------------------------------------------------------------------ sampling


def sampling(setup: Setup, preset: str) -> Iterator[Row]:
    """DPM-Solver++(2M) in 20 evaluations, bf16: as it is, in the other layout, and replayed as a CUDA graph."""
    for layout in LAYOUTS:
        yield _sampling_row(setup, preset, layout, "eager", lambda network, inputs: network)
    if setup.device.type == "cuda":
        yield _sampling_row(setup, preset, "contiguous", "CUDA graph", CudaGraph)
    else:
        yield {"name": f"{preset} sampling", "mode": "CUDA graph", "error": "needs CUDA"}


def compiled_sampling(setup: Setup, preset: str) -> Iterator[Row]:
    """The same with torch.compile."""

    def compiled(network: Model, inputs: tuple[Tensor, ...]) -> Model:
        return torch.compile(network, backend=_backend(setup.device), dynamic=False)

    for layout in setup.compiled_layouts:
        yield _sampling_row(setup, preset, layout, f"compiled ({_backend(setup.device)})", compiled)


class CudaGraph:
    """The network recorded once and replayed: no launch by the host."""

    def __init__(self, network: Model, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                network(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = network(*self._inputs)

    def __call__(self, x_t: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """The network's output, valid after the next replay too."""
        for mine, theirs in zip(self._inputs, (x_t, condition, timesteps), strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        return self._output.clone()


def _sampling_row(
    setup: Setup, preset: str, layout: str, mode: str, wrap: Callable[[Model, tuple[Tensor, ...]], Model]
) -> Row:
    config, device = setup.preset(preset, f"model.channels_last={layout == 'channels_last'}"), setup.device
    settings = SamplingConfig(sampler="dpmpp_2m", num_steps=EVALUATIONS)

    @torch.no_grad()
    def measure() -> Row:
        network = random_network(config).to(device, torch.bfloat16).eval()
        _, condition = synthetic_batch(config, device, 1)
        x = NoiseSource([0], device)((1, config.data.num_modalities, *config.data.spatial_shape))
        timesteps = torch.zeros(1, dtype=torch.long, device=device)
        model = wrap(network, (x, condition, timesteps))
        schedule = build_schedule(config.diffusion)
        target = config.diffusion.prediction_type

        def volume(model: Model = model) -> Tensor:
            return sample(model, condition, x, schedule, target, settings, noise=NoiseSource([1], device))

        error = relative_error(volume(), volume(network))
        times = time_calls(volume, device, budget_s=setup.budget_s, warm_up=1, least=3, most=20)
        volumes_per_s = 1 / spread(times)["median"]
        peak = peak_flops(device_name(device), "bf16")
        flops = EVALUATIONS * trace_forward(config, torch.bfloat16, device.type).flops * volumes_per_s
        return {
            **milliseconds(times),
            "ms_per_evaluation": 1e3 / volumes_per_s / EVALUATIONS,
            "volumes_per_s": volumes_per_s,
            "model_tflops": flops / 1e12,
            "mfu": peak and flops / peak,
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None,
            "difference_from_eager": error,
            "is_ok": error <= BANDS["bf16 sample"],
        }

    return attempt({"name": f"{preset} sampling", "layout": layout, "mode": mode}, measure)
