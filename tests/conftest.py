"""What several test packages share: a tiny packed dataset, rank launchers, and the real data where it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: tests share cores with others
REPOSITORY = Path(__file__).resolve().parents[1]

TINY = [
    "data.size=[16,16,16]",
    "data.num_workers=0",
    "data.labels.names={1: head, 2: tumour}",
    "data.val_fraction=0.2",
    "model.base_channels=8",
    "model.num_groups=4",
    "model.channel_multipliers=[1,2]",
    "diffusion.num_timesteps=50",
    "training.num_steps=6",
    "training.global_batch=4",
    "training.micro_batch=1",
    "training.learning_rate=1e-2",
    "training.weight_decay=0.01",
    "training.optimizer=adamw",
    "training.precision=fp32",
    "training.log_every_steps=1",
    "sampling.num_steps=4",
    "sampling.precision=fp32",
]
"""A network and a run that take a second."""


@pytest.fixture(scope="session")
def tiny_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantoms of 16^3, packed."""
    folder = tmp_path_factory.mktemp("tiny")
    config = load_config(None, TINY).config
    write_phantoms(folder / "source", 10, (16, 16, 16), seed=1, modalities=("t1",), labels=config.data.labels)
    pack(folder / "source", folder / "packed", config.data)
    return folder / "packed"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real volumes beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real volumes are not there: {folder}")
    return folder


def rank_environment() -> dict[str, str]:
    """For child processes: one thread each, CPU, warnings of other people's packages left to them."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "PMI"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HPC_DDPM_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` on n ranks and return the finished process."""

    def run(
        num_ranks: int, *arguments: str | Path, timeout_s: int = 300, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *launcher, *map(str, arguments)]
        environment = rank_environment() | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)

    return run


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hpc-ddpm ARGUMENTS` as one process."""

    def run(*arguments: str | Path, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
        return subprocess.run(
            command, env=rank_environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run
