from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.geometry import Geometry, restore
from hpc_ddpm.data.intensity import normalize
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.preprocess import prepare, prepare_mask
from hpc_ddpm.errors import DataFormatError

FILE = Path("i.nii")
OBLIQUE = np.array([[0, -1.5, 0.1, 10], [0.2, 0, 2.0, -20], [-1.0, 0.1, 0, 30], [0, 0, 0, 1.0]])


def subject(write: Callable[..., Path], folder: Path, mask: Any, affine: Any = None, **images: Any) -> Subject:
    """Files of a subject; an image that is None is random."""
    mask_file = write(folder / "m.nii.gz", mask, affine=affine)
    images = images or {"t1": None}
    files = {
        name: write(folder / f"{name}.nii.gz", data, mask.shape, affine, seed=i)
        for i, (name, data) in enumerate(images.items())
    }
    return Subject("s", mask_file, files)


# ------------------------------------------------------------------------------------------- intensities


def test_whole_head_mode_scales_each_z_slice(tiny: Callable[..., DataConfig]) -> None:
    volume = np.random.default_rng(0).normal(0, 50, (12, 10, 8)).astype(np.float32)
    volume[3] = 7
    result, intensity = normalize(volume, tiny(normalization="med_ddpm_whole_head"), FILE)
    columns = volume.T.reshape(-1, 12).astype(np.float64)  # (X, Y, Z) with one column per slice
    ranges = np.ptp(columns, axis=0)
    expected = (columns - columns.min(0)) / np.where(ranges == 0, 1, ranges) * 2 - 1
    np.testing.assert_allclose(result, expected.reshape(8, 10, 12).T, atol=1e-7)
    assert (result[3] == -1).all()
    assert intensity.tolist() == [volume.min(), volume.max()]


def test_brats_mode_scales_after_the_crop(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    raw = np.random.default_rng(0).gamma(2, 100, (16, 14, 10)).astype(np.float32)
    raw[0, 0, 0] = 1e5  # outside the crop
    mask = np.pad(box_mask, 2)[:, :, 1:-1]
    config = tiny(normalization="med_ddpm_brats")
    image = prepare(subject(write, tmp_path, mask, t1=raw), config).image[0]
    crop = raw[2:14, 2:12, 1:9].astype(np.float64)
    np.testing.assert_allclose(image, (crop - crop.min()) / (crop.max() - crop.min()) * 2 - 1, atol=1e-6)


def test_percentiles_see_the_volume_before_the_crop(tiny: Callable[..., DataConfig]) -> None:
    volume = np.random.default_rng(0).normal(0, 50, (12, 10, 8)).astype(np.float32)
    result, intensity = normalize(volume, tiny(low=5, high=90), FILE)
    low, high = np.percentile(volume, [5, 90])
    np.testing.assert_allclose(result, np.clip((volume - low) / (high - low), 0, 1) * 2 - 1, atol=1e-5)
    np.testing.assert_allclose(intensity, [low, high], rtol=1e-5)
    assert (result.min(), result.max(), result.dtype) == (-1, 1, np.float32)


def test_window_and_none(tiny: Callable[..., DataConfig]) -> None:
    volume = np.array([-1000, -160, 40, 240, 3000], np.float32)
    result, intensity = normalize(volume, tiny(normalization="window", low=-160, high=240), FILE)
    assert result.tolist() == [-1, -1, 0, 1, 1]
    assert intensity.tolist() == [-160, 240]
    unit = np.array([-1, 0.25, 1], np.float32)
    np.testing.assert_array_equal(normalize(unit, tiny(normalization="none"), FILE)[0], unit)


@pytest.mark.parametrize(("has_head", "clip"), [(True, 2), (False, 12)])
def test_zscore_sees_the_head(
    tiny: Callable[..., DataConfig],
    write: Callable[..., Path],
    tmp_path: Path,
    box_mask: np.ndarray,
    has_head: bool,
    clip: int,
) -> None:
    rng = np.random.default_rng(0)
    inside = box_mask > 0
    raw = np.where(inside, rng.normal(100, 10, inside.shape), rng.normal(5, 1, inside.shape)).astype(np.float32)
    mask = box_mask if has_head else np.where(box_mask == 2, box_mask, 0).astype(np.uint8)
    names = {1: "head", 2: "tumour"} if has_head else {2: "tumour"}
    config = tiny(normalization="zscore", zscore_clip=clip, labels={"names": names}, size=(8, 10, 20))
    prepared = prepare(subject(write, tmp_path, mask, t1=raw), config)
    mean, std = raw[inside].mean(), raw[inside].std()
    np.testing.assert_allclose(prepared.intensity, [[mean - clip * std, mean + clip * std]], rtol=1e-5)
    image = prepared.image[0]
    np.testing.assert_allclose(image[4:16], np.clip((raw - mean) / std / clip, -1, 1), atol=1e-5)
    assert (image[:4] == image[4:16].min()).all()
    low, high = prepared.intensity[0]
    kept = np.abs(image[4:16]) < 1
    np.testing.assert_allclose(((image[4:16] + 1) / 2 * (high - low) + low)[kept], raw[kept], rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ([5, 5, 5], {}, "every voxel is 5"),
        ([0, 0, 0, 0, 9], {"low": 0, "high": 50}, "percentiles 0 and 50 are both 0"),
        ([-1, 1.5], {"normalization": "none"}, r"values from -1 to 1.5 found, \[-1, 1\] expected"),
    ],
)
def test_intensity_mistakes(
    tiny: Callable[..., DataConfig], values: list[float], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataFormatError, match=f"i.nii: {message}"):
        normalize(np.array(values, np.float32), tiny(**changes), FILE)


