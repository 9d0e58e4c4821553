"""Two ranks, of which one runs on a node that is odd: nothing is lost, and the losses are those of a sound one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_ddpm.checkpoint import latest_checkpoint, leftovers
from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY, Run

pytestmark = pytest.mark.slow

ODD = Path(__file__).with_name("odd_node.py")
SETTINGS = [*TINY, "training.checkpoint_every_steps=2", "training.zero_stage=1", "training.async_checkpoints=true"]


def words(run: Path, packed: Path) -> list[str]:
    return ["train", "--out", str(run), "--data", str(packed), "-q", *SETTINGS]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


@pytest.fixture(scope="module")
def sound(torchrun: Run, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound") / "run"
    done = torchrun(2, "-m", "launch.cli", *words(run, tiny_packed))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stale_file_handle(torchrun: Run, tiny_packed: Path, sound: Path, tmp_path: Path, rank: str) -> None:
    run = tmp_path / "run"
    done = torchrun(2, ODD, "stale", rank, *words(run, tiny_packed))
    assert done.returncode == 2 and done.stderr.count("hpc-ddpm: ") == 1, done.stderr
    assert f"cannot write {run}/checkpoints/step_00000004: rank {rank}: Stale file handle" in done.stderr
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step_00000002"
    done = torchrun(2, "-m", "launch.cli", *words(run, tiny_packed))
    assert done.returncode == 0 and "went on from step 2" in done.stdout, done.stderr
    assert losses(run) == losses(sound)
    assert not leftovers(run / "checkpoints") and not (run / ".train").exists()


def test_a_clock_that_runs_backwards(torchrun: Run, tiny_packed: Path, sound: Path, tmp_path: Path) -> None:
    """Also over a resume."""
    run = tmp_path / "run"
    for num_steps in (3, 6):
        more = [f"training.num_steps={num_steps}"]
        done = torchrun(2, ODD, "backwards", "0", *words(run, tiny_packed), *more)
        assert done.returncode == 0, done.stderr
    assert losses(run) == losses(sound)
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step_00000006"
    assert all(row.get("step_time_s", 1) > 0 for row in read_metrics(run))
