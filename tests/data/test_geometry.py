"""Voxel sizes and crops: against MONAI, against a function of place, and back onto the file's grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.export import export
from hpc_ddpm.data.foreground import box_around, head
from hpc_ddpm.data.geometry import Geometry, fit, resample, restore
from hpc_ddpm.data.nifti import read_nifti, voxel_size_mm, write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.preprocess import prepare, prepare_mask
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.files import write_json

SHAPE = (26, 22, 18)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [95, 12, -80], degrees=True).as_matrix() * [1.0, 1.5, 2.0]
OBLIQUE[:3, 3] = 10, -20, 30


def geometry(shape: Any, voxel_size: Any, size: Any = (16, 16, 16), codes: str = "RAS") -> Geometry:
    return Geometry(shape, tuple(map(tuple, OBLIQUE.tolist())), codes, "crop_pad", size, voxel_size)


def places(shape: Any, affine: np.ndarray) -> np.ndarray:
    """(3, D, H, W): mm of every voxel of an (X, Y, Z) shape."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.einsum("ij,jxyz->izyx", affine[:3, :3], indices) + affine[:3, 3, None, None, None]


@pytest.mark.parametrize("voxel_size", [(1.0, 1.0, 1.0), (2.5, 1.5, 0.7), (3.0, 3.0, 3.0)])
def test_resampled_voxels_lie_where_the_affine_says(voxel_size: tuple[float, float, float]) -> None:
    grid = geometry(SHAPE, voxel_size)
    shape, affine = grid.resampled
    np.testing.assert_allclose(voxel_size_mm(affine), voxel_size, rtol=1e-4)
    oriented_shape, oriented_affine = grid.oriented
    for before, after in zip(places(oriented_shape, oriented_affine), places(shape, affine), strict=True):
        moved = resample(before, grid)
        inner = (slice(3, -3),) * 3  # half a voxel at the border repeats the edge, and the antialiasing mirrors it
        np.testing.assert_allclose(moved[inner], after[inner], atol=1e-6)
    assert np.allclose(np.array(shape) * voxel_size, np.array(oriented_shape) * voxel_size_mm(oriented_affine), atol=3)


FINER, COARSER = {1.0: 0.75, 1.5: 1.1, 2.0: 1.3}, {1.0: 3.0, 1.5: 3.3, 2.0: 5.2}


@pytest.mark.slow
@pytest.mark.parametrize(("is_label", "change"), [(False, FINER), (True, FINER), (True, COARSER)])
def test_orientation_voxel_size_and_crop_are_those_of_monai(
    tmp_path: Path, is_label: bool, change: dict[float, float]
) -> None:
    """Where the sizes divide: else MONAI's affine is off by a part of a voxel. Its Spacing does not antialias."""
    transforms = pytest.importorskip("monai.transforms")
    from monai.data import MetaTensor

    rng = np.random.default_rng(0)
    array = rng.integers(0, 4, SHAPE).astype(np.uint8) if is_label else rng.normal(size=SHAPE)
    write_nifti(tmp_path / "a.nii", array, OBLIQUE, array.dtype)
    file = read_nifti(tmp_path / "a.nii", "LPS", None)
    voxel_size = tuple(change[side] for side in voxel_size_mm(file.affine))
    shape, _ = geometry(file.file_shape, voxel_size, codes="LPS").resampled
    size = tuple(side - 4 for side in shape)
    grid = geometry(file.file_shape, voxel_size, size, "LPS")

    source = MetaTensor(array.T[None].astype(np.float64), affine=file.file_affine)
    turned = transforms.Orientation("LPS", labels=None)(source)
    np.testing.assert_array_equal(turned.numpy()[0], file.data.T)
    mode = "nearest" if is_label else "bilinear"
    spacing = transforms.Spacing(voxel_size, mode=mode, padding_mode="border", scale_extent=True, dtype=np.float64)
    spaced = spacing(turned)
    ours = resample(file.data, grid)
    assert ours.shape == spaced.shape[:0:-1] == shape[::-1]
    assert np.isclose(ours.T, spaced.numpy()[0], atol=1e-5).all()
    cropped = transforms.CenterSpatialCrop(size)(spaced)
    assert np.isclose(fit(ours, grid, 0).T, cropped.numpy()[0], atol=1e-5).all()
    np.testing.assert_allclose(grid.affine, cropped.affine.numpy(), atol=1e-4)


