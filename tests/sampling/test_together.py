"""Many workers, killed and replaced, under every launcher: always the volumes that one process makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpc_ddpm.data.team import Team
from hpc_ddpm.sampling.status import read_status
from hpc_ddpm.sampling.verify import verify_set
from hpc_ddpm.workers import owner
from hpc_ddpm.workers.claims import Writer, look_at_claims
from tests.conftest import Stranger, rank_environment
from tests.forks import Fork
from tests.sampling.conftest import Generate, voxels
from tests.sampling.harness import generate_under_fire


@pytest.mark.slow
def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    num_volumes = int(os.environ.get("HPC_DDPM_HARNESS_VOLUMES", "100"))
    outcome = generate_under_fire(tmp_path, num_volumes)
    assert outcome.killed >= 5
    assert outcome.problems == ()
    assert outcome.is_identical
    assert len(voxels(tmp_path / "fire")) == num_volumes


@pytest.mark.mpi
@pytest.mark.slow
def test_mpirun_says_what_failed_and_kills_nobody(weights: Path, heads: Path, tmp_path: Path) -> None:
    """A rank that leaves with exit code 2 would end the others: all leave together."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    shutil.copytree(heads, tmp_path / "masks")
    (tmp_path / "masks" / "broken.nii.gz").write_bytes(b"x")
    command = [mpirun, "--oversubscribe", "-n", "2", sys.executable, "-m", "launch.cli", "sample", str(weights)]
    command += ["--out", str(tmp_path / "out"), "--masks", str(tmp_path / "masks"), "-q"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        command, env=rank_environment() | root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "5 of 6 volumes done" in done.stdout
    assert len(voxels(tmp_path / "out")) == 5


@pytest.mark.slow
def test_array_tasks(weights: Path, heads: Path, tmp_path: Path, fork: Callable[..., Fork]) -> None:
    """Tasks of an array leave what others have begun, and the set is whole when the last has ended."""
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
    command = ["-m", "launch.cli", "sample", str(weights), "--out", str(tmp_path), "-q"]
    command += ["--masks", str(heads), "sampling.output.formats=[packed]"]
    env = rank_environment() | array
    tasks = [fork(command, env | {"SLURM_ARRAY_TASK_ID": str(5 + index)}) for index in range(3)]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0, 0]
    assert verify_set(tmp_path) == []
    assert (tmp_path / "packed" / "index.json").exists()


def test_a_lease_of_another_node_ends(
    generate_set: Generate, tmp_path: Path, stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot be asked whether it lives keeps its volume until it is silent."""
    elsewhere = stranger(tmp_path / ".sample")
    elsewhere.link.rename(elsewhere.link.with_name("head_0002_r000"))
    assert generate_set(tmp_path, team=Team("x", stays=False)).done == 4
    found = read_status(tmp_path)
    assert (found["leased"], len(found["workers"]), found["left"]) == (1, 1, 1)
    assert found["eta_s"] is not None
    elsewhere.die()
    monkeypatch.setattr(owner, "LEASE_S", 0.2)
    assert generate_set(tmp_path, masks=None, team=Team("y", stays=False)).done == 5
    assert not (tmp_path / ".sample").exists()


def test_who_joins_at_the_end_keeps_its_place(
    generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last worker has seen that it is alone, and clears away."""
    leave = Writer.leave
    with ExitStack() as stack:

        def leave_and_be_followed(writer: Writer) -> bool:
            is_last = leave(writer)
            monkeypatch.setattr(Writer, "leave", leave)
            assert stack.enter_context(stack.enter_context(Writer(writer.state, "sample")).claim("more"))
            return is_last

        monkeypatch.setattr(Writer, "leave", leave_and_be_followed)
        assert generate_set(tmp_path).done == 5
        assert [len(found) for found in look_at_claims(tmp_path / ".sample")] == [1, 1]
    assert generate_set(tmp_path).generated == 0
    assert not (tmp_path / ".sample").exists()


def test_shards_that_another_writes_are_waited_for(
    generate_set: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers end all ranks when one leaves with exit code 2; should the other be lost, this one writes them."""
    with Writer(tmp_path / ".sample", "sample") as other, ExitStack() as lease:
        assert lease.enter_context(other.claim("packed"))
        monkeypatch.setattr("time.sleep", lambda seconds: lease.close() if seconds else None)
        assert generate_set(tmp_path, "sampling.output.formats=[packed]").done == 5
    assert verify_set(tmp_path) == []
    assert (tmp_path / "packed" / "index.json").exists()
