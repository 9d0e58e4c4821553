"""Batch templates, with a srun of a few lines; tests/slurm runs them on a real cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SRUN = """#!/bin/bash
set -m  # a process group for each rank
while [[ $1 == --* ]]; do shift; done
pids=()
for SLURM_PROCID in 0 1; do SLURM_PROCID=$SLURM_PROCID "$@" & pids+=($!); done
highest=0
for _ in 0 1; do  # as --kill-on-bad-exit does
  code=0
  wait -n || code=$?
  ((code == 0)) || kill -TERM -- "${pids[@]/#/-}" 2>/dev/null
  ((code <= highest)) || highest=$code
done
exit $highest
"""
TRAIN = """#!/usr/bin/env python3
import os, signal, sys, time
code = int(os.environ["CODES"].split()[int(os.environ["SLURM_PROCID"])])
signal.signal(signal.SIGTERM, (lambda number, frame: sys.exit(143)) if code == 143 else signal.SIG_IGN)
time.sleep(10 if code == 143 else 0.5)
sys.exit(code)
"""


@pytest.mark.parametrize(("codes", "ends_with", "comes_back"), [("2 143", 2, False), ("138 138", 138, True)])
def test_a_mistake_of_one_rank_is_not_requeued(tmp_path: Path, codes: str, ends_with: int, comes_back: bool) -> None:
    stubs = {"srun": SRUN, "hpc-ddpm": TRAIN, "scontrol": "#!/bin/sh\necho did $*\n"}
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CODES": codes}
    script = REPOSITORY / "slurm" / "train.sbatch"
    done = subprocess.run(["bash", script, "--out", "a b"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "did requeue 7" in done.stdout) == (ends_with, comes_back), done.stderr
    assert not list(tmp_path.glob(".failed-*"))
