"""Residual and resampling blocks of the U-Net.

Shapes: B batch, C channels, D H W = Z Y X voxels, E width of the time embedding.
Children are named and numbered so that state_dict keys are Med-DDPM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hpc_ddpm.model.norm import GroupNormSiLU
from hpc_ddpm.model.offload import saved_on_host


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float) -> Tensor:
    """Sinusoids of the timestep, cosines then sines (Vaswani et al. 2017, section 3.5).

    Args:
        timesteps: (B,), any real dtype.
        dim: width of the embedding; an odd width ends in a zero.
        max_period: the longest period is 2 pi times this, in timesteps.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    index = torch.arange(half, device=timesteps.device, dtype=torch.float32)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * index / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class Conv3d(nn.Conv3d):
    """A convolution that can also add one value per sample and channel, and keeps the memory format of x."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, C, D, H, W) and perhaps shift (B, C_out) -> (B, C_out, D', H', W')."""
        bias = self.bias
        if shift is not None and len(shift) == 1 and bias is not None:  # the usual case: one volume per rank
            bias, shift = bias + shift[0], None
        y = self._in_halves(x, bias) if self._is_slow_for(x) else self._conv_forward(x, self.weight, bias)
        if shift is not None:
            y = y.add_(shift[..., None, None, None])
        if x.is_contiguous():
            return y
        return y.contiguous(memory_format=torch.channels_last_3d)  # the CPU kernel for small volumes forgets it

    def _is_slow_for(self, x: Tensor) -> bool:
        """Whether PyTorch would leave oneDNN: one float32 volume on the CPU with B C D H <= 20480, stride 1.

        Below 2^15 values the detour costs more than it saves.
        """
        B, C, D, H, _ = x.shape
        is_small = B == 1 and D % 2 == 0 and C * D * H <= 20480 and x.numel() >= 2**15
        return is_small and x.is_cpu and x.dtype == torch.float32 and self.stride == (1, 1, 1)

    def _in_halves(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same convolution of the volume's lower and upper half as a batch of two, which oneDNN takes."""
        half, (pad_d, *pad_hw) = x.shape[2] // 2, cast("tuple[int, ...]", self.padding)
        padded = F.pad(x, (0, 0, 0, 0, pad_d, pad_d))
        halves = torch.cat([padded[:, :, : half + 2 * pad_d], padded[:, :, half:]])
        return torch.cat(F.conv3d(halves, self.weight, bias, padding=(0, *pad_hw)).split(1), dim=2)


class ZeroConv3d(Conv3d):
    """A convolution whose weight and bias start at zero."""

    def reset_parameters(self) -> None:  # noqa: D102
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def conv3(in_channels: int, out_channels: int, stride: int = 1, kind: type[Conv3d] = Conv3d) -> Conv3d:
    """A 3x3x3 convolution with padding 1."""
    return kind(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)


class NormConv(nn.ModuleList):
    """conv(dropout(SiLU(GroupNorm(x)))), (B, C, D, H, W) -> (B, C_out, D, H, W).

    With `recompute` the convolution's input is not stored: backward repeats GroupNorm+SiLU. Where dropout
    follows the norm it is stored all the same.
    """

    def __init__(self, norm: GroupNormSiLU, conv: nn.Module, dropout: float | None = None, *, recompute: bool) -> None:
        silu = nn.Identity()  # inside the norm; keeps its number in the keys
        super().__init__([norm, silu, conv] if dropout is None else [norm, silu, nn.Dropout(dropout), conv])
        self.dropout = dropout or 0.0
        self.recompute = recompute and not dropout

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """`shift`, (B, C_out), is added to every voxel of the result."""
        norm, conv = cast("GroupNormSiLU", self[0]), self[-1]
        hidden = F.dropout(norm(x), self.dropout, self.training)
        if not (self.recompute and torch.is_grad_enabled()):
            result: Tensor = conv(hidden, shift)
            return result
        again, stored = norm.recompute(x), hidden.untyped_storage()._cdata  # meta tensors have no address

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.untyped_storage()._cdata == stored else saved

        def unpack(saved: Tensor | None) -> Tensor:
            return again() if saved is None else saved

        with saved_tensors_hooks(pack, unpack):
            return cast("Tensor", conv(hidden, shift))


class ResBlock(nn.Module):
    """skip(x) + conv(norm(conv(norm(x)) + linear(time))), (B, C, D, H, W), (B, E) -> (B, C_out, D, H, W).

    On the way up x is given in two parts: the second, `joined`, is the output of a block on the way down.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        num_groups: int,
        *,
        dropout: float = 0.0,
        recompute_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_layers = NormConv(
            GroupNormSiLU(num_groups, in_channels), conv3(in_channels, out_channels), recompute=recompute_norm
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = NormConv(
            GroupNormSiLU(num_groups, out_channels),
            conv3(out_channels, out_channels, kind=ZeroConv3d),
            dropout,
            recompute=recompute_norm,
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, embedding: Tensor, joined: Tensor | None = None) -> Tensor:  # noqa: D102
        if joined is not None:
            x = torch.cat([x, joined], dim=1)
        # first, backward comes to it last and holds one gradient of x, not two; last, its output waits for nothing
        skip = self.skip_connection(x) if torch.is_grad_enabled() else None
        h = self.in_layers(x, self.emb_layers(embedding))
        h = self.out_layers(h)
        return cast("Tensor", h.add_(self.skip_connection(x) if skip is None else skip))


class Downsample(nn.Module):
    """Halves every axis by a strided 3x3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return cast("Tensor", self.op(x))


class Upsample(nn.Module):
    """Doubles every axis by trilinear interpolation (voxel centres), then a 3x3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return cast("Tensor", self.conv(F.interpolate(x, scale_factor=2.0, mode="trilinear")))


def checkpointed(function: Callable[..., Any], *inputs: Any, dropout: float, offload: bool) -> Any:
    """Call `function`, storing only its inputs (`offload`: on the host); backward repeats it, with the same dropout."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    with saved_on_host() if offload else nullcontext():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0)


class Block(nn.ModuleList):
    """Layers applied in turn; residual blocks also see the time embedding and what is joined on the way up.

    With `recompute`, backward repeats each layer but its last convolution (it needs that one's input only) instead of
    storing its insides. With `offload`, the inputs of the layers are stored on the host.
    """

    def __init__(
        self, *layers: nn.Module, recompute: bool = False, offload: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(layers)
        self.recompute, self.offload, self.dropout = recompute, offload, dropout

    def forward(self, h: Tensor, embedding: Tensor, joined: Tensor | None = None) -> Tensor:  # noqa: D102
        if joined is not None and self.offload:  # one tensor comes back, not its parts and then itself
            h, joined = torch.cat([h, joined], dim=1), None
        for layer in self:
            inputs = (h, embedding, joined) if isinstance(layer, ResBlock) else (h,)
            if self.recompute:
                h = checkpointed(layer, *inputs, dropout=self.dropout, offload=self.offload)
            else:
                h = layer(*inputs)
        return h
