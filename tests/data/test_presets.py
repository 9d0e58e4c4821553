"""Each preset reads the layout of the data that it is for: a small replica of it is packed with the preset's labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed

SIDE = 16
Volume = np.ndarray


def image(low: float = 100, high: float = 1000) -> Volume:
    """A body on an even background."""
    volume = np.full((SIDE,) * 3, low, np.float32)
    body = np.s_[3:13, 3:13, 3:13]
    volume[body] = np.random.default_rng(0).uniform(low + (high - low) / 2, high, (10, 10, 10))
    return volume


def mask(*values: int) -> Volume:
    """A block of each value, side by side inside the body."""
    volume = np.zeros((SIDE,) * 3, np.uint8 if max(values) < 256 else np.int16)
    for number, value in enumerate(values):
        z, y = divmod(number, 8)
        volume[4 + 2 * (z % 4) : 6 + 2 * (z % 4), 4 + y, 4:12] = value
    return volume


def write(path: Path, volume: Volume) -> None:
    write_nifti(path, volume, np.eye(4))


def brats(root: Path, folder: str, name: str, endings: tuple[str, ...], values: tuple[int, ...]) -> None:
    for end in endings[1:]:
        write(root / folder / f"{name}_{end}.nii.gz", image(0))
    write(root / folder / f"{name}_{endings[0]}.nii.gz", mask(*values))


def several_sites(root: Path) -> None:
    common = ("t1", "t1ce", "t2", "flair")
    brats(root, "BraTS2021/BraTS2021_00000", "BraTS2021_00000", ("seg", *common), (1, 2, 4))
    ucsf = ("tumor_segmentation", "T1", "T1gad", "T2", "FLAIR")
    brats(root, "UCSF-PDGM-v3/UCSF-PDGM-0004_nifti", "UCSF-PDGM-0004", ucsf, (1, 2, 4))
    tcga = ("GlistrBoost_ManuallyCorrected", "t1", "t1Gd", "t2", "flair")
    brats(root, "TCGA/TCGA-02-0006", "TCGA-02-0006_1996.08.23", tcga, (1, 2, 4))


def freesurfer(root: Path) -> None:
    for subject in ("002_S_0295_1", "002_S_0413_1"):
        folder = root / subject / "mri"
        folder.mkdir(parents=True)
        for name, volume in (("norm", image(0)), ("aseg", mask(3, 42, 2, 41, 4, 10, 17, 53, 8, 16, 6, 1035))):
            nib.save(nib.MGHImage(volume.astype(np.float32), np.eye(4)), folder / f"{name}.mgz")


def decathlon(root: Path, channel: str, labels: dict[str, int], low: float) -> None:
    write(root / "imagesTr" / "x_001.nii.gz", image(low))
    write(root / "labelsTr" / "x_001.nii.gz", mask(*labels.values()))
    names = {str(value): name for name, value in {"background": 0, **labels}.items()}
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": channel}, "labels": names}))


def pairs(root: Path, mask_name: str, image_name: str, *values: int) -> None:
    for number in ("0001", "0002"):
        write(root / image_name.format(number), image(-1000, 200))
        write(root / mask_name.format(number), mask(*values))


TASKS: dict[str, tuple[str, Callable[[Path], Any], int]] = {
    "BraTS, UCSF and TCGA": ("brats_cross_site", several_sites, 3),
    "ADNI": ("adni_t1", freesurfer, 2),
    "Decathlon liver": ("liver_ct", lambda root: decathlon(root, "CT", {"liver": 1, "tumour": 2}, -1000), 1),
    "LiTS": ("liver_ct", lambda root: pairs(root, "segmentation-{}.nii", "volume-{}.nii", 1, 2), 2),
    "BCV": ("abdomen_ct", lambda root: pairs(root, "label/label{}.nii.gz", "img/img{}.nii.gz", *range(1, 14)), 2),
    "CHAOS MR": ("abdomen_mri", lambda root: chaos_like(root), 2),
    "Decathlon heart": ("heart_la_mri", lambda root: decathlon(root, "MRI", {"left_atrium": 1}, 0), 1),
    "AVT": ("aorta_ct", lambda root: pairs(root, "{0}/{0}_seg.nii.gz", "{0}/{0}_cta.nii.gz", 1), 2),
    "lymph nodes": ("lymph_nodes_ct", lambda root: pairs(root, "mask/{}.nii.gz", "ct/{}.nii.gz", *range(1, 7)), 2),
}


def chaos_like(root: Path) -> None:
    """The values of CHAOS, converted to NIfTI."""
    for number in ("1", "2"):
        for modality in ("t1_in", "t1_out"):
            write(root / modality / f"{number}.nii.gz", image(0))
        write(root / "mask" / f"{number}.nii.gz", mask(63, 126, 189, 252))


def small(preset: str) -> Config:
    return load_config(preset, [f"data.size=[{SIDE},{SIDE},{SIDE}]", "data.voxel_size_mm=null"]).config


@pytest.mark.parametrize("task", TASKS)
def test_a_preset_packs_its_data(tmp_path: Path, task: str) -> None:
    preset, build, count = TASKS[task]
    build(tmp_path / "source")
    config = small(preset)
    report = pack(tmp_path / "source", tmp_path / "packed", config.data)
    assert report.num_subjects == count and not report.labels_never_found
    for subject in (packed := open_packed(tmp_path / "packed")).subjects():
        volume, labels = packed.read(subject.index)
        assert set(np.unique(labels)) == {0, *config.data.labels.names}
        assert volume.min() < volume.max()
