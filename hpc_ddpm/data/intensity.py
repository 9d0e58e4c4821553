"""Intensities of a volume to [-1, 1]. D H W."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_ddpm.config import DataConfig
from hpc_ddpm.errors import DataFormatError

Volume32 = NDArray[np.float32]


def normalize(
    volume: Volume32, config: DataConfig, path: Path, inside: NDArray[np.bool_] | None = None
) -> tuple[Volume32, Volume32]:
    """Intensities of one modality to [-1, 1] by `config.normalization`.

    Args:
        volume: (D, H, W), finite.
        config: names the way and its numbers: `low` and `high`, or `zscore_clip`.
        path: of the image, for messages.
        inside: (D, H, W), where zscore takes mean and standard deviation; None or nowhere is the whole volume.

    Returns:
        The volume, and (2,) float32: the intensities that became -1 and 1 (of the whole volume where Med-DDPM
        scales every Z slice by itself).

    Raises:
        DataFormatError: constant volume, or `none` with values outside [-1, 1].
    """
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise DataFormatError(f"{path}: every voxel is {low:g}, an image expected; leave the subject out", "constant")
    if config.normalization == "none" and (low < -1 or high > 1):
        raise DataFormatError(
            f"{path}: values from {low:g} to {high:g} found, [-1, 1] expected by data.normalization=none; "
            "use data.normalization=percentile, or window for CT",
            "out-of-range",
        )
    if config.normalization == "med_ddpm_whole_head":
        lows, highs = (np.asarray(f(volume, axis=(1, 2), keepdims=True), np.float64) for f in (np.min, np.max))
        return _scale(volume, lows, np.where(highs > lows, highs, lows + 1)), np.array([low, high], np.float32)
    if config.normalization == "none":
        low, high = -1.0, 1.0
    elif config.normalization == "window":
        low, high = config.low, config.high
    elif config.normalization == "percentile":
        low, high = _percentiles(volume, config, path)
    elif config.normalization == "zscore":
        low, high = _around_mean(volume if inside is None or not inside.any() else volume[inside], config, path)
    return _scale(volume, low, high), np.array([low, high], np.float32)


def background(volume: Volume32, config: DataConfig) -> float:
    """What lies outside a volume of `normalize`: -1, or its least value where zscore may leave that above."""
    return float(volume.min()) if config.normalization == "zscore" else -1.0


def _percentiles(volume: Volume32, config: DataConfig, path: Path) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(volume, [config.low, config.high]))
    if low == high:
        raise DataFormatError(
            f"{path}: percentiles {config.low:g} and {config.high:g} are both {low:g}; "
            "the image is almost constant: raise data.high or leave the subject out",
            "constant",
        )
    return low, high


def _around_mean(values: Volume32, config: DataConfig, path: Path) -> tuple[float, float]:
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if not std:
        raise DataFormatError(f"{path}: every voxel is {mean:g} inside the head; leave the subject out", "constant")
    return mean - config.zscore_clip * std, mean + config.zscore_clip * std


def _scale(volume: Volume32, low: Any, high: Any) -> Volume32:
    unit = (volume.astype(np.float64) - low) / (high - low)
    return (np.clip(unit, 0, 1) * 2 - 1).astype(np.float32)
