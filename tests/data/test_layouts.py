"""The layouts of published datasets: a small replica of each tree, by the names of its files and folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.discover import discover, find_layout, source_modalities
from hpc_ddpm.data.export import export
from hpc_ddpm.data.find_masks import find_mask_subjects, find_masks
from hpc_ddpm.data.layouts import LAYOUTS
from hpc_ddpm.data.layouts.base import Roles
from hpc_ddpm.data.nifti import read_header, read_nifti
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.resplit import divide
from hpc_ddpm.data.shards import open_packed
from hpc_ddpm.errors import ConfigError, DataFormatError

BRATS = ("t1", "t1ce", "t2", "flair")
NEW = ("t1n", "t1c", "t2w", "t2f")


@dataclass(frozen=True)
class Replica:
    """The names in a dataset, and what is to be found there."""

    layout: str
    modalities: tuple[str, ...]
    files: tuple[str, ...]
    subjects: dict[str, str]
    """Subject -> its mask; the images are `images` with `{}` for the subject."""
    images: tuple[str, ...]
    names: dict[str, Any] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Content of files."""
    aside: tuple[str, ...] = ()
    """Names of files that are left out and named, at least."""


def brats(root: str, mark: str, endings: tuple[str, ...], *cases: str, suffix: str = ".nii.gz") -> tuple[str, ...]:
    return tuple(f"{root}{case}/{case}{mark}{end}{suffix}" for case in cases for end in endings)


def dataset_json(kind: str, channels: tuple[str, ...]) -> dict[str, str]:
    content = {
        kind: dict(enumerate(channels)),
        "labels": {"background": 0, "head": 1, "tumour": 2},
        "file_ending": ".nii.gz",
    }
    return {"dataset.json": json.dumps(content)}


