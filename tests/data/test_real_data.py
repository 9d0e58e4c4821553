"""The two published Med-DDPM cases, in and out again."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.data.geometry import restore
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.preprocess import prepare_mask
from hpc_ddpm.data.shards import INT16_SCALE, open_packed

BRATS = ("t1", "t1ce", "t2", "flair")


def as_reference_sees_it(path: Path) -> np.ndarray:
    """(X, Y, Z) float64 of the file."""
    return np.asarray(nib.load(path).dataobj, np.float64)


def test_whole_head(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "whole_head"
    data = load_config("whole_head_128").config.data
    report = pack(source, tmp_path / "out", data)
    assert [str(u.path.name) for u in report.unmatched] == ["sample_1.nii.gz"]
    packed = open_packed(tmp_path / "out")
    image, mask = packed.read(0)
    file = as_reference_sees_it(source / "image" / "sample_3.nii.gz")
    columns = file.reshape(-1, file.shape[-1])
    ranges = np.ptp(columns, axis=0)
    expected = ((columns - columns.min(0)) / np.where(ranges, ranges, 1) * 2 - 1).reshape(file.shape).T
    assert np.abs(image[0] / INT16_SCALE - expected).max() < 1.6e-5
    original = nib.load(source / "mask" / "sample_3.nii.gz")
    write_nifti(tmp_path / "back.nii.gz", restore(mask, packed.geometry(0)), packed.geometry(0).file_affine)
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(back.affine, original.affine, atol=1e-6)
    assert [name for name, _ in find_masks(source)] == ["sample_1", "sample_3"]
    other, _, _ = prepare_mask(source / "mask" / "sample_1.nii.gz", data)
    assert set(np.unique(other)) == {0, 1, 2}


def test_brats(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "brats2021"
    pack(source, tmp_path / "out", load_config("brats_192").config.data)
    packed = open_packed(tmp_path / "out")
    image, mask = packed.read(0)
    for channel, name in enumerate(BRATS):
        file = as_reference_sees_it(source / name / f"BraTS2021_01306_{name}.nii.gz")
        assert np.abs(image[channel] / INT16_SCALE - file.T).max() < 1.6e-5
    seg = nib.load(source / "seg" / "BraTS2021_01306_seg.nii.gz")
    np.testing.assert_array_equal(mask, np.asarray(seg.dataobj).T)
    np.testing.assert_allclose(packed.affine(0), seg.affine)
    assert (image[:, mask == 0] == -INT16_SCALE).all()


@pytest.mark.slow
def test_raw_brats_gives_the_published_case(shared_data: Path, tmp_path: Path) -> None:
    """The published case, put back on the raw 240 x 240 x 155 grid with raw labels, packs to itself."""
    source, case = shared_data / "brats2021", tmp_path / "raw" / "BraTS2021_01306"
    raw_affine = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    seg = as_reference_sees_it(source / "seg" / "BraTS2021_01306_seg.nii.gz").T
    files = {"seg": np.where(seg == 4, 0, np.where(seg == 3, 4, seg)).astype(np.uint8)}
    for name in BRATS:
        unit = as_reference_sees_it(source / name / f"BraTS2021_01306_{name}.nii.gz").T
        files[name] = ((unit + 1) * 500).astype(np.float32)
    for name, volume in files.items():
        whole = np.pad(volume, ((6, 5), (24, 24), (24, 24)))
        write_nifti(case / f"{case.name}_{name}.nii.gz", whole, raw_affine, compression_level=1)
    report = pack(tmp_path / "raw", tmp_path / "out", load_config("brats_192").config.data)
    assert report.layout == "brats_raw"
    packed = open_packed(tmp_path / "out")
    image, mask = packed.read(0)
    np.testing.assert_array_equal(mask, seg)
    np.testing.assert_allclose(packed.affine(0), nib.load(source / "t1" / "BraTS2021_01306_t1.nii.gz").affine)
    t1 = as_reference_sees_it(source / "t1" / "BraTS2021_01306_t1.nii.gz").T
    assert np.abs(image[0] / INT16_SCALE - t1).max() < 2e-5
