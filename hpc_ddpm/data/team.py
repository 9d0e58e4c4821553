"""The processes of one start of the command, which share its work without messages."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from hpc_ddpm.data.parallel import num_cores
from hpc_ddpm.distributed import Ranks


@dataclass(frozen=True)
class Team:
    """This process as a member: a rank, a task of a SLURM array, or both."""

    run: str
    """Id of this start, equal in all members and new at every start (12 hexadecimal digits)."""
    index: int = 0
    size: int = 1
    stays: bool = True
    """Whether to wait for the other members at the end; array tasks do not, and the last of them finishes the work."""


def detect_team(ranks: Ranks, env: Mapping[str, str] | None = None) -> Team:
    """The team that the launcher describes; a collective under mpirun.

    Args:
        ranks: from `detect_ranks`.
        env: None is the environment.
    """
    env = os.environ if env is None else env
    task, num_tasks = _array_task(env)
    run = sha256(_start_id(ranks, num_tasks, env).encode()).hexdigest()[:12]
    return Team(run, task * ranks.world_size + ranks.rank, num_tasks * ranks.world_size, stays=num_tasks == 1)


def default_workers(ranks: Ranks, env: Mapping[str, str] | None = None) -> int:
    """Processes of this rank: all cores that it may use; 1 where ranks share a node and SLURM gave none to each."""
    env = os.environ if env is None else env
    if ranks.local_world_size > 1:
        return int(env.get("SLURM_CPUS_PER_TASK") or 1) if ranks.started_by == "srun" else 1
    return num_cores()


def wait_for_all(ranks: Ranks) -> None:
    """Wait until every rank is here; only under mpirun, which ends all ranks as soon as one has failed."""
    if ranks.started_by == "mpirun" and ranks.world_size > 1:
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()


def _array_task(env: Mapping[str, str]) -> tuple[int, int]:
    """This task's place in the array, from 0, and the number of tasks; (0, 1) outside of arrays."""
    num_tasks = int(env.get("SLURM_ARRAY_TASK_COUNT") or 1)
    place = int(env.get("SLURM_ARRAY_TASK_ID") or 0) - int(env.get("SLURM_ARRAY_TASK_MIN") or 0)
    return place // int(env.get("SLURM_ARRAY_TASK_STEP") or 1) % num_tasks, num_tasks


def _start_id(ranks: Ranks, num_tasks: int, env: Mapping[str, str]) -> str:
    """Text that is equal in all members of the team, and only in them."""
    restart = env.get("SLURM_RESTART_COUNT", "0")
    if num_tasks > 1:
        return f"array {env.get('SLURM_ARRAY_JOB_ID')} {restart}"
    if ranks.started_by == "srun":
        return f"srun {env.get('SLURM_JOB_ID')} {env.get('SLURM_STEP_ID')} {restart}"
    if ranks.started_by == "torchrun":
        return f"torchrun {ranks.master_addr} {ranks.master_port} {env.get('TORCHELASTIC_RESTART_COUNT')}"
    own = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    if ranks.started_by == "mpirun" and ranks.world_size > 1:
        from mpi4py import MPI

        return str(MPI.COMM_WORLD.bcast(own, root=0))
    return own
