"""A rank that hangs or dies ends the others in bounded time, each with the reason, and the run goes on afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.training.watchdog import Watchdog
from launch.after_job import find_stacks
from tests.distributed.test_kills import finish, start, stderr_of, wait_for_progress
from tests.forks import Fork

pytestmark = pytest.mark.slow


def test_a_hanging_rank_ends_the_others_with_the_reason(
    fork: Callable[..., Fork], tiny_packed: Path, tmp_path: Path
) -> None:
    """The stopped rank is ended as srun does it."""
    run = tmp_path / "run"
    processes = start(fork, run, tiny_packed, settings=["training.hang_timeout_s=8"])
    wait_for_progress(run, processes)
    processes[1].send_signal(signal.SIGSTOP)
    assert finish(run, processes) == [75, -signal.SIGKILL]
    said = stderr_of(run, 0).read_text()
    assert "hpc-ddpm: rank 0: nothing was done in the 8 s (training.hang_timeout_s) after step" in said
    stacks = (run / "stacks-of-rank-00000.txt").read_text()
    assert list(find_stacks(run)) == ["stacks-of-rank-00000.txt"]
    assert "in agreed" in stacks or "in backward" in stacks, stacks


def test_a_killed_rank_is_named_by_the_others(fork: Callable[..., Fork], tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start(fork, run, tiny_packed)
    wait_for_progress(run, processes)
    processes[1].kill()
    processes[1].wait()
    assert processes[0].wait(timeout=120) == 75
    (line,) = stderr_of(run, 0).read_text().splitlines()
    assert line.startswith("hpc-ddpm: another rank died or hangs (Connection ")
    assert not find_stacks(run)


RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from hpc_ddpm.training.watchdog import Watchdog

def hang(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sleep = ctypes.PyDLL(None).sleep if how == "locked" else time.sleep
    sleep(60 if how != "locked" else 6)

with Watchdog(Path(sys.argv[1]), 0, 1.0) as watchdog:
    watchdog.beat("step 1")
    hang(sys.argv[2])
"""
"""`locked` holds the interpreter's lock, so that no other thread of this process runs."""


def test_stacks_are_written_when_a_rank_hangs_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "no_folder").touch()
    places = {"killed": "killed", "waits": "waits", "locked": "locked", "lost disk": "no_folder"}
    ranks = {
        how: subprocess.Popen([sys.executable, "-c", RANK, tmp_path / place, how], stderr=subprocess.PIPE, text=True)
        for how, place in places.items()
    }
    said = {how: rank.communicate(timeout=60)[1] for how, rank in ranks.items()}
    assert {how: rank.returncode for how, rank in ranks.items() if how != "locked"} == {
        "killed": -signal.SIGKILL,
        "waits": 75,
        "lost disk": 75,
    }
    assert "in hang" in (tmp_path / "waits" / "stacks-of-rank-00000.txt").read_text()
    assert {how: "in hang" in text for how, text in said.items()} == {
        "killed": False,
        "waits": False,
        "locked": True,
        "lost disk": True,
    }
    assert not [path for path in tmp_path.rglob("stacks-*") if path.stat().st_size == 0]
    assert not (tmp_path / "killed").exists()
    with Watchdog(tmp_path / "waits", 0, 1000.0):  # the next start: what is there does not speak of it
        assert not find_stacks(tmp_path / "waits")
        assert (tmp_path / "waits" / "previous-stacks-of-rank-00000.txt").stat().st_size
