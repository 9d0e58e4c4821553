"""Generate what a plan asks for, together with any number of workers that know each other by the folder alone.

A worker takes volumes by leases (`hpc_ddpm.workers`), reads masks ahead, computes, and hands each volume to threads
that check and write it. A lease ends with its worker: what a dead one had begun, another takes over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_ddpm.config import Config
from hpc_ddpm.data.labels import to_brats_raw, written_names
from hpc_ddpm.data.shards import INDEX
from hpc_ddpm.data.team import Team
from hpc_ddpm.distributed import StopFlag
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.files import is_file_name, writing_to
from hpc_ddpm.runlog import package_versions
from hpc_ddpm.sampling.bids import BIDS, check_labels, describe_dataset
from hpc_ddpm.sampling.fidelity import build_fidelity
from hpc_ddpm.sampling.finish import Finisher
from hpc_ddpm.sampling.folder import NAMES, PURPOSE, SampleFolder
from hpc_ddpm.sampling.masks import MaskSource
from hpc_ddpm.sampling.packed import PACKED, ROWS, assemble
from hpc_ddpm.sampling.pipeline import Pipeline
from hpc_ddpm.sampling.plan import WAIT_S, Item, build_plan, extend_manifest, read_manifest
from hpc_ddpm.sampling.write import estimate_bytes
from hpc_ddpm.text import show
from hpc_ddpm.workers.claims import Writer

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0
LOOK_EVERY_S = 2.0
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SampleReport:
    """What one worker did, and how the set stands."""

    generated: int
    """Volumes that this worker generated."""
    seconds: float
    done: int
    planned: int
    failed: dict[str, int]
    """Volumes that could not be made, by anyone, by kind."""
    fitted: int
    """Masks that this worker had to change to make them fit."""
    stopped_by: int = 0
    """Signal that ended it early."""


def plan_set(
    out: Path, config: Config, weights: dict[str, Any], masks: Sequence[MaskSource]
) -> tuple[list[Item], list[Item]]:
    """Plan every mask `sampling.replicas` times, on top of what is planned.

    Args:
        out: folder of the set, created where missing.
        config: of the model, with its sampling section.
        weights: `path`, `sha256` and `provenance` of the weights.
        masks: to condition on; without any, those that are planned already get more replicas.

    Returns:
        The whole plan, and what this call asked for.

    Raises:
        ConfigError: `out` holds volumes of other weights, settings or masks.
        ClusterError: `out` cannot be written.
    """
    folder = SampleFolder(out)
    with writing_to(out), Writer(folder.state, PURPOSE) as writer:
        return _plan(folder, config, weights, masks, writer)


def run_sampling(
    model: torch.nn.Module,
    out: Path,
    weights: dict[str, Any],
    masks: Sequence[MaskSource] = (),
    *,
    team: Team | None = None,
    retry: bool = False,
    on_volume: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> SampleReport:
    """Generate what is planned, and these masks too, until nothing is left to do.

    Args:
        model: from `load_model`, on its device and in its precision; its `config` decides.
        out: folder of the set.
        weights: as for `plan_set`.
        masks: as for `plan_set`.
        team: others that were started with the same arguments; None is none.
        retry: make failed volumes again, and only those.
        on_volume: called with (finished volumes, planned volumes).
        say: told, in one line, how much disk it takes.

    Raises:
        ConfigError: `out` holds volumes of other weights, settings or masks.
        ClusterError: `out` cannot be written or has no room for the volumes.
    """
    folder, team = SampleFolder(out), team or Team(run=f"{time.time_ns():x}"[-12:])
    config: Config = model.config  # type: ignore[assignment]
    device = next(model.parameters()).device
    fidelity = build_fidelity(config, device)
    with writing_to(out), Writer(folder.state, PURPOSE) as writer, StopFlag() as stop:
        items, _ = _plan(folder, config, weights, masks, writer)
        if retry:
            to_mend = folder.failed()
            todo = [item for item in items if item.id in to_mend]
        else:
            todo = items
        _check_space(folder, config, todo, say)
        if "bids" in config.sampling.output.formats:
            names = written_names(config.data.labels, config.sampling.output.mask_coding)
            describe_dataset(out, package_versions(), names, writer.scratch)
        with exact_kernels(config, device):
            finisher = Finisher(folder, config, weights, model, writer.scratch, fidelity, team.run)
            worker = Worker(model, folder, todo, writer, team, finisher, stop, retry, on_volume)
            worker.work()
        ids = {item.id for item in items}
        done, failed = folder.done() & ids, finisher.failures(ids)
        is_complete = len(done) + sum(failed.values()) == len(items)
        if is_complete and PACKED in config.sampling.output.formats:
            _assemble(folder, config, items, done, writer, stop)
        if is_complete and writer.leave():
            writer.clear_away()
        fitted, signal = len(finisher.fitted), stop.signal or 0
        return SampleReport(finisher.generated, worker.seconds, len(done), len(items), failed, fitted, signal)


@dataclass
class Worker:
    """One process that works on a set."""

    model: torch.nn.Module
    folder: SampleFolder
    items: Sequence[Item]
    writer: Writer
    team: Team
    finisher: Finisher
    stop: StopFlag
    retry: bool
    on_volume: Progress
    seconds: float = field(default=0.0, init=False)
    _next_look: float = field(default=0.0, init=False)

    def work(self) -> None:
        """Until every volume is finished or failed, or (where the team says so) living ones have begun the rest."""
        started, wait_s = time.perf_counter(), FIRST_WAIT_S
        pipeline = Pipeline(self.model, self.finisher, self.writer, self._is_finished, lambda: bool(self.stop.signal))
        pipeline.on_volume = self._tell
        while not self.stop.signal:
            pending = self._pending()
            if not pending:
                break
            if pipeline.run(pending):
                wait_s = FIRST_WAIT_S
            elif self.team.stays or not self.writer.has_heard_all():
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                break
        self.seconds = time.perf_counter() - started

    def _pending(self) -> list[Item]:
        """Items in the plan's order, starting at this worker's place in the team and wrapping around."""
        begin = len(self.items) * self.team.index // self.team.size
        finished = self.folder.done() | self._given_up()
        self.on_volume(len([item for item in self.items if item.id in finished]), len(self.items))
        return [item for item in (*self.items[begin:], *self.items[:begin]) if item.id not in finished]

    def _given_up(self) -> set[str]:
        """Ids of failed volumes; a retry counts only failures of its own run."""
        here = set(self.finisher.failed)
        if not self.retry:
            return here | self.folder.failed()
        return here | {failure.id for failure in self.folder.failures() if failure.run == self.team.run}

    def _is_finished(self, item: Item) -> bool:
        if self.folder.sidecar(item.id).exists() or item.id in self.finisher.failed:
            return True
        if not self.retry:
            return self.folder.failure(item.id).exists()
        failure = self.folder.read_failure(item.id)
        return failure is not None and failure.run == self.team.run

    def _tell(self) -> None:
        """Report progress, but not after every volume, because listing a folder of thousands takes time."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            finished = self.folder.done() | self.folder.failed()
            self.on_volume(sum(item.id in finished for item in self.items), len(self.items))


