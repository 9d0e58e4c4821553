"""Random changes of training volumes, on their device. B C D H W; axes of settings are X Y Z.

What happens to a sample is a function of (seed, number of the sample in the run): the few random numbers are drawn
on the CPU, and noise is hashed from (key, voxel), so ranks, batches and the kind of device do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from hpc_ddpm.config import AugmentConfig
from hpc_ddpm.data.sampler import sample_rng

BACKGROUND = -1.0
_AUGMENT = 1  # purpose of the random numbers


def augment(
    image: Tensor, mask: Tensor, samples: Sequence[int], seed: int, config: AugmentConfig
) -> tuple[Tensor, Tensor]:
    """Change every volume of a batch, image and mask alike.

    Args:
        image: (B, C, D, H, W) float32 in [-1, 1]; exactly -1 is background and stays it, unless it is moved.
        mask: (B, D, H, W) integer labels, on the same device.
        samples: number of each sample in the run, B of them.
        seed: of the run.
        config: chances and ranges.
    """
    if not config.is_on:
        return image, mask
    pairs = [
        _augment_one(one_image, one_mask, sample_rng(seed, sample, _AUGMENT), config)
        for one_image, one_mask, sample in zip(image, mask, samples, strict=True)
    ]
    images, masks = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(masks)


def _augment_one(image: Tensor, mask: Tensor, rng: np.random.Generator, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    image, mask = _move(image, mask, rng, config)
    return torch.stack([_change_intensity(channel, rng, config) for channel in image]), mask


# --------------------------------------------------------------------------------------------- geometry


def _move(image: Tensor, mask: Tensor, rng: np.random.Generator, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mirror, rotate, zoom and shift (C, D, H, W) and (D, H, W); what comes from outside is background."""
    flips = rng.random(3) < config.flip_probability
    if rng.random() >= config.affine_probability:
        axes = [-1 - axis for axis in np.flatnonzero(flips).tolist()]
        return image.flip(axes), mask.flip(axes)
    grid = _sampling_grid(mask.shape, *_draw_affine(rng, flips, config), mask.device)
    image = F.grid_sample(image[None] - BACKGROUND, grid, "bilinear", "zeros", align_corners=False)[0] + BACKGROUND
    image = image.clamp(-1, 1)  # weights may add up to a little more than 1
    labels = F.grid_sample(mask[None, None].float(), grid, "nearest", "zeros", align_corners=False)[0, 0]
    return image, labels.to(mask.dtype)


def _draw_affine(
    rng: np.random.Generator, flips: NDArray[np.bool_], config: AugmentConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3, 3) and (3,): where a voxel is taken from, in voxels X Y Z about the centre."""
    rotation = Rotation.from_euler("xyz", _either_way(rng, config.rotation_degrees), degrees=True).as_matrix()
    zoom = _log_uniform(rng, config.zoom_range)
    matrix = np.diag(np.where(flips, -1.0, 1.0)) @ rotation.T / zoom
    return matrix, -matrix @ _either_way(rng, config.translation_voxels)


def _sampling_grid(
    shape: Sequence[int], matrix: NDArray[np.float64], offset: NDArray[np.float64], device: torch.device
) -> Tensor:
    """(1, D, H, W, 3) for grid_sample: X Y Z scaled to -1..1 at the outer faces.

    Sums of products, as `affine_grid` multiplies matrices, which a GPU may do at lower precision.
    """
    half = np.array(shape[::-1]) / 2
    columns = torch.tensor(matrix * half / half[:, None], dtype=torch.float32, device=device).T
    z, y, x = (torch.linspace(1 / side - 1, 1 - 1 / side, side, device=device)[:, None] for side in shape)
    centre = torch.tensor(offset / half, dtype=torch.float32, device=device)
    planes = (z * columns[2])[:, None, None] + (y * columns[1])[None, :, None]
    return (planes + x * columns[0] + centre)[None]


# ------------------------------------------------------------------------------------------- intensities


def _change_intensity(channel: Tensor, rng: np.random.Generator, config: AugmentConfig) -> Tensor:
    """(D, H, W): field, contrast, gamma and noise on a scale from 0 to 1."""
    chances = (
        config.bias_field_probability,
        config.contrast_probability,
        config.gamma_probability,
        config.noise_probability,
    )
    has_field, has_contrast, has_gamma, has_noise = happens = rng.random(4) < chances
    if not happens.any():
        return channel
    value = (channel - BACKGROUND) / 2
    if has_field:
        value = value * _bias_field(channel.shape, rng, config.bias_field_strength, channel.device)
    if has_contrast:
        value = value * _log_uniform(rng, config.contrast_range) + float(_either_way(rng, config.brightness_offset))
    if has_gamma:
        value = value.clamp(0, 1) ** _log_uniform(rng, config.gamma_range)
    if has_noise:
        std = rng.uniform(0, config.noise_std)
        value = value + std * _voxel_noise(channel.shape, int(rng.integers(2**32)), channel.device)
    changed = 2 * value.clamp(0, 1) + BACKGROUND
    return torch.where(channel == BACKGROUND, channel, changed)


def _bias_field(shape: Sequence[int], rng: np.random.Generator, strength: float, device: torch.device) -> Tensor:
    """(D, H, W) around 1: the exponential of a cubic spline through 3 x 3 x 3 random values."""
    spline = ndimage.zoom(rng.standard_normal((3, 3, 3)), 8, order=3)
    spline *= rng.uniform(0, strength) / np.abs(spline).max()
    coarse = torch.tensor(spline, dtype=torch.float32, device=device)
    return F.interpolate(coarse[None, None], size=tuple(shape), mode="trilinear", align_corners=True)[0, 0].exp()


def _voxel_noise(shape: Sequence[int], key: int, device: torch.device) -> Tensor:
    """Noise of mean 0 and deviation 1, about normal: the sum of four random bytes. Integers: alike on all devices."""
    word = torch.arange(int(np.prod(shape)), device=device)
    for round_key in (key, 0, 0):
        word = ((word ^ (word >> 16)) * 0x45D9F3B ^ round_key) & 0xFFFFFFFF
    word = word ^ (word >> 16)
    total = (word & 0xFF) + (word >> 8 & 0xFF) + (word >> 16 & 0xFF) + (word >> 24)
    return ((total - 510).float() / (4 * (256**2 - 1) / 12) ** 0.5).reshape(tuple(shape))


def _either_way(rng: np.random.Generator, largest: float | Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(rng.uniform(-1, 1, np.shape(largest)) * largest)


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(limits))))
