"""One training step in plain PyTorch: the reference beside DeepSpeed, and a step where DeepSpeed is missing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor, nn

from hpc_ddpm.config import Config, TrainingConfig
from hpc_ddpm.data.labels import one_hot
from hpc_ddpm.diffusion.gaussian import draw_training, training_loss
from hpc_ddpm.diffusion.schedules import build_schedule
from hpc_ddpm.model.initial import initial_tensors
from hpc_ddpm.model.planner import DTYPES
from hpc_ddpm.model.unet3d import build_unet


class PlainStep:
    """Loss, backward, Adam: the network in its precision, fp32 masters where that is not fp32.

    It starts at the weights of the training engine, and draws timesteps and noise as the training loop does.
    """

    def __init__(self, config: Config, device: torch.device, precision: str, backend: str | None = None) -> None:
        """`backend` is torch.compile's; None does not compile."""
        self.config, self.device = config, device
        network = build_unet(config)
        network.load_state_dict(dict(initial_tensors(config)))
        self.module = network.to(device, DTYPES[precision]).train()
        self.network: nn.Module = self.module
        if backend is not None:
            self.network = torch.compile(self.module, backend=backend, dynamic=False)  # type: ignore[assignment]
        self.optimizer = MasterAdam(self.module.parameters(), config.training, precision)
        self.schedule = build_schedule(config.diffusion).to(device)
        self.batch = synthetic_batch(config, device, config.training.micro_batch)
        self._count = count()

    def __call__(self) -> Tensor:
        """The loss before the step, detached."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.module.zero_grad()
        return loss.detach()

    def loss(self) -> Tensor:
        """The loss of the next samples."""
        config, (x_start, condition) = self.config, self.batch
        first = next(self._count) * len(x_start)
        samples = range(first, first + len(x_start))
        draw = draw_training(config.seed, samples, x_start.shape[1:], config.diffusion, self.device)
        off_value = config.data.labels.off_value
        return training_loss(self.network, x_start, condition, draw, self.schedule, config.diffusion, off_value).mean()


class MasterAdam:
    """Adam (or AdamW) on fp32 masters of the weights, in plain PyTorch; in fp32 the weights are their own masters."""

    def __init__(self, weights: Iterable[nn.Parameter], training: TrainingConfig, precision: str) -> None:
        self.weights, self.clip = list(weights), training.gradient_clip
        self.masters: list[Tensor] = [*self.weights]
        if precision != "fp32":
            self.masters = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        settings = {"lr": training.learning_rate, "betas": training.betas, "weight_decay": training.weight_decay}
        self.adam = kind(self.masters, fused=True, **settings)  # type: ignore[arg-type]
        self.norm = torch.tensor(torch.nan)
        """Norm of the gradients in the last step; NaN where they are not clipped."""

    def step(self) -> None:
        """One step with the weights' gradients, which stay."""
        has_copies = self.masters[0] is not self.weights[0]
        if has_copies:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        if self.clip:
            self.norm = nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.adam.step()
        if has_copies:
            torch._foreach_copy_([weight.detach() for weight in self.weights], [m.detach() for m in self.masters])


def random_network(config: Config) -> nn.Module:
    """The training engine's first weights on the CPU, float32; layers that start at zero get small random values."""
    network = build_unet(config)
    generator = torch.Generator().manual_seed(config.seed)
    tensors = {}
    for name, tensor in initial_tensors(config):
        is_zero = not bool(tensor.any()) and tensor.dim() > 1
        tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.02 if is_zero else tensor
    network.load_state_dict(tensors)
    return network


def synthetic_batch(config: Config, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Random volumes (B, C, D, H, W) in [-1, 1] and label channels (B, K, D, H, W)."""
    generator = torch.Generator().manual_seed(config.seed)
    shape, values = config.data.training_shape, [0, *config.data.labels.names]
    volume = torch.rand(size, config.data.num_modalities, *shape, generator=generator) * 2 - 1
    labels = torch.tensor(values, dtype=torch.uint8)[torch.randint(len(values), (size, *shape), generator=generator)]
    return volume.to(device), one_hot(labels.to(device), config.data.labels)
