"""Small PNG pictures of volumes: three planes with the outlines of the mask. No drawing library. D H W."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_ddpm.config import LabelsConfig
from hpc_ddpm.data.labels import outer_label
from hpc_ddpm.data.slices import RGB, label_colours, lesion_centre, orthogonal_slices, plane_sizes_mm

GREYS = 192
MAX_ASPECT = 4.0
"""A picture is at most this many times as wide as it is high."""

Pixels = NDArray[np.uint8]
"""(rows, columns): 0..191 are greys, 192 and on labels."""


def colours(labels: LabelsConfig) -> dict[int, RGB]:
    """Label -> colour; the outer label gets a calm one, the last one the accent."""
    outer = outer_label(labels)
    order = sorted(labels.names, key=lambda label: label != outer)
    return dict(zip(order, label_colours(len(order)), strict=True))


def picture(
    volumes: Sequence[NDArray[Any]],
    mask: NDArray[np.uint8] | None,
    voxel_size_mm: tuple[float, float, float],
    labels: LabelsConfig,
    height: int,
) -> bytes:
    """PNG of `draw`; same arguments."""
    return encode_png(draw(volumes, mask, voxel_size_mm, labels, height), labels)


def draw(
    volumes: Sequence[NDArray[Any]],
    mask: NDArray[np.uint8] | None,
    voxel_size_mm: tuple[float, float, float],
    labels: LabelsConfig,
    height: int,
) -> Pixels:
    """Axial, coronal and sagittal planes, one row per volume, through the largest piece of the rarest label.

    Args:
        volumes: (D, H, W) each, RAS+, of one shape.
        mask: the same shape, labels of the scheme; None draws no outlines.
        voxel_size_mm: (x, y, z).
        labels: the scheme, for the colours.
        height: of a row, in pixels.
    """
    shape = volumes[0].shape
    whole = np.zeros(shape, np.uint8) if mask is None else mask
    centre = lesion_centre(whole)
    channel = {label: GREYS + i for i, label in enumerate(list(colours(labels))[: 256 - GREYS])}
    rows = [_row(volume, whole, centre, plane_sizes_mm(shape, voxel_size_mm), channel, height) for volume in volumes]
    return np.vstack(rows)


def stack(pictures: Sequence[Pixels]) -> Pixels:
    """One below the other, to one width."""
    width = max(picture.shape[1] for picture in pictures)
    return np.vstack([np.pad(picture, ((0, 2), (0, width - picture.shape[1]))) for picture in pictures])


def encode_png(pixels: Pixels, labels: LabelsConfig) -> bytes:
    """What `draw` drew, in the colours of the labels."""
    return _png(pixels, list(colours(labels).values())[: 256 - GREYS])


def _row(
    volume: NDArray[Any],
    mask: Pixels,
    centre: tuple[int, int, int],
    sizes_mm: list[tuple[float, float]],
    channel: dict[int, int],
    height: int,
) -> Pixels:
    """Three planes side by side, to one scale in mm, over black."""
    scale = height / max(high for _, high in sizes_mm)
    scale = min(scale, MAX_ASPECT * height / sum(wide for wide, _ in sizes_mm))
    low, high_value = _window(volume)
    planes = []
    for plane, outline, (wide, high) in zip(
        orthogonal_slices(volume, centre), orthogonal_slices(mask, centre), sizes_mm, strict=True
    ):
        shape = max(1, round(high * scale)), max(1, round(wide * scale))
        grey = np.clip((_resample(plane, shape) - low) / (high_value - low), 0, 1) * (GREYS - 1)
        pixels = np.rint(np.nan_to_num(grey)).astype(np.uint8)
        for label, edge in _edges(_nearest(outline, shape), channel):
            pixels[edge] = channel[label]
        above = (height - shape[0]) // 2
        planes.append(np.pad(pixels, ((above, height - shape[0] - above), (0, 2))))
    return np.hstack(planes)


def _window(volume: NDArray[Any]) -> tuple[float, float]:
    """Percentiles 1 and 99.5 of every third voxel."""
    some = np.nan_to_num(volume[::3, ::3, ::3].astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(some, [1, 99.5]).tolist()
    return low, max(high, low + 1e-6)


def _resample(plane: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Linear; smoothed first where it shrinks."""
    plane = np.nan_to_num(plane.astype(np.float32))
    factors = [source / target for source, target in zip(plane.shape, shape, strict=True)]
    plane = ndimage.gaussian_filter(plane, [max(0.0, (factor - 1) / 2) for factor in factors], mode="nearest")
    places = [(np.arange(n) + 0.5) * factor - 0.5 for n, factor in zip(shape, factors, strict=True)]
    grid = np.meshgrid(*places, indexing="ij")
    return np.asarray(ndimage.map_coordinates(plane, grid, order=1, mode="nearest"), np.float32)


def _nearest(plane: Pixels, shape: tuple[int, int]) -> Pixels:
    rows, columns = (np.arange(n) * source // n for n, source in zip(shape, plane.shape, strict=True))
    return plane[np.ix_(rows, columns)]


def _edges(mask: Pixels, labels: dict[int, int]) -> list[tuple[int, NDArray[np.bool_]]]:
    """Inner edge of every label."""
    inner = [(label, mask == label) for label in labels if (mask == label).any()]
    return [(label, region & ~ndimage.binary_erosion(region, border_value=1)) for label, region in inner]


def _png(pixels: Pixels, label_rgb: Sequence[RGB]) -> bytes:
    """An indexed PNG (W3C PNG 3rd edition): greys, then the colours of the labels."""
    greys = np.repeat(np.linspace(0, 255, GREYS), 3)
    table = np.rint([*greys, *(255 * part for rgb in label_rgb for part in rgb)]).astype(np.uint8)
    height, width = pixels.shape
    rows = np.hstack([np.zeros((height, 1), np.uint8), pixels])  # 0: the row is not filtered
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"PLTE", table.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
