"""Profiles, the dry run, what comes back after an end, and jobs without SLURM."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config
from hpc_ddpm.distributed import LAUNCHED
from hpc_ddpm.errors import ClusterError
from hpc_ddpm.files import write_json
from hpc_ddpm.runlog import git_commit
from launch.executor import Request, _submit_slurm, batch_script, submit
from launch.jobs import StageJob
from launch.pipeline import _requests
from launch.profiles import load_profile
from launch.records import Submission
from launch.snapshot import take_snapshot
from tests.conftest import TINY, rank_environment

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def laptop(cli: Cli, tmp_path: Path) -> Cli:
    """`hpc-ddpm ARGUMENTS` where there is no SLURM."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return partial(cli, PATH=str(empty))


def test_a_dry_run_shows_script_and_request(laptop: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    resources = ["--cluster", "example_dgx", "--nodes", "4", "--time", "1-00:00:00"]
    words = ["--out", run, "--data", tiny_packed, *TINY, "training.global_batch=32"]
    done = laptop("submit", "train", "--dry-run", *resources, *words)
    assert done.returncode == 0, done.stderr
    script, _, rest = done.stdout.partition("command: ")
    wanted = {
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=h100:8",
        "cpus-per-task=14",
        "time=1-00:00:00",
        "partition=gpu",
        "account=my-project",
        "requeue",
        "open-mode=append",
        "signal=USR2@300",
        "reservation=my-course",
        "mem=1920G",
    }
    assert wanted <= {line.removeprefix("#SBATCH --") for line in script.splitlines()}
    for line in ("module load cuda/12.8", "export NCCL_SOCKET_IFNAME=ib0", "scontrol requeue $SLURM_JOB_ID", " -P -u "):
        assert line in script
    assert "4 nodes × 8 GPUs for at most 1-00:00:00 = 768 GPU-hours" in rest
    assert "GiB per GPU at the peak" in rest
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not run.exists()


def test_a_site_that_takes_gres_only(tmp_path: Path) -> None:
    """SLURM takes both options together without a word, and gives the smaller number."""
    sites = {"gres": "gres=gpu:a100:4,lscratch:100", "gpus-per-node": "gpus-per-node=a100:4"}
    for option, asked in sites.items():
        profile = load_profile("devcluster").model_copy(
            update={"gpu_option": option, "gpu_type": "a100", "sbatch": {"gres": "lscratch:100"}}
        )
        train = batch_script(Request("train", ("train",), tmp_path, profile, ranks_per_node=4))
        lines = [line.removeprefix("#SBATCH --") for line in train.splitlines() if "gpu:" in line or "gpus" in line]
        assert lines == [asked]
        assert "--gres=lscratch:100\n" in batch_script(Request("pack", ("pack",), tmp_path, profile))


def test_packing_asks_for_no_gpu_and_sampling_is_an_array(laptop: Cli, tmp_path: Path) -> None:
    common = ["--dry-run", "--cluster", "example_dgx", "--out", tmp_path / "out"]
    pack = laptop("submit", "pack", tmp_path, *common, "--nodes", "2").stdout
    assert "--partition=cpu" in pack
    assert "--mem=1920G" in pack
    assert "gpus" not in pack.partition("command:")[0]
    assert "request: 2 nodes without GPUs" in pack
    sample = laptop("submit", "sample", tmp_path, *common, "--tasks", "100", "--masks", tmp_path).stdout
    assert "#SBATCH --array=0-99%64" in sample
    assert "#SBATCH --gpus-per-node=h100:1" in sample
    assert "#SBATCH --mem=240G" in sample
    assert "100 tasks (64 at a time) × 1 node × 1 GPU for at most 2-00:00:00 = 4800 GPU-hours" in sample


def test_a_benchmark_is_one_job(laptop: Cli, tmp_path: Path) -> None:
    common = ["--dry-run", "--cluster", "example_dgx", "--out", tmp_path]
    two = ["--nodes", "2", *common]
    train = laptop("submit", "bench", "train", *two, "--config", "demo", "training.global_batch=16").stdout
    assert "#SBATCH --ntasks-per-node=8" in train
    assert f"--out {tmp_path}/train.md --json {tmp_path}/train.json --work {tmp_path}" in train
    assert "request: 2 nodes × 8 GPUs for" in laptop("submit", "bench", "comm", *two).stdout
    tune = laptop("submit", "bench", "tune", "--ranks", "4", *common).stdout
    assert f"--out {tmp_path}/tune.yaml" in tune
    wanted = {"ntasks-per-node=1", "gpus-per-node=h100:4", "cpus-per-task=56", "mem=960G", "nodes=1"}
    assert wanted <= {line.removeprefix("#SBATCH --") for line in tune.splitlines()}
    assert "request: 1 node × 4 GPUs for" in tune
    everything = laptop("submit", "bench", "all", *common).stdout
    assert f"--out {tmp_path}/all\n" in everything
    assert "request: 1 node × 8 GPUs for" in everything
    assert "request: 1 node × 1 GPU for" in laptop("submit", "bench", "gpu-check", *common).stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["report"], "'report' is no benchmark"),
        (["train"], "give submit bench train --out FOLDER"),
        (["all", "--nodes", "2", "--out", "out"], "--nodes 2: bench all runs on one node"),
        (["tune", "--gpus-per-node", "4", "--out", "out"], "bench tune uses 1 here; give --ranks 4 instead"),
        (["ab", "--ranks", "9", "--out", "out"], "--ranks 9: bench ab runs on one node, which has 8 GPUs"),
        (["comm", "--gpus-per-node", "1", "--out", "out"], "bench comm needs two ranks or more"),
        (["train", "-c", "nosuch", "--out", "out"], "no preset or file called 'nosuch'"),
        (["train", "--out", "out", "training.global_batch=12"], "12 is not a multiple of micro_batch x ranks"),
        (["data", "--data", "nosuch", "--out", "out"], "nosuch: nothing there"),
    ],
)
def test_a_benchmark_that_cannot_be_a_job(laptop: Cli, words: list[str], part: str) -> None:
    done = laptop("submit", "bench", "--dry-run", *words, "--cluster", "example_dgx")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--cluster", "devcluster"], "no `sbatch` on this machine"),
        (["--nodes", "0"], "--nodes: nodes=0"),
        (["--cluster", "nowhere"], "no cluster profile called 'nowhere'"),
        (["--gpus-per-node", "3"], "4 is not a multiple of micro_batch x ranks = 1 x 3"),
        (["--tasks", "2"], "--tasks: a training is one job"),
        (["training.zero_stag=1"], "did you mean 'training.zero_stage'"),
        (["data.fit=resize"], "packed with crop_pad, this run asks for resize"),
    ],
)
def test_mistakes_are_said_before_anything_is_queued(
    laptop: Cli, tiny_packed: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    done = laptop("submit", "train", "--out", tmp_path / "run", "--data", tiny_packed, *TINY, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert not list((tmp_path / "run").glob("jobs/*.json"))
    assert not list((tmp_path / "run").glob("jobs/*.pkl"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["pack", ".", "--config", "nosuch"], "no preset or file called 'nosuch'"),
        (["pack", ".", "data.nosuch=1"], "unknown setting 'data.nosuch'"),
        (["pack", "nosuchsource"], "nosuchsource: nothing there; give a folder of volumes or a table"),
        (["pipeline", "nosuchsource"], "nosuchsource: nothing there"),
        (["sample", "nosuchrun"], "nosuchrun: nothing there; give a run directory or imported weights"),
        (["sample", ".", "--masks", ".", "sampling.foo=1"], "unknown setting 'sampling.foo'"),
        (["sample", ".", "--masks", "nosuch"], "nosuch: nothing there; give --masks"),
        (["sample", "RUN"], "/packed is no folder: give --masks, or data.path=PACKED"),
        (["train", "--data", ".", "--from", "nosuch", *TINY], "nosuch: nothing there; give --from a run"),
    ],
)
def test_mistakes_in_other_stages(laptop: Cli, old_run: Path, tmp_path: Path, words: list[str], part: str) -> None:
    words = [str(old_run) if word == "RUN" else word for word in words]
    done = laptop("submit", words[0], "--dry-run", "--cluster", "devcluster", "--out", tmp_path / "out", *words[1:])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert part in done.stderr


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run whose data is gone, with a batch that 3 ranks can divide."""
    config = load_config(None, [*TINY, "training.global_batch=6", f"data.path={tmp_path / 'packed'}"]).config
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "config.json", config.dump())
    return tmp_path / "old"


def test_training_from_a_run_is_checked_with_its_settings(laptop: Cli, old_run: Path, tmp_path: Path) -> None:
    words = ["--dry-run", "--cluster", "devcluster", "--out", tmp_path / "new", "--from", old_run, "--data", tmp_path]
    done = laptop("submit", "train", *words, "--gpus-per-node", "3")
    assert done.returncode == 0, done.stderr
    refused = laptop("submit", "train", *words, "--gpus-per-node", "4")
    assert "6 is not a multiple of micro_batch x ranks = 1 x 4" in refused.stderr


@pytest.fixture
def login(laptop: Cli, tmp_path: Path) -> Callable[[str], Cli]:
    """`hpc-ddpm ARGUMENTS` where sbatch refuses scripts with this text in them; what it and scancel did is in `did`."""

    def refusing(text: str) -> Cli:
        refusal = "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1"
        number = f"n=$(/usr/bin/grep -c sbatch {tmp_path}/did); n=$((n + 1)); echo sbatch $n >> {tmp_path}/did"
        lines = {
            "sbatch": f"if /usr/bin/grep -q {text} $1; then {refusal}; fi\n{number}; echo Submitted batch job $n",
            "scancel": f"echo scancel $1 >> {tmp_path}/did",
            "squeue": "true",
            "srun": "true",
        }
        (tmp_path / "did").touch()
        for name, shell in lines.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{shell}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return laptop

    return refusing


def test_a_pipeline_is_queued_whole_or_not_at_all(login: Callable[[str], Cli], tmp_path: Path) -> None:
    words = ["pipeline", tmp_path, "--cluster", "devcluster", "--out", tmp_path / "out", *TINY]
    done = login("array=")("submit", *words)
    assert done.returncode == 2
    assert "SLURM refuses the job: Invalid qos" in done.stderr
    assert (tmp_path / "did").read_text().split("\n")[:4] == ["sbatch 1", "sbatch 2", "scancel 2", "scancel 1"]


def test_a_pipeline_passes_on_the_options_of_packing(laptop: Cli, tmp_path: Path) -> None:
    options = ["--skip-bad", "--overwrite", "--workers", "3"]
    words = [tmp_path, "--cluster", "devcluster", "--out", tmp_path / "out", *TINY]
    done = laptop("submit", "pipeline", "--dry-run", *words, *options)
    assert done.returncode == 0, done.stderr
    profile, shape = load_profile("devcluster"), (0, 1, 1)
    given = {"source": tmp_path, "out": tmp_path, "config": None, "overrides": None}
    request = _requests({**given, "workers": 3, "skip_bad": True, "overwrite": True}, profile, shape)[0]
    assert request.arguments[-5:] == (f"{tmp_path}/packed", "--workers", "3", "--skip-bad", "--overwrite")
    request = _requests({**given, "workers": None, "skip_bad": False, "overwrite": False}, profile, shape)[0]
    assert request.arguments[-1] == f"{tmp_path}/packed"


def test_what_slurm_refuses_is_one_line(laptop: Cli, tiny_packed: Path, tmp_path: Path) -> None:
    """Its own word for an account that is not the user's; the development cluster, run by its owner, refuses none."""
    said = "Batch job submission failed: Invalid account or account/partition combination specified"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho 'sbatch: error: {said}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    words = ["--out", tmp_path / "run", "--data", tiny_packed, *TINY]
    done = laptop("submit", "train", "--cluster", "devcluster", "--account", "theirs", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        "SLURM refuses the job: Invalid account or account/partition combination specified (asked for: " in done.stderr
    )
    assert "account theirs" in done.stderr
    assert not list((tmp_path / "run").glob("jobs/*.pkl"))


def test_a_refusal_names_what_was_asked_for(login: Callable[[str], Cli], tmp_path: Path) -> None:
    """Not the profile's GPU partition, of a stage that takes cores."""
    done = login("cpu")("submit", "pack", tmp_path, "--cluster", "example_dgx", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    asked = "partition cpu, account my-project, nodes 1, GPUs per node none, cores per node 112, memory per node 1920G"
    assert f"Invalid qos specification (asked for: {asked}, time 2-00:00:00, reservation my-course)" in done.stderr


def test_a_job_does_not_inherit_the_allocation_that_it_is_submitted_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n/usr/bin/env > {tmp_path}/env\necho Submitted batch job 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", LAUNCHED)
    for name in ("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_CONF", "SBATCH_ACCOUNT", *of_ranks):
        monkeypatch.setenv(name, "7")
    request = Request("report", ("report",), tmp_path / "run", load_profile("devcluster"))
    _submit_slurm(request, tmp_path, StageJob(("report",), str(tmp_path), str(tmp_path)))
    seen = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {name for name in seen if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert not seen & set(of_ranks)
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_a_job_that_cannot_be_recorded_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in {"sbatch": "echo Submitted batch job 1", "scancel": f"echo $1 > {tmp_path}/cancelled"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def is_full(submission: Submission) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(submission.folder / "1.json"))

    monkeypatch.setattr(Submission, "write", is_full)
    with pytest.raises(ClusterError, match=r"cannot write here \(No space left"):
        submit(Request("report", ("report",), tmp_path / "run", load_profile("devcluster")))
    assert (tmp_path / "cancelled").read_text() == "1\n"


@pytest.mark.parametrize("stage", ["pack", "sample"])
def test_a_file_in_the_place_of_the_folder_is_one_line(laptop: Cli, tmp_path: Path, stage: str) -> None:
    (tmp_path / "afile").touch()
    words = [tmp_path, *(["--masks", tmp_path] if stage == "sample" else [])]
    done = laptop("submit", stage, "--cluster", "devcluster", "--out", tmp_path / "afile", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "afile: cannot write here (Not a directory)" in done.stderr


def test_a_job_runs_the_code_that_was_submitted(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path / "jobs")
    assert take_snapshot(tmp_path / "jobs") == code
    show = "import hpc_ddpm, launch.cli; from hpc_ddpm import config; print(hpc_ddpm.__file__, launch.cli.__file__, "
    show += "config.presets_dir(), __import__('hpc_ddpm.runlog').runlog.git_commit())"
    env = rank_environment() | {"PYTHONPATH": str(code)}
    done = subprocess.run([sys.executable, "-P", "-c", show], env=env, capture_output=True, text=True, check=True)
    package, launch, presets, commit = done.stdout.split()
    assert all(Path(place).is_relative_to(code) for place in (package, launch, presets))
    assert Path(presets, "cluster", "local.yaml").is_file()
    assert commit == str(git_commit() or "unknown")
