"""A table: a row per subject."""

from __future__ import annotations

from pathlib import Path

from hpc_ddpm.data.layouts.base import Files, Layout, Roles
from hpc_ddpm.data.series import split_series
from hpc_ddpm.data.table import TABLE_SUFFIXES, read_table, table_modalities


def _fits(source: Path) -> bool:
    return source.is_file() and source.suffix.lower() in TABLE_SUFFIXES


def _read(source: Path, roles: Roles) -> Files:
    files = Files()
    for row in read_table(source, roles.modalities):
        if row.split:
            files.splits[row.subject] = row.split
        for role, path in row.files.items():
            if _is_there(split_series(path)[0]):
                files.add(row.subject, role, path)
            else:
                files.leave_out(path, f"{row.place}: no such file", "missing-file")
    return files


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name of more than 255 bytes
        return False


TABLE = Layout("table", "a .csv, .tsv or .json table", _fits, _read, table_modalities)
