"""State of submitted jobs: from squeue, else from sacct, else from the jobs' own records."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from hpc_ddpm.errors import ClusterError, DataFormatError
from hpc_ddpm.sealed import Count, read_json
from launch import slurm
from launch.progress import format_duration
from launch.records import Submission, read_submissions
from launch.slurm import ELSEWHERE, TaskState

DONE = "COMPLETED"


@dataclass(frozen=True)
class JobState:
    """A submission and its tasks."""

    submission: Submission
    tasks: dict[str, TaskState]
    """By id."""

    @property
    def live(self) -> list[str]:
        """Ids of queued, held and running tasks."""
        return [task for task, state in self.tasks.items() if state.is_live]

    @property
    def unfinished(self) -> list[str]:
        """Ids of tasks that ended without success."""
        over = {task: state.state for task, state in self.tasks.items() if not state.is_live}
        return [task for task, state in over.items() if state not in (DONE, ELSEWHERE)]

    def check_is_seen(self) -> None:
        """Raise an error if only another machine can see the state of the job.

        Raises:
            ClusterError: the job was started there, and has not recorded its end.
        """
        if any(state.state == ELSEWHERE for state in self.tasks.values()):
            job, host = self.submission.job_id, self.submission.host
            raise ClusterError(
                f"{self.submission.run_dir}: job {job} was started on {host} and may still run; wait for it, end it or "
                f"start it again there (if it cannot run any more, remove {self.submission.folder / f'{job}.json'})"
            )

    @property
    def in_words(self) -> str:
        """`RUNNING`, or of an array `2 RUNNING, 6 COMPLETED`."""
        counts = Counter(state.state for state in self.tasks.values())
        if len(self.tasks) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {state}" for state, count in counts.most_common())

    @property
    def restarts(self) -> int:
        """Restarts of all tasks; the next start also counts one that was not recorded."""
        counts = ([event.get("restarts", 0) for event in self.submission.events(task)] for task in self.tasks)
        return sum(max(found, default=0) for found in counts)


def look(submissions: Iterable[Submission]) -> list[JobState]:
    """The state of every task, with one question to SLURM for all.

    Raises:
        ClusterError: SLURM does not answer.
    """
    submissions = list(submissions)
    batch = [submission for submission in submissions if submission.profile["executor"] == "slurm"]
    known = slurm.query(task for submission in batch for task in submission.task_ids)
    return [JobState(submission, _states(submission, known)) for submission in submissions]


def _states(submission: Submission, known: dict[str, TaskState]) -> dict[str, TaskState]:
    tasks = submission.task_ids
    forgotten = "CANCELLED" if any(task in known for task in tasks) else "UNKNOWN"
    return {task: known.get(task) or _from_records(submission, task, forgotten) for task in tasks}


def live_job(run_dir: Path) -> str | None:
    """The id of a job of this run that is queued or runs.

    Raises:
        ClusterError: nobody here knows, because SLURM does not answer or another machine started it.
    """
    for job in reversed(look(read_submissions(run_dir))):
        if job.live:
            return job.submission.job_id
        job.check_is_seen()
    return None


def _from_records(submission: Submission, task: str, forgotten: str) -> TaskState:
    """State by the run's own records, for local ranks and jobs that SLURM has forgotten."""
    is_local = submission.profile["executor"] == "local"
    if is_local and _is_controller_alive(submission):
        return TaskState("RUNNING", format_duration(time.time() - submission.submitted), submission.host)
    events = submission.events(task)
    if not has_ended(events) and not _is_seen_from_here(submission):
        return TaskState(ELSEWHERE, nodes=submission.host)
    if not events:
        return TaskState("FAILED" if is_local else forgotten)
    nodes = next((event["nodes"] for event in events if "nodes" in event), "")
    seconds = events[-1]["time"] - submission.submitted
    elapsed = format_duration(seconds) if seconds >= 0 else ""  # of clocks that do not agree
    last = next((event for event in reversed(events) if event["event"] != "requeue"), events[-1])
    if last["event"] != "end":
        return TaskState("FAILED" if is_local else forgotten, elapsed, nodes)
    if last["code"] in (128 + signal.SIGTERM, 128 + signal.SIGINT) and is_local:
        return TaskState("CANCELLED", elapsed, nodes)
    return TaskState(DONE if last["code"] == 0 else "FAILED", elapsed, nodes)


