"""One function over many items on several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hpc_ddpm.errors import ClusterError

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int, preload: str
) -> Iterator[Result]:
    """`function` of every item, in order.

    Args:
        function: can be pickled.
        items: small, as they are sent to the processes.
        num_workers: processes; below 2, or for a single item, this one does the work.
        preload: module that every process needs, imported once.

    Raises:
        ClusterError: a process was killed.
    """
    if num_workers < 2 or len(items) < 2:
        yield from map(function, items)
        return
    with process_pool(min(num_workers, len(items)), preload) as executor:
        try:
            yield from executor.map(function, items)
        except BrokenProcessPool:
            raise ClusterError(
                "a worker process was killed, often for memory; run the same command again with fewer --workers"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def process_pool(num_workers: int, preload: str) -> ProcessPoolExecutor:
    """A pool of processes that ignore Ctrl-C, which this process handles; it never forks a process with threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(num_workers, context, _ignore_interrupts)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
