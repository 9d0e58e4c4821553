"""Where the time of a run went, over all its jobs and restarts, from what the jobs and the training recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
        `saving`, `lost_steps` that were taken again after a loss, and `starting`: loading and ending. `not_known` is
        between a start whose end nobody recorded (a lost node) and the next one, running or queued. What clocks that
        ran backwards have spoilt is not there.
    """
    submissions, live = list(submissions), set(live)
    ledger = dict.fromkeys(("queued", "running", "not_known"), 0.0)
    for submission in submissions:
        ranks = submission.nodes * submission.ranks_per_node * submission.gpus_per_rank if per_gpu else 1
        for task in submission.task_ids:
            until = now if task in live else None
            for part, spent in _spans(submission.submitted, submission.events(task), until):
                ledger[part] += ranks * spent if spent >= 0 else math.nan
    if submissions and submissions[-1].stage == "train":
        run_dir = Path(submissions[-1].run_dir)
        lost = sum(_steps(read_metrics(run_dir, LOST), per_gpu).values())
        steps = _steps(read_metrics(run_dir), per_gpu) | {"lost_steps": lost}
        rest = ledger["running"] - sum(steps.values())
        ledger |= steps | {"starting": max(0.0, rest) if rest > -1 and not ledger["not_known"] else math.nan}
    return {part: value for part, value in ledger.items() if not math.isnan(value) and (value or part != "not_known")}


def _spans(submitted: float, events: Iterable[Mapping[str, Any]], until: float | None) -> Iterator[tuple[str, float]]:
    """What one task did and for how many seconds, in order; the last span lasts until now if the task still runs."""
    since, runs = submitted, False
    for event in events:
        if event["event"] == "requeue":
            continue
        spent, since = event["time"] - since, event["time"]
        if event["event"] == "end":
            yield "running", event.get("ran_s", spent)
        else:
            yield "not_known" if runs else "queued", spent
        runs = event["event"] == "start"
    if until is not None:
        yield "running" if runs else "queued", until - since


def _steps(rows: Iterable[Mapping[str, Any]], per_gpu: bool) -> dict[str, float]:
    """What the steps took; a row with a speed speaks for those since the last one with it."""
    total = waiting = saving = 0.0
    count = 0
    for row in rows:
        count += 1
        if "step_time_s" in row:
            per_rank = row.get("volumes_per_s_per_rank") if per_gpu else None
            ranks = row["volumes_per_s"] / per_rank if per_rank and "volumes_per_s" in row else 1
            elapsed = ranks * row["step_time_s"] * count
            total, waiting = total + elapsed, waiting + elapsed * row.get("data_wait_share", 0.0)
            saving += ranks * row.get("checkpoint_stall_s", 0.0)
            count = 0
    return {"computing": max(0.0, total - waiting - saving), "waiting_for_data": waiting, "saving": saving}
