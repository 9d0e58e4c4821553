"""How `hpc-ddpm jobs` shows what it found: plain facts, and tables of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.ledger import time_ledger
from launch.progress import format_duration
from launch.records import GPU_STAGES, read_submissions
from launch.watch import JobState, progress

PIPE_WIDTH = 200


def describe(job: JobState, *, in_full: bool = False) -> dict[str, Any]:
    """Plain values for `--json`; `in_full` adds every task and how often and why it ended."""
    submission = job.submission
    facts: dict[str, Any] = {
        "run": submission.run_dir,
        "kind": submission.stage,
        "job_id": submission.job_id,
        "state": job.in_words,
        "nodes": ",".join(sorted({state.nodes for state in job.tasks.values() if state.nodes})),
        "elapsed": max((state.elapsed for state in job.tasks.values()), key=lambda text: (len(text), text)),
        "progress": progress(job),
        "restarts": job.restarts,
        "reason": ", ".join(sorted({state.reason for state in job.tasks.values() if state.reason})),
    }
    if not in_full:
        return facts
    every, now = read_submissions(Path(submission.run_dir)), time.time()
    seconds, gpu_seconds = (time_ledger(every, job.live, now, per_gpu=per_gpu) for per_gpu in (False, True))
    return facts | {
        "time_s": {name: round(value, 1) for name, value in seconds.items()},
        "gpu_hours": _gpu_hours(gpu_seconds) if submission.stage in GPU_STAGES else {},
        "command": ["hpc-ddpm", *submission.arguments],
        "ranks": submission.nodes * submission.ranks_per_node,
        "commit": submission.git_commit,
        "folder": str(submission.folder),
        "tasks": {
            task: {"state": state.state, "elapsed": state.elapsed, "events": submission.events(task)}
            for task, state in job.tasks.items()
        },
    }


def print_jobs(rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of `jobs ls`."""
    headers = ("run", "kind", "job", "state", "nodes", "elapsed", "progress", "volumes/s", "left", "restarts", "reason")
    table = Table(*headers, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        done = row["progress"]
        rate, left = done.get("volumes_per_s"), done.get("eta_s")
        table.add_row(
            *(escape(row[key]) for key in ("run", "kind", "job_id", "state", "nodes", "elapsed")),
            _in_words(done),
            f"{rate:.2f}" if rate else "",
            f"{left / 3600:.1f} h" if left and row["state"] != "COMPLETED" else "",
            str(row["restarts"]),
            escape(row["reason"]),
        )
    _console().print(table)


def _in_words(done: Mapping[str, Any]) -> str:
    """`40/1000 steps`, or while it loads `starting`, `starting at 40/1000 steps`."""
    counted = f"{done['done']}/{done['total']} {done['unit']}" if "total" in done else ""
    if done.get("is_starting"):
        return f"starting at {counted}" if done.get("done") else "starting"
    return counted


def print_job(facts: Mapping[str, Any]) -> None:
    """The page of `jobs show`."""
    print_jobs([facts])
    console = _console()
    console.print(
        f"\ncommand  {escape(' '.join(facts['command']))}\ncommit   {facts['commit']}\nlogs     {facts['folder']}"
    )
    console.print(f"time     {spent_in_words(facts['time_s'])}")
    if facts["gpu_hours"]:
        spent = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in facts["gpu_hours"].items())
        console.print(f"GPU-h    {spent}")
    for task, state in facts["tasks"].items():
        for event in state["events"]:
            if event["event"] != "start":
                why = event.get("why") or f"exit code {event['code']}"
                console.print(f"{task}  {escape(why)}")


def _gpu_hours(gpu_seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value / 3600, 3) for name, value in gpu_seconds.items() if name != "queued"}


def spent_in_words(seconds: Mapping[str, float]) -> str:
    """A ledger in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {format_duration(value)}" for name, value in seconds.items())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
