"""Questions to SLURM: squeue first, then sacct. Each is one call for all jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from hpc_ddpm.errors import ClusterError

ENDED = {
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"),
    *("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED", "UNKNOWN"),
}
"""Final states. Every other state may still become running: held ones, and those of future SLURM versions."""
ELSEWHERE = "ELSEWHERE"
"""Only another machine can tell: ranks that were started there, or a job of a cluster that is not here."""
TIMEOUT_S = 60
_QUEUE_FIELDS = "%i|%T|%M|%R|%N"
_ACCOUNT_FIELDS = "JobID,State,Elapsed,NodeList"


@dataclass(frozen=True)
class TaskState:
    """A job or array task as SLURM knows it."""

    state: str
    elapsed: str = ""
    nodes: str = ""
    reason: str = ""
    """Why a queued or held job does not run."""

    @property
    def is_live(self) -> bool:
        """Whether it is queued, held or runs."""
        return self.state not in {*ENDED, ELSEWHERE}


def is_here() -> bool:
    """Whether this machine can talk to a SLURM cluster."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def ask(*command: str) -> str:
    """Standard output of one of SLURM's commands.

    Raises:
        ClusterError: it is not there, fails, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ClusterError(f"no `{command[0]}` on this machine") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{command[0]}` did not answer within {TIMEOUT_S} s; try again later") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ClusterError(f"`{' '.join(command)}` failed: {last}")
    return done.stdout


def max_array_tasks() -> int | None:
    """Tasks that one array may have; None where SLURM does not answer."""
    try:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    except ClusterError:
        return None
    return int(found.group(1)) if found else None


def query(task_ids: Iterable[str]) -> dict[str, TaskState]:
    """States of jobs and array tasks by id, of those that SLURM still knows; empty where there is no SLURM.

    Raises:
        ClusterError: squeue does not answer, and sacct does not know all of them either.
    """
    wanted = set(task_ids)
    if not wanted or not is_here():
        return {}
    found: dict[str, TaskState] = {}
    silence = None
    try:
        found = _squeue(wanted)
    except ClusterError as error:
        silence = error
    if missing := wanted - set(found):
        found |= _sacct(missing)
    if silence and wanted - set(found):
        raise silence
    return found


def _squeue(wanted: set[str]) -> dict[str, TaskState]:
    text = ask("squeue", "--me", "--array", "--states=all", "--noheader", f"--format={_QUEUE_FIELDS}")
    found = {}
    for line in text.splitlines():
        task, state, elapsed, reason, nodes = line.split("|", 4)
        if task in wanted:
            why = reason.strip("()") if reason.startswith("(") and state not in ENDED else ""
            found[task] = TaskState(state, elapsed, nodes, why)
    return found


def _sacct(wanted: set[str]) -> dict[str, TaskState]:
    jobs = ",".join(sorted({task.partition("_")[0] for task in wanted}))
    try:
        text = ask("sacct", "-n", "-X", "-P", "-o", _ACCOUNT_FIELDS, "-j", jobs)
    except ClusterError:
        return {}
    found = {}
    for line in text.splitlines():
        name, state, elapsed, nodes = line.split("|", 3)
        for task in wanted.intersection(expand_tasks(name)):
            found[task] = TaskState(state.split()[0], elapsed, nodes)  # "CANCELLED by 1000"
    return found


def expand_tasks(name: str) -> list[str]:
    """`7_[0-2,5%4]`, tasks that have not started, to `7_0`, `7_1`, `7_2`, `7_5`; other names as they are."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", name)
    if not match:
        return [name]
    ranges = [(part.partition("-")[0], part.rpartition("-")[2]) for part in match.group(2).split(",")]
    return [f"{match.group(1)}_{task}" for first, last in ranges for task in range(int(first), int(last) + 1)]
