"""Pack a source of NIfTI pairs into HDF5 shards: finished subjects are never read again, whatever is killed.

Rows of a shard are fixed by the sorted subject ids. Each is written to shard-NNNNN.rows/ first; the complete
ones become shard-NNNNN.h5, and index.json comes last and makes the folder a packed dataset.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data import shards
from hpc_ddpm.data.discover import Discovery, Subject, Unmatched, discover
from hpc_ddpm.data.files import write_json
from hpc_ddpm.data.pool import Prepare, prepare_pool
from hpc_ddpm.data.preprocess import Prepared
from hpc_ddpm.data.shard_writer import Row, is_row_written, write_row, write_shard
from hpc_ddpm.data.shards import INDEX, Index, shard_name
from hpc_ddpm.data.split import split_subjects
from hpc_ddpm.errors import DataFormatError

MAX_LISTED = 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackReport:
    """What a packed dataset holds, and what was left out of it."""

    path: Path
    layout: str
    num_written: int
    """Subjects that this call read and wrote; 0 when all was there."""
    splits: dict[str, int]
    """Subjects per split."""
    unmatched: tuple[Unmatched, ...]
    failures: tuple[str, ...]
    """Messages of the subjects left out by skip_bad."""
    labels_never_found: tuple[str, ...]
    """Names in the label scheme that no mask contains."""

    @property
    def num_subjects(self) -> int:
        """Subjects in the dataset."""
        return sum(self.splits.values())


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first volume is read."""

    out: Path
    config: DataConfig
    subjects: tuple[Subject, ...]
    sources: tuple[str, ...]
    digest: str
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.subjects) // self.rows_per_shard)

    def rows(self, shard: int) -> list[tuple[Subject, Row]]:
        """Each row of a shard: the subject, and what identifies it and its files."""
        part = slice(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)
        pairs = zip(self.subjects[part], self.sources[part], strict=True)
        return [(subject, (subject.id, source)) for subject, source in pairs]


