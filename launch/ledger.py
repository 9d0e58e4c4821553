"""Where the time of a run went, over all its jobs and restarts, from what the jobs and the training recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_ddpm.runlog import LOST, read_metrics
from launch.records import Submission


def time_ledger(
    submissions: Iterable[Submission], live: Iterable[str], now: float, *, per_gpu: bool = False
) -> dict[str, float]:
    """Seconds by what they went into; of a training, the running ones are divided further.

    Args:
        submissions: all of one run.
        live: ids of tasks that are queued or run.
        now: seconds since the epoch.
        per_gpu: count every second once for each GPU that it took.

    Returns:
        `queued` and `running`, summed over array tasks; of `running`, of a training: `computing`, `waiting_for_data`,
        `saving`, `lost_steps` that were taken again after a loss, and `starting`: loading and ending.
    """
    submissions, live = list(submissions), set(live)
    queued = running = 0.0
    for submission in submissions:
        ranks = submission.nodes * submission.ranks_per_node * submission.gpus_per_rank if per_gpu else 1
        for task in submission.task_ids:
            since, runs = submission.submitted, False
            for event in submission.events(task):
                spent, since = ranks * (event["time"] - since), event["time"]
                queued, running = (queued, running + spent) if runs else (queued + spent, running)
                runs = event["event"] == "start"
            if task in live:
                spent = ranks * (now - since)
                queued, running = (queued, running + spent) if runs else (queued + spent, running)
    ledger = {"queued": queued, "running": running}
    if submissions and submissions[-1].stage == "train":
        run_dir = Path(submissions[-1].run_dir)
        lost = sum(_steps(read_metrics(run_dir, LOST), per_gpu).values())
        steps = _steps(read_metrics(run_dir), per_gpu) | {"lost_steps": lost}
        ledger |= steps | {"starting": max(0.0, running - sum(steps.values()))}
    return ledger


def _steps(rows: Iterable[Mapping[str, Any]], per_gpu: bool) -> dict[str, float]:
    """What the steps took; a row with a speed speaks for those since the last one with it."""
    total = waiting = saving = 0.0
    count = 0
    for row in rows:
        count += 1
        if "step_time_s" in row:
            ranks = row["volumes_per_s"] / row["volumes_per_s_per_rank"] if per_gpu else 1
            elapsed = ranks * row["step_time_s"] * count
            total, waiting = total + elapsed, waiting + elapsed * row["data_wait_share"]
            saving += ranks * row.get("checkpoint_stall_s", 0.0)
            count = 0
    return {"computing": max(0.0, total - waiting - saving), "waiting_for_data": waiting, "saving": saving}
