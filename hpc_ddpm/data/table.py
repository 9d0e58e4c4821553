"""Tables of subjects: CSV, TSV or JSON with columns subject, mask, one per modality, and optionally split."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import is_file_name

TABLE_SUFFIXES = (".csv", ".tsv", ".json")
SPLITS = ("train", "val", "test")
PATIENT_COLUMNS = ("patient", "patient_id", "participant_id")
"""Columns that name the patient of a subject without being asked for; the first that is there counts."""


@dataclass(frozen=True)
class Row:
    """One subject of a table."""

    subject: str
    files: Mapping[str, Path]
    """`mask` and each modality; existence is not checked here."""
    split: str | None
    place: str
    """File and row, for messages."""


def read_table(path: Path, modalities: tuple[str, ...]) -> list[Row]:
    """Rows of a table; relative paths are taken from its folder and may not leave it.

    Args:
        path: a .csv, .tsv or .json file (a list of objects, or {"subjects": [...]}).
        modalities: columns needed besides subject and mask; other columns are ignored.

    Raises:
        DataFormatError: unreadable, a missing column or cell, a path that climbs out, a wrong split.
    """
    records = read_records(path)
    if not records:
        raise DataFormatError(f"{path}: no rows found; expected one per subject")
    columns = {"subject", "mask", *modalities}
    found = {name.lower() for record in records for name in record}
    missing = sorted(column for column in columns if column.lower() not in found)
    if missing:
        raise DataFormatError(
            f"{path}: column {', '.join(missing)} not found among {', '.join(sorted(found))}; "
            f"expected subject, mask, {', '.join(modalities)} and optionally split"
        )
    return [_row(path, number, record, modalities) for number, record in enumerate(records, start=1)]


def table_modalities(path: Path) -> tuple[str, ...]:
    """The columns of a table that are not subject, patient, mask or split, in their order."""
    names = dict.fromkeys(name for record in read_records(path) for name in record)
    return tuple(name for name in names if name.lower() not in {"subject", "mask", "split", *PATIENT_COLUMNS})


def has_column(path: Path, name: str) -> bool:
    """Whether a table has this column, in any case."""
    return any(str(column).lower() == name for record in read_records(path) for column in record)


def read_splits(path: Path) -> dict[str, str]:
    """Subject -> train, val or test, from the columns subject and split of a table; others are ignored.

    Raises:
        DataFormatError: unreadable, a missing column or cell, a wrong split, or a subject with two.
    """
    splits: dict[str, str] = {}
    for number, record in enumerate(read_records(path), start=1):
        cells = {str(name).lower(): str(value or "").strip() for name, value in record.items()}
        subject, split, place = cells.get("subject", ""), cells.get("split", ""), f"{path}, row {number}"
        if not subject or split not in SPLITS:
            raise DataFormatError(
                f"{place}: subject {subject!r} and split {split!r} found, "
                f"a subject and one of {', '.join(SPLITS)} expected"
            )
        if splits.setdefault(subject, split) != split:
            raise DataFormatError(f"{place}: {subject} is in {splits[subject]} and {split}; give it one split")
    return splits


def read_columns(path: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Subject -> its cells of those of these columns that are there; `participant_id` is as good as `subject`.

    Raises:
        DataFormatError: unreadable, no subject in a row, or a subject with two different rows.
    """
    wanted = {name.lower(): name for name in names}
    rows: dict[str, dict[str, str]] = {}
    for number, record in enumerate(read_records(path), start=1):
        cells = {str(name).lower(): "" if value is None else str(value).strip() for name, value in record.items()}
        subject = cells.get("subject") or cells.get("participant_id")
        if not subject:
            raise DataFormatError(f"{path}, row {number}: no subject; expected a column subject or participant_id")
        row = {wanted[name]: cell for name, cell in cells.items() if name in wanted}
        if rows.setdefault(subject, row) != row:
            raise DataFormatError(f"{path}, row {number}: {subject} is there twice, with other values; keep one row")
    return rows


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv or .json table, as they are; raises DataFormatError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            content = json.loads(text)
            records = content.get("subjects") if isinstance(content, dict) else content
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
            records = [_of_columns(path, number, row) for number, row in enumerate(rows, start=1)]
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataFormatError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataFormatError(f'{path}: expected a list of objects, or {{"subjects": [...]}}')
    return records


def _of_columns(path: Path, number: int, row: dict[str | None, Any]) -> dict[str, Any]:
    """A row without cells that have no column, which must be empty, and columns that have no name."""
    surplus = row.pop(None, [])
    if any(cell.strip() for cell in surplus):
        raise DataFormatError(
            f"{path}, row {number}: {len(row) + len(surplus)} cells found, {len(row)} columns expected; "
            "put a cell that holds the separator into quotes"
        )
    return {name: cell for name, cell in row.items() if name}


def _row(path: Path, number: int, record: Mapping[str, Any], modalities: tuple[str, ...]) -> Row:
    place = f"{path}, row {number}"
    cells = {str(name).lower(): str(value or "").strip() for name, value in record.items()}
    subject = cells.get("subject", "")
    if not is_file_name(subject):
        raise DataFormatError(f"{place}: subject {subject!r} found, a name without / or leading dot expected")
    split = cells.get("split") or None
    if split not in (*SPLITS, None):
        raise DataFormatError(f"{place}: split {split!r} found, expected {', '.join(SPLITS)} or nothing")
    files = {role: _path(path.parent, cells.get(role.lower(), ""), role, place) for role in ("mask", *modalities)}
    return Row(subject, files, split, place)


def _path(root: Path, cell: str, column: str, place: str) -> Path:
    if not cell:
        raise DataFormatError(f"{place}: column {column} is empty; give a path or remove the row")
    if Path(cell).is_absolute():
        return Path(cell)
    if Path(os.path.normpath(cell)).parts[:1] == (os.pardir,):
        raise DataFormatError(f"{place}: {cell} leaves the table's folder; give an absolute path")
    return root / os.path.normpath(cell)
