"""Masks to sample from are read by their own coding, whatever the model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import Config, load_config
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.sampling.masks import MaskSource, find_mask_files, load_mask, with_coding
from hpc_ddpm.sampling.plan import build_plan, extend_manifest, read_manifest
from hpc_ddpm.workers.claims import Writer


@pytest.fixture
def config() -> Config:
    return load_config("brats_192", ["data.size=[16,16,16]", "data.orientation=RAS"]).config


def labels(enhancing: int, brain: int) -> np.ndarray:
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[2:14, 2:14, 2:14] = brain
    mask[5:10, 5:10, 5:10] = 2
    mask[6:9, 6:10, 6:10] = enhancing
    mask[7, 7, 7] = 1
    return mask


def sources(folder: Path, mask: np.ndarray, config: Config) -> tuple[list[MaskSource], str]:
    write_nifti(folder / "mask" / "a.nii", mask, np.eye(4))
    return with_coding(find_mask_files(folder, data=config.data), config.data)


def test_packed_masks_stay_as_they_are(tmp_path: Path, config: Config) -> None:
    (source,), note = sources(tmp_path, labels(3, 4), config)
    assert (source.coding, note) == ("auto", "masks are coded as data.labels.names says")
    np.testing.assert_array_equal(load_mask(source, config).labels, labels(3, 4))


def test_raw_masks_are_told_apart_and_need_their_brain(tmp_path: Path, config: Config) -> None:
    (source,), note = sources(tmp_path, labels(4, 0), config)
    assert source.coding == "brats2021"
    assert note.startswith("masks are coded as brats2021: ")
    with pytest.raises(DataFormatError, match=r"label 4 \(brain\) is missing, found \[1, 2, 3\]"):
        load_mask(source, config)


def test_mostly_enhancing_raw_masks_get_the_brain_of_their_images(tmp_path: Path, config: Config) -> None:
    """In a tree, where 4 is more than half of the tumour: once taken for the brain, without a word."""
    raw, wanted = labels(4, 0), labels(3, 4)
    raw[5:10, 5:10, 5:10], wanted[5:10, 5:10, 5:10] = 4, 3
    raw[5, 5, 5:9] = wanted[5, 5, 5:9] = 2
    for seed, modality in enumerate(config.data.modalities):
        image = np.where(labels(3, 4) > 0, np.random.default_rng(seed).normal(500, 50, raw.shape), 0)
        write_nifti(tmp_path / modality / "a.nii", image.astype(np.float32), np.eye(4))
    (source,), note = sources(tmp_path, raw, config)
    assert note.endswith("4 (brain) comes from the images")
    np.testing.assert_array_equal(load_mask(source, config).labels, wanted)


def test_the_coding_is_in_the_plan_where_it_says_something(tmp_path: Path, config: Config) -> None:
    raw, packed = sources(tmp_path / "raw", labels(4, 0), config)[0], sources(tmp_path, labels(3, 4), config)[0]
    for name, masks in (("a", raw), ("b", packed)):
        (tmp_path / name).mkdir()
        with Writer(tmp_path / name / "state", "sample") as writer:
            extend_manifest(tmp_path / name, build_plan(masks, 1, 0), writer)
        assert [item.source for item in read_manifest(tmp_path / name)] == masks
    written = [json.loads((tmp_path / name / "manifest.jsonl").read_text()) for name in "ab"]
    assert (written[0]["coding"], written[1].keys() & {"coding", "covariates"}) == ("brats2021", set())
