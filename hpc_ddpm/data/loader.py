"""Batches for training: read ahead by threads, copied to the GPU while it computes. Buffers are used again.

Reading releases the GIL (see `chunks`), so threads do what processes would, without sending volumes between them,
and they read straight into page-locked memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hpc_ddpm.data.dataset import Batch, VolumeDataset
from hpc_ddpm.data.patches import PatchDataset


def build_loader(
    dataset: VolumeDataset | PatchDataset, batches: Iterable[Sequence[int]], num_workers: int
) -> Iterator[Batch]:
    """The batches, in order, in page-locked memory where there is CUDA.

    A batch is valid until the next one is asked for: its memory is then read into again.

    Args:
        dataset: what to read.
        batches: positions in the dataset, of one size; usually StepBatches, or SampleBatches for crops.
        num_workers: threads that read ahead; 0 reads in this one, when asked.

    Raises:
        DataFormatError: a volume is damaged; when its turn comes.
    """
    free: list[Batch] = []
    wanted = iter(batches)

    def take_buffer(indices: Sequence[int]) -> Batch:
        if not free:
            return dataset.new_batch(indices, pin_memory=torch.cuda.is_available())
        return {**free.pop(), "index": torch.tensor(indices)}

    if not num_workers:
        for indices in wanted:
            batch = take_buffer(indices)
            for position in range(len(indices)):
                dataset.fill(batch, position)
            yield batch
            free.append(batch)
        return

    reading: deque[tuple[Batch, list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="hpc_ddpm-read")

    def read_ahead() -> None:
        """Batches under way until every thread has a volume and one more batch waits."""
        while sum(len(volumes) for _, volumes in list(reading)[:-1]) < num_workers:
            indices = next(wanted, None)
            if indices is None:
                return
            batch = take_buffer(indices)
            reading.append((batch, [pool.submit(dataset.fill, batch, i) for i in range(len(indices))]))

    try:
        read_ahead()
        while reading:
            batch, volumes = reading.popleft()
            for volume in volumes:
                volume.result()
            read_ahead()
            yield batch
            free.append(batch)
    finally:
        pool.shutdown(cancel_futures=True)


def copy_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`; on a GPU the next one is copied while this one is used. On a CPU, just the batches.

    Args:
        batches: each valid until the next is asked for, as from `build_loader`.
        device: where the result lies.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    previous: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            image = batch["image"].to(device, non_blocking=True)
            mask = batch["mask"].to(device, non_blocking=True)
            copied = stream.record_event()
        if previous is not None:
            yield previous
        copied.synchronize()  # it ended long ago; now the loader may have its buffer back
        for tensor in (image, mask):
            tensor.record_stream(torch.cuda.current_stream(device))  # not freed before the computation is done
        previous = {"image": image, "mask": mask, "index": batch["index"]}
    if previous is not None:
        yield previous
