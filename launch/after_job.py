"""After the last rank has ended, in the batch script: `python -m launch.after_job RUN STAGE CODE ...`.

Exits with 0 where the job shall come back. No torch, and no SLURM commands: a container may have none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from launch.jobs import task_id
from launch.records import FOLDER, add_event, read_events

STOPPED = {128 + 10: "SIGUSR1", 128 + 12: "SIGUSR2", 128 + 15: "SIGTERM"}
"""Preemption or the time limit; what could be saved was."""
MISTAKE = (1, 2)
"""A traceback, or a line for the user: the next start would end the same way."""


def main() -> None:
    """Decide, say why, and keep a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("stage")
    parser.add_argument("code", type=int)
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--max-crashes", type=int, required=True)
    given = parser.parse_args()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    mark = progress_mark(given.run_dir, given.stage)
    ends = [event for event in read_events(given.run_dir, task_id()) if event["event"] == "end"]
    comes_back, why = decide(given.code, mark, ends, restarts, given.max_requeues, given.max_crashes)
    event = {"event": "end", "time": time.time(), "code": given.code, "mark": mark, "requeued": comes_back, "why": why}
    add_event(given.run_dir, task_id(), event)
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} hpc-ddpm {given.stage}: {why}", flush=True)
    sys.exit(0 if comes_back else 1)


def decide(
    code: int, mark: str, ends: list[dict[str, object]], restarts: int, max_requeues: int, max_crashes: int
) -> tuple[bool, str]:
    """Whether a job that ended with `code` comes back, and why.

    Args:
        code: of srun: 0, 1, 2, or 128 + signal.
        mark: how far the run is; any text that changes with progress.
        ends: earlier ends of this job, oldest first.
        restarts: so far.
        max_requeues: restarts at most.
        max_crashes: crashes in a row at the same mark at most.
    """
    if code == 0:
        return False, "done"
    if code in MISTAKE:
        return False, f"failed with exit code {code}; the log of rank 0 says why"
    if restarts >= max_requeues:
        return False, f"ended after {restarts} restarts, the most that the profile allows (max_requeues)"
    if code in STOPPED:
        return True, f"stopped by {STOPPED[code]}, requeued after {restarts} restarts"
    crashes = 1
    for end in reversed(ends):
        if end["code"] in STOPPED or end["mark"] != mark:
            break
        crashes += 1
    if crashes >= max_crashes:
        return False, f"crashed {crashes} times without progress (exit code {code}, at {mark}); not requeued"
    return True, f"a rank was lost (exit code {code}, at {mark}), requeued after {restarts} restarts"


def progress_mark(run_dir: Path, stage: str) -> str:
    """The newest checkpoint of a training, the number of finished files of everything else."""
    if stage == "train":
        return max((path.name for path in run_dir.glob("checkpoints/step_*") if path.suffix != ".tmp"), default="start")
    folder = run_dir / "sidecar" if stage == "sample" else run_dir
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != FOLDER)
    return f"{sum(path.is_file() for path in paths)} files"


if __name__ == "__main__":
    main()
