"""From a request (what, where, how large) to a job: submitit's executors, and the batch script that they write."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from pydantic import ValidationError
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpc_ddpm.device import CACHES
from hpc_ddpm.distributed import LAUNCHERS, RANK_VARIABLES, free_port
from hpc_ddpm.errors import ClusterError, ConfigError
from hpc_ddpm.runlog import git_commit
from hpc_ddpm.text import has_control, show
from launch.jobs import VISIBLE_GPUS, StageJob
from launch.profiles import Profile
from launch.records import FOLDER, GPU_STAGES, Submission, submitting
from launch.snapshot import take_snapshot
from launch.watch import JobState, cancel, live_job

SRUN_ARGUMENTS = ["--kill-on-bad-exit=1", "--wait=60", "--open-mode=append"]
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
OF_RANKS = ("SLURM_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "TORCHELASTIC_")
"""Beginnings of variables that tell a process which rank it is."""


@dataclass(frozen=True)
class Request:
    """One stage as it is to run."""

    stage: str
    """train, sample, bench, pack or report."""
    arguments: tuple[str, ...]
    """Arguments of `hpc-ddpm`."""
    run_dir: Path
    profile: Profile
    num_tasks: int = 0
    """Tasks of the array; 0 is a plain job."""
    nodes: int = 1
    """Nodes of the job, or of each task."""
    ranks_per_node: int = 1
    """One per GPU, or with `gpus_per_rank` of them."""
    dependency: str = ""
    """Dependency in the form that `sbatch` takes."""
    gpus_per_rank: int = 1
    """GPUs for each rank; above 1 if the stage starts child ranks."""

    @property
    def needs_gpus(self) -> bool:
        """One for each rank; else the cores of whole nodes."""
        return self.stage in GPU_STAGES

    def after(self, job_id: str) -> Request:
        """The same, to be started when that job has ended well; at once where there is none."""
        return replace(self, dependency=f"afterok:{job_id}" if job_id else "")

    @property
    def world_size(self) -> int:
        """Ranks of the job, or of each task."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs on each node, for a stage that needs GPUs."""
        return self.ranks_per_node * self.gpus_per_rank

    @property
    def in_words(self) -> str:
        """Resources and the most that one start can use."""
        tasks, hours = max(1, self.num_tasks), self.profile.hours
        array = f"{tasks} tasks ({min(tasks, self.profile.array_parallelism)} at a time) × " if self.num_tasks else ""
        if not self.needs_gpus:
            return f"{array}{self.nodes} node{'s' * (self.nodes > 1)} without GPUs for at most {self.profile.time}"
        gpus = tasks * self.nodes * self.gpus_per_node
        return (
            f"{array}{self.nodes} node{'s' * (self.nodes > 1)} × {self.gpus_per_node} "
            f"GPU{'s' * (self.gpus_per_node > 1)} for at most {self.profile.time} = {gpus * hours:g} GPU-hours; "
            f"up to {self.profile.max_requeues} requeues of that size"
        )


def again(submission: Submission, num_tasks: int) -> Request:
    """The same arguments and resources, with this number of array tasks.

    Raises:
        ClusterError: an older version submitted it with what is refused now.
    """
    try:
        profile = Profile.model_validate(submission.profile)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ClusterError(f"job {submission.job_id} cannot be repeated as it was: {why}; submit it anew") from None
    return Request(
        submission.stage,
        tuple(submission.arguments),
        Path(submission.run_dir),
        profile,
        num_tasks if num_tasks > 1 else 0,
        submission.nodes,
        submission.ranks_per_node,
        gpus_per_rank=submission.gpus_per_rank,
    )


def submit(request: Request) -> Submission:
    """Start it: as a SLURM job or array, or as ranks of this machine in the background.

    Raises:
        ClusterError: a job of this run is queued or runs already, or may do so; or SLURM is not here or refuses.
        ConfigError: SLURM would read the path of the run otherwise.
    """
    check_path(request.run_dir)
    with submitting(request.run_dir):
        refuse_if_busy(request.run_dir)
        _keep_from_replacing(request.run_dir / FOLDER)
        umask = os.umask(0o022)  # what the job loads and runs is not for others to change
        try:
            os.umask(umask | 0o022)
            return _submit(request, umask)
        finally:
            os.umask(umask)


def check_path(run_dir: Path) -> None:
    """A batch script, and SLURM's patterns for names of logs, hold the path of a run.

    Raises:
        ConfigError: it would end a line there, or stand for something else.
    """
    path = str(run_dir.resolve())
    if has_control(path):
        raise ConfigError(f"{show(path)}: a path with a line break or another control character; rename the folder")
    if found := re.search(r"%[jtaA]|\\", path):
        raise ConfigError(f"{path}: '{found.group()}' means something else in the names of logs; rename the folder")


def _keep_from_replacing(folder: Path) -> None:
    """Where a group shares a run, its members may add jobs, but not replace those of others."""
    facts = folder.stat()
    if facts.st_uid == os.getuid() and facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(facts.st_mode | stat.S_ISVTX)


