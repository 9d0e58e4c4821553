from pathlib import Path

import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Discovery, discover, find_layout, source_modalities
from hpc_ddpm.data.find_masks import find_masks
from hpc_ddpm.data.layouts.bids import parse_name
from hpc_ddpm.errors import DataFormatError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def files(found: Discovery) -> dict[str, list[str]]:
    """Mask and images of each subject."""
    return {
        subject.id: [subject.mask.name, *(path.name for path in subject.images.values())] for subject in found.subjects
    }


def test_sessions_and_runs_are_subjects(tmp_path: Path) -> None:
    for place in ("sub-01/anat/sub-01", "sub-02/ses-pre/anat/sub-02_ses-pre", "sub-02/ses-post/anat/sub-02_ses-post"):
        touch(tmp_path, f"{place}_T1w.nii.gz", f"{place}_T1w.json", f"{place}_FLAIR.nii.gz")
        touch(tmp_path, f"derivatives/lesions/{place}_label-lesion_mask.nii.gz")
    for run in ("1", "2"):
        touch(tmp_path, f"sub-03/anat/sub-03_run-{run}_T1w.nii", f"sub-03/anat/sub-03_run-{run}_FLAIR.nii")
        touch(tmp_path, f"derivatives/other/sub-03/anat/sub-03_run-{run}_space-orig_desc-x_dseg.nii.gz")
    touch(tmp_path, "sub-01/func/sub-01_bold.nii.gz", "sub-01/anat/sub-01_PDw.nii.gz", "dataset_description.json")
    found = discover(tmp_path, DataConfig(modalities=("t1", "flair")))
    assert found.layout == "bids"
    assert list(files(found)) == ["sub-01", "sub-02_ses-post", "sub-02_ses-pre", "sub-03_run-1", "sub-03_run-2"]
    assert files(found)["sub-02_ses-pre"] == [
        "sub-02_ses-pre_label-lesion_mask.nii.gz",
        "sub-02_ses-pre_T1w.nii.gz",
        "sub-02_ses-pre_FLAIR.nii.gz",
    ]
    assert not found.unmatched
    assert [name for name, _ in find_masks(tmp_path)] == list(files(found))
    assert source_modalities(tmp_path) == ("t1", "flair")


def test_contrast_agent_makes_t1ce(tmp_path: Path) -> None:
    touch(tmp_path, "sub-a/anat/sub-a_T1w.nii", "sub-a/anat/sub-a_ce-gadolinium_T1w.nii", "sub-a/anat/sub-a_dseg.nii")
    touch(tmp_path, "sub-b/anat/sub-b_acq-mprage_T1w.nii", "sub-b/anat/sub-b_acq-post_T1w.nii")
    touch(tmp_path, "sub-b/anat/sub-b_dseg.nii")
    assert files(discover(tmp_path, DataConfig(modalities=("t1", "t1ce")))) == {
        "sub-a": ["sub-a_dseg.nii", "sub-a_T1w.nii", "sub-a_ce-gadolinium_T1w.nii"],
        "sub-b": ["sub-b_dseg.nii", "sub-b_acq-mprage_T1w.nii", "sub-b_acq-post_T1w.nii"],
    }


def test_what_is_ambiguous_is_named_and_not_guessed(tmp_path: Path) -> None:
    for subject in ("good", "twoimages", "twomasks", "otherspace", "onerun"):
        touch(tmp_path, f"sub-{subject}/anat/sub-{subject}_T1w.nii")
    touch(tmp_path, "sub-twoimages/anat/sub-twoimages_acq-spgr_T1w.nii")
    for subject in ("good", "twoimages", "twomasks"):
        touch(tmp_path, f"derivatives/seg/sub-{subject}/anat/sub-{subject}_dseg.nii.gz")
    touch(tmp_path, "derivatives/other/sub-twomasks/anat/sub-twomasks_label-head_mask.nii.gz")
    touch(tmp_path, "derivatives/seg/sub-otherspace/anat/sub-otherspace_space-MNI152_dseg.nii.gz")
    touch(tmp_path, "derivatives/seg/sub-onerun/anat/sub-onerun_run-1_dseg.nii.gz")
    found = discover(tmp_path, DataConfig())
    assert list(files(found)) == ["sub-good"]
    assert {entry.reason for entry in found.unmatched} == {
        "subject sub-twoimages has more than one t1",
        "subject sub-twomasks has more than one mask",
        "subject sub-otherspace has no mask",
        "subject sub-otherspace_space-MNI152 has no t1",
        "subject sub-onerun has no mask",
        "subject sub-onerun_run-1 has no t1",
    }
    with pytest.raises(DataFormatError, match="more than one mask for sub-twomasks"):
        find_masks(tmp_path)


@pytest.mark.parametrize(
    ("modality", "suffix", "fits"),
    [
        ("t2", "T2w", True),
        ("T2star", "T2starw", True),
        ("pd", "PDw", True),
        ("ct", "ct", True),
        ("t2", "T2star", False),
    ],
)
def test_other_modalities_go_by_their_suffix(modality: str, suffix: str, fits: bool) -> None:
    name = parse_name(Path(f"sub-1_{suffix}.NII.GZ"))
    assert name is not None
    assert name.is_image(modality) is fits


def test_layouts_that_look_alike(tmp_path: Path) -> None:
    touch(tmp_path / "brats", "sub-1/sub-1_seg.nii", "sub-1/sub-1_t1.nii")
    assert find_layout(tmp_path / "brats") == "brats_raw"
    touch(tmp_path / "tree", "mask/sub-1.nii", "t1/sub-1.nii")
    assert find_layout(tmp_path / "tree") == "tree"
    assert [parse_name(Path(name)) for name in ("x_T1w.nii", "sub-1.nii", "sub-1_odd_T1w.nii", "sub-1_T1w.json")] == [
        None
    ] * 4
