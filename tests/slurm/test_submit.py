"""`hpc-ddpm submit` and `jobs` on the cluster: preemption, lost ranks and tasks, and what SLURM refuses."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.slurm.cluster import Cluster, read_logs, wait_for
from tests.slurm.runs import STEPS, files, losses, shown, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PROFILE = ["--cluster", "devcluster"]


def test_a_newcomers_four_lines(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    """docs/cluster.md after its first two lines, which install: from a login shell, one after the other."""
    login = ["env", "-i", f"HOME={tmp_path}", *(f"{name}={cluster.env[name]}" for name in ("PATH", "SLURM_CONF"))]
    source, here = tiny_packed.parent / "source", {"cwd": tmp_path}
    words = ["hpc-ddpm", "submit", "pack", source, "--out", "packed", *PROFILE, *TINY]
    assert "submitted job" in cluster.run(*login, *words, **here)
    words = ["hpc-ddpm", "submit", "train", "--data", "packed", "--out", "runs/one", *PROFILE, "--gpus-per-node", "1"]
    done = cluster.attempt(*login, *words, *TINY, **here)
    assert (done.returncode, "which packs packed, has ended well" in done.stderr) == (0, True), done.stderr
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", "runs/one", **here).returncode == 0
    assert "6/6 steps" in cluster.run(*login, "hpc-ddpm", "jobs", "ls", **here)


def test_one_job_per_run_until_it_is_cancelled(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *PROFILE, "--gpus-per-node", "1", "--out", run, "--data", tiny_packed, *STEPS]
    job = submitted(cluster, *words, "training.num_steps=100000")
    refused = cluster.attempt("hpc-ddpm", "submit", *words, "training.num_steps=100000")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"job {job} is queued or runs already" in refused.stderr
    wait_for(lambda: bool(losses(run)), lambda: str(shown(cluster, run)))
    assert cluster.run("hpc-ddpm", "jobs", "cancel", run) == f"cancelled job {job}\n"
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", run).returncode == 2
    facts = shown(cluster, run)
    assert (facts["state"], facts["restarts"]) == ("CANCELLED", 0)


def test_the_drill_passes(cluster: Cluster, tmp_path: Path) -> None:
    """A signal, a killed rank, a NaN, a torn checkpoint, another number of ranks."""
    out = tmp_path / "drill"
    done = cluster.attempt("hpc-ddpm", "drill", *PROFILE, "--out", out, "--json", timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads((out / "drill.json").read_text())["trials"]
    assert json.loads(done.stdout) == verdicts
    found = {verdict["trial"]: verdict["found"] for verdict in verdicts}
    assert len(found) == 6
    assert "exit codes [137, 0]" in found["killed rank"]
    assert "steps [6] skipped" in found["NaN"]
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
    assert [line.split(": ")[1] for line in said.splitlines()[:4]] == ["pack", "train", "sample", "report"]
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", out).returncode == 0, cluster.run("hpc-ddpm", "jobs", "ls", out)
    page = (out / "report.html").read_text()
    assert "Training loss" in page
    assert page.count("data:image/png;base64,") > 3
    assert "all there, as they were written" in page
    assert "queued 0:00:" in page
    assert (out / "synthetic" / "gallery.html").stat().st_size > 1000
    rows = json.loads(cluster.run("hpc-ddpm", "jobs", "ls", out, "--json"))
    assert {row["kind"] for row in rows} == {"pack", "train", "sample", "report"}
    assert {state for row in rows for state in row["state"].split() if state.isupper()} == {"COMPLETED"}


def test_a_benchmark_as_a_job(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    words = ["train", "--out", tmp_path, "--data", tiny_packed, "--repeats", "2", *TINY]
    submitted(cluster, "bench", *PROFILE, "--gpus-per-node", "2", *words)
    assert cluster.attempt("hpc-ddpm", "jobs", "wait", tmp_path).returncode == 0, read_logs(tmp_path / "jobs")
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert row["world_size"] == 2
    assert "world size" in (tmp_path / "train.md").read_text()


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