def refuse_if_busy(run_dir: Path) -> None:
    """A run has one job at a time.

    Raises:
        ClusterError: one is queued or runs, or nobody here knows whether it does.
    """
    busy = live_job(run_dir)
    if busy is not None:
        raise ClusterError(
            f"{run_dir}: job {busy} is queued or runs already; `hpc-ddpm jobs show {run_dir}` says how it stands, "
            f"`hpc-ddpm jobs cancel {run_dir}` ends it"
        )


def _submit(request: Request, umask: int) -> Submission:
    """Submit the job; if SLURM refuses it, leave no files behind."""
    folder = request.run_dir.resolve() / FOLDER
    code = take_snapshot(folder)
    before = set(folder.iterdir())
    job = StageJob(request.arguments, str(request.run_dir.resolve()), str(Path.cwd()), umask)
    try:
        is_local = request.profile.executor == "local"
        job_id = _submit_local(request, folder, code, job) if is_local else _submit_slurm(request, code, job)
    except ClusterError:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise
    submission = Submission(
        job_id=job_id,
        stage=request.stage,
        arguments=list(request.arguments),
        run_dir=str(request.run_dir.resolve()),
        cwd=str(Path.cwd()),
        profile=request.profile.model_dump(mode="json"),
        num_tasks=request.num_tasks,
        nodes=request.nodes,
        ranks_per_node=request.ranks_per_node,
        submitted=time.time(),
        host=socket.gethostname(),
        git_commit=git_commit(),
        gpus_per_rank=request.gpus_per_rank,
    )
    try:
        submission.write()
    except OSError:  # a job without a record would be started a second time
        cancel(JobState(submission, {}))
        raise
    return submission


# --------------------------------------------------------------------------------------------------------- SLURM


class _Executor(submitit.SlurmExecutor):
    """An executor that also works without SLURM, to show the batch script."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def batch_script(request: Request) -> str:
    """Exactly what is handed to sbatch, except for the name of the copied code.

    Raises:
        ConfigError: see `check_path`.
    """
    check_path(request.run_dir)
    executor = _build(request, request.run_dir.resolve() / FOLDER / "code-SNAPSHOT")
    if request.num_tasks > 1:
        executor.parameters["map_count"] = request.num_tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _submit_slurm(request: Request, code: Path, job: StageJob) -> str:
    executor = _build(request, code)
    try:
        with _outside_of_jobs(), redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says
            if request.num_tasks > 1:
                return str(executor.submit_array([job] * request.num_tasks)[0].job_id.partition("_")[0])
            return str(executor.submit(job).job_id)
    except FileNotFoundError:
        raise ClusterError(
            "no `sbatch` on this machine; submit from one of the cluster's login nodes, look with --dry-run, or run "
            "here with --cluster local"
        ) from None
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise ClusterError(_refusal(str(error), request)) from None


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide variables about ranks from sbatch, which would pass them on to the ranks of the job."""
    of_ranks = {key for key in os.environ if key.startswith(OF_RANKS)} | {*RANK_VARIABLES, *LAUNCHERS} & set(os.environ)
    inherited = {key: os.environ[key] for key in of_ranks - set(OF_THE_CLUSTER)}
    for key in inherited:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _refusal(text: str, request: Request) -> str:
    """SLURM's own words, and what was asked for."""
    lines = [line.split("error: ", 1)[1] for line in text.splitlines() if line.startswith("sbatch: error: ")]
    said = lines[-1].removeprefix("Batch job submission failed: ") if lines else " ".join(text.split())
    wanted = _resources(request)
    facts = {name: wanted.get(name) for name in ("partition", "account", "qos", "constraint", "nodes")}
    facts |= {
        "GPUs per node": request.gpus_per_node if request.needs_gpus else "none",
        "of type": request.needs_gpus and request.profile.gpu_type,
        "cores per node": wanted["ntasks_per_node"] * wanted["cpus_per_task"],
        "memory per node": wanted.get("mem"),
        "time": wanted["time"],
        "array": request.num_tasks and f"of {request.num_tasks}",
        **request.profile.sbatch,
    }
    asked = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    return f"SLURM refuses the job: {said} (asked for: {asked}); `sinfo -o '%P %D %G %l'` lists what there is"


def _build(request: Request, code: Path) -> _Executor:
    profile, folder = request.profile, request.run_dir.resolve() / FOLDER
    python = profile.python or shlex.quote(sys.executable)
    python = f"{profile.container} {python} -P".strip()  # -P: the folder that it was submitted from is not searched
    executor = _Executor(folder, python=python)
    wanted, srun_arguments = _resources(request), SRUN_ARGUMENTS
    if "%" in str(folder):  # SLURM fills in patterns: these win over submitit's
        log = f"{folder}/".replace("%", "%%") + ("%A_%a" if request.num_tasks > 1 else "%j")
        wanted["additional_parameters"] |= {"output": f"{log}_0_log.out"}
        srun_arguments = [*SRUN_ARGUMENTS, "--output", f"{log}_%t_log.out"]
    executor.update_parameters(
        setup=_setup(profile, code),
        teardown=_teardown(request, python),
        srun_args=srun_arguments,
        stderr_to_stdout=True,
        wckey=None,
        **wanted,
    )
    return executor


