"""Pack, train and sample on the cluster, with srun and as the templates are shipped: the results of one process."""

import json
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.data.pack import pack
from tests.conftest import TINY
from tests.slurm.cluster import TEMPLATES, Cluster, read_logs, wait_for
from tests.slurm.runs import ROUNDING, STEPS, files, losses

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# -------------------------------------------------------------------------------------------------------- train


def test_train_template_where_the_site_sends_the_jobs_own_signal(
    cluster: Cluster, alone: Path, tiny_packed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cluster.up("--user-signal")
    resources = ["--partition=scavenge", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    words = ["--data", tiny_packed, "--out", run, *STEPS, "training.zero_stage=2"]
    job = cluster.sbatch(*resources, TEMPLATES / "train.sbatch", *words, cwd=tmp_path)
    wait_for(lambda: len(losses(run)) >= 3, lambda: f"{cluster.job(job)}: {read_logs(tmp_path)}")
    cluster.run("scancel", "--signal=STOP", job)  # so that it does not finish before it is preempted
    first = cluster.sbatch("-N4", "--exclusive", "--wrap=true", cwd=tmp_path)
    wait_for(lambda: cluster.job(job)["PreemptTime"] != "None", lambda: str(cluster.job(job)))
    cluster.run("scancel", "--signal=CONT", job)
    cluster.wait(job, tmp_path)
    cluster.wait(first, tmp_path)
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped by SIGUSR1 at step" in read_logs(tmp_path)
    assert "trained to step 40 (went on from step" in read_logs(tmp_path)
    assert losses(run) == pytest.approx(losses(alone), rel=ROUNDING)


def test_train_template_comes_back_no_more_often_than_allowed(
    cluster: Cluster, tiny_packed: Path, tmp_path: Path
) -> None:
    run, words = tmp_path / "run", ["--export=ALL,MAX_REQUEUES=0", "--cpus-per-task=1"]
    settings = ["--data", tiny_packed, "--out", run, *STEPS, "training.num_steps=100000"]
    job = cluster.sbatch(*words, TEMPLATES / "train.sbatch", *settings, cwd=tmp_path)
    wait_for(lambda: losses(run), lambda: f"{cluster.job(job)}: {read_logs(tmp_path)}")
    cluster.run("scancel", "--signal=USR2", job)
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", lambda: str(cluster.job(job)))
    assert "stopped by SIGUSR2 at step" in read_logs(tmp_path)
    assert cluster.job(job)["Restarts"] == "0" and "requeued" not in read_logs(tmp_path)


def test_scaling_template(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    words = [tmp_path / "out", "--data", tiny_packed, "--engines", "1", "--rounds", "1", "--repeats", "2", *TINY]
    resources = ["--nodes=2", "--cpus-per-task=1"]
    job = cluster.sbatch(*resources, TEMPLATES / "bench_scaling.sbatch", *words, cwd=tmp_path)
    cluster.wait(job, tmp_path)
    rows = json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"]
    assert [(row["gpus"], row["nodes"]) for row in rows if row["kind"] == "measured"] == [(1, 1), (2, 2)]


def test_what_a_shell_exports_does_not_make_two_trainings(cluster: Cluster, tiny_packed: Path, tmp_path: Path) -> None:
    """Two tasks that would each take itself for rank 0 of 1."""
    exported = ["env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=29500"]
    words = ["hpc-ddpm", "train", "--data", tiny_packed, "--out", tmp_path / "run", "-q", *STEPS]
    done = cluster.attempt("srun", "-n2", *exported, *words)
    assert done.returncode == 2
    said = "RANK=0 and WORLD_SIZE=1 set, but srun started this as rank 1 of 2; `unset RANK WORLD_SIZE"
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- pack


@pytest.fixture(scope="module")
def packed_alone(tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """Arguments of a packing into several shards, and what one process makes of them."""
    settings = ["data.size=[16,16,16]", "data.labels.names={1: head, 2: tumour}", f"data.shard_size_gib={2e-5}"]
    source, out = tiny_packed.parent / "source", tmp_path_factory.mktemp("packed") / "out"
    pack(source, out, load_config(None, settings).config.data)
    assert len(files(out)) > 3
    return [str(source), *settings], files(out)


def test_pack_under_srun(cluster: Cluster, packed_alone: tuple[list[str], dict[str, bytes]], tmp_path: Path) -> None:
    words, expected = packed_alone
    said = cluster.run("srun", "-N2", "-n4", "hpc-ddpm", "pack", *words, "--out", tmp_path / "out", "-q")
    assert said.count("packed 10 subjects") == 1
    assert files(tmp_path / "out") == expected


def test_pack_as_an_array(cluster: Cluster, packed_alone: tuple[list[str], dict[str, bytes]], tmp_path: Path) -> None:
    words, expected = packed_alone
    script = 'exec srun hpc-ddpm pack --workers 1 -q "$@"'
    (tmp_path / "pack.sh").write_text(f"#!/bin/bash\n{script}\n")
    job = cluster.sbatch("--array=3-5", "pack.sh", *words, "--out", tmp_path / "out", cwd=tmp_path)
    cluster.wait(job, tmp_path)
    assert "packed 10 subjects" in read_logs(tmp_path)
    assert files(tmp_path / "out") == expected


def test_pack_template(cluster: Cluster, packed_alone: tuple[list[str], dict[str, bytes]], tmp_path: Path) -> None:
    words, expected = packed_alone
    resources = ["--nodes=2", "--ntasks-per-node=2"]
    job = cluster.sbatch(*resources, TEMPLATES / "pack_mpi.sbatch", *words, "--out", tmp_path / "out", cwd=tmp_path)
    cluster.wait(job, tmp_path)
    assert read_logs(tmp_path).count("packed 10 subjects") == 1
    assert files(tmp_path / "out") == expected


def test_a_mistake_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    resources = ["--nodes=2", "--ntasks-per-node=1"]
    job = cluster.sbatch(*resources, TEMPLATES / "pack_mpi.sbatch", "nowhere", "--out", tmp_path / "out", cwd=tmp_path)
    cluster.wait(job, tmp_path, "FAILED")
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("0", "2:0")
    assert "nowhere" in read_logs(tmp_path)


# ------------------------------------------------------------------------------------------------------- sample


def test_sample_template(cluster: Cluster, alone: Path, sampled_alone: dict[str, bytes], tmp_path: Path) -> None:
    words = [alone, "--out", tmp_path / "out", "sampling.replicas=2"]
    resources = ["--array=0-1", "--cpus-per-task=1"]
    job = cluster.sbatch(*resources, TEMPLATES / "sample_array.sbatch", *words, cwd=tmp_path)
    cluster.wait(job, tmp_path)
    assert files(tmp_path / "out", "t1/*.nii.gz") == sampled_alone
