"""Where the time of a run went, over all its jobs and restarts, from what the jobs and the training recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.records import Submission


def time_ledger(submissions: Iterable[Submission], live: Iterable[str], now: float) -> dict[str, float]:
    """Seconds by what they went into; of a training, the running ones are divided further.

    Args:
        submissions: all of one run.
        live: ids of tasks that are queued or run.
        now: seconds since the epoch.

    Returns:
        `queued` and `running`, summed over array tasks; of `running`, of a training: `computing`, `waiting_for_data`,
        `saving`, and `starting_or_lost`: loading, ending, and steps that were taken again after a loss.
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
        steps = _steps(Path(submissions[-1].run_dir))
        ledger |= steps | {"starting_or_lost": max(0.0, running - sum(steps.values()))}
    return ledger


def _steps(run_dir: Path) -> dict[str, float]:
    """Of the steps that count; a row of metrics with a speed speaks for those since the last one with it."""
    from hpc_ddpm.runlog import read_metrics

    total = waiting = saving = 0.0
    count = 0
    rows: Iterable[Mapping[str, Any]] = read_metrics(run_dir)
    for row in rows:
        count += 1
        if "step_time_s" in row:
            elapsed = row["step_time_s"] * count
            total, waiting = total + elapsed, waiting + elapsed * row["data_wait_share"]
            saving += row.get("checkpoint_stall_s", 0.0)
            count = 0
    return {"computing": max(0.0, total - waiting - saving), "waiting_for_data": waiting, "saving": saving}