def _resources(request: Request) -> dict[str, Any]:
    """What one job or array task asks for, in submitit's names; empty settings of the profile are left out."""
    profile, gpus = request.profile, request.needs_gpus
    partition = profile.partition if gpus else profile.cpu_partition or profile.partition
    share = request.gpus_per_rank if gpus else profile.gpus_per_node
    wanted: dict[str, Any] = {
        "job_name": f"hpc-ddpm-{request.stage}-{request.run_dir.resolve().name}",
        "partition": partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint if gpus else "",
        "mem": profile.memory(request.ranks_per_node * share),
        "dependency": request.dependency,
    }
    wanted = {name: value for name, value in wanted.items() if value} | {
        "nodes": request.nodes,
        "ntasks_per_node": request.ranks_per_node,
        "cpus_per_task": profile.cpus_per_gpu * share,
        "time": profile.time,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "additional_parameters": {"requeue": True, "kill_on_invalid_dep": "yes", **profile.sbatch},
    }
    if gpus:
        wanted["additional_parameters"] |= profile.gpu_request(request.gpus_per_node)
    return wanted


def _setup(profile: Profile, code: Path) -> list[str]:
    variables = [f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()]
    caches = [f'export {name}="{profile.scratch}/hpc_ddpm-$UID/{name.lower()}"' for name in CACHES]
    return [
        "read -r began_s _ < /proc/uptime  # of a clock that nobody sets",
        *(f"module load {shlex.quote(name)}" for name in profile.modules),
        *profile.setup,
        *variables,
        *caches,
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun forgets --cpus-per-task since SLURM 22.05",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _teardown(request: Request, python: str) -> list[str]:
    """A job that ends by itself within the grace time of a preemption counts as failed: it must requeue itself."""
    profile = request.profile
    limits = f"--max-requeues {profile.max_requeues} --max-crashes {profile.max_crashes} --limit-s {profile.limit_s}"
    words = f"{shlex.quote(str(request.run_dir.resolve()))} {request.stage} $code {limits} --ran-s $ran_s"
    ask = f"{python} -m launch.after_job {words}"
    return [
        "code=$?",
        "read -r now_s _ < /proc/uptime",
        "ran_s=$((${now_s%.*} - ${began_s%.*}))",
        f"if {ask}; then",
        "  trap '' TERM  # a requeue ends this script too, and what SLURM said is recorded first",
        "  said=$(scontrol requeue $SLURM_JOB_ID 2>&1)",
        f'  {ask} --answer $? "$said"',
        "fi",
        "exit $code",
    ]


# --------------------------------------------------------------------------------------------------------- local


def _submit_local(request: Request, folder: Path, code: Path, job: StageJob) -> str:
    """Ranks in the background that outlive this process and its terminal; MASTER_PORT is a free one."""
    environment = {
        **request.profile.environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "MASTER_PORT": free_port(),
        **_visible_gpus(request),
    }
    executor = submitit.LocalExecutor(folder, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(
        timeout_min=request.profile.limit_s / 60,
        signal_delay_s=request.profile.signal_delay_s,
        tasks_per_node=request.ranks_per_node,
        gpus_per_node=request.gpus_per_node if request.needs_gpus else 0,
        stderr_to_stdout=True,
    )
    with (
        submitit.helpers.environment_variables(**environment),
        _output_to(folder / "local.log"),
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=os.setsid) as session,
    ):
        return session.submit(_start, executor, job).result()


def _start(executor: submitit.LocalExecutor, job: StageJob) -> str:
    """In a session of its own, which neither Ctrl-C nor the end of the terminal reaches."""
    return str(executor.submit(job).job_id)


def _visible_gpus(request: Request) -> dict[str, str]:
    """Those that the profile or this process's environment names, the first of them; submitit would count from 0.

    Raises:
        ClusterError: there are fewer than ranks.
    """
    environment = {**os.environ, **request.profile.environment}
    if "CUDA_VISIBLE_DEVICES" not in environment or not request.needs_gpus:
        return {}
    given, wanted = str(environment["CUDA_VISIBLE_DEVICES"]), request.gpus_per_node
    names = given.split(",")
    if len(names) < wanted and given not in ("", "-1") and environment.get("HPC_DDPM_DEVICE") != "cpu":
        raise ClusterError(
            f"{wanted} GPUs are asked for, but CUDA_VISIBLE_DEVICES={given} names {len(names)}; name more, or ask for "
            "fewer (--gpus-per-node)"
        )
    return {VISIBLE_GPUS: ",".join(names[:wanted])}


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Children that start here must not hold this process's output open: whoever reads it would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
