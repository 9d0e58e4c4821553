"""`hpc-ddpm data table`: a table for what no layout fits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import discover
from hpc_ddpm.data.draft import draft_table, write_draft
from hpc_ddpm.data.nifti import write_nifti
from hpc_ddpm.errors import DataFormatError
from launch.cli import main


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


ADNI = "002_S_0295/{}/2006-04-18_08_20_30.0/I118671/ADNI_002_S_0295_MR_{}_S13408_I118671.nii"


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        (
            ("p1/scan.nii", "p1/contour.nii", "p2/scan.nii", "p2/contour.nii"),
            {"p1": ("p1/contour.nii", "p1/scan.nii", ""), "p2": ("p2/contour.nii", "p2/scan.nii", "")},
        ),
        (
            ("case-1_T1.nii.gz", "gt/case-1_roi.nii.gz", "deep/er/case-2_T1.nii.gz", "gt/case-2_roi.nii.gz"),
            {
                "case_1": ("gt/case-1_roi.nii.gz", "case-1_T1.nii.gz", ""),
                "case_2": ("gt/case-2_roi.nii.gz", "deep/er/case-2_T1.nii.gz", ""),
            },
        ),
        (
            (ADNI.format("MPR", "MPR"), ADNI.format("Hippocampal_Mask", "Hippocampal_Mask_Hi")),
            {"002_S_0295": (ADNI.format("Hippocampal_Mask", "Hippocampal_Mask_Hi"), ADNI.format("MPR", "MPR"), "")},
        ),
        (
            ("img/0001.nii.gz", "Manual Labels/0001.nii.gz", "img/0002.nii.gz"),
            {
                "0001": ("Manual Labels/0001.nii.gz", "img/0001.nii.gz", ""),
                "0002": ("", "img/0002.nii.gz", "no mask found"),
            },
        ),
        (
            ("a/a_seg.nii", "a/a_gt.nii", "a/a_ct.nii"),
            {"a": ("a/a_gt.nii", "a/a_ct.nii", "2 files for mask; not used: a/a_seg.nii")},
        ),
    ],
    ids=["folders", "names", "adni", "a mask is missing", "two masks"],
)
def test_subjects_and_roles_are_guessed(
    tmp_path: Path, files: tuple[str, ...], rows: dict[str, tuple[str, str, str]]
) -> None:
    draft = draft_table(touch(tmp_path, *files))
    image = next(name for name in draft.columns if name not in ("subject", "patient", "mask", "note"))
    found = {row["subject"]: (row["mask"], row[image], row["note"].replace("yes", "")) for row in draft.rows}
    assert found == rows
    assert draft.num_sure == sum(not note for *_, note in rows.values())


def test_what_is_written_can_be_packed_and_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for patient in ("sub-1_a", "sub-1_b"):
        for name in ("brain T1w", "my,labels"):
            write_nifti(tmp_path / "odd" / patient / f"{name}.nii.gz", np.ones((4, 4, 4), np.uint8), np.eye(4))
    for out in (tmp_path / "t.csv", tmp_path / "elsewhere" / "t.tsv"):
        monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "data", "table", str(tmp_path / "odd"), "--out", str(out)])
        with pytest.raises(SystemExit, match="0"):
            main()
        assert "2 subjects with columns mask, t1; 2 are clear" in capsys.readouterr().out
        found = discover(out, DataConfig())
        assert [(one.id, one.patient, one.mask.exists()) for one in found.subjects] == [
            ("sub-1_a", "sub-1", True),
            ("sub-1_b", "sub-1", True),
        ]
    assert '"odd/sub-1_a/my,labels.nii.gz"' in (tmp_path / "t.csv").read_text()
    draft = draft_table(tmp_path / "odd")
    with pytest.raises(DataFormatError, match="there already, and it may have been edited"):
        write_draft(draft, tmp_path / "odd", tmp_path / "t.csv")
    with pytest.raises(DataFormatError, match=r"ending in \.csv or \.tsv expected"):
        write_draft(draft, tmp_path / "odd", tmp_path / "t.xlsx")


def test_nothing_to_draft_from(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="no such folder"):
        draft_table(tmp_path / "gone")
    with pytest.raises(DataFormatError, match="no volumes found below"):
        draft_table(touch(tmp_path, "notes.txt"))
