"""One process at a time: the second is refused by name, and takes over from the dead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.errors import ClusterError
from hpc_ddpm.workers import claims, owner
from hpc_ddpm.workers.owner import Owner, this_process
from hpc_ddpm.workers.sole import UNIT, sole_owner
from tests.conftest import Stranger

Strangers = Callable[..., Stranger]
TRIES = int(os.environ.get("HPC_DDPM_SOLE_TRIES", "40"))
"""Tries of each of four processes."""


def refuse(holder: str) -> str:
    return f"{holder} has it"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".train"


@pytest.fixture
def holder(state: Path, stranger: Strangers) -> Stranger:
    """A process of another machine that holds the folder."""
    other = stranger(state)
    other.link.rename(other.link.with_name(UNIT))
    return other


def test_the_second_is_refused_and_nothing_is_left(state: Path) -> None:
    with sole_owner(state, "train", refuse) as first:
        pid = this_process("").pid
        with (
            pytest.raises(ClusterError, match=f"process {pid} on .*, for 0 min has it"),
            sole_owner(state, "p", refuse),
        ):
            pass
        first.check()
    assert not state.exists() and state.parent.is_dir()
    with pytest.raises(ZeroDivisionError), sole_owner(state, "train", refuse):
        _ = 1 / 0
    assert not state.exists()


def test_a_holder_elsewhere_is_named_once_it_is_heard(state: Path, stranger: Strangers) -> None:
    other, said = stranger(state, beat_s=1e9), list[str]()
    other.link.rename(other.link.with_name(UNIT))

    def hear(line: str) -> None:
        said.append(line)
        other.beat()

    refused = pytest.raises(ClusterError, match=r"process 5 on n7 \(SLURM job 42\), for 0 min has it")
    with refused, sole_owner(state, "train", refuse, hear):
        pass
    assert said == [f"{state.parent}: is process 5 on n7 (SLURM job 42) still at work? Waiting 60 s at most"]


def test_the_dead_are_followed(state: Path, holder: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    holder.die()
    monkeypatch.setattr(owner, "LEASE_S", 0.2)
    with sole_owner(state, "train", refuse) as sole:
        sole.check()
    assert not state.exists()


def test_who_died_on_this_machine_is_followed_at_once(
    state: Path, holder: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    Owner(**(this_process("train").__dict__ | {"started": "0"})).write(holder.folder)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with sole_owner(state, "train", refuse) as sole:
        sole.check()


def test_who_was_taken_for_dead_hears_of_it(state: Path) -> None:
    with sole_owner(state, "train", refuse) as first:
        shutil.rmtree(state)  # as the others do
        with sole_owner(state, "train", refuse):
            with pytest.raises(ClusterError, match=r"process \d+ on .* has it"):
                first.check()
            first.check_quickly()  # before its next heartbeat it does not know
            first._writer.lost.add(UNIT)
            with pytest.raises(ClusterError, match=r"process \d+ on .* has it"):
                first.check_quickly()


def test_a_folder_that_was_moved_away_does_not_come_back(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is its loss blamed on others."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    with sole_owner(state, "train", refuse) as sole:
        state.parent.rename(state.parent.with_name("elsewhere"))
        deadline = time.monotonic() + 20
        while UNIT not in sole._writer.lost and time.monotonic() < deadline:
            time.sleep(0.02)
        sole.check_quickly()
        sole.check()
    assert not state.parent.exists()


RIVAL = """
    import os, random, sys, time
    from pathlib import Path
    from hpc_ddpm.errors import ClusterError
    from hpc_ddpm.workers.sole import sole_owner

    run, number, tries = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance, held = random.Random(number), 0
    for _ in range(tries):
        try:
            with sole_owner(run / ".train", "train", str) as sole:
                inside = os.open(run / "inside", os.O_CREAT | os.O_EXCL)  # fails if another is inside
                time.sleep(chance.uniform(0, 0.005))
                sole.check()
                os.close(inside)
                (run / "inside").unlink()
                held += 1
        except ClusterError:
            time.sleep(chance.uniform(0, 0.005))
    print(held)
"""


def test_of_many_who_come_and_go_one_is_inside(state: Path) -> None:
    """Each clears away what it finds at its end, while others join."""
    state.parent.mkdir()
    script = textwrap.dedent(RIVAL)
    command = [sys.executable, "-c", script, state.parent]
    rivals = [
        subprocess.Popen([*command, str(number), str(TRIES)], stdout=subprocess.PIPE, text=True) for number in range(4)
    ]
    held = [int(rival.communicate(timeout=100)[0] or -1) for rival in rivals]
    assert min(held) >= 0 and sum(held) > 10
    assert list(state.parent.iterdir()) == []
