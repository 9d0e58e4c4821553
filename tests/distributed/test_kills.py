"""A run of two ranks, killed at random moments, ends with the loss sequence of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpc_ddpm.checkpoint import latest_checkpoint
from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY, rank_environment, torchrun_variables
from tests.forks import Fork

KILLS = int(os.environ.get("HPC_DDPM_KILLS", "3"))
"""20 is the claim; each takes some seconds."""
PRESET = os.environ.get("HPC_DDPM_KILLS_PRESET", "")
"""Train this instead of a tiny network; `demo` is the claim."""
STEPS = 20 + 10 * KILLS


def start(fork: Callable[..., Fork], run: Path, packed: Path, settings: Sequence[str] = ()) -> list[Fork]:
    """The ranks of `hpc-ddpm train`, as a launcher starts them, with their output in files beside the run."""
    settings = [
        *(["--config", PRESET] if PRESET else TINY),
        *settings,
        f"training.num_steps={STEPS}",
        "training.checkpoint_every_steps=5",
        "training.log_every_steps=3",
    ]
    settings += ["training.learning_rate=1e-3", "training.keep_checkpoints=2", "training.keep_every_steps=50"]
    command = ["-m", "launch.cli", "train", "--out", str(run), "--data", str(packed), "-q"]
    processes = []
    for rank, variables in enumerate(torchrun_variables(2)):
        with Path(os.devnull).open("w") as stdout, stderr_of(run, rank).open("w") as stderr:
            processes.append(fork([*command, *settings], rank_environment() | variables, stdout, stderr))
    return processes


def stderr_of(run: Path, rank: int) -> Path:
    """What a rank says."""
    return run.with_name(f"{run.name}-stderr-{rank}.txt")


def finish(run: Path, processes: list[Fork]) -> list[int]:
    """Exit codes. As launchers do, end the others a while after one has died: they may be waiting to meet it."""
    deadline = time.monotonic() + 600
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.wait() for process in processes]
    for rank in range(len(processes)):
        assert "terminate called" not in stderr_of(run, rank).read_text(), stderr_of(run, rank).read_text()[-3000:]
    return codes


def kill(processes: list[Fork], chance: random.Random) -> None:
    """SIGKILL to one rank or to all, or SIGTERM to one or to all."""
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    for process in chance.choice([processes, [chance.choice(processes)]]):
        process.send_signal(number)


def wait_for_progress(run: Path, processes: list[Fork]) -> None:
    """Until this start has logged steps of its own."""
    path = run / "metrics.jsonl"
    began = time.time()
    while all(process.poll() is None for process in processes):
        if path.exists() and path.stat().st_mtime > began and len(list(read_metrics(run))) > 0:
            return
        time.sleep(0.05)


@pytest.fixture
def packed(tiny_packed: Path, tmp_path: Path) -> Path:
    """What the network fits."""
    if not PRESET:
        return tiny_packed
    data = load_config(PRESET).config.data
    write_phantoms(tmp_path / "source", 10, data.size, 0, data.modalities, data.labels)
    pack(tmp_path / "source", tmp_path / "packed", data)
    return tmp_path / "packed"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_the_loss_sequence_is_the_same(
    fork: Callable[..., Fork], packed: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(whole, start(fork, whole, packed)) == [0, 0]
    chance = random.Random(0)
    for _ in range(KILLS):
        processes = start(fork, killed, packed)
        if chance.random() < 0.8:
            wait_for_progress(killed, processes)
            time.sleep(chance.uniform(0, 1.5))
        else:
            time.sleep(chance.uniform(0, 2))
        kill(processes, chance)
        finish(killed, processes)
    assert finish(killed, start(fork, killed, packed)) == [0, 0]
    losses = [[row["loss"] for row in read_metrics(run)] for run in (whole, killed)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert latest_checkpoint(killed / "checkpoints") == killed / "checkpoints" / f"step_{STEPS:08d}"