CHAOS = tuple(
    f"Train_Sets/{place}"
    for pair in ("CT/1", "CT/2", "MR/1/T2SPIR")
    for place in (f"{pair}/DICOM_anon/IMG-0000.dcm", f"{pair}/Ground/IMG-0000.png")
) + tuple(
    f"Train_Sets/MR/1/T1DUAL/{place}"
    for place in ("DICOM_anon/InPhase/IMG-0002.dcm", "DICOM_anon/OutPhase/IMG-0001.dcm", "Ground/IMG-0002.png")
)
REPLICAS = {
    "BraTS 2020": Replica(
        "brats_raw",
        BRATS,
        (
            *brats("MICCAI_BraTS2020_TrainingData/", "_", ("seg", *BRATS), "BraTS20_Training_001", suffix=".nii"),
            *brats("MICCAI_BraTS2020_TrainingData/", "_", BRATS, "BraTS20_Training_355", suffix=".nii"),
            "MICCAI_BraTS2020_TrainingData/BraTS20_Training_355/W39_1998.09.19_Segm.nii",
            "MICCAI_BraTS2020_TrainingData/name_mapping.csv",
        ),
        {"BraTS20_Training_001": "BraTS20_Training_001_seg.nii", "BraTS20_Training_355": "W39_1998.09.19_Segm.nii"},
        tuple(f"{{}}_{m}.nii" for m in BRATS),
    ),
    "BraTS 2021": Replica(
        "brats_raw",
        BRATS,
        brats("", "_", ("seg", *BRATS), "BraTS2021_00000", "BraTS2021_00002"),
        {case: f"{case}_seg.nii.gz" for case in ("BraTS2021_00000", "BraTS2021_00002")},
        tuple(f"{{}}_{m}.nii.gz" for m in BRATS),
    ),
    "Kaggle's BraTS 2021": Replica(
        "brats_raw",
        BRATS,
        tuple(f"BraTS2021_00495/BraTS2021_00495_{end}.nii/00000057_brain_{end}.nii" for end in ("seg", *BRATS)),
        {"BraTS2021_00495": "BraTS2021_00495_seg.nii"},
        tuple(f"{{}}_{m}.nii" for m in BRATS),
    ),
    "BraTS 2024 GLI": Replica(
        "brats_raw",
        BRATS,
        brats("training_data1_v2/", "-", ("seg", *NEW), "BraTS-GLI-00005-100", "BraTS-GLI-00005-101"),
        {case: f"{case}-seg.nii.gz" for case in ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101")},
        tuple(f"{{}}-{m}.nii.gz" for m in NEW),
        patients=dict.fromkeys(("BraTS-GLI-00005-100", "BraTS-GLI-00005-101"), "BraTS-GLI-00005"),
    ),
    "BraTS 2024 PED": Replica(
        "brats_raw",
        BRATS,
        brats("BraTS-PEDs2024_Training/", "-", ("seg", *NEW), "BraTS-PED-00001-000"),
        {"BraTS-PED-00001-000": "BraTS-PED-00001-000-seg.nii.gz"},
        tuple(f"{{}}-{m}.nii.gz" for m in NEW),
    ),
    "BraTS 2024 MET": Replica(
        "brats_raw",
        ("t1ce",),
        (
            *brats("MICCAI-MET/Training_1/", "-", ("seg", *NEW), "BraTS-MET-00001-000"),
            *brats("MICCAI-MET/UCSD - Training/", "-", ("seg", *NEW), "BraTS-MET-00801-000"),
        ),
        {case: f"{case}-seg.nii.gz" for case in ("BraTS-MET-00001-000", "BraTS-MET-00801-000")},
        ("{}-t1c.nii.gz",),
    ),
    "BraTS 2024 MEN-RT": Replica(
        "brats_raw",
        ("t1ce",),
        brats("BraTS-MEN-RT-Train-v2/", "_", ("gtv", "t1c"), "BraTS-MEN-RT-0003-1", "BraTS-MEN-RT-0004-1"),
        {case: f"{case}_gtv.nii.gz" for case in ("BraTS-MEN-RT-0003-1", "BraTS-MEN-RT-0004-1")},
        ("{}_t1c.nii.gz",),
    ),
    "UCSF-PDGM": Replica(
        "brats_raw",
        BRATS,
        tuple(
            f"UCSF-PDGM-v3/{case}_nifti/{case}_{end}.nii.gz"
            for case in ("UCSF-PDGM-0409", "UCSF-PDGM-0409_FU001d")
            for end in (
                *("T1", "T1_bias", "T1gad", "T1gad_bias", "T2", "T2_bias", "FLAIR", "FLAIR_bias", "ADC", "SWI"),
                *("tumor_segmentation", "brain_segmentation", "brain_parenchyma_segmentation"),
            )
        ),
        {case: f"{case}_tumor_segmentation.nii.gz" for case in ("UCSF-PDGM-0409", "UCSF-PDGM-0409_FU001d")},
        ("{}_T1.nii.gz", "{}_T1gad.nii.gz", "{}_T2.nii.gz", "{}_FLAIR.nii.gz"),
        patients=dict.fromkeys(("UCSF-PDGM-0409", "UCSF-PDGM-0409_FU001d"), "UCSF-PDGM-0409"),
        aside=("UCSF-PDGM-0409_ADC.nii.gz", "UCSF-PDGM-0409_brain_segmentation.nii.gz"),
    ),
    "UCSF-PDGM, other names": Replica(
        "brats_raw",
        ("t1", "t1ce"),
        brats("", "_", ("T1", "T1_bias", "T1gad", "T1gad_bias", "tumor_segmentation", "brain_segmentation"), "U-1"),
        {"U-1": "U-1_brain_segmentation.nii.gz"},
        ("{}_T1_bias.nii.gz", "{}_T1gad_bias.nii.gz"),
        names={"mask": "brain_segmentation", "t1": "T1_bias", "t1ce": ["T1gad_bias"]},
    ),
    "TCGA-GBM": Replica(
        "brats_raw",
        BRATS,
        tuple(
            f"Pre-operative_TCGA_GBM_NIfTI_and_Segmentations/TCGA-02-0006/TCGA-02-0006_1996.08.23_{end}.nii.gz"
            for end in ("flair", "t1", "t1Gd", "t2", "GlistrBoost", "GlistrBoost_ManuallyCorrected")
        )
        + tuple(
            f"Pre-operative_TCGA_GBM_NIfTI_and_Segmentations/TCGA-02-0009/TCGA-02-0009_1997.06.14_{end}.nii.gz"
            for end in ("flair", "t1", "t1Gd", "t2", "GlistrBoost")
        ),
        {
            "TCGA-02-0006": "TCGA-02-0006_1996.08.23_GlistrBoost_ManuallyCorrected.nii.gz",
            "TCGA-02-0009": "TCGA-02-0009_1997.06.14_GlistrBoost.nii.gz",
        },
        tuple(f"{{}}_*_{m}.nii.gz" for m in ("t1", "t1Gd", "t2", "flair")),
        aside=("TCGA-02-0006_1996.08.23_GlistrBoost.nii.gz",),
    ),
    "Decathlon heart": Replica(
        "decathlon",
        ("mri",),
        ("imagesTr/la_003.nii.gz", "imagesTr/._la_003.nii.gz", "labelsTr/la_003.nii.gz", "imagesTs/la_001.nii.gz"),
        {"la_003": "la_003.nii.gz"},
        ("{}.nii.gz",),
        texts=dataset_json("modality", ("MRI",)),
    ),
    "Decathlon brain tumour": Replica(
        "decathlon",
        ("t1", "flair", "t1ce"),
        ("imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz"),
        {"BRATS_001": "BRATS_001.nii.gz"},
        ("{}.nii.gz#1", "{}.nii.gz#0", "{}.nii.gz#2"),
        texts=dataset_json("modality", ("FLAIR", "T1w", "t1gd", "T2w")),
    ),
    "nnU-Net raw": Replica(
        "nnunet",
        ("t2", "adc"),
        (
            *(f"imagesTr/prostate_{n}_{c:04d}.nii.gz" for n in ("00", "01") for c in range(3)),
            *(f"labelsTr/prostate_{n}.nii.gz" for n in ("00", "01")),
        ),
        {f"prostate_{n}": f"prostate_{n}.nii.gz" for n in ("00", "01")},
        ("{}_0002.nii.gz", "{}_0000.nii.gz"),
        texts=dataset_json("channel_names", ("ADC", "DWI", "T2")),
    ),
    "LiTS": Replica(
        "flat",
        ("ct",),
        (
            *("Training Batch 1/volume-0.nii", "Training Batch 1/segmentation-0.nii"),
            *("Training Batch 2/volume-28.nii", "Training Batch 2/segmentation-28.nii"),
        ),
        {"0": "segmentation-0.nii", "28": "segmentation-28.nii"},
        ("volume-{}.nii",),
    ),
    "LiTS, one folder": Replica(
        "flat",
        ("ct",),
        tuple(f"{kind}-{n}.nii" for kind in ("volume", "segmentation") for n in (0, 1, 10)),
        {n: f"segmentation-{n}.nii" for n in ("0", "1", "10")},
        ("volume-{}.nii",),
    ),
    "LiTS on Kaggle": Replica(
        "tree",
        ("ct",),
        ("volumes/volume-0.nii", "segmentations/segmentation-0.nii"),
        {"0": "segmentation-0.nii"},
        ("volume-{}.nii",),
    ),
    "BCV": Replica(
        "tree",
        ("ct",),
        tuple(f"{kind}/{kind}{n}.nii.gz" for kind in ("img", "label") for n in ("0001", "0002")),
        {"0001": "label0001.nii.gz", "0002": "label0002.nii.gz"},
        ("img{}.nii.gz",),
    ),
    "side by side": Replica(
        "flat",
        ("t1", "flair"),
        ("a_seg.nii.gz", "a_t1.nii.gz", "a_flair.nii.gz", "b_seg.nii.gz", "b_t1.nii.gz", "b_flair.nii.gz"),
        {"a": "a_seg.nii.gz", "b": "b_seg.nii.gz"},
        ("{}_t1.nii.gz", "{}_flair.nii.gz"),
    ),
    "AVT": Replica(
        "cases",
        ("cta",),
        tuple(
            f"{site}/{case}/{case}{end}"
            for site, case in (("Dongyang", "D1"), ("KiTS", "K1"), ("RIDER", "R1 (AD)"))
            for end in (".nrrd", ".seg.nrrd")
        ),
        {case: f"{case}.seg.nrrd" for case in ("D1", "K1", "R1 (AD)")},
        ("{}.nrrd",),
    ),
    "CHAOS CT": Replica(
        "chaos",
        ("ct",),
        CHAOS,
        {"CT_1": "Ground", "CT_2": "Ground"},
        ("DICOM_anon",),
        patients={"CT_1": "CT_1"},
    ),
    "CHAOS T1": Replica(
        "chaos",
        ("t1_in", "t1_out"),
        CHAOS,
        {"MR_1_T1DUAL": "Ground"},
        ("InPhase", "OutPhase"),
        patients={"MR_1_T1DUAL": "MR_1"},
    ),
    "CHAOS T2": Replica("chaos", ("t2",), CHAOS, {"MR_1_T2SPIR": "Ground"}, ("DICOM_anon",)),
    "OASIS and ADNI pairs": Replica(
        "tree",
        ("t1",),
        ("mask/OAS1_0001_MR1.hdr", "mask/OAS1_0001_MR1.img", "t1/OAS1_0001_MR1.hdr", "t1/OAS1_0001_MR1.img"),
        {"OAS1_0001_MR1": "OAS1_0001_MR1.hdr"},
        ("{}.hdr",),
        patients={"OAS1_0001_MR1": "OAS1_0001"},
    ),
    "FreeSurfer": Replica(
        "freesurfer",
        ("t1",),
        tuple(
            f"{subject}/mri/{name}.mgz"
            for subject in ("p1_m00", "p1_m12", "p1", "p1_m00.long.p1", "p2", "fsaverage")
            for name in ("orig", "T1", "brain", "aseg", "aparc+aseg", "wm.seg")
        ),
        dict.fromkeys(("p1", "p1_m00", "p1_m00.long.p1", "p1_m12", "p2"), "aseg.mgz"),
        ("T1.mgz",),
        patients={"p1": "p1", "p1_m00": "p1", "p1_m00.long.p1": "p1", "p1_m12": "p1_m12", "p2": "p2"},
        aside=("fsaverage",),
    ),
    "FreeSurfer, parcellation": Replica(
        "freesurfer",
        ("t1",),
        tuple(f"ADNI_002_S_0295_{n}/mri/{name}.mgz" for n in (1, 2) for name in ("T1", "brain", "aseg", "aparc+aseg")),
        {f"ADNI_002_S_0295_{n}": "aparc+aseg.mgz" for n in (1, 2)},
        ("brain.mgz",),
        names={"mask": "aparc+aseg", "t1": "brain"},
        patients={f"ADNI_002_S_0295_{n}": "002_S_0295" for n in (1, 2)},
    ),
    "ATLAS R2.0": Replica(
        "bids",
        ("t1",),
        tuple(
            f"Training/{site}/sub-{site.lower()}s001/ses-1/anat/sub-{site.lower()}s001_ses-1_"
            f"space-MNI152NLin2009aSym_{end}.nii.gz"
            for site in ("R001", "R002")
            for end in ("T1w", "label-L_desc-T1lesion_mask")
        ),
        {
            f"sub-{site}s001_ses-1_space-MNI152NLin2009aSym": f"sub-{site}s001_ses-1_space-MNI152NLin2009aSym_"
            "label-L_desc-T1lesion_mask.nii.gz"
            for site in ("r001", "r002")
        },
        ("{}_T1w.nii.gz",),
        patients={f"sub-{site}s001_ses-1_space-MNI152NLin2009aSym": f"sub-{site}s001" for site in ("r001", "r002")},
    ),
    "BIDS with roi": Replica(
        "bids",
        ("t1",),
        (
            *("sub-a/anat/sub-a_T1w.nii.gz", "sub-a/anat/sub-a_lesion.nii.gz", "sub-a/anat/sub-a_T1w_defaced.nii.gz"),
            *("derivatives/x/sub-a/anat/sub-a_roi.nii.gz", "derivatives/x/sub-a/anat/sub-a_desc-brain_mask.nii.gz"),
            *("sub-c/anat/sub-c_T1w.nii.gz", "derivatives/x/sub-c/anat/sub-c_desc-brain_mask.nii.gz"),
        ),
        {"sub-a": "sub-a_roi.nii.gz"},
        ("{}_T1w.nii.gz",),
        aside=(
            *("sub-a_lesion.nii.gz", "sub-a_T1w_defaced.nii.gz", "sub-a_desc-brain_mask.nii.gz"),
            "sub-c_desc-brain_mask.nii.gz",  # a brain is no lesion: the others decide what masks are here
        ),
    ),
    "BIDS with desc": Replica(
        "bids",
        ("t1",),
        tuple(
            name
            for one in ("sub-a", "sub-b")
            for name in (f"{one}/anat/{one}_T1w.nii.gz", f"derivatives/x/{one}/anat/{one}_desc-lesion_mask.nii.gz")
        ),
        {one: f"{one}_desc-lesion_mask.nii.gz" for one in ("sub-a", "sub-b")},
        ("{}_T1w.nii.gz",),
    ),
    "BIDS by names": Replica(
        "bids",
        ("t1",),
        (
            *("sub-a/anat/sub-a_acq-x_T1w.nii.gz", "sub-a/anat/sub-a_acq-y_T1w.nii.gz"),
            "derivatives/d/sub-a/anat/sub-a_desc-brain_mask.nii.gz",
            "derivatives/d/sub-a/anat/sub-a_desc-lesion_mask.nii.gz",
        ),
        {"sub-a": "sub-a_desc-lesion_mask.nii.gz"},
        ("{}_acq-y_T1w.nii.gz",),
        names={"mask": "desc-lesion_mask", "t1": "acq-y_T1w"},
    ),
}


def build(root: Path, replica: Replica) -> Path:
    for name in (*replica.files, *replica.texts):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(replica.texts.get(name, ""))
    return root


@pytest.mark.parametrize("name", REPLICAS)
def test_a_published_layout(tmp_path: Path, name: str) -> None:
    replica = REPLICAS[name]
    source = build(tmp_path / "source", replica)
    assert find_layout(source) == replica.layout
    config = DataConfig(modalities=replica.modalities, names=replica.names)
    found = discover(source, config)
    assert {subject.id: subject.mask.name for subject in found.subjects} == replica.subjects
    for subject in found.subjects:
        for modality, image in zip(replica.modalities, replica.images, strict=True):
            assert subject.images[modality].match(image.format(subject.id))
    patients = {subject.id: subject.patient for subject in found.subjects}
    assert {one: patients[one] for one in replica.patients} == replica.patients
    left = {entry.path.name for entry in found.unmatched}
    assert set(replica.aside) <= left and not left & set(replica.subjects.values())
    masks = find_mask_subjects(source, Roles(replica.modalities, config.names))
    assert {mask.id: mask.file.name for mask in masks} == replica.subjects
    images = {subject.id: tuple(subject.images.values()) for subject in found.subjects}
    assert {mask.id: mask.images for mask in masks} == images
    if not replica.names:
        assert {file.name for _, file in find_masks(source)} == set(replica.subjects.values())
        assert {mask.file for mask in masks} <= {file for _, file in find_masks(source)}
        assert set(source_modalities(source)) <= {*BRATS, *replica.modalities, "dwi", "ct"}


def test_every_layout_can_be_asked_for_and_is_tested() -> None:
    names = get_args(DataConfig.model_fields["layout"].annotation)
    assert set(names) == {"auto", *LAYOUTS}
    tested = {replica.layout for replica in REPLICAS.values()}
    assert tested | {"table"} == set(LAYOUTS)
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert [name for name in LAYOUTS if f"`{name}`" not in page] == []


Write = Callable[..., Path]


def test_volumes_of_a_4d_file_are_packed_as_modalities(tmp_path: Path, write: Write, box_mask: Any) -> None:
    source, rng = tmp_path / "Task01", np.random.default_rng(0)
    volumes = {name: rng.normal(100, 20, (12, 10, 8)).astype(np.float32) for name in ("flair", "t1", "t1ce")}
    for number in range(3):
        write(source / "labelsTr" / f"BRATS_{number:03d}.nii.gz", box_mask)
        write_4d(source / "imagesTr" / f"BRATS_{number:03d}.nii.gz", list(volumes.values()))
    (source / "dataset.json").write_text(dataset_json("modality", ("FLAIR", "T1w", "t1gd"))["dataset.json"])
    config = DataConfig(modalities=("t1ce", "flair"), size=(8, 10, 12), orientation="native", storage_dtype="float32")
    packed = pack(source, tmp_path / "packed", config)
    assert packed.num_subjects == 3 and packed.layout == "decathlon"
    by_file = tmp_path / "tree"
    for modality in ("t1ce", "flair"):
        write(by_file / modality / "x.nii", volumes[modality])
    write(by_file / "mask" / "x.nii", box_mask)
    pack(by_file, tmp_path / "expected", config)
    found, expected = open_packed(tmp_path / "packed").read(0)[0], open_packed(tmp_path / "expected").read(0)[0]
    assert np.array_equal(found, expected)
    member = source / "imagesTr" / "BRATS_000.nii.gz#2"
    assert read_header(member).shape == (8, 10, 12)
    assert np.array_equal(read_nifti(member).data, volumes["t1ce"])
    with pytest.raises(DataFormatError, match=r"#3: shape \(8, 10, 12, 3\) found, 4-D with more than 3 volumes"):
        read_nifti(member.with_name("BRATS_000.nii.gz#3"))
    table = tmp_path / "t.csv"
    table.write_text("subject,mask,t1\nx,tree/mask/x.nii,Task01/imagesTr/BRATS_001.nii.gz#1\n")
    assert pack(table, tmp_path / "by_table", config.model_copy(update={"modalities": ("t1",)})).num_subjects == 1


def write_4d(path: Path, volumes: list[Any]) -> None:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.stack([volume.T for volume in volumes], -1), np.eye(4)), path)


