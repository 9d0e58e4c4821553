"""Batch templates, with a srun of a few lines; tests/slurm runs them on a real cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
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
  ((code != 127)) || break  # both have ended at once
  ((code == 0)) || kill -TERM -- "${pids[@]/#/-}" 2>/dev/null
  ((code <= highest)) || highest=$code
done
exit $highest
"""
TRAIN = """#!/usr/bin/env python3
import os, signal, sys, time
code = int(os.environ["CODES"].split()[int(os.environ["SLURM_PROCID"])])
print("asks srun for", os.environ.get("SLURM_GPUS_PER_NODE"))
signal.signal(signal.SIGTERM, (lambda number, frame: sys.exit(143)) if code == 143 else signal.SIG_IGN)
time.sleep(10 if code == 143 else 0.5)
sys.exit(code)
"""


def run_template(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`train.sbatch` as a job of two ranks."""
    stubs = {"srun": SRUN, "hpc-ddpm": TRAIN, "scontrol": "#!/bin/sh\necho did $*\n"}
    for name, text in stubs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | variables
    script = REPOSITORY / "slurm" / "train.sbatch"
    return subprocess.run(["bash", script, "--out", "a b"], env=env, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("codes", "ends_with", "comes_back"), [("2 143", 2, False), ("138 138", 138, True), ("75 75", 75, True)]
)
def test_a_mistake_of_one_rank_is_not_requeued(tmp_path: Path, codes: str, ends_with: int, comes_back: bool) -> None:
    done = run_template(tmp_path, CODES=codes)
    assert (done.returncode, "did requeue 7" in done.stdout) == (ends_with, comes_back), done.stderr
    assert not list(tmp_path.glob(".failed-*"))


def test_fewer_gpus_than_tasks_are_refused(tmp_path: Path) -> None:
    """SLURM takes --gres and --gpus-per-node together; the job then has one number, and srun obeys the other."""
    node = {"SLURM_NTASKS_PER_NODE": "2", "CODES": "0 0"}
    done = run_template(tmp_path, SLURM_GPUS_ON_NODE="1", **node)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "2 tasks per node, but 1 GPUs: give --gpus-per-node=2" in done.stderr
    done = run_template(tmp_path, SLURM_GPUS_ON_NODE="2", SLURM_GPUS_PER_NODE="1", **node)
    assert (done.returncode, done.stdout.count("asks srun for None")) == (0, 2)


def test_no_example_hides_gpus_from_ranks() -> None:
    """`--gpus-per-task` would, and with them NVLink; it is named in warnings only."""
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("slurm/*.sbatch")]
    lines = [line for page in pages for line in page.read_text().splitlines() if "--gpus-per-task" in line]
    assert not [line for line in lines if "srun -" in line or "sbatch -" in line or "#SBATCH" in line]


def test_the_wheel_writes_them_out(tmp_path: Path) -> None:
    """From the files that the wheel holds, without the checkout; what was changed is not replaced."""
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    for name in wheel["packages"]:
        shutil.copytree(REPOSITORY / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
        (site / target).parent.mkdir(exist_ok=True)
        copy(REPOSITORY / source, site / target)

    def write_out() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "launch.cli", "templates", "--out", "mine"]
        env = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    assert write_out().returncode == 0
    shipped = {path.name: path.read_bytes() for path in (REPOSITORY / "slurm").glob("*.sbatch")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == shipped
    assert write_out().returncode == 0  # nothing was changed
    (tmp_path / "mine" / "train.sbatch").write_text("mine")
    (tmp_path / "mine" / "pack_mpi.sbatch").unlink()
    refused = write_out()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "train.sbatch: there already, and not as shipped" in refused.stderr
    assert (tmp_path / "mine" / "train.sbatch").read_text() == "mine"
    assert not (tmp_path / "mine" / "pack_mpi.sbatch").exists()
