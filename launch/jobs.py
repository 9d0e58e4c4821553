"""What runs inside a submitted job: the same command as by hand. It carries its words and the run directory."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_ddpm.distributed import LAUNCHED, Ranks, detect_ranks
from hpc_ddpm.errors import ClusterError
from launch.records import FOLDER, add_event

VISIBLE_GPUS = "HPC_DDPM_VISIBLE_GPUS"
"""CUDA_VISIBLE_DEVICES as it was at submission, which submitit's local executor overwrites."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


@dataclass(frozen=True)
class StageJob:
    """A picklable call of one stage; returns when all is done, else exits with the code of the command."""

    arguments: tuple[str, ...]
    run_dir: str
    cwd: str
    umask: int | None = None
    """File mode mask of the command that submitted the job; the job itself inherits a narrower one."""

    def __call__(self) -> None:
        """Run the command as one rank.

        Submitit's handlers would checkpoint on rank 0 alone and swallow SIGTERM. Instead a signal ends the process,
        except where a stage waits for it (`StopFlag`); `launch.after_job` then decides whether the job comes back.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.chdir(self.cwd)
        if self.umask is not None:
            os.umask(self.umask)
        _export_local_ranks()
        try:
            ranks = detect_ranks()
        except ClusterError as error:
            print(f"hpc-ddpm: {error}", file=sys.stderr)
            self._end(error.exit_code, None)
        print(_describe(ranks), flush=True)
        if ranks.is_main:
            record(Path(self.run_dir), _start(ranks))
        self._end(run_command(self.arguments), ranks)

    def _end(self, code: int, ranks: Ranks | None) -> None:
        end = {"event": "end", "time": time.time(), "code": code, "restarts": _restarts()}
        if ranks and ranks.is_main and ranks.started_by != "srun":
            record(Path(self.run_dir), end)
        if code:
            record(Path(self.run_dir), end | ({"rank": ranks.rank} if ranks else {}), kind="ranks")
            sys.stdout.flush()
            sys.exit(code)


def record(run_dir: Path, event: dict[str, Any], kind: str = "events") -> None:
    """`add_event` of this task; a disk that is full costs the record, and a line, but not the job."""
    try:
        add_event(run_dir, task_id(), event, kind)
    except OSError as error:
        place = f"{run_dir / FOLDER}: the {event['event']} of job {task_id()} is not recorded"
        print(f"hpc-ddpm: warning: {place} ({error.strerror})", file=sys.stderr, flush=True)


def run_command(arguments: tuple[str, ...]) -> int:
    """`hpc-ddpm ARGUMENTS` in this process; the exit code, 1 after a traceback."""
    from launch.cli import main

    sys.argv = ["hpc-ddpm", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def task_id() -> str:
    """Id of the job or array task to which this process belongs."""
    env = os.environ
    if "SUBMITIT_LOCAL_JOB_ID" in env:
        return env["SUBMITIT_LOCAL_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def _export_local_ranks() -> None:
    """The facts of submitit's local executor, in the variables of torchrun; MASTER_PORT was chosen at submission."""
    env = os.environ
    if "SUBMITIT_LOCAL_NTASKS" in env:
        env["RANK"] = env["LOCAL_RANK"] = env["SUBMITIT_LOCAL_GLOBALID"]
        env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = env["SUBMITIT_LOCAL_NTASKS"]
        env["MASTER_ADDR"] = "127.0.0.1"
        env[LAUNCHED] = "1"
        if VISIBLE_GPUS in env:
            env["CUDA_VISIBLE_DEVICES"] = env[VISIBLE_GPUS]


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _start(ranks: Ranks) -> dict[str, object]:
    nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    return {
        "event": "start",
        "time": time.time(),
        "restarts": _restarts(),
        "nodes": nodes,
        "world_size": ranks.world_size,
    }


def _describe(ranks: Ranks) -> str:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return (
        f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}: local rank {ranks.local_rank}, "
        f"{len(os.sched_getaffinity(0))} cores, CUDA_VISIBLE_DEVICES {gpus}"
    )
