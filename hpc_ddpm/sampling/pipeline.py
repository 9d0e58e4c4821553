"""One worker's pipeline: masks are read ahead of the network, and volumes are checked and written behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from hpc_ddpm.config import Config
from hpc_ddpm.errors import DataFormatError, refusing
from hpc_ddpm.sampling.finish import Finisher, Job
from hpc_ddpm.sampling.generate import generate
from hpc_ddpm.sampling.masks import load_mask
from hpc_ddpm.sampling.plan import Item
from hpc_ddpm.workers.claims import Writer


class _StoppedError(Exception):
    """A signal arrived while a volume was being generated."""


@dataclass
class Pipeline:
    """Runs items through read, generate and finish."""

    model: torch.nn.Module
    finisher: Finisher
    writer: Writer
    is_finished: Callable[[Item], bool]
    is_stopped: Callable[[], bool]
    on_volume: Callable[[], None] = lambda: None

    def run(self, items: Sequence[Item]) -> int:
        """Generate the items that nobody else has begun; return how many this worker finished or gave up."""
        config: Config = self.model.config  # type: ignore[assignment]
        self._source, self._again, self._settled = iter(items), deque[Job](), 0
        self._ahead, self._behind = deque[Future[Job | None]](), deque[Future[Job | None]]()
        size, num_writers = config.sampling.batch_size, config.sampling.output.num_writers
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(num_writers) as writers:
            try:
                self._ahead.extend(reader.submit(self._read) for _ in range(size))
                while batch := self._next_batch(reader, 1 if config.sampling.exact else size):
                    for job, volume, seconds in self._generate(batch):
                        self._behind.append(writers.submit(self._finish, job, volume, seconds))
                    while len(self._behind) > 2 * num_writers:
                        self._settle()
            except _StoppedError:
                while self._behind:
                    self._settle()
            finally:
                self._release()
        return self._settled

    def _read(self) -> Job | None:
        """The next item that is ours to make, with its mask; None when there is none."""
        for item in self._source:
            lease = ExitStack()
            if self.is_stopped():
                return None
            if not lease.enter_context(self.writer.claim(item.id)) or self.is_finished(item):
                lease.close()
                continue
            try:
                with refusing(item.mask_id):
                    return Job(item, load_mask(item.source, self.finisher.config), lease)
            except DataFormatError as error:
                self.finisher.fail(item, "mask", str(error))
                self._settled += 1
                lease.close()
        return None

    def _next_batch(self, reader: ThreadPoolExecutor, size: int) -> list[Job]:
        """Volumes to make again first, then new ones; empty when all are settled."""
        batch: list[Job] = []
        while len(batch) < size:
            while self._behind and self._behind[0].done():
                self._settle()
            if self._again:
                batch.append(self._again.popleft())
            elif self._ahead:
                job = self._ahead.popleft().result()
                if job is not None:
                    batch.append(job)
                    self._ahead.append(reader.submit(self._read))
            elif batch or not self._behind:
                break
            else:
                self._settle()
        return batch

    def _settle(self) -> None:
        """Wait for the oldest volume that is being written."""
        again = self._behind.popleft().result()
        if again is None:
            self._settled += 1
            self.on_volume()
        else:
            self._again.append(again)

    def _generate(self, batch: list[Job]) -> list[tuple[Job, np.ndarray, float | None]]:
        """Generated volumes, each with its seconds; None for volumes that were computed together."""
        began = time.perf_counter()
        labels, seeds = np.stack([job.mask.labels for job in batch]), [job.seed for job in batch]
        covariates = [job.item.covariates for job in batch]
        try:
            volumes = generate(self.model, labels, seed=seeds, covariates=covariates, on_step=self._look_up)
        except BaseException:
            for job in batch:
                job.lease.close()
            raise
        seconds = time.perf_counter() - began if len(batch) == 1 else None
        return [(job, volume, seconds) for job, volume in zip(batch, volumes.float().cpu().numpy(), strict=True)]

    def _look_up(self, done: int, total: int) -> None:
        if self.is_stopped() and done < total:
            raise _StoppedError

    def _finish(self, job: Job, volume: np.ndarray, seconds: float | None) -> Job | None:
        """Finish a volume in a writer's thread; the lease is kept if another try follows."""
        again = None
        try:
            again = self.finisher.finish(job, volume, seconds)
        finally:
            if again is None:
                job.lease.close()
        return again

    def _release(self) -> None:
        """Release the leases of volumes that were begun and will not be generated."""
        for job in self._again:
            job.lease.close()
        for future in self._ahead:
            if not future.cancel() and (begun := future.result()) is not None:
                begun.lease.close()
