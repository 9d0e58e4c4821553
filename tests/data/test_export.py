"""Packed volumes back to NIfTI: on the packed and on the original grid, in both units, and packable again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, load_config
from hpc_ddpm.data.export import export
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError

LPS = np.array([[-2.0, 0, 0, 20], [0, -2, 0, 30], [0, 0, 3, -10], [0, 0, 0, 1]])
INT16_STEP = 0.5 / 32767


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def make_source(root: Path, shape: tuple[int, int, int]) -> Path:
    """Two LPS subjects; the mask lies well inside."""
    for number in range(2):
        rng = np.random.default_rng(number)
        mask = np.zeros(shape[::-1], np.uint8)
        mask[4:-4, 4:-4, 4:-4] = 1
        mask[6:8, 6:8, 6:8] = 2
        image = np.where(mask, rng.uniform(100, 900, mask.shape), 0).astype(np.float32)
        write_nifti(root / "mask" / f"s{number}.nii.gz", mask, LPS)
        write_nifti(root / "t1" / f"s{number}.nii.gz", image, LPS)
    return root


def test_original_grid_and_intensities(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", (14, 16, 18))
    pack(source, tmp_path / "packed", DataConfig(size=(10, 20, 16), low=0, high=100))
    progress: list[tuple[int, int]] = []
    count = export(
        tmp_path / "packed",
        tmp_path / "out",
        original_grid=True,
        intensities="original",
        num_workers=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert (count, progress) == (2, [(1, 2), (2, 2)])
    for name in ("s0.nii.gz", "s1.nii.gz"):
        for role, tolerance in (("mask", 0.0), ("t1", 900 * INT16_STEP)):
            (before, affine), (after, new_affine) = read(source / role / name), read(tmp_path / "out" / role / name)
            np.testing.assert_allclose(after, before, atol=tolerance)
            np.testing.assert_allclose(new_affine, affine, atol=1e-5)
        assert read(tmp_path / "out" / "mask" / name)[0].dtype == np.uint8


@pytest.mark.parametrize(("normalization", "outside"), [("percentile", 0.0), ("zscore", 206.0)])
def test_outside_a_crop_without_background_is_background(tmp_path: Path, normalization: str, outside: float) -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:10, 2:10, 2:10] = 1
    mask[5, 5, 5] = 2
    image = np.where(mask, np.linspace(206, 900, mask.size).reshape(mask.shape), 0).astype(np.float32)
    image[2:10, 2:10, 2:10] += 206 - image[2, 2, 2]
    for role, volume in (("mask", mask), ("t1", image)):
        write_nifti(tmp_path / "source" / role / "s.nii.gz", volume, LPS)
    data = DataConfig(size=(8, 8, 8), normalization=normalization, low=0, high=100, zscore_clip=20)
    pack(tmp_path / "source", tmp_path / "packed", data)
    export(tmp_path / "packed", tmp_path / "out", original_grid=True, intensities="original")
    assert read(tmp_path / "out" / "t1" / "s.nii.gz")[0][0, 0, 0] == pytest.approx(outside, abs=1)


def test_what_is_exported_packs_to_itself(tmp_path: Path) -> None:
    data = DataConfig(size=(10, 20, 16))
    pack(make_source(tmp_path / "source", (14, 16, 18)), tmp_path / "packed", data)
    assert export(tmp_path / "packed", tmp_path / "out") == 2
    pack(tmp_path / "out", tmp_path / "again", data.model_copy(update={"normalization": "none"}))
    one, two = open_packed(tmp_path / "packed"), open_packed(tmp_path / "again")
    for subject in one.subjects():
        for before, after in zip(one.read(subject.index), two.read(subject.index), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_allclose(one.affine(subject.index), two.affine(subject.index), atol=1e-5)


def test_finished_files_stay_and_others_are_refused(tmp_path: Path) -> None:
    pack(make_source(tmp_path / "source", (12, 12, 12)), tmp_path / "packed", DataConfig(size=(12, 12, 12)))
    (split,) = {subject.split for subject in open_packed(tmp_path / "packed").subjects() if subject.id == "s0"}
    assert export(tmp_path / "packed", tmp_path / "out", split=split) == 1
    first = tmp_path / "out" / "mask" / "s0.nii.gz"
    stamp = first.stat().st_mtime_ns
    assert export(tmp_path / "packed", tmp_path / "out") == 2
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"asked for .*original_grid=True.*; choose another --out or empty it"):
        export(tmp_path / "packed", tmp_path / "out", original_grid=True)
    with pytest.raises(ConfigError, match="holds other files"):
        export(tmp_path / "packed", tmp_path / "source")
    (tmp_path / "out" / "export.json").write_text("{")
    with pytest.raises(ConfigError, match=r"export\.json: not readable as JSON .*; choose another --out or empty it"):
        export(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(ConfigError, match="'raw' found, expected one of unit, original"):
        export(tmp_path / "packed", tmp_path / "new", intensities="raw")


def test_slices_scaled_one_by_one_cannot_be_undone(tmp_path: Path) -> None:
    data = DataConfig(size=(12, 12, 12), normalization="med_ddpm_whole_head")
    pack(make_source(tmp_path / "source", (12, 12, 12)), tmp_path / "packed", data)
    with pytest.raises(ConfigError, match="every slice by itself, which cannot be undone; export with"):
        export(tmp_path / "packed", tmp_path / "out", intensities="original")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "preset", "changes", "mask"),
    [
        ("whole_head", "whole_head_128", {"normalization": "none"}, "mask/sample_3.nii.gz"),
        ("brats2021", "brats_192", {}, "seg/BraTS2021_01306_seg.nii.gz"),
        pytest.param(
            "brats2021",
            "brats_192",
            {"size": (160, 192, 144), "storage_dtype": "float32"},
            "seg/BraTS2021_01306_seg.nii.gz",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_real_cases_come_back_on_their_own_grid(
    shared_data: Path,
    tmp_path: Path,
    source: str,
    preset: str,
    changes: dict[str, Any],
    mask: str,
    nifti_equal: Callable[..., None],
) -> None:
    data = load_config(preset).config.data.model_copy(update=changes)
    pack(shared_data / source, tmp_path / "packed", data)
    export(tmp_path / "packed", tmp_path / "out", original_grid=True, intensities="original")
    (subject,) = (entry.id for entry in open_packed(tmp_path / "packed").subjects())
    nifti_equal(shared_data / source / mask, tmp_path / "out" / "mask" / f"{subject}.nii.gz", 0, changes)
    for modality in data.modalities:
        folder = "image" if source == "whole_head" else modality
        (original,) = (shared_data / source / folder).glob(f"{subject}*")
        tolerance = INT16_STEP * 1.05 if data.storage_dtype == "int16" else 1e-6
        nifti_equal(original, tmp_path / "out" / modality / f"{subject}.nii.gz", tolerance, changes)


@pytest.fixture
def nifti_equal() -> Callable[..., None]:
    """Compare two files where the packed field of view lies; outside it the second one is background."""

    def compare(before: Path, after: Path, tolerance: float, changes: dict[str, Any]) -> None:
        (one, affine), (two, new_affine) = read(before), read(after)
        assert one.shape == two.shape
        np.testing.assert_allclose(new_affine, affine, atol=1e-5)
        margin = (one.shape[0] - changes.get("size", one.shape)[0]) // 2
        inside = slice(margin, one.shape[0] - margin)
        np.testing.assert_allclose(two[inside], one[inside], atol=tolerance)
        assert (two[:margin] == two.min()).all()

    return compare


def test_subjects_that_were_packed_anew_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", (12, 12, 12))
    data = DataConfig(size=(12, 12, 12), shard_size_gib=5e-6)  # a shard for each subject
    pack(source, tmp_path / "packed", data)
    export(tmp_path / "packed", tmp_path / "out")
    for new in ("s2", "s1"):
        for role in ("mask", "t1"):
            volume, affine = read(source / role / "s0.nii.gz")
            write_nifti(source / role / f"{new}.nii.gz", volume.T[::-1], affine)
        if new == "s2":
            pack(source, tmp_path / "packed", data)
            assert export(tmp_path / "packed", tmp_path / "out") == 3
    pack(source, tmp_path / "packed", data, overwrite=True)
    assert len(list((tmp_path / "packed").glob("*.h5"))) == 3
    with pytest.raises(ConfigError, match=r"holds 1 subjects that are .* packed anew \(s1\); choose another --out or"):
        export(tmp_path / "packed", tmp_path / "out")
    assert export(tmp_path / "packed", tmp_path / "new") == 3


def test_a_modality_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", (12, 12, 12))
    (source / "t.csv").write_text("subject,mask,../t1\ns,mask/s0.nii.gz,t1/s0.nii.gz\n")
    pack(source / "t.csv", tmp_path / "packed", DataConfig(size=(12, 12, 12), modalities=("../t1",)))
    with pytest.raises(ConfigError, match=r"modality '\.\./t1' cannot name a folder"):
        export(tmp_path / "packed", tmp_path / "out")
