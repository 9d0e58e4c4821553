"""New splits for a packed dataset: only index.json is written, volumes stay where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from hpc_ddpm.data.patients import (
    beyond_names,
    checked_group,
    first_subjects,
    is_column,
    patient_by_name,
    read_patients,
    refuse_torn,
)
from hpc_ddpm.data.shards import SPLITS, Index, ShardEntry, read_index, with_patients, write_index
from hpc_ddpm.data.table import has_column, read_splits
from hpc_ddpm.errors import ConfigError, DataFormatError
from hpc_ddpm.files import writing_to


def divide(
    path: Path, val_fraction: float, test_fraction: float, seed: int, table: Path | None, group: str | None
) -> dict[str, int]:
    """Divide a packed dataset anew: by the column split of `table`, else by a draw.

    Args:
        path: of the packed dataset.
        val_fraction: share of the patients, as the next two for `draw_splits`.
        test_fraction: share of the patients.
        seed: of the draw.
        table: with the column split; or with the column that `group` names, and then it may lack splits.
        group: `data.group` from now on; None keeps that of the dataset.

    Returns:
        Subjects per split.

    Raises:
        ConfigError: `group` cannot be, or as `draw_splits`.
        DataFormatError: as `resplit`, or the table is wrong.
    """
    index = read_index(path)
    patients = index.patients if group is None else _patients(index, checked_group(group), table)
    if table is not None and not (group and is_column(group) and not has_column(table, "split")):
        return resplit(path, read_splits(table), group, patients)
    return resplit(path, draw_splits(index.id, val_fraction, test_fraction, seed, patients), group, patients)


def _patients(index: Index, group: str, table: Path | None) -> dict[str, str]:
    if is_column(group):
        return read_patients(table, group, index.id, "--table")
    return {subject: patient_by_name(subject, group) for subject in index.id}


def draw_splits(
    subjects: Sequence[str],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    patients: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Subject -> train, val or test, by a hash of seed and id: others do not change when subjects are added.

    Every split with a fraction above 0, and train, gets at least one patient.

    Args:
        subjects: ids.
        val_fraction: share of the patients.
        test_fraction: share of the patients.
        seed: another one draws others.
        patients: subject -> patient; all subjects of one get one split. None: each is a patient of its own.

    Raises:
        ConfigError: fractions below 0 or 1 and more together, or too few patients.
    """
    if min(val_fraction, test_fraction) < 0 or not val_fraction + test_fraction < 1:  # NaN is refused too
        raise ConfigError(
            f"--val {val_fraction:g} and --test {test_fraction:g} leave nothing to train on; "
            "give fractions of at least 0 and below 1 together"
        )
    first = first_subjects({subject: (patients or {}).get(subject, subject) for subject in subjects})
    drawn = sorted(set(first.values()))
    needed = 1 + (val_fraction > 0) + (test_fraction > 0)
    if len(drawn) < needed:
        who = "subjects" if len(drawn) == len(subjects) else "patients"
        raise ConfigError(f"{len(drawn)} {who} cannot be divided into {needed} splits; set --val or --test to 0")
    places = {one: _place(one, seed) for one in drawn}
    num_test = max(sum(place < test_fraction for place in places.values()), int(test_fraction > 0))
    held_out = sum(place < test_fraction + val_fraction for place in places.values())
    num_val = max(held_out - num_test, int(val_fraction > 0))
    while num_test + num_val >= len(drawn):
        num_test, num_val = (num_test - 1, num_val) if num_test > num_val else (num_test, num_val - 1)
    names = ["test"] * num_test + ["val"] * num_val + ["train"] * (len(drawn) - num_test - num_val)
    splits = dict(zip(sorted(drawn, key=places.__getitem__), names, strict=True))
    return {subject: splits[first[subject]] for subject in subjects}


def resplit(
    path: str | Path, splits: Mapping[str, str], group: str | None = None, patients: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write new splits into the index, at once; readers that have it open keep the old ones.

    Args:
        path: of the packed dataset.
        splits: train, val or test for every packed subject.
        group: `data.group` from now on; None leaves it.
        patients: subject -> patient by this group; None: as the index has it.

    Returns:
        Subjects per split.

    Raises:
        DataFormatError: not a packed dataset, `splits` names other subjects than it holds, or it tears a patient.
        ClusterError: it cannot be written.
    """
    path = Path(path)
    index = read_index(path)
    missing, unknown = sorted(set(index.id) - set(splits)), sorted(set(splits) - set(index.id))
    if missing or unknown:
        what = f"{len(missing)} packed subjects have no split" if missing else f"{len(unknown)} subjects are not packed"
        some = ", ".join((missing or unknown)[:5])
        raise DataFormatError(f"{path}: {what} ({some}); name exactly the subjects of `hpc-ddpm data ls`")
    patients = index.patients if patients is None else patients
    rows = ((subject, patients[subject], splits[subject]) for subject in index.id)
    refuse_torn(str(path), rows, "--group")
    data = index.data if group is None else {**index.data, "group": group}
    stored = beyond_names(patients, group or index.config.group)
    with writing_to(path, "copy of the dataset"):
        write_index(path, data, [with_patients(_with_splits(entry, splits), stored) for entry in index.shards])
    return {name: count for name in SPLITS if (count := Counter(splits.values())[name])}


def _with_splits(entry: ShardEntry, splits: Mapping[str, str]) -> ShardEntry:
    packed = {row: subject for row, subject in enumerate(entry["id"]) if str(row) not in entry["left_out"]}
    rows = {name: [row for row, subject in packed.items() if splits[subject] == name] for name in ("val", "test")}
    return {**entry, "val": rows["val"], "test": rows["test"]}


def _place(subject: str, seed: int) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(sha256(f"{seed}:{subject}".encode()).digest()[:8], "big") / 2**64