def test_nnunet_out_and_in(tmp_path: Path) -> None:
    labels = LabelsConfig(names={1: "head", 4: "tumour"}, remap={2: 4})
    source = write_phantoms(tmp_path / "source", 6, (8, 10, 12), modalities=("t1", "t2"), labels=LabelsConfig())
    config = DataConfig(modalities=("t1", "t2"), size=(8, 10, 12), labels=labels, storage_dtype="float32")
    pack(source, tmp_path / "packed", config)
    divide(tmp_path / "packed", 0.3, 0.3, 0, None, None)
    out = tmp_path / "Dataset001_X"
    assert export(tmp_path / "packed", out, layout="nnunet") == 6
    splits = {subject.id: subject.split for subject in open_packed(tmp_path / "packed").subjects()}
    held_out = {name for name, split in splits.items() if split == "test"}
    assert {path.name for path in (out / "labelsTs").iterdir()} == {f"{name}.nii.gz" for name in held_out}
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "head": 1, "tumour": 2}
    assert content["numTraining"] == len(list((out / "labelsTr").iterdir())) == 6 - len(held_out)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    assert {name: fold[name] for name in ("train", "val")} == {
        kind: [name for name, split in splits.items() if split == kind] for kind in ("train", "val")
    }
    again = config.model_copy(update={"labels": LabelsConfig(), "normalization": "none"})
    assert find_layout(out) == "nnunet"
    pack(out, tmp_path / "again", again)
    first, second = open_packed(tmp_path / "packed"), open_packed(tmp_path / "again")
    for subject in second.subjects():
        number = next(one.index for one in first.subjects() if one.id == subject.id)
        (image, mask), (image_2, mask_2) = first.read(number), second.read(subject.index)
        assert np.array_equal(image, image_2) and np.array_equal(np.where(mask == 4, 2, mask), mask_2)
    with pytest.raises(ConfigError, match="holds another export"):
        export(tmp_path / "packed", out)


