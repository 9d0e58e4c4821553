"""`hpc-ddpm submit` and `jobs` on the cluster: preemption, lost ranks and tasks, and what SLURM refuses."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import TINY
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
    wait_for(lambda: bool(losses(run)), lambda: str(shown(cluster, run)))
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


def test_the_drill_passes(cluster: Cluster, tmp_path: Path) -> None:
    """A signal, a killed rank, a torn checkpoint, another number of ranks."""
    out = tmp_path / "drill"
    done = cluster.attempt("hpc-ddpm", "drill", *PROFILE, "--out", out, "--json", timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads((out / "drill.json").read_text())["trials"]
    assert json.loads(done.stdout) == verdicts
    found = {verdict["trial"]: verdict["found"] for verdict in verdicts}
    assert len(found) == 5
    assert "exit codes [137, 0]" in found["killed rank"]
    assert "is not empty" in cluster.attempt("hpc-ddpm", "drill", *PROFILE, "--out", out).stderr


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


def test_a_pipeline_from_volumes_to_pictures(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = cluster.run("hpc-ddpm", "submit", "pipeline", *PROFILE, tiny_packed.parent / "source", "--out", out, *TINY)
    assert [line.split(": ")[1] for line in said.splitlines()[:4]] == ["pack", "train", "sample", "gallery"]
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", out).returncode == 0, cluster.run("hpc-ddpm", "jobs", "ls", out)
    assert (out / "synthetic" / "gallery.html").stat().st_size > 1000
    rows = json.loads(cluster.run("hpc-ddpm", "jobs", "ls", out, "--json"))
    assert {row["kind"] for row in rows} == {"pack", "train", "sample", "gallery"}
    assert {state for row in rows for state in row["state"].split() if state.isupper()} == {"COMPLETED"}


def test_a_scaling_curve(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    """Points of 1, 2 and 4 ranks in one job of two nodes."""
    out = tmp_path / "out"
    words = ["--gpus", "1,2,4", "--engines", "ddp,1", "--rounds", "1", "--repeats", "2", "--data", tiny_packed, *TINY]
    said = cluster.run("hpc-ddpm", "bench", "scaling", *PROFILE, "--out", out, *words)
    assert "2 nodes x 2 GPUs" in said
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", out).returncode == 0, cluster.run(
        "hpc-ddpm", "jobs", "logs", out
    )
    report = json.loads((out / "scaling.json").read_text())
    rows = {(row["contestant"], row["gpus"]): row for row in report["rows"] if row["kind"] != "collective"}
    assert {key for key, row in rows.items() if row["kind"] == "measured"} == {
        (name, count) for name in ("ddp", "zero1") for count in (1, 2, 4)
    }
    assert rows["zero1", 4]["efficiency_of_node"]["median"] > 0
    assert rows["ddp", 8]["kind"] == "predicted"
    assert "held_out_error" in rows["zero1", 4]
    assert any(note.startswith("OVERSUBSCRIBED") for note in report["settings"]["notes"]) == ((os.cpu_count() or 1) < 4)


def test_longer_arrays_than_the_cluster_has(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    words = [alone, "--out", tmp_path / "out"]
    done = cluster.attempt("hpc-ddpm", "submit", "sample", "--dry-run", *PROFILE, "--tasks", "20", *words)
    assert "#SBATCH --array=0-9%4" in done.stdout
    assert "#SBATCH --ntasks-per-node=2" in done.stdout
    assert "10 tasks of 2 rather than 20" in done.stderr


def test_refusals_are_one_line(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--out", run, "--data", tiny_packed, *STEPS]
    for options, part in [
        (["--partition", "none"], "SLURM refuses the job: Invalid partition name specified (asked for: partition none"),
        (
            ["--gpus-per-node", "4"],
            "Requested node configuration is not available (asked for: partition gpu, nodes 1, ",
        ),
        (["--time", "1"], "'1' is no time"),
    ]:
        done = cluster.attempt("hpc-ddpm", "submit", "train", *PROFILE, *words, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert part in done.stderr
    assert not list(run.glob("jobs/*.pkl"))


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
