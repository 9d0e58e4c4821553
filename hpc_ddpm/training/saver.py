"""Saving checkpoints by all ranks together, in the background.

The threads write, hash and publish; they never talk to other ranks. The ranks talk at step boundaries, in the
main thread: first "has everyone written?", then rank 0 publishes, then "is it published?".
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_ddpm.checkpoint import (
    Piece,
    checkpoint_dir,
    delete_checkpoints,
    leftovers,
    prunable,
    publish,
    unfinished_dir,
    write_pieces,
)
from hpc_ddpm.config import TrainingConfig
from hpc_ddpm.distributed import Ranks
from hpc_ddpm.errors import CheckpointError, HpcDdpmError
from hpc_ddpm.workers.sole import Sole

Rows = list[tuple[str, dict[str, Any]]]


class Saver:
    """Publishes checkpoints in `root`, at most one at a time.

    `save`, `poll` and `finish` are collectives. Each raises CheckpointError on every rank when any rank could not
    write (full or read-only disk) or a written file is gone, and ClusterError when another process has taken over
    the run from `sole`; older checkpoints stay.
    """

    def __init__(
        self, root: Path, training: TrainingConfig, ranks: Ranks, device: torch.device, sole: Sole | None = None
    ) -> None:
        self.root, self.training, self.ranks, self.device, self.sole = root, training, ranks, device, sole
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[Rows] | None = None
        self._then: Callable[[Rows], Future[Rows] | None] = lambda rows: None
        self._final = Path()
        self._stall_s = 0.0

    def save(self, step: int, facts: dict[str, Any], pieces: Sequence[Piece], *, background: bool) -> None:
        """Save these pieces of this rank, after the save before; in the background from a copy in host memory."""
        self.finish()
        began = time.perf_counter()
        final = checkpoint_dir(self.root, step)
        temporary = unfinished_dir(final)
        self._together(lambda: _fresh(temporary) if self.ranks.is_main else None, f"prepare {temporary}")
        if background:
            pieces = [replace(piece, values=piece.values.detach().to("cpu", copy=True)) for piece in pieces]
        facts = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        self._final = final
        self._job = self._thread.submit(self._write, temporary, pieces)
        self._then = lambda rows: self._thread.submit(self._publish, final, facts, rows)
        self._stall_s += time.perf_counter() - began
        if not background:
            self.finish()

    def poll(self) -> None:
        """Advance the running save, if any, by one phase if all ranks are ready; called between two steps."""
        if self._job is not None:
            began = time.perf_counter()
            if self._all_ranks(self._job.done()):
                self._advance()
            self._stall_s += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the running save, if there is one, is published."""
        began = time.perf_counter()
        while self._job is not None:
            wait([self._job])
            self._advance()
        self._stall_s += time.perf_counter() - began

    def take_stall_s(self) -> float:
        """Seconds for which saving has delayed training since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def close(self) -> None:
        """Stop the thread; an unfinished save stays unpublished."""
        self._thread.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        job, self._job = self._job, None
        assert job is not None
        try:
            rows = [row for part in self._together(job.result, f"write {self._final}") for row in part]
        except HpcDdpmError as error:
            if self.ranks.is_main and isinstance(error, CheckpointError):  # else it is another's
                shutil.rmtree(unfinished_dir(self._final), ignore_errors=True)
            raise
        self._job, self._then = self._then(rows), lambda rows: None

    def _write(self, folder: Path, pieces: Sequence[Piece]) -> Rows:
        if not pieces:
            return []
        path = folder / f"pieces-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        return [(path.name, write_pieces(path, pieces))]

    def _publish(self, final: Path, facts: dict[str, Any], rows: Rows) -> Rows:
        if not self.ranks.is_main:
            return []
        if self.sole:
            self.sole.check()
        publish(final, facts, dict(rows))
        old = prunable(final, self.training.keep_checkpoints, self.training.keep_every_steps)
        delete_checkpoints([*leftovers(self.root), *old])
        return []

    def _all_ranks(self, ready: bool) -> bool:
        flag = torch.tensor(int(ready), dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _together(self, work: Callable[[], Any], what: str) -> list[Any]:
        """Run `work` on every rank; if it fails on one, all raise the same error instead of hanging."""
        try:
            outcome: tuple[HpcDdpmError | None, Any] = (None, work())
        except OSError as caught:
            reason = f"rank {self.ranks.rank}: {caught.strerror or caught}"
            advice = "free space or fix permissions, then run the same command"
            outcome = (CheckpointError(f"cannot {what}: {reason}; {advice}"), None)
        except HpcDdpmError as caught:
            outcome = (caught, None)
        outcomes: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(outcomes, outcome)
        failures: list[HpcDdpmError] = [failure for failure, _ in outcomes if failure]
        if failures:
            failures[0].is_on_all_ranks = True
            raise failures[0]
        return [value for _, value in outcomes]


def _fresh(folder: Path) -> None:
    """Make a folder without its parents, so that a run directory that was removed does not return empty."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
