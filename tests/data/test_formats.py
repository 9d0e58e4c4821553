"""Volumes in other formats than NIfTI: each is written here by nibabel, SimpleITK or pydicom, and read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import true_affine, write_series, write_slice

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.data.formats import is_volume, stem, volume_files
from hpc_ddpm.data.nifti import read_header, read_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError

OBLIQUE = np.array([[0, -1.5, 0, 10], [0, 0, 2.0, -20], [-1.0, 0, 0, 30], [0, 0, 0, 1.0]])


@pytest.fixture
def volume() -> np.ndarray:
    """(D, H, W)."""
    return np.random.default_rng(0).integers(0, 200, (7, 5, 3)).astype(np.int16)


def write_itk(path: Path, data: np.ndarray, affine: np.ndarray, *, compress: bool = False, **keys: str) -> Path:
    """(D, H, W) with an affine in RAS+."""
    image = sitk.GetImageFromArray(data)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    for key, value in keys.items():
        image.SetMetaData(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), compress)
    return path


@pytest.mark.parametrize("name", ["a.nrrd", "a.seg.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.NRRD"])
@pytest.mark.parametrize("compress", [False, True])
def test_nrrd_and_metaimage(tmp_path: Path, volume: np.ndarray, name: str, compress: bool) -> None:
    path = write_itk(tmp_path / name.lower(), volume, OBLIQUE, compress=compress).rename(tmp_path / name)
    read = read_nifti(path, dtype=None)
    assert read.data.dtype == np.int16
    np.testing.assert_array_equal(read.data, volume)
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-6)
    header = read_header(path)
    assert (header.shape, header.has_affine) == ((3, 5, 7), True)
    assert is_volume(path)
    assert stem(path).lower() == "a"
    assert len(volume_files(path)) == (2 if name.endswith(("mhd", "nhdr")) else 1)
    assert all(file.is_file() for file in volume_files(path))


def test_a_pair_of_files(tmp_path: Path, volume: np.ndarray) -> None:
    nib.save(nib.Nifti1Pair(volume.T, OBLIQUE), tmp_path / "a.img")
    for name in ("a.hdr", "a.img"):
        read = read_nifti(tmp_path / name, dtype=None)
        np.testing.assert_array_equal(read.data, volume)
        np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-6)
        assert volume_files(tmp_path / name) == [tmp_path / "a.hdr", tmp_path / "a.img"]
    assert find_masks(tmp_path) == [("a", tmp_path / "a.hdr")]
    (tmp_path / "a.img").unlink()
    with pytest.raises(DataFormatError, match=r"a\.img: no such file"):
        read_nifti(tmp_path / "a.hdr")


def test_analyze_is_refused_by_name(tmp_path: Path, volume: np.ndarray) -> None:
    nib.save(nib.AnalyzeImage(volume.T, np.eye(4)), tmp_path / "a.img")
    with pytest.raises(DataFormatError, match=r"ANALYZE 7\.5 found, which does not say where left is; convert"):
        read_nifti(tmp_path / "a.hdr")


def test_what_is_refused(tmp_path: Path, volume: np.ndarray) -> None:
    layers = sitk.Image([3, 5, 7], sitk.sitkVectorUInt8, 2)
    sitk.WriteImage(layers, str(tmp_path / "two.seg.nrrd"))
    whole = write_itk(tmp_path / "whole.nrrd", volume, OBLIQUE).read_bytes()
    (tmp_path / "lie.nrrd").write_bytes(whole.replace(b"sizes: 3 5 7", b"sizes: 30000 5000 7000"))
    (tmp_path / "cut.nrrd").write_bytes(whole[:-50])
    (tmp_path / "text.mha").write_text("not a volume" * 100)
    (tmp_path / "empty.nrrd").write_bytes(b"")
    detached = write_itk(tmp_path / "in" / "a.mhd", volume, OBLIQUE).read_text()
    (tmp_path / "out.mhd").write_text(detached.replace("= a.raw", "= in/a.raw"))
    for name, message in {
        "two.seg.nrrd": "2 layers of segments that overlap in 3 dimensions found, one volume expected; export it",
        "lie.nrrd": "its header promises 2100000000000 bytes, it holds",
        "cut.nrrd": "damaged or not",
        "text.mha": "damaged or not",
        "empty.nrrd": "damaged or not",
        "out.mhd": "its voxels lie in another folder",
    }.items():
        for read in (read_nifti,):
            with pytest.raises(DataFormatError, match=message) as caught:
                read(tmp_path / name)
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
            assert "\n" not in str(caught.value)


def test_keys_that_name_a_person_are_warned_of(tmp_path: Path, volume: np.ndarray) -> None:
    path = write_itk(tmp_path / "a.nrrd", volume, OBLIQUE, PatientName="Doe", Segment0_ID="Segment_1", kind="Doe^Jane")
    assert set(read_header(path).texts) == {"PatientName", "kind"}


def test_without_the_reader_the_extra_is_named(
    tmp_path: Path, volume: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_itk(tmp_path / "a.nrrd", volume, OBLIQUE)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"NRRD and MetaImage files found, .* pip install 'hpc_ddpm\[dicom\]'"):
        read_nifti(path)


# ------------------------------------------------------------------------------- PNG files beside a series


def write_pngs(folder: Path, mask: np.ndarray, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for plane, name in zip(mask, names, strict=True):
        sitk.WriteImage(sitk.GetImageFromArray(plane), str(folder / name))
    return folder


@pytest.fixture
def slices() -> np.ndarray:
    """(slices, rows, columns)."""
    return np.random.default_rng(0).integers(-500, 500, (12, 10, 8))


@pytest.mark.parametrize("order", [1, -1])
def test_a_mask_of_png_files_lies_on_its_series(
    tmp_path: Path, slices: np.ndarray, tiny: Callable[..., DataConfig], order: int
) -> None:
    """Slices named along, or against, the way in which they are stacked, as in CHAOS."""
    mask = np.where(slices > 200, 255, 0).astype(np.uint8)
    for number, pixels in enumerate(slices):
        name = f"i{number if order > 0 else 99 - number:04d},0000b.dcm"
        write_slice(tmp_path / "image" / "1" / name, pixels, 2.0 * number, "1.2.3.4")
    write_pngs(tmp_path / "mask" / "1", mask[::order], [f"liver_GT_{number:03d}.png" for number in range(12)])
    assert is_volume(tmp_path / "mask" / "1")
    config = tiny(fit="exact", labels={"names": {1: "liver"}, "remap": {255: 1}}, orientation="native")
    assert not [finding for finding in check(tmp_path, config).findings if finding.severity == "error"]
    pack(tmp_path, tmp_path / "packed", config)
    image, labels = open_packed(tmp_path / "packed").read(0)
    np.testing.assert_array_equal(labels, mask // 255)
    assert image[0][labels > 0].min() > image[0][labels == 0].max()
    np.testing.assert_allclose(open_packed(tmp_path / "packed").affine(0), true_affine(), atol=1e-5)


def test_png_files_that_may_belong_to_other_slices_are_refused(tmp_path: Path, slices: np.ndarray) -> None:
    series, names = write_series(tmp_path / "s", slices), [f"{number:03d}" for number in range(12)]
    mask = (slices > 0).astype(np.uint8)
    unlike = write_pngs(tmp_path / "unlike", mask, [f"m{name}.png" for name in names])
    alike = write_pngs(tmp_path / "alike", mask, [f"{name}.png" for name in names])
    few = write_pngs(tmp_path / "few", mask[:3], ["a.png", "b.png", "c.png"])
    small = write_pngs(tmp_path / "small", mask[:, :5], [f"{name}.png" for name in names])
    place = [number * 7 % 12 for number in range(12)]  # as `write_series` names them
    np.testing.assert_array_equal(read_nifti(alike, dtype=None, beside=series).data, mask[place])
    for folder, message in {
        unlike: "which PNG belongs to which slice .* cannot be told",
        few: "3 PNG files found, 12 expected",
        small: "has 8x5 pixels, its slice 8x10",
    }.items():
        with pytest.raises(DataFormatError, match=message):
            read_nifti(folder, beside=series)
    with pytest.raises(DataFormatError, match="does not say where its voxels lie; it can be the mask"):
        read_nifti(alike)
