"""The disk fills up, or the run directory goes away, while two ranks train: one line, and every checkpoint is whole."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_ddpm.checkpoint import step_dirs, verify_checkpoint
from tests.distributed.test_kills import finish, start, stderr_of, wait_for_progress
from tests.forks import Fork

pytestmark = pytest.mark.slow


def told(run: Path) -> str:
    """By rank 0, in one line; rank 1 says nothing."""
    said = [stderr_of(run, rank).read_text() for rank in (0, 1)]
    assert [text.count("hpc-ddpm: ") for text in said] == [1, 0], said
    return said[0]


def test_a_full_disk(fork: Callable[..., Fork], tiny_packed: Path, tmp_path: Path) -> None:
    """Room for two checkpoints, of which the third is written beside them."""
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4600k", "none", run], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        assert finish(run, start(fork, run, tiny_packed)) == [2, 2]
        assert "No space left on device" in told(run)
        folders = step_dirs(run / "checkpoints")
        assert folders
        for folder in folders:
            verify_checkpoint(folder)
        assert not list(run.glob("checkpoints/*.tmp"))
    finally:
        subprocess.run(["umount", run], check=True)


def test_the_run_directory_goes_away(fork: Callable[..., Fork], tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start(fork, run, tiny_packed)
    wait_for_progress(run, processes)
    run.rename(tmp_path / "elsewhere")
    assert finish(run, processes) == [2, 2]
    assert "No such file or directory" in told(run)
    assert not run.exists()
    shutil.rmtree(tmp_path / "elsewhere")