def smooth(shape: Any) -> np.ndarray:
    """A hill aside of the middle."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    return np.exp(-3 * ((x - 0.2) ** 2 + (y + 0.3) ** 2 + (z - 0.1) ** 2)).astype(np.float32)


def test_a_resampled_volume_returns_to_the_grid_of_its_file(tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    shape = (25, 31, 28)
    image, mask = smooth(shape), (smooth(shape) > 0.5).astype(np.uint8)
    mask += smooth(shape) > 0.1
    for role, volume in (("mask", mask), ("t1", image)):
        write_nifti(tmp_path / "in" / role / "a ü.nii.gz", volume, OBLIQUE)
    config = tiny(
        size=(64, 64, 64), voxel_size_mm=(0.8, 0.8, 0.8), crop_center="head", storage_dtype="float32", low=0, high=100
    )
    pack(tmp_path / "in", tmp_path / "packed", config)
    packed = open_packed(tmp_path / "packed")
    np.testing.assert_allclose(voxel_size_mm(packed.affine(0)), 0.8, atol=1e-4)
    assert packed.geometry(0).affine == pytest.approx(packed.affine(0))
    export(tmp_path / "packed", tmp_path / "out", original_grid=True, intensities="original")
    back = read_nifti(tmp_path / "out" / "t1" / "a ü.nii.gz")
    labels = read_nifti(tmp_path / "out" / "mask" / "a ü.nii.gz", dtype=None)
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-5)
    assert back.data.shape == shape
    assert np.abs(back.data - image).max() < 0.03
    assert (labels.data == mask).mean() > 0.98
    generated, _, grid = prepare_mask(tmp_path / "in" / "mask" / "a ü.nii.gz", config)
    assert (restore(generated, grid) == mask).mean() > 0.98


def test_exact_size_is_that_after_resampling(tmp_path: Path, tiny: Callable[..., DataConfig]) -> None:
    write_nifti(tmp_path / "m.nii", np.ones((12, 10, 8), np.uint8), np.diag([2.0, 2, 2, 1]))
    packed, affine, _ = prepare_mask(tmp_path / "m.nii", tiny(size=(16, 20, 24), fit="exact", voxel_size_mm=(1, 1, 1)))
    assert packed.shape == (24, 20, 16)
    np.testing.assert_allclose(affine @ [-0.5, -0.5, -0.5, 1], [-1, -1, -1, 1])
    assert packed.all()


# -------------------------------------------------------------------------------------------------- head


def write_head(folder: Path, mask_values: int, write: Callable[..., Path]) -> Subject:
    """A ball far from the middle in noise, with specks that shine; the mask holds the ball, or a spot in it."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:40, :36, :32]
    ball = (z - 28) ** 2 + (y - 10) ** 2 + (x - 20) ** 2 < 64
    image = (rng.normal(0, 3, ball.shape) + 100 * ball).astype(np.float32)
    image[2, 33, 2:4] = 150
    mask = np.zeros(ball.shape, np.uint8)
    if mask_values == 1:
        mask[ball] = 1
    mask[28, 10, 20] = 2
    files = {"t1": write(folder / "t1.nii.gz", image)}
    return Subject("s", write(folder / "m.nii.gz", mask), files)


@pytest.mark.parametrize("names", [{1: "head", 2: "tumour"}, {2: "tumour"}], ids=["head mask", "tumour mask"])
def test_crop_around_the_head(
    tmp_path: Path, tiny: Callable[..., DataConfig], write: Callable[..., Path], names: dict[int, str]
) -> None:
    subject = write_head(tmp_path, min(names), write)
    config = tiny(size=(20, 20, 20), crop_center="head", labels={"names": names})
    prepared = prepare(subject, config)
    bright = np.argwhere(prepared.image[0] > 0)
    np.testing.assert_allclose(bright.mean(axis=0), 9.5, atol=0.6)
    z, y, x = np.argwhere(prepared.mask == 2)[0]
    np.testing.assert_allclose(prepared.affine @ [x, y, z, 1], [20, 10, 28, 1])
    back = restore(prepared.mask, prepared.geometry)
    np.testing.assert_array_equal(back, read_nifti(subject.mask, dtype=None).data)
    centred = prepare(subject, config.model_copy(update={"crop_center": "volume"}))
    assert not np.array_equal(centred.affine, prepared.affine)


def test_a_box_ignores_specks_and_may_leave_the_volume() -> None:
    inside = np.zeros((6, 7, 8), bool)
    inside[0:3, 1:4, 2:6] = inside[5, 6, 7] = True
    assert box_around(inside) == ((2, 1, 0), (6, 4, 3))
    assert box_around(np.zeros((6, 7, 8), bool)) == ((0, 0, 0), (8, 7, 6))
    grid = Geometry((8, 7, 6), tuple(map(tuple, np.eye(4).tolist())), "native", "crop_pad", (6, 6, 6))
    grid = grid.around(box_around(inside))
    assert grid.start == (1, -1, -2)
    numbers = np.arange(6 * 7 * 8, dtype=np.int32).reshape(6, 7, 8)
    packed = fit(numbers, grid, -1)
    np.testing.assert_array_equal(packed[2:, 1:, :], numbers[0:4, 0:5, 1:7])
    assert (packed[:2] == -1).all()
    assert (packed[:, 0] == -1).all()
    assert Geometry.placed(grid, grid.affine) == grid


def test_foreground_label_counts_as_head(tiny: Callable[..., DataConfig]) -> None:
    image = np.zeros((4, 4, 4), np.float32)
    image[1, 2, 3] = 5
    mask = np.zeros((4, 4, 4), np.uint8)
    labels = tiny(labels={"names": {1: "tumour", 4: "rest"}, "foreground_label": 4}).labels
    assert np.argwhere(head(mask, image, labels)).tolist() == [[1, 2, 3]]
    assert not head(mask, None, labels).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voxel_size_mm": (1, 0, 1)}, "voxel_size_mm must be positive"),
        ({"voxel_size_mm": (1, 1, 1), "fit": "resize"}, "fit=resize sets the voxel size itself"),
        ({"crop_center": "head", "fit": "exact"}, "crop_center=head needs fit=crop_pad, found fit=exact"),
    ],
)
def test_settings_that_contradict(tiny: Callable[..., DataConfig], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(**changes)


def test_datasets_packed_before_these_settings_are_read(
    heads: Path, tmp_path: Path, tiny: Callable[..., DataConfig]
) -> None:
    pack(heads, tmp_path / "packed", tiny(size=(6, 6, 14)))
    new = open_packed(tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "index.json").read_text())
    for name in ("hooks", "voxel_size_mm", "crop_center", "zscore_clip"):
        del index["data"][name]
    write_json(tmp_path / "packed" / "index.json", index)
    old = open_packed(tmp_path / "packed")
    assert old.geometry(0) == new.geometry(0)
    np.testing.assert_array_equal(old.read_mask(0), restore_and_fit(new))


def restore_and_fit(packed: Any) -> np.ndarray:
    grid = packed.geometry(0)
    return fit(restore(packed.read_mask(0), grid), grid, 0)
