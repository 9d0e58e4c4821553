import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from hpc_ddpm.data.check.findings import KINDS
from hpc_ddpm.data.formats import stem
from hpc_ddpm.data.nifti import axis_codes, oriented_grid, read_header, read_nifti, to_file_order, write_nifti
from hpc_ddpm.errors import ConfigError, DataFormatError

SHEARED = np.array([[0, -1.5, 0.1, 10], [0.2, 0, 2.0, -20], [-1.0, 0.1, 0, 30], [0, 0, 0, 1.0]])


def world_values(data: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    """Voxel value by rounded world position; data is (D, H, W)."""
    z, y, x = np.indices(data.shape).reshape(3, -1)
    places = (affine @ np.stack([x, y, z, np.ones_like(x)]))[:3].T
    return {tuple(np.round(p, 3)): float(v) for p, v in zip(places, data.ravel(), strict=True)}


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "native"])
@pytest.mark.parametrize("affine", [np.diag([-1.0, 2, 3, 1]), SHEARED])
def test_orientation_keeps_every_voxel_at_its_place(tmp_path: Path, codes: str, affine: np.ndarray) -> None:
    array = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz", codes)
    assert volume.file_shape == (3, 4, 5)
    assert world_values(volume.data, volume.affine) == world_values(array.T, volume.file_affine)
    if codes != "native":
        assert "".join(nib.aff2axcodes(volume.affine)) == codes
    shape, grid = oriented_grid(volume.file_shape, volume.file_affine, codes)
    assert shape == volume.data.shape[::-1]
    np.testing.assert_allclose(grid, volume.affine)
    np.testing.assert_array_equal(to_file_order(volume.data, volume.file_affine, codes), array.T)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a ü.NII.GZ", "ス a.NII"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_round_trip(tmp_path: Path, name: str, dtype: type) -> None:
    array = np.random.default_rng(1).integers(0, 200, (3, 5, 7)).astype(dtype)
    affine = np.array([[0, -1.5, 0, 10], [0, 0, 2.0, -20], [-1.0, 0, 0, 30], [0, 0, 0, 1.0]])
    write_nifti(tmp_path / name, array, affine)
    volume = read_nifti(tmp_path / name, dtype=None)
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.data, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    header = nib.load(tmp_path / name).header
    assert header.get_xyzt_units()[0] == "mm"
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_same_volume_same_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, array, np.eye(4), compression_level=1)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert read_nifti(tmp_path / "a.nii.gz", dtype=None).data.dtype == np.float32


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", np.ones((2, 2, 2)), np.eye(4))
    before = (tmp_path / "a.nii.gz").read_bytes()
    with pytest.raises(ValueError):
        write_nifti(tmp_path / "a.nii.gz", np.zeros((2, 2, 2)), np.eye(4), compression_level=77)
    assert (tmp_path / "a.nii.gz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_scale_factors_of_integers(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(0.5, -7)
    nib.save(image, tmp_path / "a.nii.gz")
    stored = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj.get_unscaled())
    expected = stored.T.astype(np.float64) * 0.5 - 7
    volume = read_nifti(tmp_path / "a.nii.gz")
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(volume.data, expected)
    assert np.ptp(expected) > 0


def test_four_dimensions(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((3, 4, 5, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1, 1, 1])), tmp_path / "two.nii")
    nib.save(nib.Nifti1Image(array[..., :1], np.eye(4)), tmp_path / "one.nii")
    assert read_nifti(tmp_path / "one.nii").data.shape == (5, 4, 3)
    channels = read_nifti(tmp_path / "two.nii", "RAS", channels=True).data
    np.testing.assert_array_equal(channels, array[::-1].transpose(3, 2, 1, 0))
    with pytest.raises(DataFormatError, match=r"two.nii: shape \(3, 4, 5, 2\) found, one 3-D volume expected"):
        read_nifti(tmp_path / "two.nii")


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh", "ü b.MGZ", "a.MGH"])
def test_freesurfer_files(tmp_path: Path, name: str) -> None:
    array = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    nib.save(nib.MGHImage(array, np.diag([2.0, 2, 2, 1])), tmp_path / name)
    (tmp_path / f"link {name}").symlink_to(tmp_path / name)
    volume = read_nifti(tmp_path / f"link {name}")
    np.testing.assert_array_equal(volume.data, array.T)
    np.testing.assert_array_equal(volume.affine, np.diag([2.0, 2, 2, 1]))
    assert stem(tmp_path / "a.b.mgz") == "a.b"


def damaged_files(folder: Path) -> dict[str, str]:
    noise = np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / "whole.nii.gz")
    nib.save(nib.Nifti1Image(noise, np.eye(4)), folder / "whole.nii")
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:3000])
    (folder / "cut.nii").write_bytes((folder / "whole.nii").read_bytes()[:3000])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"not a volume" * 100))
    (folder / "text.nii").write_text("not a volume" * 100)
    (folder / "plain.nii.gz").write_bytes((folder / "whole.nii").read_bytes())
    flipped = bytearray((folder / "whole.nii.gz").read_bytes())
    flipped[len(flipped) // 2] ^= 0x55
    (folder / "flipped.nii.gz").write_bytes(flipped)
    huge = bytearray((folder / "whole.nii").read_bytes())
    huge[42:48] = b"\xff\x7f" * 3
    (folder / "huge.nii.gz").write_bytes(gzip.compress(huge))
    names = ("huge.nii.gz", "cut.nii.gz", "cut.nii", "empty.nii.gz", "text.nii.gz", "text.nii", "flipped.nii.gz")
    return dict.fromkeys(names, "damaged or not a NIfTI file") | {
        "absent.nii": "no such file",
        "picture.png": "no such file",
    }


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    for name, message in damaged_files(tmp_path).items():
        with pytest.raises(DataFormatError, match=message) as caught:
            read_nifti(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_an_affine_x_runs_from_right_to_left(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.uint8), None)
    nib.save(image, tmp_path / "a.nii")
    assert not read_header(tmp_path / "a.nii").has_affine
    assert axis_codes(read_nifti(tmp_path / "a.nii").affine) == "LAS"
    assert KINDS["no-affine"].advice.endswith("without one x is taken to run from right to left")


def test_wrong_kinds_of_input(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataFormatError, match="not a NIfTI name"):
        read_nifti(tmp_path / "a.png")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.complex64), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(DataFormatError, match="voxels of type complex64 found, numbers expected"):
        read_nifti(tmp_path / "c.nii")
    write_nifti(tmp_path / "good.nii", np.ones((2, 2, 2)), np.eye(4))
    flat = bytearray((tmp_path / "good.nii").read_bytes())
    flat[312:328] = bytes(16)  # srow_z of the header
    (tmp_path / "flat.nii").write_bytes(flat)
    with pytest.raises(DataFormatError, match=r"flat\.nii: its affine is singular"):
        read_nifti(tmp_path / "flat.nii")
    with pytest.raises(ConfigError, match=r"data\.orientation=RLS names an axis twice"):
        read_nifti(tmp_path / "good.nii", "RLS")


def test_wrong_kinds_of_output(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"written as \.nii or \.nii\.gz"):
        write_nifti(tmp_path / "a.mgz", np.ones((2, 2, 2)), np.eye(4))
    with pytest.raises(DataFormatError, match=r"shape \(1, 2, 2, 2\) found, \(D, H, W\) expected"):
        write_nifti(tmp_path / "a.nii", np.ones((1, 2, 2, 2)), np.eye(4))
