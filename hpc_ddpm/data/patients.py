"""Which patient a subject belongs to: all subjects of a patient (sessions, follow-ups) stay in one split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.covariates import find_row, find_table
from hpc_ddpm.data.table import PATIENT_COLUMNS, TABLE_SUFFIXES, read_columns, read_records
from hpc_ddpm.errors import ConfigError, DataFormatError

BY_NAME, ALONE = "auto", "subject"
"""Values of `data.group`: what layout, table or name says; every subject is a patient of its own."""
KNOWN_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(sub-[^_]+)(?:_.*)?",  # BIDS: sessions, runs, spaces
        r"(BraTS-[A-Z-]+-\d+)-\d+(?:_.*)?",  # BraTS from 2023 on: the last number is the time point
        r"(UCSF-PDGM-\d+)(?:_.*)?",  # follow-ups end in _FU001d
        r"(TCGA-\w{2}-\w{4})(?:[-_].*)?",
        r"(OAS[12]_\d{4}|OAS3\d{4})_.*",  # OASIS-1, -2 and -3
        r"(?:.*_)?(\d{3}_S_\d{4,5})(?:_.*)?",  # ADNI
    )
)
"""Names of subjects that tell the patient, whatever the layout."""


def patient_by_name(subject: str, group: str) -> str:
    """The patient that the name of a subject tells; the subject itself where it tells none.

    Raises:
        DataFormatError: `group` is a pattern that the name does not match.
    """
    if is_pattern(group):
        match = re.fullmatch(group, subject)
        if match is None or not match.group(1):
            raise DataFormatError(
                f"data.group={group} does not match subject {subject}, so its patient is unknown; "
                "the pattern must match every name as a whole, with the patient in parentheses"
            )
        return match.group(1)
    matches = (pattern.fullmatch(subject) for pattern in KNOWN_NAMES if group == BY_NAME)
    return next((match.group(1) for match in matches if match), subject)


def find_patients(source: Path, group: str, subjects: Sequence[str], told: Mapping[str, str]) -> dict[str, str]:
    """The patient of each of these subjects.

    Args:
        source: a folder or table.
        group: `data.group`.
        subjects: ids.
        told: subject -> patient, as far as the layout knows.

    Raises:
        DataFormatError: a pattern does not match, or the column, a row or a cell is missing.
    """
    if is_column(group):
        return read_patients(find_table(source), group, subjects, str(source))
    cells = _patient_cells(source) if group == BY_NAME and source.suffix.lower() in TABLE_SUFFIXES else {}
    told = {**told, **cells} if group == BY_NAME else {}
    return {subject: told.get(subject) or patient_by_name(subject, group) for subject in subjects}


def read_patients(table: Path | None, column: str, subjects: Sequence[str], place: str) -> dict[str, str]:
    """Subject -> its cell of a column; errors as `find_patients`; `place` is named where there is no table."""
    if table is None:
        raise DataFormatError(
            f"{place}: data.group={column} is a column, but there is no participants.tsv or other table; add one, "
            "or give a pattern with the patient in parentheses"
        )
    rows = read_columns(table, [column])
    if all(column not in row for row in rows.values()):
        raise DataFormatError(f"{table}: no column {column}, which data.group names; add it, or use data.group=auto")
    cells = {subject: (find_row(rows, subject) or {}).get(column, "") for subject in subjects}
    empty = [subject for subject, cell in cells.items() if not cell]
    if empty:
        raise DataFormatError(
            f"{table}: no {column} for {len(empty)} of {len(cells)} subjects ({', '.join(empty[:5])}); fill it in"
        )
    return cells


def _patient_cells(table: Path) -> dict[str, str]:
    """Subject -> patient, as far as a table of subjects says."""
    cells = {}
    for record in read_records(table):
        row = {str(name).lower(): str(cell or "").strip() for name, cell in record.items()}
        patient = next((row[name] for name in PATIENT_COLUMNS if row.get(name)), "")
        if row.get("subject") and patient:
            cells[row["subject"]] = patient
    return cells


def checked_group(group: str) -> str:
    """`group`, if `data.group` may be that; raises ConfigError."""
    try:
        return DataConfig(group=group).group
    except ValidationError as error:
        raise ConfigError(f"data.group: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def is_pattern(group: str) -> bool:
    """Whether a value of `data.group` is a regular expression; else it is a word or a column."""
    return "(" in group


def is_column(group: str) -> bool:
    """Whether a value of `data.group` is the name of a column."""
    return group not in (BY_NAME, ALONE) and not is_pattern(group)


def first_subjects(patients: Mapping[str, str]) -> dict[str, str]:
    """Subject -> the first subject, by name, of the same patient; `patients` is subject -> patient."""
    first: dict[str, str] = {}
    for subject in sorted(patients):
        first.setdefault(patients[subject], subject)
    return {subject: first[patient] for subject, patient in patients.items()}


def beyond_names(patients: Mapping[str, str], group: str) -> dict[str, str]:
    """`first_subjects` of these patients; empty if the subjects' names already tell the same patients."""
    by_name = {subject: patient_by_name(subject, group) for subject in patients}
    first = first_subjects(patients)
    return {} if first == first_subjects(by_name) else first


def torn_patients(rows: Iterable[tuple[str, str, str | None]]) -> dict[str, list[str]]:
    """Patients in more than one split, with their subjects; `rows` are (subject, patient, split or None)."""
    subjects, splits = defaultdict(list), defaultdict(set)
    for subject, owner, split in rows:
        if split:
            patient = owner or subject
            subjects[patient].append(subject)
            splits[patient].add(split)
    return {patient: sorted(subjects[patient]) for patient, found in splits.items() if len(found) > 1}


def refuse_torn(place: str, rows: Iterable[tuple[str, str, str | None]], setting: str = "data.group") -> None:
    """Raises DataFormatError where a patient is in two splits; `rows` as in `torn_patients`."""
    torn = torn_patients(rows)
    if torn:
        some = "; ".join(", ".join(subjects[:4]) for subjects in list(torn.values())[:3])
        raise DataFormatError(
            f"{place}: {len(torn)} patients are in more than one split ({some}); give all subjects of a patient one "
            f"split, or say {setting}=subject if these are different people"
        )
