"""The cohort: real anatomy, the same for the same seed, complete after any interruption."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from hpc_ddpm.data.nifti import read_nifti
from hpc_ddpm.demo import cohort
from hpc_ddpm.errors import ConfigError

pytest.importorskip("nilearn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    calls = []
    ids = cohort.write_cohort(folder, 2, seed=5, progress=lambda done, total: calls.append((done, total)))
    assert ids == ["sub-001", "sub-002"]
    assert calls == [(1, 2), (2, 2)]
    return folder


@pytest.fixture(scope="module")
def subjects():
    return [cohort.make_subject(cohort.load_template(), 0, number) for number in range(1, 4)]


def test_a_subject_depends_on_seed_and_number_alone(folder):
    template = cohort.load_template()
    t1, labels = cohort.make_subject(template, 5, 2)
    np.testing.assert_array_equal(read_nifti(folder / "t1/sub-002.nii.gz", dtype=np.int16).data, t1)
    np.testing.assert_array_equal(read_nifti(folder / "mask/sub-002.nii.gz", dtype=np.uint8).data, labels)
    assert (labels != cohort.make_subject(template, 5, 3)[1]).any()
    assert (labels != cohort.make_subject(template, 6, 2)[1]).any()


def test_files_lie_in_template_space(folder):
    mask = read_nifti(folder / "mask/sub-001.nii.gz", "RAS", dtype=np.uint8)
    t1 = read_nifti(folder / "t1/sub-001.nii.gz", "RAS", dtype=np.int16)
    assert mask.data.shape == t1.data.shape == cohort.GRID
    np.testing.assert_array_equal(mask.affine, t1.affine)
    np.testing.assert_allclose(np.diag(mask.affine)[:3], cohort.VOXEL_MM)
    z, y, x = np.mean(np.argwhere(mask.data > 0), axis=0)
    centre_mm = (mask.affine @ (x, y, z, 1))[:3]
    np.testing.assert_allclose(centre_mm, (0, -20, 12), atol=8)  # centroid of the ICBM-152 brain


def test_labels_are_plausible(subjects):
    for t1, labels in subjects:
        assert t1.dtype == np.int16 and labels.dtype == np.uint8
        litres = np.bincount(labels.ravel(), minlength=5) * cohort.VOXEL_MM**3 / 1e6
        assert set(np.unique(labels)) == {0, *cohort.LABELS}
        assert 1.3 < litres[1:].sum() < 2.3
        assert litres[2] > litres[3] > litres[1] > litres[4] > 0.001
        inner = [np.median(t1[labels == label]) for label in (1, 2, 3)]
        assert inner == sorted(inner) and not t1[labels == 0].any()


def test_lesions_are_dark_and_inside_the_brain(subjects):
    for t1, labels in subjects:
        brain = labels > 0
        assert not (ndimage.binary_fill_holes(brain) & ~brain).any()
        lesion = labels == 4
        depth = ndimage.distance_transform_edt(brain)[lesion] * cohort.VOXEL_MM
        assert np.median(depth) > 5
        assert np.median(t1[lesion]) < 0.75 * np.median(t1[labels == 2])


def test_a_lesion_spares_fluid_and_what_is_outside():
    brain = np.ones((6, 6, 6), bool)
    brain[:, :, 0] = False
    grey, white = np.full((2, 6, 6, 6), 0.45, np.float32)
    grey[:, :, 5] = white[:, :, 5] = 0.2
    labels = cohort._label(brain, grey, white + 0.1, np.ones((6, 6, 6), bool))
    assert not labels[:, :, 0].any() and (labels[:, :, 5] == 1).all() and (labels[2:4, 2:4, 2:4] == 4).all()


def test_subjects_differ_in_shape_and_stay_in_the_grid(subjects):
    brains = [labels > 0 for _, labels in subjects]
    assert (brains[0] ^ brains[1]).sum() > 0.03 * brains[0].sum()
    for brain in brains:
        assert not any(face.any() for axis in range(3) for face in (brain.take(0, axis), brain.take(-1, axis)))


def test_second_call_keeps_what_is_there_and_completes_the_rest(folder):
    kept, lost = folder / "t1/sub-001.nii.gz", folder / "mask/sub-002.nii.gz"
    content, written = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    cohort.write_cohort(folder, 2, seed=5)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == written
    assert not list(folder.rglob("*.tmp"))


def test_another_seed_is_refused(folder):
    with pytest.raises(ConfigError, match=r"holds a cohort of .*'seed': 5.*asked for .*'seed': 6.*another folder"):
        cohort.write_cohort(folder, 2, seed=6)


def test_a_torn_note_is_refused(tmp_path):
    (tmp_path / "cohort.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cohort\.json: not readable as JSON .*; delete the folder or use another"):
        cohort.write_cohort(tmp_path, 1)


def test_no_subjects_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="num_subjects=0: a cohort needs at least 1"):
        cohort.write_cohort(tmp_path, 0)


def test_missing_nilearn_says_what_to_install(tmp_path, monkeypatch):
    cohort.load_template.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpc_ddpm\[demo\]'"):
        cohort.write_cohort(tmp_path, 1)
