"""One writer's share of packing: rows that nobody has written yet, and shards whose rows all exist.

    rows/KEY.h5          a finished row
    rows/KEY.RUN.error   why it cannot be packed, as the start RUN of the command found
    shards/DIGEST.h5     a finished shard, until all are and it gets its name in the dataset
    entries/DIGEST.json  what the index will say of it

Digests and keys tell plans apart: what one plan left is never taken for a part of another.
Writers start at different subjects, an equal number of bytes apart, and go round: first their own, then the others'.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from typing_extensions import TypedDict

from hpc_ddpm.data.plan import Plan, Row, Shard, digest_at
from hpc_ddpm.data.preprocess import prepare
from hpc_ddpm.data.shard_writer import describe_shard, is_row_written, is_shard_written, write_row, write_shard
from hpc_ddpm.data.shards import ShardEntry
from hpc_ddpm.errors import DataFormatError, refusing
from hpc_ddpm.files import write_json
from hpc_ddpm.sealed import read_json
from hpc_ddpm.workers.claims import Writer

STATE = ".pack"
"""Folder in the dataset that holds unpublished files until everything is published."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0


class Reason(TypedDict):
    """Why a row cannot be packed."""

    error: str


@dataclass(frozen=True)
class Found:
    """What the folder of a job held at one moment."""

    rows: frozenset[str]
    entries: frozenset[str]
    shards: frozenset[str]


@dataclass(frozen=True)
class Job:
    """What all writers of a dataset work on."""

    out: Path
    plan: Plan
    purpose: str
    """Hash of the wanted subjects, their files, the settings, and skip_bad."""
    run: str
    """Id of this start of the command, see `Team`."""
    skip_bad: bool
    stays: bool
    """Whether writers wait for work that others have begun."""

    @property
    def state(self) -> Path:
        """Folder in which the writers of this packing keep what is not published."""
        return self.out / STATE

    def look(self) -> Found:
        """What is finished. The order of listing matters: rows are removed after the entry, which follows the shard."""
        rows, entries = _names(self.state / "rows"), _names(self.state / "entries")
        return Found(rows, entries, _names(self.state / "shards"))

    def row_path(self, row: Row) -> Path:
        """Path of a finished row."""
        return self.state / "rows" / f"{row.key}.h5"

    def error_path(self, row: Row) -> Path:
        """Path of the file that says why a row could not be packed."""
        return self.state / "rows" / f"{row.key}.{self.run}.error"

    def shard_path(self, shard: Shard) -> Path:
        """Path of a finished shard until it gets its name in the dataset."""
        return self.state / "shards" / f"{shard.digest}.h5"

    def entry_path(self, shard: Shard) -> Path:
        """Path of a finished shard's entry, which goes into the index later."""
        return self.state / "entries" / f"{shard.digest}.json"

    def entry(self, shard: Shard) -> ShardEntry:
        """The entry of a finished shard for the index; its file name has the shard's number in the plan."""
        entry = read_json(self.entry_path(shard), ShardEntry, "delete it, then run the same command again")
        return {**entry, "file": shard.name}

    def is_ready(self, shard: Shard, found: Found | None = None) -> bool:
        """Whether the shard and its entry exist, in `found` or else now. A shard moves only once, to its final name."""
        entry, file = self.entry_path(shard), self.shard_path(shard)
        has_entry = entry.name in found.entries if found else entry.exists()
        has_file = file.name in found.shards if found else file.exists()
        return has_entry and (has_file or digest_at(self.out / shard.name) == shard.digest)

    def is_bad(self, row: Row, found: Found) -> bool:
        """Whether the row cannot be packed."""
        return f"{row.key}.{self.run}.error" in found.rows

    def is_finished(self, row: Row, found: Found) -> bool:
        """Whether the row needs no more work in this run."""
        return f"{row.key}.h5" in found.rows or self.is_bad(row, found)

    def num_finished(self, shard: Shard, found: Found) -> int:
        """Rows that need no more work in this run."""
        if self.is_ready(shard, found):
            return len(shard.rows)
        return sum(self.is_finished(row, found) for row in shard.rows)

    def is_settled(self, shard: Shard, found: Found) -> bool:
        """Whether the shard needs no more work: it is ready, or subjects that cannot be packed prevent it."""
        if (is_ready := self.is_ready(shard, found)) or self.skip_bad:
            return is_ready
        has_bad = any(self.is_bad(row, found) for row in shard.rows)
        return has_bad and self.num_finished(shard, found) == len(shard.rows)

    def errors(self, shard: Shard, found: Found) -> dict[int, str]:
        """Reasons why rows cannot be packed, by row number."""
        if self.is_ready(shard, found):
            return {int(row): why for row, why in self.entry(shard)["left_out"].items()}
        bad = [(number, row) for number, row in enumerate(shard.rows) if self.is_bad(row, found)]
        return {number: read_json(self.error_path(row), Reason, "pack again")["error"] for number, row in bad}


