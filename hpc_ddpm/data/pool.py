"""Prepare subjects on several processes, in order, with few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.process import BaseProcess

from hpc_ddpm.config import DataConfig
from hpc_ddpm.data.discover import Subject
from hpc_ddpm.data.preprocess import Prepared, prepare
from hpc_ddpm.errors import DataFormatError

Prepare = Callable[[Sequence[Subject]], Iterator[Prepared | str]]
"""Subjects to, in the same order, each one prepared or what is wrong with it."""


@contextmanager
def prepare_pool(config: DataConfig, num_workers: int) -> Iterator[Prepare]:
    """A function that prepares subjects on `num_workers` processes; below 2, in this one."""
    if num_workers < 2:
        yield lambda subjects: (_try_prepare(subject, config) for subject in subjects)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    executor = ProcessPoolExecutor(num_workers, context, _start_worker)
    try:
        yield lambda subjects: _in_order(executor, 2 * num_workers, subjects, config)
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(
    executor: Executor, window: int, subjects: Sequence[Subject], config: DataConfig
) -> Iterator[Prepared | str]:
    """Results in the order of `subjects`, with at most `window` in memory."""
    todo = iter(subjects)
    waiting = deque(executor.submit(_try_prepare, subject, config) for subject in islice(todo, window))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(executor.submit(_try_prepare, subject, config) for subject in islice(todo, 1))


def _try_prepare(subject: Subject, config: DataConfig) -> Prepared | str:
    """The subject, or what is wrong with it."""
    try:
        return prepare(subject, config)
    except DataFormatError as error:
        return str(error)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
