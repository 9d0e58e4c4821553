"""Does this device compute what the CPU computes in float32?"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_ddpm.benchmark.device import describe_gpu, device_name, exact_fp32, time_calls
from hpc_ddpm.benchmark.gpu_check.setup import (
    LAYOUTS,
    OFFLOADED,
    PRESETS,
    Row,
    Setup,
    check,
    milliseconds,
    relative_error,
)
from hpc_ddpm.benchmark.step import PlainStep, random_network, synthetic_batch
from hpc_ddpm.config import Config, SamplingConfig
from hpc_ddpm.data.dataset import Batch
from hpc_ddpm.data.loader import copy_ahead
from hpc_ddpm.device import KNOWN_BAD_CUDNN
from hpc_ddpm.diffusion.noise import NoiseSource
from hpc_ddpm.diffusion.samplers import SAMPLERS, sample
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.model.norm import GroupNormSiLU
from hpc_ddpm.model.planner import DTYPES, FRAMEWORK_BYTES, GIB, POLICIES, Planner

BANDS = {
    "conv": 1e-2,
    "fp32 output": 1e-4,
    "fp32 gradient": 1e-3,
    "bf16 output": 5e-2,
    "bf16 gradient": 2e-1,
    "fp32 sample": 1e-3,
    "bf16 sample": 1e-1,
    "same arithmetic": 1e-4,
    "loss": 2e-2,
}
"""Largest relative (Euclidean) difference that passes; see docs/benchmarks/gpu_check.md."""


def environment(setup: Setup) -> Iterator[Row]:
    """What this device is, and whether its cuDNN is one that computes bf16 conv3d wrongly."""
    cudnn = torch.backends.cudnn.version() if setup.device.type == "cuda" else None
    facts = describe_gpu(setup.device) or {"cores": os.cpu_count()}
    is_known_bad = cudnn is not None and cudnn in KNOWN_BAD_CUDNN
    yield {"name": device_name(setup.device), "torch": torch.__version__, **facts, "is_ok": not is_known_bad}


def network(setup: Setup) -> Iterator[Row]:
    """Output and parameter gradients of both presets' networks, beside the CPU's in float32."""
    for preset in PRESETS:
        config = setup.small(preset)
        expected = _output_and_gradients(random_network(config), config, torch.device("cpu"))
        for precision in ("fp32", "bf16"):
            for layout in LAYOUTS:
                chosen = setup.small(preset, f"model.channels_last={layout == 'channels_last'}")
                candidate = random_network(chosen).to(setup.device, DTYPES[precision])
                with exact_fp32():
                    found = _output_and_gradients(candidate, config, setup.device)
                for what, mine, theirs in zip(("output", "gradient"), found, expected, strict=True):
                    name = f"{precision} {what}"
                    yield check(name, relative_error(mine, theirs), BANDS[name], preset=preset, layout=layout)


def _output_and_gradients(
    network: nn.Module, config: Config, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    volume, condition = synthetic_batch(config, device, 1)
    output = network(volume, condition, torch.tensor([config.diffusion.num_timesteps // 3], device=device))
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [output.detach()], gradients


def samplers(setup: Setup) -> Iterator[Row]:
    """Every sampler, from the same noise, beside the CPU in float32."""
    config = setup.small("whole_head_128", "diffusion.prediction_type=v")
    reference = random_network(config).eval()
    candidates = {precision: copy.deepcopy(reference).to(setup.device, DTYPES[precision]) for precision in DTYPES_USED}
    for sampler in SAMPLERS:
        expected = _sampled(reference, config, sampler, torch.device("cpu"))
        for precision, candidate in candidates.items():
            with exact_fp32():
                found = _sampled(candidate, config, sampler, setup.device)
            band = BANDS[f"{precision} sample"]
            yield check(f"{sampler}, 5 steps", relative_error(found, expected), band, precision=precision)


DTYPES_USED = ("fp32", "bf16")


def _sampled(network: nn.Module, config: Config, sampler: str, device: torch.device) -> Tensor:
    """The noise is the CPU's on every device: a device's own stream is another one."""
    noise = NoiseSource([config.seed])

    def on_device(shape: Sequence[int]) -> Tensor:
        return noise(shape).to(device)

    _, condition = synthetic_batch(config, device, 1)
    shape = (1, config.data.num_modalities, *config.data.spatial_shape)
    settings = SamplingConfig(sampler=sampler, num_steps=5)  # type: ignore[arg-type]
    schedule = build_schedule(config.diffusion)
    return sample(network, condition, on_device(shape), schedule, "v", settings, noise=on_device)


def checkpointing(setup: Setup) -> Iterator[Row]:
    """Each activation-checkpointing policy gives the gradients of `none`; `block` with them on the host too."""
    variants = {policy: (f"model.activation_checkpointing={policy}",) for policy in POLICIES} | {"offloaded": OFFLOADED}
    for preset in PRESETS:
        for precision in DTYPES_USED:
            expected: list[Tensor] = []
            for variant, overrides in variants.items():
                config = setup.small(preset, *overrides)
                candidate = random_network(config).to(setup.device, DTYPES[precision])
                with exact_fp32():
                    _, found = _output_and_gradients(candidate, config, setup.device)
                expected = expected or found
                band = BANDS["same arithmetic"] if precision == "fp32" else BANDS["conv"]
                yield check(variant, relative_error(found, expected), band, preset=preset, precision=precision)


def layers(setup: Setup) -> Iterator[Row]:
    """Trilinear upsampling and GroupNorm+SiLU in both layouts: the layout kept, the CPU's values, the time."""
    channels, side = (64, 64) if setup.is_full else (8, 8)
    norm = GroupNormSiLU(channels // 2, channels)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "trilinear x2": partial(F.interpolate, scale_factor=2.0, mode="trilinear"),
        "GroupNorm+SiLU": norm,
    }
    for name, function in functions.items():
        sides = [side if name.startswith("trilinear") else 2 * side] * 3
        values = torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        norm.to("cpu", torch.float32)
        expected = _forward_backward(function, values)
        norm.to(setup.device, torch.bfloat16)
        for layout, memory_format in LAYOUTS.items():
            x = values.to(setup.device, torch.bfloat16).contiguous(memory_format=memory_format)
            output, gradient = _forward_backward(function, x)
            keeps = output.is_contiguous(memory_format=memory_format)
            facts = {"layout": layout, "keeps_layout": keeps, "forward_ms": None, "both_ms": None}
            with torch.no_grad():
                facts["forward_ms"] = milliseconds(_timed(partial(function, x), setup))["ms"]
            facts["both_ms"] = milliseconds(_timed(partial(_forward_backward, function, x), setup))["ms"]
            error = relative_error([output, gradient], expected)
            yield check(name, error, BANDS["conv"], **facts)


