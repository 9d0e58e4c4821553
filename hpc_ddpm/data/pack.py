"""Pack a source of NIfTI pairs into HDF5 shards, on any number of processes: finished subjects are not read again.

The processes know each other by the folder alone: start the same command as often and wherever you like. Which
row of which shard a subject gets does not depend on them. index.json comes last and makes the folder a packed
dataset; packing a source that has grown adds shards to it.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Discovery, Subject, Unmatched, discover
from hpc_ddpm.data.hooks import check_hooks
from hpc_ddpm.data.patients import beyond_names, refuse_torn
from hpc_ddpm.data.plan import Row, build_plan, build_rows, digest_at, digest_of
from hpc_ddpm.data.pool import Progress, run_shares
from hpc_ddpm.data.settle import settle
from hpc_ddpm.data.shards import (
    INDEX,
    SPLITS,
    Index,
    ShardEntry,
    open_reader,
    read_index,
    with_patients,
    write_index,
)
from hpc_ddpm.data.share import FIRST_WAIT_S, STATE, Job
from hpc_ddpm.data.split import split_subjects
from hpc_ddpm.data.team import Team
from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.files import fsync, writing_to
from hpc_ddpm.workers.claims import Writer
from hpc_ddpm.workers.owner import LEASE_S
from hpc_ddpm.workers.sole import WAIT_S

MAX_LISTED = 10


@dataclass(frozen=True)
class PackReport:
    """What a packed dataset holds, and what was left out of it."""

    path: Path
    layout: str
    num_written: int
    """Subjects that this call read and wrote; 0 when all was there."""
    is_complete: bool
    """False for an array task that left the last steps to others; the other fields then do not describe the dataset."""
    splits: dict[str, int]
    """Subjects per split."""
    unmatched: tuple[Unmatched, ...]
    failures: tuple[str, ...]
    """Messages of the subjects left out by skip_bad."""
    labels_never_found: tuple[str, ...]
    """Names in the label scheme that no mask contains."""
    coding: str = ""
    """What was decided about the values of the masks, in one line; empty where there was nothing to decide."""

    @property
    def num_subjects(self) -> int:
        """Subjects in the dataset."""
        return sum(self.splits.values())


def pack(
    source: str | Path,
    out: str | Path,
    config: DataConfig,
    *,
    num_workers: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> PackReport:
    """Pack the subjects of `source` into the folder `out`; the same call goes on after a kill.

    Args:
        source: a folder or table, see `discover`.
        out: created where missing; where it holds a packed dataset of these settings, new subjects are added.
        config: what to pack and how; its `path` is not used.
        num_workers: processes that read and write; below 2, this one does.
        skip_bad: leave subjects out that cannot be prepared, instead of refusing all.
        overwrite: replace a packed dataset of another configuration, or of subjects that changed or are gone.
        progress: called with (finished subjects, all subjects).
        team: others that were started with the same arguments; None is none.

    Raises:
        DataFormatError: nothing to pack, bad subjects (all of them, by file), or another dataset in `out`.
        ConfigError: a program of `config.hooks`, or the reader of DICOM files, is not installed.
        ClusterError: `out` cannot be written, is being packed with something else, or a worker was killed.
    """
    check_hooks(config)
    found, out = discover(source, config), Path(out)
    refuse_torn(str(source), ((subject.id, subject.patient, subject.split) for subject in found.subjects))
    config = config.model_copy(update={"layout": found.layout, "path": ""})
    config, coding = _settle(out, config, found.subjects, num_workers, overwrite)
    rows, num_written, is_complete = build_rows(config, found.subjects), 0, True
    if not _is_finished(out, config, rows, overwrite):
        purpose = digest_of([*(row.key for row in rows), str(skip_bad)])
        with writing_to(out), _join(out, purpose) as writer:
            plan = build_plan(out, config, rows, overwrite)
            team = team or Team(run=secrets.token_hex(6))
            job = Job(out, plan, purpose, team.run, skip_bad, team.stays)
            if plan.shards:
                num_written = run_shares(job, writer, num_workers, team.index, team.size, progress or (lambda *_: None))
                is_complete = _publish(job, writer)
            if is_complete and writer.leave():
                if overwrite:
                    _remove_surplus(out)
                writer.clear_away()
    return replace(_report(out, config, found, num_written, is_complete, skip_bad), coding=coding)


def _settle(
    out: Path, config: DataConfig, subjects: Sequence[Subject], num_workers: int, overwrite: bool
) -> tuple[DataConfig, str]:
    """The settings with the coding of the masks, and a line about the decision; packed masks are not read again.

    Raises:
        DataFormatError: as `settle`.
    """
    if (out / INDEX).exists() and config.labels.coding == "auto":
        with suppress(DataFormatError):
            labels = config.labels.model_copy(update={"coding": read_index(out).config.labels.coding})
            packed = config.model_copy(update={"labels": labels})
            if _is_finished(out, packed, build_rows(packed, subjects), overwrite):
                return packed, ""
    settled = settle(subjects, config, num_workers)
    return settled.config, settled.note


def _is_finished(out: Path, config: DataConfig, rows: Sequence[Row], overwrite: bool) -> bool:
    """Whether `out` holds exactly this, and nothing is left to clear away; writes nothing.

    Raises:
        DataFormatError: as `build_plan`.
    """
    plan = build_plan(out, config, rows, overwrite)
    return not (plan.shards or overwrite or (out / STATE).exists())


@contextmanager
def _join(out: Path, purpose: str) -> Iterator[Writer]:
    """Join the writers of this packing.

    Raises:
        ClusterError: others are at work with another purpose.
    """
    has_said = False
    with Writer(out / STATE, purpose) as writer:
        while strangers := [pulse for pulse in writer.pulses() if pulse.owner.purpose != purpose]:
            if heard := [pulse.owner for pulse in strangers if pulse.is_heard]:
                raise ClusterError(
                    f"{out}: {heard[0]} is packing other subjects, files or settings into it; wait for it, end it, "
                    "or choose another --out"
                )
            if not has_said:
                warnings.warn(
                    f"{out}: is {strangers[0].owner} still packing something else into it? Waiting {LEASE_S:.0f} s at "
                    "most",
                    stacklevel=2,
                )
                has_said = True
            time.sleep(WAIT_S)
        yield writer


# ------------------------------------------------------------------------------------------------- ending


def _publish(job: Job, writer: Writer) -> bool:
    """Publish the dataset by writing its index if all shards are there; return whether they are.

    Raises:
        DataFormatError: subjects that cannot be packed.
    """
    found = job.look()
    if not all(job.is_settled(shard, found) for shard in job.plan.shards):
        return False
    errors = [why for shard in job.plan.shards for why in job.errors(shard, found).values()]
    if errors and (not job.skip_bad or len(errors) == job.plan.num_subjects):
        _forget_errors(job, writer)
        raise _refusal(errors, job.plan.num_subjects)
    entries = _entries(job)
    while not _is_published(job, entries):
        with writer.claim(INDEX) as is_ours:
            if is_ours and not _is_published(job, entries):
                _give_names(job, writer, entries)
        time.sleep(0 if is_ours else FIRST_WAIT_S)
    return True


def _is_published(job: Job, entries: Sequence[ShardEntry]) -> bool:
    if any(job.shard_path(shard).exists() for shard in job.plan.shards):
        return False
    try:
        return read_index(job.out).shards == entries
    except DataFormatError:
        return False


def _give_names(job: Job, writer: Writer, entries: list[ShardEntry]) -> None:
    """Rename the finished shards, then the index that names them; an index that they replace goes first."""
    write_index(writer.scratch, job.plan.config.model_dump(mode="json"), entries)
    if job.plan.replaces:
        (job.out / INDEX).unlink(missing_ok=True)
    for shard in job.plan.shards:
        with suppress(FileNotFoundError):  # it has its name
            job.shard_path(shard).replace(job.out / shard.name)
    fsync(job.out)
    (writer.scratch / INDEX).replace(job.out / INDEX)
    fsync(job.out)


def _forget_errors(job: Job, writer: Writer) -> None:
    """Let the next run retry bad subjects that an earlier skip_bad left out, unless other writers are at work."""
    if not writer.others():
        for shard in job.plan.shards:
            if job.entry_path(shard).exists() and job.entry(shard)["left_out"]:
                job.entry_path(shard).unlink()


def _entries(job: Job) -> list[ShardEntry]:
    """Index entries of all shards; those of new shards get their splits here."""
    new = {shard.number: job.entry(shard) for shard in job.plan.shards}
    done = [
        (shard.number, number, row.subject)
        for shard in job.plan.shards
        for number, row in enumerate(shard.rows)
        if str(number) not in new[shard.number]["left_out"]
    ]
    plan = job.plan
    known = {subject: (plan.patients.get(subject, subject), split) for subject, split in plan.splits.items()}
    splits = split_subjects([subject for _, _, subject in done], plan.config.val_fraction, known)
    for (shard, number, _), split in zip(done, splits, strict=True):
        if split != "train":
            (new[shard]["val"] if split == "val" else new[shard]["test"]).append(number)
    entries, told = {**plan.kept, **new}, beyond_names(plan.patients, plan.config.group)
    return [with_patients(entries[number], told) for number in sorted(entries)]


def _remove_surplus(out: Path) -> None:
    """Remove shards of this project that the index does not name."""
    kept = {entry["file"] for entry in read_index(out).shards}
    for path in out.glob(f"shard-{'[0-9]' * 5}.h5"):
        if path.name not in kept and digest_at(path) is not None:
            path.unlink(missing_ok=True)


def _report(
    out: Path, config: DataConfig, found: Discovery, num_written: int, is_complete: bool, skip_bad: bool
) -> PackReport:
    if not is_complete:
        return PackReport(out, found.layout, num_written, False, {}, found.unmatched, (), ())
    index, wanted = read_index(out), {subject.id for subject in found.subjects}
    failures = tuple(why for subject, why in index.left_out.items() if subject in wanted)
    if failures and not skip_bad:
        raise _refusal(failures, len(wanted))
    splits = {SPLITS[code]: count for code, count in sorted(Counter(index.split.tolist()).items())}
    absent = _labels_never_found(out, config, index)
    return PackReport(out, found.layout, num_written, True, splits, found.unmatched, failures, absent)


def _labels_never_found(out: Path, config: DataConfig, index: Index) -> tuple[str, ...]:
    total = np.zeros(config.num_labels, np.int64)
    for entry in index.shards:
        with open_reader(out / entry["file"]) as file:
            total += file["label_voxels"][:].sum(axis=0)
    return tuple(name for name, voxels in zip(config.labels.names.values(), total, strict=True) if not voxels)


def _refusal(failures: Sequence[str], num_subjects: int) -> DataFormatError:
    more = [f"and {len(failures) - MAX_LISTED} more"] if len(failures) > MAX_LISTED else []
    return DataFormatError(
        f"{len(failures)} of {num_subjects} subjects cannot be packed; mend these files, "
        f"or leave them out with --skip-bad: {'; '.join([*failures[:MAX_LISTED], *more])}"
    )
