"""One training at a time in a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.checkpoint import latest_checkpoint, leftovers
from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY, rank_environment
from tests.forks import Fork

TRIES = int(os.environ.get("HPC_DDPM_RIVALS", "2"))
"""20 is the claim; each takes some seconds."""
STEPS = 30
SETTINGS = [*TINY, f"training.num_steps={STEPS}", "training.checkpoint_every_steps=3", "training.learning_rate=1e-3"]


def train_at_once(fork: Callable[..., Fork], run: Path, packed: Path, count: int) -> list[tuple[int, str]]:
    """Exit codes and what they said."""
    command = ["-m", "launch.cli", "train", "--out", str(run), "--data", str(packed), "-q", *SETTINGS]
    paths, processes = [run.with_name(f"said-{number}.txt") for number in range(count)], []
    for path in paths:
        with path.open("w") as output:
            processes.append(fork(command, rank_environment(), output, output))
    return [(process.wait(timeout=300), path.read_text()) for process, path in zip(processes, paths, strict=True)]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


@pytest.fixture(scope="module")
def alone(fork: Callable[..., Fork], tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_at_once(fork, run, tiny_packed, 1)[0][0] == 0
    assert not (run / ".train").exists()
    return run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(TRIES))
def test_of_two_trainings_exactly_one_trains(
    fork: Callable[..., Fork], tiny_packed: Path, alone: Path, tmp_path: Path, number: int
) -> None:
    """The other is refused, or (on a very busy machine) comes when all is done."""
    run = tmp_path / "run"
    ended = train_at_once(fork, run, tiny_packed, 2)
    winners = [said for code, said in ended if code == 0 and f"trained to step {STEPS}: " in said]
    assert len(winners) == 1, ended
    (other,) = (end for end in ended if end[1] is not winners[0])
    is_refused = other[0] == 2 and "trains here already; wait for it, end it" in other[1]
    assert is_refused or "went on from" in other[1], other
    assert losses(run) == losses(alone)
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / f"step_{STEPS:08d}"
    assert not leftovers(run / "checkpoints") and not (run / ".train").exists()