# ---------------------------------------------------------------------------------------------- geometry


def geometry(shape: Any, size: Any, fit: str, codes: str) -> Geometry:
    return Geometry(shape, tuple(map(tuple, OBLIQUE.tolist())), codes, fit, size)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "native"])
@pytest.mark.parametrize("shape", [(9, 7, 5), (4, 7, 10), (6, 6, 6)])
def test_crop_pad_and_back(
    tmp_path: Path, tiny: Callable[..., DataConfig], shape: tuple[int, int, int], codes: str
) -> None:
    mask = np.random.default_rng(0).integers(0, 3, shape[::-1]).astype(np.uint8)
    write_nifti(tmp_path / "m.nii", mask, OBLIQUE)
    config = tiny(size=(6, 7, 6), orientation=codes, labels={"names": {1: "a", 2: "b"}})
    packed, affine, grid = prepare_mask(tmp_path / "m.nii", config)
    assert packed.shape == (6, 7, 6)
    back = restore(packed, grid)
    assert back.shape == mask.shape
    kept = restore(np.ones_like(packed), grid) == 1
    np.testing.assert_array_equal(back[kept], mask[kept])
    assert (back[~kept] == 0).all()
    assert world_set(packed, affine) == world_set(back, OBLIQUE)


def world_set(mask: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    """World positions and values of the labelled voxels."""
    z, y, x = np.nonzero(mask)
    places = (affine @ np.stack([x, y, z, np.ones_like(x)]))[:3].T
    return {(*np.round(p, 3).tolist(), int(v)) for p, v in zip(places, mask[z, y, x], strict=True)}


def test_an_odd_crop_starts_as_in_the_published_brats_case() -> None:
    raw = geometry((240, 240, 155), (192, 192, 144), "crop_pad", "native")
    offset = np.linalg.inv(raw.file_affine) @ raw.affine
    np.testing.assert_allclose(offset[:3, 3], [24, 24, 6], atol=1e-9)


@pytest.mark.parametrize(("shape", "size"), [((20, 24, 16), (10, 12, 8)), ((10, 12, 8), (20, 24, 16))])
def test_resize_keeps_the_field_of_view(shape: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    grid = geometry(shape, size, "resize", "native")
    for corner in (np.array([-0.5, -0.5, -0.5]), None):
        old = corner if corner is not None else np.array(shape) - 0.5
        new = corner if corner is not None else np.array(size) - 0.5
        np.testing.assert_allclose(grid.affine @ [*new, 1], grid.file_affine @ [*old, 1], atol=1e-9)


def test_resize_samples_a_ramp_at_the_right_places() -> None:
    small = geometry((8, 8, 8), (5, 5, 5), "resize", "native")
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32), (5, 5, 5))
    back = restore(ramp, small)
    expected = np.clip((np.arange(8) + 0.5) * 5 / 8 - 0.5, 0, 4)
    np.testing.assert_allclose(back, np.broadcast_to(expected, (8, 8, 8)), atol=1e-6)


def test_resize_of_images_is_antialiased_and_of_masks_nearest(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path
) -> None:
    shape = (36, 30, 24)
    mask = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    noise = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    prepared = prepare(
        subject(write, tmp_path, mask, t1=noise),
        tiny(fit="resize", normalization="none", labels={"names": {1: "a", 2: "b"}}),
    )
    np.testing.assert_array_equal(prepared.mask, mask[1::3, 1::3, 1::3])
    assert 0 < prepared.image.std() < 0.5 * noise.std()
    assert abs(prepared.image.mean() - noise.mean()) < 0.05


