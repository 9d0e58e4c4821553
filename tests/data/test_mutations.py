"""Thousands of damaged inputs for every reader: see `mutations.py`. HPC_DDPM_MUTATIONS sets how many."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import READERS, mutate

from hpc_ddpm.data.table import read_table
from hpc_ddpm.errors import DataFormatError

SCRIPT = Path(__file__).with_name("mutations.py")
IN_CI = 2000


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_no_traceback_no_hang_no_more_memory_than_the_file_can_claim(reader: str) -> None:
    count = int(os.environ.get("HPC_DDPM_MUTATIONS", IN_CI))
    command = [sys.executable, str(SCRIPT), reader, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'refused': " in done.stdout


def test_mutations_can_be_made_again() -> None:
    sound = bytes(range(256)) * 4
    made = {mutate(sound, 100, random.Random(f"x {number}")) for number in range(100)}
    assert made == {mutate(sound, 100, random.Random(f"x {number}")) for number in range(100)}
    assert len(made) > 90


def test_a_table_without_bottom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(DataFormatError, match=r"t\.json: not a readable table"):
        read_table(tmp_path / "t.json", ("t1",))
