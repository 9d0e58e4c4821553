"""What goes where in a packed dataset: a function of the source, the settings and the shards already published.

It does not depend on who packs. A row is known by its key, a hash of the settings, the subject, and the sizes
and times of the subject's files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np

from hpc_ddpm.config import READING_SETTINGS, DataConfig
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.formats import volume_files
from hpc_ddpm.data.shards import (
    FORMAT,
    INDEX,
    SPLITS,
    VERSION,
    Index,
    ShardEntry,
    config_digest,
    open_reader,
    read_index,
    shard_name,
)
from hpc_ddpm.errors import DataFormatError

MAX_NAMED = 5
ELSEWHERE = "pack into another --out, or replace it with --overwrite"
GONE, CHANGED, MOVED = "not in the source any more", "changed since", "in another split now"


@dataclass(frozen=True)
class Row:
    """One subject."""

    subject: Subject
    source: str
    """Hash of size and time of each file, and of covariates: whether the subject changed since it was packed."""
    size_bytes: int
    """Size of the subject's files together."""
    key: str


@dataclass(frozen=True)
class Shard:
    """A shard that is to be written."""

    number: int
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Name of the shard's file."""
        return shard_name(self.number)

    @property
    def digest(self) -> str:
        """Hash of the keys of all rows."""
        return digest_of([row.key for row in self.rows])


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first volume is read."""

    config: DataConfig
    kept: Mapping[int, ShardEntry]
    """Published shards, by number."""
    splits: Mapping[str, str]
    """Split by subject, for subjects that are or were published."""
    shards: tuple[Shard, ...]
    """Shards that are to be written."""
    patients: Mapping[str, str]
    """Patient of each wanted subject."""
    replaces: bool = False
    """Whether this dataset replaces a published one, of which nothing is kept, once all of it is written."""

    @property
    def num_subjects(self) -> int:
        """Rows of all shards."""
        return sum(len(entry["id"]) for entry in self.kept.values()) + sum(len(shard.rows) for shard in self.shards)


def digest_of(parts: Sequence[str]) -> str:
    """First 24 hexadecimal digits of SHA-256."""
    return sha256("\n".join(parts).encode()).hexdigest()[:24]


def build_rows(config: DataConfig, subjects: Sequence[Subject]) -> list[Row]:
    """A row for every subject, in the same order; looks at each file's size and time."""
    settings, rows = config_digest(config), []
    for subject in subjects:
        volumes = (subject.mask, *subject.images.values())
        facts = [fact for volume in volumes for fact in _sizes_and_times(volume)]
        about = repr(facts) + (repr(subject.covariates) if subject.covariates else "")
        source = sha256(about.encode()).hexdigest()[:16]
        key = digest_of([settings, subject.id, source])
        rows.append(Row(subject, source, sum(size for size, _ in facts), key))
    return rows


def _sizes_and_times(volume: Path) -> list[tuple[int, int]]:
    """Size (bytes) and time (ns) of each file; 0 for a file that cannot be inspected, which reading reports later."""
    try:
        stats = [file.stat() for file in volume_files(volume)]
    except (OSError, DataFormatError):
        return [(0, 0)]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def build_plan(out: Path, config: DataConfig, rows: Sequence[Row], overwrite: bool) -> Plan:
    """Keep the published shards of `out`, add shards for subjects that are in none, repair missing ones.

    Args:
        out: a packed dataset, or a folder without one.
        config: of the dataset.
        rows: the wanted subjects, sorted by id.
        overwrite: plan anew where what is there cannot be kept, instead of raising.

    Raises:
        DataFormatError: `out` holds a dataset of other settings, or of subjects that changed or are gone, or a file
            that must not be replaced has the name of a shard to be written.
    """
    published: list[ShardEntry] = []
    patients = {row.subject.id: row.subject.patient or row.subject.id for row in rows}
    plan = Plan(config, {}, {}, chunks(config, rows, 0), patients, replaces=(out / INDEX).exists())
    if plan.replaces:
        try:
            index = read_index(out)
            published = index.shards
            plan = replace(_extend(out, index, config, rows), patients=patients)
        except DataFormatError as error:
            if not overwrite:
                raise DataFormatError(f"{error}; {ELSEWHERE}") from None
    _check_names(out, plan, {entry["file"] for entry in published}, overwrite)
    return plan


