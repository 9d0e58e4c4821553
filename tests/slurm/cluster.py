"""The development cluster as the tests use it: submit, look, wait."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

DEVCLUSTER = REPOSITORY / "slurm" / "devcluster"
TEMPLATES = REPOSITORY / "slurm"
POLL_S = 0.25
LIVE_STATES = {"PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "STOPPED", "SUSPENDED", "COMPLETING", "REQUEUED"}


def wait_for(condition: Callable[[], bool], what: Callable[[], str], timeout_s: float = 240) -> None:
    """Poll until the condition holds; `what` says at the end of the time how things stand."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Cluster:
    """A running cluster and the environment in which its commands and jobs run."""

    folder: Path
    env: Mapping[str, str]

    def run(self, *command: str | Path, cwd: Path | None = None, timeout_s: float = 240) -> str:
        """Standard output of a command; it must succeed."""
        done = self.attempt(*command, cwd=cwd, timeout_s=timeout_s)
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        return done.stdout

    def attempt(
        self, *command: str | Path, cwd: Path | None = None, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """A finished command, whatever came of it."""
        words = [str(word) for word in command]
        return subprocess.run(
            words, cwd=cwd, env=dict(self.env), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def up(self, option: str = "") -> None:
        """Start what has died; change whether preemption sends the user's signal."""
        self.run(DEVCLUSTER / "up.sh", *([option] if option else []))

    def sbatch(self, *words: str | Path, cwd: Path) -> str:
        """Submit from `cwd`, where the output goes; the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`, which knows a finished job for five minutes."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job_id)))

    def ranks(self, job_id: str) -> dict[int, int]:
        """Process ids of the ranks of a job that was submitted with submitit; all nodes are on this machine."""
        found = {}
        for process in self._processes({"SLURM_JOB_ID": job_id}):
            words = _read(process / "cmdline").split(b"\0")
            if b"submitit.core._submit" in words and words[0] != b"srun":
                found[int(_environment(process)["SLURM_PROCID"])] = int(process.name)
        return found

    def is_pending(self, job_id: str, number: int) -> bool:
        """Whether a signal waits for all ranks of a job, which are stopped."""
        masks = [
            re.search(rb"ShdPnd:\s*(\w+)", _read(Path(f"/proc/{pid}/status"))) for pid in self.ranks(job_id).values()
        ]
        return bool(masks) and all(mask and int(mask[1], 16) >> (number - 1) & 1 for mask in masks)

    def are_stopped(self, job_id: str) -> bool:
        """Whether SIGSTOP has reached all ranks of a job."""
        stats = [_read(Path(f"/proc/{pid}/stat")) for pid in self.ranks(job_id).values()]
        return bool(stats) and all(stat.rpartition(b")")[2].split()[:1] == [b"T"] for stat in stats)

    def kill_node(self, name: str) -> None:
        """Its slurmd, and all that it has started."""
        tasks = list(self._processes({"SLURMD_NODENAME": name}))
        parents = {int(_read(task / "stat").rpartition(b")")[2].split()[1]) for task in tasks}
        daemons = [pid for pid in parents if _read(Path(f"/proc/{pid}/comm")) == b"slurmstepd\n"]
        own = int((self.folder / "run" / f"{name}.pid").read_text())
        for pid in [own, *daemons, *(int(task.name) for task in tasks)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, variables: Mapping[str, str]) -> Iterator[Path]:
        """Processes of this cluster's jobs that have these environment variables."""
        wanted = {"SLURM_CONF": self.env["SLURM_CONF"], **variables}
        for process in Path("/proc").glob("[0-9]*"):
            if wanted.items() <= _environment(process).items():
                yield process

    def states(self, job_id: str) -> list[str]:
        """States of the job, or of every task of an array."""
        return self.run("squeue", "--noheader", "--array", "--states=all", "--format=%T", "--jobs", job_id).split()

    def wait(self, job_id: str, cwd: Path, state: str = "COMPLETED", timeout_s: float = 240) -> None:
        """Until the job, or every task of the array, is at its end, which must be `state`."""
        wait_for(
            lambda: not LIVE_STATES.intersection(self.states(job_id)),
            lambda: f"job {job_id} is {self.job(job_id)}: {read_logs(cwd)}",
            timeout_s,
        )
        assert set(self.states(job_id)) == {state}, read_logs(cwd)


def _read(path: Path) -> bytes:
    """Nothing, of a process that has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _environment(process: Path) -> dict[str, str]:
    entries = _read(process / "environ").decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def read_logs(folder: Path) -> str:
    """All output of the jobs that were submitted there."""
    return "\n".join(path.read_text() for pattern in ("*.log", "*.out") for path in sorted(folder.glob(pattern)))
