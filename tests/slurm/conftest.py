"""The cluster of the session: the sourced one if there is one, else one that is brought up and taken down here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import rank_environment
from tests.slurm.cluster import DEVCLUSTER, Cluster

CANNOT_INSTALL = 77


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
