"""Where the time of a run went, over all its jobs and restarts, from what the jobs and the training recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_ddpm.runlog import LOST, read_metrics
from launch.records import Submission


def time_ledger(submissions: Iterable[Submission], live: Iterable[str], now: float) -> dict[str, float]:
    """Seconds by what they went into; of a training, the running ones are divided further.

    Args:
        submissions: all of one run.
        live: ids of tasks that are queued or run.
        now: seconds since the epoch.

    Returns:
        `queued` and `running`, summed over array tasks; of `running`, of a training: `computing`, `waiting_for_data`,
        `saving`, `lost_steps` that were taken again after a loss, and `starting`: loading and ending.
    """
    submissions, live = list(submissions), set(live)
    queued = running = 0.0
    for submission in submissions:
        for task in submission.task_ids:
            since, runs = submission.submitted, False
            for event in submission.events(task):
                spent, since = event["time"] - since, event["time"]
                queued, running = (queued, running + spent) if runs else (queued + spent, running)
                runs = event["event"] == "start"
            if task in live:
                queued, running = (queued, running + now - since) if runs else (queued + now - since, running)
    ledger = {"queued": queued, "running": running}
    if submissions and submissions[-1].stage == "train":
        run_dir = Path(submissions[-1].run_dir)
        steps = _steps(read_metrics(run_dir)) | {"lost_steps": sum(_steps(read_metrics(run_dir, LOST)).values())}
        ledger |= steps | {"starting": max(0.0, running - sum(steps.values()))}
    return ledger


def _steps(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What the steps took; a row with a speed speaks for those since the last one with it."""
    total = waiting = saving = 0.0
    count = 0
    for row in rows:
        count += 1
        if "step_time_s" in row:
            elapsed = row["step_time_s"] * count
            total, waiting = total + elapsed, waiting + elapsed * row["data_wait_share"]
            saving += row.get("checkpoint_stall_s", 0.0)
            count = 0
    return {"computing": max(0.0, total - waiting - saving), "waiting_for_data": waiting, "saving": saving}
