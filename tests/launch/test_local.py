"""Jobs as ranks of this machine, in the background or in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hpc_ddpm.errors import ClusterError
from hpc_ddpm.runlog import read_metrics
from launch.executor import Request, _visible_gpus, submit
from launch.jobs import _export_local_ranks
from launch.profiles import load_profile
from launch.watch import live_job
from tests.conftest import TINY, rank_environment

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_local_ranks_in_the_background(cli: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--out", run, "--data", tiny_packed, *TINY]
    submitted = cli("submit", "train", "--cluster", "local", *words)
    assert submitted.returncode == 0, submitted.stderr
    job = live_job(run)
    assert job is not None
    assert f"job {job} is queued or runs already" in cli("submit", "train", *words).stderr
    assert cli("jobs", "wait", run).returncode == 0, cli("jobs", "logs", run).stdout
    facts = json.loads(cli("jobs", "show", run, "--json").stdout)
    assert (facts["state"], facts["ranks"], facts["progress"]["done"]) == ("COMPLETED", 2, 6)
    assert "rank 1 of 2" in cli("jobs", "logs", run, "--rank", "1").stdout
    assert len(list(read_metrics(run))) == 6
    assert "all of job" in cli("jobs", "retry", run).stderr
    assert json.loads((run / "provenance.json").read_text())["git_commit"] == facts["commit"]


@pytest.mark.parametrize(
    ("given", "ranks", "seen"), [("2,3", 1, "2"), ("GPU-a,GPU-b", 2, "GPU-a,GPU-b"), ("", 2, ""), ("-1", 2, "-1")]
)
def test_local_ranks_see_the_gpus_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, ranks: int, seen: str
) -> None:
    """Named in the shell or in the profile, which wins; submitit's own count starts at 0."""
    for in_profile in (False, True):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7" if in_profile else given)
        own = {"CUDA_VISIBLE_DEVICES": given} if in_profile else {}
        profile = load_profile("local").model_copy(update={"environment": own})
        variables = _visible_gpus(Request("train", (), tmp_path, profile, ranks_per_node=ranks))
        submitits = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
        with monkeypatch.context() as inside:
            for name, value in {**submitits, **variables}.items():
                inside.setenv(name, value)
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
                inside.setenv(name, "")  # put back at the end
            _export_local_ranks()
            assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_fewer_gpus_than_local_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("HPC_DDPM_DEVICE", raising=False)
    request = Request("train", ("train",), tmp_path / "run", load_profile("local"), ranks_per_node=2)
    with pytest.raises(ClusterError, match="2 GPUs are asked for, but CUDA_VISIBLE_DEVICES=3 names 1"):
        submit(request)


@pytest.mark.slow
def test_local_ranks_outlive_the_terminal(tiny_packed: Path, tmp_path: Path) -> None:
    """Ctrl-C and a closed terminal reach whatever was started there."""
    run = tmp_path / "run"
    words = ["--out", run, "--data", tiny_packed, *TINY, "training.num_steps=100000"]
    command = [sys.executable, "-m", "launch.cli", "submit", "train", "--gpus-per-node", "1", *map(str, words)]
    env = rank_environment() | {"CUDA_VISIBLE_DEVICES": "2,3"}
    terminal = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, text=True)
    said = terminal.communicate(timeout=100)[0]
    job = int(said.split("job ")[1].split(":")[0])
    try:
        assert os.getsid(job) != terminal.pid
        for number in (signal.SIGHUP, signal.SIGINT):
            with suppress(ProcessLookupError):  # as it should be: nothing of this job is left there
                os.killpg(terminal.pid, number)
        while not any(read_metrics(run)):
            assert live_job(run), (run / "jobs" / f"{job}_0_log.out").read_text()
            time.sleep(0.05)
    finally:
        os.kill(job, signal.SIGTERM)
    while live_job(run):
        time.sleep(0.05)
    log = (run / "jobs" / f"{job}_0_log.out").read_text()
    assert "CUDA_VISIBLE_DEVICES 2\n" in log
    assert "stopped by SIGTERM at step" in log


@pytest.mark.slow
def test_a_cancelled_local_training_has_saved(cli: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--out", run, "--data", tiny_packed, *TINY, "training.num_steps=100000"]
    assert cli("submit", "train", "--gpus-per-node", "1", *words).returncode == 0
    while not any(read_metrics(run)):
        assert live_job(run), cli("jobs", "logs", run).stdout
    assert cli("jobs", "cancel", run).returncode == 0
    assert cli("jobs", "wait", run).returncode == 2
    assert "stopped by SIGTERM at step" in cli("jobs", "logs", run).stdout
    assert "CANCELLED" in cli("jobs", "ls", tmp_path).stdout
    assert list((run / "checkpoints").iterdir())


def test_debug_runs_in_this_process(cli: Cli, tmp_path: Path) -> None:
    done = cli("submit", "train", "--cluster", "debug", "--out", tmp_path / "run", *TINY)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no data: give --data PACKED" in done.stderr
    assert "no job was submitted for it" in cli("jobs", "show", tmp_path).stderr
    assert not any(tmp_path.iterdir())
