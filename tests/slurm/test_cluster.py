"""The development cluster is a real one, with what the other tests rely on."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import DEVCLUSTER, Cluster, read_logs, wait_for

pytestmark = pytest.mark.slurm


def test_four_nodes_with_two_gpus_each(cluster: Cluster) -> None:
    show = 'echo "$SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"'
    for option, seen in (("--gpus-per-task=1", ("0", "1")), ("--gpus-per-node=2", ("0,1", "0,1"))):
        said = cluster.run("srun", "-N4", "--ntasks-per-node=2", option, "bash", "-c", show)
        assert sorted(said.splitlines()) == [f"{rank} n{rank // 2 + 1} {seen[rank % 2]}" for rank in range(8)]


def test_more_gpus_or_tasks_than_there_are_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    for options, reason in [
        (["--gpus-per-node=3"], "node configuration is not available"),
        (["--array=0-11"], "Invalid job array specification"),
        (["--partition=none"], "invalid partition specified"),
    ]:
        done = cluster.attempt("sbatch", *options, "--wrap=true", cwd=tmp_path)
        assert done.returncode == 1
        assert reason in done.stderr


def test_accounting_answers(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--wrap=exit 3", cwd=tmp_path)
    ask = ["sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", job]
    wait_for(lambda: cluster.run(*ask) == "FAILED|3:0\n", lambda: cluster.run(*ask))


HEEDLESS = """#!/bin/bash
#SBATCH --partition=scavenge --open-mode=append --output=out.log
srun bash -c 'trap "echo warned" TERM; echo start $SLURM_RESTART_COUNT; while true; do sleep 0.1; done'
"""


def test_preemption_warns_and_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """What does not heed the signal is killed after the grace time, and comes back."""
    cluster.run("scontrol", "update", "PartitionName=scavenge", "GraceTime=2")
    (tmp_path / "job.sh").write_text(HEEDLESS)
    job = cluster.sbatch("job.sh", cwd=tmp_path)
    wait_for(lambda: "start" in read_logs(tmp_path), lambda: str(cluster.job(job)), timeout_s=30)
    first = cluster.sbatch("-N4", "--exclusive", "--wrap=true", cwd=tmp_path)
    wait_for(lambda: "start 1" in read_logs(tmp_path), lambda: str(cluster.job(job)), timeout_s=60)
    assert "warned" in read_logs(tmp_path)
    cluster.wait(first, tmp_path)
    cluster.run("scancel", job)
    cluster.wait(job, tmp_path, "CANCELLED")
    cluster.run("scontrol", "update", "PartitionName=scavenge", "GraceTime=30")


def test_up_again_starts_what_was_killed(cluster: Cluster) -> None:
    status = [DEVCLUSTER / "status.sh"]
    for name in ("slurmctld", "n2", "munged"):
        subprocess.run(["kill", "-9", (cluster.folder / "run" / f"{name}.pid").read_text().strip()], check=True)
    wait_for(lambda: cluster.attempt(*status).stdout.count("does not run") == 3, lambda: "they live")
    cluster.up()
    assert "does not run" not in cluster.run(*status)
    assert cluster.run("srun", "-N4", "hostname").count("\n") == 4
