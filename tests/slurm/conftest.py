"""The cluster of the session: the sourced one if there is one, else one that is brought up and taken down here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import rank_environment
from tests.slurm.cluster import DEVCLUSTER, Cluster
from tests.slurm.runs import STEPS, files

CANNOT_INSTALL = 77
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes n1 to n4 with two GPUs each; skips where SLURM cannot be installed."""
    given = os.environ.get("HPC_DDPM_DEVCLUSTER")
    if given is None:
        _take_down_what_killed_sessions_left()
    folder = Path(given or f"/tmp/hpc_ddpm-tests-{os.getpid()}")
    env = os.environ | {"HPC_DDPM_DEVCLUSTER": str(folder)}
    up = subprocess.run([DEVCLUSTER / "up.sh"], env=env, capture_output=True, text=True, check=False, timeout=500)
    try:
        if up.returncode == CANNOT_INSTALL:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        yield Cluster(
            folder,
            rank_environment()
            | {
                "HPC_DDPM_DEVCLUSTER": str(folder),
                "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            },
        )
    finally:
        if given is None:
            subprocess.run([DEVCLUSTER / "down.sh"], env=env, check=True, timeout=100)


def _take_down_what_killed_sessions_left() -> None:
    for folder in Path("/tmp").glob("hpc_ddpm-tests-*"):
        owner = Path("/proc", folder.name.rpartition("-")[2])
        if folder.stat().st_uid == os.getuid() and not owner.exists():
            env = os.environ | {"HPC_DDPM_DEVCLUSTER": str(folder)}
            subprocess.run([DEVCLUSTER / "down.sh"], env=env, check=True, timeout=100)


@pytest.fixture(scope="session")
def alone(cli: Cli, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = cli("train", "--out", run, "--data", tiny_packed, "-q", *STEPS)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def sampled_alone(cli: Cli, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Volumes of one process: two masks, two replicas."""
    out = tmp_path_factory.mktemp("sampled") / "out"
    assert cli("sample", alone, "--out", out, "-q", "sampling.replicas=2").returncode == 0
    assert len(files(out, "t1/*.nii.gz")) == 4
    return files(out, "t1/*.nii.gz")
