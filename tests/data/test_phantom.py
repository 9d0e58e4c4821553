from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig, list_presets, load_config
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.data.phantom import make_phantom, write_phantoms
from hpc_ddpm.data.preprocess import prepare


def test_a_head_depends_on_seed_and_number_only(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "two", 2, (8, 10, 12), seed=3)
    write_phantoms(tmp_path / "one", 1, (8, 10, 12), seed=3)
    for name in ("mask/head_0000.nii.gz", "t1/head_0000.nii.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    first, second = (make_phantom((8, 10, 12), 3, i, 1, LabelsConfig())[1] for i in range(2))
    assert not np.array_equal(first, second)


def test_volumes_look_like_heads() -> None:
    labels = load_config("brats_192").config.data.labels
    image, mask = make_phantom((24, 28, 32), 0, 0, 4, labels)
    assert (image.shape, mask.shape, image.dtype, mask.dtype) == (
        (4, 32, 28, 24),
        (32, 28, 24),
        np.float32,
        np.uint8,
    )
    assert set(np.unique(mask)) == {0, 1, 2, 3, 4}
    assert (mask == 4).sum() > (mask > 0).sum() / 2
    assert (image[:, mask == 0] == 0).all()
    assert (image[:, mask > 0] > 0).mean() > 0.99
    assert mask[[0, -1]].max() == 0


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_packs_phantoms(tmp_path: Path, preset: str) -> None:
    data = load_config(preset).config.data.model_copy(update={"size": (16, 16, 16)})
    write_phantoms(tmp_path, 1, (18, 16, 14), modalities=data.modalities, labels=data.labels)
    prepared = prepare(discover(tmp_path, data).subjects[0], data)
    assert prepared.image.shape == (data.num_modalities, 16, 16, 16)
    assert (prepared.image.min() >= -1, prepared.image.max() <= 1) == (True, True)
    assert prepared.image.std() > 0.05


def test_geometry_on_disk(tmp_path: Path) -> None:
    write_phantoms(tmp_path, 1, (8, 16, 32))
    volume = read_nifti(tmp_path / "t1" / "head_0000.nii.gz", DataConfig().orientation, dtype=None)
    assert (volume.data.shape, volume.data.dtype) == ((32, 16, 8), np.int16)
    np.testing.assert_allclose(np.diag(volume.affine)[:3], [24, 12, 6])
    np.testing.assert_allclose(volume.affine @ [3.5, 7.5, 15.5, 1], [0, 0, 0, 1], atol=1e-5)
