"""Records of submitted jobs in the run directory, where any login node can find them later.

RUN/jobs/ID.json            one submission (a job or an array)
RUN/jobs/TASK.events.jsonl  starts and ends of one job or array task
RUN/jobs/TASK.ranks.jsonl   exit codes of ranks that ended by themselves and not well
RUN/jobs/TASK_RANK_log.out  what a rank printed, over all restarts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import append_json, write_json, writing_to
from hpc_ddpm.sealed import Count, Finite, read_json, read_log
from hpc_ddpm.workers.sole import sole_owner

FOLDER = "jobs"
GPU_STAGES = ("train", "sample", "bench")
"""Stages that need GPUs; packing and reports use the cores of a whole node."""
MAX_TASKS = 4_000_001
"""Most tasks of one array that SLURM can be set to allow."""
JobId = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,18}$")]
"""Id of a job; the pattern is strict because ids become arguments of commands and parts of paths."""


@with_config(ConfigDict(extra="allow"))
class Event(TypedDict):
    """A job, a task or a rank of it starts, ends, or is requeued; `time` in seconds since the epoch."""

    event: Literal["start", "end", "requeue"]
    time: Finite
    restarts: NotRequired[Count]
    nodes: NotRequired[str]
    code: NotRequired[int]
    rank: NotRequired[Count]
    mark: NotRequired[str]
    is_excused: NotRequired[bool]
    is_orderly: NotRequired[bool]
    comes_back: NotRequired[bool]
    requeued: NotRequired[bool]
    why: NotRequired[str]


def _with_code(event: dict[str, Any]) -> dict[str, Any]:
    if event["event"] == "end" and "code" not in event:
        raise ValueError("an end with its code expected")
    return event


EVENT: Any = Annotated[Event, AfterValidator(_with_code)]


def _with_executor(profile: dict[str, Any]) -> dict[str, Any]:
    if profile.get("executor") not in ("slurm", "local", "debug"):
        raise ValueError("a profile with its executor expected")
    return profile


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Submission:
    """One job or array as it was submitted."""

    job_id: JobId
    stage: str
    """train, sample, bench, pack or report."""
    arguments: list[str]
    """Arguments of `hpc-ddpm`."""
    run_dir: str
    cwd: str
    profile: Annotated[dict[str, Any], AfterValidator(_with_executor)]
    """All values."""
    num_tasks: Annotated[int, Field(ge=0, le=MAX_TASKS)]
    """Tasks of the array; 0 is a plain job."""
    nodes: Count
    """Nodes of the job, or of each task."""
    ranks_per_node: Count
    submitted: Finite
    """Seconds since the epoch."""
    host: str
    git_commit: str | None
    gpus_per_rank: Count = 1

    @property
    def task_ids(self) -> list[str]:
        """`123`, or `123_0`, `123_1`, ..."""
        return [f"{self.job_id}_{task}" for task in range(self.num_tasks)] or [self.job_id]

    @property
    def folder(self) -> Path:
        """Folder of the submission's files."""
        return Path(self.run_dir) / FOLDER

    def events(self, task_id: str) -> list[dict[str, Any]]:
        """Starts and ends of a task, oldest first."""
        return read_events(Path(self.run_dir), task_id)

    def log(self, task_id: str, rank: int = 0) -> Path:
        """Path of the log of one rank of a task."""
        return self.folder / f"{task_id}_{rank}_log.out"

    def write(self) -> None:
        """Write the record into the run directory."""
        write_json(self.folder / f"{self.job_id}.json", asdict(self), indent=2)


def read_submissions(run_dir: Path, *, skip_foreign: bool = False) -> list[Submission]:
    """Submissions of one run, oldest first; paths follow a run directory that was moved.

    Raises:
        ClusterError: a file there is no record of a job; or it is left out.
    """
    found = []
    for path in (run_dir / FOLDER).glob("*.json"):
        advice = f"no record of a job, or a damaged one: remove it once no job of {run_dir} is queued or runs"
        try:
            record = read_json(path, Submission, advice, ClusterError)
        except ClusterError:
            if not skip_foreign:
                raise
        else:
            found.append(replace(record, run_dir=str(run_dir.resolve())))
    return sorted(found, key=lambda submission: submission.submitted)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Run directories with submissions: these folders themselves, and two levels below."""
    levels = ("", "*/", "*/*/")
    found = {
        path.parent.parent for folder in folders for level in levels for path in folder.glob(f"{level}jobs/*.json")
    }
    return sorted(found)


def add_event(run_dir: Path, task_id: str, event: dict[str, Any], kind: str = "events") -> None:
    """Append a start or an end, or to `ranks` the end of one rank."""
    append_json(run_dir / FOLDER / f"{task_id}.{kind}.jsonl", event)


def read_events(run_dir: Path, task_id: str, kind: str = "events") -> list[dict[str, Any]]:
    """Events of one job or array task, oldest first; torn and damaged lines are left out."""
    return cast("list[dict[str, Any]]", read_log(run_dir / FOLDER / f"{task_id}.{kind}.jsonl", EVENT, ClusterError))


@contextmanager
def submitting(run_dir: Path) -> Iterator[None]:
    """Only one process at a time submits for a run.

    Raises:
        ClusterError: another one does, or the system refuses to write there.
    """
    folder = run_dir / FOLDER
    with writing_to(run_dir):
        folder.mkdir(parents=True, exist_ok=True)
        with sole_owner(folder / ".submitting", "submit", partial(_refusal, run_dir)):
            yield


def _refusal(run_dir: Path, holder: str) -> str:
    return f"{run_dir}: another `hpc-ddpm submit` is at work on it ({holder}); wait a moment"
