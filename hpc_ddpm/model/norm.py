"""GroupNorm, and GroupNorm followed by SiLU as one differentiable operation, in the dtype and layout of the input.

Shapes: B batch, C channels, D H W = Z Y X voxels. Statistics are float32 whatever the activations are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_CHUNK = 1 << 17
"""Values of one part on a CPU; its float32 copies stay in the processor's cache."""
GPU_CHUNK = 1 << 24
"""Values of one part on a GPU, at least one slice; two float32 copies of a part take 128 MiB.

Arithmetic, not a measurement: in backward a part costs the host some 85 µs (45 in PyTorch, seen on a CPU, and 11 kernel
launches), and its kernels move 60 bytes per value, 20 µs per million values at 3 TB/s. Below 4 million values launches
bound it: 192 x 192 x 144 with 64 channels would be 144 slices of 2.4 million and take the host 12 ms, its kernels 7.
"""


class GroupNormFloat32(nn.GroupNorm):
    """GroupNorm computed in float32, (B, C, ...) -> same, in the dtype of x; for small inputs."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x)), (B, C, D, H, W) -> same; keeps only its input for backward (Wu & He 2018)."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        result: Tensor = _GroupNormSiLU.apply(x, *self._parameters_for(x), self.num_groups, self.eps)
        return result

    def recompute(self, x: Tensor) -> Callable[[], Tensor]:
        """A function that repeats forward on this x, without gradient, holding nothing but x."""
        weight, bias = (parameter.detach().clone() for parameter in self._parameters_for(x))
        x = x.detach()

        def again() -> Tensor:
            with torch.no_grad():
                return F.silu(_normalise(x, weight, bias, self.num_groups, self.eps)[0], inplace=True)

        return again

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in the dtype that keeps the kernel's statistics as exact as it can."""
        dtype = torch.float32 if x.is_cpu else x.dtype
        return self.weight.to(dtype), self.bias.to(dtype)


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps x and the statistics, not the normalised y: backward computes y again, which saves a whole activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        y = _normalise(x, weight, bias, ctx.groups, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward.grad_input(grad, y, grad_input=y)  # in y's place: fresh memory is slow
        if _has_exact_backward(x):
            B, C = x.shape[:2]
            options = B, C, x[0, 0].numel(), ctx.groups, [True] * 3
            return *torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *options), None, None
        if mean.dtype != torch.float32:
            mean, rstd = _statistics(x, mean, ctx.eps)
        return *_backward_in_place(grad, x, mean, rstd, weight.float()), None, None


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm of x in its own layout; also mean and 1/std, (B, groups)."""
    B, C = x.shape[:2]
    if _has_kernel(x):
        return torch.native_group_norm(x, weight, bias, B, C, x[0, 0].numel(), groups, eps)
    mean, rstd = _statistics(x, _per_group(x.mean((2, 3, 4), dtype=torch.float32), groups), eps)
    scale = _per_channel(rstd, C) * weight.float()
    shift = bias.float() - _per_channel(mean, C) * scale
    shape = (B, C, 1, 1, 1)
    return torch.addcmul(shift.view(shape), x, scale.view(shape), out=torch.empty_like(x)), mean, rstd


def _has_kernel(x: Tensor) -> bool:
    """Whether PyTorch normalises this layout in place: CPU kernels know channels_last_3d, others do not."""
    return x.is_contiguous() or x.is_cpu


def _has_exact_backward(x: Tensor) -> bool:
    """Whether PyTorch's backward is fast in this layout, and is given float32 statistics."""
    return x.is_contiguous() and x.is_cpu


def _statistics(x: Tensor, around: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std, (B, groups) float32, from what is nearly the mean; for GPUs.

    There, PyTorch's kernel knows one layout and rounds what it keeps of half precision.
    """
    mean = around.float()
    middle = _per_channel(mean, x.shape[1])[..., None, None, None]
    sums = torch.zeros(2, *x.shape[:2], device=x.device)
    for part in x.split(_slices(x), 2):
        offset = torch.sub(part, middle)
        sums[0] += offset.sum((2, 3, 4))
        sums[1] += offset.square_().sum((2, 3, 4))
    offset, square = (_per_group(each / x[0, 0].numel(), mean.shape[1]) for each in sums)
    return mean + offset, torch.rsqrt(square - offset.square() + eps)


def _backward_in_place(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of GroupNorm by x (which replaces `grad`), weight and bias, computed in float32.

    With x̂ = (x - mean) rstd and g = weight * grad: dx = rstd (g - <g> - x̂ <g x̂>), <> over each group. The sums over
    voxels are those that BatchNorm needs, whose kernels know every layout and dtype; of half precision, a few slices
    at a time are float32. PyTorch's own takes up to four times as long in channels_last and has no such kernel on GPUs.
    """
    C, groups = x.shape[1], mean.shape[1]
    mean, rstd = _per_channel(mean, C), _per_channel(rstd, C)
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            grad[b : b + 1], x[b : b + 1], weight, None, None, mean[b], rstd[b], True, 0.0, [False, True, True]
        )[1:]
        for b in range(len(x))
    ]
    sum_grad_x_hat, sum_grad = (torch.stack(each).float() for each in zip(*sums, strict=True))
    count = x[0, 0].numel()
    slope = -rstd.square() * _per_channel(_per_group(weight * sum_grad_x_hat, groups), C) / count
    shift = -rstd * _per_channel(_per_group(weight * sum_grad, groups), C) / count - slope * mean
    slope, shift, scale = (each[..., None, None, None] for each in (slope, shift, weight * rstd))
    for part, x_part in zip(grad.split(_slices(x), 2), x.split(_slices(x), 2), strict=True):
        part.copy_(torch.addcmul(shift, x_part.float(), slope).addcmul_(part.float(), scale))
    return grad, sum_grad_x_hat.sum(0), sum_grad.sum(0)


def _slices(x: Tensor) -> int:
    """Number of slices along D that are computed at once, so that float32 copies stay small."""
    return max(1, (CPU_CHUNK if x.is_cpu else GPU_CHUNK) // x[:, :, 0].numel())


def _per_group(per_channel: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, groups), means."""
    return per_channel.unflatten(1, (groups, -1)).mean(2)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    """(B, groups) -> (B, C)."""
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)
