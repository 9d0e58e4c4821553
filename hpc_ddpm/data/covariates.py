"""Covariates (`data.covariates`: age, sex, scanner, ...) from tables to numbers and back.

A subject's covariates are one float64 each, in the order of the settings: the number itself, or the position among
`values`; NaN where it is unknown.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpc_ddpm.config import CovariateConfig, did_you_mean
from hpc_ddpm.data.table import TABLE_SUFFIXES, read_columns
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import write_text

BESIDE = ("participants.tsv", "participants.csv")
"""Tables in the folder of a source that is no table itself; the first is that of BIDS."""
UNKNOWN = ("", "n/a", "na", "nan")

Covariates = Mapping[str, CovariateConfig]
Numbers = tuple[float, ...]
NO_COVARIATES: Covariates = MappingProxyType({})


def to_numbers(values: Mapping[str, Any], covariates: Covariates, place: str) -> Numbers:
    """Values by name as numbers; what is not named, or empty, or n/a, is unknown.

    Raises:
        DataFormatError: a name or category that is not among the settings, or no number; begins with `place`.
    """
    for name in values:
        if name not in covariates:
            there = ", ".join(covariates) or "none"
            raise DataFormatError(f"{place}: covariate {name} is not one of the model's: {there}; leave it out")
    return tuple(_number(name, values.get(name), covariate, place) for name, covariate in covariates.items())


def to_values(numbers: Sequence[float], covariates: Covariates) -> dict[str, float | str]:
    """The covariates that are known, by name."""
    return {
        name: covariate.values[int(number)] if covariate.values else float(number)
        for number, (name, covariate) in zip(numbers, covariates.items(), strict=True)
        if not math.isnan(number)
    }


def known_values(values: Mapping[str, Any], covariates: Covariates, place: str) -> dict[str, float | str]:
    """Values as they are stored and shown, without the unknown ones; errors as `to_numbers`."""
    return to_values(to_numbers(values, covariates, place), covariates)


def find_table(source: Path) -> Path | None:
    """The table that holds the covariates of a source's subjects: the source itself, or one in its folder."""
    if source.suffix.lower() in TABLE_SUFFIXES:
        return source
    return next((source / name for name in BESIDE if (source / name).is_file()), None)


def read_covariates(source: Path, covariates: Covariates, subjects: Iterable[str]) -> list[Numbers]:
    """Those of each subject, from the table of the source.

    Raises:
        DataFormatError: no table, a column or row is missing, or a cell is wrong; names it.
    """
    table, names = find_table(source), ", ".join(covariates)
    if table is None:
        raise DataFormatError(
            f"{source}: data.covariates asks for {names}, but there is no {BESIDE[0]}; "
            f"add one with the columns participant_id, {names}"
        )
    rows, wanted = read_columns(table, covariates), list(subjects)
    absent = [name for name in covariates if all(name not in row for row in rows.values())]
    if absent:
        raise DataFormatError(f"{table}: no column {', '.join(absent)}, data.covariates asks for it; add the column")
    missing = [subject for subject in wanted if find_row(rows, subject) is None]
    if missing:
        raise DataFormatError(
            f"{table}: no row for {len(missing)} of {len(wanted)} subjects ({', '.join(missing[:5])}); "
            "add them, with n/a for what is not known"
        )
    return [to_numbers(find_row(rows, subject) or {}, covariates, f"{table}, {subject}") for subject in wanted]


def write_participants(folder: Path, rows: Mapping[str, Sequence[float]], covariates: Covariates) -> None:
    """Write subjects and their numbers as a table that `read_covariates` finds in the folder."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["participant_id", *covariates])
    for subject, numbers in rows.items():
        values = to_values(numbers, covariates)
        table.writerow([subject, *(values.get(name, "n/a") for name in covariates)])
    write_text(folder / BESIDE[0], text.getvalue())


def find_row(rows: Mapping[str, Mapping[str, str]], subject: str) -> Mapping[str, str] | None:
    """The row of a subject, or of the participant of a BIDS session."""
    return rows.get(subject, rows.get(subject.partition("_")[0]) if subject.startswith("sub-") else None)


def _number(name: str, value: Any, covariate: CovariateConfig, place: str) -> float:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).strip()
    if text in covariate.values:
        return float(covariate.values.index(text))
    if text.lower() in UNKNOWN:
        return math.nan
    if covariate.values:
        near = did_you_mean(text, list(covariate.values))
        raise DataFormatError(
            f"{place}: {name} is {text!r}, expected {', '.join(covariate.values)}, or n/a where it is not known{near}"
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise DataFormatError(f"{place}: {name} is {text!r}, expected a number, or n/a where it is not known")
    return number
