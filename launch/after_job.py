"""After the last rank has ended, in the batch script: `python -m launch.after_job RUN STAGE CODE ...`.

Exits with 0 where the job shall come back. Then the script asks SLURM, and `... --answer CODE TEXT` records what it
said: nothing is called requeued before it is. No torch, and no SLURM commands: a container may have none. No clock is
compared with another.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hpc_ddpm.text import one_line
from launch.jobs import record, task_id
from launch.records import FOLDER, read_events

STOPPED = {128 + 10: "SIGUSR1", 128 + 12: "SIGUSR2", 128 + 15: "SIGTERM"}
"""Exit codes after preemption or the time limit, when the run has saved what it could."""
STACKS = "stacks-of-rank-*.txt"
"""Files that `hpc_ddpm.training.watchdog` writes when a rank hangs."""
ENOUGH = 0.5
"""Share of the time limit: a job that stops in an orderly way after it, without progress, will not get further."""
MOST_SAID = 500
"""Most characters of SLURM's answer that a message shows."""
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
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--ran-s", type=float, required=True, help="By a clock that nobody sets.")
    parser.add_argument("--answer", nargs=2, metavar=("CODE", "TEXT"), help="Of `scontrol requeue`.")
    given = parser.parse_args()
    event = _answer(given) if given.answer else _end(given)
    record(given.run_dir, {"time": time.time()} | event)
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} hpc-ddpm {given.stage}: {event['why']}", flush=True)
    sys.exit(0 if event.get("comes_back") else 1)


def _end(given: argparse.Namespace) -> dict[str, Any]:
    restarts = _restarts()
    ends = [event for event in read_events(given.run_dir, task_id()) if event["event"] == "end"]
    ranks = [end["code"] for end in read_events(given.run_dir, task_id(), "ranks") if end.get("restarts") == restarts]
    stacks = find_stacks(given.run_dir)
    is_hang = any(ends[-1].get("stacks", {}).get(name) != stamp for name, stamp in stacks.items()) if ends else stacks
    mark = progress_mark(given.run_dir, given.stage)
    end = End(given.code, mark, tuple(ranks), bool(is_hang), given.ran_s / given.limit_s)
    comes_back, why = decide(end, ends, restarts, given.max_requeues, given.max_crashes)
    facts = {"code": given.code, "ran_s": given.ran_s, "restarts": restarts, "stacks": stacks}
    return {"event": "end"} | facts | end.record | {"comes_back": comes_back, "why": why}


def _answer(given: argparse.Namespace) -> dict[str, Any]:
    code, text = given.answer
    said = one_line(text, MOST_SAID) or f"exit code {code}"
    why = f"not requeued: SLURM said: {said}; `hpc-ddpm jobs retry {given.run_dir}` on a login node starts it again"
    if code == "0":
        why = f"requeued after {_restarts()} restarts"
    return {"event": "requeue", "requeued": code == "0", "why": why}


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


@dataclass(frozen=True)
class End:
    """How one start of a job ended."""

    code: int
    """Exit code of srun: 0, or the highest code of its ranks; also 143 where srun ended the others because of one."""
    mark: str = ""
    """Progress of the run, as any text that changes when it advances."""
    ranks: tuple[int, ...] = ()
    """Codes of the ranks that ended by themselves."""
    is_hang: bool = False
    share: float = 0.0
    """Share of the time limit for which the job ran."""

    @property
    def is_excused(self) -> bool:
        """Whether missing progress is excused: a run preempted in its first half may not reach its next mark."""
        return bool(self.agreed_signal) and self.share < ENOUGH

    @property
    def record(self) -> dict[str, Any]:
        """Plain values that later ends need to know about this one."""
        return {"mark": self.mark, "is_excused": self.is_excused, "is_orderly": bool(self.agreed_signal)}

    @property
    def agreed_signal(self) -> str:
        """Signal on which all ranks agreed before they saved; srun may have ended slower ranks by another signal."""
        return next((STOPPED[code] for code in self.ranks if code in STOPPED), "")

    @property
    def reason(self) -> str:
        """The reason of the end, in a few words."""
        if self.agreed_signal:
            return f"stopped by {self.agreed_signal}"
        if self.is_hang:
            return f"a rank hung, see {STACKS}"
        return "ended by a signal before it could save" if self.code in STOPPED else "a rank was lost or did not come"


def decide(
    end: End, ends: Sequence[Mapping[str, Any]], restarts: int, max_requeues: int, max_crashes: int
) -> tuple[bool, str]:
    """Whether a job comes back after this end, and why.

    Args:
        end: the newest one.
        ends: earlier ends of this job as recorded, oldest first.
        restarts: so far.
        max_requeues: restarts at most.
        max_crashes: starts in a row without progress, none of them excused, at most: ends at the same mark, without
            the orderly one that came there.
    """
    if end.code == 0:
        return False, "done"
    mistakes = [code for code in (end.code, *end.ranks) if code in MISTAKE]
    if mistakes:
        return False, f"failed with exit code {max(mistakes)}; the log says why"
    if restarts >= max_requeues:
        return False, f"ended after {restarts} restarts, the most that the profile allows (max_requeues)"
    found = end.reason if end.agreed_signal else f"{end.reason} (exit code {end.code}, at {end.mark})"
    at_mark = list(takewhile(lambda one: one["mark"] == end.mark, [end.record, *reversed(ends)]))
    in_a_row = list(takewhile(lambda one: not one["is_excused"], at_mark))
    crashes = len(in_a_row) - (len(in_a_row) == len(at_mark) and at_mark[-1]["is_orderly"])
    if crashes >= max_crashes:
        hint = "; a start needs more time than its limit" if end.agreed_signal else ""
        return False, f"{crashes} starts in a row without progress, the last: {found}; not requeued{hint}"
    return True, f"{found}, comes back"


def find_stacks(run_dir: Path) -> dict[str, int]:
    """Stack files of hung ranks, each with its time stamp; older versions left empty files for killed ranks."""
    found = {path.name: path.stat() for path in run_dir.glob(STACKS)}
    return {name: file.st_mtime_ns for name, file in found.items() if file.st_size}


def progress_mark(run_dir: Path, stage: str) -> str:
    """The newest checkpoint of a training, the number of finished files of everything else."""
    if stage == "train":
        return max((path.name for path in run_dir.glob("checkpoints/step_*") if path.suffix != ".tmp"), default="start")
    folder = run_dir / "sidecar" if stage == "sample" else run_dir
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != FOLDER)
    return f"{sum(path.is_file() for path in paths)} files"


if __name__ == "__main__":
    main()
