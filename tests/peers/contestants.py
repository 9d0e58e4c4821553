"""What each contestant does in one training step and in one evaluation of its sampling loop, at batch 1.

The network is that of Med-DDPM's whole-head settings, 250 timesteps, its loss (L1 on epsilon) and Adam. MONAI's is the
closest that `DiffusionModelUNet` can be, with the loss and schedule of MONAI's own tutorial.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_ddpm.benchmark.data.med_ddpm import importable
from hpc_ddpm.benchmark.step import synthetic_batch
from hpc_ddpm.config import Config, load_config
from hpc_ddpm.device import keep_freed_memory
from hpc_ddpm.diffusion import NoiseSource, build_schedule, draw_training, sample, training_loss
from hpc_ddpm.distributed import detect_ranks, process_group
from hpc_ddpm.model import build_unet

TIMESTEPS = 250
MULTIPLIERS = (1, 1, 2, 3, 4)
UNUSED = ("torchvision", "PIL", "nibabel", "tqdm", "einops", "torch.utils.tensorboard", "apex")
"""Imported by Med-DDPM's trainer, and in no step of it."""


@dataclass(frozen=True)
class Size:
    """What all share."""

    side: int
    base: int
    device: torch.device
    med_ddpm: Path | None = None

    @property
    def config(self) -> Config:
        """Ours; activations in channels_last on a CPU, as the documentation advises."""
        sizes = [f"model.base_channels={self.base}", f"data.size={[self.side] * 3}", "training.global_batch=1"]
        is_cpu = self.device.type == "cpu"
        return load_config("whole_head_128", [*sizes, f"model.channels_last={is_cpu}"]).config


@dataclass(frozen=True)
class Contestant:
    """Loops that take a number of steps or evaluations, and do them."""

    parameters: int
    run: Callable[[int], None]


Build = Callable[[Size], contextlib.AbstractContextManager[Contestant]]


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _data(size: Size) -> tuple[Tensor, Tensor]:
    return synthetic_batch(size.config, size.device, 1)


def _repeat(step: Callable[[], object]) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            step()

    return run


# ------------------------------------------------------------------------------------------------ Med-DDPM


@contextlib.contextmanager
def med_ddpm(size: Size, *, is_training: bool) -> Iterator[Contestant]:
    """Its network, its loss, its optimizer, its sampling step, from the user's clone; its EMA is left out."""
    assert size.med_ddpm is not None
    with importable(size.med_ddpm, UNUSED):
        unet, trainer = (importlib.import_module(f"diffusion_model.{name}") for name in ("unet", "trainer"))
        network = unet.create_model(128, size.base, 1, attention_resolutions="16", in_channels=3, out_channels=1)
        options = {"image_size": size.side, "depth_size": size.side, "timesteps": TIMESTEPS, "loss_type": "l1"}
        diffusion = trainer.GaussianDiffusion(network, with_condition=True, **options).to(size.device)
    volume, condition = _data(size)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-5)

    def step() -> None:
        loss = diffusion(volume, condition_tensors=condition).sum()
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate(count: int) -> None:
        x = torch.randn_like(volume)
        for timestep in reversed(range(TIMESTEPS - count, TIMESTEPS)):
            at = torch.full((1,), timestep, device=size.device)
            x = diffusion.p_sample(x, at, condition_tensors=condition)

    diffusion.train(is_training)
    yield Contestant(_count(network), _repeat(step) if is_training else evaluate)


# --------------------------------------------------------------------------------------------------- MONAI


