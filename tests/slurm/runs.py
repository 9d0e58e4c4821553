"""What several tests of the cluster train, and how they compare it."""

from pathlib import Path

from hpc_ddpm.runlog import read_metrics
from tests.conftest import TINY

STEPS = [*TINY, "training.num_steps=16", "training.checkpoint_every_steps=1000", "training.learning_rate=1e-4"]
ROUNDING = 1e-5
"""Relative, fp32; the small learning rate keeps it from growing over the steps."""


def losses(run: Path) -> list[float]:
    """Of every step, in order."""
    return [row["loss"] for row in read_metrics(run)]


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Contents by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}
