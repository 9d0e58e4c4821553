"""What several tests of the cluster train, and how they submit and compare it."""

import json
from pathlib import Path
from typing import Any

from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY
from tests.distributed.test_training import SMOOTH
from tests.slurm.cluster import Cluster

STEPS = [*TINY, *SMOOTH, "training.num_steps=40", "training.checkpoint_every_steps=5"]
ROUNDING = 1e-5
"""Relative, fp32, over 40 steps."""


def losses(run: Path) -> list[float]:
    """Losses of every step, in order."""
    return [row["loss"] for row in read_metrics(run)]


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Contents by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def submitted(cluster: Cluster, *words: str | Path) -> str:
    """The job's id."""
    return cluster.run("hpc-ddpm", "submit", *words).split("job ", 1)[1].split(":")[0]


def shown(cluster: Cluster, run: Path) -> dict[str, Any]:
    """`jobs show`."""
    facts: dict[str, Any] = json.loads(cluster.run("hpc-ddpm", "jobs", "show", run, "--json"))
    return facts
