"""Find subjects in a source: pair masks and images by subject id, and name every file that has no partner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.covariates import read_covariates
from hpc_ddpm.data.layouts import LAYOUTS, TABLE
from hpc_ddpm.data.layouts.base import MASK, Files, Roles, Unmatched
from hpc_ddpm.data.patients import find_patients
from hpc_ddpm.errors import DataFormatError
from hpc_ddpm.files import reading_from


@dataclass(frozen=True)
class Subject:
    """A mask and one image per modality."""

    id: str
    mask: Path
    images: Mapping[str, Path]
    split: str | None = None
    """train, val or test where the table says so."""
    covariates: tuple[float, ...] = ()
    """One number for each of `data.covariates`; see `covariates.to_numbers`."""
    patient: str = ""
    """Whose it is, see `patients.py`; empty: nobody else's."""


@dataclass(frozen=True)
class Discovery:
    """What a source holds."""

    layout: str
    """A key of `LAYOUTS`."""
    subjects: tuple[Subject, ...]
    """Complete ones, sorted by id."""
    unmatched: tuple[Unmatched, ...]


def discover(source: str | Path, config: DataConfig) -> Discovery:
    """Find the subjects of `source` in `config.layout` (auto: by looking).

    Raises:
        DataFormatError: nothing there, an unknown layout, a broken table, not one complete subject, or covariates
            that are missing or wrong.
    """
    source = Path(source)
    layout = find_layout(source) if config.layout == "auto" else config.layout
    with reading_from(source):
        files = LAYOUTS[layout].read(source, roles_of(config))
    subjects, unmatched = _pair(files, config.modalities)
    if not subjects:
        some = "; ".join(str(entry) for entry in unmatched[:3])
        raise DataFormatError(
            f"{source}: no complete subject found as layout '{layout}' ({len(unmatched)} files do not pair: "
            f"{some or 'no volumes'}); expected a mask and {', '.join(config.modalities)} for each subject, "
            f"or a table: {table_advice(source)}"
        )
    patients = find_patients(source, config.group, [subject.id for subject in subjects], files.patients)
    subjects = tuple(replace(subject, patient=patients[subject.id]) for subject in subjects)
    if config.covariates:
        numbers = read_covariates(source, config.covariates, [subject.id for subject in subjects])
        subjects = tuple(replace(subject, covariates=of) for subject, of in zip(subjects, numbers, strict=True))
    return Discovery(layout, subjects, unmatched)


def find_layout(source: Path) -> str:
    """The first of `LAYOUTS` that fits.

    Raises:
        DataFormatError: none of these; says what is there.
    """
    with reading_from(source):
        return _find_layout(source)


def _find_layout(source: Path) -> str:
    if not source.exists() or (source.is_file() and not TABLE.fits(source)):
        found = "not a folder or a table" if source.exists() else "no such folder or table"
        raise DataFormatError(f"{source}: {found}; give a folder of volumes or a .csv, .tsv or .json table")
    for layout in LAYOUTS.values():
        if source.is_dir() != (layout is TABLE) and layout.fits(source):
            return layout.name
    names = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
    known = ", ".join(layout.looks_like for layout in LAYOUTS.values() if layout is not TABLE)
    raise DataFormatError(f"{source}: found {names}; expected {known}; or give a table: {table_advice(source)}")


def table_advice(source: Path) -> str:
    """What to do where no layout fits."""
    return f"`hpc-ddpm data table {source} --out subjects.csv` drafts one to edit"


def source_modalities(source: str | Path) -> tuple[str, ...]:
    """The modalities that a source offers, by its folders, file endings or columns, in its own order.

    A single unnamed image folder is `t1`; empty where there are only masks.
    """
    source = Path(source)
    layout = LAYOUTS[find_layout(source)]
    with reading_from(source):
        return layout.modalities(source)


def roles_of(config: DataConfig) -> Roles:
    """What a configuration looks for."""
    return Roles(config.modalities, config.names)


def _pair(files: Files, modalities: tuple[str, ...]) -> tuple[tuple[Subject, ...], tuple[Unmatched, ...]]:
    roles = (MASK, *modalities)
    subjects, unmatched = [], list(files.unmatched)
    for subject in files.subjects:
        groups = {role: files.best(subject, role) for role in roles}
        missing = [role for role, paths in groups.items() if not paths]
        double = [role for role, paths in groups.items() if len(paths) > 1]
        if not missing and not double:
            images = {modality: groups[modality][0] for modality in modalities}
            subjects.append(Subject(subject, groups[MASK][0], images, files.splits.get(subject)))
            aside = f"subject {subject} has another file for this"
            unmatched += [Unmatched(path, aside, "set-aside") for path in files.set_aside(subject)]
            continue
        kind, reason = "unmatched-file", f"subject {subject} has no {', '.join(missing)}"
        if not missing:
            kind, reason = "duplicate-subject", f"subject {subject} has more than one {', '.join(double)}"
        unmatched += [Unmatched(path, reason, kind) for paths in groups.values() for path in paths]
    return tuple(subjects), tuple(unmatched)
