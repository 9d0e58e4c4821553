"""`sample --masks` on sources as `pack` takes them: the masks, never an image, and the brain from the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.sampling.masks import find_mask_files, load_mask
from hpc_ddpm.sampling.plan import Item, build_plan

SIDE = 16
MODALITIES = ("t1", "t1ce", "t2", "flair")


@pytest.fixture
def config() -> Config:
    return load_config("brats_192", [f"data.size=[{SIDE},{SIDE},{SIDE}]"]).config


def write_case(folder: Path, mask_name: str, image_name: str) -> Path:
    """A raw BraTS case: a brain in the images, a tumour of 1, 2 and 4 in the mask."""
    brain = np.zeros((SIDE,) * 3, np.float32)
    brain[3:13, 3:13, 3:13] = np.random.default_rng(0).uniform(400, 900, (10, 10, 10))
    mask = np.zeros((SIDE,) * 3, np.uint8)
    for value, rows in ((1, slice(5, 6)), (2, slice(6, 8)), (4, slice(8, 11))):
        mask[rows, 5:10, 5:10] = value
    for modality in MODALITIES:
        write_nifti(folder / image_name.format(modality), brain, np.eye(4))
    write_nifti(folder / mask_name, mask, np.eye(4))
    return folder


def test_the_brain_of_a_mask_is_that_of_its_images(tmp_path: Path, config: Config) -> None:
    source = tmp_path / "BraTS"
    write_case(source / "c_1", "c_1_seg.nii.gz", "c_1_{}.nii.gz")
    (found,) = find_mask_files(source, data=config.data)
    assert (found.id, Path(found.path).name, len(found.images)) == ("c_1", "c_1_seg.nii.gz", 4)
    made = load_mask(found, config)
    pack(source, tmp_path / "packed", config.data)
    assert np.array_equal(made.labels, open_packed(tmp_path / "packed").read_mask(0))
    assert set(np.unique(made.labels)) == {0, 1, 2, 3, 4}
    (item,) = build_plan([found], 1, 0)
    assert item.source == found
    old = Item(item.id, item.mask_id, item.mask, item.layout, item.replica, item.seed)
    assert old == item, "a set that was planned without images goes on"


def test_images_without_use_are_not_kept(tmp_path: Path) -> None:
    write_nifti(tmp_path / "mask" / "a.nii.gz", np.ones((4, 4, 4), np.uint8), np.eye(4))
    write_nifti(tmp_path / "t1" / "a.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))
    (found,) = find_mask_files(tmp_path, data=load_config("whole_head_128").config.data)
    assert found.images == ()


def test_a_source_without_the_images_still_gives_masks(tmp_path: Path, config: Config) -> None:
    (tmp_path / "labelsTr").mkdir(parents=True)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr" / "x.nii.gz").touch()
    (tmp_path / "imagesTr" / "x_0000.nii.gz").touch()
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}}')
    (found,) = find_mask_files(tmp_path, data=config.data)
    assert (found.id, found.images) == ("x", ())
