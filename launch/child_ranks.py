"""Ranks that this process starts: fresh ones for every measurement, on this machine or below each rank of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_ddpm.distributed import LAUNCHED, Ranks, all_gather, broadcast_object, detect_ranks, free_port, process_group

POLL_S = 0.1
LONGEST_MIN = 24 * 60.0
"""Minutes for which agents without child ranks wait."""


@dataclass(frozen=True)
class Agents:
    """This process among those that start ranks: alone it starts all of them, under srun or torchrun one."""

    ranks: Ranks
    environment: dict[str, str]
    """Environment variables of the child ranks."""

    def most(self, device_count: int) -> int | None:
        """Ranks that can be started, as far as that is known: of a job all, of a machine its GPUs."""
        return self.ranks.world_size if self.ranks.world_size > 1 else device_count or None

    def run(self, words: Sequence[str], world_size: int, logs: Path) -> str:
        """`python WORDS` on `world_size` new ranks; what the first failing one said, or nothing. A collective.

        Args:
            words: after the interpreter.
            world_size: the first so many of the agents take part.
            logs: folder that all agents see, for what the ranks print.
        """
        if self.ranks.is_main:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / "failed").unlink(missing_ok=True)
        address = os.environ["MASTER_ADDR"], str(free_port())
        meeting = dict(zip(("MASTER_ADDR", "MASTER_PORT"), broadcast_object(address), strict=True))
        mine = range(world_size) if self.ranks.world_size == 1 else {self.ranks.rank} & set(range(world_size))
        children = {rank: self._start(words, rank, world_size, meeting, logs) for rank in mine}
        codes = self._wait(children, logs / "failed")
        ends = {rank: code for found in all_gather(codes) for rank, code in found.items()}
        failed = sorted((rank for rank, code in ends.items() if code), key=lambda rank: ends[rank] < 0)  # killed last
        if not failed:
            return ""
        said = [(logs / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines() for rank in failed]
        own = [lines[-1] for lines in said if lines]
        return next((line for line in own if "hpc-ddpm: " in line), own[0] if own else f"rank {failed[0]} was killed")

    def _start(
        self, words: Sequence[str], rank: int, world_size: int, meeting: dict[str, str], logs: Path
    ) -> subprocess.Popen[bytes]:
        ranks = self.ranks
        if ranks.world_size == 1:
            local_rank, local_size = rank, world_size
        else:
            local_rank = ranks.local_rank
            local_size = min(ranks.local_world_size, world_size - (rank - local_rank))
        facts = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        facts |= {LAUNCHED: 1}
        environment = self.environment | meeting | {name: str(value) for name, value in facts.items()}
        with (logs / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)

    def _wait(self, children: dict[int, subprocess.Popen[bytes]], failed: Path) -> dict[int, int]:
        """Exit codes; when one fails anywhere, the others would wait for it for long."""
        try:
            while any(child.poll() is None for child in children.values()) and not failed.exists():
                if any(child.returncode for child in children.values()):
                    break
                time.sleep(POLL_S)
            if any(child.returncode for child in children.values()):
                failed.touch()
        finally:
            for child in children.values():
                child.kill()
                child.wait()
        return {rank: child.returncode for rank, child in children.items()}


@contextmanager
def agents() -> Iterator[Agents]:
    """The agents of this job, or this process alone. They meet through gloo and leave the GPUs alone."""
    import torch

    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    if os.environ.get("HPC_DDPM_DEVICE") == "cpu" or not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # ranks are alike, however many there are
    before = os.environ.get("HPC_DDPM_DEVICE")
    os.environ["HPC_DDPM_DEVICE"] = "cpu"
    ranks = detect_ranks()
    ended = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no child is left behind
    try:
        with process_group(ranks, LONGEST_MIN):
            yield Agents(ranks, environment)
    finally:
        signal.signal(signal.SIGTERM, ended)
        if before is None:
            del os.environ["HPC_DDPM_DEVICE"]
        else:
            os.environ["HPC_DDPM_DEVICE"] = before
