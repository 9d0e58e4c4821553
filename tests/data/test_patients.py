"""All subjects of one patient stay in one split: when packed, divided anew, added to, checked and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.config import DataConfig, LabelsConfig
from hpc_ddpm.data.check.run import check
from hpc_ddpm.data.discover import Subject, discover
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.patients import patient_by_name
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.data.resplit import divide, draw_splits, resplit
from hpc_ddpm.data.shards import INDEX, open_packed, read_index
from hpc_ddpm.data.split import split_subjects
from hpc_ddpm.data.verify import verify
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.sealed import KEY, seal

Tiny = Callable[..., DataConfig]
LONGITUDINAL = tuple(f"BraTS-GLI-{patient:05d}-{visit}" for patient in range(10) for visit in (100, 101))


def write_tree(folder: Path, names: tuple[str, ...]) -> Path:
    """Phantoms under these names."""
    write_phantoms(folder, len(names), (8, 10, 12), labels=LabelsConfig())
    for role in ("mask", "t1"):
        for file, name in zip(sorted((folder / role).iterdir()), names, strict=True):
            file.rename(file.with_name(f"{name}.nii.gz"))
    return folder


def write_table(folder: Path, header: str, rows: list[str]) -> Path:
    """A table of the first phantoms, with more columns."""
    lines = [f"{name},mask/{name}.nii.gz,t1/{name}.nii.gz,{row}" for name, row in zip("abcdefgh", rows, strict=False)]
    (folder / "t.csv").write_text("\n".join([f"subject,mask,t1,{header}", *lines]))
    return folder / "t.csv"


@pytest.fixture(scope="module")
def longitudinal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("longitudinal") / "tree", LONGITUDINAL)


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "eight", tuple("abcdefgh"))


def splits_of(path: Path) -> dict[str, str]:
    return {subject.id: subject.split for subject in open_packed(path).subjects()}


def torn(path: Path, group: str = "auto") -> set[str]:
    found: dict[str, set[str]] = {}
    for subject, split in splits_of(path).items():
        found.setdefault(patient_by_name(subject, group), set()).add(split)
    return {patient for patient, splits in found.items() if len(splits) > 1}


@pytest.mark.parametrize(
    ("subject", "patient"),
    [
        ("sub-01_ses-pre_run-1", "sub-01"),
        ("sub-01", "sub-01"),
        ("BraTS-GLI-00005-101", "BraTS-GLI-00005"),
        ("BraTS-MEN-RT-0003-1", "BraTS-MEN-RT-0003"),
        ("BraTS-GLI-00005-101_r002", "BraTS-GLI-00005"),
        ("BraTS2021_00005", "BraTS2021_00005"),
        ("UCSF-PDGM-0409_FU001d", "UCSF-PDGM-0409"),
        ("TCGA-02-0006_1996.08.23", "TCGA-02-0006"),
        ("OAS2_0001_MR2", "OAS2_0001"),
        ("OAS30001_MR_d0129", "OAS30001"),
        ("ADNI_002_S_0295_MR_I118671", "002_S_0295"),
        ("case-7", "case-7"),
    ],
)
def test_names_that_tell_the_patient(subject: str, patient: str) -> None:
    assert patient_by_name(subject, "auto") == patient
    assert patient_by_name(subject, "subject") == subject


def test_time_points_are_not_torn_and_who_has_one_stays_where_it_was(
    longitudinal: Path, tmp_path: Path, tiny: Tiny
) -> None:
    pack(longitudinal, tmp_path / "old", tiny(val_fraction=0.4, group="subject"))
    assert torn(tmp_path / "old") == set() or len(torn(tmp_path / "old")) > 1
    assert torn(tmp_path / "old"), "the cohort is one that used to leak"
    pack(longitudinal, tmp_path / "new", tiny(val_fraction=0.4))
    assert torn(tmp_path / "new") == set()
    assert set(splits_of(tmp_path / "new").values()) == {"train", "val"}
    assert "patients" not in (tmp_path / "new" / INDEX).read_text(), "names tell, so the index need not"
    single = [Subject(f"BraTS-GLI-{n:05d}-000", Path(), {}, patient=f"BraTS-GLI-{n:05d}") for n in range(50)]
    alone = [Subject(one.id, one.mask, {}) for one in single]
    assert split_subjects(single, 0.2) == split_subjects(alone, 0.2)


def write_sealed(path: Path, content: dict) -> None:
    """Write what a program of another version might have written, with the checksum that fits to it."""
    path.write_text(seal(json.dumps({name: value for name, value in content.items() if name != KEY})))


def test_verify_finds_what_leaks_and_split_mends_it(longitudinal: Path, tmp_path: Path, tiny: Tiny) -> None:
    packed = tmp_path / "packed"
    pack(longitudinal, packed, tiny(val_fraction=0.4, group="subject"))
    assert verify(packed) == [], "asked for"
    content = json.loads((packed / INDEX).read_text())
    del content["data"]["group"]  # as packed by a version that knew no patients
    write_sealed(packed / INDEX, content)
    findings = verify(packed)
    assert {finding.kind for finding in findings} == {"leaking-patient"}
    assert {finding.subjects for finding in findings} == {
        (f"{patient}-100", f"{patient}-101") for patient in torn(packed)
    }
    divide(packed, 0.3, 0.2, 1, None, None)
    assert verify(packed) == [] and torn(packed) == set()
    assert set(splits_of(packed).values()) == {"train", "val", "test"}
    wrong = splits_of(packed) | {LONGITUDINAL[0]: "val", LONGITUDINAL[1]: "test"}
    with pytest.raises(DataFormatError, match=r"1 patients are in more than one split .*or say --group=subject"):
        resplit(packed, wrong)
    resplit(packed, wrong, "subject", {name: name for name in LONGITUDINAL})
    assert verify(packed) == [] and read_index(packed).config.group == "subject"


def test_a_visit_that_comes_later_joins_its_patient(tmp_path: Path, tiny: Tiny) -> None:
    names = tuple(f"sub-{n:02d}_ses-{s}" for n in range(8) for s in ("b", "c"))
    tree = write_tree(tmp_path / "tree", names)
    later = [*tree.glob("*/sub-*_ses-c.nii.gz")]
    for file in later:
        file.rename(tmp_path / f"{file.parent.name}-{file.name}")
    config = tiny(val_fraction=0.5)
    pack(tree, tmp_path / "packed", config)
    before = splits_of(tmp_path / "packed")
    for file in later:
        (tmp_path / f"{file.parent.name}-{file.name}").rename(file)
    pack(tree, tmp_path / "packed", config)
    after = splits_of(tmp_path / "packed")
    assert len(after) == 16 and {name: after[name] for name in before} == before
    assert torn(tmp_path / "packed") == set() and verify(tmp_path / "packed") == []


@pytest.mark.parametrize("group", ["auto", "scanned person"])
def test_a_column_of_the_table(eight: Path, tmp_path: Path, tiny: Tiny, group: str) -> None:
    column = "patient_id" if group == "auto" else group
    table = write_table(eight, column, [f"Jane Doe {n // 2}" for n in range(8)])
    packed = tmp_path / "packed"
    pack(table, packed, tiny(val_fraction=0.5, group=group))
    splits = splits_of(packed)
    assert all(splits[one] == splits[other] for one, other in ("ab", "cd", "ef", "gh"))
    assert set(splits.values()) == {"train", "val"} and verify(packed) == []
    text = (packed / INDEX).read_text()
    assert "Jane" not in text, "who the patient is stays out of the dataset"
    assert json.loads(text)["shards"][0]["patients"]["3"] == "c"
    divide(packed, 0.4, 0.2, 3, None, None)
    splits = splits_of(packed)
    assert all(splits[one] == splits[other] for one, other in ("ab", "cd", "ef", "gh"))
    pack(table, packed, tiny(val_fraction=0.5, group=group))
    assert splits_of(packed) == splits


def test_a_pattern_and_a_column_for_split(eight: Path, tmp_path: Path, tiny: Tiny) -> None:
    tree = write_tree(tmp_path / "tree", ("p1x", "p1y", "p2x", "p2y", "p3x", "p3y"))
    pack(tree, tmp_path / "packed", tiny(val_fraction=0.5, group=r"(p\d).*"))
    assert torn(tmp_path / "packed", r"(p\d).*") == set()
    with pytest.raises(DataFormatError, match=r"does not match subject p1x, so its patient is unknown; the pattern"):
        discover(tree, tiny(group=r"(q\d).*"))
    with pytest.raises(ValueError, match=r"no part in parentheses|not a regular expression"):
        tiny(group="(p")
    pack(eight, tmp_path / "other", tiny())
    with pytest.raises(ConfigError, match=r"data\.group: group '\(p' is not a regular expression"):
        divide(tmp_path / "other", 0.5, 0, 0, None, "(p")
    table = tmp_path / "who.csv"
    table.write_text("subject,person\n" + "".join(f"{name},{n // 4}\n" for n, name in enumerate("abcdefgh")))
    divide(tmp_path / "other", 0.5, 0, 0, table, "person")
    splits = splits_of(tmp_path / "other")
    assert len({splits[name] for name in "abcd"}) == len({splits[name] for name in "efgh"}) == 1
    assert verify(tmp_path / "other") == []
    with pytest.raises(DataFormatError, match=r"who\.csv: no column home, which data\.group names"):
        divide(tmp_path / "other", 0.5, 0, 0, table, "home")
    with pytest.raises(DataFormatError, match=r"--table: data\.group=person is a column, but there is no"):
        divide(tmp_path / "other", 0.5, 0, 0, None, "person")


def test_a_table_that_tears_a_patient(eight: Path, tmp_path: Path, tiny: Tiny) -> None:
    rows = ["P1,train", "P1,val", "P2,train", "P2,", *(f"P{n},train" for n in range(3, 7))]
    table = write_table(eight, "patient,split", rows)
    findings = [finding for finding in check(table, tiny()).findings if finding.kind == "patient-in-two-splits"]
    assert [finding.subjects for finding in findings] == [("a", "b")]
    with pytest.raises(DataFormatError, match=r"1 patients are in more than one split \(a, b\); give all subjects"):
        pack(table, tmp_path / "packed", tiny())
    pack(table, tmp_path / "packed", tiny(group="subject"))
    assert splits_of(tmp_path / "packed")["b"] == "val"
    table = write_table(eight, "patient,split", [row.replace("val", "") for row in rows])
    pack(table, tmp_path / "joined", tiny(val_fraction=0.9))
    assert [splits_of(tmp_path / "joined")[name] for name in "abd"] == ["train"] * 3


def test_participants_of_a_bids_like_tree(tmp_path: Path, tiny: Tiny) -> None:
    tree = write_tree(tmp_path / "tree", tuple(f"sub-{n}" for n in range(6)))
    (tree / "participants.tsv").write_text(
        "participant_id\tfamily\n" + "".join(f"sub-{n}\tf{n // 3}\n" for n in range(6))
    )
    pack(tree, tmp_path / "packed", tiny(val_fraction=0.5, group="family"))
    splits = list(splits_of(tmp_path / "packed").values())
    assert sorted({tuple(splits[:3]), tuple(splits[3:])}) == [("train",) * 3, ("val",) * 3]
    (tree / "participants.tsv").write_text("participant_id\tfamily\nsub-0\tf0\n")
    with pytest.raises(DataFormatError, match=r"no family for 5 of 6 subjects \(sub-1, "):
        discover(tree, tiny(group="family"))


def test_draws_by_patient() -> None:
    ids = [f"s{n}" for n in range(40)]
    patients = {subject: f"p{n // 4}" for n, subject in enumerate(ids)}
    splits = draw_splits(ids, 0.3, 0.2, 0, patients)
    assert {len({splits[ids[4 * p + k]] for k in range(4)}) for p in range(10)} == {1}
    assert set(splits.values()) == {"train", "val", "test"}
    with pytest.raises(ConfigError, match="1 patients cannot be divided into 2 splits"):
        draw_splits(ids[:4], 0.3, 0, 0, patients)


def test_a_damaged_entry_of_patients(eight: Path, tmp_path: Path, tiny: Tiny) -> None:
    packed = tmp_path / "packed"
    pack(write_table(eight, "patient", ["x", "x", *"cdefgh"]), packed, tiny())
    content = json.loads((packed / INDEX).read_text())
    content["shards"][0]["patients"] = {"99": "a"}
    write_sealed(packed / INDEX, content)
    assert [finding.kind for finding in verify(packed)] == ["index-mismatch"]
    content["shards"][0]["patients"] = ["a"]
    write_sealed(packed / INDEX, content)
    assert [finding.kind for finding in verify(packed)] == ["index-damaged"]
