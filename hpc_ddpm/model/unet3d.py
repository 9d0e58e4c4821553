"""The conditional 3-D U-Net of Med-DDPM (Dorjsembe et al. 2024, arXiv 2305.18453).

Shapes: B batch, C modalities, K labels, V covariates, D H W = Z Y X voxels, E width of the time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpc_ddpm.config import Config, CovariateConfig, ModelConfig
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.model.attention import AttentionBlock
from hpc_ddpm.model.blocks import (
    Block,
    Downsample,
    NormConv,
    ResBlock,
    Upsample,
    ZeroConv3d,
    checkpointed,
    conv3,
    timestep_embedding,
)
from hpc_ddpm.model.covariates import CovariateEmbedding
from hpc_ddpm.model.norm import GroupNormSiLU


def build_unet(config: Config) -> UNet3d:
    """The network that `config` describes, freshly initialised, float32, on the default device."""
    data = config.data
    return UNet3d(config.model, data.num_modalities, data.num_labels, data.covariates)


class UNet3d(nn.Module):
    """Predicts noise, x_start or v from a noised volume, its condition and the timestep.

    Volume and condition are concatenated and go down and up through levels of residual and attention blocks. The
    timestep, and covariates where the network has any, reach every residual block as one embedding.
    All arithmetic is in the dtype of the weights.

    Raises:
        ConfigError: `head_channels` does not divide the channels of an attention level.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_modalities: int,
        num_labels: int,
        covariates: Mapping[str, CovariateConfig] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_modalities, self.num_labels = config, num_modalities, num_labels
        self.num_covariates = len(covariates or {})
        base = config.base_channels
        widths = [base * multiplier for multiplier in config.channel_multipliers]
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        if covariates:
            self.covariate_embed = CovariateEmbedding(covariates, 4 * base)

        self.input_blocks = nn.ModuleList([Block(conv3(num_modalities + num_labels, widths[0]))])
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers = [self._res(skips[-1], width), *self._attention(level, width)]
                self.input_blocks.append(self._block(*layers))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)

        width = widths[-1]
        attention = AttentionBlock(width, config.num_groups, config.head_channels)
        self.middle_block = self._block(self._res(width, width), attention, self._res(width, width))

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(config.num_res_blocks + 1):
                in_channels, width = width + skips.pop(), widths[level]
                layers = [self._res(in_channels, width), *self._attention(level, width)]
                if level > 0 and index == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(self._block(*layers))

        self.out = NormConv(
            GroupNormSiLU(config.num_groups, width),
            conv3(width, num_modalities, kind=ZeroConv3d),
            recompute=config.activation_checkpointing != "none",
        )

    def _res(self, in_channels: int, out_channels: int) -> nn.Module:
        return ResBlock(
            in_channels,
            out_channels,
            embedding=4 * self.config.base_channels,
            num_groups=self.config.num_groups,
            dropout=self.config.dropout,
            recompute_norm=self.config.activation_checkpointing == "norm",
        )

    def _attention(self, level: int, channels: int) -> list[nn.Module]:
        if 2**level not in self.config.attention_factors:
            return []
        return [AttentionBlock(channels, self.config.num_groups, self.config.head_channels)]

    def _block(self, *layers: nn.Module) -> Block:
        policy = self.config.activation_checkpointing
        offload = policy == "block" and self._offload  # where it is full, the inputs of whole levels
        return Block(*layers, recompute=policy in {"block", "full"}, offload=offload, dropout=self.config.dropout)

    @property
    def _offload(self) -> bool:
        return self.config.offload_activations == "cpu"

    def forward(self, x_t: Tensor, condition: Tensor, timesteps: Tensor, covariates: Tensor | None = None) -> Tensor:
        """One evaluation of the network.

        Args:
            x_t: (B, C, D, H, W) noised volume, any floating dtype; axes divisible by the downsampling factor.
            condition: (B, K, D, H, W) label channels.
            timesteps: (B,) indices in 0..T-1.
            covariates: (B, V) as packed, NaN where unknown; None is all unknown.

        Returns:
            (B, C, D, H, W) float32.

        Raises:
            DataFormatError: shapes do not fit the network or each other.
        """
        self._check(x_t, condition, timesteps, covariates)
        dtype = next(self.parameters()).dtype
        embedding = timestep_embedding(timesteps, self.config.base_channels, self.config.time_max_period)
        embedding = self.time_embed(embedding.to(dtype))
        if self.num_covariates:  # on every rank alike: under ZeRO-3 all take part in every layer
            unknown = torch.full((len(x_t), self.num_covariates), math.nan, device=x_t.device)
            embedding = embedding + self.covariate_embed(unknown if covariates is None else covariates)
        x = torch.cat([x_t.to(dtype), condition.to(dtype)], dim=1)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return self._levels(x, embedding).float()

    def _levels(self, x: Tensor, embedding: Tensor) -> Tensor:
        """All blocks, level by level: (B, C + K, D, H, W), (B, E) -> (B, C, D, H, W)."""
        first, *down = self.input_blocks
        skips = [first(x, embedding)]
        for blocks in self._by_level(down):
            skips += self._segment(self._down, skips[-1], embedding, blocks)
        h = self._segment(self.middle_block, skips[-1], embedding)
        for blocks in self._by_level(list(self.output_blocks)):
            h = self._segment(self._up, h, embedding, blocks, [skips.pop() for _ in blocks])
        return cast("Tensor", self.out(h))

    def _by_level(self, blocks: list[nn.Module]) -> list[list[nn.Module]]:
        """A level has num_res_blocks + 1: down, its last only halves the axes (none at the lowest level)."""
        count = self.config.num_res_blocks + 1
        return [blocks[start : start + count] for start in range(0, len(blocks), count)]

    def _segment(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """One level's stack of blocks, repeated in backward where `activation_checkpointing` is full."""
        if self.config.activation_checkpointing != "full":
            return function(*inputs)
        return checkpointed(function, *inputs, dropout=self.config.dropout, offload=self._offload)

    @staticmethod
    def _down(h: Tensor, embedding: Tensor, blocks: list[nn.Module]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for block in blocks:
            h = block(h, embedding)
            outputs.append(h)
        return outputs

    @staticmethod
    def _up(h: Tensor, embedding: Tensor, blocks: list[nn.Module], skips: list[Tensor]) -> Tensor:
        for block, skip in zip(blocks, skips, strict=True):
            h = block(h, embedding, skip)
        return h

    def _check(self, x_t: Tensor, condition: Tensor, timesteps: Tensor, covariates: Tensor | None) -> None:
        C, K, factor = self.num_modalities, self.num_labels, self.config.downsampling_factor
        if x_t.dim() != 5 or condition.dim() != 5:
            raise DataFormatError(
                f"found volume {tuple(x_t.shape)} and condition {tuple(condition.shape)}, expected "
                f"(B, {C}, D, H, W) and (B, {K}, D, H, W); add the missing axes"
            )
        if x_t.shape[1] != C:
            raise DataFormatError(
                f"the volume has {x_t.shape[1]} channels, this network was built for {C} modalities; "
                "give that many, or set data.modalities"
            )
        if condition.shape[1] != K:
            raise DataFormatError(
                f"the condition has {condition.shape[1]} channels, this network was built for {K} labels; "
                "give one channel per label, or set data.labels.names"
            )
        if x_t.shape[0] != condition.shape[0] or x_t.shape[2:] != condition.shape[2:]:
            raise DataFormatError(
                f"volume {tuple(x_t.shape)} and condition {tuple(condition.shape)} differ in batch or size; "
                "bring the mask to the volume's grid"
            )
        if any(side % factor or side == 0 for side in x_t.shape[2:]):
            near = [max(factor, round(side / factor) * factor) for side in x_t.shape[2:]]
            raise DataFormatError(
                f"size (D, H, W) = {tuple(x_t.shape[2:])} is not divisible by {factor} "
                f"({len(self.config.channel_multipliers)} levels); pad or crop, nearest that fits: {near}"
            )
        if timesteps.shape != x_t.shape[:1]:
            raise DataFormatError(
                f"timesteps have shape {tuple(timesteps.shape)}, expected ({x_t.shape[0]},): one per volume"
            )
        if covariates is not None and covariates.shape != (x_t.shape[0], self.num_covariates):
            raise DataFormatError(
                f"covariates have shape {tuple(covariates.shape)}, expected ({x_t.shape[0]}, {self.num_covariates}): "
                "one row per volume, one column for each of data.covariates"
            )
