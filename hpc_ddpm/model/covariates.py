"""Scalar and categorical covariates (age, sex, scanner) as a term of the time embedding.

Shapes: B batch, V covariates, F features, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from hpc_ddpm.config import CovariateConfig


class ZeroLinear(nn.Linear):
    """A linear map whose weight and bias start at zero."""

    def reset_parameters(self) -> None:  # noqa: D102
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class CovariateEmbedding(nn.Sequential):
    """Linear, SiLU, Linear of the features, (B, V) -> (B, E); zero at first, so that covariates change nothing yet.

    The first weight's columns for the `unknown` features are what the network learns for unknown values.
    """

    def __init__(self, covariates: Mapping[str, CovariateConfig], width: int) -> None:
        super().__init__(nn.Linear(len(feature_names(covariates)), width), nn.SiLU(), ZeroLinear(width, width))
        self.covariates = covariates

    def forward(self, values: Tensor) -> Tensor:
        """Any floating dtype, NaN where unknown; the result has the dtype of the weights."""
        features = covariate_features(values, self.covariates)
        return cast("Tensor", super().forward(features.to(cast("nn.Linear", self[0]).weight.dtype)))


def feature_names(covariates: Mapping[str, CovariateConfig]) -> list[str]:
    """`age`, `age unknown`, `sex=F`, `sex=M`, `sex unknown`: what `covariate_features` computes, in its order."""
    names = []
    for name, covariate in covariates.items():
        names += [f"{name}={value}" for value in covariate.values] or [name]
        names.append(f"{name} unknown")
    return names


def covariate_features(values: Tensor, covariates: Mapping[str, CovariateConfig]) -> Tensor:
    """Standardised numbers and one-hot categories, each with one more that is 1 where the value is unknown.

    Args:
        values: (B, V): numbers, positions among the categories, or NaN.
        covariates: the settings, in the order of V.

    Returns:
        (B, F) float32.
    """
    columns = []
    for column, covariate in zip(values.float().unbind(1), covariates.values(), strict=True):
        unknown = column.isnan()
        if covariate.values:
            columns += [column == index for index in range(len(covariate.values))]
        else:
            mean, std = cast("float", covariate.mean), cast("float", covariate.std)
            columns.append(torch.where(unknown, 0.0, (column - mean) / std))
        columns.append(unknown)
    return torch.stack([column.float() for column in columns], dim=1)
