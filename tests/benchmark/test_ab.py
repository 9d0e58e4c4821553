"""`hpc-ddpm bench ab`: which runs are started, in which order, from which code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import trials
from launch.cli import main
from launch.trials import HERE, Trial, checkout, run_trial
from tests.benchmark.test_compare import run
from tests.conftest import TINY


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of `hpc-ddpm bench ab ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hpc-ddpm", "bench", "ab", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_turns_and_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Trial] = []

    def instead(trial: Trial, path: Path, device: str) -> dict[str, Any]:
        """A machine that gets slower all the time, and B slower than A."""
        started.append(trial)
        return dict(run(len(started) * (1.2 if "model.dropout=0.1" in trial.arguments else 1.0), seed=len(started)))

    monkeypatch.setattr(trials, "run_trial", instead)
    monkeypatch.chdir(tmp_path)
    arguments = ["model.dropout=0", "--set", "model.dropout=0.1", "--pairs", "8", "-q", "--fail-if-slower", "5%"]
    assert command(monkeypatch, *arguments) == 2
    assert "B is slower" in capsys.readouterr().out
    is_b = ["model.dropout=0.1" in trial.arguments for trial in started]
    assert is_b == [False, True, True, False] * 4
    assert command(monkeypatch, *arguments[:-1], "50%") == 0


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch) == 2
    assert "A and B are the same" in capsys.readouterr().err
    assert command(monkeypatch, "--against", "no-such-branch", "-q") == 2
    assert "--against no-such-branch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_runs_from_the_other_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    if not (HERE / ".git").exists():
        pytest.skip("the code under test is in no git checkout")
    with checkout("HEAD") as code:
        assert code != HERE
        (code / "hpc_ddpm" / "runlog.py").write_text((code / "hpc_ddpm" / "runlog.py").read_text() + "\n")
        report = run_trial(Trial("train", (*TINY, "--repeats", "2"), code=code), tmp_path / "a.json", "cpu")
        assert report["environment"]["git_commit"] == f"{git('rev-parse', 'HEAD')}+changes"
    assert not code.exists()
    assert str(code) not in git("worktree", "list")
