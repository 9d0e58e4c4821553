"""Real DICOM files, read with SimpleITK as an image beside a NIfTI mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import true_affine, write_series, write_slice

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.data.nifti import axis_codes, read_header, read_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.plan import build_rows
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError

SHAPE = (12, 10, 8)


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 500, SHAPE)


@pytest.mark.parametrize("name", ["{:03d}.dcm", "{:03d}.IMA", "1.2.840.{:03d}", "slice {:03d} ü"])
def test_voxels_and_place(tmp_path: Path, volume: np.ndarray, name: str) -> None:
    slopes = np.linspace(1, 2, len(volume)).round(3)  # the first is whole, as its voxels are then
    folder = write_series(tmp_path / "a series", volume, slopes, name=name)
    (folder / "README.txt").write_text("not an image " * 50)
    read = read_nifti(folder)
    np.testing.assert_allclose(read.data, volume * slopes[:, None, None] - 100, rtol=1e-6)
    np.testing.assert_allclose(read.affine, true_affine(), atol=1e-6)
    assert axis_codes(read.affine) == "PLI"
    header = read_header(folder)
    assert (header.shape, header.is_scaled, header.has_affine) == (SHAPE[::-1], True, True)
    turned = read_nifti(folder, "RAS")
    assert axis_codes(turned.affine) == "RAS"
    voxel = np.linalg.solve(turned.affine, true_affine() @ [3, 4, 5, 1])[:3]
    x, y, z = np.rint(voxel).astype(int)
    np.testing.assert_allclose([x, y, z], voxel, atol=1e-6)
    assert turned.data[z, y, x] == read.data[5, 4, 3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "006.dcm").unlink(), "missing slices: 4 mm between"),
        (lambda f: write_slice(f / "x.dcm", np.ones((10, 8)), 4, "1.2.3.4"), "duplicate slices: 002.dcm and x.dcm lie"),
        (lambda f: write_slice(f / "x.dcm", np.ones((10, 8)), 24, "1.2.9"), "2 DICOM series found in one folder"),
        (lambda f: write_slice(f / "x.dcm", np.ones((9, 8)), 24, "1.2.3.4"), "slices of different shapes"),
        (
            lambda f: write_slice(
                f / "x.dcm", np.ones((10, 8)), 24, "1.2.3.4", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]
            ),
            "slices of different orientations",
        ),
        (lambda f: (f / "x.dcm").write_bytes(b"no image"), "x.dcm is damaged or not a DICOM image"),
        (
            lambda f: write_slice(
                f / "x.dcm", np.ones((10, 8)), 24, "1.2.3.4", RescaleSlope=None, RescaleIntercept=None
            ),
            "x.dcm is damaged or not a DICOM image",
        ),
        (
            lambda f: write_slice(f / "x.dcm", np.ones((10, 8)), 24, "1.2.3.4", Rows=65535, Columns=65535),
            "its header promises 8589672450 bytes, the file has",
        ),
        (lambda f: [file.unlink() for file in f.iterdir()], "no DICOM files found"),
    ],
)
def test_series_that_are_none(tmp_path: Path, volume: np.ndarray, spoil: Callable[[Path], None], message: str) -> None:
    folder = write_series(tmp_path / "s", volume)
    spoil(folder)
    with pytest.raises(DataFormatError, match=message) as error:
        read_nifti(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("tag", ["ImageOrientationPatient", "PixelSpacing"])
def test_a_place_that_the_reader_made_up_is_none(tmp_path: Path, volume: np.ndarray, tag: str) -> None:
    for number, pixels in enumerate(volume):
        write_slice(tmp_path / "s" / f"{number:03d}.dcm", pixels, 2 * number, "1.2.3.4", **{tag: None})
    assert not read_header(tmp_path / "s").has_affine


@pytest.mark.parametrize("source", ["tree", "table"])
def test_series_beside_a_nifti_mask_are_checked_and_packed(
    tmp_path: Path, volume: np.ndarray, write: Callable[..., Path], source: str
) -> None:
    volume[3, 4, 5] = 499
    mask = (volume > 0).astype(np.uint8)
    for subject in ("a", "b"):
        write_series(tmp_path / "image" / subject, volume, series=f"1.2.{ord(subject)}")
        (tmp_path / "mask").mkdir(exist_ok=True)
        write(tmp_path / "mask" / f"{subject}.nii.gz", mask, affine=true_affine())
    table = tmp_path / "subjects.csv"
    table.write_text("subject,mask,t1\na,mask/a.nii.gz,image/a\nb,mask/b.nii.gz,image/b\n")
    place = table if source == "table" else tmp_path
    config = DataConfig(size=(10, 8, 12), fit="exact", labels={"names": {1: "bright"}}, layout="auto")
    kinds = {finding.kind for finding in check(place, config).findings}
    assert not kinds & {"unreadable", "grid-affine", "unmatched-file", "cannot-pack", "size-mismatch"}
    pack(place, tmp_path / "packed", config)
    packed = open_packed(tmp_path / "packed")
    image, labels = packed.read(0)
    assert len(packed) == 2
    assert image[0].shape == labels.shape == (12, 8, 10)
    assert image[0][labels > 0].min() > image[0][labels == 0].max()


def test_a_changed_slice_is_a_changed_subject(tmp_path: Path, volume: np.ndarray, write: Callable[..., Path]) -> None:
    write_series(tmp_path / "image" / "a", volume)
    (tmp_path / "mask").mkdir()
    write(tmp_path / "mask" / "a.nii", np.ones(SHAPE, np.uint8))
    assert find_masks(tmp_path / "mask") == [("a", tmp_path / "mask" / "a.nii")]
    config = DataConfig()
    before = build_rows(config, discover(tmp_path, config).subjects)
    write_slice(tmp_path / "image" / "a" / "000.dcm", volume[0] + 1, 0, "1.2.3.4", RescaleSlope=2)
    assert build_rows(config, discover(tmp_path, config).subjects)[0].key != before[0].key


def test_without_the_reader_the_extra_is_named(
    tmp_path: Path, volume: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(tmp_path / "s", volume)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(
        ConfigError, match=r"s: DICOM files found, their reader is not installed; pip install 'hpc_ddpm\[dicom\]'"
    ):
        read_nifti(folder)