@dataclass
class Share:
    """The work of one writer; `slot` of `num_slots` says where it starts."""

    job: Job
    writer: Writer
    slot: int = 0
    num_slots: int = 1
    on_row: Callable[[], None] = lambda: None
    num_written: int = field(default=0, init=False)
    """Subjects read and written."""
    _num_steps: int = field(default=0, init=False)

    def work(self) -> int:
        """Work until all shards are settled, or until living writers have begun the rest, unless the job stays.

        Returns:
            Subjects read and written.
        """
        wait_s = FIRST_WAIT_S
        while True:
            found, before = self.job.look(), self._num_steps
            pending = [(shard, row) for shard, row in self._round() if not self.job.is_settled(shard, found)]
            if not pending:
                return self.num_written
            for shard, row in pending:
                self._visit(shard, row)
            if self._num_steps > before:
                wait_s = FIRST_WAIT_S
            elif self.job.stays or not self.writer.has_heard_all():
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                return self.num_written

    def _round(self) -> Iterator[tuple[Shard, int]]:
        """All shards, each with its first row to visit."""
        shards = self.job.plan.shards
        ends = list(accumulate(row.size_bytes for shard in shards for row in shard.rows))
        first = bisect_right(ends, ends[-1] * self.slot // self.num_slots)
        starts = list(accumulate((len(shard.rows) for shard in shards), initial=0))
        begin = bisect_right(starts, first) - 1
        yield shards[begin], first - starts[begin]
        for shard in (*shards[begin + 1 :], *shards[:begin]):
            yield shard, 0

    def _visit(self, shard: Shard, first: int) -> None:
        """Write the rows of a shard that nobody has begun; then, if all are there, the shard."""
        found = self.job.look()
        if self.job.is_ready(shard, found):
            return
        if not self._find(shard):
            self._write_rows(shard, first, found)
            found = self.job.look()
            is_complete = self.job.num_finished(shard, found) == len(shard.rows)
            if self.job.is_settled(shard, found) or not is_complete:
                return
        with self.writer.claim(shard.digest) as is_ours:
            if is_ours and not self.job.is_ready(shard):
                self._make_ready(shard, found)

    def _find(self, shard: Shard) -> Path | None:
        """Path of the shard if it is written with no row empty, else None."""
        places = self.job.shard_path(shard), self.job.out / shard.name
        return next((path for path in places if is_shard_written(path, shard)), None)

    def _write_rows(self, shard: Shard, first: int, found: Found) -> None:
        for row in (*shard.rows[first:], *shard.rows[:first]):
            if not self.job.is_finished(row, found):
                with self.writer.claim(row.key) as is_ours:
                    if is_ours and not self._is_finished_now(shard, row):
                        self._write_row(row)

    def _is_finished_now(self, shard: Shard, row: Row) -> bool:
        return self.job.row_path(row).exists() or self.job.error_path(row).exists() or self.job.is_ready(shard)

    def _write_row(self, row: Row) -> None:
        config, scratch = self.job.plan.config, self.writer.scratch
        try:
            with refusing(row.subject.id):
                prepared = prepare(row.subject, config)
        except DataFormatError as error:
            write_json(self.job.error_path(row), {"error": str(error)}, durable=False, scratch=scratch)
        else:
            write_row(self.job.row_path(row), row, prepared, config, scratch)
            self.num_written += 1
        self._num_steps += 1
        self.on_row()

    def _make_ready(self, shard: Shard, found: Found) -> None:
        """Write the shard, unless it exists, and its entry."""
        self._num_steps += 1
        path, left_out = self._find(shard), dict[int, str]()
        try:
            if path is None:
                left_out = self.job.errors(shard, found)
                path = self._put_together(shard, left_out)
            entry = describe_shard(path, shard, left_out) if path else None
        except (DataFormatError, FileNotFoundError):
            if self.job.is_ready(shard):  # another who had the claim too was faster, and took what we read
                return
            raise
        if entry:
            write_json(self.job.entry_path(shard), entry, scratch=self.writer.scratch)
            for row in shard.rows:
                self.job.row_path(row).unlink(missing_ok=True)

    def _put_together(self, shard: Shard, left_out: Mapping[int, str]) -> Path | None:
        """Write the shard from its rows; None if some rows are damaged, which are deleted to be written again."""
        files = {i: self.job.row_path(row) for i, row in enumerate(shard.rows) if i not in left_out}
        damaged = [file for i, file in files.items() if not is_row_written(file, shard.rows[i])]
        for file in damaged:
            file.unlink(missing_ok=True)
        if damaged:
            return None
        path = self.job.shard_path(shard)
        write_shard(path, shard, files, self.job.plan.config, self.writer.scratch)
        return path


def _names(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset()