def has_ended(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a task has ended for good, by its events: it neither asked for a requeue nor was requeued."""
    if not events or events[-1]["event"] == "start":
        return False
    return not (events[-1].get("requeued") or events[-1].get("comes_back"))


def _is_seen_from_here(submission: Submission) -> bool:
    if submission.profile["executor"] == "slurm":
        return slurm.is_here()
    return submission.host == socket.gethostname()


def _is_controller_alive(submission: Submission) -> bool:
    """Whether submitit's local controller of this run still runs; seen from its own machine only."""
    if submission.host != socket.gethostname():
        return False
    try:
        words = Path("/proc", submission.job_id, "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "submitit.local._local" in words and any(Path(word) == submission.folder for word in words)


# ------------------------------------------------------------------------------------------------------ progress


class Lengths(TypedDict):
    """How long a training is."""

    num_steps: Count
    global_batch: Count


class Stored(TypedDict):
    """The part of config.json that tells how long a training is."""

    training: Lengths


def progress(job: JobState) -> dict[str, Any]:
    """What the run directory tells of a training or a generated set.

    Returns:
        `done`, `total`, `unit`, `volumes_per_s` and `eta_s`, where they are known; and whether what runs still loads,
        `is_starting`: it has taken no step, or has no worker, since it started.
    """
    run = Path(job.submission.run_dir)
    running = [task for task, state in job.tasks.items() if state.state == "RUNNING"]
    if job.submission.stage == "train":
        events = [event for task in running for event in job.submission.events(task)]
        is_loaded = bool(events) and events[-1]["event"] == "start"
        return _training_progress(run, bool(running), events[-1]["time"] if is_loaded else math.inf)
    if job.submission.stage == "sample":
        return _sampling_progress(run, bool(running))
    return {}


def _training_progress(run: Path, is_running: bool, started: float) -> dict[str, Any]:
    """`started` and the rows' times are by the clock of rank 0; older rows have none, and nothing is said of those."""
    from hpc_ddpm.runlog import read_metrics

    path = run / "config.json"
    rows = read_metrics(run)
    is_starting = is_running and (not rows or rows[-1].get("time", math.inf) < started)
    if not path.is_file():
        return {"is_starting": True} if is_starting else {}
    try:
        training = read_json(path, Stored, "put it back")["training"]
    except DataFormatError:
        return {}
    step = rows[-1]["step"] if rows else 0
    rate = next((row["volumes_per_s"] for row in reversed(rows) if "volumes_per_s" in row), None)
    left = (training["num_steps"] - step) * training["global_batch"]
    return {
        "done": step,
        "total": training["num_steps"],
        "unit": "steps",
        "volumes_per_s": rate,
        "eta_s": round(left / rate) if rate and 0 < rate < math.inf else None,
        "is_starting": is_starting,
    }


def _sampling_progress(run: Path, is_running: bool) -> dict[str, Any]:
    from hpc_ddpm.sampling.status import read_status

    try:
        status = read_status(run)
    except DataFormatError:
        return {"is_starting": True} if is_running else {}
    rate = status["volumes_per_hour"]
    return {
        "done": status["done"],
        "total": status["planned"],
        "unit": "volumes",
        "volumes_per_s": rate / 3600 if rate else None,
        "eta_s": status["eta_s"],
        "is_starting": is_running and bool(status["left"]) and not status["workers"],
    }


def cancel(job: JobState) -> None:
    """End a job for good: its SLURM tasks, or the ranks on this machine, which save first."""
    if job.submission.profile["executor"] == "slurm":
        slurm.ask("scancel", job.submission.job_id)
    else:
        os.kill(int(job.submission.job_id), signal.SIGTERM)