def test_descriptions_that_do_not_help(tmp_path: Path) -> None:
    source = build(tmp_path, REPLICAS["nnU-Net raw"])
    with pytest.raises(DataFormatError, match=r"channels ADC, DWI, T2 found, data\.modalities asks for t1; take those"):
        discover(source, DataConfig(modalities=("t1",)))
    assert discover(source, DataConfig(modalities=("t1",), names={"t1": "dwi"})).subjects[0].images["t1"].name == (
        "prostate_00_0001.nii.gz"
    )
    for text, message in {"{": "cannot be read", "[]": "a JSON object expected", "{}": "no channel_names"}.items():
        (source / "dataset.json").write_text(text)
        with pytest.raises(DataFormatError, match=rf"dataset\.json: {message}"):
            discover(source, DataConfig(modalities=("t2",)))


def test_images_are_never_taken_for_masks(tmp_path: Path) -> None:
    tree = build(tmp_path / "tree", Replica("tree", (), ("mask/a.nii", "t1/a.nii", "image/a.nii"), {}, ()))
    for folder in ("t1", "image"):
        with pytest.raises(DataFormatError, match=rf"{folder}: a folder of images found, masks expected; give .*mask"):
            find_masks(tree / folder)
    assert find_masks(tree / "mask") == [("a", tree / "mask" / "a.nii")]
    flat = build(tmp_path / "flat", REPLICAS["side by side"])
    assert [file.name for _, file in find_masks(flat)] == ["a_seg.nii.gz", "b_seg.nii.gz"]
    only = build(tmp_path / "only", Replica("", (), ("a_t1.nii", "a_flair.nii"), {}, ()))
    with pytest.raises(
        DataFormatError, match=r"only: no masks found; .*`hpc-ddpm data table .*only --out subjects\.csv`"
    ):
        find_masks(only)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"names are for \['t2'\], neither mask nor among modalities \['t1'\]"):
        DataConfig(names={"t2": "x"})
    with pytest.raises(ValueError, match=r"names of \['t1'\] are empty"):
        DataConfig(names={"t1": ""})
    assert DataConfig(names={"mask": "gtv"}).names == {"mask": ("gtv",)}
    assert LabelsConfig().names  # another thing of this name


