"""Progress: a bar in a terminal, plain lines in a log, told once."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import progress
from launch.progress import progress_bar, tell_steps
from tests.conftest import REPOSITORY, TINY

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the monotonic clock says, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_a_log_gets_a_line_about_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """With step, loss, rate and time left, also where steps are logged more rarely than that."""
    with progress_bar("training", show=True, unit="steps") as update:
        tell = tell_steps(update, 1000)
        for step in range(11, 111):
            clock[0] += 4
            tell(step, {})
            if step % 50 == 0:
                for row in range(step - 49, step):
                    tell(row, {"loss": 9.0})
                tell(step, {"loss": 0.25, "volumes_per_s": 8.0})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "training: 11/1000 steps"
    assert len(lines) == 12
    assert lines[0] == "training: 19/1000 steps, 0.25 steps/s, 1:05:24 left"
    assert lines[-1] == "training: 107/1000 steps, loss 0.2500, 8.00 volumes/s, 0:59:32 left"


def test_the_end_is_told_once(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sampling", show=True, unit="volumes") as update:
        for done in (0, 1, 2, 2, 2):  # others finish what is left, and this one looks again and again
            clock[0] += 20
            update(done, 2, "")
    said = capsys.readouterr().err.splitlines()
    assert said == ["sampling: 0/2 volumes", "sampling: 2/2 volumes, 0.05 volumes/s, took 0:00:40"]
    with progress_bar("sampling", show=True) as update:
        update(2, 2, "")  # all was there
    assert capsys.readouterr().err == ""


def test_a_bar_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("sampling", show=True) as update:
        for done in (0, 1, 2, 2, 2):
            update(done, 2, "")
    drawn = sys.stderr.getvalue()
    assert "━" in drawn
    shows_the_cursor_again = "\x1b[?25h"
    assert drawn.count(shows_the_cursor_again) == 1


@pytest.mark.slow
def test_ranks_in_a_log(torchrun: Run, tiny_packed: Path, tmp_path: Path) -> None:
    words = ["-m", "launch.cli", "train", "--out", tmp_path / "run", "--data", tiny_packed, *TINY]
    done = torchrun(2, *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "training" in line]
    assert [line.split(",")[0] for line in lines] == ["training: 1/6 steps", "training: 6/6 steps"]
    assert all(", loss 0." in line and "volumes/s" in line for line in lines)
    assert "━" not in done.stderr and "\x1b" not in done.stderr


def test_jobs_are_not_silent() -> None:
    """A job's log is where people look for how it stands."""
    for script in (REPOSITORY / "slurm").glob("*.sbatch"):
        assert "--quiet" not in script.read_text()
