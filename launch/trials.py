"""`hpc-ddpm bench train|sample` in processes of their own, so that a crash, a hang or a full memory is a result."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpc_ddpm
from hpc_ddpm.errors import ClusterError, ConfigError

LIMIT_S = 900.0
"""A trial that takes longer is ended."""
HERE = Path(hpc_ddpm.__file__).resolve().parents[1]
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError", "exit code -9")


@dataclass(frozen=True)
class Trial:
    """One run of a loop."""

    what: str
    """train or sample."""
    arguments: tuple[str, ...]
    ranks: int = 1
    """On this node."""
    code: Path = HERE
    """Checkout that it runs from."""


def run_trial(trial: Trial, path: Path, device: str) -> dict[str, Any]:
    """Run a trial; return its report, which is also written to `path`, or `error` in a few words.

    Args:
        trial: to run.
        path: for the report; relative paths in the arguments are this process's.
        device: cuda or cpu.
    """
    from hpc_ddpm.benchmark.gpu_check.run import run_limited

    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(trial.ranks), "-m"]
    launcher = [sys.executable, "-m", *(ranks if trial.ranks > 1 else []), "launch.cli"]
    command = [*launcher, "bench", trial.what, *trial.arguments, "--quiet", "--json", str(path.resolve())]
    # the code of that checkout, wherever this runs
    variables = {"PYTHONPATH": str(trial.code), "PYTHONSAFEPATH": "1"}
    result = run_limited(command, path, LIMIT_S, device, variables)
    if result.get("rows"):
        return result
    return {"error": _reason(f"{result.get('error', 'no report')}\n{result.pop('log', '')}")}


def _reason(text: str) -> str:
    """What went wrong, in one line."""
    if any(sign in text for sign in OUT_OF_MEMORY):
        return "out of memory"
    said = [line for line in text.splitlines() if line.startswith("hpc-ddpm: ") and "warning" not in line]
    errors = [line for line in text.splitlines() if "Error: " in line]
    return (said or errors or text.splitlines())[0].removeprefix("hpc-ddpm: ")[:200]


@contextmanager
def checkout(reference: str | None) -> Iterator[Path]:
    """Folder with the code of a git reference of this checkout, or this checkout itself.

    Raises:
        ConfigError: no such reference, or the package is no git checkout.
    """
    if reference is None:
        yield HERE
        return
    folder = Path(tempfile.mkdtemp(prefix="hpc_ddpm-ab-"))
    git = ["git", "-C", str(HERE), "worktree"]
    try:
        added = subprocess.run([*git, "add", "--detach", str(folder), reference], capture_output=True, text=True)
        if added.returncode:
            reason = (added.stderr.strip().splitlines() or ["git failed"])[-1]
            raise ConfigError(f"--against {reference}: {reason}; give a commit, branch or tag of the checkout {HERE}")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run_pairs(
    a: Trial, b: Trial, pairs: int, out: Path, device: str, on_run: Callable[[int, int], None]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Reports of A and B, measured in turns: A B, B A, A B, ...; written to `out` as a1.json, b1.json, ...

    Raises:
        ClusterError: a run failed.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(pairs):
        order: Sequence[tuple[str, Trial]] = (("a", a), ("b", b))
        reports: dict[str, dict[str, Any]] = {}
        for name, trial in order if number % 2 == 0 else order[::-1]:
            reports[name] = run_trial(trial, out / f"{name}{number + 1}.json", device)
            if "error" in reports[name]:
                raise ClusterError(f"run {name.upper()} {' '.join(trial.arguments)} failed: {reports[name]['error']}")
            on_run(2 * number + len(reports), 2 * pairs)
        found.append(reports)
    return [(reports["a"], reports["b"]) for reports in found]