@contextmanager
def exact_kernels(config: Config, device: torch.device) -> Iterator[None]:
    """Make PyTorch compute the same values on every machine of one kind.

    PyTorch chooses another convolution for one thread than for several, so there are two at least.
    """
    if not config.sampling.exact:
        yield
        return
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    if device.type == "cpu":
        torch.set_num_threads(max(2, threads))
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = deterministic


def _plan(
    folder: SampleFolder, config: Config, weights: dict[str, Any], masks: Sequence[MaskSource], writer: Writer
) -> tuple[list[Item], list[Item]]:
    """What cannot be written in the formats that are asked for is refused before anything is planned."""
    output = config.sampling.output
    if output.mask_coding == "brats_raw":
        to_brats_raw(np.empty(0, np.uint8), config.data.labels)
    for modality in config.data.modalities:
        if modality in NAMES or not is_file_name(modality):
            raise ConfigError(f"data.modalities: no folder of a set can be called {show(modality)}; rename it")
    folder.claim(config, weights, writer)
    planned = read_manifest(folder.path)
    sources = masks or [item.source for item in planned if item.replica == 0]
    wanted = build_plan(sources, config.sampling.replicas, config.seed)
    if BIDS in output.formats:
        check_labels([*planned, *wanted])
    return extend_manifest(folder.path, wanted, writer), wanted


def _check_space(folder: SampleFolder, config: Config, items: Sequence[Item], say: Callable[[str], None]) -> None:
    done = folder.done()
    left, each = sum(item.id not in done for item in items), estimate_bytes(config)
    free = shutil.disk_usage(folder.path).free
    line = f"{left} volumes of about {_size(each)}: {_size(left * each)}, {_size(free)} free"
    if left * each > free:
        raise ClusterError(
            f"{folder.path}: {line}; make room, choose another --out, or shrink them: "
            "sampling.output.dtype=int16, sampling.output.compression_level=6"
        )
    if left:
        say(line)


def _size(count: float) -> str:
    unit = next(unit for unit in ("B", "KiB", "MiB", "GiB", "TiB") if count < 1024 or not (count := count / 1024))
    return f"{count:.1f} {unit}"


def _assemble(
    folder: SampleFolder, config: Config, items: Sequence[Item], done: set[str], writer: Writer, stop: StopFlag
) -> None:
    """Shards of the rows that are in none yet; who comes second waits, since a rank that leaves may end the others."""
    packed = folder.path / PACKED
    while done and not stop.signal and ((packed / ROWS).is_dir() or not (packed / INDEX).exists()):
        with writer.claim(PACKED) as is_ours:
            if is_ours:
                records = {item_id: folder.record(item_id)["packed"] for item_id in done}
                assemble(folder.path, items, records, config.data, writer)
                with suppress(OSError):
                    (packed / ROWS).rmdir()
                return
        time.sleep(WAIT_S)
