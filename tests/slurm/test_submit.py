"""`hpc-ddpm submit` and `jobs` on the cluster: preemption, lost ranks and tasks, and what SLURM refuses."""

import json
from pathlib import Path

import pytest

from hpc_ddpm.runlog import read_metrics
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import ROUNDING, STEPS, files, losses

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PROFILE = ["--cluster", "devcluster"]


def submitted(cluster: Cluster, *words: str | Path) -> str:
    """The job's id."""
    return cluster.run("hpc-ddpm", "submit", *words).split("job ", 1)[1].split(":")[0]


def shown(cluster: Cluster, run: Path) -> dict:
    return json.loads(cluster.run("hpc-ddpm", "jobs", "show", run, "--json"))


def test_a_preempted_training_requeues_itself(cluster: Cluster, alone: Path, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster.up("--no-user-signal")
    words = ["--out", run, "--data", tiny_packed, *STEPS, "training.zero_stage=2"]
    job = submitted(cluster, "train", *PROFILE, "--partition", "scavenge", "--nodes", "2", *words)
    wait_for(lambda: len(losses(run)) >= 3, lambda: str(shown(cluster, run)))
    refused = cluster.attempt("hpc-ddpm", "submit", "train", *PROFILE, "--nodes", "2", *words)
    assert f"job {job} is queued or runs already" in refused.stderr
    cluster.run("scancel", "--signal=STOP", job)  # so that it does not finish before it is preempted
    first = cluster.sbatch("-N4", "--exclusive", "--wrap=true", cwd=tmp_path)
    wait_for(lambda: cluster.job(job)["PreemptTime"] != "None", lambda: str(cluster.job(job)))
    cluster.run("scancel", "--signal=CONT", job)
    said = cluster.attempt("hpc-ddpm", "jobs", "logs", "-f", run)
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", run).returncode == 0, said.stdout
    assert "stopped by SIGTERM, requeued after 0 restarts" in said.stdout
    assert "trained to step 16 (went on from step" in said.stdout
    assert losses(run) == pytest.approx(losses(alone), rel=ROUNDING)
    facts = shown(cluster, run)
    assert (facts["state"], facts["restarts"], facts["ranks"]) == ("COMPLETED", 1, 4)
    cluster.wait(first, tmp_path)


def test_a_killed_rank_brings_the_job_back(cluster: Cluster, alone: Path, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = ["training.checkpoint_every_steps=4", "training.async_checkpoints=false"]
    words = ["--out", run, "--data", tiny_packed, *STEPS, *often]
    job = submitted(cluster, "train", *PROFILE, *words)
    wait_for(lambda: (run / "checkpoints" / "step_00000004").exists(), lambda: str(shown(cluster, run)))
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", run).returncode == 0, cluster.run(
        "hpc-ddpm", "jobs", "logs", run
    )
    assert losses(run) == pytest.approx(losses(alone), rel=ROUNDING)
    ends = [event for event in shown(cluster, run)["tasks"][job]["events"] if event["event"] == "end"]
    assert [end["code"] for end in ends] == [137, 0]


def test_lost_tasks_of_an_array_are_retried(
    cluster: Cluster, alone: Path, sampled_alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [alone, "--out", out, "sampling.replicas=2"]
    job = submitted(cluster, "sample", *PROFILE, "--tasks", "8", *words)
    cluster.run("scancel", f"{job}_0", f"{job}_7")
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", out).returncode == 2
    tasks = shown(cluster, out)["tasks"]
    assert [task for task in tasks if tasks[task]["state"] == "CANCELLED"] == [f"{job}_0", f"{job}_7"]
    said = cluster.run("hpc-ddpm", "jobs", "retry", out)
    assert f"for {job}_0, {job}_7: 2 tasks" in said
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", out).returncode == 0
    assert files(out, "t1/*.nii.gz") == sampled_alone
    assert "4/4 volumes" in cluster.run("hpc-ddpm", "jobs", "ls", tmp_path)


def test_longer_arrays_than_the_cluster_has(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    words = [alone, "--out", tmp_path / "out"]
    done = cluster.attempt("hpc-ddpm", "submit", "sample", "--dry-run", *PROFILE, "--tasks", "20", *words)
    assert "#SBATCH --array=0-9%4" in done.stdout
    assert "#SBATCH --ntasks-per-node=2" in done.stdout
    assert "10 tasks of 2 rather than 20" in done.stderr


def test_refusals_are_one_line(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster.run("scontrol", "update", "PartitionName=scavenge", "AllowAccounts=others")
    words = ["--out", run, "--data", tiny_packed, *STEPS]
    for options, part in [
        (["--partition", "none"], "SLURM refuses the job: Invalid partition name specified (asked for: partition none"),
        (["--gpus-per-node", "4"], "Requested node configuration is not available"),
        (
            ["--partition", "scavenge", "--account", "mine"],
            "Invalid account or account/partition combination specified",
        ),
    ]:
        done = cluster.attempt("hpc-ddpm", "submit", "train", *PROFILE, *words, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert part in done.stderr
    cluster.run("scontrol", "update", "PartitionName=scavenge", "AllowAccounts=ALL")
    assert not list(run.glob("jobs/*.pkl"))
    assert not any(read_metrics(run))


def test_the_doctor_knows_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("partition: scavenge\ngpus_per_node: 8\n")
    done = cluster.attempt("hpc-ddpm", "doctor", "--cluster", profile, "--path", tmp_path, "--json")
    assert done.returncode == 2
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["profile"]["found"] == "scavenge has 2 GPUs per node, 8 asked"
    assert found["arrays"]["found"].startswith("11 tasks")
    for check in ("slurm", "requeue", "preemption", "accounting"):
        assert found[check]["status"] == "pass"