def test_masks_of_two_kinds_are_not_mixed(tmp_path: Path) -> None:
    files = [f"sub-{one}/anat/sub-{one}_T1w.nii" for one in "ab"]
    files += ["derivatives/x/sub-a/anat/sub-a_desc-brain_mask.nii", "derivatives/x/sub-b/anat/sub-b_desc-les_mask.nii"]
    source = build(tmp_path, Replica("", (), tuple(files), {}, ()))
    with pytest.raises(
        DataFormatError, match=r"several kinds: desc-brain_mask, desc-les_mask; say which by data\.names"
    ):
        discover(source, DataConfig())
    chosen = discover(source, DataConfig(names={"mask": "desc-les_mask"}))
    assert [subject.id for subject in chosen.subjects] == ["sub-b"]


def test_cases_two_levels_down_come_before_those_below(tmp_path: Path) -> None:
    files = brats("HGG/", "_", ("seg", "t1"), "case_1") + brats("old/unused/", "_", ("seg", "t1"), "case_1")
    source = build(tmp_path, Replica("", (), files, {}, ()))
    assert [subject.mask.parent.parent.name for subject in discover(source, DataConfig()).subjects] == ["HGG"]


def test_what_fits_no_layout_is_led_to_a_table(tmp_path: Path) -> None:
    source = build(tmp_path / "odd", Replica("", (), ("p1/scan.nii", "p2/scan.nii"), {}, ()))
    for look in (lambda: discover(source, DataConfig()), lambda: find_masks(source), lambda: source_modalities(source)):
        with pytest.raises(DataFormatError, match=r"found p1, p2; expected .*`hpc-ddpm data table .*odd --out subj"):
            look()
    tree = build(tmp_path / "tree", Replica("", (), ("mask/a.nii", "t1/b.nii"), {}, ()))
    with pytest.raises(DataFormatError, match=r"no complete subject .* or a table: `hpc-ddpm data table .*tree --out"):
        discover(tree, DataConfig())