def digest_at(path: Path) -> str | None:
    """Digest of the shard at `path`; empty for another format version, None if there is no shard of this project."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            is_of_now = file.attrs.get("version") == VERSION
            return str(file.attrs["digest"] if is_of_now else "") if file.attrs.get("format") == FORMAT else None
    except (OSError, KeyError):
        return None


def chunks(config: DataConfig, rows: Sequence[Row], first: int) -> tuple[Shard, ...]:
    """Shards of about `shard_size_gib`, numbered from `first`."""
    bytes_per_voxel = np.dtype(config.storage_dtype).itemsize * config.num_modalities + 1
    length = max(1, int(config.shard_size_gib * 2**30 / (math.prod(config.size) * bytes_per_voxel)))
    starts = range(0, len(rows), length)
    return tuple(Shard(first + i, tuple(rows[start : start + length])) for i, start in enumerate(starts))


def _extend(out: Path, index: Index, config: DataConfig, rows: Sequence[Row]) -> Plan:
    _check_settings(out, index, config)
    by_id = {row.subject.id: row for row in rows}
    splits = dict(zip(index.id, [SPLITS[code] for code in index.split.tolist()], strict=True))
    moved = [id for id in splits if id in by_id and by_id[id].subject.split not in (None, splits[id])]
    problems: dict[str, list[str]] = {GONE: [], CHANGED: [], MOVED: moved}
    kept: dict[int, ShardEntry] = {}
    lost: list[Shard] = []
    taken: set[str] = set()
    for number, entry in enumerate(index.shards):
        wanted = Shard(number, tuple(by_id[id] for id in entry["id"] if id in by_id))
        if wanted.digest != entry["digest"]:
            taken.update(_compare(out, entry, by_id, problems))
        else:
            taken.update(entry["id"])
            if not _is_there(out, entry):
                lost.append(wanted)
                continue
        kept[number] = entry
    _refuse(out, problems)
    new = [row for row in rows if row.subject.id not in taken]
    return Plan(config, kept, splits, (*lost, *chunks(config, new, len(index.shards))), {})


def _check_names(out: Path, plan: Plan, published: Collection[str], overwrite: bool) -> None:
    """Refuse to write over what no index names: files of others, and shards of something else unless `overwrite`."""
    for shard in plan.shards:
        path = out / shard.name
        if shard.name in published or not os.path.lexists(path):
            continue
        digest = digest_at(path)
        if digest is None:
            raise DataFormatError(f"{path}: not a shard, but a shard gets this name; move it or choose another --out")
        if digest != shard.digest and not overwrite:
            raise DataFormatError(f"{path}: a shard of other settings or subjects, in no {INDEX}; {ELSEWHERE}")


def _compare(
    out: Path, entry: ShardEntry, by_id: Mapping[str, Row], problems: Mapping[str, list[str]]
) -> Iterator[str]:
    """Subjects of a shard that are as they were packed; adds the others to `problems` unless they were left out."""
    with open_reader(out / entry["file"]) as file:
        packed = zip(file["id"].asstr()[:], file["source"].asstr()[:], strict=True)
        for number, (subject, source) in enumerate(packed):
            row = by_id.get(subject)
            if row is not None and row.source == source:
                yield subject
            elif str(number) not in entry["left_out"]:
                problems[GONE if row is None else CHANGED].append(subject)


def _is_there(out: Path, entry: ShardEntry) -> bool:
    path = out / entry["file"]
    return path.is_file() and path.stat().st_size == entry["size_bytes"]


def _check_settings(out: Path, index: Index, config: DataConfig) -> None:
    given, wanted = (data.model_dump(mode="json", exclude={*READING_SETTINGS}) for data in (index.config, config))
    names = [name for name in wanted if json.dumps(given.get(name)) != json.dumps(wanted[name])]
    if names:
        listed = ", ".join(f"data.{name}" for name in names)
        raise DataFormatError(f"{out}: holds a dataset with other settings ({listed})")


def _refuse(out: Path, problems: Mapping[str, list[str]]) -> None:
    found = [f"{len(ids)} packed subject(s) {what} ({_named(ids)})" for what, ids in problems.items() if ids]
    if found:
        raise DataFormatError(f"{out}: {'; '.join(found)}")


def _named(ids: Sequence[str]) -> str:
    more = f", and {len(ids) - MAX_NAMED} more" if len(ids) > MAX_NAMED else ""
    return ", ".join(ids[:MAX_NAMED]) + more