def _timed(call: Callable[[], object], setup: Setup) -> list[float]:
    return time_calls(call, setup.device, budget_s=setup.budget_s / 3)


def _forward_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and the gradient of x for an upstream gradient of ones."""
    x = x.detach().requires_grad_()
    output = function(x)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return [output.detach(), gradient]


def zero1(setup: Setup) -> Iterator[Row]:
    """Real ZeRO-1 steps under DeepSpeed beside the plain steps, and the memory beside the planner's."""
    from hpc_ddpm.diffusion.gaussian import draw_training, training_loss
    from hpc_ddpm.training.engine import Engine

    config = setup.preset("whole_head_128", "training.zero_stage=1", "training.learning_rate=1e-4")
    precision, is_gpu = "bf16", setup.device.type == "cuda"
    plain = PlainStep(config, setup.device, precision)
    expected = [float(plain()) for _ in range(4)]
    x_start, condition = plain.batch
    del plain
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
    ranks = detect_ranks({})
    with process_group(ranks) as device:
        if is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        engine = Engine(config, ranks, device)
        schedule = build_schedule(config.diffusion).to(device)
        found: list[float] = []

        def step() -> None:
            draw = draw_training(config.seed, [len(found)], x_start.shape[1:], config.diffusion, device)
            off_value = config.data.labels.off_value
            loss = training_loss(engine.deepspeed, x_start, condition, draw, schedule, config.diffusion, off_value)
            engine.backward(loss.mean())
            engine.step(config.training.learning_rate)
            engine.ema.update()
            found.append(float(loss.detach()))

        times = time_calls(step, device, budget_s=setup.budget_s, warm_up=3)
        peak = torch.cuda.max_memory_allocated(device) / GIB if is_gpu else None
        engine.close()
    planner = Planner(config, 1, precision, setup.device.type)
    predicted = (planner.plan("none", 1).total - FRAMEWORK_BYTES) / GIB
    error = max(abs(mine - theirs) / theirs for mine, theirs in zip(found, expected, strict=False))
    memory = {"peak_gib": peak, "predicted_gib": predicted, "ratio": predicted / peak if peak else None}
    yield check("ZeRO-1 step, losses beside plain steps", error, BANDS["loss"], **milliseconds(times), **memory)


def data_path(setup: Setup) -> Iterator[Row]:
    """`copy_ahead`: batches arrive whole although their buffers are filled again, and the copy hides in the work."""
    shape = (4, 144, 192, 192) if setup.is_full else (1, 8, 8, 8)
    is_gpu, count = setup.device.type == "cuda", 12

    def batches() -> Iterator[Batch]:
        image = torch.empty(1, *shape, dtype=torch.int16, pin_memory=is_gpu)
        mask = torch.empty(1, *shape[1:], dtype=torch.uint8, pin_memory=is_gpu)
        for number in range(count):
            image.fill_(number)
            mask.fill_(number)
            yield {"image": image, "mask": mask, "index": torch.tensor([number])}

    side = 8192 if is_gpu else 64
    work = torch.randn(side, side, device=setup.device, dtype=torch.bfloat16)
    wrong = torch.zeros((), device=setup.device)

    def compute() -> None:
        for _ in range(10):
            torch.mm(work, work)

    def alone() -> None:
        for _ in range(count):
            compute()

    def both() -> None:
        for number, batch in enumerate(copy_ahead(batches(), setup.device)):
            compute()
            wrong.add_((batch["image"] != number).sum() + (batch["mask"] != number).sum())

    alone_s, both_s = (min(time_calls(call, setup.device, least=3, most=3)) for call in (alone, both))
    facts = {"work_ms_per_batch": 1e3 * alone_s / count, "with_copies_ms_per_batch": 1e3 * both_s / count}
    yield check("wrong voxels", float(wrong), 0.0, **facts)
