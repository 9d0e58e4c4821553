"""Setting up the development cluster; tests/slurm uses it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")
def test_packages_wait_for_whoever_holds_the_lock_of_apt(tmp_path: Path) -> None:
    """As on a machine that updates itself after its start; apt with folders of its own, and no sources."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (tmp_path / folder).mkdir(parents=True)
    places = {"Dir::State::Lists": tmp_path / "lists", "Dir::Cache": tmp_path / "cache"}
    places |= {"Dir::Etc::SourceList": Path("/dev/null"), "Dir::Etc::SourceParts": Path("/dev/null")}
    (tmp_path / "apt.conf").write_text("".join(f'{name} "{place}";\n' for name, place in places.items()))
    env = os.environ | {"APT_CONFIG": str(tmp_path / "apt.conf")}
    command = [REPOSITORY / "slurm" / "devcluster" / "apt.sh", "update", "-qq"]
    with (tmp_path / "lists" / "lock").open("w") as lock, (tmp_path / "log").open("w") as log:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        refused = subprocess.run(command, env=env | {"APT_WAIT_S": "0"}, capture_output=True, text=True)
        assert refused.returncode != 0
        assert "Could not get lock" in refused.stdout
        waiting = subprocess.Popen(command, env=env, stdout=log)
        while "Could not get lock" not in (tmp_path / "log").read_text():
            assert waiting.poll() is None
            time.sleep(0.05)
        fcntl.lockf(lock, fcntl.LOCK_UN)
        assert waiting.wait(timeout=120) == 0