def test_floats_are_filled_with_background() -> None:
    grid = geometry((8, 8, 8), (4, 4, 4), "crop_pad", "RAS")
    volume = np.ones((4, 4, 4), np.float32)
    assert restore(volume, grid).min() == -1
    assert restore(volume, grid, fill=0).min() == 0
    assert restore(volume.astype(np.uint8), grid).min() == 0


# ---------------------------------------------------------------------------------------------- subjects


def test_prepare(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    config = tiny(modalities=("t1", "t2"))
    prepared = prepare(subject(write, tmp_path, box_mask, t1=None, t2=None), config)
    assert (prepared.image.shape, prepared.image.dtype) == ((2, 12, 10, 8), np.float32)
    assert (prepared.image.min(), prepared.image.max()) == (-1, 1)
    assert not np.array_equal(prepared.image[0], prepared.image[1])
    np.testing.assert_array_equal(prepared.mask, box_mask)
    np.testing.assert_array_equal(prepared.affine, np.eye(4))
    assert prepared.intensity.shape == (2, 2)


@pytest.mark.parametrize("fit", ["crop_pad", "resize"])
def test_raw_brats_gets_its_brain_from_the_first_modality(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, fit: str
) -> None:
    raw = np.zeros((24, 20, 16), np.float32)
    raw[4:20, 4:16, 4:12] = np.random.default_rng(0).uniform(1, 9, (16, 12, 8))
    tumour = np.zeros(raw.shape, np.uint8)
    tumour[9:12, 9:12, 9:11] = 4
    names = {1: "necrosis", 2: "edema", 3: "enhancing", 4: "brain"}
    config = tiny(
        layout="brats_raw",
        normalization="med_ddpm_brats",
        fit=fit,
        labels={"names": names},
        size=(12, 16, 20),
    )
    prepared = prepare(subject(write, tmp_path, tumour, t1=raw), config)
    assert sorted(np.unique(prepared.mask)) == [0, 3, 4]
    if fit == "crop_pad":
        np.testing.assert_array_equal(prepared.mask > 0, raw[2:22, 2:18, 2:14] > 0)
        np.testing.assert_array_equal(prepared.mask > 0, prepared.image[0] > -1)
    with pytest.raises(DataFormatError, match=r"label 4 \(brain\) is missing, found \[3\]"):
        prepare_mask(tmp_path / "m.nii.gz", config)


def test_different_grids(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    files = subject(write, tmp_path, box_mask)
    write(files.images["t1"], shape=(12, 10, 9))
    with pytest.raises(DataFormatError, match=r"t1.nii.gz: its grid 9x10x12 .* of its mask .*m.nii.gz: 8x10x12"):
        prepare(files, tiny())
    moved = np.eye(4)
    moved[0, 3] = 0.5
    write(files.images["t1"], affine=moved)
    with pytest.raises(DataFormatError, match=r"\[1 0 0 0.5; .*\[1 0 0 0; "):
        prepare(files, tiny())
    moved[0, 3] = 0.01
    write(files.images["t1"], affine=moved)
    prepare(files, tiny())


def test_the_same_grid_stored_in_another_order_is_accepted(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    image = np.random.default_rng(0).random(box_mask.shape).astype(np.float32)
    files = subject(write, tmp_path, box_mask, t1=image)
    straight = prepare(files, tiny())
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 7
    write(files.images["t1"], image[:, :, ::-1], affine=flipped)
    np.testing.assert_array_equal(prepare(files, tiny()).image, straight.image)


def test_bad_voxels_and_sizes(
    tiny: Callable[..., DataConfig], write: Callable[..., Path], tmp_path: Path, box_mask: np.ndarray
) -> None:
    image = np.random.default_rng(0).random(box_mask.shape).astype(np.float32)
    image[0, 0, :2] = np.nan, np.inf
    with pytest.raises(DataFormatError, match=r"t1.nii.gz: 2 voxels are NaN or infinite"):
        prepare(subject(write, tmp_path, box_mask, t1=image), tiny())
    with pytest.raises(DataFormatError, match=r"\(8, 10, 12\) voxels found, data.size=\[8, 8, 8\] expected"):
        prepare_mask(tmp_path / "m.nii.gz", tiny(size=(8, 8, 8), fit="exact"))
    prepare_mask(tmp_path / "m.nii.gz", tiny(fit="exact"))
    write(tmp_path / "m.nii.gz", box_mask * 0.5)
    with pytest.raises(DataFormatError, match=r"m.nii.gz: fractional label 0.5"):
        prepare_mask(tmp_path / "m.nii.gz", tiny())
