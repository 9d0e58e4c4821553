"""Measure all contestants, side by side."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hpc_ddpm.benchmark.data.contestants import OURS, PACKAGES, Contestant, Read, build_contestants
from hpc_ddpm.benchmark.data.sample import Sample, make_sample
from hpc_ddpm.benchmark.record import Report, environment, new_report
from hpc_ddpm.benchmark.timing import Timing, spread, take_turns, timed
from hpc_ddpm.config import DataConfig

CACHES = ("written", "cold", "warm")
"""In this order: what `warm` finds in the cache was read by the contestant itself, as in a second epoch."""
WORKERS = (0, 1, 2, 4)
MB = 1e6
MIN_TURN_S = 0.3
"""A turn with workers reads volumes for at least about this long."""
MAX_VOLUMES_PER_TURN = 200
Progress = Callable[[int, int, str], None]


def bench_data(
    config: DataConfig,
    *,
    data: Path | None = None,
    source: Path | None = None,
    med_ddpm: Path | None = None,
    repeats: int = 15,
    workers: Sequence[int] | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Report:
    """Read one subject in every way, from each state of the cache, and with workers.

    Args:
        config: of the subject; of a synthetic one where neither `data` nor `source` is given.
        data: packed dataset to take it from.
        source: NIfTI to take it from.
        med_ddpm: clone; None measures a loader like it.
        repeats: turns of every contestant; a third of them with workers.
        workers: numbers of readers; None is WORKERS.
        progress: called with (done turns, all turns, contestant).

    Raises:
        DataFormatError: `data` or `source` is not usable.
        ConfigError: `med_ddpm` is not usable.
    """
    where, workers = environment(PACKAGES.values()), WORKERS if workers is None else workers
    with tempfile.TemporaryDirectory(prefix="hpc_ddpm-bench-") as name:
        folder = Path(name)
        sample = make_sample(config, folder, data, source)
        contestants, missing = build_contestants(sample, folder, med_ddpm)
        os.sync()  # what is not on the disk yet cannot be dropped from the cache
        with_workers = max(3, repeats // 3)
        total = len(contestants) * (len(CACHES) * (repeats + 1) + len(workers) * (with_workers + 1))
        done = iter(range(1, total + 1))

        def on_turn(key: str) -> None:
            progress(next(done), total, key.partition(": ")[2])

        rows = _in_this_process(contestants, repeats, on_turn)
        rows += _with_workers(contestants, rows, workers, with_workers, on_turn)
    settings = {
        "sample": sample.origin,
        "shape": list(sample.image.shape),
        "dtype": str(sample.image.dtype),
        "mb_per_volume": sample.num_bytes / MB,
        "repeats": repeats,
        "repeats_with_workers": with_workers,
        "torch_threads": torch.get_num_threads(),
        "missing": missing,
    }
    return new_report("data", where, settings, _compare(rows, sample))


def _in_this_process(
    contestants: Iterable[Contestant], repeats: int, on_turn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each contestant and cache: as its writer left it; dropped; as its own last read from disk left it."""
    rows = []
    for cache in CACHES:
        turns = {
            _key(contestant): partial(_cold, contestant) if cache == "cold" else partial(timed, contestant.open())
            for contestant in contestants
        }
        timings = take_turns(turns, repeats, on_turn)
        rows += [_row(contestant, cache, None, timings[_key(contestant)]) for contestant in contestants]
    return rows


def _with_workers(
    contestants: Iterable[Contestant],
    alone: Iterable[dict[str, Any]],
    workers: Iterable[int],
    repeats: int,
    on_turn: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row for each contestant and number of workers; `alone` tells how long a volume takes."""
    seconds = {(row["contestant"], row["stage"]): row["ms"]["median"] / 1e3 for row in alone if row["cache"] == "warm"}
    rows = []
    for num_workers in workers:
        turns = {}
        for contestant in contestants:
            in_time = round(max(1, num_workers) * MIN_TURN_S / seconds[contestant.name, contestant.stage])
            count = max(2, 2 * num_workers, min(in_time, MAX_VOLUMES_PER_TURN))
            turns[_key(contestant)] = partial(_stream, contestant, count, num_workers)
        timings = take_turns(turns, repeats, on_turn)
        rows += [_row(contestant, "warm", num_workers, timings[_key(contestant)]) for contestant in contestants]
    return rows


def _key(contestant: Contestant) -> str:
    return f"{contestant.stage}: {contestant.name}"


def _cold(contestant: Contestant) -> Timing:
    """Reading once after the files, which are open, have been dropped from the operating system's cache."""
    read = contestant.open()
    for path in contestant.files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return timed(read)


def _stream(contestant: Contestant, count: int, num_workers: int) -> Timing:
    """Time per volume of a loader at work: the first volume of every worker does not count."""
    warm_up = max(1, num_workers)
    if contestant.batches is not None:
        batches: Iterator[Any] = contestant.batches(warm_up + count, num_workers)
    else:
        # more than is taken, so that workers do not come to an end while others are timed
        reads = _Reads(contestant.open, warm_up + count + 4 * num_workers)
        method = "fork" if num_workers else None  # contestants hold functions, which spawn cannot send
        batches = iter(DataLoader(reads, batch_size=None, num_workers=num_workers, multiprocessing_context=method))
    for _ in islice(batches, warm_up):
        pass
    children: dict[int, list[float]] = {}
    began, cpu = time.perf_counter(), time.process_time()
    for item in islice(batches, count):
        if num_workers and contestant.batches is None:
            children.setdefault(item[2], []).append(item[3])
    wall_s, cpu_s = time.perf_counter() - began, (time.process_time() - cpu) / count
    spans = [(times[-1] - times[0], len(times) - 1) for times in children.values() if len(times) > 1]
    if spans:
        cpu_s += sum(span for span, _ in spans) / sum(number for _, number in spans)
    return Timing(wall_s / count, cpu_s)


class _Reads(Dataset[tuple[Any, Any, int, float]]):
    """The sample again and again: image, mask, and the CPU time that this process has used."""

    def __init__(self, open_: Callable[[], Read], count: int) -> None:
        self._open, self._count = open_, count
        self._read: Read | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[Any, Any, int, float]:
        if self._read is None:
            self._read = self._open()
        image, mask = self._read()
        return torch.as_tensor(image), torch.as_tensor(mask), os.getpid(), time.process_time()


def _row(contestant: Contestant, cache: str, workers: int | None, timings: Sequence[Timing]) -> dict[str, Any]:
    """`workers` is None for a read in this process without a loader."""
    return {
        "contestant": contestant.name,
        "note": contestant.note,
        "stage": contestant.stage,
        "cache": cache,
        "workers": workers,
        "ms": spread([timing.wall_s * 1e3 for timing in timings]),
        "cpu_ms": spread([timing.cpu_s * 1e3 for timing in timings]),
    }


def _compare(rows: list[dict[str, Any]], sample: Sample) -> list[dict[str, Any]]:
    """The rows with speeds, and with times as multiples of ours in the same discipline."""

    def discipline(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["stage"], row["cache"], row["workers"]

    reference = {discipline(row): row["ms"]["median"] for row in rows if row["contestant"] == OURS}
    for row in rows:
        volumes_per_s = 1e3 / row["ms"]["median"]
        row["volumes_per_s"] = volumes_per_s
        row["mb_per_s"] = volumes_per_s * sample.num_bytes / MB
        row["times_ours"] = row["ms"]["median"] / reference[discipline(row)]
    return rows
