"""Covariates from tables into shards and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import CovariateConfig, DataConfig
from hpc_ddpm.data.covariates import to_numbers, to_values
from hpc_ddpm.data.dataset import VolumeDataset
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.export import export
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.shards import open_packed, open_reader
from hpc_ddpm.data.summary import describe_subject, summarise
from hpc_ddpm.errors import ConfigError, DataFormatError

AGE, SEX = CovariateConfig(mean=50, std=15), CovariateConfig(values=("F", "M"))
COVARIATES = {"age": AGE, "sex": SEX}
ROWS = "age\tsite\tsubject\tsex\n" + "".join(
    f"{30 + number if number else 'n/a'}\tx\thead_{number:04d}\t{'FM'[number % 2]}\n" for number in range(6)
)


def settings(**changes: object) -> DataConfig:
    return DataConfig(**{"size": (8, 8, 8), "covariates": COVARIATES, **changes})


def test_a_table_beside_the_folders_is_packed_and_read(heads: Path, tmp_path: Path) -> None:
    (heads / "participants.tsv").write_text(ROWS)
    pack(heads, tmp_path / "packed", settings(val_fraction=0.4))
    packed = open_packed(tmp_path / "packed")
    assert [subject.id for subject in packed.subjects()] == [f"head_{number:04d}" for number in range(6)]
    expected = np.array([[math.nan, 0], [31, 1], [32, 0], [33, 1], [34, 0], [35, 1]])
    assert np.array_equal(packed.covariates(COVARIATES), expected, equal_nan=True)
    assert np.array_equal(packed.covariates({"sex": SEX, "age": AGE}), expected[:, ::-1], equal_nan=True)
    val = VolumeDataset(tmp_path / "packed", "val")
    assert len(val) and np.array_equal(
        val.covariates(COVARIATES).numpy(), expected[[subject.index for subject in val.subjects]], equal_nan=True
    )
    assert summarise(tmp_path / "packed")["covariates"] == {
        "age": {"low_median_high": [31.0, 33.0, 35.0], "unknown": 1},
        "sex": {"F": 3, "M": 3, "unknown": 0},
    }
    assert describe_subject(packed, 0)["covariates"] == {"sex": "F"}
    with open_reader(tmp_path / "packed" / "shard-00000.h5") as shard:
        assert shard["covariates"][2].tolist() == [32, 0]
        assert json.loads(shard.attrs["covariates"])["sex"]["values"] == ["F", "M"]
    export(tmp_path / "packed", tmp_path / "tree", split="val")
    again = discover(tmp_path / "tree", settings()).subjects
    assert [subject.covariates[1] for subject in again] == [expected[subject.index, 1] for subject in val.subjects]
    assert pack(heads, tmp_path / "packed", settings(val_fraction=0.4)).num_written == 0
    (heads / "participants.tsv").write_text(ROWS.replace("33", "73"))
    with pytest.raises(DataFormatError, match=r"1 packed subject\(s\) changed since \(head_0003\)"):
        pack(heads, tmp_path / "packed", settings(val_fraction=0.4))


def test_without_covariates_nothing_of_them_is_stored(heads: Path, tmp_path: Path) -> None:
    (heads / "participants.tsv").write_text(ROWS)
    pack(heads, tmp_path / "packed", settings(covariates={}))
    with open_reader(tmp_path / "packed" / "shard-00000.h5") as shard:
        assert "covariates" not in shard and "covariates" not in shard.attrs
    assert open_packed(tmp_path / "packed").covariates({}).shape == (6, 0)


def test_the_table_of_the_subjects_has_them_itself(heads: Path) -> None:
    rows = [
        {"subject": "b", "mask": "mask/head_0001.nii.gz", "t1": "t1/head_0001.nii.gz", "AGE": 0, "sex": None},
        {"subject": "a", "mask": "mask/head_0000.nii.gz", "t1": "t1/head_0000.nii.gz", "AGE": "7.25", "sex": " M"},
    ]
    (heads / "table.json").write_text(json.dumps(rows))
    found = discover(heads / "table.json", settings()).subjects
    assert [subject.id for subject in found] == ["a", "b"]
    assert found[0].covariates == (7.25, 1.0)
    assert found[1].covariates[0] == 0 and math.isnan(found[1].covariates[1])


def test_bids_sessions_have_their_participants_row(tmp_path: Path, write, box_mask: np.ndarray) -> None:
    for subject in ("01", "02"):
        stem = f"sub-{subject}_ses-1"
        write(tmp_path / f"sub-{subject}" / "ses-1" / "anat" / f"{stem}_T1w.nii.gz")
        anat = tmp_path / "derivatives" / "seg" / f"sub-{subject}" / "ses-1" / "anat"
        write(anat / f"{stem}_dseg.nii.gz", box_mask)
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\tage\nsub-02\tM\t20\nsub-01\tn/a\t10\n")
    found = {
        subject.id: to_values(subject.covariates, COVARIATES) for subject in discover(tmp_path, settings()).subjects
    }
    assert found == {"sub-01_ses-1": {"age": 10.0}, "sub-02_ses-1": {"age": 20.0, "sex": "M"}}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (None, "data.covariates asks for age, sex, but there is no participants.tsv"),
        (ROWS.replace("\tsex\n", "\tgender\n"), "participants.tsv: no column sex, data.covariates asks for it"),
        (ROWS.replace("head_0003", "HEAD_3"), r"no row for 1 of 6 subjects \(head_0003\)"),
        (ROWS.replace("head_0001\tM", "head_0001\tMale"), "head_0001: sex is 'Male', expected F, M, or n/a"),
        (ROWS.replace("33", "33 years"), "head_0003: age is '33 years', expected a number, or n/a"),
        (ROWS.replace("33", "inf"), "head_0003: age is 'inf', expected a number"),
        (ROWS + "33\tx\thead_0001\tM\n", "row 7: head_0001 is there twice, with other values"),
        (ROWS + "33\tx\t\tM\n", "row 7: no subject; expected a column subject or participant_id"),
    ],
)
def test_a_wrong_table_is_one_line(heads: Path, tmp_path: Path, table: str | None, problem: str) -> None:
    if table is not None:
        (heads / "participants.tsv").write_text(table)
    with pytest.raises(DataFormatError, match=problem) as error:
        pack(heads, tmp_path / "packed", settings())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"field": AGE}, r"asks for field, .*packed was packed with age, sex; leave it out, or pack again"),
        ({"sex": CovariateConfig(values=("M", "F"))}, r"sex is \['M', 'F'\], .* was packed with \['F', 'M'\]"),
        ({"age": SEX}, r"age is \['F', 'M'\], .* was packed with a number"),
    ],
)
def test_what_was_packed_otherwise_is_one_line(heads: Path, tmp_path: Path, wanted: dict, problem: str) -> None:
    (heads / "participants.tsv").write_text(ROWS)
    pack(heads, tmp_path / "packed", settings())
    with pytest.raises(ConfigError, match=problem):
        open_packed(tmp_path / "packed").covariates(wanted)


@pytest.mark.parametrize(
    ("covariate", "problem"),
    [
        ({"mean": 5}, "either mean and std"),
        ({"mean": 5, "std": 1, "values": ["a", "b"]}, "either mean and std"),
        ({}, "either mean and std"),
        ({"values": ["a"]}, "two or more different ones"),
        ({"values": [True, "b"]}, "valid string"),
        ({"mean": 5, "std": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_refused(covariate: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CovariateConfig(**covariate)


def test_numbers_may_be_categories_and_zero_is_a_value() -> None:
    field = {"tesla": CovariateConfig(values=[1.5, 3]), "score": AGE}
    assert to_numbers({"tesla": "3", "score": "0"}, field, "here") == (1.0, 0.0)
    assert to_numbers({"tesla": 1.5, "score": 0}, field, "here") == (0.0, 0.0)
    with pytest.raises(DataFormatError, match="here: covariate age is not one of the model's: tesla, score"):
        to_numbers({"age": 3}, field, "here")
    with pytest.raises(ValueError, match="covariates cannot be called mask"):
        settings(covariates={"mask": AGE})
