"""Self-attention over all voxels of a level.

Shapes: B batch, C channels, D H W = Z Y X voxels, T = D*H*W tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_ddpm.errors import ConfigError
from hpc_ddpm.model.norm import GroupNormFloat32


class TokenLinear(nn.Conv1d):
    """A linear map of (B, T, C) tokens whose weight has a 1-D convolution's shape (out, in, 1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class ZeroTokenLinear(TokenLinear):
    """A map of tokens whose weight and bias start at zero."""

    def reset_parameters(self) -> None:  # noqa: D102
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class AttentionBlock(nn.Module):
    """x + projection(attention(GroupNorm(x))), (B, C, D, H, W) -> same (Vaswani et al. 2017).

    PyTorch's kernels compute scores and softmax in float32 whatever the tokens are. The output projection starts at
    zero. Channels of qkv are ordered (head, q|k|v, channel).

    Raises:
        ConfigError: `head_channels` does not divide `channels`.
    """

    def __init__(self, channels: int, num_groups: int, head_channels: int | None) -> None:
        super().__init__()
        self.head_channels = head_channels or channels
        if channels % self.head_channels:
            raise ConfigError(
                f"model.head_channels={head_channels} does not divide the {channels} channels of an "
                "attention level; use a divisor of every such level's channels, or null for one head"
            )
        self.norm = GroupNormFloat32(num_groups, channels)
        self.qkv = TokenLinear(channels, 3 * channels)
        self.proj_out = ZeroTokenLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        tokens = self.norm(x.flatten(2)).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(2, (-1, 3, self.head_channels))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(query, key, value)
        update: Tensor = self.proj_out(attended.transpose(1, 2).flatten(2))
        return x + update.transpose(1, 2).reshape(x.shape)
