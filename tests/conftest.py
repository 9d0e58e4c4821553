"""What several test packages share: a tiny packed dataset, rank launchers, and the real data where it is there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: tests share cores with others
import torch

from hpc_ddpm.benchmark.record import cpu_model
from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from hpc_ddpm.data.phantom import write_phantoms
from hpc_ddpm.distributed import free_port
from hpc_ddpm.workers.owner import Owner
from tests.forks import Fork, Server

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


def pytest_report_header() -> str:
    """Say on which CPU the tests run: rounding, bf16 and speed differ between kinds."""
    kinds, limits = ("avx2", "avx512", "avx512_bf16", "amx_tile"), ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    features = [name for name in kinds if getattr(torch.cpu, f"_is_{name}_supported")()]
    features += [f"{name}={os.environ[name]}" for name in limits if name in os.environ]
    return f"cpu: {cpu_model()}, {' '.join(features)}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}"


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


class Stranger:
    """A worker of another machine, which nobody here can ask whether it lives, with a claim on `unit`."""

    def __init__(self, state: Path, beat_s: float = 0.02, ahead_s: float = 0.0) -> None:
        """Its clock is `ahead_s` ahead."""
        self.folder = state / "writers" / "n7-5"
        self.folder.mkdir(parents=True)
        Owner("n7", "", 5, "1", "42", "other").write(self.folder)
        self.link = state / "claims" / "unit"
        self.link.parent.mkdir(exist_ok=True)
        self.link.symlink_to("n7-5")
        self._beat_s, self._ahead_s, self._end = beat_s, ahead_s, threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def _keep_beating(self) -> None:
        while not self._end.wait(self._beat_s):
            with contextlib.suppress(FileNotFoundError):
                self.beat()

    def beat(self) -> None:
        """Show that it lives."""
        os.utime(self.folder / "owner.json", (time.time() + self._ahead_s,) * 2)

    def die(self) -> None:
        """Without a word."""
        self._end.set()
        self._thread.join()


@pytest.fixture
def stranger() -> Iterator[Callable[..., Stranger]]:
    """Make strangers, see `Stranger`; they die at the end."""
    made: list[Stranger] = []

    def make(*arguments: Any, **options: Any) -> Stranger:
        made.append(Stranger(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.die()


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fork() -> Iterator[Callable[..., Fork]]:
    """Start `python ARGUMENTS` without waiting: torch and DeepSpeed are loaded already, all else is a new process."""
    with Server(rank_environment()) as server:
        yield partial(Fork, server)


@pytest.fixture(scope="session")
def real_torchrun() -> Run:
    """Run `python ARGUMENTS` on n ranks under torchrun and return the finished process."""

    def run(
        num_ranks: int, *arguments: str | Path, timeout_s: int = 900, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *launcher, *map(str, arguments)]
        environment = rank_environment() | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)

    return run


def torchrun_variables(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    everyone = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    everyone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    each = [everyone | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(num_ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


@pytest.fixture(scope="session")
def torchrun(fork: Callable[..., Fork]) -> Run:
    """As `real_torchrun` does, with ranks that need not load torch and DeepSpeed first."""

    def run(num_ranks: int, *arguments: str | Path, timeout_s: int = 500) -> subprocess.CompletedProcess[str]:
        return _finish(fork, list(map(str, arguments)), torchrun_variables(num_ranks), timeout_s)

    return run


@pytest.fixture(scope="session")
def cli(fork: Callable[..., Fork]) -> Run:
    """Run `hpc-ddpm ARGUMENTS` as one process, with these variables."""

    def run(*arguments: str | Path, timeout_s: int = 500, **variables: str) -> subprocess.CompletedProcess[str]:
        return _finish(fork, ["-m", "launch.cli", *map(str, arguments)], [variables], timeout_s)

    return run


def _finish(
    fork: Callable[..., Fork], arguments: list[str], variables: list[dict[str, str]], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """One process for each of `variables`. As launchers do, end all soon after one has failed."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        ranks = [fork(arguments, rank_environment() | each, stdout, stderr) for each in variables]
        deadline, has_failed = time.monotonic() + timeout_s, False
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes) and not has_failed:
                deadline, has_failed = min(deadline, time.monotonic() + 10), True
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
                if not has_failed:
                    raise subprocess.TimeoutExpired(arguments, timeout_s)
            time.sleep(0.01)
        for file in (stdout, stderr):
            file.seek(0)
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())
