"""Writers in several processes of this node; a killed process loses only what it was writing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from hpc_ddpm.data.share import Job, Share
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.workers.claims import Writer

POLL_S = 0.25
SHARE_OF_TIME = 0.05
"""Largest share of the time that goes into looking at the progress."""
Progress = Callable[[int, int], None]


class Ticker:
    """Reports how much of a job all nodes have finished, without spending much time on it."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._progress = progress
        self._next = 0.0

    def __call__(self, *, is_last: bool = False) -> None:
        """Look, unless the last look was just now."""
        begin = time.monotonic()
        if begin < self._next and not is_last:
            return
        found, plan = self._job.look(), self._job.plan
        rest = sum(len(shard.rows) - self._job.num_finished(shard, found) for shard in plan.shards)
        self._progress(plan.num_subjects - rest, plan.num_subjects)
        end = time.monotonic()
        self._next = end + (end - begin) / SHARE_OF_TIME


def run_shares(job: Job, writer: Writer, num_workers: int, place: int, num_places: int, progress: Progress) -> int:
    """Work on a job until there is no more to do here.

    Args:
        job: the work.
        writer: of this process.
        num_workers: processes to start; below 2, this one works.
        place: of this process among `num_places` that start the same.
        num_places: all of them with the same `num_workers`.
        progress: called with (finished subjects, all subjects).

    Returns:
        Subjects read and written here.

    Raises:
        ClusterError: a worker was killed.
    """
    ticker = Ticker(job, progress)
    ticker()
    if num_workers < 2:
        num_written = Share(job, writer, place, num_places, ticker).work()
    else:
        slots = range(place * num_workers, (place + 1) * num_workers)
        num_written = _run_processes(job, slots, num_places * num_workers, ticker)
    ticker(is_last=True)
    return num_written


def _run_processes(job: Job, slots: range, num_slots: int, ticker: Ticker) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers: dict[Connection, BaseProcess] = {}
    try:
        for slot in slots:
            ours, theirs = context.Pipe(duplex=False)
            worker: BaseProcess = context.Process(target=_work, args=(job, slot, num_slots, theirs))
            worker.start()
            theirs.close()
            workers[ours] = worker
        return _collect(workers, ticker)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _collect(workers: dict[Connection, BaseProcess], ticker: Ticker) -> int:
    num_written, pending = 0, set(workers)
    while pending:
        for connection in wait(list(pending), POLL_S):
            assert isinstance(connection, Connection)
            pending.remove(connection)
            num_written += _outcome(connection, workers[connection])
        ticker()
    return num_written


def _outcome(connection: Connection, worker: BaseProcess) -> int:
    try:
        outcome = connection.recv()
    except EOFError:
        worker.join()
        raise ClusterError(
            f"a packing process ended with code {worker.exitcode} (-9: killed, often for memory); "
            "run the same command again, with fewer --workers: what is finished is kept"
        ) from None
    if isinstance(outcome, BaseException):
        raise outcome
    return int(outcome)


def _work(job: Job, slot: int, num_slots: int, connection: Connection) -> None:
    """A worker process: reports the number of subjects, or the exception."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    try:
        with Writer(job.state, job.purpose) as writer:
            connection.send(Share(job, writer, slot, num_slots).work())
    except Exception as error:
        error.add_note(traceback.format_exc())
        connection.send(error)


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