def pack(
    source: str | Path,
    out: str | Path,
    config: DataConfig,
    *,
    num_workers: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack the subjects of `source` into the folder `out`; the same call goes on after a kill.

    Args:
        source: a folder or table, see `discover`.
        out: created where missing.
        config: what to pack and how; its `path` is not used.
        num_workers: processes that read and prepare; below 2, this one does.
        skip_bad: leave subjects out that cannot be prepared, instead of refusing all.
        overwrite: replace a packed dataset of another configuration or other sources.
        progress: called with (finished subjects, all subjects).

    Raises:
        DataFormatError: nothing to pack, bad subjects (all of them, by file), or another dataset in `out`.
    """
    found = discover(source, config)
    config = config.model_copy(update={"layout": found.layout, "path": ""})
    plan = _build_plan(Path(out), config, found.subjects)
    plan.out.mkdir(parents=True, exist_ok=True)
    if _is_finished(plan, overwrite):
        num_written, failures = 0, shards.read_index(plan.out).failures
    else:
        num_written, failures = _write_shards(plan, num_workers, skip_bad, progress or (lambda done, total: None))
    if failures and (not skip_bad or len(failures) == len(plan.subjects)):
        raise DataFormatError(_list_failures(failures, len(plan.subjects)))
    columns = [_read_columns(plan, shard) for shard in range(plan.num_shards)]
    if num_written or not (plan.out / INDEX).exists():
        _write_index(plan, columns, failures)
    return _report(plan, found, num_written, columns, tuple(failures))


def _build_plan(out: Path, config: DataConfig, subjects: tuple[Subject, ...]) -> _Plan:
    lines = [shards.config_digest(config), *(f"{subject.id}\t{subject.split or ''}" for subject in subjects)]
    itemsize = np.dtype(config.storage_dtype).itemsize
    bytes_per_subject = math.prod(config.size) * (itemsize * config.num_modalities + 1)
    rows = max(1, int(config.shard_size_gib * 2**30 / bytes_per_subject))
    sources = tuple(_fingerprint(subject) for subject in subjects)
    return _Plan(out, config, subjects, sources, sha256("\n".join(lines).encode()).hexdigest()[:12], rows)


def _fingerprint(subject: Subject) -> str:
    """Hash of size and modification time of each file: whether it changed since it was packed."""
    stats = [path.stat() for path in (subject.mask, *subject.images.values())]
    return sha256(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ what is there


def _is_finished(plan: _Plan, overwrite: bool) -> bool:
    """Whether `out` already holds exactly this; a dataset of something else is refused, or removed."""
    if overwrite:
        (plan.out / INDEX).unlink(missing_ok=True)
        _remove_shards(plan.out, keep=())
    if not (plan.out / INDEX).exists():
        return False
    advice = "pack into another --out, or replace it with --overwrite"
    try:
        index = shards.read_index(plan.out)
    except DataFormatError as error:
        raise DataFormatError(f"{error} ({advice})") from None
    if index.digest != plan.digest:
        raise DataFormatError(f"{plan.out}: holds a dataset with other {_differences(plan, index)}; {advice}")
    there = [(plan.out / shard_name(shard)).exists() for shard in range(plan.num_shards)]
    changed = [i for i, exists in enumerate(there) if exists and _published_rows(plan, i) is None]
    if changed:
        raise DataFormatError(f"{plan.out}: files of {shard_name(changed[0])} changed since it was packed; {advice}")
    return all(there)


def _differences(plan: _Plan, index: Index) -> str:
    wanted = plan.config.model_dump(mode="json")
    settings = [f"data.{key}" for key, value in index.data.items() if wanted.get(key) != value]
    return f"settings ({', '.join(settings)})" if settings else "subjects or splits"


def _published_rows(plan: _Plan, shard: int) -> list[bool] | None:
    """Which rows of a published shard are complete; None if it is of another plan or its files changed."""
    path = plan.out / shard_name(shard)
    if not path.exists():
        return None
    with shards.open_reader(path) as file:
        sources = [source for _, (_, source) in plan.rows(shard)]
        if file.attrs["digest"] != plan.digest or file["source"].asstr()[:].tolist() != sources:
            return None
        return [bool(done) for done in file["done"][:]]


# ----------------------------------------------------------------------------------------------- writing


def _write_shards(plan: _Plan, num_workers: int, skip_bad: bool, progress: Progress) -> tuple[int, list[str]]:
    """Every shard that is not finished, in order; the number of subjects written, and why others were not."""
    num_done = num_written = 0
    failures: list[str] = []

    def advance(count: int) -> None:
        nonlocal num_done
        num_done += count
        progress(num_done, len(plan.subjects))

    with prepare_pool(plan.config, num_workers) as prepare_all:
        for shard in range(plan.num_shards):
            published = _published_rows(plan, shard)
            if published and all(published):
                advance(len(published))
                continue
            count, failed = _write_shard(plan, shard, skip_bad, prepare_all, advance)
            num_written += count
            failures += failed
    return num_written, failures


def _write_shard(
    plan: _Plan, shard: int, skip_bad: bool, prepare_all: Prepare, advance: Callable[[int], None]
) -> tuple[int, list[str]]:
    """Write the missing rows, and the shard if none failed; how many were written, and why others were not."""
    final = plan.out / shard_name(shard)
    subjects, rows = zip(*plan.rows(shard), strict=True)
    files = {i: final.with_suffix(".rows") / f"{i:05d}.h5" for i in range(len(rows))}
    pending = [i for i, file in files.items() if not is_row_written(file, rows[i], plan.digest)]
    failures = []
    advance(len(rows) - len(pending))
    for i, result in zip(pending, prepare_all([subjects[i] for i in pending]), strict=True):
        if isinstance(result, Prepared):
            write_row(files[i], rows[i], result, plan.config, plan.digest)
        else:
            failures.append(result)
            del files[i]
        advance(1)
    if skip_bad or not failures:
        write_shard(final, rows, files, plan.config, plan.digest)
        shutil.rmtree(final.with_suffix(".rows"), ignore_errors=True)
    return len(pending) - len(failures), failures


# ------------------------------------------------------------------------------------------------- ending


def _read_columns(plan: _Plan, shard: int) -> dict[str, list[Any]]:
    """The small columns of a published shard that the index and the report are made of."""
    with shards.open_reader(plan.out / shard_name(shard)) as file:
        return {name: file[name][:].tolist() for name in ("done", "crc32_image", "crc32_mask", "label_voxels")}


def _write_index(plan: _Plan, columns: Sequence[dict[str, list[Any]]], failures: list[str]) -> None:
    """index.json, which publishes the dataset; then shards of an earlier plan go."""
    rows = _done_rows(plan, columns)
    names = [shard_name(shard) for shard in range(plan.num_shards)]
    index = Index(
        data=plan.config.model_dump(mode="json"),
        digest=plan.digest,
        shards=[_describe(plan.out / name) for name in names],
        id=[plan.rows(shard)[row][0].id for shard, row in rows],
        shard=[shard for shard, _ in rows],
        row=[row for _, row in rows],
        split=_splits(plan, rows),
        crc32_image=[columns[shard]["crc32_image"][row] for shard, row in rows],
        crc32_mask=[columns[shard]["crc32_mask"][row] for shard, row in rows],
        failures=failures,
    )
    write_json(plan.out / INDEX, index.to_json())
    _remove_shards(plan.out, keep=names)


def _remove_shards(out: Path, keep: Sequence[str]) -> None:
    """What earlier plans and killed runs left."""
    for path in (*out.glob("shard-*.h5"), *out.glob(".shard-*.tmp"), *out.glob("shard-*.rows")):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def _done_rows(plan: _Plan, columns: Sequence[dict[str, list[Any]]]) -> list[tuple[int, int]]:
    """(shard, row) of every subject in the dataset."""
    rows = [(shard, row) for shard, column in enumerate(columns) for row, done in enumerate(column["done"]) if done]
    return rows


def _splits(plan: _Plan, rows: Sequence[tuple[int, int]]) -> list[str]:
    return split_subjects([plan.rows(shard)[row][0] for shard, row in rows], plan.config.val_fraction)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "file": path.name,
            "size_bytes": path.stat().st_size,
            "sha256": file_digest(file, "sha256").hexdigest(),
        }


def _report(
    plan: _Plan,
    found: Discovery,
    num_written: int,
    columns: Sequence[dict[str, list[Any]]],
    failures: tuple[str, ...],
) -> PackReport:
    rows = _done_rows(plan, columns)
    totals = [sum(voxels) for voxels in zip(*(columns[s]["label_voxels"][r] for s, r in rows), strict=True)]
    absent = [name for name, total in zip(plan.config.labels.names.values(), totals, strict=True) if not total]
    splits = dict(Counter(_splits(plan, rows)))
    return PackReport(plan.out, found.layout, num_written, splits, found.unmatched, failures, tuple(absent))


def _list_failures(failures: Sequence[str], num_subjects: int) -> str:
    listed = "".join(f"\n  {message}" for message in failures[:MAX_LISTED])
    more = f"\n  and {len(failures) - MAX_LISTED} more" if len(failures) > MAX_LISTED else ""
    return (
        f"{len(failures)} of {num_subjects} subjects cannot be packed; mend these files, "
        f"or leave them out with --skip-bad:{listed}{more}"
    )
