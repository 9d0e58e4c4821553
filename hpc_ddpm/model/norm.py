"""GroupNorm, and GroupNorm followed by SiLU as one differentiable operation, in the dtype and layout of the input.

Shapes: B batch, C channels, D H W = Z Y X voxels. Statistics are float32 whatever the activations are. One exception
is PyTorch's: its GPU kernel for contiguous half-precision volumes rounds them on the way to backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        if not x.is_contiguous() and (x.dtype == torch.float32 or not _has_kernel(x)):
            return *_channels_last_backward(grad, x, mean, rstd, weight), None, None
        B, C = x.shape[:2]
        grads = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, B, C, x[0, 0].numel(), ctx.groups, [True] * 3
        )
        return *grads, None, None


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm of x in its own layout; also mean and 1/std, (B, groups)."""
    B, C = x.shape[:2]
    if _has_kernel(x):
        return torch.native_group_norm(x, weight, bias, B, C, x[0, 0].numel(), groups, eps)
    variance, mean = torch.var_mean(x.float().unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0)
    rstd = torch.rsqrt(variance + eps)
    scale = _per_channel(rstd, C) * weight.float()
    shift = bias.float() - _per_channel(mean, C) * scale
    return _multiply_add(x, scale, shift), mean, rstd


def _has_kernel(x: Tensor) -> bool:
    """Whether PyTorch normalises this layout in place: CPU kernels know channels_last_3d, others do not."""
    return x.is_contiguous() or x.is_cpu


def _channels_last_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of GroupNorm by x, weight and bias where PyTorch has no fast kernel (float32, or a GPU).

    With x̂ = (x - mean) rstd and g = weight * grad: dx = rstd (g - <g> - x̂ <g x̂>), <> over each group.
    """
    C, groups = x.shape[1], mean.shape[1]
    mean_c, rstd_c, weight = _per_channel(mean.float(), C), _per_channel(rstd.float(), C), weight.float()
    sum_grad = _sum_voxels(grad)
    product = _multiply_add(x, rstd_c, -mean_c * rstd_c).mul_(grad)
    sum_grad_x_hat = _sum_voxels(product)
    count = x[0, 0].numel() * C // groups
    mean_g = _per_channel((weight * sum_grad).unflatten(1, (groups, -1)).sum(2) / count, C)
    mean_g_x_hat = _per_channel((weight * sum_grad_x_hat).unflatten(1, (groups, -1)).sum(2) / count, C)
    slope = -rstd_c.square() * mean_g_x_hat
    dx = _multiply_add(x, slope, -rstd_c * mean_g - slope * mean_c, out=product)
    dx.addcmul_(grad, (rstd_c * weight)[..., None, None, None])
    return dx, sum_grad_x_hat.sum(0), sum_grad.sum(0)


def _per_channel(per_group: Tensor, channels: int) -> Tensor:
    """(B, groups) -> (B, C)."""
    return per_group.repeat_interleave(channels // per_group.shape[1], dim=1)


def _multiply_add(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift with one float32 (B, C) factor and term per channel, rounded once, to the dtype of x."""
    shape = (*scale.shape, 1, 1, 1)
    return torch.addcmul(shift.view(shape), x, scale.view(shape), out=torch.empty_like(x) if out is None else out)


def _sum_voxels(x: Tensor) -> Tensor:
    """(B, C) float32 sums of a channels_last_3d tensor: rows first, then the rows' sums."""
    return x.permute(0, 2, 3, 4, 1).sum(3, dtype=torch.float32).sum((1, 2))