@contextlib.contextmanager
def monai(size: Size, *, is_training: bool) -> Iterator[Contestant]:
    """Its network and scheduler, its tutorials' step: autocast (fp16 scaled on a GPU, bf16 on a CPU), MSE, Adam."""
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDPMScheduler

    channels = [size.base * multiplier for multiplier in MULTIPLIERS]
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=3,
        out_channels=1,
        num_res_blocks=1,
        channels=channels,
        attention_levels=[False, False, False, True, False],
        num_head_channels=channels,
    ).to(size.device)
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, schedule="scaled_linear_beta")
    kind = size.device.type
    autocast = partial(torch.autocast, kind, torch.float16 if kind == "cuda" else torch.bfloat16)
    scaler = torch.amp.GradScaler(kind, enabled=kind == "cuda")
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5)
    volume, condition = _data(size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            noise = torch.randn_like(volume)
            timesteps = torch.randint(0, TIMESTEPS, (1,), device=size.device)
            noisy = scheduler.add_noise(original_samples=volume, noise=noise, timesteps=timesteps)
            found = network(torch.cat([noisy, condition], 1), timesteps)
            loss = F.mse_loss(found.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    @torch.no_grad()
    def evaluate(count: int) -> None:
        x = torch.randn_like(volume)
        for timestep in reversed(range(TIMESTEPS - count, TIMESTEPS)):
            with autocast():
                at = torch.full((1,), timestep, device=size.device)
                found = network(torch.cat([x, condition], 1), at)
            x, _ = scheduler.step(found.float(), timestep, x)

    network.train(is_training)
    yield Contestant(_count(network), _repeat(step) if is_training else evaluate)


# ------------------------------------------------------------------------------------------- plain PyTorch


@contextlib.contextmanager
def plain(size: Size, *, is_training: bool, has_autocast: bool) -> Iterator[Contestant]:
    """A DDPM in the style of lucidrains around our network: Adam, EMA in Python, nothing sharded or recomputed."""
    config = size.config
    config = config.model_copy(update={"model": config.model.model_copy(update={"channels_last": False})})
    network = build_unet(config).to(size.device).train(is_training)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    signal = torch.cos(torch.linspace(0, 1.56, TIMESTEPS, device=size.device)) ** 2  # cumulative product of alphas
    autocast = partial(torch.autocast, size.device.type, torch.bfloat16, enabled=has_autocast)
    volume, condition = _data(size)

    def step() -> None:
        timesteps = torch.randint(0, TIMESTEPS, (1,), device=size.device)
        noise = torch.randn_like(volume)
        kept = signal[timesteps].view(1, 1, 1, 1, 1)
        with autocast():
            found = network(kept.sqrt() * volume + (1 - kept).sqrt() * noise, condition, timesteps)
            loss = F.l1_loss(found.float(), noise)
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        for old, new in zip(average.parameters(), network.parameters(), strict=True):
            old.data = old.data * 0.995 + new.data * 0.005

    @torch.no_grad()
    def evaluate(count: int) -> None:
        x = torch.randn_like(volume)
        for timestep in reversed(range(TIMESTEPS - count, TIMESTEPS)):
            with autocast():
                found = network(x, condition, torch.full((1,), timestep, device=size.device))
            now, before = signal[timestep], signal[max(timestep - 1, 0)]
            clean = ((x - (1 - now).sqrt() * found.float()) / now.sqrt()).clamp(-1, 1)
            alpha = now / before
            mean = before.sqrt() * (1 - alpha) / (1 - now) * clean + alpha.sqrt() * (1 - before) / (1 - now) * x
            x = mean + ((1 - before) / (1 - now) * (1 - alpha)).sqrt() * torch.randn_like(x)

    yield Contestant(_count(network), _repeat(step) if is_training else evaluate)


# ---------------------------------------------------------------------------------------------------- ours


@contextlib.contextmanager
def our_training(size: Size, *, precision: str) -> Iterator[Contestant]:
    """The training engine as the loop drives it: DeepSpeed ZeRO-1, fp32 masters, EMA after every step."""
    from hpc_ddpm.training.engine import Engine

    config = size.config
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
    volume, condition = _data(size)
    ranks = detect_ranks({})
    with process_group(ranks) as device:
        engine = Engine(config, ranks, device)
        schedule = build_schedule(config.diffusion).to(device)
        counter = iter(range(1 << 30))

        def step() -> None:
            draw = draw_training(config.seed, [next(counter)], volume.shape[1:], config.diffusion, device)
            off_value = config.data.labels.off_value
            loss = training_loss(engine.deepspeed, volume, condition, draw, schedule, config.diffusion, off_value)
            engine.backward(loss.mean())
            engine.step(1e-5)
            engine.ema.update()
            loss.mean().item()

        yield Contestant(_count(engine.deepspeed.module), _repeat(step))
        engine.close()


@contextlib.contextmanager
def our_sampling(size: Size, *, precision: str, sampler: str) -> Iterator[Contestant]:
    """The network through `sample`, as `hpc-ddpm sample` runs it."""
    keep_freed_memory()
    config = size.config
    network = build_unet(config).eval().to(size.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    schedule = build_schedule(config.diffusion)
    volume, condition = _data(size)

    def evaluate(count: int) -> None:
        sampling = config.sampling.model_copy(update={"sampler": sampler, "num_steps": count})
        noise = NoiseSource([0], size.device)
        with torch.inference_mode():
            sample(network, condition, noise(volume.shape), schedule, "epsilon", sampling, noise=noise)

    yield Contestant(_count(network), evaluate)


@contextlib.contextmanager
def convolutions(size: Size) -> Iterator[Contestant]:
    """Each 3-D convolution of one evaluation in bf16, on an input that is there already: the bound on this device."""
    network = build_unet(size.config).eval().to(size.device, torch.bfloat16)
    volume, condition = _data(size)
    calls: list[tuple[nn.Conv3d, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: calls.append((layer, inputs[0].clone())))
        for layer in network.modules()
        if isinstance(layer, nn.Conv3d)
    ]
    with torch.inference_mode():
        network(volume, condition, torch.tensor([100], device=size.device))
    for hook in hooks:
        hook.remove()

    def evaluate(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                for layer, x in calls:
                    F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    yield Contestant(_count(network), evaluate)


TRAINING: dict[str, Build] = {
    "Med-DDPM, fp32": partial(med_ddpm, is_training=True),
    "plain PyTorch, fp32": partial(plain, is_training=True, has_autocast=False),
    "plain PyTorch, bf16 autocast": partial(plain, is_training=True, has_autocast=True),
    "MONAI, autocast": partial(monai, is_training=True),
    "hpc_ddpm, fp32": partial(our_training, precision="fp32"),
    "hpc_ddpm, bf16": partial(our_training, precision="bf16"),
}
SAMPLING: dict[str, Build] = {
    "Med-DDPM, fp32": partial(med_ddpm, is_training=False),
    "plain PyTorch, fp32": partial(plain, is_training=False, has_autocast=False),
    "plain PyTorch, bf16 autocast": partial(plain, is_training=False, has_autocast=True),
    "MONAI, autocast": partial(monai, is_training=False),
    "hpc_ddpm, fp32": partial(our_sampling, precision="fp32", sampler="ddpm"),
    "hpc_ddpm, bf16": partial(our_sampling, precision="bf16", sampler="ddpm"),
    "hpc_ddpm, bf16, dpmpp_2m": partial(our_sampling, precision="bf16", sampler="dpmpp_2m"),
    "the convolutions alone, bf16": convolutions,
}
EVALUATIONS = {"hpc_ddpm, bf16, dpmpp_2m": 20}
"""Per volume; of all others, one for each timestep."""
