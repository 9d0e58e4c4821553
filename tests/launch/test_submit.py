"""Profiles, the dry run, what comes back after an end, and jobs without SLURM."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hpc_ddpm.config import load_config, presets_dir
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.runlog import git_commit, read_metrics
from launch.after_job import End, decide
from launch.executor import Request, _submit_slurm, _visible_gpus, submit
from launch.jobs import StageJob, _export_local_ranks
from launch.pipeline import _requests
from launch.profiles import Profile, list_profiles, load_profile
from launch.records import Submission
from launch.snapshot import take_snapshot
from launch.watch import live_job
from tests.conftest import REPOSITORY, TINY, rank_environment

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_shipped_profiles() -> None:
    assert {name: load_profile(name).executor for name in list_profiles()} == {
        "debug": "debug",
        "devcluster": "slurm",
        "example_dgx": "slurm",
        "example_university": "slurm",
        "local": "local",
    }
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["configs"] == "hpc_ddpm/configs"
    assert presets_dir() / "cluster" / "local.yaml" == list_profiles()["local"]


def test_a_users_own_profile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".config" / "hpc_ddpm" / "cluster"
    folder.mkdir(parents=True)
    (folder / "devcluster.yaml").write_text("partition: mine\ntime: 2-12:00:00\n")
    profile = load_profile("devcluster", {"nodes": 3, "account": None})
    assert (profile.partition, profile.hours, profile.nodes) == ("mine", 60, 3)
    assert load_profile("example_university").partition == "gpu-preempt"


def test_a_time_is_taken_as_written(tmp_path: Path) -> None:
    """YAML 1.1 reads it as 30600, a number of base 60."""
    path = tmp_path / "profile.yaml"
    path.write_text("nodes: 2\ntime: 8:30:00  # of the night\n")
    profile = load_profile(str(path))
    assert (profile.time, profile.limit_s) == ("8:30:00", 30600)
    assert Profile.model_validate(profile.model_dump(mode="json")) == profile


@pytest.mark.parametrize(
    ("text", "changes", "part"),
    [
        ("partition: a\npartitoin: b", {}, r"profile.yaml:2: unknown setting 'partitoin'; did you mean 'partition'"),
        ("nodes: 1\ntime: 24h", {}, r"profile.yaml:2: '24h' is no time; expected HOURS:MINUTES:SECONDS"),
        ("nodes: 1\ntime: 1440", {}, r"profile.yaml:2: '1440' is no time; .*such as 24:00:00 or 1-00:00:00"),
        ("time: 90:00", {}, r"profile.yaml:1: '90:00' is no time"),
        ("nodes: 1", {"time": "0:05:00"}, "time=0:05:00 is no longer than the warning before its end"),
        ("memory_per_gpu: 5 GB", {}, r"profile.yaml:1: memory_per_gpu='5 GB'"),
        ("executor: local\nnodes: 2", {}, "executor local has one node, found nodes=2"),
        ("partition: a", {"nodes": 0}, "--nodes: nodes=0: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_in_a_profile(tmp_path: Path, text: str, changes: dict[str, int], part: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_profile(str(path), changes)


def test_no_such_profile() -> None:
    with pytest.raises(ConfigError, match=r"called 'devcluser'; did you mean 'devcluster'"):
        load_profile("devcluser")


# ------------------------------------------------------------------------------------------------------- dry run


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
    (tmp_path / "old" / "config.json").write_text(json.dumps(config.dump()))
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
    assert request.arguments[-6:] == (f"{tmp_path}/packed", "--workers", "3", "--skip-bad", "--overwrite", "--quiet")
    request = _requests({**given, "workers": None, "skip_bad": False, "overwrite": False}, profile, shape)[0]
    assert request.arguments[-2:] == (f"{tmp_path}/packed", "--quiet")


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
    for name in ("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "7")
    request = Request("report", ("report",), tmp_path / "run", load_profile("devcluster"))
    _submit_slurm(request, tmp_path, StageJob(("report",), str(tmp_path), str(tmp_path)))
    seen = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {name for name in seen if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF", "SBATCH_ACCOUNT"}
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


# ------------------------------------------------------------------------------------------------ after the end


def ended(mark: str, *, is_excused: bool = False, is_orderly: bool = False) -> dict[str, object]:
    return {"event": "end", "mark": mark, "is_excused": is_excused, "is_orderly": is_orderly}


def stopped(mark: str) -> dict[str, object]:
    return ended(mark, is_orderly=True)


def at_limit(mark: str) -> End:
    return End(140, mark, (140,), share=0.99)


@pytest.mark.parametrize(
    ("end", "ends", "restarts", "comes_back", "part"),
    [
        (End(0), [], 0, False, "done"),
        (End(2), [], 0, False, "failed with exit code 2; the log says why"),
        (End(143, ranks=(2,)), [], 0, False, "failed with exit code 2"),  # srun ended the others, the highest code wins
        (End(143, "a", (143, 143)), [], 9, True, "stopped by SIGTERM"),
        (End(143, "a", (143,), share=0.1), [ended("a", is_excused=True)] * 8, 8, True, "stopped by SIGTERM"),
        (at_limit("b"), [stopped("a"), stopped("a")], 2, True, "stopped by SIGUSR2, requeued after 2 restarts"),
        (at_limit("a"), [stopped("0"), stopped("a"), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (
            at_limit("a"),
            [stopped("a")] * 3,
            3,
            False,
            "3 starts in a row without progress, the last: stopped by SIGUSR2",
        ),
        (at_limit("a"), [stopped("a"), ended("a", is_excused=True), stopped("a")], 3, True, "stopped by SIGUSR2"),
        (at_limit("a"), [ended("a"), stopped("a")], 2, False, "3 starts in a row without progress"),
        (End(137, "a", (75,)), [stopped("a"), ended("a")], 2, True, "a rank was lost"),
        (End(143, "a", (140,)), [], 8, True, "stopped by SIGUSR2"),  # srun ended a slower rank
        (End(143, "a", (143,)), [], 10, False, "max_requeues"),
        (End(137, "a", (75,)), [], 0, True, "a rank was lost"),
        (End(143, "a"), [], 0, True, "ended by a signal before it could save"),
        (End(143, "a", is_hang=True), [], 0, True, "a rank hung, see stacks-of-rank-*.txt"),
        (End(143, "a"), [ended("a")] * 2, 2, False, "3 starts in a row without progress, the last: ended by a signal"),
        (End(137, "a"), [ended("0"), ended("a")], 2, True, "a rank was lost"),
        (End(137, "a"), [ended("a"), ended("a"), ended("a", is_excused=True)], 3, True, "a rank was lost"),
    ],
)
def test_what_comes_back(end: End, ends: list[dict[str, object]], restarts: int, comes_back: bool, part: str) -> None:
    found, why = decide(end, ends, restarts, max_requeues=10, max_crashes=3)
    assert found == comes_back
    assert part in why


# --------------------------------------------------------------------------------------------------- this machine


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
