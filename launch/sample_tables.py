"""How `hpc-ddpm sample` prints: progress of a set, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_ddpm.sampling.verify import Problem

MAX_LISTED = 20


def print_status(found: Mapping[str, Any]) -> None:
    """Counts in one line, then workers, rate, and what failed or was rejected."""
    print(f"{found['done']} of {found['planned']} done, {found['failed']} failed, {found['left']} left")
    rate = f", {found['volumes_per_hour']} volumes/h" if found["volumes_per_hour"] else ""
    eta = f", {timedelta(seconds=found['eta_s'])} to go" if found["eta_s"] is not None else ""
    print(f"{len(found['workers'])} workers on {found['leased']} volumes{rate}{eta}")
    for worker in found["workers"]:
        print(f"  {worker}")
    _list([f"failed: {one['id']} ({one['kind']}) {one['reason']}" for one in found["failures"]])
    scores = {name: ", ".join(f"{one['fidelity']:.3f}" for one in tries) for name, tries in found["rejected"].items()}
    _list([f"rejected tries: {name} {text}" for name, text in scores.items()])


def print_problems(out: Path, problems: Sequence[Problem]) -> None:
    """Kinds and the first few of each, then a line that sums up."""
    for kind in dict.fromkeys(problem.kind for problem in problems):
        _list([f"{kind}: {problem.id}: {problem.found}" for problem in problems if problem.kind == kind])
    print(f"{out}: {f'{len(problems)} problems' if problems else 'every planned volume is there, as it was written'}")


def _list(lines: Sequence[str]) -> None:
    for line in lines[:MAX_LISTED]:
        print(line)
    if len(lines) > MAX_LISTED:
        print(f"and {len(lines) - MAX_LISTED} more (--json lists all)")
